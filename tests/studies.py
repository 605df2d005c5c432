"""Simulated studies: posts with pairs that share an effect, so that pairs of a post are alike."""

from typing import Any

import numpy as np

from raycv.evaluation.study import Study


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
