"""`python -m raycv.infer`, from the start of its process to its end: with a scorer, MLflow logging included; cold.

Beside it what no such command can do without: the processor time of `import pydantic`, and the imports and the load of
the model. And where the seconds of a cold one go: Python's own account of its imports, and what the inference logged.
"""

import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import mlflow

from benchmarks.harness import Bar, Result, parser, ratios
from benchmarks.serving import add_given, run_of, scorer_of
from raycv.common.locations import resolve
from raycv.model.checkpoint import read_info
from raycv.results.run_folder import RunFolder

PROCESSES = 30
LIMIT_SECONDS = 1.0
MOST_CPU = 4.0
"""Times the processor time of `import pydantic`."""
MOST_COLD = 1.4
"""Times the seconds of the imports and the load of the model."""
QUESTION = ("post=I lie awake until four every night.", "criterion=A.4", "output=json")
PYDANTIC = "import pydantic"
LOADED = "torch, transformers and peft imported, model and tokenizer loaded"
LOAD = """
import torch, transformers, peft
transformers.logging.set_verbosity_error()
transformers.AutoTokenizer.from_pretrained({checkpoint!r})
base = transformers.AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels=2)
peft.PeftModel.from_pretrained(base, {checkpoint!r})
print("loaded", flush=True)
"""


@dataclass(frozen=True)
class Process:
    """Seconds of a fresh process."""

    first: float
    """until its first line of output"""
    wall: float
    cpu: float


def fresh(folder: Path, commands: Mapping[str, list[str]], times: int) -> dict[str, list[Process]]:
    """Runs each command `times` times, in turn and one after the other: a busy spell of the machine meets them all."""
    taken: dict[str, list[Process]] = {name: [] for name in commands}
    for _ in range(times):
        for name, command in commands.items():
            before, started = _childrens_cpu(), time.perf_counter()
            with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                process.stdout.readline()
                first = time.perf_counter() - started
            assert process.returncode == 0, command
            taken[name].append(Process(first, time.perf_counter() - started, _childrens_cpu() - before))
    return taken


def _childrens_cpu() -> float:
    """Seconds of user and system time of the child processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def asking(run: str, *overrides: str) -> list[str]:
    """The command that asks the question."""
    return [sys.executable, "-m", "raycv.infer", f"run={run}", *QUESTION, *overrides]


def loading(folder: Path, run: str) -> list[str]:
    """A command that imports and loads what an answer needs, and nothing else."""
    checkpoint = RunFolder(folder / "runs" / run).fold(0).checkpoint
    base = resolve(read_info(checkpoint).base_model)
    return [sys.executable, "-c", LOAD.format(base=base, checkpoint=str(checkpoint))]


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


def row(way: str, seconds: list[float], cpu: list[float] | None = None) -> dict[str, Any]:
    """Median and 95th percentile of the seconds, and the median of the processor time."""
    cuts = quantiles(seconds, n=20, method="inclusive")
    return {"way": way, "p50": cuts[9], "p95": cuts[18], "cpu": median(cpu) if cpu else None, "n": len(seconds)}


def rows_of(found: Mapping[str, list[Process]]) -> list[dict[str, Any]]:
    """A row for each command, to the end of its process."""
    return [
        row(name, [each.wall for each in processes], [each.cpu for each in processes])
        for name, processes in found.items()
    ]


def main() -> None:
    arguments = parser(__doc__, repeats=PROCESSES)
    add_given(arguments)
    options = arguments.parse_args()
    result = Result("latency_cli", options)
    few = max(2, options.repeats // 6)
    with run_of(options) as (folder, run):
        cold = fresh(folder, {"cold, in this process": asking(run, "server=none"), LOADED: loading(folder, run)}, few)
        answered = [each.first for each in cold["cold, in this process"]]
        loaded = [each.first for each in cold[LOADED]]
        spent = where(folder, run, median(each.wall for each in cold["cold, in this process"]))
        with scorer_of(options, folder, run) as url:
            # Named: a fall back into the process would be taken for an answer of the scorer.
            named = fresh(folder, {"a scorer, named": asking(run, f"server={url}")}, few)
            pydantic = [sys.executable, "-c", f"{PYDANTIC}; print()"]
            found = fresh(folder, {"a scorer, found": asking(run), PYDANTIC: pydantic}, max(2, options.repeats))
    rows = rows_of(found) + rows_of(named) + [row("cold, until the answer is printed", answered)] + rows_of(cold)
    cpu = ratios([each.cpu for each in found["a scorer, found"]], [each.cpu for each in found[PYDANTIC]])
    bars = [
        Bar("p95 of fresh processes with a scorer, seconds", rows[0]["p95"], LIMIT_SECONDS, at_most=True),
        Bar("processor time with a scorer, times that of import pydantic", median(cpu), MOST_CPU, at_most=True),
        Bar(
            "seconds until a cold answer, times those of the imports and the load of the model",
            median(ratios(answered, loaded)), MOST_COLD, at_most=True,
        ),
    ]  # fmt: skip
    result.add(*rows, bars=bars, cold_seconds=spent)
    result.report()


if __name__ == "__main__":
    main()
