"""Do folds run in parallel? Five folds that sleep instead of computing, on 1, 2 and 5 logical workers.

The real path but the loop: Tune trials, a TorchTrainer each, reports. Each number of workers runs with a
short and a long sleep; the difference of the two is free of start-up, and is held against perfect parallelism.
"""

import io
import logging
import math
import tempfile
import time
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import ray
import ray.train
from ray import tune
from rich.console import Console

from benchmarks.corpus import BASE, run_config
from benchmarks.harness import Bar, Result, parser, spread
from raycv import cv
from raycv.base import fetch_base
from raycv.board import ProgressBoard
from raycv.fold import FoldTask, Placement, epoch_metrics
from raycv.live import LiveView
from raycv.metrics import METRICS
from raycv.prompts import PromptRules
from raycv.records import FoldResult

FOLDS = 5
WORKERS = (1, 2, 5)


def sleep(seconds: float, arguments: dict[str, Any]) -> dict[str, Any]:
    """Stands in for raycv.fold.train_worker: sleeps, reports one epoch, returns a result."""
    from raycv.train import EpochResult

    time.sleep(seconds)
    metrics = dict.fromkeys(METRICS, 0.5)
    history = epoch_metrics(EpochResult(1, 0.7, 0.7, 0.5, metrics, 1e-4, 8, seconds))
    ray.train.report(history)
    result = FoldResult(arguments["fold"], 0.5, 1, 1, metrics, seconds, 4, 1, 1, [history], [], {})
    return {"result": result, "predictions": pd.DataFrame({"score": [0.5]})}


def wall(workers: int, seconds: float) -> float:
    """Seconds of five folds on `workers` logical workers, the start of Ray not counted."""
    ray.init("local", num_cpus=workers, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            task = FoldTask(
                config=run_config("experiment=quickstart"),
                run="scale",
                root=folder,
                shared=ray.put(None),
                base=fetch_base(BASE, None),
                rules=PromptRules("head_tail", 512, 0.25, 0.5, 400),
                criteria={},
                criteria_dir="",
                criteria_hash="",
                placement=Placement(gpus=0, cpus=1, workers=1, concurrent=workers),
                board=ray.remote(num_cpus=0)(ProgressBoard).remote(),
                worker=partial(sleep, seconds),
            )
            with LiveView(range(FOLDS), 1, 32, Console(file=io.StringIO())) as view:
                started = time.perf_counter()
                cv.run_folds(task, list(range(FOLDS)), task.placement, tune.Callback(), view)
                return time.perf_counter() - started
    finally:
        ray.shutdown()


def main() -> None:
    arguments = parser(__doc__, repeats=1)
    arguments.add_argument("--sleeps", type=float, nargs=2, default=[5, 45], help="the two sleeps [%(default)s s]")
    options = arguments.parse_args()
    short, long = [0.5, 2] if options.small else options.sleeps
    result = Result("scale", options, folds=FOLDS, sleeps=[short, long])
    for workers in WORKERS[-1:] if options.small else WORKERS:
        walls = {seconds: [wall(workers, seconds) for _ in range(options.repeats)] for seconds in (short, long)}
        waves = math.ceil(FOLDS / workers)
        beyond = median(walls[long]) - median(walls[short])
        row = {"workers": workers, "waves": waves, "short": spread(walls[short]), "long": spread(walls[long])}
        efficiency = waves * (long - short) / beyond
        bar = Bar(f"parallel efficiency beyond start-up, {workers} workers", efficiency, 0.9)
        result.add(row | {"efficiency": efficiency}, bars=[bar])
    result.report()


if __name__ == "__main__":
    main()
