"""What a run records for a later report: floors against plain scikit-learn, near-duplicates against plain sets."""

import io
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from support.toy import toy_dataset

from raycv.cv.open_run import OpenRun
from raycv.data.splits import Split, make_splits
from raycv.data.types import Criterion, Dataset, Pair
from raycv.results import near_duplicates as duplicates
from raycv.results.near_duplicates import near_duplicates
from raycv.results.pair_records import floor_scores, write_pair_records
from raycv.results.run_folder import RunFolder

CANARY = "zebra quilt 4471"


@pytest.fixture(scope="module")
def data():
    dataset = toy_dataset(posts=40, words=9)
    return dataset, make_splits(dataset.pairs, 4, 1)


# --- Floors ----------------------------------------------------------------------------------------------------------


def test_the_floors_are_those_of_plain_scikit_learn(data):
    dataset, splits = data
    prior, tfidf = floor_scores(dataset, splits)
    frame = pd.DataFrame([(pair.post_id, pair.criterion_id, pair.label) for pair in dataset.pairs])
    for split in splits:
        for criterion in dataset.criteria:
            train, val = (
                rows[rows[1] == criterion] for rows in (frame.iloc[split.train_indices], frame.iloc[split.val_indices])
            )
            plain = make_pipeline(
                TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
                LogisticRegression(C=10, class_weight="balanced", solver="liblinear", random_state=0),
            ).fit(train[0].map(dataset.posts), train[2])
            expected = plain.predict_proba(val[0].map(dataset.posts))[:, 1]
            np.testing.assert_allclose(tfidf[val.index], expected, rtol=1e-9)
            np.testing.assert_array_equal(prior[val.index], np.full(len(val), train[2].mean()))
    assert np.corrcoef(tfidf, frame[2])[0, 1] > 0.4
    again = floor_scores(dataset, splits)
    np.testing.assert_array_equal(again, (prior, tfidf))


def test_a_floor_sees_neither_texts_nor_labels_of_the_fold_that_it_scores(data):
    dataset, splits = data
    before = floor_scores(dataset, splits)
    val = splits[1].val_indices
    pairs = list(dataset.pairs)
    for index in val:
        pairs[index] = replace(pairs[index], label=1 - pairs[index].label)
    for old, new in zip(before, floor_scores(replace(dataset, pairs=pairs), splits), strict=True):
        np.testing.assert_array_equal(new[val], old[val])
        assert not np.array_equal(new, old)
    # Other words in one validation post change the scores of that post only.
    post_id = pairs[val[0]].post_id
    posts = dataset.posts | {post_id: "entirely new words " * 3}
    mine = np.array([pair.post_id == post_id for pair in pairs])[val]
    old, new = before[1][val], floor_scores(replace(dataset, posts=posts), splits)[1][val]
    np.testing.assert_array_equal(new[~mine], old[~mine])
    assert not np.array_equal(new[mine], old[mine])


def test_a_criterion_that_training_cannot_teach_scores_its_prevalence():
    """A has no matched pair in training, B has no pair there, and no word is in two posts."""
    posts = {f"p{index}": f"{'abcdefgh'[index] * 3} word{index}" for index in range(8)}
    labels = [1, 0, 0, 0, 1, 0, 0, 0]
    pairs = [Pair(f"p{index}", "A", int(index == 0)) for index in range(8)]
    pairs += [Pair(f"p{index}", "B", 1) for index in range(4)]
    pairs += [Pair(f"p{index}", "C", label) for index, label in enumerate(labels)]
    dataset = Dataset(posts, {key: Criterion(key, key) for key in "ABC"}, pairs)
    folds = np.array([int(pair.post_id[1:]) // 4 for pair in pairs])
    splits = [Split(fold, np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in (0, 1)]
    prior, tfidf = floor_scores(dataset, splits)
    np.testing.assert_array_equal(prior, tfidf)
    by_criterion = {key: prior[[pair.criterion_id == key for pair in pairs]] for key in "ABC"}
    assert by_criterion["A"].tolist() == [0] * 4 + [0.25] * 4
    assert by_criterion["B"].tolist() == [1 / 8] * 4
    assert by_criterion["C"].tolist() == [0.25] * 8


# --- Near-duplicates -------------------------------------------------------------------------------------------------


def plain_jaccard(one, other):
    def shingles(text):
        words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
        return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))} if words else set()

    both = shingles(one) | shingles(other)
    return len(shingles(one) & shingles(other)) / len(both) if both else 0.0


@pytest.mark.parametrize("cells", [2**22, 100])
def test_near_duplicates_are_those_of_plain_sets(monkeypatch, cells):
    monkeypatch.setattr(duplicates, "CHUNK_CELLS", cells)
    generator = np.random.default_rng(3)
    posts = {"empty": "", "signs": "!!! 😀", "more signs": "...", "short": "So tired", "same": "so, TIRED!"}
    for family in range(8):
        words = generator.integers(0, 3 if family == 0 else 400, 40).astype(str)
        for edits in range(5):
            changed = words.copy()
            changed[generator.integers(0, 40, edits)] = "edited"
            posts[f"{family}.{edits}"] = "  ".join(changed)
    found = near_duplicates(posts)
    expected = [(a, b, plain_jaccard(posts[a], posts[b])) for a, b in combinations(posts, 2)]
    assert found == [one for one in expected if one[2] >= 0.5]
    assert ("short", "same", 1.0) in found
    assert 10 < len(found) < len(expected)
    assert near_duplicates({}) == []


WORDS = st.lists(st.sampled_from("abc"), max_size=60)
TEXTS = st.one_of(
    st.lists(WORDS.map(" ".join), max_size=12),
    # Parts of one long text share from none to all of their 5-grams.
    st.tuples(st.permutations(range(60)), st.lists(st.tuples(st.integers(0, 40), st.integers(5, 60)), max_size=12)).map(
        lambda drawn: [" ".join(map(str, drawn[0][start : start + length])) for start, length in drawn[1]]
    ),
)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from([1, 20, 2**22]))
def test_near_duplicates_of_any_posts_are_those_of_plain_sets(texts, cells):
    posts = {f"p{number}": text for number, text in enumerate(texts)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "CHUNK_CELLS", cells)
        found = near_duplicates(posts)
    expected = [(a, b, plain_jaccard(posts[a], posts[b])) for a, b in combinations(posts, 2)]
    assert found == [one for one in expected if one[2] >= 0.5]


# --- The files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "runs" / "mine")
    made.root.mkdir(parents=True)
    return made


def test_the_files_hold_ids_and_numbers_and_no_text(data, folder):
    dataset, splits = data
    posts = {post_id: f"{CANARY} {text} {CANARY}" for post_id, text in dataset.posts.items()}
    posts["p01"] = posts["p00"]
    dataset = replace(dataset, posts=posts)
    shortened = np.arange(len(dataset.pairs)) % 7 == 0
    write_pair_records(folder, dataset, splits, shortened)
    assert {path.name for path in folder.root.iterdir()} == {"pairs.csv", "near_duplicates.csv"}
    assert {path.stat().st_mode & 0o777 for path in folder.root.iterdir()} == {0o600}
    contents = {path: path.read_bytes() for path in folder.root.iterdir()}
    assert not any(word.encode() in content for content in contents.values() for word in CANARY.split())
    table = pd.read_csv(folder.pairs, float_precision="round_trip")
    columns = ["post_id", "criterion_id", "fold", "label", "shortened", "hard_negative", "prior", "tfidf"]
    assert list(table.columns) == columns
    assert table["shortened"].tolist() == shortened.astype(int).tolist()
    assert table["hard_negative"].isna().all()
    np.testing.assert_array_equal((table["prior"], table["tfidf"]), floor_scores(dataset, splits))
    for split in splits:
        assert np.flatnonzero(table["fold"] == split.fold).tolist() == split.val_indices.tolist()
    near = pd.read_csv(folder.near_duplicates)
    assert list(near.columns) == ["post_id_a", "post_id_b", "jaccard"]
    assert ("p00", "p01", 1.0) in list(near.itertuples(index=False, name=None))
    # A resumed run makes what is missing, with the same bytes, and leaves the other file alone.
    folder.pairs.unlink()
    kept = folder.near_duplicates.stat().st_mtime_ns
    write_pair_records(folder, dataset, splits, shortened)
    assert {path: path.read_bytes() for path in folder.root.iterdir()} == contents
    assert folder.near_duplicates.stat().st_mtime_ns == kept


def test_hard_negatives_are_those_that_the_release_names(data, folder):
    dataset, splits = data
    pairs = [replace(pair, explicit_negative=index % 5 == 0) for index, pair in enumerate(dataset.pairs)]
    write_pair_records(folder, replace(dataset, pairs=pairs, stats={"layout": "official"}), splits, None)
    table = pd.read_csv(folder.pairs)
    assert table["hard_negative"].tolist() == [int(pair.explicit_negative) for pair in pairs]
    assert table["shortened"].isna().all()


def test_a_fault_while_it_records_only_warns_and_prints_no_text(data, folder, monkeypatch):
    dataset, splits = data
    printed = io.StringIO()
    run = OpenRun(None, folder, None, "", Console(file=printed, width=200))
    prepared = SimpleNamespace(dataset=dataset, splits=splits, encoded=SimpleNamespace(shortened=None))

    def fail(_):
        raise ValueError(CANARY)

    monkeypatch.setattr("raycv.results.pair_records.near_duplicates", fail)
    run.record_pairs(prepared)
    assert "could not be recorded: ValueError" in printed.getvalue()
    assert CANARY not in printed.getvalue()
    assert list(folder.root.iterdir()) == []
    folder.root.rmdir()
    folder.root.write_text("")
    monkeypatch.undo()
    run.record_pairs(prepared)
    assert printed.getvalue().count("Warning: ") == 2
