"""Scores -> numbers: the decision threshold and the five metrics of the specification."""

from collections.abc import Mapping
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

ONE_LABEL = 0.99
"""Share of the pairs under one label from which on a classifier gives all of them the same."""
CHANCE = 0.05
"""Distance of the ROC-AUC from 0.5 within which the scores order nothing."""
COLLAPSED = "the classifier has collapsed: all pairs get one label, and its scores are chance (ROC-AUC near 0.5)"


def is_collapsed(metrics: Mapping[str, float], matched: int, pairs: int) -> bool:
    """Whether `metrics`, on `pairs` of which `matched` are positive, are those of a classifier that tells nothing."""
    missed = matched * (1 - metrics[RECALL])
    false_alarms = pairs * (1 - metrics[ACCURACY]) - missed
    called = matched - missed + false_alarms
    one_label = max(called, pairs - called) >= ONE_LABEL * pairs
    return one_label and abs(metrics[ROC_AUC] - 0.5) <= CHANCE


def tune_threshold(labels: "np.ndarray", scores: "np.ndarray") -> float:
    """The threshold t of 0.00, 0.01, ..., 1.00 that maximises the F1 of `scores >= t` (FR-005).

    Ties: of the thresholds with the highest F1, the one closest to 0.5, and of two equally close ones the lower.
    `labels`: 0/1 [n]; `scores`: probabilities [n].
    """
    import numpy as np

    scores = np.asarray(scores, dtype=np.float64)  # in float32, NumPy would compare with one threshold in float32
    thresholds = np.arange(101) / 100
    matched = scores[None, :] >= thresholds[:, None]
    true_positives = (matched & (labels == 1)[None, :]).sum(axis=1)
    # F1 = 2 TP / (predicted + actual positives); the denominator is never 0 since the fold has a positive.
    f1 = 2 * true_positives / np.maximum(matched.sum(axis=1) + (labels == 1).sum(), 1)
    best = thresholds[f1 == f1.max()]
    return float(min(best, key=lambda t: (abs(round(t - 0.5, 2)), t)))


def binary_metrics(labels: "np.ndarray", scores: "np.ndarray", threshold: float) -> dict[str, float]:
    """Precision, recall, F1, accuracy at `score >= threshold`, and the ROC-AUC; the positive class is 1 (SC-001).

    Precision is 0 where nothing is predicted matched.
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
