"""Thresholds and epochs against loops over scikit-learn, and hand-worked choices."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score
from support.studies import richest, simulated, study_of

from raycv.evaluation.bootstrap import resample, weights_of_draws
from raycv.evaluation.evaluate import evaluate
from raycv.evaluation.operating_points import Measurement, at_cross_epochs, choose_epochs, epochs_of
from raycv.training.metrics import tune_threshold


def point(found, name):
    return next(one for one in found["operating_points"] if one["name"] == name)


def test_each_rule_takes_the_threshold_that_it_names():
    study = simulated(80, criteria=4, seed=1)
    rules = Measurement(study, study.scores).thresholds
    for fold in range(study.folds):
        own = study.fold == fold
        assert rules["fixed"][fold] == 0.5
        assert rules["tuned_in_fold"][fold] == tune_threshold(study.labels[own], study.scores[own])
        assert rules["cross_fold"][fold] == tune_threshold(study.labels[~own], study.scores[~own])
        assert rules["pooled"][fold] == tune_threshold(study.labels, study.scores)


def test_thresholds_are_chosen_again_in_every_draw():
    study = simulated(30, criteria=3, seed=2)
    samples = resample(Measurement(study, study.scores), 30, 90, draws=20, seed=5)
    weights = next(weights_of_draws(30, 20, 5, 20))
    for draw in range(20):
        rows = np.repeat(np.arange(90), weights[study.post, draw].astype(int))
        labels, scores, fold = study.labels[rows], study.scores[rows], study.fold[rows]
        for rule in ("tuned_in_fold", "cross_fold"):
            chosen = np.full(study.folds, 2.0)
            for k in np.unique(fold) if rule == "tuned_in_fold" else range(study.folds):
                part = (fold == k) if rule == "tuned_in_fold" else (fold != k)
                chosen[k] = tune_threshold(labels[part], scores[part])
            expected = f1_score(labels, scores >= chosen[fold])
            if rule == "cross_fold":
                # The draw's error at the thresholds that it chose, added to the estimate.
                there = f1_score(study.labels, study.scores >= chosen[study.fold])
                estimate = samples.estimate["cross_fold.fixed.pooled.f1"]
                expected = np.clip(expected - there + estimate, 0, 1)
            assert samples.draws[f"{rule}.reselected.pooled.f1"][draw] == pytest.approx(expected), rule


def test_no_threshold_is_a_mean_of_thresholds():
    """Fold 0 separates at 0.2, fold 1 at 0.8. The mean 0.5 is nobody's choice."""
    labels = [0, 0, 1, 1, 0, 0, 1, 1]
    scores = [0.1, 0.15, 0.2, 0.3, 0.7, 0.75, 0.8, 0.9]
    rules = Measurement(study := study_of(labels, scores, [0] * 4 + [1] * 4), study.scores).thresholds
    assert rules["tuned_in_fold"].tolist() == [0.2, 0.76]
    assert rules["cross_fold"].tolist() == [0.76, 0.2]
    assert rules["pooled"].tolist() == [0.2, 0.2]


def test_optimism_is_the_difference_to_the_more_honest_point():
    found = evaluate(richest(), 100)
    tuned, cross, later = (point(found, name) for name in ("tuned_in_fold", "cross_fold", "cross_fold_epoch"))
    for average in ("pooled", "fold_mean"):
        for flattered, honest in ((tuned, cross), (cross, later)):
            assert flattered["optimism"]["than"] == honest["name"]
            difference = flattered[average]["f1"]["value"] - honest[average]["f1"]["value"]
            assert flattered["optimism"][average]["value"] == pytest.approx(difference, abs=1e-9)
    assert point(found, "fixed")["optimism"] is None


def test_epochs_by_hand():
    """Fold 2 stopped after two epochs and holds 0.5.

    Means of the others: for fold 0 .35 .45 .55, for fold 1 .4 .55 .45, for fold 2 .35 .4 .4 (the earlier counts).
    """
    epochs = choose_epochs([[0.4, 0.6, 0.4], [0.3, 0.2, 0.4], [0.4, 0.5]])
    assert epochs.own == [1, 2, 1]
    assert epochs.chosen == [2, 1, 1]
    assert epochs.cross == [2, 1, 1]
    # The others would take the third epoch, and the fold has only two.
    assert choose_epochs([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.4, 0.5]]).cross == [2, 2, 1]


def test_epochs_come_from_scores_or_else_from_the_history():
    study = richest()
    recorded = epochs_of(study)
    for fold, scores in enumerate(study.epoch_scores):
        labels = study.labels[study.fold == fold]
        expected = [f1_score(labels, each >= tune_threshold(labels, each)) for each in scores]
        assert recorded.f1[fold] == pytest.approx(expected)
    history = [[{"f1": f1, "roc_auc": 0.5} for f1 in fold] for fold in recorded.f1]
    older = replace(study, epoch_scores=None, history=history)
    assert epochs_of(older) == recorded
    found = evaluate(older, 20)
    assert found["epochs"]["source"] == "history"
    assert found["epochs"]["f1"] == evaluate(study, 20)["epochs"]["f1"]
    assert "cross_fold_epoch" not in [one["name"] for one in found["operating_points"]]


def test_a_fold_is_judged_at_epoch_and_threshold_of_the_others():
    study = richest()
    epochs = epochs_of(study)
    scores, thresholds = at_cross_epochs(study, epochs)
    for fold, epoch in enumerate(epochs.chosen):
        others = [other for other in range(study.folds) if other != fold]
        labels = np.concatenate([study.labels[study.fold == other] for other in others])
        theirs = np.concatenate([study.epoch_scores[other][epoch] for other in others])
        assert thresholds[fold] == tune_threshold(labels, theirs)
        assert np.array_equal(scores[study.fold == fold], study.epoch_scores[fold][epoch])
