"""Run folders without a training: the out-of-fold predictions of a simulated study, as a run leaves them."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import yaml

from raycv.common.files import write_json, write_text
from raycv.evaluation.study import Study
from raycv.results.fold_result import FoldResult
from raycv.results.report import summarize
from raycv.results.run_folder import RunFolder
from raycv.training.metrics import binary_metrics, tune_threshold
from support.studies import simulated


def noisy(run: str, separation: float, seed: int = 0, posts: int = 60) -> Study:
    """A study of one of several runs on the same pairs in the same folds; `separation` says how good it is."""
    truth = simulated(posts, seed=0)
    logit = separation * truth.labels - 2 + np.random.default_rng(seed + 100).normal(size=len(truth.labels))
    return replace(truth, run=run, scores=1 / (1 + np.exp(-logit)))


def write_run(runs: Path, study: Study, config: dict | None = None, data_hash: str = "0" * 64) -> RunFolder:
    """Writes the finished run `study.run` into `runs`."""
    folder = RunFolder(runs / study.run)
    folder.root.mkdir(parents=True)
    write_text(folder.config, yaml.safe_dump({"cv": {"folds": study.folds}} | (config or {})))
    write_json(folder.data_stats, {"data_hash": data_hash})
    results = []
    for fold in range(study.folds):
        rows = np.flatnonzero(study.fold == fold)
        labels, scores = study.labels[rows], study.scores[rows]
        threshold = float(tune_threshold(labels, scores))
        metrics = binary_metrics(labels, scores, threshold)
        files = folder.fold(fold)
        files.checkpoint.mkdir(parents=True)
        write_text(files.checkpoint / "raycv.json", "{}")
        lines = [
            f"{study.post_ids[study.post[row]]},{study.criterion_ids[study.criterion[row]]},{study.labels[row]},"
            f"{float(study.scores[row])!r}"
            for row in rows
        ]
        write_text(files.predictions, "\n".join(["post_id,criterion_id,label,score", *lines]) + "\n")
        matched, others = int(labels.sum()), len(study.labels) - len(rows)
        history = [{"epoch": 1, **metrics}]
        results.append(
            FoldResult(fold, threshold, 1, 1, metrics, 1.0, others, len(rows), matched, history, [], {}, {}, [])
        )
        write_json(files.result, asdict(results[-1]))
    stats = {"data_hash": data_hash}
    write_json(folder.report, summarize(study.run, results, study.folds, stats, finished="2026-01-01T00:00:00Z"))
    return folder
