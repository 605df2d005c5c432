"""Evaluates one run: the content of `evaluation.json`, from which page, tables and Python API are made.

`evaluate` returns a dict that JSON can hold, equal for equal input. Undefined and unrecorded values become None.
Metrics of labels: `precision`, `recall`, `f1`, `accuracy`, `specificity`, `balanced_accuracy`, `mcc`.
Metrics of scores, without a threshold: `roc_auc`, `average_precision`, `brier`, `ece`.

Shapes:

- Interval: `{low, high, undefined_draws, constant}`. Both ends are None if more than 5 % of the draws have no value.
  `constant` marks equal values in all draws, as of a perfect classifier. Such an interval has no width.
- Number: `{value, fixed, reselected?}`. `methods.intervals` describes each interval. For `ece`, `fixed` holds None.
- FoldMean: a Number with `{corrected_t, sd, folds, undefined}`. `corrected_t` is `{low, high, p, df}`. `sd` is the
  sample standard deviation over the folds. `folds` has a value per fold. `undefined` counts folds that are left out.
- Macro: a Number with `undefined`, the mean over the criteria.

Keys:

- `run`, `draws`, `seed`, `notice`
- `verdict`: `{sentences, f1, floor, floor_difference, weakest, checks}`. There are three sentences. `f1` is pooled, at
  `cross_fold`. `weakest` has criterion ids, and `checks` the codes that fired, serious ones first.
- `checks`: each `{code, title, status, severity, finding, numbers, why, remedy}`. The status is `found`, `clear` or
  `not recorded`, the severity `serious` or `notice`.
- `operating_points`: `fixed`, `tuned_in_fold`, `cross_fold`, `cross_fold_epoch` (if recorded), `pooled`. Each is
  `{name,estimand, thresholds, threshold, pooled, fold_mean, criterion_macro, confusion, optimism}`.
  `thresholds` has one per fold. The point `pooled` has one `threshold` instead, and None for every performance.
  The averages hold a Number, FoldMean or Macro per metric of labels. `confusion` counts pairs of all folds.
  `optimism` is `{than, pooled, fold_mean}` or None: F1 of this point minus F1 of the more honest point `than`.
- `score_metrics`: `{pooled, fold_mean, criterion_macro}`, per metric of scores
- `epochs`: None or `{source, own, cross, f1_by_epoch, f1, roc_auc}`. Epochs count from 1. `f1` and `roc_auc` are
  `{own, cross, optimism}`, means over the folds. F1 has the threshold tuned in the fold after that epoch.
- `folds`: each `{fold, pairs, matched, posts, threshold, tuned_in_fold, cross_fold, scores}`; `threshold` is by rule
- `ranking`: `{pooled, folds, band, prevalence}`. A curve is `{cut, recall, precision, false_positive_rate, matched,
  pairs}`. The band is `{grid, recall_low, recall_high, precision_low, precision_high, undefined_draws}`. On `grid` are
  the false positive rates of the recalls, and the recalls of the precisions.
- `threshold_sweep`: `{thresholds, pooled, folds, marks}`, with `{f1, precision, recall}` pooled and per fold
- `criteria`: each `{criterion, pairs, matched, prevalence, few, matched_by_fold, floor_f1, metrics}`. `few` marks less
  than 20 matched pairs. The metrics are Numbers at `cross_fold`.
- `slices`: each `{name, meaning, slices, difference}`, where a slice is `{name, pairs, matched, posts, metrics}`
- `calibration`: `{bins, temperatures, before, after, change}`
- `errors`: `{confusion, histogram}`, the confusion by operating point
- `floors`: `{operating_point, best, table, difference_to_best}`; a row is `{name, meaning, thresholds, metrics,
  f1_difference}`
- `methods`: `{intervals, estimands, metrics, averages, notes}`, texts
- `data`: `{pairs, posts, matched, prevalence, folds, criteria, posts_without_match, matched_by_fold_and_criterion,
  recorded}`
"""

from typing import Any

import numpy as np

from raycv.evaluation.bootstrap import (
    COVERS,
    DRAWS,
    SEED,
    Samples,
    criterion_macro,
    fold_mean,
    mean_over_units,
    number,
    resample,
    rounded,
    said,
)
from raycv.evaluation.calibration import band, calibration_section, curve, histogram, sweep
from raycv.evaluation.checks import FOUND, SERIOUS, run_checks
from raycv.evaluation.floors_and_slices import (
    FLOOR_NAMES,
    criteria_section,
    data_section,
    floors_section,
    folds_section,
    measure_floors,
    slices_section,
)
from raycv.evaluation.measures import BINS, LABEL_METRICS, SCORE_METRICS
from raycv.evaluation.operating_points import (
    CROSS_FOLD,
    CROSS_FOLD_EPOCH,
    ESTIMANDS,
    POOLED,
    RULES,
    TUNED_IN_FOLD,
    Epochs,
    Measurement,
    at_cross_epochs,
    epochs_of,
    epochs_section,
)
from raycv.evaluation.study import Study

NOTICE = "Research use, not for diagnosis."
METHODS = {
    "intervals": COVERS,
    "estimands": ESTIMANDS,
    "metrics": {
        "precision": "TP / (TP + FP); undefined if no pair gets the label matched",
        "recall": "TP / (TP + FN); undefined without matched pairs",
        "f1": "2 TP / (2 TP + FP + FN), of the label matched; undefined without matched pairs",
        "accuracy": "(TP + TN) / pairs",
        "specificity": "TN / (TN + FP); undefined without unmatched pairs",
        "balanced_accuracy": "(recall + specificity) / 2",
        "mcc": "Matthews correlation; undefined if all pairs have one label or get one label",
        "roc_auc": "share of (matched, unmatched) pairs in the right order, ties count half; undefined with one class",
        "average_precision": "sum of (recall step x precision) over distinct scores; compare it with the prevalence",
        "brier": "mean squared distance of score and label",
        "ece": f"sum over {BINS} equally wide bins of |matched pairs - summed scores|, divided by the pairs; "
        "no bootstrap interval, since its bootstrap is biased upwards",
    },
    "averages": {
        "pooled": "over the out-of-fold labels or scores of all folds together",
        "fold_mean": "mean of the folds' values; sd is the sample standard deviation over the folds, not an interval",
        "criterion_macro": "mean of the criteria's values, each pooled over the folds",
    },
    "notes": [
        "Intervals are percentile intervals at 95 % over bootstrap draws of whole posts.",
        "raycv counts the draws in which a value is undefined. Above 5 % of them, raycv gives no interval.",
        "A fold's threshold comes from scores of models that trained on this fold, so it is not wholly independent.",
        "In 2,000 simulated studies, 95 % intervals of F1 at cross_fold held the truth 94.0 % of the time with the "
        "threshold held fixed, and 94.9 % with the threshold chosen again. For the difference of two alike runs it was "
        "90.1 % and 93.9 %, so differences of runs are judged with the threshold chosen again.",
        "Floors get their thresholds by the same rule on the same folds.",
        "ROC and precision-recall bands are pointwise.",
    ],
}


def evaluate(study: Study, draws: int = DRAWS, seed: int = SEED) -> dict[str, Any]:
    """Returns the statistics of a run in the shape that the module describes; the same input gives the same bytes.

    Args:
        study: The out-of-fold predictions.
        draws: The number of bootstrap draws.
        seed: Their seed.
    """
    study = study.in_order()
    measurement = Measurement(study, study.scores)
    pairs, posts = len(study.labels), len(study.post_ids)
    samples = resample(measurement, posts, pairs, draws=draws, seed=seed)
    epochs = epochs_of(study)
    later = _at_cross_epochs(study, epochs, draws, seed) if epochs else None
    points = _points(measurement, samples, later)
    floors, floor_thresholds = measure_floors(study, draws, seed)
    floor = floors_section(samples, floors, floor_thresholds)
    folds = folds_section(study, measurement, samples)
    criteria = criteria_section(study, samples)
    facts = {
        "thresholds": measurement.thresholds[TUNED_IN_FOLD].tolist(),
        "pooled_threshold": points[-1]["threshold"],
        "fold_metrics": [{**row["tuned_in_fold"], **row["scores"]} for row in folds],
        "best_floor": floor["best"],
        "floor_difference": floor["difference_to_best"]["f1"],
    }
    scores = _score_metrics(samples)
    honest = next(point for point in points if point["name"] == CROSS_FOLD)
    for metric, averages in (("f1", honest), ("roc_auc", scores)):
        facts[metric] = {name: averages[name][metric]["value"] for name in ("pooled", "fold_mean")}
    checks = run_checks(study, facts, draws, seed)
    sweep_section = sweep(study)
    sweep_section["marks"] = {point["name"]: point["thresholds"] for point in points if point["thresholds"]}
    return rounded(
        {
            "run": study.run,
            "draws": draws,
            "seed": seed,
            "notice": NOTICE,
            "verdict": _verdict(honest["pooled"]["f1"], floor, criteria, checks),
            "checks": checks,
            "operating_points": points,
            "score_metrics": scores,
            "epochs": epochs_section(study, epochs) if epochs else None,
            "folds": folds,
            "ranking": {
                "pooled": curve(study.labels, study.scores),
                "folds": [
                    curve(study.labels[study.fold == fold], study.scores[study.fold == fold])
                    for fold in range(study.folds)
                ],
                "band": band(study, draws, seed),
                "prevalence": float(study.labels.mean()),
            },
            "threshold_sweep": sweep_section,
            "criteria": criteria,
            "slices": slices_section(study, measurement.called[CROSS_FOLD], draws, seed),
            "calibration": calibration_section(study, draws, seed),
            "errors": {
                "confusion": {point["name"]: point["confusion"] for point in points if point["confusion"]},
                "histogram": histogram(study),
            },
            "floors": floor,
            "methods": METHODS,
            "data": data_section(study),
        }
    )


def _at_cross_epochs(study: Study, epochs: Epochs, draws: int, seed: int) -> tuple[Measurement, Samples, Any] | None:
    if (found := at_cross_epochs(study, epochs)) is None:
        return None
    scores, thresholds = found
    called = {CROSS_FOLD_EPOCH: scores >= thresholds[study.fold]}
    measurement = Measurement(study, scores, called, units=())
    samples = resample(measurement, measurement.posts, len(scores), draws=draws, seed=seed)
    return measurement, samples, thresholds


def _points(measurement: Measurement, samples: Samples, later: tuple[Measurement, Samples, Any] | None) -> list[Any]:
    """The operating points in order."""
    rows = [_point(rule, measurement, samples, measurement.thresholds[rule]) for rule in RULES]
    rows[RULES.index(TUNED_IN_FOLD)]["optimism"] = _optimism(samples, TUNED_IN_FOLD, samples, CROSS_FOLD)
    if later:
        measured, epoch_samples, thresholds = later
        rows[RULES.index(CROSS_FOLD)]["optimism"] = _optimism(samples, CROSS_FOLD, epoch_samples, CROSS_FOLD_EPOCH)
        rows.append(_point(CROSS_FOLD_EPOCH, measured, epoch_samples, thresholds))
    nothing = {"pooled": None, "fold_mean": None, "criterion_macro": None, "confusion": None, "optimism": None}
    threshold = float(measurement.thresholds[POOLED][0])
    names = {"name": POOLED, "estimand": ESTIMANDS[POOLED]}
    return [*rows, {**names, "thresholds": None, "threshold": threshold, **nothing}]


def _point(name: str, measurement: Measurement, samples: Samples, thresholds: np.ndarray) -> dict[str, Any]:
    def chosen_again(average: str) -> str | None:
        return f"{name}.reselected.{average}" if name in RULES else None

    counts = measurement.fixed[name][0](np.ones((measurement.posts, 1))).summed()
    return {
        "name": name,
        "estimand": ESTIMANDS[name],
        "thresholds": thresholds.tolist(),
        "threshold": None,
        "pooled": {
            metric: number(samples, f"{name}.fixed.pooled.{metric}", reselected=chosen_again(f"pooled.{metric}"))
            for metric in LABEL_METRICS
        },
        "fold_mean": {
            metric: fold_mean(samples, f"{name}.fixed.folds.{metric}", chosen_again(f"folds.{metric}"))
            for metric in LABEL_METRICS
        },
        "criterion_macro": {
            metric: criterion_macro(samples, f"{name}.fixed.criteria.{metric}") for metric in LABEL_METRICS
        },
        "confusion": {cell: int(value[0]) for cell, value in counts.confusion().items()},
        "optimism": None,
    }


def _optimism(samples: Samples, point: str, honest: Samples, than: str) -> dict[str, Any]:
    """F1 of a point minus that of a more honest one, draw by draw."""
    found: dict[str, Any] = {"than": than}
    for average, units in (("pooled", "pooled"), ("fold_mean", "folds")):
        parts = []
        for each, name in ((samples, f"{point}.fixed.{units}.f1"), (honest, f"{than}.fixed.{units}.f1")):
            mean = each if units == "pooled" else mean_over_units(each, name)
            parts.append(Samples({"f1": mean.estimate[name]}, {"f1": mean.draws[name]}))
        found[average] = number(parts[0].minus(parts[1]), "f1")
    return found


def _score_metrics(samples: Samples) -> dict[str, Any]:
    return {
        "pooled": {metric: number(samples, f"scores.pooled.{metric}") for metric in SCORE_METRICS},
        "fold_mean": {metric: fold_mean(samples, f"scores.folds.{metric}") for metric in SCORE_METRICS},
        "criterion_macro": {metric: criterion_macro(samples, f"scores.criteria.{metric}") for metric in SCORE_METRICS},
    }


def _verdict(f1: dict[str, Any], floor: dict[str, Any], criteria: list[Any], checks: list[Any]) -> dict[str, Any]:
    difference = floor["difference_to_best"]["f1"]
    ranked = sorted((row for row in criteria if row["metrics"]["f1"]["value"] is not None), key=_f1)
    weakest = [row["criterion"] for row in ranked[:3]]
    fired = [check for check in checks if check["status"] == FOUND]
    fired.sort(key=lambda check: check["severity"] != SERIOUS)
    codes = [check["code"] for check in fired]
    return {
        "sentences": [
            f"On posts that its models did not train on, F1 is {said(f1['value'], f1['reselected'])}, at thresholds "
            "tuned on other folds.",
            _against_floor(floor["best"], difference),
            (f"The weakest criteria are {', '.join(weakest)}; " if weakest else "No criterion has an F1; ")
            + (f"checks that found something: {', '.join(codes)}." if codes else "no check found anything."),
        ],
        "f1": f1,
        "floor": floor["best"],
        "floor_difference": difference,
        "weakest": weakest,
        "checks": codes,
    }


def _f1(row: dict[str, Any]) -> float:
    return row["metrics"]["f1"]["value"]


def _against_floor(name: str, difference: dict[str, Any]) -> str:
    name, value, ends = FLOOR_NAMES.get(name, name), difference["value"], difference["reselected"]
    if value is None or ends["low"] is None:
        return f"The difference to the best floor ({name}) is undefined."
    amount = said(abs(value), ends if value >= 0 else {**ends, "low": -ends["high"], "high": -ends["low"]})
    if ends["low"] > 0:
        return f"It is better than the best floor ({name}) by {amount}."
    if ends["high"] < 0:
        return f"It is worse than the best floor ({name}) by {amount}."
    return f"No difference to the best floor ({name}) is shown: {said(value, ends)}."
