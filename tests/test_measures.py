"""Every metric against scikit-learn under weights, hand-worked cases, and the faults of other tools."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from support.studies import simulated

from raycv.evaluation.bootstrap import criterion_macro, resample
from raycv.evaluation.evaluate import evaluate
from raycv.evaluation.measures import (
    METRICS,
    THRESHOLDS,
    LabelCounts,
    Ranking,
    ScoreErrors,
    ThresholdCounts,
    label_metrics,
    measure,
)
from raycv.evaluation.operating_points import Measurement, best_step
from raycv.training.metrics import tune_threshold

SCORE = st.one_of(st.floats(0, 1), st.integers(0, 100).map(lambda step: step / 100), st.sampled_from([0.0, 0.5, 1.0]))
ROWS = st.lists(st.tuples(st.integers(0, 1), SCORE, st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=30)


def oracle(labels, scores, called, weights):
    """Every metric by scikit-learn; None where raycv calls it undefined."""
    both = len(set(labels[weights > 0])) == 2
    some = weights[labels == 1].sum() > 0
    others = weights[labels == 0].sum() > 0
    more = {"sample_weight": weights}
    one_call = len(set(called[weights > 0])) == 1
    return {
        "precision": sk.precision_score(labels, called, **more) if weights[called].sum() else None,
        "recall": sk.recall_score(labels, called, **more) if some else None,
        "f1": sk.f1_score(labels, called, zero_division=0, **more) if some else None,
        "accuracy": sk.accuracy_score(labels, called, **more),
        "specificity": sk.recall_score(labels, called, pos_label=0, **more) if others else None,
        "balanced_accuracy": sk.balanced_accuracy_score(labels, called, **more) if both else None,
        "mcc": sk.matthews_corrcoef(labels, called, **more) if both and not one_call else None,
        "roc_auc": sk.roc_auc_score(labels, scores, **more) if both else None,
        "average_precision": sk.average_precision_score(labels, scores, **more) if some else None,
        "brier": sk.brier_score_loss(labels, scores, **more),
    }


@given(ROWS, st.floats(0, 1))
@settings(max_examples=150, deadline=None)
@pytest.mark.long
def test_every_metric_equals_scikit_learn_under_weights_of_posts(rows, threshold):
    labels, scores, post, copies = (np.array(column) for column in zip(*rows, strict=True))
    weights = np.zeros((5, 1))
    weights[post, 0] = copies
    if not weights[post].sum():
        return
    called, one = scores >= threshold, np.zeros(len(rows), dtype=int)
    found = label_metrics(LabelCounts(labels, called, one, 1, post, 5)(weights).summed())
    found |= Ranking(labels, scores, post, 5)(weights) | ScoreErrors(labels, scores, post, 5)(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = oracle(labels, scores, called, weights[post, 0])
    for name, value in expected.items():
        assert found[name][0] == pytest.approx(np.nan if value is None else value, abs=1e-9, nan_ok=True), name


@given(ROWS)
@settings(max_examples=100, deadline=None)
@pytest.mark.long
def test_thresholds_are_those_that_training_tunes(rows):
    labels, scores, *_ = (np.array(column) for column in zip(*rows, strict=True))
    if not labels.any():
        return
    one = np.zeros(len(rows), dtype=int)
    counts = ThresholdCounts(labels, scores, one, 1, one, 1)(np.ones((1, 1)))
    assert THRESHOLDS[best_step(counts)[0, 0]] == tune_threshold(labels, scores)
    for step in (0, 37, 50, 100):
        assert counts.called[0, step, 0] == (scores >= THRESHOLDS[step]).sum()
        assert counts.hits[0, step, 0] == (labels[scores >= THRESHOLDS[step]]).sum()


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_leaves_metrics_undefined_and_never_zero(label):
    found = measure(np.full(4, label), np.array([0.1, 0.4, 0.6, 0.9]), np.array([False, False, True, True]))
    undefined = {name for name, value in found.items() if np.isnan(value)}
    expected = {"roc_auc", "balanced_accuracy", "mcc"}
    assert undefined == expected | ({"recall", "f1", "average_precision"} if label == 0 else {"specificity"})


def test_a_confusion_has_four_cells_with_one_class_too():
    one = np.zeros(3, dtype=int)
    counts = LabelCounts(np.zeros(3), np.array([True, False, False]), one, 1, one, 1)(np.ones((1, 1))).summed()
    cells = {name: int(value[0]) for name, value in counts.confusion().items()}
    assert cells == {"true_positives": 0, "false_positives": 1, "false_negatives": 0, "true_negatives": 2}


def test_calibration_error_by_hand():
    """Bins [0, 0.1): two pairs, gap |1 - 0.08|; [0.1, 0.2): one, gap |0 - 0.1|; [0.9, 1]: two, gap |1 - 1.9|."""
    labels, scores = np.array([0, 1, 0, 1, 0]), np.array([0.0, 0.08, 0.1, 0.9, 1.0])
    expected = (0.92 + 0.1 + 0.9) / 5
    assert measure(labels, scores, scores >= 0.5)["ece"] == pytest.approx(expected)


def test_calibration_error_of_constant_scores_is_the_distance_to_the_prevalence():
    labels = np.array([1, 0, 0, 0])
    for score, gap in ((0.25, 0.0), (0.75, 0.5), (1.0, 0.75), (0.0, 0.25)):
        assert measure(labels, np.full(4, score), np.ones(4, dtype=bool))["ece"] == pytest.approx(gap)


def test_two_hundred_thousand_pairs_do_not_overflow():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200_000)
    scores = np.round(rng.random(200_000) * 0.5 + 0.3 * labels, 4)
    found = measure(labels, scores, scores >= 0.4)
    assert found["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-12)
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, scores >= 0.4), abs=1e-9)


def test_the_macro_is_the_mean_of_the_criteria_and_not_f1_of_means():
    study = simulated(150, criteria=4, seed=3)
    found = evaluate(study, 50)
    point = next(point for point in found["operating_points"] if point["name"] == "fixed")
    called = study.scores >= 0.5
    parts = [study.criterion == one for one in range(4)]
    expected = np.mean([sk.f1_score(study.labels[part], called[part]) for part in parts])
    precision = np.mean([sk.precision_score(study.labels[part], called[part]) for part in parts])
    recall = np.mean([sk.recall_score(study.labels[part], called[part]) for part in parts])
    assert point["criterion_macro"]["f1"]["value"] == pytest.approx(expected)
    assert abs(2 * precision * recall / (precision + recall) - expected) > 1e-6
    # A micro average over both classes would be the accuracy.
    assert point["pooled"]["f1"]["value"] == pytest.approx(sk.f1_score(study.labels, called))
    assert point["pooled"]["f1"]["value"] != pytest.approx(sk.accuracy_score(study.labels, called), abs=0.01)
    assert "micro" not in str([found["operating_points"], found["methods"]])


def test_a_criterion_without_matched_pairs_is_counted_and_left_out_of_the_macro():
    study = simulated(150, criteria=3, seed=3)
    labels = np.where(study.criterion == 1, 0, study.labels).astype(np.int8)
    study = type(study)(**{**vars(study), "labels": labels})
    samples = resample(Measurement(study, study.scores), 150, len(labels), draws=50)
    for metric in ("f1", "recall"):
        found = criterion_macro(samples, f"fixed.fixed.criteria.{metric}")
        rest = [samples.estimate[f"fixed.fixed.criteria.{metric}"][one] for one in (0, 2)]
        assert found["undefined"] == 1
        assert found["value"] == pytest.approx(np.mean(rest))
    row = evaluate(study, 50)["criteria"][1]
    assert row["metrics"]["f1"]["value"] is row["metrics"]["roc_auc"]["value"] is row["floor_f1"] is None
    assert row["metrics"]["f1"]["fixed"] == {"low": None, "high": None, "undefined_draws": 50, "constant": False}


def test_the_pooled_numbers_of_a_report_equal_scikit_learn():
    study = simulated(100, seed=5)
    found = evaluate(study, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = oracle(study.labels, study.scores, study.scores >= 0.5, np.ones(len(study.labels)))
    point = found["operating_points"][0]["pooled"] | found["score_metrics"]["pooled"]
    for name in set(METRICS) - {"ece"}:
        assert point[name]["value"] == pytest.approx(expected[name]), name
