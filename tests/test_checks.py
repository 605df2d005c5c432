"""Each check fires on a run that has its fault, and stays quiet on one that has not. Floors and slices by hand."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, recall_score, roc_auc_score
from support.studies import richest, simulated, study_of

from raycv.config.schema import RunConfig
from raycv.config.validation import fields
from raycv.evaluation.checks import CHECKS
from raycv.evaluation.evaluate import evaluate
from raycv.evaluation.floors_and_slices import criterion_prior
from raycv.training.metrics import all_matched_f1, tune_threshold

DRAWS = 200


def status(study):
    return {check["code"]: check for check in evaluate(study, DRAWS)["checks"]}


@pytest.fixture(scope="module")
def sound():
    """A study without any fault: every optional record is there, and nothing is wrong with it."""
    study = simulated(300, seed=1)
    rng = np.random.default_rng(0)
    history = [[{"f1": 0.2}, {"f1": 0.5}, {"f1": 0.4}]] * 5
    shortened = (rng.random(300) < 0.2)[study.post]
    return replace(study, history=history, shortened=shortened, near_duplicates=[], events=[[]] * 5, retries=[0] * 5)


def test_codes_are_in_order_and_a_sound_run_has_none(sound):
    found = status(sound)
    assert list(found) == [f"RCV{number:03}" for number in range(1, 11)] == [check.code for check in CHECKS]
    assert {code for code, check in found.items() if check["status"] != "clear"} == set()
    assert all(check["why"] and check["remedy"] and check["title"] for check in found.values())


def without_positives(study):
    gone = (study.fold == 2) & (study.criterion == 4)
    return replace(study, labels=np.where(gone, 0, study.labels).astype(np.int8))


def shifted(study):
    return replace(study, scores=np.where(study.fold == 1, study.scores**4, study.scores))


def collapsed(study):
    return replace(study, scores=np.where(study.fold == 3, 0.5, study.scores))


def useless(study):
    return replace(study, scores=np.random.default_rng(0).random(len(study.scores)))


def copied(study):
    return replace(study, near_duplicates=[("p00000", "p00001"), ("p00000", "p00005")])


def cut(study):
    return replace(study, shortened=(study.labels == 1) | study.shortened)


def leaked(study):
    return replace(study, scores=0.9 * study.labels + 0.1 * study.scores)


def rising(study):
    return replace(study, history=[*study.history[:4], [{"f1": 0.1}, {"f1": 0.2}]])


def crowded(study):
    return replace(study, events=[["out of memory: micro-batch 8 -> 4"], *study.events[1:]])


def restarted(study):
    return replace(study, retries=[0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("code", "fault", "words"),
    [
        ("RCV001", without_positives, "1 of 45 cells of fold and criterion have no matched pair (fold 2: A.5)"),
        ("RCV002", shifted, "At the threshold to deploy, "),
        ("RCV003", collapsed, "1 of 5 folds collapsed. fold 3:"),
        ("RCV004", useless, "F1 differs from the best floor"),
        ("RCV005", copied, "Nearly equal posts lie in different folds: 1 pair of 2 posts."),
        ("RCV006", cut, "100.0% of the matched pairs have a shortened post"),
        ("RCV007", shifted, "roc_auc is"),
        ("RCV008", leaked, "above 0.8"),
        ("RCV009", rising, "The best epoch of 1 of 5 folds is their last one (fold 4)"),
        ("RCV010", crowded, "out-of-memory events by fold 1, 0, 0, 0, 0"),
        ("RCV010", restarted, "restarts by fold 0, 1, 0, 0, 0"),
    ],
)
def test_a_check_fires_on_its_fault(sound, code, fault, words):
    check = status(fault(sound))[code]
    assert check["status"] == "found"
    assert words in check["finding"]


def test_serious_checks_come_first_in_the_verdict(sound):
    verdict = evaluate(leaked(rising(sound)), DRAWS)["verdict"]
    assert verdict["checks"] == ["RCV008", "RCV009"]
    assert verdict["sentences"][2].endswith("checks that found something: RCV008, RCV009.")


def test_the_criterion_prior_uses_the_other_folds_only():
    """Criterion A.1: fold 0 has 1 of 2 matched, fold 1 has 2 of 2. A.2 is in fold 0 only, so gets fold 1's share."""
    study = study_of([1, 0, 1, 1, 0], [0.5] * 5, [0, 0, 1, 1, 0], [0, 1, 2, 3, 0], [0, 0, 0, 0, 1])
    assert criterion_prior(study).tolist() == [1.0, 1.0, 0.5, 0.5, 1.0]


@pytest.fixture(scope="module")
def found():
    return evaluate(richest(), DRAWS)


def test_floors_by_scikit_learn_on_the_same_folds(found):
    study = richest()
    rows = {row["name"]: row for row in found["floors"]["table"]}
    assert set(rows) == {"all_positive", "all_negative", "criterion_prior", "tfidf_logistic_regression"}
    f1 = {name: row["metrics"]["f1"]["value"] for name, row in rows.items()}
    assert f1["all_positive"] == pytest.approx(all_matched_f1(study.labels.mean()))
    assert f1["all_negative"] == 0
    assert rows["all_negative"]["metrics"]["precision"]["value"] is None
    assert rows["all_negative"]["metrics"]["accuracy"]["value"] == pytest.approx(1 - study.labels.mean())
    scores, called = study.floor_scores["tfidf_logistic_regression"], np.zeros(len(study.labels), dtype=bool)
    for fold in range(5):
        own = study.fold == fold
        called[own] = scores[own] >= tune_threshold(study.labels[~own], scores[~own])
    assert f1["tfidf_logistic_regression"] == pytest.approx(f1_score(study.labels, called))
    assert rows["tfidf_logistic_regression"]["metrics"]["roc_auc"]["value"] == pytest.approx(
        roc_auc_score(study.labels, scores)
    )
    best = found["floors"]["best"]
    assert f1[best] == max(f1.values())
    honest = next(point for point in found["operating_points"] if point["name"] == "cross_fold")
    difference = found["floors"]["difference_to_best"]["f1"]
    assert difference["value"] == pytest.approx(honest["pooled"]["f1"]["value"] - f1[best], abs=1e-9)
    assert difference["fixed"]["low"] < difference["value"] < difference["fixed"]["high"]


def test_slices_by_scikit_learn(found):
    study = richest()
    thresholds = next(point["thresholds"] for point in found["operating_points"] if point["name"] == "cross_fold")
    called = study.scores >= np.array(thresholds)[study.fold]
    slices = {part["name"]: part for group in found["slices"] for part in group["slices"]}
    for name, mask in {"shortened": study.shortened, "whole": ~study.shortened}.items():
        metrics = slices[name]["metrics"]
        assert metrics["f1"]["value"] == pytest.approx(f1_score(study.labels[mask], called[mask]))
        assert metrics["roc_auc"]["value"] == pytest.approx(roc_auc_score(study.labels[mask], study.scores[mask]))
    hard = study.hard_negative
    specificity = recall_score(study.labels[hard], called[hard], pos_label=0)
    assert slices["hard_negatives"]["metrics"]["specificity"]["value"] == pytest.approx(specificity)
    assert slices["hard_negatives"]["metrics"]["f1"]["value"] is None
    assert slices["posts_without_match"]["matched"] == 0
    assert slices["posts_with_match"]["matched"] == study.labels.sum()
    length = next(group for group in found["slices"] if group["name"] == "length")
    difference = slices["shortened"]["metrics"]["f1"]["value"] - slices["whole"]["metrics"]["f1"]["value"]
    assert length["difference"]["f1"]["value"] == pytest.approx(difference, abs=1e-9)


def test_an_empty_slice_has_no_metrics():
    found = evaluate(replace(simulated(40), shortened=np.zeros(360, dtype=bool)), 20)
    length = next(group for group in found["slices"] if group["name"] == "length")
    assert (length["slices"][0]["pairs"], length["slices"][0]["metrics"], length["difference"]) == (0, None, None)


def test_the_page_lists_every_check():
    page = Path(__file__).parent.parent / "docs/concepts/statistics.md"
    if not page.is_file():
        pytest.skip("the docs are in the checkout, not in the wheel")
    rows = [f"| {check.code} | {check.title} | {check.severity} |" for check in CHECKS]
    assert "\n".join(rows) in page.read_text(encoding="utf-8")


def test_the_keys_that_a_check_names_exist() -> None:
    known = {key for key, _ in fields(RunConfig)}
    named = {key for check in CHECKS for key in re.findall(r"\b(?:cv|data|dora|model|prompt|train)\.\w+", check.remedy)}
    assert named
    assert named <= known
