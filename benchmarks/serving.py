"""What `benchmarks.load` and `benchmarks.latency_cli` share: a run, and a scorer of it, made for them or given."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raycv.data.synthetic import write_dataset

START_SECONDS = 300.0


def add_given(arguments: argparse.ArgumentParser) -> None:
    """Adds `--run` and `--server`; `run_of` and `scorer_of` obey them."""
    arguments.add_argument("--run", type=Path, help="folder runs/<name> of a finished run [a small one is made]")
    arguments.add_argument("--server", help="address of a running scorer of that run [one is started]")


@contextmanager
def run_of(options: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """The folder in which `raycv.infer` finds the run, and the run's name."""
    if options.run:
        yield options.run.absolute().parent.parent, options.run.name
        return
    with tempfile.TemporaryDirectory() as temporary:
        make_run(Path(temporary), posts=14)
        yield Path(temporary), "model"


@contextmanager
def scorer_of(options: argparse.Namespace, folder: Path, run: str, *overrides: str) -> Iterator[str]:
    """The address of the scorer that was given, or of one started for the block."""
    if options.server:
        yield options.server
        return
    with scorer(folder, run, *overrides) as url:
        yield url


def make_run(folder: Path, posts: int) -> None:
    """A finished run of the quickstart's model in `folder`/runs, two folds, one epoch."""
    write_dataset(folder, posts=posts, seed=7, profile="short")
    given = ["experiment=quickstart", f"data.dir={folder}", f"data.criteria_dir={folder}", "train.epochs=1"]
    command = [sys.executable, "-m", "raycv.run", *given, "cv.folds=2", "run.name=model"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def scorer(folder: Path, run: str, *overrides: str) -> Iterator[str]:
    """`python -m raycv.serve` on `run` in `folder`; yields its address."""
    command = [sys.executable, "-m", "raycv.serve", f"run={run}", "serve.port=0", *overrides]
    log = folder / "serve.log"
    with log.open("w") as out, subprocess.Popen(command, cwd=folder, stdout=out, stderr=out) as process:
        try:
            yield _address(process, log)
        finally:
            # Not SIGINT, which what a shell starts in the background ignores.
            process.terminate()


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    ends = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < ends:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if "listening on" in line]
        if lines:
            return lines[0].split("listening on ")[1].split()[0]
        time.sleep(0.2)
    raise SystemExit(log.read_text(encoding="utf-8"))
