"""Checks with codes: what a referee would object to, why it matters, what to do about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raycv.errors import counted
from raycv.evaluation.bootstrap import interval, resample
from raycv.evaluation.floors_and_slices import FLOOR_NAMES
from raycv.evaluation.measures import LabelCounts, label_metrics, measure
from raycv.evaluation.operating_points import epochs_of
from raycv.evaluation.study import Study
from raycv.training.metrics import METRICS, collapse_reasons

SERIOUS, NOTICE = "serious", "notice"
FOUND, CLEAR, NOT_RECORDED = "found", "clear", "not recorded"
FAR_APART = 0.2
"""Between the lowest and the highest threshold of the folds."""
MOST_LOSS = 0.05
"""F1 that a fold loses at the pooled threshold."""
SUSPICIOUS_F1 = 0.8
"""Published figures on ReDSM5 stay near 0.61."""
F1_GAP, AUC_GAP = 0.05, 0.02
"""Between the pooled value and the fold mean."""


@dataclass(frozen=True)
class Check:
    """A check: its texts, and the function that looks."""

    code: str
    title: str
    severity: str
    why: str
    remedy: str
    look: Callable[[Study, Mapping[str, Any], int, int], tuple[str, dict[str, Any]] | None]
    """takes study, facts, draws, seed; returns the finding (empty if clear) and its numbers, None if not recorded"""


def run_checks(study: Study, facts: Mapping[str, Any], draws: int, seed: int) -> list[dict[str, Any]]:
    """Returns every check in the order of its code, also those that are clear or that the run recorded nothing for.

    Args:
        study: The run.
        facts: Parts of the evaluation: `thresholds` by fold, `pooled_threshold`, `f1` and `roc_auc` (pooled and fold
            mean), `floor_difference`, `best_floor`, `fold_metrics`.
        draws: The bootstrap draws of the checks that need them.
        seed: Their seed.
    """
    rows = []
    for check in CHECKS:
        seen = check.look(study, facts, draws, seed)
        finding, numbers = seen if seen is not None else ("The run did not record what this check needs.", {})
        rows.append(
            {
                "code": check.code,
                "title": check.title,
                "status": NOT_RECORDED if seen is None else FOUND if finding else CLEAR,
                "severity": check.severity,
                "finding": finding or "Nothing found.",
                "numbers": numbers,
                "why": check.why,
                "remedy": check.remedy,
            }
        )
    return rows


def _missing_positives(study: Study, facts: Mapping[str, Any], draws: int, seed: int) -> tuple[str, dict[str, Any]]:
    criteria = len(study.criterion_ids)
    cell = study.fold * criteria + study.criterion
    matched = np.bincount(cell, study.labels, study.folds * criteria).reshape(study.folds, criteria)
    missing = [[int(fold), study.criterion_ids[one]] for fold, one in np.argwhere(matched == 0)]
    named = ", ".join(f"fold {fold}: {name}" for fold, name in missing[:5]) + (", ..." if len(missing) > 5 else "")
    finding = f"{len(missing)} of {matched.size} cells of fold and criterion have no matched pair ({named})."
    return finding if missing else "", {"cells": len(missing), "of": int(matched.size), "missing": missing}


def _thresholds(study: Study, facts: Mapping[str, Any], draws: int, seed: int) -> tuple[str, dict[str, Any]]:
    low, high, deployed = min(facts["thresholds"]), max(facts["thresholds"]), facts["pooled_threshold"]
    losses = []
    for fold, metrics in enumerate(facts["fold_metrics"]):
        rows = study.fold == fold
        f1 = measure(study.labels[rows], study.scores[rows], study.scores[rows] >= deployed)["f1"]
        losses.append(0.0 if metrics["f1"] is None else metrics["f1"] - f1)
    worst = int(np.argmax(losses))
    finding = (
        f"The thresholds that folds tuned for themselves lie between {low:.2f} and {high:.2f}. At the threshold to "
        f"deploy, {deployed:.2f}, fold {worst} loses {losses[worst]:.3f} F1."
    )
    numbers = {"lowest": low, "highest": high, "deployed": deployed, "losses": losses}
    # Small folds tune to noise: thresholds far apart cost little then, so a fold must also lose F1.
    return finding if high - low > FAR_APART + 1e-9 and losses[worst] > MOST_LOSS else "", numbers


def _collapse(study: Study, facts: Mapping[str, Any], draws: int, seed: int) -> tuple[str, dict[str, Any]]:
    reasons: dict[str, list[str]] = {}
    for fold, metrics in enumerate(facts["fold_metrics"]):
        rows = study.fold == fold
        labels, scores = study.labels[rows], study.scores[rows]
        # Precision is undefined if no pair is called matched, and the rules do not use it.
        if all(metrics[name] is not None for name in METRICS if name != "precision"):
            found = collapse_reasons(metrics, int(labels.sum()), len(labels), scores, labels)
            reasons |= {str(fold): found} if found else {}
    finding = "; ".join(f"fold {fold}: {', '.join(found)}" for fold, found in reasons.items())
    return f"{len(reasons)} of {study.folds} folds collapsed. {finding}." if reasons else "", {"reasons": reasons}


def _at_a_floor(study: Study, facts: Mapping[str, Any], draws: int, seed: int) -> tuple[str, dict[str, Any]]:
    difference, floor_name = facts["floor_difference"], FLOOR_NAMES.get(facts["best_floor"], facts["best_floor"])
    low, high = difference["reselected"]["low"], difference["reselected"]["high"]
    numbers = {"floor": facts["best_floor"], "difference": difference["value"], "low": low, "high": high}
    if difference["value"] is None or low is None:
        return f"The difference to the best floor ({floor_name}) has no interval.", numbers
    finding = (
        f"F1 differs from the best floor ({floor_name}) by {difference['value']:+.3f} ({low:+.3f} to {high:+.3f})."
    )
    return finding if low <= 0 else "", numbers


def _near_duplicates(
    study: Study, facts: Mapping[str, Any], draws: int, seed: int
) -> tuple[str, dict[str, Any]] | None:
    if study.near_duplicates is None:
        return None
    fold_of = {study.post_ids[post]: int(fold) for post, fold in zip(study.post, study.fold, strict=True)}
    known = [(one, other) for one, other in study.near_duplicates if one in fold_of and other in fold_of]
    across = sorted((one, other) for one, other in known if fold_of[one] != fold_of[other])
    posts = len({post for pair in across for post in pair})
    finding = f"Nearly equal posts lie in different folds: {counted(len(across), 'pair')} of {posts} posts."
    numbers = {"pairs": len(across), "posts": posts, "within_folds": len(known) - len(across)}
    return finding if across else "", numbers


def _truncation(study: Study, facts: Mapping[str, Any], draws: int, seed: int) -> tuple[str, dict[str, Any]] | None:
    if study.shortened is None:
        return None
    one = np.zeros(len(study.labels), dtype=int)
    counts = LabelCounts(study.labels, study.shortened, one, 1, study.post, len(study.post_ids))

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        # We take shortening as a label. Its recall is the share of matched pairs, and 1 - specificity that of others.
        shares = label_metrics(counts(weights).summed())
        matched, unmatched = shares["recall"], 1 - shares["specificity"]
        return {"matched": matched, "unmatched": unmatched, "difference": matched - unmatched}

    samples = resample(statistic, len(study.post_ids), len(study.labels), draws=draws, seed=seed)
    matched, unmatched = float(samples.estimate["matched"]), float(samples.estimate["unmatched"])
    ends = interval(samples.draws["difference"])
    finding = (
        f"{matched:.1%} of the matched pairs have a shortened post, and {unmatched:.1%} of the unmatched ones "
        f"(difference {100 * ends['low']:+.1f} to {100 * ends['high']:+.1f} points)."
        if ends["low"] is not None and ends["low"] > 0
        else ""
    )
    return finding, {"matched": _or_none(matched), "unmatched": _or_none(unmatched), "difference": ends}


def _suspicious(study: Study, facts: Mapping[str, Any], draws: int, seed: int) -> tuple[str, dict[str, Any]]:
    f1 = facts["f1"]["pooled"]
    finding = f"F1 is {f1 or 0:.3f}, above {SUSPICIOUS_F1}."
    return finding if f1 is not None and f1 > SUSPICIOUS_F1 else "", {"f1": f1, "limit": SUSPICIOUS_F1}


def _gap(study: Study, facts: Mapping[str, Any], draws: int, seed: int) -> tuple[str, dict[str, Any]]:
    wide, numbers = [], {}
    for metric, limit in (("f1", F1_GAP), ("roc_auc", AUC_GAP)):
        pooled, mean = facts[metric]["pooled"], facts[metric]["fold_mean"]
        numbers[metric] = {"pooled": pooled, "fold_mean": mean, "limit": limit}
        if pooled is not None and mean is not None and abs(pooled - mean) > limit:
            wide.append(f"{metric} is {pooled:.3f} pooled and {mean:.3f} as the mean of the folds")
    return f"{'; '.join(wide)}." if wide else "", numbers


def _last_epoch(study: Study, facts: Mapping[str, Any], draws: int, seed: int) -> tuple[str, dict[str, Any]] | None:
    if (epochs := epochs_of(study)) is None:
        return None
    lengths = [len(values) for values in epochs.f1]
    late = [fold for fold, (best, length) in enumerate(zip(epochs.own, lengths, strict=True)) if best == length - 1]
    named = ", ".join(map(str, late))
    finding = f"The best epoch of {len(late)} of {study.folds} folds is their last one (fold {named})."
    return finding if late else "", {"folds": late, "best": [one + 1 for one in epochs.own], "epochs": lengths}


def _uneven(study: Study, facts: Mapping[str, Any], draws: int, seed: int) -> tuple[str, dict[str, Any]] | None:
    if study.events is None and study.retries is None:
        return None
    full = [sum("out of memory" in event for event in events) for events in study.events or [()] * study.folds]
    retries = list(study.retries or [0] * study.folds)
    finding = (
        f"The folds differ: restarts by fold {', '.join(map(str, retries))}; "
        f"out-of-memory events by fold {', '.join(map(str, full))}."
    )
    differ = len(set(retries)) > 1 or len(set(full)) > 1
    return finding if differ else "", {"retries": study.retries and retries, "out_of_memory": study.events and full}


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


CHECKS: Sequence[Check] = (
    Check(
        "RCV001", "a fold without matched pairs of a criterion", NOTICE,
        "Recall, F1 and ROC-AUC of that criterion are undefined in that fold, so they rest on fewer folds.",
        "Use fewer folds, collect more matched pairs, or report the criterion pooled only.", _missing_positives,
    ),
    Check(
        "RCV002", "thresholds far apart", NOTICE,
        "The fold models give scores of different scale, so one deployed threshold fits some of them badly.",
        "Report the cross-fold numbers. Train longer, or calibrate the scores before you deploy one threshold.",
        _thresholds,
    ),
    Check(
        "RCV003", "a fold collapsed", SERIOUS,
        "A collapsed fold tells nothing about its pairs, and it spoils every mean.",
        "Change train.lr, train.imbalance or cv.seed, and train again.", _collapse,
    ),
    Check(
        "RCV004", "F1 at a floor", SERIOUS,
        "A simple answer without a language model may be as good on these data.",
        "Train longer, use a larger model, or use the simple answer.", _at_a_floor,
    ),
    Check(
        "RCV005", "nearly equal posts in different folds", SERIOUS,
        "A model may remember a post instead of reading its copy, so scores are flattered.",
        "Remove the copies, or give them one post_id so that they share a fold.", _near_duplicates,
    ),
    Check(
        "RCV006", "shortening hits matched pairs more", NOTICE,
        "The evidence may lie in the part that the model did not see.",
        "Raise prompt.max_length, and compare shortened with whole posts in the slices.", _truncation,
    ),
    Check(
        "RCV007", "pooled value and fold mean far apart", NOTICE,
        "Fold models may be calibrated differently, or one fold differs from the others. One number hides that.",
        "Report both numbers, and look at the table of folds.", _gap,
    ),
    Check(
        "RCV008", "F1 suspiciously high", SERIOUS,
        "Published figures on this task stay far lower, so this smells of leakage. Synthetic data are an exception.",
        "Look for copies of posts, labels in the text, and pairs of one post in several folds.", _suspicious,
    ),
    Check(
        "RCV009", "best epoch is the last one", NOTICE,
        "F1 may still have been rising when training stopped.",
        "Raise train.epochs.", _last_epoch,
    ),
    Check(
        "RCV010", "folds differ in restarts or out-of-memory events", NOTICE,
        "Such folds may have trained with another micro-batch or on another machine, so they differ from the others.",
        "Read fold_<k>/result.json, and run again with resources that suffice for every fold.", _uneven,
    ),
)  # fmt: skip
