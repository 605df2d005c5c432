"""Compares folds that two runs trained: whether they came to the same, and what the runs recorded differently."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from raycv.common.files import sha256_of
from raycv.errors import UserError
from raycv.results.find_run import folds_of, recorded_config
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import RunFolder, read_record, resume_command
from raycv.training.metrics import F1

if TYPE_CHECKING:
    import numpy as np

NOT_RECORDED = "not recorded"
TOLERANCE = 0.005
"""The change of a fold's F1 that SC-003 allows."""
INPUTS = ("input", "setting")
"""The kinds of differences that make a run another experiment."""
BIT_FOR_BIT, WITHIN, DIFFERENT = "bit for bit", "within tolerance", "different"
_NO_NUMBER = ("seconds", "micro_batch")
"""Values of an epoch that do not count as results."""
_PLACES = ("run.", "tracking.", "data.dir", "data.criteria_dir", "resources.", "resume", "cv.only", "cv.max_concurrent")
"""Keys that name places or resources. `worker` of a fold's result has what these come to."""


def finished_result(folder: RunFolder, fold: int) -> FoldResult:
    """The result of a finished fold. Raises: UserError if it is not finished, or its files are damaged."""
    if not folder.fold(fold).result.is_file():
        raise UserError(
            f"Run {folder.root.name} has no finished fold {fold}.",
            kind="run-missing",
            remedies=_remedies_of_missing_fold(folder),
        )
    return FoldResult.of(folder, fold)


def _remedies_of_missing_fold(folder: RunFolder) -> list[str]:
    folds = folds_of(folder.config)
    finished = folder.finished(folds)
    named = [f"name finished folds: folds=[{','.join(map(str, finished))}]"] if finished else []
    return [*named, *([] if len(finished) == folds else [f"or finish the run: {resume_command(folder)}"])]


def compare_folds(original: RunFolder, again: RunFolder, folds: Sequence[int]) -> dict[str, Any]:
    """Compares folds that two runs trained.

    Returns:
        The content of `reproduction.json`: `run` and `again` (names), `result` (of all folds), `tolerance`, `folds`
        (a dict each, see `_compared`), and `differences` (dicts of `kind`, `name`, `then`, `now`).

    Raises:
        UserError: A fold is not finished, it holds other pairs, or a record is damaged.
    """
    pairs = [(finished_result(original, fold), finished_result(again, fold)) for fold in sorted(folds)]
    rows = [_compared(original, again, *pair) for pair in pairs]
    order = (BIT_FOR_BIT, WITHIN, DIFFERENT)
    return {
        "run": original.root.name,
        "again": again.root.name,
        "result": max((row["result"] for row in rows), key=order.index),
        "tolerance": TOLERANCE,
        "folds": rows,
        "differences": _differences(original, again, pairs),
    }


def _compared(original: RunFolder, again: RunFolder, then: FoldResult, now: FoldResult) -> dict[str, Any]:
    """Compares a fold: its F1, epochs, and which records are equal bit for bit (None: one run did not record it)."""
    one, other = original.fold(then.fold), again.fold(now.fold)
    epochs = [[_numbers(epoch) for epoch in result.history] for result in (then, now)]
    equal = {
        "predictions": sha256_of(one.predictions) == sha256_of(other.predictions),
        "epochs": epochs[0] == epochs[1] and (then.best_epoch, then.threshold) == (now.best_epoch, now.threshold),
        "epoch_scores": _same_file(one.epoch_scores, other.epoch_scores),
    }
    apart = next((at + 1 for at, (a, b) in enumerate(itertools.zip_longest(*epochs)) if a != b), None)
    change = now.metrics[F1] - then.metrics[F1]
    if all(same is not False for same in equal.values()):
        result = BIT_FOR_BIT
    else:
        result = WITHIN if abs(change) < TOLERANCE else DIFFERENT
    return {
        "fold": then.fold,
        "result": result,
        "f1": {"then": then.metrics[F1], "now": now.metrics[F1], "change": change},
        "best_epoch": {"then": then.best_epoch, "now": now.best_epoch},
        "epochs": {"then": then.epochs, "now": now.epochs},
        "equal": equal,
        "first_epoch_that_differs": apart,
        "largest_score_difference": _largest_difference(one.predictions, other.predictions, then.fold),
    }


def _numbers(epoch: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in epoch.items() if key not in _NO_NUMBER}


def _same_file(one: Path, other: Path) -> bool | None:
    return sha256_of(one) == sha256_of(other) if one.is_file() and other.is_file() else None


def _largest_difference(one: Path, other: Path, fold: int) -> float:
    """The largest difference of two scores of a pair. Raises: UserError if the files hold other pairs or labels."""
    import numpy as np

    (pairs, scores), (others, other_scores) = _scores(one), _scores(other)
    if pairs != others:
        raise UserError(
            f"Fold {fold} of the two runs holds other pairs or labels, so it is not the same fold.",
            kind="runs-differ",
            remedies=["name a run that trained the same data with the same folds: trained=<name>"],
        )
    return float(np.abs(scores - other_scores).max(initial=0.0))


def _scores(path: Path) -> "tuple[list[tuple[str, ...]], np.ndarray]":
    import pandas as pd

    # The usual parser of floats is off by a last bit, and an id may be `NA`.
    table = pd.read_csv(path, dtype=str, keep_default_na=False, usecols=["post_id", "criterion_id", "label", "score"])
    ids = list(table[["post_id", "criterion_id", "label"]].itertuples(index=False, name=None))
    return ids, table["score"].astype(float).to_numpy()


def _differences(
    original: RunFolder, again: RunFolder, results: Sequence[tuple[FoldResult, FoldResult]]
) -> list[dict[str, Any]]:
    """Returns what two runs recorded differently: input, settings, source, versions, hardware, training."""
    sides = [_facts(folder, [pair[at] for pair in results]) for at, folder in enumerate((original, again))]
    rows = []
    for kind, name in dict.fromkeys([*sides[0], *sides[1]]):
        then, now = (side.get((kind, name), NOT_RECORDED) for side in sides)
        # Changes that are not committed may differ under the same name.
        if then != now or (kind == "source" and "with changes" in str(then)):
            rows.append({"kind": kind, "name": name, "then": then, "now": now})
    return rows


def _facts(folder: RunFolder, results: Sequence[FoldResult]) -> dict[tuple[str, str], Any]:
    """Returns what can make numbers differ, by kind and name. Values of several processes of the run are joined."""
    stats, environment = read_record(folder.data_stats), read_record(folder.environment)
    facts: dict[tuple[str, str], Any] = {("input", key): stats.get(key) for key in ("data_hash", "criteria_hash")}
    facts["input", "splits.json"] = sha256_of(folder.splits) if folder.splits.is_file() else None
    base = environment.get("base_model") or {}
    facts |= {("input", f"base model, {name}"): sum_ for name, sum_ in (base.get("sha256") or {}).items()}
    for section, keys in recorded_config(folder).model_dump().items():
        for key, value in keys.items() if isinstance(keys, dict) else ():
            # The files of the base count, not its name.
            if not f"{section}.{key}".startswith((*_PLACES, "model.name", "model.revision")):
                facts["setting", f"{section}.{key}"] = value
    processes = [environment, *environment.get("resumed", [])]
    facts["source", "commit of raycv"] = _joined(_commit(one.get("git")) for one in processes)
    facts["source", "number of the arithmetic"] = _joined(one.get("numerics") for one in processes)
    for name in dict.fromkeys(name for one in processes for name in one["packages"]):
        facts["version", name] = _joined(one["packages"].get(name) for one in processes)
    facts["version", "Python"] = _joined(one.get("python") for one in processes)
    for key in ("platform", "processor", "cpus"):
        facts["hardware", key] = _joined(one.get(key) for one in processes)
    for result in results:
        how = {key: result.worker.get(key, NOT_RECORDED) for key in ("device", "precision", "attention", "workers")}
        facts |= {("hardware", f"fold {result.fold}, {key}"): value for key, value in how.items()}
        batches = dict.fromkeys(epoch.get("micro_batch") for epoch in result.history)
        facts["hardware", f"fold {result.fold}, micro-batch"] = _joined(batches)
        facts["hardware", f"fold {result.fold}, out-of-memory events"] = result.out_of_memory()
        facts["hardware", f"fold {result.fold}, restarts"] = (
            NOT_RECORDED if result.restarts is None else len(result.restarts)
        )
    return facts


def _joined(values: Any) -> str:
    return " and ".join(dict.fromkeys(NOT_RECORDED if value is None else str(value) for value in values))


def _commit(git: Mapping[str, Any] | None) -> str:
    if not git:
        return NOT_RECORDED
    return f"{git.get('commit')}{', with changes that are not committed' if git.get('dirty') else ''}"


def reproduction_table(found: Mapping[str, Any]) -> Table:
    """A row per fold, and below it what the two runs recorded otherwise."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, title_justify="left", caption_justify="left")
    table.title = Text(f"{found['run']}, reproduced as {found['again']}: {found['result']}", "bold")
    for name in ("fold", "result", "F1 then", "F1 now", "change", "best epoch", "largest change of a score"):
        table.add_column(name, justify="left" if name == "result" else "right")
    for row in found["folds"]:
        f1, best, moved = row["f1"], row["best_epoch"], row["largest_score_difference"]
        epochs = str(best["then"]) if best["then"] == best["now"] else f"{best['then']} -> {best['now']}"
        numbers = [f"{f1['then']:.4f}", f"{f1['now']:.4f}", f"{f1['change']:+.4f}", epochs]
        table.add_row(str(row["fold"]), row["result"], *numbers, f"{moved:.1e}" if moved else "0")
    differences = [
        f"{one['kind']}: {one['name']}: {one['then']} then, {one['now']} now" for one in found["differences"]
    ]
    said = differences or ["Versions, hardware, source and settings are those of the original."]
    table.caption = Text("\n".join(said), "dim")
    return table
