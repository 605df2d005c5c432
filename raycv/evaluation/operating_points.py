"""Operating points: which fold or folds choose the threshold and epoch of each fold, and what that choice flatters.

`ESTIMANDS` describes each one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raycv.evaluation.measures import (
    RANGES,
    STEPS,
    THRESHOLDS,
    UNIT,
    Counts,
    LabelCounts,
    Ranking,
    ScoreMetrics,
    ThresholdCounts,
    label_metrics,
)
from raycv.evaluation.study import Study

FIXED, TUNED_IN_FOLD, CROSS_FOLD, POOLED = "fixed", "tuned_in_fold", "cross_fold", "pooled"
CROSS_FOLD_EPOCH = "cross_fold_epoch"
RULES = (FIXED, TUNED_IN_FOLD, CROSS_FOLD)
"""The rules whose performance is reported."""
ESTIMANDS = {
    FIXED: "Performance of the fold models on new posts at the threshold 0.5, which nobody chose from the data.",
    TUNED_IN_FOLD: "Performance on exactly the pairs that the threshold was tuned on, as the specification asks. "
    "It is optimistic for new posts.",
    CROSS_FOLD: "Performance of the fold models on new posts, with a threshold tuned on other posts: for each fold the "
    "one that maximises F1 over the other folds' out-of-fold scores.",
    CROSS_FOLD_EPOCH: "As cross_fold, and each fold is judged at the epoch with the highest mean F1 of the other "
    "folds. A fold that stopped earlier keeps its last epoch.",
    POOLED: "The threshold to deploy: it maximises F1 over the out-of-fold scores of all folds. It was tuned on all "
    "pairs, so no performance is reported at it.",
}

# argmax takes the first of equal values, so the order holds the tie rule: closest to 0.5, then the lower.
_PREFERENCE = np.array(sorted(range(STEPS), key=lambda step: (abs(step - STEPS // 2), step)))


def best_step(counts: Counts) -> np.ndarray:
    """Returns the position of the threshold with the highest F1, as `tune_threshold` chooses it.

    Args:
        counts: Counts at the 101 thresholds [..., 101, draws].

    Returns:
        int [..., draws]
    """
    f1 = 2 * counts.hits / np.maximum(counts.called + counts.matched, 1)
    return _PREFERENCE[np.argmax(f1[..., _PREFERENCE, :], axis=-2)]


def others(counts: Counts) -> Counts:
    """Returns for each unit the counts of all other units together."""
    parts = (counts.hits, counts.called, counts.matched, counts.pairs)
    return Counts(*(part.sum(axis=0, keepdims=True) - part for part in parts))


def steps_by(rule: str, counts: Counts) -> np.ndarray:
    """Returns the position of the threshold of each fold under a rule.

    Args:
        rule: A name of `ESTIMANDS`, except `cross_fold_epoch`.
        counts: Counts by fold [folds, 101, draws].

    Returns:
        int [folds, draws]
    """
    folds, _, draws = counts.hits.shape
    if rule == FIXED:
        return np.full((folds, draws), STEPS // 2)
    if rule == TUNED_IN_FOLD:
        return best_step(counts)
    if rule == CROSS_FOLD:
        return best_step(others(counts))
    return np.broadcast_to(best_step(counts.summed()), (folds, draws))


def at_steps(counts: Counts, steps: np.ndarray) -> Counts:
    """Returns the counts at each fold's threshold [folds, draws]."""
    parts = (counts.hits, counts.called, counts.matched, counts.pairs)
    return Counts(*(np.take_along_axis(part, steps[:, None], axis=1)[:, 0] for part in parts))


@dataclass(frozen=True)
class Epochs:
    """The epoch of each fold, from 0, as the fold itself and as the other folds chose it."""

    own: list[int]
    chosen: list[int]
    """the epoch with the other folds' highest mean F1; it may be later than the fold's last one"""
    cross: list[int]
    """`chosen`, or the fold's last epoch if it stopped before"""
    f1: list[list[float]]
    """for each fold the F1 after each epoch, at the threshold tuned on that fold after that epoch"""


def choose_epochs(f1: Sequence[Sequence[float]]) -> Epochs:
    """Chooses each fold's epoch twice: by its own F1, and by the mean F1 of the other folds.

    Among equal epochs the earliest counts, as in training. Folds that stopped hold their last value.
    """
    longest = max(len(values) for values in f1)
    held = np.array([[*values, *[values[-1]] * (longest - len(values))] for values in f1])
    chosen = [int(np.delete(held, fold, axis=0).mean(axis=0).round(12).argmax()) for fold in range(len(f1))]
    return Epochs(
        own=[int(np.argmax(values)) for values in f1],
        chosen=chosen,
        cross=[min(epoch, len(values) - 1) for epoch, values in zip(chosen, f1, strict=True)],
        f1=[list(map(float, values)) for values in f1],
    )


def epochs_of(study: Study) -> Epochs | None:
    """Returns the epochs of a study: from its epoch scores, else from its history; None if it recorded neither."""
    if study.epoch_scores is not None:
        every = []
        for fold, scores in enumerate(study.epoch_scores):
            labels = study.labels[study.fold == fold]
            rows = np.arange(scores.shape[1])
            # Every epoch is a unit, and every pair its own post of weight 1.
            parts = [ThresholdCounts(labels, each, rows * 0, 1, rows * 0, 1)(np.ones((1, 1))) for each in scores]
            every.append([float((2 * c.hits / np.maximum(c.called + c.matched, 1)).max()) for c in parts])
        return choose_epochs(every)
    if study.history and all(study.history) and all("f1" in epoch for fold in study.history for epoch in fold):
        return choose_epochs([[epoch["f1"] for epoch in fold] for fold in study.history])
    return None


def at_cross_epochs(study: Study, epochs: Epochs) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns scores [n] and thresholds [folds] with which the other folds chose epoch and threshold of each fold.

    For fold k, the threshold is tuned on the other folds' scores after the epoch chosen for k.
    """
    if study.epoch_scores is None:
        return None
    scores, steps = study.scores.copy(), []
    for fold, epoch in enumerate(epochs.chosen):
        then = study.scores.copy()
        for each, every in enumerate(study.epoch_scores):
            then[study.fold == each] = every[min(epoch, len(every) - 1)]
        counts = ThresholdCounts(study.labels, then, study.fold, study.folds, study.fold * 0, 1)(np.ones((1, 1)))
        scores[study.fold == fold] = then[study.fold == fold]
        steps.append(int(best_step(others(counts))[fold, 0]))
    return scores, THRESHOLDS[steps]


def epochs_section(study: Study, epochs: Epochs) -> dict[str, Any]:
    """Returns the epochs of each fold, from 1, and what F1 and ROC-AUC are at them, as means over the folds."""
    aucs = None
    if study.epoch_scores is not None:
        aucs = _aucs_by_epoch(study)
    elif study.history is not None and all("roc_auc" in epoch for fold in study.history for epoch in fold):
        aucs = [[epoch["roc_auc"] for epoch in fold] for fold in study.history]

    def means(values: list[list[float]]) -> dict[str, float]:
        own = float(np.mean([fold[epoch] for fold, epoch in zip(values, epochs.own, strict=True)]))
        cross = float(np.mean([fold[epoch] for fold, epoch in zip(values, epochs.cross, strict=True)]))
        return {"own": own, "cross": cross, "optimism": own - cross}

    return {
        "source": "epoch_scores" if study.epoch_scores is not None else "history",
        "own": [epoch + 1 for epoch in epochs.own],
        "cross": [epoch + 1 for epoch in epochs.cross],
        "f1_by_epoch": epochs.f1,
        "f1": means(epochs.f1),
        "roc_auc": means(aucs) if aucs else None,
    }


def _aucs_by_epoch(study: Study) -> list[list[float]]:
    values = []
    for fold, scores in enumerate(study.epoch_scores or ()):
        labels = study.labels[study.fold == fold]
        post = np.zeros(len(labels), dtype=int)
        values.append([float(Ranking(labels, each, post, 1)(np.ones((1, 1)))["roc_auc"][0]) for each in scores])
    return values


def moved(
    drawn: Mapping[str, np.ndarray], there: Mapping[str, np.ndarray], here: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the estimates plus the error of each draw at the thresholds that it chose, within the metrics' ranges.

    The study's F1 is rugged over the thresholds. A draw that moves along it would count that noise a second time, and
    its intervals would be too wide. So each draw is compared with the study at the same thresholds.

    Args:
        drawn: Metrics of the draws at the thresholds that they chose.
        there: Metrics of the study at these thresholds.
        here: Metrics of the study at its own thresholds, the estimates.
    """
    return {name: np.clip(value - there[name] + here[name], *RANGES.get(name, UNIT)) for name, value in drawn.items()}


class Measurement:
    """All metrics of one set of scores under any weights of the posts, by operating point.

    Called with weights [posts, draws] it returns by name:
    - `<rule>.<fixed or reselected>.folds.<metric>` [folds, draws] and `.pooled.<metric>` [draws], metrics of labels
    - `<rule>.fixed.criteria.<metric>` [criteria, draws]
    - `scores.<folds, criteria or pooled>.<metric>`, metrics that need no threshold; `pooled` is [draws]
    """

    def __init__(
        self,
        study: Study,
        scores: np.ndarray,
        given: Mapping[str, np.ndarray] | None = None,
        units: Sequence[str] = ("pooled", "folds", "criteria"),
    ) -> None:
        """Prepares the sums.

        Args:
            study: Gives labels, folds, criteria and posts.
            scores: The scores to measure, float64 [n].
            given: More operating points: for each name whether a pair gets the label matched, bool [n]. Their
                threshold cannot be chosen again. If None, the rules apply; else only these points are measured.
            units: The units that the metrics without a threshold are computed for.
        """
        posts = len(study.post_ids)
        self.posts = posts
        by_fold = (study.fold, study.folds, study.post, posts)
        by_criterion = (study.criterion, len(study.criterion_ids), study.post, posts)
        self.steps = ThresholdCounts(study.labels, scores, *by_fold)
        self.own = counts = self.steps(np.ones((posts, 1)))
        self.thresholds = {rule: THRESHOLDS[steps_by(rule, counts)[:, 0]] for rule in (*RULES, POOLED)}
        self.rules = RULES if given is None else ()
        self.called = {rule: scores >= self.thresholds[rule][study.fold] for rule in self.rules} | dict(given or {})
        self.fixed = {
            point: (
                LabelCounts(study.labels, called, *by_fold), LabelCounts(study.labels, called, *by_criterion)
            )
            for point, called in self.called.items()
        }  # fmt: skip
        everything = (np.zeros(len(scores), dtype=int), 1, study.post, posts)
        unit = {"pooled": everything, "folds": by_fold, "criteria": by_criterion}
        self.scored = {name: ScoreMetrics(study.labels, scores, *unit[name]) for name in units}

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the named values."""
        values: dict[str, np.ndarray] = {}

        def keep(prefix: str, metrics: Mapping[str, np.ndarray]) -> None:
            values.update({f"{prefix}.{metric}": value for metric, value in metrics.items()})

        for point, (by_fold, by_criterion) in self.fixed.items():
            folds = by_fold(weights)
            keep(f"{point}.fixed.folds", label_metrics(folds))
            keep(f"{point}.fixed.pooled", label_metrics(folds.summed()))
            keep(f"{point}.fixed.criteria", label_metrics(by_criterion(weights)))
        if self.rules:
            counts = self.steps(weights)
            for rule in self.rules:
                steps = steps_by(rule, counts)
                chosen, own = at_steps(counts, steps), at_steps(self.own, steps)
                held = at_steps(self.own, steps_by(rule, self.own))
                for unit, parts in (
                    ("folds", (chosen, own, held)), ("pooled", (chosen.summed(), own.summed(), held.summed())),
                ):  # fmt: skip
                    drawn, there, here = map(label_metrics, parts)
                    keep(f"{rule}.reselected.{unit}", drawn if rule != CROSS_FOLD else moved(drawn, there, here))
        for name, scored in self.scored.items():
            metrics = scored(weights)
            keep(f"scores.{name}", {key: value[0] for key, value in metrics.items()} if name == "pooled" else metrics)
        return values
