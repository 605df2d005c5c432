"""What a run costs beside its training: wall time of a run with a trivial loop, less the time inside the loops.

`python -m raycv.run` in a process of its own, on a few short posts and for one epoch: start of Python, Ray and MLflow,
then each fold's processes, imports, model, checkpoint and reports, each timed by the worker itself. With 1, 2 and 5
folds in flight, in the first two rounds; one wave of two folds in each round, beside the same wave written plainly
(`benchmarks.plain`).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.corpus import BASE
from benchmarks.harness import Bar, Result, interleaved, parser, ratios, spread
from benchmarks.phases import MARKS
from raycv.data.synthetic import write_dataset
from raycv.model.base_model import fetch_base

ROOT = Path(__file__).parent.parent
CASES = {
    "5 folds, 1 in flight": (5, 1),
    "5 folds, 2 in flight": (5, 2),
    "5 folds, 5 in flight": (5, 5),
}
WAVE, PLAIN = "2 folds, 2 in flight", "2 folds, 2 in flight, written plainly"
FOLDS_OF_WAVE = 2
CASE_ROUNDS = 2
"""Rounds that have all cases: the wave, which a bar is on, has more."""
WAVE_SECONDS = 30.0
"""So much may Ray's public interface cost: it starts processes that have nothing to do for a fold."""
CORES = 2
MILESTONE = re.compile(r"fold (\d+): (starting|done)( its processes)?$")
PHASES = {
    "processes": ("starting", "worker"),
    "imports": ("worker", "imported"),
    "model": ("imported", "built"),
    "loop": ("built", "trained"),
    "checkpoint": ("saving", "saved"),
    "reports": ("ended", "done"),
}
"""Parts of a fold between two marks."""


def watched(command: list[str], folder: Path) -> tuple[dict[str, float], dict[int, dict[str, float]], list[str]]:
    """Runs `command` in `folder`: seconds until its first fold starts, to its last fold's end, and in all; when each
    fold was starting and done; what it printed."""
    # A Ray of its own, whatever else runs on this machine.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    began = time.time()
    marks: dict[int, dict[str, float]] = {}
    lines = []
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if found := MILESTONE.search(lines[-1]):
                marks.setdefault(int(found[1]), {})[found[2]] = time.time()
    if process.returncode:
        raise SystemExit("\n".join(lines))
    first = min(mark["starting"] for mark in marks.values())
    last = max(mark["done"] for mark in marks.values())
    wall = time.time() - began
    seconds = {"wall": wall, "before": first - began, "folds": last - first, "after": began + wall - last}
    return seconds, marks, lines


def beside(seconds: dict[str, float], loops: float, folds: int, in_flight: int) -> dict[str, float]:
    """`seconds` and what is beside the loops of it."""
    waves = -(-folds // in_flight)
    return seconds | {
        "loops": loops,
        "per_fold": (seconds["wall"] - loops / in_flight) / folds,
        "wave": (seconds["folds"] - loops / in_flight) / waves,
    }


def run(folder: Path, folds: int, in_flight: int, name: str) -> dict[str, float]:
    """Seconds of one run of raycv on the data in `folder`, and of the phases of a fold (their means)."""
    overrides = ["experiment=quickstart", f"data.dir={folder}", f"data.criteria_dir={folder}", "train.epochs=1"]
    overrides += [f"cv.folds={folds}", f"resources.cpus_per_fold={min(1.0, CORES / in_flight)}", f"run.name={name}"]
    command = [sys.executable, "-u", "-m", "benchmarks.phases", *overrides, f"cv.max_concurrent={in_flight}"]
    seconds, marks, _ = watched(command, folder)
    root = folder / "runs" / name
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    loops = sum(epoch["seconds"] for fold in report["folds"] for epoch in fold["history"])
    for fold, mark in marks.items():
        mark |= json.loads((root / MARKS.format(fold=fold)).read_text(encoding="utf-8"))
    phases = {name: fmean(mark[end] - mark[start] for mark in marks.values()) for name, (start, end) in PHASES.items()}
    return beside(seconds, loops, folds, in_flight) | {f"phase_{name}": value for name, value in phases.items()}


def plain(folder: Path) -> dict[str, float]:
    """Seconds of a wave of two folds written plainly."""
    with tempfile.TemporaryDirectory() as temporary:
        base = str(fetch_base(BASE, None).path)
        command = [sys.executable, "-u", "-m", "benchmarks.plain", str(folder), base, str(FOLDS_OF_WAVE)]
        seconds, _, lines = watched(command, Path(temporary))
    loops = next(json.loads(line)["loops"] for line in reversed(lines) if line.startswith("{"))
    return beside(seconds, loops, FOLDS_OF_WAVE, FOLDS_OF_WAVE)


def bars(measured: dict[str, list[dict[str, float]]]) -> list[Bar]:
    """The claims about the wave."""
    ours, theirs = ([each["wave"] for each in measured[case]] for case in (WAVE, PLAIN))
    return [
        Bar.of_rounds("a wave of two folds beside its loops, seconds", ours, WAVE_SECONDS, at_most=True),
        Bar.of_rounds("the same over the wave written plainly", ratios(ours, theirs), 1.0, at_most=True),
    ]


def main() -> None:
    arguments = parser(__doc__, repeats=5)
    arguments.add_argument("--folder", type=Path, help="where the runs are made, and stay [a temporary folder]")
    options = arguments.parse_args()
    result = Result("overhead", options, cores=CORES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        write_dataset(folder, posts=14, seed=7, profile="short")
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in (*CASES, WAVE, PLAIN)}

        def case(name: str) -> None:
            done = measured[name]
            folds, in_flight = CASES.get(name, (FOLDS_OF_WAVE, FOLDS_OF_WAVE))
            if name in CASES and (options.small or len(done) == CASE_ROUNDS):
                return
            run_name = f"{folds}-{in_flight}-{len(done)}"
            done.append(plain(folder) if name == PLAIN else run(folder, folds, in_flight, run_name))

        def keep(_: object) -> None:
            rows: list[dict[str, Any]] = [
                {"case": name, **{key: spread([each[key] for each in runs]) for key in runs[0]}}
                for name, runs in measured.items()
                if runs
            ]
            result.renew(rows, bars(measured))

        calls: dict[str, Callable[[], object]] = {name: lambda name=name: case(name) for name in measured}  # type: ignore[misc]
        interleaved(calls, options.repeats, warm_up=False, after_round=keep)
    result.report()


if __name__ == "__main__":
    main()
