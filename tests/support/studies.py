"""Simulated studies: posts with pairs that share an effect, so that pairs of a post are alike."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from raycv.common.files import array_bytes, write_json
from raycv.evaluation.study import Study
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import RunFolder
from raycv.training.metrics import METRICS


def study_of(
    labels: Any,
    scores: Any,
    fold: Any,
    post: Any = None,
    criterion: Any = None,
    *,
    run: str = "run",
    **more: Any,
) -> Study:
    """A study from lists; every pair has its own post and all share a criterion, unless given."""
    rows = len(labels)
    post = np.arange(rows) if post is None else np.asarray(post)
    criterion = np.zeros(rows, dtype=int) if criterion is None else np.asarray(criterion)
    return Study(
        run, np.asarray(labels, dtype=np.int8), np.asarray(scores, dtype=np.float64), np.asarray(fold), post, criterion,
        [f"p{index:05d}" for index in range(post.max() + 1)],
        [f"A.{index + 1}" for index in range(criterion.max() + 1)], **more,
    )  # fmt: skip


def simulated(posts: int = 200, criteria: int = 9, folds: int = 5, seed: int = 0, **how: Any) -> Study:
    """A random study. `separation`: distance of the classes on the logit scale; `epochs`: scores for as many."""
    rng = np.random.default_rng(seed)
    post, criterion = np.repeat(np.arange(posts), criteria), np.tile(np.arange(criteria), posts)
    effect = rng.normal(size=posts)[post]
    labels = (rng.random(posts * criteria) < 1 / (1 + np.exp(2 - effect))).astype(np.int8)
    fold = (np.arange(posts) % folds)[post]
    mood = rng.normal(size=posts)[post]

    def drawn(separation: float) -> np.ndarray:
        logit = separation * labels - 2 + mood + rng.normal(size=len(labels))
        return 1 / (1 + np.exp(-logit))

    separation, epochs = how.pop("separation", 2.0), how.pop("epochs", 0)
    scores = drawn(separation)
    if epochs:
        later = [
            np.stack([drawn(separation * (epoch + 1) / epochs)[fold == k] for epoch in range(epochs)])
            for k in range(folds)
        ]
        for k in range(folds):
            scores[fold == k] = later[k][-1]
        how["epoch_scores"] = later
    return study_of(labels, scores, fold, post, criterion, **how)


def richest(seed: int = 0, posts: int = 120) -> Study:
    """A study that recorded everything."""
    plain = simulated(posts, seed=seed, epochs=3)
    rng = np.random.default_rng(seed)
    return simulated(
        posts,
        seed=seed,
        epochs=3,
        floor_scores={"tfidf_logistic_regression": simulated(posts, seed=seed, separation=0.5).scores},
        shortened=(rng.random(posts) < 0.3)[plain.post],
        hard_negative=(rng.random(len(plain.labels)) < 0.2) & (plain.labels == 0),
        near_duplicates=[("p00000", "p00001"), ("p00000", "p00005")],
        events=[["out of memory: micro-batch 8 -> 4"], [], [], [], []],
        retries=[0, 0, 0, 0, 0],
    )


def folder_of(study: Study, root: Path, *, text: str = "", warnings: Sequence[str] = (), recorded: bool = True) -> Any:
    """A run folder as a run leaves it, with the predictions of a study.

    Args:
        study: The run; its name is that of the folder.
        root: The folder that holds the runs.
        text: The text of every post, which `predictions.csv` holds if the run kept it.
        warnings: The warnings about the data.
        recorded: Without it the run is of a version that recorded neither pairs nor epochs.
    """
    folder = RunFolder(root / study.run)
    folder.root.mkdir(parents=True)
    config = {
        "cv": {"folds": study.folds, "seed": 1},
        "model": {"name": "raycv://models/tiny_llama"},
        "dora": {"r": 8},
        "train": {"imbalance": "weighted_loss", "lr": 0.002},
        "tracking": {"uri": "postgresql://me:hunter2@db/mlflow"},
    }
    folder.config.write_text(yaml.safe_dump(config))
    packages = {"python": "3.11", "packages": {"raycv": "0.1.0"}, "git": {"commit": "c0ffee", "dirty": False}}
    write_json(folder.environment, packages)
    write_json(folder.data_stats, {"data_hash": "d" * 64, "warnings": list(warnings), "labels_shuffled": False})
    columns: dict[str, Any] = {
        "post_id": [study.post_ids[post] for post in study.post],
        "criterion_id": [study.criterion_ids[criterion] for criterion in study.criterion],
        "fold": study.fold,
        "label": study.labels,
        "score": study.scores,
        "post": text,
    }
    rows = pd.DataFrame(columns)
    metrics = dict.fromkeys(METRICS, 0.5)
    for fold in range(study.folds):
        files = folder.fold(fold)
        files.checkpoint.mkdir(parents=True)
        (files.checkpoint / "raycv.json").write_text("{}")
        own = rows[rows["fold"] == fold]
        own.drop(columns="fold").to_csv(files.predictions, index=False)
        sizes = (len(own) * (study.folds - 1), len(own), int(own["label"].sum()))
        result = FoldResult(fold, 0.4, 1, 1, metrics, 3.0, *sizes, [], [], {"host": "myhost"}, collapsed=[])
        write_json(files.result, asdict(result))
        if recorded and study.epoch_scores is not None:
            files.epoch_scores.write_bytes(array_bytes(study.epoch_scores[fold]))
    if recorded:
        facts = {"shortened": study.shortened, "hard_negative": study.hard_negative}
        numbers = {name: None if values is None else values.astype(int) for name, values in facts.items()}
        floor = study.floor_scores.get("tfidf_logistic_regression")
        rows.drop(columns=["score", "post"]).assign(**numbers, tfidf=floor).to_csv(folder.pairs, index=False)
        pairs = pd.DataFrame(study.near_duplicates or [], columns=["post_id_a", "post_id_b"])
        pairs.to_csv(folder.near_duplicates, index=False)
    return folder
