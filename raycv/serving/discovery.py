"""The file by which `raycv.infer` finds a scorer: written by the server, read by clients."""

import ipaddress
import os
import socket
import stat
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from raycv.common.files import write_json
from raycv.common.locations import resolve
from raycv.common.secrets import mask_secrets
from raycv.config.schema import ServerConfig
from raycv.data.discovery import find_criteria
from raycv.data.problems import Faults
from raycv.errors import UserError
from raycv.inference.questions import shown_finish
from raycv.model.base_model import fetch_trained_base, is_folder
from raycv.model.checkpoint import MANIFEST, SUMMED, read_info
from raycv.serving.connection import Connection, Unavailable, checked_address, checked_token
from raycv.serving.messages import Announcement, Setup

PATTERN = ".scorer-*.json"
HEALTH_ATTEMPTS = 20


def stamps_of(files: Iterable[Path]) -> dict[str, list[int]]:
    """Path -> stamp of each file, which any copy over the file changes. Raises: OSError if a file cannot be read."""
    return {str(path): _stamp(path) for path in files}


def _stamp(path: Path) -> list[int]:
    """Time of change in ns, size in bytes, inode number."""
    status = path.stat()
    return [status.st_ctime_ns, status.st_size, status.st_ino]


def discovery_file(runs: Path, port: int) -> Path:
    """The file in `runs` in which the scorer on `port` announces its address."""
    return runs.absolute() / PATTERN.replace("*", str(port))


def read_announcement(file: Path) -> Announcement | None:
    """The announcement in `file`; None if it cannot be used. The file of a dead scorer is removed."""
    try:
        status = file.stat()
        # A file that others can write could send posts anywhere, so we read only a private file of this user.
        if status.st_uid != os.getuid() or status.st_mode & 0o077 or not stat.S_ISREG(status.st_mode):
            return None
        record = Announcement.model_validate_json(file.read_text(encoding="utf-8"))
        checked_address(record.url)
        checked_token(record.token)
        if record.host != socket.gethostname():
            return None
        os.kill(record.pid, 0)
    except ProcessLookupError:
        remove_announcement(file)
        return None
    except (OSError, ValueError, UserError):
        return None
    return record


def remove_announcement(file: Path) -> None:
    """Removes the file of a scorer that is gone. In a folder that others share it may have to stay."""
    with suppress(OSError):
        file.unlink()


def first_changed(stamps: Mapping[str, list[int]]) -> str | None:
    """The first file of `stamps` that has changed or cannot be read; None if there is no such file."""
    for file, stamp in stamps.items():
        try:
            same = _stamp(Path(file)) == stamp
        except (OSError, ValueError):
            same = False
        if not same:
            return file
    return None


def files_of(checkpoints: Sequence[Path], criteria_dir: str | None, base: str | None) -> list[Path]:
    """The files that answers depend on. A base model from the hub has a known commit, so its files never change."""
    info = read_info(checkpoints[0])
    files = [folder / name for folder in checkpoints for name in (MANIFEST, *SUMMED)]
    # The load of the model refuses a checkpoint that lacks one of these, and explains it.
    files = [file for file in files if file.is_file()]
    # The criteria were found when they were read, so we ignore faults here. Other files of their folder may change
    # with every answer, so we stamp only the file of the criteria.
    criteria = find_criteria(Path(resolve(criteria_dir or info.criteria_dir)), Faults())
    files += [criteria] if criteria else []
    if is_folder(resolve(base or info.base_model)):
        found = fetch_trained_base(info.base_model, info.base_revision, base)
        files += [found.path / name for name in found.files]
    return files


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def announcement(setup: Setup) -> Announcement:
    """Asks the scorer for its model, and returns all that a client must know.

    Raises:
        UserError: The scorer does not answer, or another one answers at its address.
    """
    config = setup.config.serve
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    url = f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"
    for _ in range(HEALTH_ATTEMPTS):
        try:
            with Connection(url, config.token) as connection:
                health = connection.health()
            break
        except (Unavailable, ConnectionRefusedError):
            time.sleep(0.5)
    else:
        raise UserError(
            f"The scorer started, but does not answer at {url}.",
            kind="scorer-failed",
            remedies=["see that the port is free"],
        )
    if health.instance != setup.instance:
        raise UserError(
            f"Another scorer answers at {url}.", kind="scorer-failed", remedies=["take another port: serve.port=0"]
        )
    return Announcement(
        url=url,
        token=config.token,
        pid=os.getpid(),
        host=setup.host,
        instance=setup.instance,
        stamps=setup.stamps,
        tracking_uri=setup.store and mask_secrets(setup.store),
        experiment=setup.config.tracking.experiment,
        model=health.model,
    )


def announce(record: Announcement, file: Path, limits: ServerConfig) -> None:
    """Writes the discovery file, readable only for its owner, and prints the address and who can reach it."""
    write_json(file, record.model_dump(), private=True)
    model = record.model
    finish = shown_finish(model.finished)
    say(f"run {model.named}, fold {model.fold}, {finish}, {model.base}, {model.precision}")
    say(f"listening on {record.url}  (POST /score, GET /health; the page: {record.url}/docs)")
    if not is_loopback(limits.host):
        say(f"other machines can reach it at serve.host={limits.host}, port {limits.port}")
    if limits.token:
        say("each request must have the token: Authorization: Bearer <token>")
    say(f"raycv.infer finds it automatically with dir={file.parent}; Ctrl-C (or SIGTERM) stops it")


def say(text: str) -> None:
    """Prints a line for the user who started the server."""
    sys.stdout.write(f"raycv.serve: {text}\n")
    sys.stdout.flush()
