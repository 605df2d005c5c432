"""The summary: mean and deviation against NumPy, nothing averaged over missing folds, a table for 80 columns."""

import io
import json
import random
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.refusals import refuses

from raycv.common.files import write_json
from raycv.errors import RunFailedError
from raycv.rendering.terminal import summary_table
from raycv.results.fold_result import FoldResult
from raycv.results.report import best_fold, partial_summary, summarize
from raycv.training.metrics import METRICS


def result(fold: int, **metrics: float) -> FoldResult:
    draw = random.Random(fold)
    return FoldResult(
        fold=fold,
        threshold=round(draw.random(), 2),
        best_epoch=3 + fold,
        epochs=20 + fold,
        metrics={name: draw.random() for name in METRICS} | metrics,
        seconds=100.5 + fold,
        train_pairs=800 - fold,
        val_pairs=200 + fold,
        val_matched=20 + 2 * fold,
        history=[{"epoch": 1, "train_loss": 0.7}],
        events=["stopped early"],
        worker={"host": "node", "device": "cpu"},
        collapsed=[],
    )


RESULTS = [result(fold) for fold in range(5)]


def drawn(report: dict[str, Any], width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(summary_table(report))
    return file.getvalue()


def test_mean_and_deviation_are_numpys() -> None:
    report = summarize("r", RESULTS, 5)
    columns = {name: [one.metrics[name] for one in RESULTS] for name in METRICS}
    columns["threshold"] = [one.threshold for one in RESULTS]

    assert set(report["mean"]) == set(report["std"]) == set(columns)
    for name, column in columns.items():
        assert report["mean"][name] == pytest.approx(np.mean(column), rel=1e-12)
        assert report["std"][name] == pytest.approx(np.std(column, ddof=1), rel=1e-12)
    assert "ddof=1" in report["std_kind"]


def test_folds_are_kept_whole_and_in_order_whatever_order_they_come_in() -> None:
    shuffled = [RESULTS[i] for i in (3, 0, 4, 1, 2)]
    report = summarize("r", shuffled, 5)
    assert report == summarize("r", RESULTS, 5)
    assert report["run"] == "r"
    assert report["folds"] == [asdict(one) for one in RESULTS]


def test_pairs_prevalence_and_floors() -> None:
    report = summarize("r", RESULTS, 5)
    pairs, matched = 200 + 201 + 202 + 203 + 204, 20 + 22 + 24 + 26 + 28
    assert report["pairs"] == pairs
    assert report["prevalence"] == pytest.approx(matched / pairs)
    # all matched: precision = prevalence, recall = 1
    rate = matched / pairs
    assert report["floors"]["all_matched_f1"] == pytest.approx(2 * rate * 1 / (rate + 1))
    assert report["floors"]["all_unmatched_accuracy"] == pytest.approx(1 - rate)


def test_report_is_json(tmp_path: Any) -> None:
    report = summarize("r", RESULTS, 5)
    write_json(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert isinstance(report["best_fold"], int)


@pytest.mark.parametrize(
    ("present", "missing"), [([0, 1, 3, 4], "2"), ([1, 2], "0, 3, 4"), ([], "0, 1, 2, 3, 4"), ([0, 1, 2, 3], "4")]
)
def test_missing_fold_is_refused(present: list[int], missing: str) -> None:
    parts = (f"{5 - len(present)} of 5 folds", f"(fold {missing})", "python -m raycv.run resume=the run ")
    with refuses("run-failed", "Run the run: ", *parts) as caught:
        summarize("the run", [RESULTS[fold] for fold in present], 5)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("more", [RESULTS[0], result(5)], ids=["twice", "beyond"])
def test_more_results_than_folds_do_not_enter_the_mean(more: FoldResult) -> None:
    """A fold that comes twice, or one that was not asked for, would be averaged in silently."""
    expected = summarize("r", RESULTS, 5)["mean"]
    try:
        report = summarize("r", [*RESULTS, more], 5)
    except RunFailedError:
        return
    assert report["mean"] == expected


def test_a_part_of_the_folds_has_no_mean_and_says_so() -> None:
    found = partial_summary("the run", [RESULTS[3], RESULTS[0]], 5, {"labels_shuffled": True})
    assert [fold["fold"] for fold in found["folds"]] == [0, 3]
    assert found["missing_folds"] == [1, 2, 4]
    assert not {"mean", "std", "best_fold"} & found.keys()
    text = " ".join(drawn(found).split())
    assert "the run: 2 of 5 folds, not the result of a 5-fold cross-validation" in text
    assert "CONTROL, labels permuted" in text
    assert "Fold 1, 2, 4 is missing, so raycv averages nothing." in text
    assert not {"mean", "std", "*"} & set(text.split())


def test_best_fold_by_f1_then_roc_auc_then_the_first() -> None:
    def best(*metrics: tuple[float, float]) -> int:
        results = [result(fold, f1=f1, roc_auc=auc) for fold, (f1, auc) in enumerate(metrics)]
        assert best_fold(results[::-1]) == best_fold(results)
        return best_fold(results)

    assert best((0.5, 0.9), (0.7, 0.6), (0.6, 0.99)) == 1
    assert best((0.7, 0.8), (0.7, 0.9), (0.6, 1.0)) == 1
    assert best((0.7, 0.8), (0.7, 0.8), (0.7, 0.7)) == 0
    assert summarize("r", [result(0, f1=0.2), result(1, f1=0.9), result(2, f1=0.4)], 3)["best_fold"] == 1


# --- A classifier that tells nothing ---------------------------------------------------------------------------------

USELESS = {"precision": 22 / 201, "recall": 1.0, "f1": 44 / 223, "accuracy": 22 / 201, "roc_auc": 0.58}
"""All 201 pairs of fold 1 labelled matched, which 22 are."""


def test_folds_that_computed_attention_in_different_ways_are_warned_of() -> None:
    """An earlier version, which recorded no attention, computed another function for models that cap their scores."""
    assert summarize("r", RESULTS, 5)["warnings"] == []
    eager = [replace(one, worker={**one.worker, "attention": "eager"}) for one in RESULTS]
    assert summarize("r", eager, 5)["warnings"] == []
    (warning,) = summarize("r", [*RESULTS[:2], *eager[2:]], 5)["warnings"]
    assert "(fold 0, 1: not recorded by an earlier version; fold 2, 3, 4: eager)" in warning


def test_a_collapsed_fold_is_marked_with_its_reasons() -> None:
    reasons = ["all 201 pairs get the label matched", "the scores hardly vary"]
    results = [RESULTS[0], replace(result(1, **USELESS), collapsed=reasons), *RESULTS[2:]]
    report = summarize("r", results, 5, {"warnings": ["few posts"]})
    assert report["collapsed_folds"] == [1]
    assert [fold["collapsed"] for fold in report["folds"]] == [[], reasons, [], [], []]
    said = "fold 1: the classifier has collapsed: all 201 pairs get the label matched; the scores hardly vary"
    assert report["warnings"] == ["few posts", said]
    table = drawn(report, width=120)
    assert f"! {said}" in table
    assert table.count("!") == 2  # the fold's mark and its explanation
    # A report of an earlier version has the mark without reasons.
    del report["folds"][1]["collapsed"]
    assert "! fold 1: the classifier has collapsed\n" in drawn(report, width=120).replace(" \n", "\n")


def test_a_fold_of_an_earlier_version_is_marked_as_far_as_its_metrics_tell(tmp_path: Any) -> None:
    files = []
    for one in (result(0, f1=0.9, roc_auc=0.9), result(1, **USELESS)):
        values = asdict(one)
        del values["collapsed"]
        files.append(tmp_path / f"{one.fold}.json")
        write_json(files[-1], values)
    results = [FoldResult.read(file) for file in files]
    assert [one.collapsed for one in results] == [None, None]
    report = summarize("r", results, 2)
    assert report["collapsed_folds"] == [1]
    assert [fold["collapsed"] for fold in report["folds"]] == [
        [],
        [
            "all 201 pairs get the label matched",
            "F1 0.197 is not above 0.197, which the label matched for all pairs gives",
            "the ROC-AUC 0.580 is within chance, which reaches 0.608 on these pairs",
        ],
    ]
    assert report["warnings"][0].startswith("fold 0, 1: an earlier version of raycv did not record")
    assert json.loads(json.dumps(report)) == report


# --- The table -------------------------------------------------------------------------------------------------------


def test_table_has_a_row_a_fold_and_the_summary() -> None:
    report = summarize("a-run", RESULTS, 5)
    text = drawn(report)
    rows = [line.split() for line in text.splitlines() if line.strip()]

    assert "a-run: 5-fold cross-validation" in text
    for one in RESULTS:
        name = [str(one.fold), "*"] if one.fold == report["best_fold"] else [str(one.fold)]
        numbers = [f"{one.metrics[metric]:.3f}" for metric in METRICS]
        assert [*name, *numbers, f"{one.threshold:.2f}", f"{one.best_epoch}/{one.epochs}", f"{one.seconds:.0f}"] in rows
    for key in ("mean", "std"):
        assert [key, *(f"{report[key][m]:.3f}" for m in METRICS), f"{report[key]['threshold']:.2f}"] in rows
    assert text.count("*") == 2  # the best fold's mark and its explanation
    assert f"F1 {report['floors']['all_matched_f1']:.3f} (all matched)" in " ".join(text.split())
    assert "ddof=1" in text


@pytest.mark.parametrize("name", ["2025-11-22_15-27-37", "n" * 100], ids=["usual", "longest"])
def test_widest_table_fits_80_columns(name: str) -> None:
    folds = [replace(result(fold), epochs=100, best_epoch=100, seconds=359_999.4) for fold in range(12)]
    folds[11] = replace(folds[11], metrics=dict.fromkeys(METRICS, 1.0))
    text = drawn(summarize(name, folds, 12))
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for part in ("precision", "accuracy", "ROC-AUC", "threshold", "best epoch", "seconds", "11 *", "100/100", "359999"):
        assert part in text
    assert name[:60] in text
