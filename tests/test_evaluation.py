"""The evaluation of a run as a whole: its shape, its bytes, its verdict."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from support.refusals import refuses
from support.studies import richest, simulated, study_of

from raycv.evaluation import evaluate as module
from raycv.evaluation.evaluate import evaluate

DRAWS = 200


def text_of(study, **more):
    return json.dumps(evaluate(study, DRAWS, **more), allow_nan=False)


def test_equal_input_gives_equal_bytes_in_any_order_of_rows():
    study = richest()
    order = np.random.default_rng(1).permutation(len(study.labels))
    rows = {
        one.name: getattr(study, one.name)[order]
        for one in fields(study)
        if isinstance(getattr(study, one.name), np.ndarray)
    }
    place = [np.flatnonzero(study.fold == fold) for fold in range(study.folds)]
    epochs = []
    for fold, scores in enumerate(study.epoch_scores):
        position = {row: index for index, row in enumerate(place[fold])}
        epochs.append(scores[:, [position[row] for row in order[study.fold[order] == fold]]])
    floors = {name: scores[order] for name, scores in study.floor_scores.items()}
    shuffled = replace(study, **rows, epoch_scores=epochs, floor_scores=floors)
    assert text_of(study) == text_of(study) == text_of(shuffled)
    assert text_of(study) != text_of(study, seed=43)


def test_every_key_that_is_described_exists_and_no_other():
    found = evaluate(richest(), DRAWS)
    keys = module.__doc__.split("Keys:")[1]
    described = {
        key for line in keys.splitlines() if line.startswith("- ") for key in line.split(": ")[0][2:].split("`")[1::2]
    }
    assert described == set(found)
    assert [point["name"] for point in found["operating_points"]] == [
        "fixed", "tuned_in_fold", "cross_fold", "cross_fold_epoch", "pooled",
    ]  # fmt: skip


def test_an_older_run_says_what_it_did_not_record():
    found = evaluate(simulated(60), DRAWS)
    assert found["epochs"] is None
    silent = {check["code"] for check in found["checks"] if check["status"] == "not recorded"}
    assert silent == {"RCV005", "RCV006", "RCV009", "RCV010"}
    assert not any(found["data"]["recorded"].values())
    assert [part["name"] for part in found["slices"]] == ["match"]


def test_pooled_threshold_has_no_performance():
    pooled = evaluate(simulated(60), DRAWS)["operating_points"][-1]
    assert pooled["name"] == "pooled"
    assert 0 <= pooled["threshold"] <= 1
    assert all(pooled[key] is None for key in ("pooled", "fold_mean", "criterion_macro", "confusion", "optimism"))


def test_verdict_has_three_sentences_with_interval_and_floor():
    verdict = evaluate(richest(), DRAWS)["verdict"]
    assert len(verdict["sentences"]) == 3
    assert f"{verdict['f1']['value']:.3f} ({verdict['f1']['reselected']['low']:.3f} to" in verdict["sentences"][0]
    assert "better than the best floor (all matched)" in verdict["sentences"][1]
    assert verdict["checks"][0] in verdict["sentences"][2]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"labels": np.array([0, 1, 2, 0], dtype=np.int8)}, "a label is neither 0 nor 1"),
        ({"scores": np.array([0.1, np.nan, 0.3, 0.4])}, "a value of scores is not in 0..1"),
        ({"fold": np.array([0, 0, 2, 2])}, "without a gap"),
        ({"post": np.array([0, 1, 1, 2])}, "post p00001 is in more than one fold"),
        ({"post": np.array([0, 0, 2, 3])}, "post p00000 has two scores for criterion A.1"),
        ({"scores": np.array([0.1, 0.2])}, "4 labels, but 2 scores"),
        ({"retries": [0]}, "retries has 1 folds"),
        ({"epoch_scores": [np.zeros((2, 2)), np.zeros((2, 3))]}, "epoch_scores of fold 1 have the shape"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change, fault):
    study = study_of([0, 1, 1, 0], [0.1, 0.9, 0.8, 0.2], [0, 0, 1, 1])
    with refuses("run-damaged", fault):
        replace(study, **change)
