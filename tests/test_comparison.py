"""Comparisons: proof of equal pairs, differences against loops, mirror images, words."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score
from support.refusals import refuses
from support.studies import simulated, study_of

from raycv.analysis.comparison import given_study
from raycv.evaluation.bootstrap import resample, weights_of_draws
from raycv.evaluation.comparison import compare, detectable, flipped
from raycv.evaluation.operating_points import Measurement

DRAWS = 300


def run(name, separation, seed=0, posts=120):
    """Runs of one seed share labels and folds; `separation` says how good a run is."""
    truth = simulated(posts, seed=0)
    rng = np.random.default_rng(seed + 100)
    logit = separation * truth.labels - 2 + rng.normal(size=len(truth.labels))
    return replace(truth, run=name, scores=1 / (1 + np.exp(-logit)))


def test_a_better_run_is_better_by_an_interval_in_words():
    found = compare([run("weak", 1.0), run("strong", 3.0, seed=1)], draws=DRAWS)
    (row,) = found["comparisons"]
    f1 = row["pooled"]["f1"]
    assert row["better"]
    assert row["shown"]
    ends = f"{f1['reselected']['low']:.3f} to {f1['reselected']['high']:.3f}"
    assert row["sentence"] == f"strong is better than weak in F1 by {f1['value']:.3f} ({ends})."
    assert found["best"] == "strong"
    assert found["tied"] == ["strong"]
    worse = compare([run("weak", 1.0), run("strong", 3.0, seed=1)], baseline="strong", draws=DRAWS)
    assert worse["comparisons"][0]["sentence"].startswith("weak is worse than strong in F1 by 0.")
    assert not worse["comparisons"][0]["better"]


def test_a_difference_that_is_not_shown_is_never_called_equal():
    same = run("a", 2.0)
    found = compare([same, replace(same, run="b"), run("c", 2.0, seed=3)], draws=DRAWS)
    sentences = [row["sentence"] for row in found["comparisons"]]
    assert sentences[0].startswith("No difference in F1 between b and a is shown: 0.000 (0.000 to 0.000).")
    assert sentences[1].startswith("No difference in F1 between c and a is shown: ")
    assert re.search(r"show a difference of 0\.\d{3} four times out of five", sentences[1])
    assert found["tied"] == ["a", "b", "c"]
    assert found["comparisons"][0]["p"] == 1
    assert not re.search(r"equal|same as|identical", " ".join(sentences))


def mirrored(value):
    """Signs changed, ends of intervals exchanged."""
    if isinstance(value, dict) and "low" in value:
        low, high = (None if value[end] is None else -value[end] for end in ("high", "low"))
        return {**value, "low": low, "high": high}
    if isinstance(value, dict):
        return {key: mirrored(each) for key, each in value.items()}
    if isinstance(value, list):
        return [mirrored(each) for each in value]
    return -value if isinstance(value, float) else value


def flat(value):
    """The numbers of a nested value, by their path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {f"{key}.{path}": each for key, one in items for path, each in flat(one).items()}
    return {"": value}


def test_swapping_two_runs_mirrors_everything():
    a, b = run("a", 2.0), run("b", 2.4, seed=1)
    forth, back = (compare(pair, draws=DRAWS)["comparisons"][0] for pair in ([a, b], [b, a]))
    for key in ("p", "p_holm", "detectable", "shown"):
        assert forth[key] == pytest.approx(back[key]), key
    assert forth["flipped"]["pairs"] == back["flipped"]["pairs"]
    assert forth["flipped"]["matched"]["only_run"] == back["flipped"]["matched"]["only_baseline"]
    for key in ("pooled", "criterion_macro"):
        one, other = flat(forth[key]), flat(mirrored(back[key]))
        assert one.keys() == other.keys()
        for path, value in one.items():
            assert value == pytest.approx(other[path], abs=1e-9), path
    for metric, one in forth["fold_mean"].items():
        other = back["fold_mean"][metric]
        assert one["sd"] == pytest.approx(other["sd"])
        assert one["corrected_t"]["p"] == pytest.approx(other["corrected_t"]["p"])
        assert one["corrected_t"]["low"] == pytest.approx(-other["corrected_t"]["high"], abs=1e-9)
        name = "reselected" if "reselected" in one else "fixed"
        if metric != "ece":
            assert one[name]["low"] == pytest.approx(-other[name]["high"], abs=1e-9)
    for one, other in zip(forth["criteria"], back["criteria"], strict=True):
        assert (one["p"], one["p_holm"]) == (other["p"], other["p_holm"])
        assert one["f1"]["value"] == pytest.approx(-other["f1"]["value"], abs=1e-9)


def test_differences_are_paired_by_draw():
    a, b = run("a", 2.0, posts=40), run("b", 2.4, seed=1, posts=40)
    samples = [resample(Measurement(one, one.scores), 40, 360, draws=20, seed=9) for one in (a, b)]
    difference = samples[1].minus(samples[0])
    weights = next(weights_of_draws(40, 20, 9, 20))
    called = [Measurement(one, one.scores).called["cross_fold"] for one in (a, b)]
    for draw in range(20):
        rows = np.repeat(np.arange(360), weights[a.post, draw].astype(int))
        labels = a.labels[rows]
        f1 = [f1_score(labels, one[rows]) for one in called]
        auc = [roc_auc_score(labels, one.scores[rows]) for one in (a, b)]
        assert difference.draws["cross_fold.fixed.pooled.f1"][draw] == pytest.approx(f1[1] - f1[0])
        assert difference.draws["scores.pooled.roc_auc"][draw] == pytest.approx(auc[1] - auc[0])


def test_runs_are_compared_in_any_order_of_rows():
    a, b = run("a", 2.0), run("b", 2.4, seed=1)
    order = np.random.default_rng(0).permutation(len(b.labels))
    rows = {name: getattr(b, name)[order] for name in ("labels", "scores", "fold", "post", "criterion")}
    assert json.dumps(compare([a, b], draws=50)) == json.dumps(compare([a, replace(b, **rows)], draws=50))


def test_flipped_pairs_by_hand():
    labels = np.array([1, 1, 1, 1, 0, 0])
    run_labels = np.array([1, 1, 0, 0, 0, 1], dtype=bool)
    baseline = np.array([1, 0, 1, 0, 1, 1], dtype=bool)
    found = flipped(labels, run_labels, baseline)
    assert (found["pairs"], found["of"]) == (3, 6)
    assert found["matched"] == {"both_right": 1, "only_run": 1, "only_baseline": 1, "both_wrong": 1}
    assert found["unmatched"] == {"both_right": 0, "only_run": 1, "only_baseline": 0, "both_wrong": 1}


def test_the_detectable_difference_is_2_8_standard_errors():
    draws = np.random.default_rng(0).normal(0, 0.01, 100_000)
    assert detectable(draws) == pytest.approx(0.0280, abs=2e-4)


def test_an_untestable_criterion_stays_named_and_counted():
    studies = []
    for one in (run("a", 1.0), run("b", 3.0, seed=1)):
        studies.append(replace(one, labels=np.where(one.criterion == 2, 0, one.labels).astype(np.int8)))
    (row,) = compare(studies, draws=DRAWS)["comparisons"]
    cells = row["criteria"]
    assert [cell["criterion"] for cell in cells] == [f"A.{one}" for one in range(1, 10)]
    assert (cells[2]["p"], cells[2]["p_holm"], cells[2]["matched"]) == (None, None, 0)
    # The smallest of nine p-values is multiplied by nine, although eight are defined.
    smallest = min((cell for cell in cells if cell["p"] is not None), key=lambda cell: cell["p"])
    assert smallest["p_holm"] == pytest.approx(9 * smallest["p"])


def test_holm_runs_over_the_runs_too():
    runs = [run("base", 2.0), *(run(f"r{seed}", 2.3, seed=seed) for seed in range(1, 5))]
    found = compare(runs, draws=DRAWS)
    p = sorted(row["p"] for row in found["comparisons"])
    smallest = min(found["comparisons"], key=lambda row: row["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, 4 * p[0]))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"labels": np.array([0, 1, 0, 0, 1], dtype=np.int8)}, "the label of post p00002, criterion A.1 is 1 and 0"),
        ({"fold": np.array([0, 1, 1, 0, 1])}, "the fold of post p00001, criterion A.1 is 0 and 1"),
        ({"post_ids": ["p00000", "p00001", "p00002", "p00003", "x"]}, "only a has post p00004, criterion A.1"),
    ],
)
def test_runs_on_other_pairs_are_refused_with_the_first_difference(change, fault):
    study = study_of([0, 1, 1, 0, 1], [0.1, 0.9, 0.8, 0.2, 0.5], [0, 0, 1, 0, 1], run="a")
    with refuses("runs-differ", "Runs a and b", fault):
        compare([study, replace(study, run="b", **change)])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("001", "1"), ("1", "1.0"), ("123456789012345678", "1.23457E+17"), ("1.2E+17", "121" + "0" * 15)],
)
def test_scores_whose_ids_a_program_took_for_numbers_say_so(tmp_path, ours, theirs):
    study = study_of([0, 1], [0.1, 0.9], [0, 1], run="a")
    study = replace(study, post_ids=[ours, "p2"])
    file = tmp_path / "scores.csv"
    file.write_text(f"post_id,criterion_id,score\n{theirs},A.1,0.5\np2,A.1,0.5\n")
    place = f"post '{ours}', criterion 'A.1', which the other has as '{theirs}'"
    with refuses("data-id", place, "pandas.read_csv(..., dtype=str)"):
        given_study(file, study)


@pytest.mark.parametrize(("names", "baseline"), [(["a"], None), (["a", "a"], None), (["a", "b"], "c"), ([], None)])
def test_names_must_differ_and_hold_the_baseline(names, baseline):
    given = f"Runs {', '.join(names) or '(none)'} with the baseline {baseline or (names or [None])[0]} "
    with refuses("config-value", given, "runs=[<run>,<other run>] baseline=<run>"):
        compare([replace(run("a", 2.0, posts=20), run=name) for name in names], baseline)
