"""`python -m raycv.infer`, from the start of its process to its end: with a scorer, MLflow logging included; cold.

And where the seconds of a cold one go: Python's own account of its imports, and what the inference itself logged.
"""

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import mlflow

from benchmarks.harness import Bar, Result, parser
from benchmarks.serving import add_given, run_of, scorer_of

PROCESSES = 30
LIMIT_SECONDS = 1.0
QUESTION = ("post=I lie awake until four every night.", "criterion=A.4", "output=json")


def seconds_of(folder: Path, run: str, times: int, *overrides: str) -> list[float]:
    """Wall time of each of `times` fresh processes, one after the other."""
    command, taken = [sys.executable, "-m", "raycv.infer", f"run={run}", *QUESTION, *overrides], []
    for _ in range(times):
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - started)
    return taken


IMPORT = re.compile(r"import time:\s*(\d+) \|\s*\d+ \|\s*([\w.]+)")
"""A line of `python -X importtime`: microseconds of the module itself, its name."""
SHOWN = ("torch", "transformers", "peft", "mlflow")


def where(folder: Path, run: str, wall: float) -> dict[str, float]:
    """Seconds of a cold process by what they are spent on; they add up to `wall`."""
    command = [sys.executable, "-X", "importtime", "-m", "raycv.infer", f"run={run}"]
    command += [*QUESTION, "server=none"]
    lines = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr.splitlines()
    imports: Counter[str] = Counter()
    for found in filter(None, map(IMPORT.match, lines)):
        package = found[2].partition(".")[0]
        imports[package if package in SHOWN else "all else"] += int(found[1])
    runs = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = runs.get_experiment_by_name("raycv-inference")
    assert experiment is not None
    logged = [run.data.metrics for run in runs.search_runs([experiment.experiment_id])]
    spent = {f"imports: {name}": imports[name] / 1e6 for name in (*SHOWN, "all else")}
    spent["the answer"] = median(metrics["seconds_answer"] for metrics in logged)
    spent["start, the model's files, MLflow's record"] = wall - sum(spent.values())
    return spent


def row(way: str, seconds: list[float]) -> dict[str, Any]:
    """Median and 95th percentile."""
    cuts = quantiles(seconds, n=20, method="inclusive")
    return {"way": way, "p50": cuts[9], "p95": cuts[18], "n": len(seconds)}


def main() -> None:
    arguments = parser(__doc__, repeats=PROCESSES)
    add_given(arguments)
    options = arguments.parse_args()
    result = Result("latency_cli", options)
    few = max(2, options.repeats // 6)
    with run_of(options) as (folder, run):
        cold = row("cold, in this process", seconds_of(folder, run, few, "server=none"))
        spent = where(folder, run, cold["p50"])
        with scorer_of(options, folder, run) as url:
            # Named: a fall back into the process would be taken for an answer of the scorer.
            named = seconds_of(folder, run, few, f"server={url}")
            found = seconds_of(folder, run, max(2, options.repeats))
    rows = [row("a scorer, found", found), row("a scorer, named", named), cold]
    bar = Bar("p95 of fresh processes with a scorer, seconds", rows[0]["p95"], LIMIT_SECONDS, at_most=True)
    result.add(*rows, bars=[bar], cold_seconds=spent)
    result.report()


if __name__ == "__main__":
    main()
