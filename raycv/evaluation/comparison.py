"""Compares runs that scored the same pairs in the same folds, draw by draw and fold by fold.

`compare` returns a dict that JSON can hold. Numbers have the shapes of `raycv.evaluation.evaluate`, and all are
differences: the run minus the baseline. Swapping two runs changes signs only.

Keys:

- `operating_point`, `baseline`, `draws`, `seed`, `methods`
- `same`: `{pairs, posts, matched, folds, criteria}`, which all runs share
- `runs`: each `{run, thresholds, pooled}`, with a Number per metric
- `comparisons`: one per run that is not the baseline. Each is `{run, baseline, sentence, better, shown, p, p_holm,
  detectable, pooled, fold_mean, criterion_macro, criteria, flipped}`.
  `p` belongs to the pooled F1, and `p_holm` is adjusted over the runs. `shown`: the interval excludes 0 and `p_holm` is
  at most 0.05. `better`: a difference is shown, and it is above 0.
  `detectable` is the smallest true difference in F1 that such data show four times out of five.
- `criteria` (of a comparison): each `{criterion, matched, f1, p, p_holm}`; adjusted over all criteria of all runs
- `flipped`: `{pairs, of, matched, unmatched}`; a class is `{both_right, only_run, only_baseline, both_wrong}`
- `best`, `tied`: the run with the highest F1, and every run whose difference to it is not shown
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
from raycv.evaluation.measures import LABEL_METRICS, SCORE_METRICS
from raycv.evaluation.operating_points import CROSS_FOLD, Measurement
from raycv.evaluation.study import Study

POWER = 0.8
_FIXED, _AGAIN = f"{CROSS_FOLD}.fixed", f"{CROSS_FOLD}.reselected"
METHODS = {
    "intervals": COVERS,
    "difference": "the run minus the baseline, both at thresholds tuned on other folds (cross_fold)",
    "p": "twice the smaller share of bootstrap draws at or beyond 0; one is added to both counts",
    "p_holm": "Holm's step-down method; an undefined p-value counts as a test and stays undefined",
    "detectable": f"(z of {(1 + LEVEL) / 2} + z of {POWER}) times the standard deviation of the bootstrap differences",
}


def compare(
    studies: Sequence[Study], baseline: str | None = None, draws: int = DRAWS, seed: int = SEED
) -> dict[str, Any]:
    """Compares runs with one of them, in the shape that the module describes.

    Args:
        studies: At least two runs.
        baseline: The name of the run that the others are compared with; None for the first.
        draws: The number of bootstrap draws.
        seed: Their seed.

    Raises:
        UserError: A name is missing or occurs twice, or posts, labels or folds differ. The message has the first
            difference.
    """
    names = [study.run for study in studies]
    baseline = names[0] if baseline is None and names else baseline
    if len(names) < 2 or len(set(names)) < len(names) or baseline not in names:
        raise UserError(
            f"Runs {', '.join(names) or '(none)'} with the baseline {baseline} cannot be compared: at least two runs "
            "of different names are needed, and the baseline must be one of them.",
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
    rows = [_comparison(first, run, baseline, samples, measured) for run in rest]
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
        _conclude(row)
    cells = [cell for row in rows for cell in row["criteria"]]
    for cell, adjusted in zip(cells, holm([cell["p"] for cell in cells]), strict=True):
        cell["p_holm"] = adjusted
    best, tied = tied_set(samples)
    return rounded(
        {
            "operating_point": CROSS_FOLD,
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
            remedies=["train both on the same data with the same data.*, cv.folds and cv.seed, and compare again"],
        )


def tied_set(samples: dict[str, Samples]) -> tuple[str, list[str]]:
    """Returns the run with the highest F1, and the sorted runs whose difference to it is not shown (Holm, 0.05)."""
    runs = sorted(samples)
    best = max(runs, key=lambda run: float(np.nan_to_num(samples[run].estimate[f"{_FIXED}.pooled.f1"], nan=-1.0)))
    rest = [run for run in runs if run != best]
    adjusted = holm([p_value(samples[run].minus(samples[best]).draws[f"{_AGAIN}.pooled.f1"]) for run in rest])
    tied = [run for run, p in zip(rest, adjusted, strict=True) if p is None or p > 1 - LEVEL]
    return best, sorted([best, *tied])


def detectable(draws: np.ndarray) -> float | None:
    """Returns the smallest true difference that such data show with a power of 80 %; None without defined draws."""
    from scipy.special import ndtri

    defined = draws[~np.isnan(draws)]
    return float((ndtri((1 + LEVEL) / 2) + ndtri(POWER)) * defined.std(ddof=1)) if len(defined) > 1 else None


def _comparison(
    study: Study, run: str, baseline: str, samples: dict[str, Samples], measured: dict[str, Measurement]
) -> dict[str, Any]:
    difference = samples[run].minus(samples[baseline])
    f1 = difference.draws[f"{_AGAIN}.pooled.f1"]
    criteria = []
    for one, name in enumerate(study.criterion_ids):
        each = number(difference, f"{_FIXED}.criteria.f1", (one,))
        p = p_value(difference.draws[f"{_FIXED}.criteria.f1"][one]) if each["value"] is not None else None
        matched = int(study.labels[study.criterion == one].sum())
        criteria.append({"criterion": name, "matched": matched, "f1": each, "p": p, "p_holm": None})
    labels = {metric: f"{_FIXED}.criteria.{metric}" for metric in LABEL_METRICS}
    scores = {metric: f"scores.criteria.{metric}" for metric in SCORE_METRICS}
    return {
        "run": run,
        "baseline": baseline,
        "p": p_value(f1),
        "p_holm": None,
        "detectable": detectable(f1),
        "pooled": _pooled(difference),
        "fold_mean": {
            **{m: fold_mean(difference, f"{_FIXED}.folds.{m}", f"{_AGAIN}.folds.{m}") for m in LABEL_METRICS},
            **{m: fold_mean(difference, f"scores.folds.{m}") for m in SCORE_METRICS},
        },
        "criterion_macro": {metric: criterion_macro(difference, name) for metric, name in (labels | scores).items()},
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


def _conclude(row: dict[str, Any]) -> None:
    """Adds the sentence and whether a difference is shown."""
    value, ends = row["pooled"]["f1"]["value"], row["pooled"]["f1"]["reselected"]
    run, baseline = row["run"], row["baseline"]
    apart = ends["low"] is not None and (ends["low"] > 0 or ends["high"] < 0)
    row["shown"] = apart and row["p_holm"] is not None and row["p_holm"] <= 1 - LEVEL
    row["better"] = bool(row["shown"] and value > 0)
    if value is None or ends["low"] is None:
        row["sentence"] = f"The difference in F1 between {run} and {baseline} is undefined."
    elif not row["shown"]:
        row["sentence"] = (
            f"No difference in F1 between {run} and {baseline} is shown: {said(value, ends)}. "
            f"These data show a difference of {row['detectable']:.3f} four times out of five."
        )
    else:
        turned = ends if value > 0 else {**ends, "low": -ends["high"], "high": -ends["low"]}
        word = "better" if value > 0 else "worse"
        row["sentence"] = f"{run} is {word} than {baseline} in F1 by {said(abs(value), turned)}."
