"""The file by which `raycv.infer` finds a scorer: written by the server, read by clients."""

import ipaddress
import os
import socket
import stat
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from raycv.common.files import read_json, record_of, write_json
from raycv.common.secrets import mask_secrets
from raycv.errors import UserError
from raycv.inference.questions import shown_finish
from raycv.serving.connection import Connection, Unavailable, checked_address, checked_token
from raycv.serving.messages import Announcement, ServedModel, Setup

if TYPE_CHECKING:
    from raycv.config.schema import ServerConfig

PATTERN = ".scorer-*.json"
HEALTH_ATTEMPTS = 20


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
        record = record_of(Announcement, read_json(file))
        checked_address(record.url)
        checked_token(record.token)
        if record.host != socket.gethostname():
            return None
        # Others than a positive number mean groups of processes.
        if record.pid < 1:
            return None
        os.kill(record.pid, 0)
    except ProcessLookupError:
        remove_announcement(file)
        return None
    except (OSError, ValueError, OverflowError, UserError):
        return None
    return record


def remove_announcement(file: Path) -> None:
    """Removes the file of a scorer that is gone. In a folder that others share it may have to stay."""
    with suppress(OSError):
        file.unlink()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def announcement(setup: Setup) -> tuple[Announcement, ServedModel]:
    """Asks the scorer for its model, and returns what a client must know to ask it too, with the model.

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
    record = Announcement(
        url=url,
        token=config.token,
        pid=os.getpid(),
        host=setup.host,
        instance=setup.instance,
        tracking_uri=setup.store and mask_secrets(setup.store),
        experiment=setup.config.tracking.experiment,
    )
    return record, health.model


def announce(record: Announcement, model: ServedModel, file: Path, limits: "ServerConfig") -> None:
    """Writes the discovery file, readable only for its owner, and prints the address and who can reach it."""
    write_json(file, asdict(record), private=True)
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
