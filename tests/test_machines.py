"""The cluster launcher on machines with an ssh server each, of which nothing is prepared by hand: `make test-cluster`.

They are network namespaces. `deploy/on-prem.yaml` is used as a user would, but for addresses and the packages of the
lock, which the machines find on this one instead of downloading them.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.commands import ROOT
from support.interrupted_runs import amid_an_epoch
from support.machines import NET, lacking, machines
from support.mlflow_runs import serving

from raycv.common.files import read_json
from raycv.results.run_folder import RunFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
]
PORT, DASHBOARD = 5077, 8377


class Cluster:
    """Three machines, the last of which is off, in a cluster file, and a user's home with a key to them."""

    def __init__(self, folder, machines):
        self.folder, self.machines = folder, machines
        self.shared = folder / "shared"
        self.runs = self.shared / "runs"
        self.home = folder / "user"
        self.home.mkdir()
        self.file = self.home / "on-prem.yaml"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        self.environment = environment | {"HOME": str(self.home), "RAY_AUTH_MODE": "token", "TTY_INTERACTIVE": "0"}
        self.ray("get-auth-token", "--generate")
        self.write()

    def write(self):
        """Writes the cluster file."""
        workers = self.machines[1:]
        text = (ROOT / "deploy" / "on-prem.yaml").read_text()
        packages, scripts = sysconfig.get_path("purelib"), Path(sys.executable).parent
        own = "$(echo ~/raycv-env/lib/python*/site-packages)"
        # The packages of the lock, for the build of raycv too, and the command `ray` of the machine's own environment.
        found = f'echo {packages} > {own}/lock.pth; sed "1s|.*|#!$HOME/raycv-env/bin/python|" {scripts}/ray > '
        found += "~/raycv-env/bin/ray; chmod +x ~/raycv-env/bin/ray"
        for old, new in (
            ("HEAD-CHANGE-ME", self.machines[0].address),
            ("WORKER-CHANGE-ME", ", ".join(machine.address for machine in workers)),
            ("max_workers: 1", f"max_workers: {len(workers)}"),
            ("USER-CHANGE-ME", "root"),
            ("~/.ssh/id_ed25519", str(self.folder / "key")),
            ("~/raycv-env/bin/pip install -q -r ~/raycv-src/requirements.lock", found),
            ("pip install -q --no-deps", "pip install -q --no-deps --no-build-isolation"),
            ("ray start", "ray start --num-cpus=1 --object-store-memory=200000000"),
        ):
            assert old in text, old
            text = text.replace(old, new)
        self.file.write_text(text)

    def command(self, *words):
        return [sys.executable, "-m", "ray.scripts.scripts", *words]

    def ray(self, *words, timeout=600):
        """`ray <words>` in the checkout, to its end. Returns what it printed."""
        done = subprocess.run(
            self.command(*words), cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def tunnel(self):
        """The head's dashboard on this machine, as `ray dashboard` makes it."""
        words = ("dashboard", str(self.file), "--port", str(DASHBOARD), "--remote-port", "8265")
        with (self.folder / "tunnel").open("w") as log:
            process = subprocess.Popen(
                self.command(*words), cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{DASHBOARD}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()

    def nodes(self, address):
        """The addresses of the nodes that are alive."""
        token = (self.home / ".ray" / "auth_token").read_text().strip()
        asked = urllib.request.Request(f"{address}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            summary = json.load(answer)["data"]["summary"]
        return sorted(node["ip"] for node in summary if "ip" in node and node["raylet"]["state"] == "ALIVE")

    def wait_for_nodes(self, address, *machines):
        def there():
            with contextlib.suppress(OSError, urllib.error.URLError):
                return self.nodes(address) == sorted(machine.address for machine in machines)

        wait(there, 180, lambda: f"nodes: {self.nodes(address)}")


def wait(happened, seconds, told):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, told()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "server").mkdir()
    with machines(folder, 3) as every, serving(folder / "server", PORT, f"{NET}.1"):
        for machine in every[:2]:
            machine.boot()
        cluster = Cluster(folder, every)
        cluster.ray("up", "--yes", str(cluster.file))
        with cluster.tunnel() as address:
            cluster.wait_for_nodes(address, *every[:2])
        yield cluster


def test_a_submitted_run_trains_on_both_machines_and_is_fetched(cluster, tmp_path):
    from mlflow import MlflowClient

    store = f"http://{NET}.1:{PORT}"
    overrides = ("experiment=quickstart", "cv.folds=5", "run.name=first", f"tracking.uri={store}")
    said = cluster.ray("submit", str(cluster.file), "raycv/run.py", "--", *overrides)
    assert "Cluster: 2 nodes" in said
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("raycv").experiment_id])
    found = {run.info.run_name: run.info.status for run in runs}
    assert found == {"first": "FINISHED"} | {f"fold_{fold}": "FINISHED" for fold in range(5)}
    # The command of the page, from the checkout, where the private folder `runs` does not travel.
    page = (ROOT / "deploy" / "on-prem.yaml").read_text()
    source, target = re.search(r"ray rsync-down deploy/on-prem.yaml (\S+) (\S+)", page).groups()
    cluster.ray("rsync-down", str(cluster.file), source, f"{tmp_path}/{target}")
    fetched = RunFolder(tmp_path / target / "first")
    assert fetched.report.read_bytes() == (cluster.runs / "first" / "report.json").read_bytes()
    trained = {read_json(fetched.fold(fold).result)["worker"]["address"] for fold in range(5)}
    assert trained == {machine.address for machine in cluster.machines[:2]}


def test_a_job_outlives_a_machine_and_a_share_that_are_lost_and_uses_one_that_comes_late(cluster):
    """A worker is killed in the middle; a machine comes late, and loses its share in the middle of a fold."""
    head, lost, late = cluster.machines
    run = RunFolder(cluster.runs / "job")
    log = cluster.folder / "job.log"
    overrides = ["experiment=quickstart", "cv.folds=3", "train.epochs=25", "train.patience=25", "run.name=job"]
    overrides += ["train.checkpoint_minutes=0.01", "resources.cpus_per_fold=1", f"tracking.uri=http://{NET}.1:{PORT}"]

    def said():
        return log.read_text()

    def until(happened):
        def held():
            assert job.poll() is None, said()
            return happened()

        wait(held, 600, said)

    with cluster.tunnel() as address, log.open("w") as output:
        job = subprocess.Popen(
            cluster.command(
                "job", "submit", "--address", address, "--working-dir", ".", "--",
                "python", "-m", "raycv.run", *overrides,
            ),
            cwd=ROOT, env=cluster.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        until(lambda: sum(amid_an_epoch(run.fold(fold)) for fold in range(3)) == 2)
        lost.kill()
        # Its ssh server is waited for: a machine that is in the file joins whenever it is on.
        late.boot()
        cluster.wait_for_nodes(address, head, late)
        until(lambda: "worker 0 of the fold died, or its node; the fold is tried again from its last" in said())
        (again,) = re.findall(r"fold (\d): worker 0 of the fold died", said())
        until(lambda: f"fold {again}: resumes after" in said())
        assert late.runs("RayTrainWorker")
        late.run("umount", "-l", "/shared")
        assert job.wait(timeout=600) == 0, said()
    assert "does not see the run's folder" in said()
    assert "This node is left out from now on" in said()
    assert run.report.is_file()
    restarts = [read_json(run.fold(fold).result)["restarts"] for fold in range(3)]
    assert any("died, or its node" in why for whys in restarts for why in whys)
    assert any("does not see" in why for whys in restarts for why in whys)


def test_ray_down_leaves_nothing_of_ray_on_the_head(cluster):
    cluster.ray("down", "--yes", str(cluster.file))
    assert not cluster.machines[0].runs("raylet")
