"""Machines that are none: network namespaces on one bridge, each with processes, home and an sshd of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

NET = "10.77.7"
"""The first three bytes of all addresses; the caller's own ends in 1."""
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin")
BRIDGE = "rcvbr"
HOME = "/home"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def lacking() -> str | None:
    """Names what this machine lacks to make such machines; None if it has all."""
    for tool in ("ip", "unshare", "nsenter", "rsync", "ssh", "ssh-keygen"):
        if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"{tool} is not installed"
    if SSHD is None:
        return "sshd is not installed: apt-get install openssh-server"
    probe = subprocess.run(["unshare", "-n", "-m", "-p", "-u", "-i", "-f", "true"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"namespaces cannot be made here: {probe.stderr.strip()}"


def sh(*command: str, **options) -> str:
    """Runs a command to its end, and returns what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


STARTS = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray -o size=2g,mode=1777
mount -t tmpfs tmpfs /dev/shm -o size=2g,mode=1777
mount --bind {own}/passwd /etc/passwd
mount --bind {own}/hosts /etc/hosts
mkdir -p /run/sshd
mount --bind {own}/home {home}
mount --bind {shared} /shared
hostname {name}
exec {sshd} -D -e -f {own}/sshd_config
"""


@dataclass
class Machine:
    """One of `number` machines, which is off until `boot`. It has this machine's files, but a home of its own."""

    folder: Path
    index: int
    number: int
    process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return f"{NET}.{self.index + 2}"

    def run(self, *command: str) -> str:
        """Runs `command` on the machine, as its root."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return sh("nsenter", "-t", children[0], "-m", "-p", "-n", "-u", "-i", *command)

    def runs(self, process: str) -> bool:
        """Whether a process with these words in its command runs on the machine."""
        return process in self.run("ps", "axo", "args")

    def boot(self) -> None:
        """Starts the machine, and waits for its ssh server."""
        own, space = self.folder / f"machine{self.index}", f"rcv{self.index}"
        (own / "home").mkdir(parents=True)
        python = Path(sys.base_prefix) / "bin"
        (own / "home" / ".bashrc").write_text(f"export PATH={python}:$PATH\n")
        users = f"root:x:0:0:root:{HOME}:/bin/bash\nsshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n"
        (own / "passwd").write_text(users)
        others = "".join(f"{NET}.{other + 2} machine{other}\n" for other in range(self.number))
        (own / "hosts").write_text(f"127.0.0.1 localhost\n{NET}.1 own\n{others}")
        shutil.copyfile(self.folder / "key.pub", own / "keys")
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(own / "host_key"))
        lines = [
            f"ListenAddress {self.address}", f"HostKey {own}/host_key", f"AuthorizedKeysFile {own}/keys",
            "UsePAM no", "PermitRootLogin yes", "StrictModes no", "MaxStartups 100", "MaxSessions 100",
        ]  # fmt: skip
        (own / "sshd_config").write_text("\n".join(lines) + "\n")
        sh("ip", "netns", "add", space)
        sh("ip", "link", "add", f"{space}h", "type", "veth", "peer", "name", "eth0", "netns", space)
        sh("ip", "link", "set", f"{space}h", "master", BRIDGE, "up")
        for setting in (("link", "set", "lo", "up"), ("address", "add", f"{self.address}/24", "dev", "eth0")):
            sh("ip", "-n", space, *setting)
        sh("ip", "-n", space, "link", "set", "eth0", "up")
        shared = self.folder / "shared"
        script = STARTS.format(own=own, home=HOME, shared=shared, sshd=SSHD, name=f"machine{self.index}")
        with (own / "log").open("w") as log:
            # `nsenter` replaces itself, so that the process is the one that holds the machine.
            self.process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{space}", "unshare", "-m", "-p", "-u", "-i", "-f", "--kill-child",
                 "bash", "-c", script],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env={"PATH": PATH},
            )  # fmt: skip
        deadline = time.monotonic() + 60
        options = [
            "-i",
            str(self.folder / "key"),
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        ]
        while subprocess.run(["ssh", *options, f"root@{self.address}", "true"], capture_output=True).returncode:
            assert self.process.poll() is None, (own / "log").read_text()
            assert time.monotonic() < deadline, (own / "log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        """Ends the machine at once, as a cut of its power does."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        subprocess.run(["ip", "netns", "delete", f"rcv{self.index}"], capture_output=True)


@contextlib.contextmanager
def machines(folder: Path, number: int) -> Iterator[list[Machine]]:
    """Machines that see `folder / "shared"` at /shared. A key to all of them is `folder / "key"`, their user root."""
    # Bridge, addresses and mountpoint are the same for all.
    with FileLock("/tmp/raycv-machines.lock"):
        yield from _machines(folder, number)


def _machines(folder: Path, number: int) -> Iterator[list[Machine]]:
    mountpoint = Path("/shared")
    made = not mountpoint.exists()
    mountpoint.mkdir(exist_ok=True)
    (folder / "shared").mkdir()
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    every = [Machine(folder, index, number) for index in range(number)]
    sh("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        sh("ip", "address", "add", f"{NET}.1/24", "dev", BRIDGE)
        sh("ip", "link", "set", BRIDGE, "up")
        yield every
    finally:
        for machine in every:
            machine.kill()
        sh("ip", "link", "delete", BRIDGE)
        if made:
            mountpoint.rmdir()
