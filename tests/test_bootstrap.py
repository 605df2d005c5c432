"""Intervals and tests against SciPy, closed testing, hand-worked tables, and simulations with a known truth."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from support.studies import simulated, study_of

from raycv.evaluation.bootstrap import (
    Samples,
    corrected_t,
    fold_mean,
    holm,
    interval,
    number,
    p_value,
    resample,
    weights_of_draws,
)
from raycv.evaluation.comparison import compare
from raycv.evaluation.evaluate import evaluate
from raycv.evaluation.operating_points import Measurement
from raycv.training.metrics import tune_threshold


def samples_of(study, draws, seed=42):
    return resample(Measurement(study, study.scores), len(study.post_ids), len(study.labels), draws=draws, seed=seed)


def rows_of(study, posts):
    """The rows of drawn posts, a post's rows as often as it was drawn."""
    of_post = {post: np.flatnonzero(study.post == post) for post in range(len(study.post_ids))}
    return np.concatenate([of_post[post] for post in posts])


def by_scipy(study, statistic, draws, seed):
    """SciPy's percentile bootstrap over post indices."""
    return stats.bootstrap(
        (np.arange(len(study.post_ids)),),
        lambda posts: statistic(rows_of(study, posts.astype(int))),
        n_resamples=draws, vectorized=False, method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip


def cross_fold_f1(study):
    """F1 of drawn rows at their thresholds, minus that of the study at the same ones, plus the estimate.

    So the noise of the posts counts once.
    """

    def thresholds(rows):
        labels, scores, fold = study.labels[rows], study.scores[rows], study.fold[rows]
        return np.array([tune_threshold(labels[fold != k], scores[fold != k]) for k in range(study.folds)])

    def f1(rows, chosen):
        return f1_score(study.labels[rows], study.scores[rows] >= chosen[study.fold[rows]])

    every = np.arange(len(study.labels))
    estimate = f1(every, thresholds(every))
    return lambda rows: f1(rows, thresholds(rows)) - f1(every, thresholds(rows)) + estimate


@pytest.mark.long
def test_intervals_equal_scipy_on_post_indices():
    study = simulated(40, criteria=3, seed=1)
    samples = samples_of(study, 150, seed=7)
    called = study.scores >= 0.5
    cases = {
        "fixed.fixed.pooled.f1": lambda rows: f1_score(study.labels[rows], called[rows]),
        "cross_fold.reselected.pooled.f1": cross_fold_f1(study),
        "scores.pooled.roc_auc": lambda rows: roc_auc_score(study.labels[rows], study.scores[rows]),
        "scores.pooled.average_precision": lambda rows: average_precision_score(study.labels[rows], study.scores[rows]),
        "scores.pooled.brier": lambda rows: ((study.labels - study.scores)[rows] ** 2).mean(),
    }
    for name, statistic in cases.items():
        oracle = by_scipy(study, statistic, 150, 7)
        ends = interval(samples.draws[name])
        assert samples.draws[name] == pytest.approx(oracle.bootstrap_distribution), name
        assert (ends["low"], ends["high"]) == pytest.approx(tuple(oracle.confidence_interval)), name
        assert ends["low"] <= samples.estimate[name] <= ends["high"], name


def test_draws_do_not_depend_on_the_size_of_a_chunk():
    whole = np.concatenate(list(weights_of_draws(50, 40, 3, 40)), axis=1)
    parts = np.concatenate(list(weights_of_draws(50, 40, 3, 7)), axis=1)
    assert np.array_equal(whole, parts)
    assert (whole.sum(axis=0) == 50).all()


def repeated(study, times):
    """Every criterion that often, under another id: more pairs of the same posts, and no more information."""
    criteria = len(study.criterion_ids)
    return study_of(
        np.tile(study.labels, times), np.tile(study.scores, times), np.tile(study.fold, times),
        np.tile(study.post, times), np.concatenate([study.criterion + copy * criteria for copy in range(times)]),
    )  # fmt: skip


def test_duplicating_pairs_within_posts_does_not_narrow_intervals():
    study = simulated(60, criteria=3, seed=2)
    once, thrice = samples_of(study, 300), samples_of(repeated(study, 3), 300)
    for name in ("cross_fold.fixed.pooled.f1", "cross_fold.reselected.pooled.f1", "scores.pooled.roc_auc"):
        assert thrice.draws[name] == pytest.approx(once.draws[name], abs=1e-12)


def test_the_interval_over_posts_is_wider_than_one_over_pairs():
    study = simulated(120, criteria=9, seed=4)
    rows = np.arange(len(study.labels))
    alone = study_of(study.labels, study.scores, study.fold, rows)
    wide, narrow = (samples_of(one, 400).draws["fixed.fixed.pooled.precision"] for one in (study, alone))
    assert wide.std() > 1.1 * narrow.std()


def test_a_perfect_classifier_has_a_marked_interval_without_width():
    study = simulated(60, criteria=3, seed=2)
    perfect = type(study)(**{**vars(study), "scores": study.labels.astype(float)})
    found = number(samples_of(perfect, 100), "cross_fold.fixed.pooled.f1")
    assert found == {"value": 1.0, "fixed": {"low": 1.0, "high": 1.0, "undefined_draws": 0, "constant": True}}


def test_undefined_draws_are_counted_and_above_five_percent_end_the_interval():
    values = np.linspace(0, 1, 100)
    few, many = values.copy(), values.copy()
    few[:5], many[:6] = np.nan, np.nan
    assert interval(few)["undefined_draws"] == 5
    assert interval(few)["low"] == pytest.approx(np.quantile(values[5:], 0.025))
    assert interval(many) == {"low": None, "high": None, "undefined_draws": 6, "constant": False}
    # A single post with matched pairs is missing from about a third of the draws.
    study = study_of(
        [1, 0, 0, 0, 1, 0], [0.9, 0.2, 0.1, 0.3, 0.8, 0.1], [0, 0, 1, 1, 0, 1], [0, 1, 2, 3, 0, 3], [0, 0, 0, 0, 1, 1]
    )
    ends = interval(samples_of(study, 500).draws["scores.pooled.roc_auc"])
    assert ends["low"] is None
    assert ends["undefined_draws"] / 500 == pytest.approx((3 / 4) ** 4, abs=0.06)


def five_folds(values):
    return Samples({"f1": np.array(values)}, {"f1": np.repeat(np.array(values)[:, None], 10, axis=1)})


def test_five_folds_by_hand():
    """Mean 0.6; squared distances 0.01 + 0.0025 + 0 + 0.0025 + 0.01 over 4 give the sample deviation."""
    found = fold_mean(five_folds([0.5, 0.55, 0.6, 0.65, 0.7]), "f1")
    assert found["value"] == pytest.approx(0.6)
    assert found["sd"] == pytest.approx(0.00625**0.5)
    half = 2.7764451051977934 * (0.00625 * (1 / 5 + 1 / 4)) ** 0.5
    assert (found["corrected_t"]["low"], found["corrected_t"]["high"]) == pytest.approx((0.6 - half, 0.6 + half))
    assert found["folds"] == [0.5, 0.55, 0.6, 0.65, 0.7]
    assert found["undefined"] == 0


def test_an_undefined_fold_is_counted_and_not_averaged_as_zero():
    found = fold_mean(five_folds([0.5, np.nan, 0.7, 0.6, 0.6]), "f1")
    assert found["value"] == pytest.approx(0.6)
    assert found["undefined"] == 1
    assert found["folds"][1] is None
    assert found["corrected_t"] == {"low": None, "high": None, "p": None, "df": 4}


def test_deviation_is_called_one_and_not_an_interval():
    averages = evaluate(simulated(40), 20)["methods"]["averages"]
    assert "sample standard deviation over the folds, not an interval" in averages["fold_mean"]


def test_corrected_t_widens_the_t_test_of_scipy_by_its_factor():
    values = [0.03, 0.05, -0.01, 0.04, 0.02]
    plain = stats.ttest_1samp(values, 0)
    factor = ((1 / 5 + 1 / 4) / (1 / 5)) ** 0.5
    found = corrected_t(values)
    assert found["p"] == pytest.approx(2 * stats.t.sf(plain.statistic / factor, 4))
    ends = plain.confidence_interval(0.95)
    assert found["high"] - found["low"] == pytest.approx(factor * (ends.high - ends.low))
    mirrored = corrected_t([-value for value in values])
    assert (mirrored["low"], mirrored["high"], mirrored["p"]) == pytest.approx(
        (-found["high"], -found["low"], found["p"])
    )
    assert corrected_t([0.0] * 5)["p"] == 1
    assert corrected_t([0.1] * 5)["p"] == 0


def closed_testing(values):
    """Holm as the closure of Bonferroni: the hardest set of hypotheses that contains each one."""
    every = range(len(values))
    sets = [part for size in range(1, len(values) + 1) for part in combinations(every, size)]
    return [max(min(1, len(part) * min(values[i] for i in part)) for part in sets if one in part) for one in every]


def test_holm_equals_closed_testing():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = list(np.round(rng.random(6) ** 3, 2))
        assert holm(values) == pytest.approx(closed_testing(values))
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_an_untestable_criterion_stays_in_the_count_and_poisons_no_other():
    assert holm([0.01, None, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06)]
    assert holm([None, None]) == [None, None]


def test_p_values_are_two_sided_and_mirror():
    draws = np.concatenate([np.full(20, -0.1), np.full(980, 0.2)])
    assert p_value(draws) == p_value(-draws) == pytest.approx(2 * 21 / 1001)
    assert p_value(np.zeros(100)) == 1
    assert p_value(np.concatenate([np.full(10, np.nan), np.ones(90)])) is None


def test_corrected_t_stays_within_the_range_of_the_metric_and_of_a_difference():
    """Two folds that differ give a t of 12.7 times the error, far beyond any possible value."""
    study = simulated(30, folds=2, seed=5)
    found = evaluate(study, 50)
    point = next(row for row in found["operating_points"] if row["name"] == "cross_fold")
    averages = {**point["fold_mean"], **found["score_metrics"]["fold_mean"]}
    ends = {name: (row["corrected_t"]["low"], row["corrected_t"]["high"]) for name, row in averages.items()}
    for name, (low, high) in ends.items():
        assert (-1 if name == "mcc" else 0) <= low <= high <= 1
    assert any(low == 0 or high == 1 for low, high in ends.values())
    assert any(low < 0 for name, (low, _) in ends.items() if name == "mcc")
    one, other = (
        Samples({"folds.mcc": ends, "folds.f1": abs(ends)}, {"folds.mcc": draws, "folds.f1": draws})
        for ends in (np.array([0.9, -0.9]), np.array([-0.9, 0.8]))
        for draws in (np.zeros((2, 5)),)
    )
    mcc, f1 = (fold_mean(one.minus(other), name)["corrected_t"] for name in ("folds.mcc", "folds.f1"))
    assert (mcc["low"], mcc["high"]) == (-2, 2)
    assert -1 <= f1["low"] <= f1["high"] <= 1


def test_calibration_error_has_no_bootstrap_interval_anywhere():
    def walk(value, name=""):
        if isinstance(value, dict):
            if name == "ece":
                assert value.get("fixed") is None, value
            for key, inner in value.items():
                yield from walk(inner, key)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner)
        yield name

    studies = [simulated(30, seed=1), simulated(30, seed=1)]
    found = evaluate(studies[0], 50)
    compared = compare([replace(one, run=run) for one, run in zip(studies, ("a", "b"), strict=True)], draws=50)
    assert list(walk(found)).count("ece") > 5
    assert list(walk(compared)).count("ece") > 2
    assert found["score_metrics"]["pooled"]["brier"]["fixed"] is not None
