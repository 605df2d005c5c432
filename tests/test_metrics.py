"""Threshold and metrics against scikit-learn's own functions, a brute force, and numbers worked by hand."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

from raycv.training.metrics import (
    METRICS,
    all_matched_f1,
    binary_metrics,
    collapse_reasons,
    highest_chance_auc,
    tune_threshold,
)

THRESHOLDS = [step / 100 for step in range(101)]

# Scores on and beside the thresholds, and anywhere.
SCORE = st.one_of(
    st.floats(0, 1),
    st.integers(0, 100).map(lambda step: step / 100),
    st.integers(1, 99).map(lambda step: np.nextafter(step / 100, 0)),
)
SCORED = st.lists(st.tuples(st.sampled_from([0, 0, 1]), SCORE), min_size=1, max_size=25).filter(
    lambda rows: any(label for label, _ in rows)
)


def arrays(rows: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([label for label, _ in rows]), np.array([score for _, score in rows], dtype=np.float64)


def swept(labels: np.ndarray, scores: np.ndarray) -> list[float]:
    return [float(f1_score(labels, scores >= threshold, zero_division=0)) for threshold in THRESHOLDS]


def closest(best: list[float]) -> float:
    """The tie rule: closest to 0.5 in hundredths, then the lower."""
    return min(best, key=lambda t: (abs(round(100 * t) - 50), t))


@given(SCORED)
@settings(max_examples=5, deadline=None)
@pytest.mark.long
def test_threshold_equals_brute_force_with_scikit_learn(rows: list[tuple[int, float]]) -> None:
    labels, scores = arrays(rows)
    f1 = swept(labels, scores)
    best = [t for t, value in zip(THRESHOLDS, f1, strict=True) if value > max(f1) - 1e-12]
    assert tune_threshold(labels, scores) == closest(best)


@given(SCORED)
@settings(max_examples=50, deadline=None)
@pytest.mark.long
def test_threshold_equals_brute_force_in_fractions(rows: list[tuple[int, float]]) -> None:
    def f1(threshold: float) -> Fraction:
        predicted = [label for label, score in rows if score >= threshold]
        return Fraction(2 * sum(predicted), len(predicted) + sum(label for label, _ in rows))

    sweep = {threshold: f1(threshold) for threshold in THRESHOLDS}
    best = [threshold for threshold, value in sweep.items() if value == max(sweep.values())]
    assert tune_threshold(*arrays(rows)) == closest(best)


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        # F1 is 1 for 0.21..0.80, and 0.5 is among them
        ([0, 1], [0.2, 0.8], 0.5),
        # best for t > 0.6 only: the closest to 0.5
        ([0, 1], [0.6, 0.9], 0.61),
        # best for 0.11..0.3: the closest is the highest
        ([0, 1], [0.1, 0.3], 0.3),
        # 0.50 loses: best are 0.00..0.49 (both found, F1 0.8) and 0.51..0.52 (one of two, but no false alarm, 0.667)
        ([0, 1, 1], [0.495, 0.49, 0.525], 0.49),
        # best, with F1 2/3, are 0.49 (both found, two false alarms), 0.51 and 0.52 (one found, none): of 0.49 and 0.51,
        # which are equally close, the lower
        ([1, 0, 0, 1, 0], [0.52, 0.505, 0.495, 0.495, 0.485], 0.49),
        # the same with 0.43 and 0.57, which lie 0.07 from 0.5 in hundredths but not in binary fractions
        ([1, 0, 0, 1, 0], [0.57, 0.565, 0.435, 0.435, 0.425], 0.43),
        # only 1.00 tells them apart
        ([0, 1], [0.995, 1.0], 1.0),
        # nothing to tell apart: 0.5 finds all
        ([0, 1, 1], [0.7, 0.7, 0.7], 0.5),
        # all at 0: only 0.00 finds any
        ([0, 1], [0.0, 0.0], 0.0),
        # all at 1
        ([0, 1], [1.0, 1.0], 0.5),
        # a score at the threshold counts as matched
        ([0, 1], [0.6, 0.61], 0.61),
        ([0, 1], [0.4, 0.41], 0.41),
    ],
)
def test_threshold_by_hand(labels: list[int], scores: list[float], expected: float) -> None:
    assert tune_threshold(np.array(labels), np.array(scores)) == expected


def test_float32_scores_mean_the_same_to_the_sweep_and_to_the_metrics() -> None:
    """0.69 in float32 lies below 0.69, and NumPy compares an array of float32 with a number in float32."""
    labels, scores = np.array([1, 0]), np.array([0.7, 0.69], dtype=np.float32)
    threshold = tune_threshold(labels, scores)
    assert threshold == tune_threshold(labels, scores.astype(np.float64))
    assert binary_metrics(labels, scores, threshold) == binary_metrics(labels, scores.astype(np.float64), threshold)


@given(SCORED)
@settings(max_examples=15, deadline=None)
def test_metrics_at_the_tuned_threshold_are_the_best_there_are(rows: list[tuple[int, float]]) -> None:
    labels, scores = arrays([*rows, (0, 0.3)])
    metrics = binary_metrics(labels, scores, tune_threshold(labels, scores))
    assert metrics["f1"] >= max(binary_metrics(labels, scores, t)["f1"] for t in (0.0, 0.3, 0.49, 0.5, 0.51, 1.0))
    assert all(type(value) is float and 0 <= value <= 1 for value in metrics.values())


def test_metrics_by_hand() -> None:
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    scores = np.array([0.9, 0.6, 0.2, 0.7, 0.6, 0.3, 0.1, 0.0])
    metrics = binary_metrics(labels, scores, 0.6)

    # matched at >= 0.6: 0.9, 0.6 rightly, 0.7, 0.6 wrongly; missed: 0.2
    assert tuple(metrics) == METRICS == ("precision", "recall", "f1", "accuracy", "roc_auc")
    assert metrics["precision"] == pytest.approx(2 / 4)
    assert metrics["recall"] == pytest.approx(2 / 3)
    assert metrics["f1"] == pytest.approx(4 / 7)
    assert metrics["accuracy"] == pytest.approx(5 / 8)
    # of 15 couples of a matched and an unmatched pair, in order: 5 + (3 and a tie) + 2 = 10.5
    assert metrics["roc_auc"] == pytest.approx(10.5 / 15)


@given(SCORED, st.sampled_from(THRESHOLDS))
@settings(max_examples=25, deadline=None)
def test_metrics_equal_scikit_learn(rows: list[tuple[int, float]], threshold: float) -> None:
    labels, scores = arrays([*rows, (0, 0.5)])
    predicted = [int(score >= threshold) for score in scores]
    assert binary_metrics(labels, scores, threshold) == {
        "precision": pytest.approx(precision_score(labels, predicted, zero_division=0)),
        "recall": pytest.approx(recall_score(labels, predicted)),
        "f1": pytest.approx(f1_score(labels, predicted)),
        "accuracy": pytest.approx(accuracy_score(labels, predicted)),
        "roc_auc": pytest.approx(roc_auc_score(labels, scores)),
    }


def test_nothing_predicted_matched(recwarn: pytest.WarningsRecorder) -> None:
    metrics = binary_metrics(np.array([1, 0]), np.array([0.4, 0.3]), 0.5)
    assert metrics == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 0.5, "roc_auc": 1.0}
    assert not recwarn.list


def test_all_scores_equal_say_nothing() -> None:
    metrics = binary_metrics(np.array([1, 0, 0, 0]), np.full(4, 0.5), 0.5)
    assert metrics == {
        "precision": 0.25,
        "recall": 1.0,
        "f1": pytest.approx(0.4),
        "accuracy": 0.25,
        "roc_auc": 0.5,
    }


def test_score_at_the_threshold_is_matched() -> None:
    labels, scores = np.array([1, 0]), np.array([0.29, 0.28])
    assert binary_metrics(labels, scores, 0.29)["f1"] == 1.0
    assert binary_metrics(labels, scores, 0.28)["precision"] == 0.5
    assert binary_metrics(labels, scores, np.nextafter(0.29, 1))["recall"] == 0.0


# --- A classifier that tells nothing ---------------------------------------------------------------------------------

ONE_LABEL, FLOOR, CHANCE, SPREAD = "get the label", "is not above", "is within chance", "hardly vary"


def signs(labels: np.ndarray, scores: np.ndarray, threshold: float) -> list[str]:
    """Which of the four signs of a collapse are named."""
    metrics = binary_metrics(labels, scores, threshold)
    reasons = collapse_reasons(metrics, int(labels.sum()), len(labels), scores, labels)
    return [next(sign for sign in (ONE_LABEL, FLOOR, CHANCE, SPREAD) if sign in reason) for reason in reasons]


def drawn_scores(pairs: int, matched: int, low: float, high: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores of which those of matched pairs lie `shift` of the way higher."""
    labels = (np.arange(pairs) < matched).astype(int)
    noise = np.random.default_rng(0).random(pairs)
    return labels, low + (high - low) * (noise + shift * labels) / (1 + shift)


def test_a_random_model_with_some_order_in_its_scores_is_marked() -> None:
    """An untrained BERT: all 495 pairs matched, F1 0.173, ROC-AUC 0.58."""
    labels, scores = drawn_scores(495, 47, 0.500, 0.503, 0.1)
    metrics = binary_metrics(labels, scores, tune_threshold(labels, scores))
    assert 0.55 < metrics["roc_auc"] < 0.65
    assert metrics["f1"] == pytest.approx(f1_score(labels, np.ones(495)))
    reasons = collapse_reasons(metrics, 47, 495, scores, labels)
    assert reasons == [
        "all 495 pairs get the label matched",
        "F1 0.173 is not above 0.173, which the label matched for all pairs gives",
        f"the scores hardly vary (from {scores.min():.4f} to {scores.max():.4f}): "
        f"their standard deviation {np.std(scores):.5f} is below 0.005",
    ]
    # Of an earlier version's fold there are the metrics alone.
    assert collapse_reasons(metrics, 47, 495) == reasons[:2]


@pytest.mark.parametrize(
    ("scores", "threshold", "marks"),
    [
        (np.full(200, 0.5), 0.25, [ONE_LABEL, FLOOR, CHANCE, SPREAD]),
        (np.random.default_rng(0).random(200) * 1e-3 + 0.5, 0.25, [ONE_LABEL, FLOOR, CHANCE, SPREAD]),
        # One label for all is marked even where the scores order the pairs without a fault.
        (np.linspace(0.5, 0.501, 200), 0.25, [ONE_LABEL, FLOOR, SPREAD]),
        (np.linspace(0.1, 0.9, 200), 0.05, [ONE_LABEL, FLOOR]),
        (np.linspace(0.1, 0.9, 200), 0.95, [ONE_LABEL, FLOOR]),
        # Both labels, F1 below the floor, and an order that is worse than chance.
        (np.linspace(0.9, 0.1, 200), 0.5, [FLOOR, CHANCE]),
        # All but one under one label, by chance; the same scores in order.
        (np.append(np.random.default_rng(0).random(199) / 2 + 0.5, 0.9)[::-1], 0.501, [ONE_LABEL, FLOOR, CHANCE]),
        (np.linspace(0.1, 0.9, 200), 0.104, []),
        # A threshold that tells the pairs apart does not make equal scores differ; one odd pair does not either.
        (np.linspace(0.499, 0.5005, 200), 0.5, [SPREAD]),
        (np.append(np.linspace(0.499, 0.5005, 199), 0.56), 0.5, [SPREAD]),
        # Chance with both labels, at a threshold whose F1 is above the floor; a good model.
        (np.random.default_rng(1).random(200), 0.18, [CHANCE]),
        (np.linspace(0.1, 0.9, 200), 0.7, []),
    ],
)
def test_what_counts_as_collapsed(scores: np.ndarray, threshold: float, marks: list[str]) -> None:
    assert signs((np.arange(200) >= 150).astype(int), scores, threshold) == marks


def test_a_rare_class_that_is_found_is_no_collapse() -> None:
    """Nearly all pairs get one label, rightly."""
    labels = (np.arange(2000) < 3).astype(int)
    assert signs(labels, np.where(labels == 1, 0.9, 0.1), 0.5) == []
    # Three matched pairs among thousands hardly move the deviation of the scores.
    rare = (np.arange(2672) < 3).astype(int)
    low = np.random.default_rng(0).uniform(0.001, 0.004, 2672)
    assert signs(rare, np.where(rare == 1, 0.13, low), 0.1) == []
    assert signs(*drawn_scores(2672, 257, 0.012, 0.03, 1.0), 0.02) == []
    # Hesitant scores of a good model vary more than useless ones.
    assert signs(*drawn_scores(495, 47, 0.30, 0.36, 1.0), 0.33) == []


@pytest.mark.parametrize(("pairs", "matched"), [(495, 47), (198, 18), (200, 4)])
def test_one_useless_classifier_in_twenty_ranks_above_chance(pairs: int, matched: int) -> None:
    labels, generator = (np.arange(pairs) < matched).astype(int), np.random.default_rng(0)
    drawn = [roc_auc_score(labels, generator.random(pairs)) for _ in range(500)]
    above = np.mean(np.array(drawn) > highest_chance_auc(matched, pairs))
    # Within three standard errors of 0.05, which are 0.029 for 500 draws.
    assert 0.021 < above < 0.079


@given(SCORED, st.sampled_from(THRESHOLDS))
@settings(max_examples=50, deadline=None)
@pytest.mark.long
def test_the_marks_are_those_of_scikit_learn_and_numpy(rows: list[tuple[int, float]], threshold: float) -> None:
    labels, scores = arrays([*rows, (0, 0.5)])
    predicted = (scores >= threshold).astype(int)
    floor = f1_score(labels, np.ones(len(labels)))
    assert all_matched_f1(labels.mean()) == pytest.approx(floor)
    expected = {
        ONE_LABEL: len(set(predicted)) == 1,
        FLOOR: f1_score(labels, predicted, zero_division=0) <= floor + 1e-9,
        CHANCE: roc_auc_score(labels, scores) <= highest_chance_auc(int(labels.sum()), len(labels)),
        SPREAD: np.std(scores) < 0.005 and np.mean(scores[labels == 1]) - np.mean(scores[labels == 0]) < 0.005,
    }
    assert signs(labels, scores, threshold) == [sign for sign, marked in expected.items() if marked]
