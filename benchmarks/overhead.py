"""What a run costs beside its training: wall time of a run with a trivial loop, less the time inside the loops.

`python -m raycv.run` in a process of its own, on a few short posts and for one epoch: start of Python, Ray and MLflow,
then each fold's processes, imports, model, reports and checkpoint. With 1, 2 and 5 folds in flight; one wave of two.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Bar, Result, parser, spread
from raycv.synthesize import write_dataset

CASES = {
    "5 folds, 1 in flight": (5, 1),
    "5 folds, 2 in flight": (5, 2),
    "5 folds, 5 in flight": (5, 5),
    "2 folds, 2 in flight": (2, 2),
}
WAVE = "2 folds, 2 in flight"
PLAIN_WAVE_SECONDS = 40.0
"""One wave of two folds, written plainly, on two cores."""
CORES = 2


def run(folder: Path, folds: int, in_flight: int) -> dict[str, float]:
    """Seconds of one run: until the first fold starts, from there to the last fold's end, after it; in the loops."""
    name = f"{time.monotonic_ns()}"
    overrides = ["experiment=quickstart", f"data.dir={folder}", f"data.criteria_dir={folder}", "train.epochs=1"]
    overrides += [f"cv.folds={folds}", f"resources.cpus_per_fold={min(1.0, CORES / in_flight)}", f"run.name={name}"]
    command = [sys.executable, "-u", "-m", "raycv.run", *overrides, f"cv.max_concurrent={in_flight}"]
    started = time.perf_counter()
    first = last = 0.0
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            first = first or (time.perf_counter() - started if "fold" in line and "starting" in line else 0.0)
            last = time.perf_counter() - started if line.rstrip().endswith(": done") else last
    if process.returncode:
        raise SystemExit("".join(lines))
    wall = time.perf_counter() - started
    report = json.loads((folder / "runs" / name / "report.json").read_text(encoding="utf-8"))
    loops = sum(epoch["seconds"] for fold in report["folds"] for epoch in fold["history"])
    return {
        "wall": wall,
        "before": first,
        "folds": last - first,
        "after": wall - last,
        "loops": loops,
        "per_fold": (wall - loops / in_flight) / folds,
        "wave": (last - first - loops / in_flight) / -(-folds // in_flight),
    }


def main() -> None:
    options = parser(__doc__, repeats=3).parse_args()
    cases = {WAVE: CASES[WAVE]} if options.small else CASES
    result = Result("overhead", options, cores=CORES)
    with tempfile.TemporaryDirectory() as temporary:
        write_dataset(Path(temporary), posts=14, seed=7, profile="short")
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for _ in range(options.repeats):
            for name, case in cases.items():
                measured[name].append(run(Path(temporary), *case))
    rows: list[dict[str, Any]] = [
        {"case": name, **{key: spread([each[key] for each in runs]) for key in runs[0]}}
        for name, runs in measured.items()
    ]
    wave = next(row["wave"]["median"] for row in rows if row["case"] == WAVE)
    claim = "a wave of two folds beside its loops, seconds"
    result.add(*rows, bars=[Bar(claim, wave, PLAIN_WAVE_SECONDS / 2, at_most=True)])
    result.report()


if __name__ == "__main__":
    main()
