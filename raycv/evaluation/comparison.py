"""Compares runs that scored the same pairs in the same folds, draw by draw and fold by fold.

`compare` returns a dict that JSON can hold. Numbers have the shapes of `raycv.evaluation.evaluate`, and all are
differences: the run minus the baseline. Swapping two runs changes signs only.

Keys:

- `operating_point`, `metric`, `baseline`, `draws`, `seed`, `methods`
- `same`: `{pairs, posts, matched, folds, criteria}`, which all runs share
- `runs`: each `{run, thresholds, pooled}`, with a Number per metric
- `comparisons`: one per run that is not the baseline. Each is `{run, baseline, sentence, better, shown, p, p_holm,
  detectable, pooled, fold_mean, criterion_macro, criteria, flipped}`.
  `p` belongs to the pooled `metric`, and `p_holm` is adjusted over the runs. `shown`: the interval excludes 0 and
  `p_holm` is at most 0.05. `better`: a difference is shown, and the run has the better value.
  `detectable` is the smallest true difference in `metric` that such data show four times out of five.
- `criteria` (of a comparison): each `{criterion, matched, <metric>, p, p_holm}`; adjusted over all criteria of all runs
- `flipped`: `{pairs, of, matched, unmatched}`; a class is `{both_right, only_run, only_baseline, both_wrong}`
- `best`, `tied`: the run with the best value, and every run whose difference to it is not shown
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from raycv.errors import UserError
from raycv.evaluation.bootstrap import (
    COVERS,
    DRAWS,
    LEVEL,
    SEED,
    Samples,
    criterion_macro,
    fold_mean,
    holm,
    number,
    p_value,
    resample,
    rounded,
    said,
)
from raycv.evaluation.measures import LABEL_METRICS, METRICS, NAMES, SCORE_METRICS
from raycv.evaluation.operating_points import CROSS_FOLD, Measurement
from raycv.evaluation.study import Study

POWER = 0.8
COMPARED = tuple(metric for metric in METRICS if metric != "ece")
"""The metrics that a comparison can turn on. The bootstrap of the calibration error is biased."""
LOWER_IS_BETTER = ("brier",)
_FIXED, _AGAIN = f"{CROSS_FOLD}.fixed", f"{CROSS_FOLD}.reselected"
METHODS = {
    "intervals": COVERS,
    "difference": "the run minus the baseline, both at thresholds tuned on other folds (cross_fold)",
    "p": "twice the smaller share of bootstrap draws at or beyond 0; one is added to both counts",
    "p_holm": "Holm's step-down method; an undefined p-value counts as a test and stays undefined",
    "detectable": f"(z of {(1 + LEVEL) / 2} + z of {POWER}) times the standard deviation of the bootstrap differences",
}


def compare(
    studies: Sequence[Study], baseline: str | None = None, draws: int = DRAWS, seed: int = SEED, metric: str = "f1"
) -> dict[str, Any]:
    """Compares runs with one of them, in the shape that the module describes.

    Args:
        studies: At least two runs.
        baseline: The name of the run that the others are compared with; None for the first.
        draws: The number of bootstrap draws.
        seed: Their seed.
        metric: The metric of `COMPARED` that the sentences, p-values and the tied set are about.

    Raises:
        UserError: The metric is not one of `COMPARED`. A name is missing or occurs twice. Posts, labels or folds
            differ: the message has the first difference.
    """
    if metric not in COMPARED:
        remedies = [f"choose one of {', '.join(COMPARED)}"]
        raise UserError(f"metric={metric} cannot be compared.", kind="config-value", remedies=remedies)
    names = [study.run for study in studies]
    baseline = names[0] if baseline is None and names else baseline
    if len(names) < 2 or len(set(names)) < len(names) or baseline not in names:
        raise UserError(
            f"Runs {', '.join(names) or '(none)'} with the baseline {baseline} cannot be compared: at least two runs "
            "of different names are needed, and the baseline must be one of them.",
            kind="config-value",
            remedies=["name the runs: runs=[<run>,<other run>] baseline=<run>"],
        )
    ordered = [study.in_order() for study in studies]
    for other in ordered[1:]:
        require_same_pairs(ordered[0], other)
    first = ordered[0]
    measured = {study.run: Measurement(study, study.scores) for study in ordered}
    samples = {
        run: resample(one, one.posts, len(first.labels), draws=draws, seed=seed) for run, one in measured.items()
    }
    rest = [run for run in names if run != baseline]
    rows = [_comparison(first, run, baseline, samples, measured, metric) for run in rest]
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
        _conclude(row, metric)
    cells = [cell for row in rows for cell in row["criteria"]]
    for cell, adjusted in zip(cells, holm([cell["p"] for cell in cells]), strict=True):
        cell["p_holm"] = adjusted
    best, tied = tied_set(samples, metric)
    return rounded(
        {
            "operating_point": CROSS_FOLD,
            "metric": metric,
            "baseline": baseline,
            "draws": draws,
            "seed": seed,
            "same": {
                "pairs": len(first.labels),
                "posts": len(first.post_ids),
                "matched": int(first.labels.sum()),
                "folds": first.folds,
                "criteria": list(first.criterion_ids),
            },
            "runs": [
                {
                    "run": run,
                    "thresholds": measured[run].thresholds[CROSS_FOLD].tolist(),
                    "pooled": _pooled(samples[run]),
                }
                for run in names
            ],
            "comparisons": rows,
            "best": best,
            "tied": tied,
            "methods": METHODS,
        }
    )


def require_same_pairs(one: Study, other: Study) -> None:
    """Checks that two studies in order have the same pairs with the same labels and folds.

    Raises:
        UserError: They do not. The message has the first difference.
    """
    pairs = [
        {
            (study.post_ids[post], study.criterion_ids[criterion]): (int(label), int(fold))
            for post, criterion, label, fold in zip(study.post, study.criterion, study.labels, study.fold, strict=True)
        }
        for study in (one, other)
    ]
    difference = ""
    for pair in sorted(pairs[0].keys() | pairs[1].keys()):
        found = [side.get(pair) for side in pairs]
        if found[0] == found[1]:
            continue
        where = f"post {pair[0]}, criterion {pair[1]}"
        if found[0] is None or found[1] is None:
            difference = f"only {one.run if found[1] is None else other.run} has {where}"
        else:
            at = 0 if found[0][0] != found[1][0] else 1
            difference = f"the {('label', 'fold')[at]} of {where} is {found[0][at]} and {found[1][at]}"
        break
    if difference:
        raise UserError(
            f"Runs {one.run} and {other.run} cannot be compared: {difference}.",
            kind="runs-differ",
            remedies=["train both on the same data with the same data.*, cv.folds and cv.seed, and compare again"],
        )


def tied_set(samples: dict[str, Samples], metric: str = "f1") -> tuple[str, list[str]]:
    """Returns the run with the best value, and the sorted runs whose difference to it is not shown (Holm, 0.05)."""
    runs = sorted(samples)
    sign = -1 if metric in LOWER_IS_BETTER else 1
    values = {run: sign * samples[run].estimate[_held("pooled", metric)] for run in runs}
    best = max(runs, key=lambda run: float(np.nan_to_num(values[run], nan=-2.0)))
    rest = [run for run in runs if run != best]
    adjusted = holm([p_value(samples[run].minus(samples[best]).draws[_drawn(metric)]) for run in rest])
    tied = [run for run, p in zip(rest, adjusted, strict=True) if p is None or p > 1 - LEVEL]
    return best, sorted([best, *tied])


def _held(unit: str, metric: str) -> str:
    """The name of a metric in the samples, with the threshold held fixed if it needs one."""
    return f"{_FIXED}.{unit}.{metric}" if metric in LABEL_METRICS else f"scores.{unit}.{metric}"


def _drawn(metric: str) -> str:
    """The name of the pooled metric in the samples, with the threshold chosen again if it needs one."""
    return f"{_AGAIN}.pooled.{metric}" if metric in LABEL_METRICS else f"scores.pooled.{metric}"


def detectable(draws: np.ndarray) -> float | None:
    """Returns the smallest true difference that such data show with a power of 80 %; None without defined draws."""
    from scipy.special import ndtri

    defined = draws[~np.isnan(draws)]
    return float((ndtri((1 + LEVEL) / 2) + ndtri(POWER)) * defined.std(ddof=1)) if len(defined) > 1 else None


def _comparison(
    study: Study,
    run: str,
    baseline: str,
    samples: dict[str, Samples],
    measured: dict[str, Measurement],
    metric: str,
) -> dict[str, Any]:
    difference = samples[run].minus(samples[baseline])
    pooled, by_criterion = difference.draws[_drawn(metric)], _held("criteria", metric)
    criteria = []
    for one, name in enumerate(study.criterion_ids):
        each = number(difference, by_criterion, (one,))
        p = p_value(difference.draws[by_criterion][one]) if each["value"] is not None else None
        matched = int(study.labels[study.criterion == one].sum())
        criteria.append({"criterion": name, "matched": matched, metric: each, "p": p, "p_holm": None})
    return {
        "run": run,
        "baseline": baseline,
        "p": p_value(pooled),
        "p_holm": None,
        "detectable": detectable(pooled),
        "pooled": _pooled(difference),
        "fold_mean": {
            **{m: fold_mean(difference, f"{_FIXED}.folds.{m}", f"{_AGAIN}.folds.{m}") for m in LABEL_METRICS},
            **{m: fold_mean(difference, f"scores.folds.{m}") for m in SCORE_METRICS},
        },
        "criterion_macro": {m: criterion_macro(difference, _held("criteria", m)) for m in METRICS},
        "criteria": criteria,
        "flipped": flipped(study.labels, measured[run].called[CROSS_FOLD], measured[baseline].called[CROSS_FOLD]),
    }


def _pooled(samples: Samples) -> dict[str, Any]:
    labels = {m: number(samples, f"{_FIXED}.pooled.{m}", reselected=f"{_AGAIN}.pooled.{m}") for m in LABEL_METRICS}
    return labels | {metric: number(samples, f"scores.pooled.{metric}") for metric in SCORE_METRICS}


def flipped(labels: np.ndarray, run: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
    """Returns how many pairs get another label, and for each class which of the two is right.

    Args:
        labels: 0 or 1 [n].
        run: Whether the run labels a pair matched, bool [n].
        baseline: Whether the baseline does, bool [n].
    """
    found: dict[str, Any] = {"pairs": int((run != baseline).sum()), "of": len(labels)}
    for name, label in (("matched", 1), ("unmatched", 0)):
        own = labels == label
        right, before = run[own] == (label == 1), baseline[own] == (label == 1)
        found[name] = {
            "both_right": int((right & before).sum()),
            "only_run": int((right & ~before).sum()),
            "only_baseline": int((~right & before).sum()),
            "both_wrong": int((~right & ~before).sum()),
        }
    return found


def _conclude(row: dict[str, Any], metric: str) -> None:
    """Adds the sentence and whether a difference is shown."""
    found = row["pooled"][metric]
    value, ends = found["value"], found.get("reselected") or found["fixed"]
    run, baseline, name = row["run"], row["baseline"], NAMES[metric]
    apart = ends["low"] is not None and (ends["low"] > 0 or ends["high"] < 0)
    row["shown"] = apart and row["p_holm"] is not None and row["p_holm"] <= 1 - LEVEL
    better = value is not None and (value < 0 if metric in LOWER_IS_BETTER else value > 0)
    row["better"] = bool(row["shown"] and better)
    if value is None or ends["low"] is None:
        row["sentence"] = f"The difference in {name} between {run} and {baseline} is undefined."
    elif not row["shown"]:
        row["sentence"] = (
            f"No difference in {name} between {run} and {baseline} is shown: {said(value, ends)}. "
            f"These data show a difference of {row['detectable']:.3f} four times out of five."
        )
    else:
        turned = ends if value > 0 else {**ends, "low": -ends["high"], "high": -ends["low"]}
        word = "better" if better else "worse"
        row["sentence"] = f"{run} is {word} than {baseline} in {name} by {said(abs(value), turned)}."
