"""Do folds run in parallel? Five folds that sleep instead of computing, on 1, 2 and 5 logical workers.

The real path but the loop: Tune trials, a TorchTrainer each, reports. Every fold's clock says when its worker began and
ended, so start-up is seen and not subtracted: what passes from when a fold's place was free (the start of the run, or
the end of the fold before it there) until its worker begins, and after the last fold. On the longest chain of folds in
one place, what is no start-up is held against the sleeps of perfect parallelism; beside it the same with start-up, at
this sleep and at folds of an hour.
"""

import io
import logging
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pandas as pd
import ray
import ray.train
from ray import tune
from rich.console import Console

from benchmarks.corpus import BASE, run_config
from benchmarks.harness import Bar, Result, interleaved, parser, spread
from raycv.config.schema import RunConfig
from raycv.data.prompt_template import PromptRules
from raycv.model.base_model import fetch_base
from raycv.orchestration.fold_task import FoldTask
from raycv.orchestration.fold_worker import epoch_metrics
from raycv.orchestration.ray_tune import progress_board, run_folds
from raycv.rendering.terminal import DONE, STARTING, LiveView
from raycv.resources.nodes import NodeNeeds
from raycv.resources.placement import Placement
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import RunFolder
from raycv.training.metrics import METRICS

FOLDS = 5
WORKERS = (1, 2, 5)
HOUR = 3600.0


def sleep(seconds: float, arguments: dict[str, Any]) -> dict[str, Any]:
    """Stands in for the worker of a fold: sleeps, reports one epoch, returns a result that says when."""
    began = time.time()
    time.sleep(seconds)
    metrics = dict.fromkeys(METRICS, 0.5)
    # Not an EpochResult, which would import what a fold that sleeps does not need.
    epoch: Any = SimpleNamespace(
        epoch=1, train_loss=0.7, val_loss=0.7, threshold=0.5, metrics=metrics, learning_rate=1e-4, micro_batch=8,
        seconds=seconds,
    )  # fmt: skip
    history = epoch_metrics(epoch)
    ray.train.report(history)
    when = {"began": began, "ended": time.time()}
    result = FoldResult(arguments["fold"], 0.5, 1, 1, metrics, seconds, 4, 1, 1, [history], [], when)
    return {"result": result, "predictions": pd.DataFrame({"score": [0.5]}), "epoch_scores": None}


class Trials(LiveView):
    """A view that nobody sees, and that keeps when each trial started and was done."""

    def __init__(self, folds: int) -> None:
        super().__init__(range(folds), 1, 32, Console(file=io.StringIO()))
        self.started: dict[int, float] = {}
        self.done: dict[int, float] = {}

    def update(self, fold: int, post: dict[str, Any]) -> None:
        """As LiveView."""
        for state, times in ((STARTING, self.started), (DONE, self.done)):
            if post.get("state") == state:
                times.setdefault(fold, time.time())
        super().update(fold, post)


def chains(started: dict[int, float], done: dict[int, float]) -> list[list[int]]:
    """The folds of each place, in their order: a fold takes the place that was free first, or opens one."""
    places: list[list[int]] = []
    for fold in sorted(started, key=lambda fold: started[fold]):
        free = [place for place in places if done[place[-1]] <= started[fold]]
        if free:
            min(free, key=lambda place: done[place[-1]]).append(fold)
        else:
            places.append([fold])
    return places


def facts(begin: float, end: float, places: list[list[int]], slept: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Seconds of a run from `begin` to `end`: start-ups of the folds that opened a place, and of later ones; the rest.

    `slept`: when each fold's worker began and ended.
    """
    first = [slept[place[0]]["began"] - begin for place in places]
    later = [slept[fold]["began"] - slept[before]["ended"] for place in places for before, fold in pairwise(place)]
    longest = max(places, key=lambda place: slept[place[-1]]["ended"])
    beyond = sum(slept[fold]["ended"] - slept[fold]["began"] for fold in longest)
    return {"wall": end - begin, "beyond": beyond, "first": max(first), "later": fmean(later) if later else None}


def idle_task(
    config: RunConfig, name: str, folder: RunFolder, placement: Placement, worker: Callable[..., Any]
) -> FoldTask:
    """The task of folds whose `worker` neither reads data nor loads a model."""
    return FoldTask(
        config=config,
        run=name,
        root=str(folder.root),
        shared=ray.put(None),
        base=fetch_base(BASE, None),
        base_sums={},
        rules=PromptRules("head_tail", 512, 0.25, 0.5, 400),
        criteria={},
        criteria_dir="",
        criteria_hash="",
        needs=NodeNeeds.of(folder),
        placement=placement,
        board=progress_board(folder),
        worker=worker,
    )


def run(folds: int, workers: int, seconds: float) -> dict[str, Any]:
    """`facts` of `folds` on `workers` logical workers, the start of Ray not counted."""
    ray.init("local", num_cpus=workers, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            placement = Placement(gpus=0, cpus=1, workers=1, concurrent=workers, at_most=workers)
            config = run_config("experiment=quickstart")
            task = idle_task(config, "scale", RunFolder(Path(folder)), placement, partial(sleep, seconds))
            trials = Trials(folds)
            with trials:
                begin = time.time()
                run_folds(task, list(range(folds)), task.placement, tune.Callback(), trials)
                end = time.time()
            results = RunFolder(Path(folder))
            slept = {fold: FoldResult.read(results.fold(fold).result).worker for fold in range(folds)}
            return facts(begin, end, chains(trials.started, trials.done), slept)
    finally:
        ray.shutdown()


def row(folds: int, workers: int, seconds: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One number of workers; `runs`: the facts of each round."""
    waves = math.ceil(folds / workers)
    ideal = waves * seconds
    measured = {
        key: spread([each[key] for each in runs]) for key in ("wall", "first", "later") if runs[0][key] is not None
    }
    return {
        "workers": workers,
        "waves": waves,
        **measured,
        "efficiency": spread([ideal / each["beyond"] for each in runs]),
        "absolute": spread([ideal / each["wall"] for each in runs]),
        # Derived: the same start-up beside longer folds.
        "of_an_hour": spread([waves * HOUR / (waves * HOUR + each["wall"] - each["beyond"]) for each in runs]),
    }


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The claim, held against the worst round."""
    claim = "parallel efficiency beyond start-up"
    return [Bar(f"{claim}, {row['workers']} workers, worst round", row["efficiency"]["min"], 0.9) for row in rows]


def main() -> None:
    arguments = parser(__doc__, repeats=3)
    arguments.add_argument("--sleep", type=float, default=15, help="seconds of a fold [%(default)s]")
    options = arguments.parse_args()
    folds, workers, seconds = (2, (2,), 1.0) if options.small else (FOLDS, WORKERS, options.sleep)
    result = Result("scale", options, folds=folds, sleep=seconds)
    runs: dict[int, list[dict[str, Any]]] = {number: [] for number in workers}

    def once(number: int) -> None:
        runs[number].append(run(folds, number, seconds))

    def keep(_: object) -> None:
        rows = [row(folds, number, seconds, found) for number, found in runs.items()]
        result.renew(rows, bars(rows))

    calls: dict[str, Callable[[], object]] = {f"{number} workers": partial(once, number) for number in workers}
    interleaved(calls, options.repeats, warm_up=False, after_round=keep)
    result.report()


if __name__ == "__main__":
    main()
