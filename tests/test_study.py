"""A run folder becomes arrays: in the order of its predictions, recorded or computed from the data set, or None."""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from support.mlflow_runs import fold_result
from support.refusals import refuses
from support.toy import toy_dataset

from raycv.common.files import array_bytes, read_json, write_json
from raycv.data.dataset import data_hash
from raycv.data.splits import make_splits
from raycv.evaluation.evaluate import evaluate
from raycv.evaluation.floors_and_slices import criterion_prior
from raycv.results.pair_records import write_pair_records
from raycv.results.run_folder import RunFolder
from raycv.results.study import TFIDF_FLOOR, load_study

EPOCHS = 3


@pytest.fixture(scope="module")
def data():
    """40 posts of the release, one with an id that looks like a missing value, and another with the same text."""
    made = toy_dataset(posts=40, words=9)
    posts = {"NA" if post_id == "p07" else post_id: text for post_id, text in made.posts.items()}
    posts["p11"] = posts["NA"] = posts["NA"] + " w1 w2 w3 w4 w5"
    pairs = [
        replace(pair, post_id="NA" if pair.post_id == "p07" else pair.post_id, explicit_negative=index % 4 == 0)
        for index, pair in enumerate(made.pairs)
    ]
    pairs.sort(key=lambda pair: (pair.post_id, pair.criterion_id))
    stats = {"layout": "official", "data_hash": data_hash(posts, pairs)}
    return replace(made, posts=posts, pairs=pairs, stats=stats)


@pytest.fixture
def run(tmp_path, data):
    """A finished run of two folds with random scores, whose rows in a fold are in another order than the data set's."""
    folder = RunFolder(tmp_path / "mine")
    folder.root.mkdir()
    folder.config.write_text("cv: {folds: 2}\n")
    write_json(folder.data_stats, data.stats)
    generator = np.random.default_rng(5)
    splits = make_splits(data.pairs, 2, 1)
    for split in splits:
        files = folder.fold(split.fold)
        files.checkpoint.mkdir(parents=True)
        (files.checkpoint / "raycv.json").write_text("{}")
        scores = generator.random((EPOCHS, len(split.val_indices)))
        pairs = [data.pairs[index] for index in split.val_indices[::-1]]
        columns = [(pair.post_id, pair.criterion_id, pair.label) for pair in pairs]
        table = pd.DataFrame(columns, columns=["post_id", "criterion_id", "label"])
        table.assign(score=scores[1], post="text").to_csv(files.predictions, index=False)
        files.epoch_scores.write_bytes(array_bytes(scores))
        write_json(files.result, asdict(fold_result(split.fold)))
    write_pair_records(folder, data, splits, np.arange(len(data.pairs)) % 7 == 0)
    return folder


def key_of(study, row):
    return study.post_ids[study.post[row]], study.criterion_ids[study.criterion[row]]


def test_every_row_has_what_belongs_to_its_pair(run, data):
    study = load_study(run)
    position = {(pair.post_id, pair.criterion_id): index for index, pair in enumerate(data.pairs)}
    keys = [key_of(study, row) for row in range(len(study.labels))]
    pairs = [data.pairs[position[key]] for key in keys]
    assert sorted(keys) == sorted(position)
    assert study.labels.tolist() == [pair.label for pair in pairs]
    assert study.hard_negative.tolist() == [pair.explicit_negative for pair in pairs]
    assert study.shortened.tolist() == [position[key] % 7 == 0 for key in keys]
    table = pd.read_csv(run.pairs, keep_default_na=False, float_precision="round_trip")
    table = table.set_index(["post_id", "criterion_id"]).loc[keys]
    assert study.fold.tolist() == table["fold"].tolist()
    np.testing.assert_array_equal(study.floor_scores[TFIDF_FLOOR], table["tfidf"])
    np.testing.assert_allclose(criterion_prior(study), table["prior"], rtol=1e-12)
    for fold in (0, 1):
        frame = pd.read_csv(run.fold(fold).predictions, keep_default_na=False, float_precision="round_trip")
        rows = np.flatnonzero(study.fold == fold)
        assert [keys[row] for row in rows] == list(zip(frame["post_id"], frame["criterion_id"], strict=True))
        np.testing.assert_array_equal(study.scores[rows], frame["score"])
        np.testing.assert_array_equal(study.epoch_scores[fold][1], study.scores[rows])
        assert study.epoch_scores[fold].shape == (EPOCHS, len(rows))
        assert study.history[fold] == fold_result(fold).history
    assert study.near_duplicates == [("NA", "p11")]
    assert study.events == [[], []]
    assert study.retries is None
    assert study.run == "mine"


def test_restarts_of_folds_reach_the_check_that_compares_them(run):
    for fold, whys in enumerate(([], ["worker 0 of the fold died, or its node"])):
        file = run.fold(fold).result
        write_json(file, read_json(file) | {"restarts": whys})
    study = load_study(run)
    assert study.retries == [0, 1]
    check = next(one for one in evaluate(study, 20)["checks"] if one["code"] == "RCV010")
    assert (check["status"], check["numbers"]["retries"]) == ("found", [0, 1])


def test_a_run_of_an_earlier_version_lacks_it_or_gets_it_from_the_data(run, data):
    recorded = load_study(run)
    for file in (run.pairs, run.near_duplicates, run.fold(0).epoch_scores):
        file.unlink()
    study = load_study(run)
    lacking = ("epoch_scores", "shortened", "hard_negative", "near_duplicates")
    assert [getattr(study, name) for name in lacking] == [None] * 4
    assert study.floor_scores == {}
    np.testing.assert_array_equal(study.scores, recorded.scores)
    filled = load_study(run, data)
    np.testing.assert_array_equal(filled.floor_scores[TFIDF_FLOOR], recorded.floor_scores[TFIDF_FLOOR])
    np.testing.assert_array_equal(filled.hard_negative, recorded.hard_negative)
    assert filled.near_duplicates == recorded.near_duplicates
    assert (filled.shortened, filled.epoch_scores) == (None, None)
    assert load_study(run, replace(data, stats=data.stats | {"layout": "specification"})).hard_negative is None


def test_recorded_facts_win_over_those_of_the_data(run, data):
    run.pairs.write_text(run.pairs.read_text().replace(",0.", ",0.0"))
    before = load_study(run)
    other = replace(data, pairs=[replace(pair, explicit_negative=not pair.explicit_negative) for pair in data.pairs])
    after = load_study(run, other)
    np.testing.assert_array_equal(after.floor_scores[TFIDF_FLOOR], before.floor_scores[TFIDF_FLOOR])
    np.testing.assert_array_equal(after.hard_negative, before.hard_negative)


FAULTS = {
    "other data": (None, ["run mine", "its hash is 000000000000", "data.dir=<folder>"]),
    "no fold": (lambda run: run.fold(1).result.unlink(), ["Run mine ", "fold 1", "raycv.run resume=mine"]),
    "pairs of others": (
        lambda run: run.pairs.write_text(run.pairs.read_text().replace("NA,", "q,")),
        ["pairs.csv is damaged", "those of the folds"],
    ),
    "a pair less": (
        lambda run: run.pairs.write_text(run.pairs.read_text().rpartition("\nNA")[0]),
        ["pairs.csv is damaged", "those of the folds"],
    ),
    "no table": (lambda run: run.pairs.write_text("{}"), ["pairs.csv is damaged", "post_id, criterion_id, fold"]),
    "no number": (
        lambda run: run.fold(0).predictions.write_text("post_id,criterion_id,label,score\na,b,yes,0\n"),
        ["fold_0/predictions.csv is damaged"],
    ),
    "duplicates": (lambda run: run.near_duplicates.write_text(""), ["near_duplicates.csv is damaged"]),
    "no array": (lambda run: run.fold(0).epoch_scores.write_bytes(b""), ["fold_0/epoch_scores.npy is damaged"]),
    "another shape": (
        lambda run: run.fold(0).epoch_scores.write_bytes(array_bytes(np.zeros((2, 3)))),
        ["fold_0/epoch_scores.npy is damaged", "(2, 3)"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(run, data, fault):
    change, parts = FAULTS[fault]
    dataset = None
    if change is None:
        dataset = replace(data, stats=data.stats | {"data_hash": "0" * 64})
    else:
        change(run)
    kind = {"other data": "resume-differs", "no fold": "run-failed"}.get(fault, "run-damaged")
    with refuses(kind, *parts):
        load_study(run, dataset)
