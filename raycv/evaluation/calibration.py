"""Computes the curves of the figures: reliability, temperature, ROC, precision-recall, F1 by threshold, histograms."""

from typing import Any

import numpy as np

from raycv.evaluation.bootstrap import LEVEL, number, plain, resample, weights_of_draws
from raycv.evaluation.measures import BINS, THRESHOLDS, ScoreErrors, ThresholdCounts, bin_of, divided, label_metrics
from raycv.evaluation.study import Study

MOST_POINTS = 200
"""Points of a ROC or precision-recall curve."""
GRID = np.arange(51) / 50
"""False positive rates, or recalls, at which the band of a curve is given."""
HISTOGRAM_BINS = 20
_CLIP = 1e-7
"""Scores of exactly 0 or 1 have no finite logit."""


def logit(scores: np.ndarray) -> np.ndarray:
    """Returns log(p / (1 - p)) of scores, which are first brought within 1e-7 of 0 and 1."""
    inside = np.clip(scores, _CLIP, 1 - _CLIP)
    return np.log(inside) - np.log1p(-inside)


def fit_temperature(labels: np.ndarray, scores: np.ndarray) -> float:
    """Returns the temperature, from 0.02 to 50, that minimises the log loss of `sigmoid(logit / temperature)`."""
    from scipy.optimize import minimize_scalar

    logits = logit(scores)
    signed = np.where(labels == 1, -logits, logits)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, signed * np.exp(-log_temperature)).mean())

    ends = (np.log(0.02), np.log(50))
    return float(np.exp(minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-7}).x))


def recalibrated(study: Study) -> tuple[np.ndarray, list[float]]:
    """Returns scores [n] after a temperature that each fold gets from the other folds, and the temperatures."""
    from scipy.special import expit

    temperatures = [
        fit_temperature(study.labels[study.fold != fold], study.scores[study.fold != fold])
        for fold in range(study.folds)
    ]
    return expit(logit(study.scores) / np.array(temperatures)[study.fold]), temperatures


def reliability(labels: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """Returns a row per bin, empty ones too: bounds, pairs, matched pairs, mean score, share of matched pairs."""
    position = bin_of(scores)
    pairs = np.bincount(position, minlength=BINS)
    matched = np.bincount(position, labels, BINS)
    means, shares = divided(np.bincount(position, scores, BINS), pairs), divided(matched, pairs)
    return [
        {
            "from": one / BINS,
            "to": (one + 1) / BINS,
            "pairs": int(pairs[one]),
            "matched": int(matched[one]),
            "mean_score": plain(means[one]),
            "share_matched": plain(shares[one]),
        }
        for one in range(BINS)
    ]


def calibration_section(study: Study, draws: int, seed: int) -> dict[str, Any]:
    """Returns reliability, Brier score, its skill and ECE, before and after the temperature.

    The skill is 1 - Brier / (p (1 - p)), where p is the share of matched pairs: the gain over always answering p.
    """
    after, temperatures = recalibrated(study)
    posts = len(study.post_ids)
    parts = {
        "before": ScoreErrors(study.labels, study.scores, study.post, posts),
        "after": ScoreErrors(study.labels, after, study.post, posts),
    }

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        values = {f"{when}.{key}": value for when, part in parts.items() for key, value in part(weights).items()}
        return values | {f"change.{key}": values[f"after.{key}"] - values[f"before.{key}"] for key in ("brier", "ece")}

    samples = resample(statistic, posts, len(study.labels), draws=draws, seed=seed)
    share = float(study.labels.mean())
    section: dict[str, Any] = {"bins": BINS, "temperatures": temperatures}
    for when, scores in (("before", study.scores), ("after", after)):
        brier = number(samples, f"{when}.brier")
        section[when] = {
            "brier": brier,
            "ece": {"value": plain(samples.estimate[f"{when}.ece"])},
            "brier_skill": {"value": 1 - brier["value"] / (share * (1 - share)) if 0 < share < 1 else None},
            "reliability": reliability(study.labels, scores),
        }
    section["change"] = {key: number(samples, f"change.{key}") for key in ("brier", "ece")}
    return section


def cuts_of(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns at most about 200 of the scores, ascending, and 0: points evenly along the ROC curve."""
    values, position = np.unique(scores, return_inverse=True)
    matched = np.bincount(position, labels)[::-1].cumsum()
    unmatched = np.bincount(position, 1 - labels)[::-1].cumsum()
    along = matched / max(matched[-1], 1) + unmatched / max(unmatched[-1], 1)
    kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], MOST_POINTS)).clip(0, len(along) - 1))
    return np.unique(np.concatenate(([0.0], values[::-1][kept])))


def curve(labels: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Returns the points of the ROC and the precision-recall curve, from the highest cut to the lowest.

    The ROC curve begins at (0, 0) and ends at (1, 1). Both are monotone in false positive rate and recall.
    """
    cuts = cuts_of(labels, scores)
    one = np.zeros(len(labels), dtype=int)
    counts = ThresholdCounts(labels, scores, one, 1, one, 1, cuts)(np.ones((1, 1)))
    hits, called = counts.hits[0, ::-1, 0], counts.called[0, ::-1, 0]
    matched, pairs = hits[-1], called[-1]
    recall, false = (
        divided(hits, np.full_like(hits, matched)),
        divided(called - hits, np.full_like(hits, pairs - matched)),
    )
    return {
        "cut": cuts[::-1].tolist(),
        "recall": [plain(value) for value in recall],
        "precision": [plain(value) for value in divided(hits, called)],
        "false_positive_rate": [plain(value) for value in false],
        "matched": int(matched),
        "pairs": int(pairs),
    }


def band(study: Study, draws: int, seed: int) -> dict[str, Any]:
    """Returns pointwise 95 % bands of the pooled curves over post bootstrap draws.

    Recall at each false positive rate is interpolated. Precision at each recall is that of the highest cut that
    reaches the recall.
    """
    posts = len(study.post_ids)
    cuts = cuts_of(study.labels, study.scores)
    one = np.zeros(len(study.labels), dtype=int)
    counted = ThresholdCounts(study.labels, study.scores, one, 1, study.post, posts, cuts)
    recalls, precisions = [], []
    for weights in weights_of_draws(posts, draws, seed, 128):
        counts = counted(weights)
        for hits, called in zip(counts.hits[0, ::-1].T, counts.called[0, ::-1].T, strict=True):
            matched, unmatched = hits[-1], called[-1] - hits[-1]
            if matched and unmatched:
                false = np.concatenate(([0.0], (called - hits) / unmatched))
                recalls.append(np.interp(GRID, false, np.concatenate(([0.0], hits / matched))))
                # A recall of 0 is that of the highest cut that any pair reaches.
                reached = np.maximum(np.searchsorted(hits, GRID * matched - 1e-9), np.searchsorted(called, 0.5))
                precisions.append(hits[reached] / called[reached])
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    shown = len(recalls) >= 0.95 * draws
    roc = np.quantile(recalls, ends, axis=0) if shown else None
    pr = np.quantile(precisions, ends, axis=0) if shown else None
    return {
        "grid": GRID.tolist(),
        "recall_low": None if roc is None else roc[0].tolist(),
        "recall_high": None if roc is None else roc[1].tolist(),
        "precision_low": None if pr is None else pr[0].tolist(),
        "precision_high": None if pr is None else pr[1].tolist(),
        "undefined_draws": draws - len(recalls),
    }


def sweep(study: Study) -> dict[str, Any]:
    """Returns F1, precision and recall at each of the 101 thresholds, pooled and by fold."""
    rows = (study.fold, study.folds, study.fold * 0, 1)
    counts = ThresholdCounts(study.labels, study.scores, *rows)(np.ones((1, 1)))
    pooled, folds = label_metrics(counts.summed()), label_metrics(counts)
    metrics = ("f1", "precision", "recall")
    return {
        "thresholds": THRESHOLDS.tolist(),
        "pooled": {metric: [plain(value) for value in pooled[metric][:, 0]] for metric in metrics},
        "folds": [
            {metric: [plain(value) for value in folds[metric][fold, :, 0]] for metric in metrics}
            for fold in range(study.folds)
        ],
    }


def histogram(study: Study) -> dict[str, Any]:
    """Returns the numbers of matched and unmatched pairs in 20 equally wide bins of the score."""
    edges = np.arange(HISTOGRAM_BINS + 1) / HISTOGRAM_BINS
    return {
        "edges": edges.tolist(),
        "matched": np.histogram(study.scores[study.labels == 1], edges)[0].tolist(),
        "unmatched": np.histogram(study.scores[study.labels == 0], edges)[0].tolist(),
    }
