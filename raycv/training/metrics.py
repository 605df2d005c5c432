"""Searches the threshold with the highest F1 in steps of 0.01, and computes the five metrics of the specification."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

PRECISION = "precision"
RECALL = "recall"
F1 = "f1"
ACCURACY = "accuracy"
ROC_AUC = "roc_auc"
METRICS = (PRECISION, RECALL, F1, ACCURACY, ROC_AUC)

EPOCH_KEY = "epoch"
THRESHOLD = "threshold"
TRAIN_LOSS = "train_loss"
VAL_LOSS = "val_loss"

NEARLY_ALL = 0.99
"""The share of the pairs under one label that counts as one label for all, if the scores also order nothing."""
CHANCE = 0.05
"""The distance of the ROC-AUC from 0.5 within which the scores order nothing."""
LEAST_SPREAD = 0.005
"""The standard deviation below which scores hardly vary: half a step of the threshold.

Scores that all lie within one step (0.01) cannot deviate more, so at most one threshold tells them apart.
The range alone would let a single odd pair hide that all others get the same score. A few matched pairs among
thousands deviate little too, however high they score, so the two classes must also lie that close on average.
"""
CHANCE_ERRORS = 1.645
"""Standard errors above 0.5 up to which a ROC-AUC is within chance. One useless classifier in twenty lies above."""
ROUNDING = 1e-9
"""The difference that two computations of the same F1 may have in the last digits."""
COLLAPSED = "the classifier has collapsed"


def collapse_reasons(
    metrics: Mapping[str, float],
    matched: int,
    pairs: int,
    scores: "np.ndarray | None" = None,
    labels: "np.ndarray | None" = None,
) -> list[str]:
    """Returns why a classifier tells nothing about its validation pairs; empty if it tells something.

    Args:
        metrics: The five metrics on the pairs.
        matched: The number of pairs that are truly matched.
        pairs: The number of pairs.
        scores: The probabilities of the pairs. Without them we cannot know whether they vary.
        labels: The labels of the pairs, 0 or 1; given with the scores.

    Returns:
        A phrase with numbers for each sign: one label for all, no gain over that label, a rank no better than chance,
        equal scores.
    """
    reasons = []
    missed = round(matched * (1 - metrics[RECALL]))
    false_alarms = round(pairs * (1 - metrics[ACCURACY])) - missed
    called = matched - missed + false_alarms
    label, most = ("matched", called) if 2 * called >= pairs else ("unmatched", pairs - called)
    if most == pairs:
        reasons.append(f"all {pairs:,} pairs get the label {label}")
    elif most >= NEARLY_ALL * pairs and abs(metrics[ROC_AUC] - 0.5) <= CHANCE:
        auc = f"the ROC-AUC {metrics[ROC_AUC]:.3f} is near chance (0.5)"
        reasons.append(f"{most:,} of {pairs:,} pairs get the label {label}, and {auc}")
    floor = all_matched_f1(matched / pairs)
    if metrics[F1] <= floor + ROUNDING:
        reasons.append(f"F1 {metrics[F1]:.3f} is not above {floor:.3f}, which the label matched for all pairs gives")
    chance = highest_chance_auc(matched, pairs)
    if metrics[ROC_AUC] <= chance:
        reasons.append(
            f"the ROC-AUC {metrics[ROC_AUC]:.3f} is within chance, which reaches {chance:.3f} on these pairs"
        )
    if scores is not None and labels is not None and _hardly_vary(scores, labels):
        ends = f"from {scores.min():.4f} to {scores.max():.4f}"
        deviation = f"their standard deviation {scores.std():.5f} is below {LEAST_SPREAD}"
        reasons.append(f"the scores hardly vary ({ends}): {deviation}")
    return reasons


def _hardly_vary(scores: "np.ndarray", labels: "np.ndarray") -> bool:
    apart = scores[labels == 1].mean() - scores[labels == 0].mean()
    return bool(scores.std() < LEAST_SPREAD and apart < LEAST_SPREAD)


def collapsed_because(reasons: Sequence[str]) -> str:
    """Returns the statement that a classifier has collapsed, with the reasons."""
    # Reports of earlier versions have no reasons.
    return f"{COLLAPSED}: {'; '.join(reasons)}" if reasons else COLLAPSED


def highest_chance_auc(matched: int, pairs: int) -> float:
    """Returns the ROC-AUC that scores without any relation to the labels stay below 19 times out of 20.

    Their standard error is that of the Mann-Whitney statistic (Hanley and McNeil 1982). The threshold is tuned on the
    same pairs and lifts even their F1 above its floor, so F1 alone does not show them.
    """
    unmatched = pairs - matched
    return 0.5 + CHANCE_ERRORS * math.sqrt((pairs + 1) / (12 * max(matched * unmatched, 1)))


def all_matched_f1(prevalence: float) -> float:
    """Returns the F1 of labelling every pair matched.

    Its precision is the share of matched pairs, and its recall is 1.
    """
    return 2 * prevalence / (1 + prevalence)


def tune_threshold(labels: "np.ndarray", scores: "np.ndarray") -> float:
    """Returns the threshold t of 0.00, 0.01, ..., 1.00 that maximises the F1 of `scores >= t` (FR-005).

    Among thresholds with the highest F1, it is the closest to 0.5. If two are equally close, it is the lower one.

    Args:
        labels: 0 or 1 [n].
        scores: Probabilities [n].
    """
    import numpy as np

    # NumPy would compare float32 scores with a single threshold in float32, so we convert them.
    scores = np.asarray(scores, dtype=np.float64)
    thresholds = np.arange(101) / 100
    matched = scores[None, :] >= thresholds[:, None]
    true_positives = (matched & (labels == 1)[None, :]).sum(axis=1)
    # `F1 = 2 TP / (predicted + actual positives)`. The fold has a positive, so the denominator is never 0.
    f1 = 2 * true_positives / np.maximum(matched.sum(axis=1) + (labels == 1).sum(), 1)
    best = thresholds[f1 == f1.max()]
    return float(min(best, key=lambda t: (abs(round(t - 0.5, 2)), t)))


def binary_metrics(labels: "np.ndarray", scores: "np.ndarray", threshold: float) -> dict[str, float]:
    """Returns precision, recall, F1 and accuracy at `score >= threshold`, and the ROC-AUC (SC-001).

    The positive class is 1. Precision is 0 if no pair is predicted matched.
    """
    import numpy as np
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support, roc_auc_score

    scores = np.asarray(scores, dtype=np.float64)
    predicted = (scores >= threshold).astype(int)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average="binary", zero_division=0)
    return {
        PRECISION: float(precision),
        RECALL: float(recall),
        F1: float(f1),
        ACCURACY: float(accuracy_score(labels, predicted)),
        ROC_AUC: float(roc_auc_score(labels, scores)),
    }
