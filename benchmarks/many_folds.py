"""What does the driver of a large study cost? 250 folds, 12 at once, that sleep instead of training.

The real driver: Tune, its callbacks, the board, MLflow's records in SQLite. A trial posts and reports its epochs and
leaves its files, but starts no Ray Train. The trials of a cluster run on its head, so the driver does all that it does
there. A trial that runs is a process of 0.3 GB: 50 at once do not fit a machine of 24 GB beside other work.

The overhead is what passes between a fold and the next in its place, held against the sleep.
"""

import contextlib
import hashlib
import logging
import sqlite3
import tempfile
import threading
import time
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import ray
from ray import tune

from benchmarks.corpus import BASE, run_config
from benchmarks.harness import Bar, Result, parser
from benchmarks.scale import Trials, chains, idle_task
from raycv.common.files import write_bytes, write_json, write_text
from raycv.config.schema import RunConfig
from raycv.config.validation import as_yaml
from raycv.orchestration.fold_task import FOLD_KEY, FoldTask
from raycv.orchestration.mlflow_callback import FoldRuns
from raycv.orchestration.ray_tune import run_folds
from raycv.resources.placement import Placement
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import RunFolder
from raycv.tracking.cross_validation import CrossValidationStore
from raycv.tracking.experiment import open_experiment
from raycv.training.metrics import EPOCH_KEY, METRICS, THRESHOLD, TRAIN_LOSS, VAL_LOSS

EPOCHS = 3


def sleeping_trial(trial: dict[str, Any], task: FoldTask, seconds: float) -> None:
    """Stands in for the trial of a fold: sleeps, posts and reports epochs, and leaves the files of a fold."""
    fold, began, history = trial[FOLD_KEY], time.time(), []
    ray.get(task.board.begin.remote(fold))
    for epoch in range(1, EPOCHS + 1):
        for step in range(1, 11):
            time.sleep(seconds / EPOCHS / 10)
            post = {"state": "training", "epoch": epoch, "step": step, "steps": 10, "loss": 0.7, "micro_batch": 8}
            task.board.post.remote(fold, post)
        values = {**dict.fromkeys(METRICS, 0.5), THRESHOLD: 0.5, TRAIN_LOSS: 0.7, VAL_LOSS: 0.7}
        history.append({EPOCH_KEY: epoch, **values, "learning_rate": 1e-4, "micro_batch": 8, "seconds": seconds / 3})
        task.board.post.remote(fold, {"history": history[-1]})
        tune.report(history[-1])
    folder = RunFolder(Path(task.root)).fold(fold)
    folder.root.mkdir()
    scores = b"score\n0.5\n"
    write_bytes(folder.predictions, scores, private=True)
    when = {"began": began, "ended": time.time()}
    metrics = dict.fromkeys(METRICS, 0.5)
    sums = {folder.predictions.name: hashlib.sha256(scores).hexdigest()}
    result = FoldResult(fold, 0.5, 1, EPOCHS, metrics, seconds, 4, 1, 1, history, [], when, sha256=sums)
    write_json(folder.result, asdict(result))


def most_memory(of: psutil.Process, over: threading.Event, found: list[int]) -> None:
    """Keeps the most memory that the process held until `over`."""
    while not over.wait(1):
        found[0] = max(found[0], of.memory_info().rss)


def records(database: Path) -> int:
    """How many rows of parameters, tags and points of metrics MLflow has written."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        tables = ("params", "tags", "metrics")
        return sum(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables)


def study(config: RunConfig, folder: RunFolder, folds: int, at_once: int, seconds: float) -> dict[str, Any]:
    """Runs the folds. Returns times in seconds, memory in bytes, and what MLflow has of them."""
    store = CrossValidationStore(config.tracking.uri)
    experiment_id = open_experiment(store, config.tracking)
    parent_id = store.start_parent(experiment_id, "many", {})
    write_text(folder.config, as_yaml(config))
    placement = Placement(gpus=0, cpus=1, workers=1, concurrent=at_once, at_most=at_once, alone=True)
    task = idle_task(config, "many", folder, placement, lambda _: {})
    runs = FoldRuns(config.tracking, parent_id, folder, {"model.name": BASE}, FOLD_KEY)
    driver, over = psutil.Process(), threading.Event()
    at_start = driver.memory_info().rss
    most = [at_start]
    threading.Thread(target=most_memory, args=(driver, over, most), daemon=True).start()
    trials = Trials(folds)
    processor = sum(driver.cpu_times()[:2])
    with trials:
        begin = time.time()
        run_folds(task, list(range(folds)), task.placement, runs, trials, partial(sleeping_trial, seconds=seconds))
        trained = time.time()
        runs.close()
        end = time.time()
    over.set()
    slept = {fold: FoldResult.read(folder.fold(fold).result).worker for fold in range(folds)}
    places = chains(trials.started, trials.done)
    gaps = [slept[fold]["began"] - slept[before]["ended"] for place in places for before, fold in pairwise(place)]
    logged = records(folder.root.parent / "mlflow.db")
    finished = sum(run.info.status == "FINISHED" for run in store.children(parent_id).values())
    return {
        "folds": folds,
        "at_once": at_once,
        "wall": trained - begin,
        "first": max(slept[place[0]]["began"] for place in places) - begin,
        "gap": fmean(gaps),
        "longest_gap": max(gaps),
        "overhead": fmean(gaps) / seconds,
        "memory_start": at_start,
        "memory_most": most[0],
        "driver_cpu_seconds": sum(driver.cpu_times()[:2]) - processor,
        "mlflow_children": finished,
        "mlflow_records": logged,
        "mlflow_records_per_second": logged / (end - begin),
        "mlflow_behind": end - trained,
    }


def main() -> None:
    arguments = parser(__doc__, repeats=1)
    arguments.add_argument("--sleep", type=float, default=12, help="seconds of a fold [%(default)s]")
    options = arguments.parse_args()
    folds, at_once, seconds = (6, 3, 3.0) if options.small else (250, 12, options.sleep)
    result = Result("many_folds", options, folds=folds, at_once=at_once, sleep=seconds, epochs=EPOCHS)
    ray.init("local", num_cpus=at_once, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as place:
            folder = RunFolder(Path(place) / "many")
            folder.root.mkdir()
            store = (f"tracking.uri=sqlite:///{place}/mlflow.db", f"tracking.artifacts={place}/mlruns")
            config = run_config("experiment=quickstart", *store)
            row = study(config, folder, folds, at_once, seconds)
    finally:
        ray.shutdown()
    result.renew([row], [Bar("driver overhead, share of a fold", row["overhead"], 0.05, at_most=True)])
    result.report()


if __name__ == "__main__":
    main()
