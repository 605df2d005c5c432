"""Writes `pairs.csv` and `near_duplicates.csv`, which a report needs beside the predictions. They hold no text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raycv.common.files import write_bytes
from raycv.data.splits import Split
from raycv.data.types import Dataset
from raycv.results.floors import floor_scores
from raycv.results.near_duplicates import near_duplicates
from raycv.results.run_folder import RunFolder

if TYPE_CHECKING:
    import numpy as np

PRIOR, TFIDF = "prior", "tfidf"
"""The floors, by their columns in `pairs.csv`."""


def write_pair_records(
    folder: RunFolder, dataset: Dataset, splits: Sequence[Split], shortened: "np.ndarray | None"
) -> None:
    """Writes those of the two files that the run lacks. Only the user can read them.

    Args:
        folder: The run folder.
        dataset: The data set of the run.
        splits: The folds of the run.
        shortened: bool [P], as `EncodedPairs.shortened`; None leaves the column empty.

    Raises:
        UserError: The disk is full.
        OSError: A file cannot be written for another reason.
    """
    import pandas as pd

    if not folder.near_duplicates.is_file():
        found = near_duplicates(dataset.posts)
        _write(folder.near_duplicates, pd.DataFrame(found, columns=["post_id_a", "post_id_b", "jaccard"]))
    if not folder.pairs.is_file():
        prior, tfidf = floor_scores(dataset, splits)
        columns = {
            "post_id": [pair.post_id for pair in dataset.pairs],
            "criterion_id": [pair.criterion_id for pair in dataset.pairs],
            "fold": fold_of_pair(splits, len(dataset.pairs)),
            "label": [pair.label for pair in dataset.pairs],
            "shortened": None if shortened is None else shortened.astype(int),
            "hard_negative": hard_negatives(dataset),
            PRIOR: prior,
            TFIDF: tfidf,
        }
        _write(folder.pairs, pd.DataFrame(columns))


def fold_of_pair(splits: Sequence[Split], pairs: int) -> "np.ndarray":
    """Returns the fold that validates each pair, int64 [P]."""
    import numpy as np

    folds = np.full(pairs, -1)
    for split in splits:
        folds[split.val_indices] = split.fold
    return folds


def hard_negatives(dataset: Dataset) -> list[int] | None:
    """Returns 1 for each pair that an annotator looked at and found unmatched, else 0.

    Returns None if the files cannot tell: only those of the ReDSM5 release hold it.
    """
    if dataset.stats.get("layout") != "official":
        return None
    return [int(pair.explicit_negative) for pair in dataset.pairs]


def _write(path: Any, table: Any) -> None:
    write_bytes(path, table.to_csv(index=False, lineterminator="\n").encode(), private=True)
