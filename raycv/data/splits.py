"""Splits pairs into folds by the seed of the config. scikit-learn alone gives the same folds: the docs show how."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raycv.data.types import Dataset, Pair
from raycv.errors import FaultsError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Split:
    """One fold (the specification's CVSplit). Indices point into `Dataset.pairs`."""

    fold: int
    train_indices: "np.ndarray"
    """int64 [n_train], ascending."""
    val_indices: "np.ndarray"
    """int64 [n_val], ascending."""


def make_splits(pairs: Sequence[Pair], folds: int, seed: int) -> list[Split]:
    """Splits pairs by `StratifiedGroupKFold(shuffle=True)` with y=label and groups=post_id (FR-003).

    Args:
        pairs: The pairs of a data set in its order, sorted by (post_id, criterion_id) as strings. The folds depend on
            the order.
        folds: `n_splits`.
        seed: `random_state`.

    Raises:
        FaultsError: There are more folds than posts or than pairs of a class, or a part of a fold is empty or lacks a
            class.
    """
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    labels = np.array([pair.label for pair in pairs])
    groups = np.array([pair.post_id for pair in pairs])
    faults = _impossible(labels, groups, folds)
    if faults:
        raise FaultsError(
            "The data cannot be split", faults, kind="data-split", remedies=["lower cv.folds, or bring more posts"]
        )
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    splits = [
        Split(fold, np.sort(train), np.sort(val))
        for fold, (train, val) in enumerate(splitter.split(labels.reshape(-1, 1), labels, groups))
    ]
    faults = [fault for split in splits for fault in _unusable(split, labels)]
    if faults:
        raise FaultsError(
            f"The split into {folds} folds with cv.seed={seed} cannot be used",
            faults,
            kind="data-split",
            remedies=["lower cv.folds, try another cv.seed, or bring more posts"],
        )
    return splits


def _impossible(labels: "np.ndarray", groups: "np.ndarray", folds: int) -> list[str]:
    posts = len(set(groups.tolist()))
    faults = [f"cv.folds={folds} but there are only {posts} posts, and a post is never split"] if folds > posts else []
    for label, name in ((1, "matched"), (0, "unmatched")):
        count = int((labels == label).sum())
        if count < folds:
            faults.append(f"cv.folds={folds} but only {count} pairs are {name}: a fold would have none")
    return faults


def _unusable(split: Split, labels: "np.ndarray") -> list[str]:
    faults = []
    for part, indices in (("training", split.train_indices), ("validation", split.val_indices)):
        present = set(labels[indices].tolist())
        if not present:
            faults.append(f"fold {split.fold}: its {part} part is empty")
        elif present != {0, 1}:
            missing = "matched" if 1 not in present else "unmatched"
            faults.append(f"fold {split.fold}: its {part} part ({len(indices)} pairs) has no {missing} pair")
    return faults


def splits_record(dataset: Dataset, splits: Sequence[Split], seed: int) -> dict[str, Any]:
    """The content of `splits.json`: the rows once, and the indices of each fold into them."""
    return {
        "method": "sklearn.model_selection.StratifiedGroupKFold(shuffle=True), y=label, groups=post_id",
        "order": "rows sorted by (post_id, criterion_id) as strings",
        "n_splits": len(splits),
        "random_state": seed,
        "rows": [[pair.post_id, pair.criterion_id] for pair in dataset.pairs],
        "folds": [
            {"fold": s.fold, "train_indices": s.train_indices.tolist(), "val_indices": s.val_indices.tolist()}
            for s in splits
        ],
    }


def positives_table(dataset: Dataset, splits: Sequence[Split]) -> list[dict[str, Any]]:
    """Counts the matched pairs in the validation part of each fold, in total and per criterion; a row per fold.

    StratifiedGroupKFold stratifies on the binary label only, so rare criteria can be uneven over the folds. This table
    shows it.
    """
    table = []
    for split in splits:
        per_criterion = dict.fromkeys(dataset.criteria, 0)
        for index in split.val_indices.tolist():
            pair = dataset.pairs[index]
            per_criterion[pair.criterion_id] += pair.label
        matched = sum(per_criterion.values())
        numbers = {"fold": split.fold, "pairs": len(split.val_indices), "matched": matched}
        table.append({**numbers, "per_criterion": per_criterion})
    return table
