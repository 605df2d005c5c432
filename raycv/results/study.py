"""Reads a run folder into the arrays that its statistics are computed from."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raycv.data.splits import Split
from raycv.data.types import Dataset
from raycv.errors import UserError
from raycv.evaluation.study import Study
from raycv.results.find_run import folds_of
from raycv.results.fold_result import FoldResult
from raycv.results.near_duplicates import near_duplicates
from raycv.results.pair_records import TFIDF, floor_scores, hard_negatives
from raycv.results.run_folder import GOOD_COPY, RunFolder, read_record, resume_command

if TYPE_CHECKING:
    import pandas as pd

IDS = ["post_id", "criterion_id"]
TFIDF_FLOOR = "tfidf_logistic_regression"
"""The name of the classical floor in a study."""


def load_study(folder: RunFolder, dataset: Dataset | None = None) -> Study:
    """Reads the out-of-fold predictions of a finished run, and what it recorded beside them.

    Args:
        folder: The run folder.
        dataset: The data set of the run. It fills floors, hard negatives and near-duplicates that the run, of an
            earlier version, did not record. The other fields stay None.

    Returns:
        The rows of fold 0, then those of fold 1 and so on, each in the order of its predictions.

    Raises:
        UserError: A fold is not finished, a file is missing or damaged, or `dataset` is not that of the run.
    """
    folds = range(folds_of(folder.config))
    finished = folder.finished(len(folds))
    if missing := [str(fold) for fold in folds if fold not in finished]:
        raise UserError(
            f"Run {folder.root.name} has no result of fold {', '.join(missing)}, and a report needs every fold.",
            kind="run-failed",
            remedies=[f"finish it: {resume_command(folder)}"],
        )
    if dataset is not None:
        check_data(folder, dataset)
    results = [FoldResult.of(folder, fold) for fold in folds]
    restarts = [result.restarts for result in results]
    tables = [_table(folder.fold(fold).predictions, ["label", "score"]) for fold in folds]
    rows = _joined(tables)
    facts = _facts(folder, rows) if folder.pairs.is_file() else {}
    if dataset is not None:
        facts = _computed(dataset, rows, facts)
    return Study(
        run=folder.root.name,
        labels=rows["label"].to_numpy(np.int8),
        scores=rows["score"].to_numpy(float),
        fold=rows["fold"].to_numpy(int),
        post=rows["post_id"].cat.codes.to_numpy(int),
        criterion=rows["criterion_id"].cat.codes.to_numpy(int),
        post_ids=list(rows["post_id"].cat.categories),
        criterion_ids=list(rows["criterion_id"].cat.categories),
        history=[result.history for result in results],
        epoch_scores=_epoch_scores(folder, [len(table) for table in tables]),
        # The prior follows from labels and folds, so `raycv.evaluation` computes it without a record.
        floor_scores={TFIDF_FLOOR: facts[TFIDF]} if TFIDF in facts else {},
        shortened=facts.get("shortened"),
        hard_negative=facts.get("hard_negative"),
        near_duplicates=_near_duplicates(folder, dataset),
        events=[result.events for result in results],
        retries=None if None in restarts else [len(whys or ()) for whys in restarts],
    )


def check_data(folder: RunFolder, dataset: Dataset) -> None:
    """Raises: UserError if `dataset` is not the one that the run was trained on."""
    then, now = read_record(folder.data_stats, "data_hash")["data_hash"], dataset.stats["data_hash"]
    if then != now:
        raise UserError(
            f"The data set is not that of run {folder.root.name}: its hash is {now[:12]}, the run has {then[:12]}.",
            kind="resume-differs",
            remedies=["give the data that the run was trained on: data.dir=<folder>", "or leave out data.dir"],
        )


def _table(path: Path, numbers: Sequence[str]) -> "pd.DataFrame":
    """Reads a table with ids and columns of numbers. An empty cell is NaN.

    Raises:
        UserError: The file cannot be read, lacks a column, or has a cell that is not a number.
    """
    import pandas as pd

    try:
        # An id may be `NA`, and the usual parser of floats is off by a last bit.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, usecols=[*IDS, *numbers])
        columns = {name: table[name].replace("", "nan").astype(float) for name in numbers}
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}.", kind="run-damaged", remedies=[GOOD_COPY]
        ) from error
    except ValueError as error:
        what = f"{path} is damaged: it is not a table of {', '.join([*IDS, *numbers])}."
        raise UserError(what, kind="run-damaged", remedies=[GOOD_COPY]) from error
    return table.assign(**columns)


def _joined(tables: Sequence["pd.DataFrame"]) -> "pd.DataFrame":
    """The rows of all folds, with their fold and ids as categories in the order of plain strings."""
    import pandas as pd

    rows = pd.concat(tables, keys=range(len(tables)), names=["fold"]).reset_index("fold").reset_index(drop=True)
    return rows.astype(dict.fromkeys(IDS, "category"))


def _facts(folder: RunFolder, rows: "pd.DataFrame") -> dict[str, Any]:
    """The columns of `pairs.csv` in the order of `rows`. A column without a value is left out.

    Raises:
        UserError: The file is damaged, or holds other pairs than the predictions.
    """
    names = ["fold", "label", "shortened", "hard_negative", TFIDF]
    table = _table(folder.pairs, names).set_index(IDS)
    keys = list(zip(rows["post_id"], rows["criterion_id"], strict=True))
    same = len(table) == len(keys) and table.index.is_unique and set(keys) == set(table.index)
    table = table.loc[keys] if same else table
    if not same or not np.array_equal(table[["fold", "label"]].to_numpy(), rows[["fold", "label"]].to_numpy()):
        raise UserError(
            f"{folder.pairs} is damaged: its pairs are not those of the folds.",
            kind="run-damaged",
            remedies=[GOOD_COPY],
        )
    facts = {name: table[name].to_numpy() for name in names[2:] if not table[name].isna().any()}
    return {name: values == 1 if name in ("shortened", "hard_negative") else values for name, values in facts.items()}


def _computed(dataset: Dataset, rows: "pd.DataFrame", facts: dict[str, Any]) -> dict[str, Any]:
    """`facts`, and from the data set those that lack there, in the order of `rows`."""
    position = {(pair.post_id, pair.criterion_id): index for index, pair in enumerate(dataset.pairs)}
    pair = np.array([position[key] for key in zip(rows["post_id"], rows["criterion_id"], strict=True)])
    hard = hard_negatives(dataset)
    computed = {} if hard is None else {"hard_negative": np.array(hard, dtype=bool)[pair]}
    if TFIDF not in facts:
        parts = {fold: np.sort(pair[rows["fold"] == fold]) for fold in sorted(set(rows["fold"]))}
        every = np.arange(len(pair))
        splits = [Split(fold, np.setdiff1d(every, val), val) for fold, val in parts.items()]
        computed[TFIDF] = floor_scores(dataset, splits)[1][pair]
    return computed | facts


def _epoch_scores(folder: RunFolder, pairs: Sequence[int]) -> list[np.ndarray] | None:
    """The scores after each epoch, by fold; None if a fold has none. `pairs`: the number of pairs of each fold."""
    files = [folder.fold(fold).epoch_scores for fold in range(len(pairs))]
    if not all(file.is_file() for file in files):
        return None
    scores = []
    for file, count in zip(files, pairs, strict=True):
        try:
            scores.append(np.load(file, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{file} is damaged: it is not an array.", kind="run-damaged", remedies=[GOOD_COPY]
            ) from error
        if scores[-1].ndim != 2 or scores[-1].shape[1] != count:
            what = f"{file} is damaged: its shape is {scores[-1].shape}, and the fold has {count} pairs."
            raise UserError(what, kind="run-damaged", remedies=[GOOD_COPY])
    return scores


def _near_duplicates(folder: RunFolder, dataset: Dataset | None) -> list[tuple[str, str]] | None:
    import pandas as pd

    if folder.near_duplicates.is_file():
        names = ["post_id_a", "post_id_b"]
        try:
            table = pd.read_csv(folder.near_duplicates, dtype=str, keep_default_na=False, usecols=names)
        except (OSError, ValueError) as error:
            what = f"{folder.near_duplicates} is damaged: it is not a table of {', '.join(names)}."
            raise UserError(what, kind="run-damaged", remedies=[GOOD_COPY]) from error
        return list(table[names].itertuples(index=False, name=None))
    return None if dataset is None else [(first, second) for first, second, _ in near_duplicates(dataset.posts)]
