"""Computes floors on the same folds, and the rows of the report about criteria, slices, folds and data."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from raycv.evaluation.bootstrap import Samples, fold_mean, number, plain, resample
from raycv.evaluation.measures import LABEL_METRICS, METRICS, SCORE_METRICS, LabelCounts, ScoreMetrics, label_metrics
from raycv.evaluation.operating_points import CROSS_FOLD, RULES, TUNED_IN_FOLD, Measurement
from raycv.evaluation.study import Study
from raycv.training.metrics import all_matched_f1

ALL_POSITIVE, ALL_NEGATIVE, CRITERION_PRIOR = "all_positive", "all_negative", "criterion_prior"
MEANINGS = {
    ALL_POSITIVE: "Labels every pair matched.",
    ALL_NEGATIVE: "Labels every pair unmatched.",
    CRITERION_PRIOR: "Scores a pair with the share of matched pairs of its criterion in the other folds.",
}
FLOOR_NAMES = {
    ALL_POSITIVE: "all matched",
    ALL_NEGATIVE: "all unmatched",
    CRITERION_PRIOR: "share of the criterion",
    "tfidf_logistic_regression": "TF-IDF + logistic regression",
}
"""Names of the floors for people."""
GIVEN = "Scores of a simple model that the run trained on the same folds."
_F1 = f"{CROSS_FOLD}.fixed.pooled.f1"
_RESELECTED = f"{CROSS_FOLD}.reselected.pooled."
FEW = 20
"""Matched pairs below which a criterion's numbers say little."""


def criterion_prior(study: Study) -> np.ndarray:
    """Returns for each pair the share of matched pairs of its criterion in the other folds, float64 [n].

    A criterion without pairs in the other folds gets the share over all their pairs.
    """
    criteria = len(study.criterion_ids)
    cell = study.fold * criteria + study.criterion
    pairs = np.bincount(cell, minlength=study.folds * criteria).reshape(study.folds, criteria)
    matched = np.bincount(cell, study.labels, study.folds * criteria).reshape(study.folds, criteria)
    pairs, matched = pairs.sum(axis=0) - pairs, matched.sum(axis=0) - matched
    overall = np.broadcast_to((matched.sum(axis=1) / pairs.sum(axis=1))[:, None], pairs.shape).copy()
    shares = np.divide(matched, pairs, out=overall, where=pairs > 0)
    return shares[study.fold, study.criterion]


def measure_floors(study: Study, draws: int, seed: int) -> tuple[dict[str, Samples], dict[str, list[float]]]:
    """Returns the samples of each floor by its name, and the thresholds by fold of those that have scores.

    A floor with scores gets its thresholds as the model does: tuned on the other folds.
    """
    rows = len(study.labels)
    pairs = len(study.labels)
    samples, thresholds = {}, {}
    for name, label in ((ALL_POSITIVE, 1), (ALL_NEGATIVE, 0)):
        given = {CROSS_FOLD: np.full(rows, label == 1)}
        floor = Measurement(study, np.full(rows, float(label)), given, units=("pooled",))

        def statistic(weights: np.ndarray, floor: Measurement = floor) -> dict[str, np.ndarray]:
            values = floor(weights)
            # Nothing is chosen, so choosing again changes nothing.
            return values | {key.replace(".fixed.", ".reselected."): value for key, value in values.items()}

        samples[name] = resample(statistic, floor.posts, pairs, draws=draws, seed=seed)
    for name, scores in {CRITERION_PRIOR: criterion_prior(study), **study.floor_scores}.items():
        floor = Measurement(study, scores, units=("pooled",))
        samples[name] = resample(floor, floor.posts, pairs, draws=draws, seed=seed)
        thresholds[name] = floor.thresholds[CROSS_FOLD].tolist()
    return samples, thresholds


def best_floor(floors: Mapping[str, Samples]) -> str:
    """Returns the floor with the highest pooled F1; among equal ones the first."""
    return max(floors, key=lambda name: float(np.nan_to_num(floors[name].estimate[_F1], nan=-1.0)))


def floors_section(
    model: Samples, floors: Mapping[str, Samples], thresholds: Mapping[str, list[float]]
) -> dict[str, Any]:
    """Returns each floor's metrics, and the paired difference of the model to the best floor.

    The best floor is chosen by F1 on the same pairs. This favours the floor a little, so the difference errs low.
    """
    best = best_floor(floors)
    difference = model.minus(floors[best])
    table = [
        {
            "name": name,
            "meaning": MEANINGS.get(name, GIVEN),
            "thresholds": thresholds.get(name),
            "metrics": _floor_metrics(floor),
            "f1_difference": number(model.minus(floor), _F1, reselected=_RESELECTED + "f1"),
        }
        for name, floor in floors.items()
    ]
    return {
        "operating_point": CROSS_FOLD,
        "best": best,
        "table": table,
        "difference_to_best": {
            **_floor_metrics(difference),
            "f1_fold_mean": fold_mean(difference, f"{CROSS_FOLD}.fixed.folds.f1", f"{CROSS_FOLD}.reselected.folds.f1"),
        },
    }


def _floor_metrics(samples: Samples) -> dict[str, Any]:
    labels = {
        metric: number(samples, f"{CROSS_FOLD}.fixed.pooled.{metric}", reselected=_RESELECTED + metric)
        for metric in LABEL_METRICS
    }
    return labels | {metric: number(samples, f"scores.pooled.{metric}") for metric in SCORE_METRICS}


def criteria_section(study: Study, samples: Samples) -> list[dict[str, Any]]:
    """Returns a row per criterion, pooled over the folds, with the floor F1 of labelling all its pairs matched."""
    rows = []
    for one, name in enumerate(study.criterion_ids):
        own = study.criterion == one
        labels = study.labels[own]
        matched = int(labels.sum())
        metrics = {
            **{metric: number(samples, f"{CROSS_FOLD}.fixed.criteria.{metric}", (one,)) for metric in LABEL_METRICS},
            **{metric: number(samples, f"scores.criteria.{metric}", (one,)) for metric in SCORE_METRICS},
        }
        rows.append(
            {
                "criterion": name,
                "pairs": len(labels),
                "matched": matched,
                "prevalence": float(labels.mean()),
                "few": matched < FEW,
                "matched_by_fold": np.bincount(study.fold[own], labels, study.folds).astype(int).tolist(),
                "floor_f1": all_matched_f1(float(labels.mean())) if matched else None,
                "metrics": metrics,
            }
        )
    return rows


def slices_section(study: Study, called: np.ndarray, draws: int, seed: int) -> list[dict[str, Any]]:
    """Returns pairs of slices with metrics, and the difference of the first to the second by the same draws.

    Args:
        study: The run. Slices that it did not record are left out.
        called: Whether a pair gets the label matched, bool [n].
        draws: The number of bootstrap draws.
        seed: Their seed.
    """
    rows = []
    for name, meaning, parts in _partitions(study):
        measured = [_samples(study, called, mask, draws, seed) if mask.any() else None for mask in parts.values()]
        slices = [
            {
                "name": part,
                "pairs": int(mask.sum()),
                "matched": int(study.labels[mask].sum()),
                "posts": len(np.unique(study.post[mask])),
                "metrics": _numbers(samples) if samples else None,
            }
            for (part, mask), samples in zip(parts.items(), measured, strict=True)
        ]
        first, second = measured
        difference = _numbers(first.minus(second)) if first and second else None
        rows.append({"name": name, "meaning": meaning, "slices": slices, "difference": difference})
    return rows


def _partitions(study: Study) -> list[tuple[str, str, dict[str, np.ndarray]]]:
    matched = np.zeros(len(study.post_ids), dtype=bool)
    matched[study.post[study.labels == 1]] = True
    negative = study.labels == 0
    found = [
        (
            "match", "posts with at least one matched criterion, and posts without any",
            {"posts_with_match": matched[study.post], "posts_without_match": ~matched[study.post]},
        )
    ]  # fmt: skip
    if study.shortened is not None:
        parts = {"shortened": study.shortened.astype(bool), "whole": ~study.shortened.astype(bool)}
        found.append(("length", "posts that were shortened to fit the budget of tokens, and whole ones", parts))
    if study.hard_negative is not None:
        hard = study.hard_negative.astype(bool) & negative
        parts = {"hard_negatives": hard, "other_negatives": negative & ~hard}
        found.append(("negatives", "unmatched pairs that an annotator looked at and rejected, and all others", parts))
    return found


def _samples(study: Study, called: np.ndarray, mask: np.ndarray, draws: int, seed: int) -> Samples:
    one = np.zeros(int(mask.sum()), dtype=int)
    rows = (one, 1, study.post[mask], len(study.post_ids))
    counts = LabelCounts(study.labels[mask], called[mask], *rows)
    scores = ScoreMetrics(study.labels[mask], study.scores[mask], *rows)

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        values = label_metrics(counts(weights).summed())
        return values | {name: value[0] for name, value in scores(weights).items()}

    return resample(statistic, len(study.post_ids), len(one), draws=draws, seed=seed)


def _numbers(samples: Samples) -> dict[str, Any]:
    return {metric: number(samples, metric) for metric in METRICS}


def folds_section(study: Study, measurement: Measurement, samples: Samples) -> list[dict[str, Any]]:
    """Returns a row per fold: its size, its thresholds and its metrics at two operating points."""
    rows = []
    for fold in range(study.folds):
        own = study.fold == fold
        rows.append(
            {
                "fold": fold,
                "pairs": int(own.sum()),
                "matched": int(study.labels[own].sum()),
                "posts": len(np.unique(study.post[own])),
                "threshold": {rule: float(measurement.thresholds[rule][fold]) for rule in RULES},
                **{
                    rule: {m: plain(samples.estimate[f"{rule}.fixed.folds.{m}"][fold]) for m in LABEL_METRICS}
                    for rule in (TUNED_IN_FOLD, CROSS_FOLD)
                },
                "scores": {m: plain(samples.estimate[f"scores.folds.{m}"][fold]) for m in SCORE_METRICS},
            }
        )
    return rows


def data_section(study: Study) -> dict[str, Any]:
    """Returns the sizes of the data, and what the run recorded."""
    criteria = len(study.criterion_ids)
    cell = study.fold * criteria + study.criterion
    by_cell = np.bincount(cell, study.labels, study.folds * criteria).reshape(study.folds, criteria)
    with_match = np.unique(study.post[study.labels == 1])
    return {
        "pairs": len(study.labels),
        "posts": len(study.post_ids),
        "matched": int(study.labels.sum()),
        "prevalence": float(study.labels.mean()),
        "folds": study.folds,
        "criteria": list(study.criterion_ids),
        "posts_without_match": len(study.post_ids) - len(with_match),
        "matched_by_fold_and_criterion": by_cell.astype(int).tolist(),
        "recorded": study.recorded(),
    }
