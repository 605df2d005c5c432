"""raycv's commands as processes, as a user starts them, and what MLflow has of their runs."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def users_environment(**more: str) -> dict[str, str]:
    """Without what the test process has set for itself, and apart from any Ray that runs on this machine."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    folder = {key: value for key, value in os.environ.items() if key == "RAY_TMPDIR"}
    return kept | folder | {"RAY_ADDRESS": "local"} | more


def raycv(command: str, *overrides: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """`python -m raycv.<command>` in `cwd`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", f"raycv.{command}", *overrides],
        cwd=cwd,
        env=users_environment(**environment),
        capture_output=True,
        text=True,
        timeout=800,
        stdin=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def background(
    folder: Path,
    *overrides: str,
    command: str = "run",
    prefix: tuple[str, ...] = (),
    out: str | Path = "out",
    **environment: str,
) -> Iterator[subprocess.Popen]:
    """`raycv.<command>` in `folder`, in a session of its own; yields its process. Its output goes to `folder / out`."""
    with (folder / out).open("w") as said:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", f"raycv.{command}", *overrides],
            cwd=folder,
            env=users_environment(**environment),
            stdout=said,
            stderr=said,
            start_new_session=True,
            preexec_fn=heed_sigint,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def heed_sigint() -> None:
    """For a new process: what a script starts in the background ignores SIGINT, a user's does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def processes_with(variable: str) -> list[str]:
    """The commands of the processes that have `variable` (NAME=value) in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text())
    return found


def wait_until(happened: Callable[[], Any], process: subprocess.Popen, log: Path, seconds: float = 600) -> None:
    """Waits for `happened()` while `process`, which writes `log`, runs."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def statuses(folder: Path) -> dict[str, str]:
    """Status by run name in the MLflow database of `folder`, in which no name occurs twice."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as connection:
        rows = connection.execute("SELECT name, status FROM runs").fetchall()
    assert len(dict(rows)) == len(rows), rows
    return dict(rows)
