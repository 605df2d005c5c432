"""Summarises the results of folds for `report.json`: mean, deviation, best fold, warnings. No Ray, MLflow or torch."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from raycv.errors import RunFailedError
from raycv.results.fold_result import FoldResult
from raycv.training.metrics import F1, METRICS, ROC_AUC, THRESHOLD, all_matched_f1, collapsed_because

COLUMNS = (*METRICS, THRESHOLD)


def summarize(
    run: str,
    results: Sequence[FoldResult],
    folds: int,
    data_stats: Mapping[str, Any] | None = None,
    finish: str | None = None,
    finished: str | None = None,
) -> dict[str, Any]:
    """Returns the report of a run: each fold, mean and deviation over the folds, and the best fold.

    The deviation is the sample standard deviation (ddof=1).

    Args:
        run: The name of the run.
        results: The results of all folds, in any order.
        folds: The number of folds that the run was asked for.
        data_stats: The content of the run's `data_stats.json`, with its warnings and the mark of a control.
        finish: The command that finishes the run; None for the usual `resume=`.
        finished: The time when the run was complete; None if nobody recorded it.

    Raises:
        RunFailedError: A fold is missing or there is one too many. raycv never averages over fewer folds than asked
            for.
    """
    present = {result.fold for result in results}
    finish = finish or f"python -m raycv.run resume={run}"
    missing = [fold for fold in range(folds) if fold not in present]
    if missing:
        raise RunFailedError(
            f"Run {run}: {len(missing)} of {folds} folds are not finished (fold {', '.join(map(str, missing))}), "
            "and nothing is averaged over fewer folds than asked for.",
            kind="run-failed",
            remedies=[f"finish it: {finish} (fold_<k>/error.json says why a fold failed)"],
        )
    if len(results) != folds:
        raise RunFailedError(
            f"Run {run}: {len(results)} fold results for {folds} folds (a fold twice, or one too many).",
            kind="run-damaged",
        )
    stats = data_stats or {}
    ordered = sorted(results, key=lambda result: result.fold)
    values = {key: [_value(result, key) for result in ordered] for key in COLUMNS}
    pairs = sum(result.val_pairs for result in ordered)
    prevalence = sum(result.val_matched for result in ordered) / pairs
    unrecorded = [str(one.fold) for one in ordered if one.collapsed is None]
    marked = [replace(one, collapsed=one.collapse()) for one in ordered]
    collapsed = {one.fold: one.collapsed for one in marked if one.collapsed}
    warnings = list(stats.get("warnings", []))
    if unrecorded:
        warnings.append(
            f"fold {', '.join(unrecorded)}: an earlier version of raycv did not record whether the scores vary; "
            "its labels and its F1 were checked"
        )
    warnings += [f"fold {fold}: {collapsed_because(reasons)}" for fold, reasons in collapsed.items()]
    warnings += _mixed_attention(ordered)
    return {
        "run": run,
        "finished": finished,
        "control": bool(stats.get("labels_shuffled", False)),
        "folds": [asdict(result) for result in marked],
        "mean": {key: statistics.fmean(column) for key, column in values.items()},
        "std": {key: statistics.stdev(column) for key, column in values.items()},
        "std_kind": "sample standard deviation over the folds (ddof=1)",
        "best_fold": best_fold(ordered),
        "pairs": pairs,
        "prevalence": prevalence,
        "floors": {"all_matched_f1": all_matched_f1(prevalence), "all_unmatched_accuracy": 1 - prevalence},
        "threshold_note": "tuned on the fold that it is reported on, as specified: F1 is flattered a little",
        "collapsed_folds": list(collapsed),
        "warnings": warnings,
    }


def partial_summary(
    run: str, results: Sequence[FoldResult], folds: int, data_stats: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the finished folds of a run that lacks some, without mean and deviation.

    Args:
        run: The name of the run.
        results: The results of the finished folds.
        folds: The number of folds that the run was asked for.
        data_stats: The content of the run's `data_stats.json`.
    """
    ordered = sorted((replace(one, collapsed=one.collapse()) for one in results), key=lambda one: one.fold)
    return {
        "run": run,
        "control": bool(data_stats.get("labels_shuffled", False)),
        "folds": [asdict(one) for one in ordered],
        "missing_folds": sorted(set(range(folds)) - {one.fold for one in ordered}),
        "collapsed_folds": [one.fold for one in ordered if one.collapsed],
    }


def best_fold(results: Sequence[FoldResult]) -> int:
    """Returns the fold with the highest F1. Among equal ones the higher ROC-AUC decides, then the lower number."""
    return max(results, key=lambda result: (result.metrics[F1], result.metrics[ROC_AUC], -result.fold)).fold


def _mixed_attention(results: Sequence[FoldResult]) -> list[str]:
    """Returns a warning if the folds computed attention in different ways. They are then not of one model."""
    folds_of: dict[str, list[str]] = {}
    for result in results:
        folds_of.setdefault(result.worker.get("attention", "not recorded by an earlier version"), []).append(
            str(result.fold)
        )
    if len(folds_of) < 2:
        return []
    ways = "; ".join(f"fold {', '.join(folds)}: {attention}" for attention, folds in folds_of.items())
    return [f"the folds differ in the attention that they computed ({ways}), so their numbers may not be comparable"]


def _value(result: FoldResult, key: str) -> float:
    return result.threshold if key == THRESHOLD else result.metrics[key]
