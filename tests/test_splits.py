"""The folds: what scikit-learn gives, no post in two of them, and a refusal where a fold could not be scored."""

import csv
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold
from support.pages import python_blocks
from support.refusals import refuses

from raycv.data.dataset import load_dataset
from raycv.data.splits import Split, make_splits, positives_table, splits_record
from raycv.data.types import Criterion, Dataset, Pair
from raycv.errors import FaultsError


def grid(posts: int = 60, criteria: int = 9, rate: float = 0.12, seed: int = 0) -> list[Pair]:
    """Pairs of posts x criteria in the data set's order; about `rate` of them matched, the first of each post more."""
    draw = random.Random(seed)
    rows = [(f"p{post}", f"A.{criterion}") for post in range(posts) for criterion in range(1, criteria + 1)]
    return [Pair(p, c, int(draw.random() < rate * (2.5 if c == "A.1" else 1))) for p, c in sorted(rows)]


def dataset(pairs: list[Pair]) -> Dataset:
    criteria = sorted({pair.criterion_id for pair in pairs})
    return Dataset(
        posts={post: f"text of {post}" for post in sorted({pair.post_id for pair in pairs})},
        criteria={criterion: Criterion(criterion, f"text of {criterion}") for criterion in criteria},
        pairs=pairs,
    )


PAIRS = grid()


@pytest.mark.parametrize(("folds", "seed"), [(5, 42), (5, 0), (2, 42), (10, 7)])
def test_equals_scikit_learn(folds: int, seed: int) -> None:
    """The folds are scikit-learn's alone, row for row."""
    frame = pd.DataFrame([(pair.post_id, pair.criterion_id, pair.label) for pair in PAIRS])
    frame.columns = ["post_id", "criterion_id", "label"]
    frame = frame.sample(frac=1, random_state=3).sort_values(["post_id", "criterion_id"], ignore_index=True)
    cv = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    expected = list(cv.split(frame, frame["label"], groups=frame["post_id"]))

    splits = make_splits(PAIRS, folds, seed)

    assert [split.fold for split in splits] == list(range(folds))
    for split, (train, val) in zip(splits, expected, strict=True):
        assert [PAIRS[i].post_id for i in split.val_indices] == frame["post_id"][sorted(val)].tolist()
        np.testing.assert_array_equal(split.train_indices, sorted(train))
        np.testing.assert_array_equal(split.val_indices, sorted(val))
        assert split.train_indices.dtype == split.val_indices.dtype == np.int64


def test_the_docs_way_to_the_folds_works_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    (code,) = python_blocks("concepts/folds-and-thresholds.md")
    names: dict[str, Any] = {}
    exec(code, names)
    splits = make_splits(load_dataset(root / "data/sample", root / "data/sample").pairs, 5, 42)
    for split, (train, val) in zip(splits, names["folds"], strict=True):
        np.testing.assert_array_equal(split.train_indices, sorted(train))
        np.testing.assert_array_equal(split.val_indices, sorted(val))


def check_partition(pairs: list[Pair], splits: list[Split]) -> None:
    validated = Counter(int(i) for split in splits for i in split.val_indices)
    assert validated == Counter(range(len(pairs)))
    for split in splits:
        assert sorted([*split.train_indices, *split.val_indices]) == list(range(len(pairs)))
        assert (np.diff(split.val_indices) > 0).all()
        assert (np.diff(split.train_indices) > 0).all()
        parts = [{pairs[i].post_id for i in part} for part in (split.train_indices, split.val_indices)]
        assert not parts[0] & parts[1]
        for part in (split.train_indices, split.val_indices):
            assert {pairs[i].label for i in part} == {0, 1}


def test_no_post_is_in_two_folds_and_every_pair_is_validated_once() -> None:
    splits = make_splits(PAIRS, 5, 42)
    check_partition(PAIRS, splits)
    rates = [np.mean([PAIRS[i].label for i in split.val_indices]) for split in splits]
    assert max(rates) - min(rates) < 0.05
    assert all(abs(len(split.val_indices) - len(PAIRS) / 5) <= 9 for split in splits)


def test_the_seed_decides() -> None:
    def assignment(seed: int) -> list[list[int]]:
        return [split.val_indices.tolist() for split in make_splits(PAIRS, 5, seed)]

    assert assignment(42) == assignment(42)
    assert assignment(42) != assignment(43)


@given(
    posts=st.lists(st.lists(st.sampled_from([0, 0, 1]), min_size=1, max_size=6), min_size=1, max_size=25),
    folds=st.integers(2, 6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_any_data_is_split_well_or_refused(posts: list[list[int]], folds: int, seed: int) -> None:
    rows = [(f"p{post}", f"c{row}", label) for post, labels in enumerate(posts) for row, label in enumerate(labels)]
    pairs = [Pair(*row) for row in sorted(rows)]
    try:
        splits = make_splits(pairs, folds, seed)
    except FaultsError:
        return
    assert len(splits) == folds
    check_partition(pairs, splits)


def test_order_of_the_files_does_not_matter(tmp_path: Path) -> None:
    assignments = []
    for shuffle in (None, 1, 2):
        folder = tmp_path / str(shuffle)
        folder.mkdir()
        tables: dict[str, list[list[Any]]] = {
            "posts": [["post_id", "post"], *([post, f"text of {post}"] for post in dataset(PAIRS).posts)],
            "groundtruth": [["post_id", "criterion_id", "label"]],
            "criteria": [["criterion_id", "criterion"], *([f"A.{n}", f"criterion {n}"] for n in range(1, 10))],
        }
        tables["groundtruth"] += [[p.post_id, p.criterion_id, ("no", "yes")[p.label]] for p in PAIRS]
        for name, (header, *rows) in tables.items():
            if shuffle is not None:
                random.Random(shuffle).shuffle(rows)
            with (folder / f"{name}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([header, *rows])
        loaded = load_dataset(folder, folder)
        splits = make_splits(loaded.pairs, 5, 42)
        assignments.append([[loaded.pairs[i] for i in split.val_indices] for split in splits])
    assert assignments[0] == assignments[1] == assignments[2]
    assert assignments[0] == [[PAIRS[i] for i in split.val_indices] for split in make_splits(PAIRS, 5, 42)]


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_more_folds_than_posts_is_refused() -> None:
    with refuses("data-split", "1 fault", "cv.folds=5", "only 4 posts", "lower cv.folds"):
        make_splits(grid(posts=4, rate=0.4), 5, 42)


def test_fewer_pairs_of_a_class_than_folds_is_refused_with_all_faults() -> None:
    pairs = [Pair("p1", "A.1", 1), Pair("p2", "A.1", 0), Pair("p2", "A.2", 0), Pair("p3", "A.1", 0)]
    faults = ("only 3 posts", "only 1 pairs are matched", "only 3 pairs are unmatched")
    with refuses("data-split", "3 faults", "cv.folds=4", *faults, "lower cv.folds"):
        make_splits(pairs, 4, 42)
    with refuses("data-split", "cv.folds=5", "only 0 pairs are unmatched"):
        make_splits([Pair(f"p{n}", "A.1", 1) for n in range(5)], 5, 42)


def test_fold_without_a_class_is_refused() -> None:
    """Six matched pairs are enough for five folds to count, but five of them are of one post, which is never split."""
    pairs = [Pair(f"p{post}", f"A.{n}", int(post == 0 or (post == 1 and n == 1))) for post in range(5) for n in (1, 2)]
    pairs += [Pair("p0", f"A.{n}", 1) for n in range(3, 6)]
    with refuses("data-split", "5 folds", "cv.seed=42", "lower cv.folds, try another cv.seed") as caught:
        make_splits(sorted(pairs, key=lambda pair: (pair.post_id, pair.criterion_id)), 5, 42)
    faults = caught.value.faults
    without = [fault for fault in faults if "validation part (2 pairs) has no matched pair" in fault]
    assert len(without) == 3
    assert all(fault.startswith("fold ") for fault in faults)


class _Lopsided:
    """Gives an empty fold, as scikit-learn may where there are as many posts as folds (its issue 34828)."""

    def __init__(self, **_: Any) -> None:
        pass

    def split(self, rows: np.ndarray, *_: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        every = np.arange(len(rows))
        yield every, every[:0]
        yield every[:1], every[1:]


def test_empty_fold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sklearn.model_selection.StratifiedGroupKFold", _Lopsided)
    faults = ("fold 0: its validation part", "fold 1: its training part (1 pairs)")
    with refuses("data-split", "2 faults", "2 folds", "cv.seed=9", *faults):
        make_splits([Pair("p0", "A.1", 1), Pair("p0", "A.2", 0), Pair("p1", "A.1", 1), Pair("p1", "A.2", 0)], 2, 9)


# --- What is kept of them --------------------------------------------------------------------------------------------


def test_record_survives_json_and_tells_everything() -> None:
    data = dataset(PAIRS)
    splits = make_splits(PAIRS, 5, 42)
    record = json.loads(json.dumps(splits_record(data, splits, 42), allow_nan=False))

    assert (record["n_splits"], record["random_state"]) == (5, 42)
    assert "StratifiedGroupKFold" in record["method"]
    assert record["rows"] == [[pair.post_id, pair.criterion_id] for pair in PAIRS]
    for split, kept in zip(splits, record["folds"], strict=True):
        assert kept["fold"] == split.fold
        np.testing.assert_array_equal(kept["train_indices"], split.train_indices)
        np.testing.assert_array_equal(kept["val_indices"], split.val_indices)
    assert "text of" not in json.dumps(record)


def test_table_of_positives_adds_up() -> None:
    data = dataset(PAIRS)
    table = positives_table(data, make_splits(PAIRS, 5, 42))

    assert [row["fold"] for row in table] == [0, 1, 2, 3, 4]
    assert list(table[0]) == ["fold", "pairs", "matched", "per_criterion"]
    assert list(table[0]["per_criterion"]) == list(data.criteria)
    assert sum(row["pairs"] for row in table) == len(PAIRS)
    assert sum(row["matched"] for row in table) == sum(pair.label for pair in PAIRS)
    for row in table:
        assert row["matched"] == sum(row["per_criterion"].values())
    for criterion in data.criteria:
        expected = sum(pair.label for pair in PAIRS if pair.criterion_id == criterion)
        assert sum(row["per_criterion"][criterion] for row in table) == expected
    json.dumps(table)
