"""Metrics of pairs under any weights of their posts: the estimate and every bootstrap draw come from the same code.

Weights are float64 [posts, draws]. A draw's column holds how often it took each post, so a pair counts as often as its
post. Sums of pairs by group are then one product with a sparse matrix of counts. Undefined values are NaN here and
None in a report; they never become 0.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

STEPS = 101
THRESHOLDS = np.arange(STEPS) / 100
"""0.00, 0.01, ..., 1.00, as `raycv.training.metrics.tune_threshold` tries them."""
LABEL_METRICS = ("precision", "recall", "f1", "accuracy", "specificity", "balanced_accuracy", "mcc")
"""These depend on a threshold."""
RANK_METRICS = ("roc_auc", "average_precision")
ERROR_METRICS = ("brier", "ece")
SCORE_METRICS = (*RANK_METRICS, *ERROR_METRICS)
"""These need no threshold."""
METRICS = (*LABEL_METRICS, *SCORE_METRICS)
NAMES = {metric: metric.replace("_", " ") for metric in METRICS} | {
    "f1": "F1", "mcc": "MCC", "roc_auc": "ROC-AUC", "brier": "Brier score", "ece": "calibration error",
}  # fmt: skip
"""The metrics in words."""
UNIT = (0.0, 1.0)
"""The range of a metric that `RANGES` does not name."""
RANGES = {"mcc": (-1.0, 1.0)}
BINS = 10
"""The equally wide bins of the expected calibration error. A score on an edge belongs to the upper bin."""


@dataclass(frozen=True)
class Counts:
    """Weighted numbers of pairs, four arrays of one shape."""

    hits: np.ndarray
    """matched pairs that get the label matched"""
    called: np.ndarray
    """pairs that get the label matched"""
    matched: np.ndarray
    """pairs that are truly matched"""
    pairs: np.ndarray

    def summed(self, axis: int = 0) -> "Counts":
        """Returns the sums over an axis."""
        return Counts(*(getattr(self, name).sum(axis=axis) for name in ("hits", "called", "matched", "pairs")))

    def confusion(self) -> dict[str, np.ndarray]:
        """Returns all four cells, also where a class is missing."""
        false = self.called - self.hits
        return {
            "true_positives": self.hits,
            "false_positives": false,
            "false_negatives": self.matched - self.hits,
            "true_negatives": self.pairs - self.matched - false,
        }


def tally(groups: np.ndarray, size: int, post: np.ndarray, posts: int, values: np.ndarray | None = None) -> "csr_array":
    """Returns the matrix [size, posts] whose product with weights [posts, draws] sums pairs by group.

    Args:
        groups: The group of each pair, int [n].
        size: The number of groups.
        post: The post of each pair, int [n].
        posts: The number of posts.
        values: The amount that a pair adds to its group, float64 [n]; 1 if None.
    """
    from scipy.sparse import coo_array

    values = np.ones(len(groups)) if values is None else values
    # Converting to CSR sums the pairs of a post in one group.
    return coo_array((values, (groups, post)), shape=(size, posts)).tocsr()


def divided(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Returns over / under, NaN where `under` is 0."""
    return np.divide(over, under, out=np.full(np.broadcast(over, under).shape, np.nan), where=under > 0)


def label_metrics(counts: Counts) -> dict[str, np.ndarray]:
    """Returns the metrics of labels, elementwise.

    Undefined are:
    - recall and F1 without matched pairs
    - precision without pairs that get the label matched
    - specificity without unmatched pairs
    - balanced accuracy without both classes
    - MCC without both classes, or if all pairs get one label
    """
    cells = counts.confusion()
    hits, unmatched = counts.hits, counts.pairs - counts.matched
    rejected, uncalled = cells["true_negatives"], counts.pairs - counts.called
    recall, specificity = divided(hits, counts.matched), divided(rejected, unmatched)
    f1 = divided(2 * hits, np.where(counts.matched > 0, counts.called + counts.matched, 0))
    # Roots before the product: the product of four counts would lose digits.
    spread = np.sqrt(counts.called) * np.sqrt(uncalled) * np.sqrt(counts.matched) * np.sqrt(unmatched)
    return {
        "precision": divided(hits, counts.called),
        "recall": recall,
        "f1": f1,
        "accuracy": divided(hits + rejected, counts.pairs),
        "specificity": specificity,
        "balanced_accuracy": (recall + specificity) / 2,
        "mcc": divided(hits * rejected - cells["false_positives"] * cells["false_negatives"], spread),
    }


def running_sum(values: np.ndarray) -> np.ndarray:
    """Returns the cumulative sums over the first axis, in place."""
    # NumPy's cumsum over the first axis of a wide array takes three times as long.
    for row in range(1, len(values)):
        np.add(values[row - 1], values[row], out=values[row])
    return values


class LabelCounts:
    """Counts by unit (a fold, a criterion) for labels that are already given."""

    def __init__(
        self, labels: np.ndarray, called: np.ndarray, unit: np.ndarray, units: int, post: np.ndarray, posts: int
    ) -> None:
        from scipy.sparse import vstack

        kept = [(labels == 1) & called, called, labels == 1, np.ones(len(labels), dtype=bool)]
        self.matrix = vstack([tally(unit[rows], units, post[rows], posts) for rows in kept], format="csr")
        self.units = units

    def __call__(self, weights: np.ndarray) -> Counts:
        """Returns counts [units, draws]."""
        return Counts(*(self.matrix @ weights).reshape(4, self.units, -1))


class ThresholdCounts:
    """Counts by unit at each threshold, so that choosing a threshold again costs nothing."""

    def __init__(
        self,
        labels: np.ndarray,
        scores: np.ndarray,
        unit: np.ndarray,
        units: int,
        post: np.ndarray,
        posts: int,
        thresholds: np.ndarray = THRESHOLDS,
    ) -> None:
        """Prepares the sums. `thresholds` ascend from 0 [steps]; a pair at or above one gets the label matched."""
        from scipy.sparse import vstack

        self.count = len(thresholds)
        group = unit * self.count + np.searchsorted(thresholds, scores, side="right") - 1
        matched = labels == 1
        size = units * self.count
        parts = [tally(group[matched], size, post[matched], posts), tally(group, size, post, posts)]
        self.matrix = vstack(parts, format="csr")
        self.units = units

    def __call__(self, weights: np.ndarray) -> Counts:
        """Returns counts [units, steps, draws]."""
        sums = (self.matrix @ weights).reshape(2, self.units, self.count, -1)
        # The pairs at or above a threshold are those of its step and of all higher ones.
        hits, called = np.cumsum(sums[:, :, ::-1], axis=2)[:, :, ::-1]
        return Counts(
            hits, called, np.broadcast_to(hits[:, :1], hits.shape), np.broadcast_to(called[:, :1], hits.shape)
        )


class Ranking:
    """ROC-AUC (ties count half) and average precision (steps at distinct scores, as in scikit-learn)."""

    def __init__(self, labels: np.ndarray, scores: np.ndarray, post: np.ndarray, posts: int) -> None:
        order = np.argsort(-scores, kind="stable")
        scores, matched, post = scores[order], labels[order] == 1, post[order]
        tie = np.concatenate(([0], np.cumsum(scores[1:] != scores[:-1])))
        with_match = np.zeros(tie[-1] + 1, dtype=bool)
        with_match[tie[matched]] = True
        # Consecutive ties without a matched pair add nothing between them, so they share a segment.
        segment = np.concatenate(([0], np.cumsum(with_match[1:] | with_match[:-1])))[tie]
        size = int(segment[-1]) + 1
        self.matched = tally(segment[matched], size, post[matched], posts)
        self.unmatched = tally(segment[~matched], size, post[~matched], posts)

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns both metrics, each [draws]."""
        matched, unmatched = self.matched @ weights, self.unmatched @ weights
        above, false = running_sum(matched.copy()), running_sum(unmatched.copy())
        positives, negatives = above[-1], false[-1]
        beaten = (matched * (negatives - false + unmatched / 2)).sum(axis=0)
        precision = np.divide(above, above + false, out=np.zeros_like(above), where=matched > 0)
        return {
            "roc_auc": divided(beaten, positives * negatives),
            "average_precision": divided((matched * precision).sum(axis=0), positives),
        }


class ScoreErrors:
    """Brier score and expected calibration error."""

    def __init__(self, labels: np.ndarray, scores: np.ndarray, post: np.ndarray, posts: int) -> None:
        one = np.zeros(len(labels), dtype=int)
        self.pairs = tally(one, 1, post, posts)
        self.squares = tally(one, 1, post, posts, (scores - labels) ** 2)
        self.gaps = tally(bin_of(scores), BINS, post, posts, labels - scores)

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns both metrics, each [draws]."""
        pairs = (self.pairs @ weights)[0]
        return {
            "brier": divided((self.squares @ weights)[0], pairs),
            "ece": divided(np.abs(self.gaps @ weights).sum(axis=0), pairs),
        }


def bin_of(scores: np.ndarray) -> np.ndarray:
    """Returns the calibration bin of each score, from 0 to BINS - 1, int [n]."""
    return np.searchsorted(np.arange(1, BINS) / BINS, scores, side="right")


class ScoreMetrics:
    """The metrics that need no threshold, by unit."""

    def __init__(
        self, labels: np.ndarray, scores: np.ndarray, unit: np.ndarray, units: int, post: np.ndarray, posts: int
    ) -> None:
        self.parts: list[tuple[Ranking, ScoreErrors]] = []
        for one in range(units):
            rows = unit == one
            part = (labels[rows], scores[rows], post[rows], posts)
            self.parts.append((Ranking(*part), ScoreErrors(*part)))

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns each metric, [units, draws]."""
        values = [{**ranking(weights), **errors(weights)} for ranking, errors in self.parts]
        return {name: np.stack([one[name] for one in values]) for name in SCORE_METRICS}


def measure(labels: np.ndarray, scores: np.ndarray, called: np.ndarray) -> dict[str, float]:
    """Returns every metric of some pairs, each counted once; NaN where it is undefined.

    Args:
        labels: 0 or 1 [n].
        scores: Probabilities [n].
        called: Whether a pair gets the label matched, bool [n].
    """
    one = np.zeros(len(labels), dtype=int)
    part = (labels, scores, one, 1)
    weights = np.ones((1, 1))
    values = {**label_metrics(LabelCounts(labels, called, one, 1, one, 1)(weights).summed())}
    values |= Ranking(*part)(weights) | ScoreErrors(*part)(weights)
    return {name: float(values[name][0]) for name in METRICS}
