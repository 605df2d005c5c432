"""Reliability, temperature and curves against scikit-learn and by hand."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, precision_recall_curve, roc_curve
from support.studies import simulated, study_of

from raycv.evaluation.calibration import (
    band,
    calibration_section,
    curve,
    cuts_of,
    fit_temperature,
    histogram,
    logit,
    recalibrated,
    reliability,
    sweep,
)


def test_reliability_equals_scikit_learn_in_the_bins_that_have_pairs():
    study = simulated(200, seed=1)
    rows = reliability(study.labels, study.scores)
    shares, means = calibration_curve(study.labels, study.scores, n_bins=10)
    filled = [row for row in rows if row["pairs"]]
    assert [row["share_matched"] for row in filled] == pytest.approx(list(shares))
    assert [row["mean_score"] for row in filled] == pytest.approx(list(means))
    assert sum(row["pairs"] for row in rows) == len(study.labels)


def test_the_last_bin_holds_the_score_one_and_empty_bins_stay():
    rows = reliability(np.array([1, 1, 0]), np.array([1.0, 0.95, 0.0]))
    assert len(rows) == 10
    assert (rows[9]["pairs"], rows[9]["matched"], rows[9]["share_matched"]) == (2, 2, 1.0)
    assert rows[4] == {"from": 0.4, "to": 0.5, "pairs": 0, "matched": 0, "mean_score": None, "share_matched": None}


def test_temperature_equals_scikit_learn():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 3))
    labels = (features[:, 0] + rng.normal(size=400) > 0).astype(int)
    # Three times the slope: too sure of itself, as networks are.
    model = LogisticRegression(C=1e6).fit(features, labels)
    model.coef_ = 3 * model.coef_
    scaled = CalibratedClassifierCV(FrozenEstimator(model), method="temperature", cv=2, ensemble=False)
    scaled.fit(features, labels)
    scores = model.predict_proba(features)[:, 1]
    ours = 1 / (1 + np.exp(-model.decision_function(features) / fit_temperature(labels, scores)))
    assert ours == pytest.approx(scaled.predict_proba(features)[:, 1], abs=2e-3)


def test_a_known_temperature_is_found_again_on_the_other_folds():
    study = simulated(400, seed=2)
    rng = np.random.default_rng(0)
    labels = (rng.random(len(study.scores)) < study.scores).astype(np.int8)
    sharp = 1 / (1 + np.exp(-3 * logit(study.scores)))
    study = replace(study, labels=labels, scores=sharp)
    scores, temperatures = recalibrated(study)
    assert temperatures == pytest.approx([3] * 5, rel=0.15)
    first = study.fold == 0
    assert temperatures[0] == fit_temperature(study.labels[~first], study.scores[~first])
    found = calibration_section(study, 200, 42)
    assert found["before"]["brier"]["value"] == pytest.approx(brier_score_loss(labels, sharp))
    assert found["after"]["brier"]["value"] == pytest.approx(brier_score_loss(labels, scores))
    assert found["change"]["brier"]["fixed"]["high"] < 0
    assert found["after"]["ece"]["value"] < found["before"]["ece"]["value"] / 3
    share = labels.mean()
    reference = brier_score_loss(labels, np.full(len(labels), share))
    skill = 1 - brier_score_loss(labels, sharp) / reference
    assert found["before"]["brier_skill"]["value"] == pytest.approx(skill)


def test_scores_of_exactly_zero_and_one_have_a_temperature():
    found = fit_temperature(np.array([0, 1, 1, 0]), np.array([0.0, 1.0, 0.0, 1.0]))
    assert np.isfinite(found)


def test_curves_are_those_of_scikit_learn_and_monotone():
    study = simulated(20, criteria=4, seed=3)
    found = curve(study.labels, study.scores)
    false, recall, cuts = roc_curve(study.labels, study.scores, drop_intermediate=False)
    at = dict(zip(cuts, zip(false, recall, strict=True), strict=True))
    points = zip(found["cut"], found["false_positive_rate"], found["recall"], strict=True)
    assert all(at[cut] == pytest.approx(point) for cut, *point in points if cut)
    precisions, recalls, cuts = precision_recall_curve(study.labels, study.scores)
    known = dict(zip(cuts, zip(precisions[:-1], recalls[:-1], strict=True), strict=True))
    points = zip(found["cut"], found["precision"], found["recall"], strict=True)
    assert all(known[cut] == pytest.approx(point) for cut, *point in points if cut)
    for name in ("recall", "false_positive_rate"):
        assert np.all(np.diff(found[name]) >= 0)
    assert (found["recall"][-1], found["false_positive_rate"][-1]) == (1, 1)


def test_a_long_curve_has_about_two_hundred_points_close_to_each_other():
    study = simulated(2000, seed=3)
    found = curve(study.labels, study.scores)
    assert len(found["cut"]) <= 202
    for name in ("recall", "false_positive_rate"):
        assert np.diff([0.0, *found[name]]).max() < 0.02


def test_a_curve_without_matched_pairs_is_undefined():
    found = curve(np.zeros(3, dtype=int), np.array([0.1, 0.2, 0.3]))
    assert set(found["recall"]) == {None}
    assert found["false_positive_rate"][-1] == 1


def test_constant_scores_have_curves_and_a_band():
    study = study_of([0, 1] * 10, [0.5] * 20, [0, 0, 1, 1] * 5)
    assert cuts_of(study.labels, study.scores).tolist() == [0, 0.5]
    found = band(study, 100, 1)
    assert found["recall_low"][25] == found["recall_high"][25] == pytest.approx(0.5)
    assert found["precision_low"][25] < 0.5 < found["precision_high"][25]


def test_the_band_holds_the_curve_and_grows_with_fewer_posts():
    wide, narrow = (band(simulated(posts, seed=4), 200, 1) for posts in (60, 600))
    for key in ("recall", "precision"):
        low, high = (np.array(narrow[f"{key}_{end}"]) for end in ("low", "high"))
        assert np.all(low <= high)
        width = np.array(wide[f"{key}_high"]) - np.array(wide[f"{key}_low"])
        assert width[10:40].mean() > 2 * (high - low)[10:40].mean()
    study = simulated(600, seed=4)
    false, recall, _ = roc_curve(study.labels, study.scores)
    there = np.interp(narrow["grid"], false, recall)
    assert np.all(there >= np.array(narrow["recall_low"]) - 0.02)
    assert np.all(there <= np.array(narrow["recall_high"]) + 0.02)


def test_sweep_and_histogram_count_every_pair():
    study = simulated(50, seed=5)
    swept, bars = sweep(study), histogram(study)
    assert swept["pooled"]["recall"][0] == 1
    assert swept["pooled"]["precision"][0] == pytest.approx(study.labels.mean())
    assert len(swept["folds"]) == 5
    assert sum(bars["matched"]) == study.labels.sum()
    assert sum(bars["unmatched"]) == (study.labels == 0).sum()
