"""`raycv.compare`: proof of equal pairs, a table, one sentence, files, files of others' scores, exit codes."""

import csv
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, f1_score, roc_auc_score
from support.refusals import refuses, said_refusal
from support.run_folders import noisy, write_run

from raycv.analysis.comparison import compare_all
from raycv.compare import main
from raycv.evaluation.operating_points import Measurement
from raycv.rendering.blocks import for_spreadsheet

CANARY = "quokkacanary"
WEAK, STRONG, OTHER = noisy("weak", 1.0), noisy("strong", 3.0, seed=1), noisy("other", 1.05, seed=2)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    for study in (WEAK, STRONG, OTHER):
        write_run(tmp_path / "runs", study)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def compare(monkeypatch, capsys, *overrides):
    """Exit code, standard output and standard error of the command, without the breaks of lines."""
    monkeypatch.setattr(sys, "argv", ["raycv.compare", *overrides])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    return (code, *(" ".join(text.split()) for text in capsys.readouterr()))


def rows_of(file):
    with Path(file).open(newline="") as opened:
        return list(csv.DictReader(opened))


def given_rows(study):
    ids = [
        (study.post_ids[post], study.criterion_ids[one]) for post, one in zip(study.post, study.criterion, strict=True)
    ]
    return [[*pair, repr(float(score))] for pair, score in zip(ids, study.scores, strict=True)]


def write_scores(rows, file="other.csv", header=("post_id", "criterion_id", "score")):
    with Path(file).open("w", newline="") as opened:
        csv.writer(opened).writerows([header, *rows])


def test_table_sentence_and_files(runs, monkeypatch, capsys):
    code, out, _ = compare(monkeypatch, capsys, "runs=[weak,strong]", "baseline=weak")
    assert code == 0
    assert "posts, labels and folds agree" in out
    assert re.search(r"strong is better than weak in F1 by 0\.\d{3} \(0\.\d{3} to 0\.\d{3}\)\.", out)
    assert "corrected t: 5 folds, df 4, weak" in out
    assert "Smallest difference in F1" in out
    assert "Flipped labels: " in out
    result = json.loads(Path("comparison.json").read_text())
    called = {one.run: Measurement(one, one.scores).called["cross_fold"] for one in (WEAK, STRONG)}
    f1 = {run: f1_score(WEAK.labels, each) for run, each in called.items()}
    found = {row["metric"]: row for row in rows_of("comparison.csv") if row["average"] == "pooled"}
    assert float(found["f1"]["difference"]) == pytest.approx(f1["strong"] - f1["weak"])
    assert float(found["f1"]["baseline_value"]) == pytest.approx(f1["weak"])
    auc = [roc_auc_score(WEAK.labels, one.scores) for one in (STRONG, WEAK)]
    assert float(found["roc_auc"]["difference"]) == pytest.approx(auc[0] - auc[1])
    assert found["f1"]["t_df"] == "4"
    assert result["comparisons"][0]["flipped"]["pairs"] == int((called["weak"] != called["strong"]).sum())
    figure = Path("comparison.svg").read_text()
    assert all(f">{name}" in figure for name in ("Values", "weak (baseline)", "strong", "A.1"))
    before = [Path(f"comparison{end}").read_bytes() for end in (".json", ".csv", ".svg")]
    compare(monkeypatch, capsys, "runs=[weak,strong]")
    assert [Path(f"comparison{end}").read_bytes() for end in (".json", ".csv", ".svg")] == before


def test_swapping_the_runs_mirrors_every_row(runs, monkeypatch, capsys):
    compare(monkeypatch, capsys, "runs=[weak,other]", "baseline=weak", "output=forth")
    compare(monkeypatch, capsys, "runs=[weak,other]", "baseline=other", "output=back")
    forth, back = rows_of("forth.csv"), rows_of("back.csv")
    assert len(forth) == len(back) == 3 * 11 + 9
    for one, two in zip(forth, back, strict=True):
        assert (one["run"], one["run_value"], one["p"], one["p_holm"]) == (
            two["baseline"], two["baseline_value"], two["p"], two["p_holm"],
        )  # fmt: skip
        for name, mirror in (("difference", "difference"), ("low", "high"), ("t_low", "t_high")):
            if one[name]:
                assert float(one[name]) == pytest.approx(-float(two[mirror]), abs=1e-9), one


def test_no_shown_difference_has_a_sentence_that_never_says_equal(runs, monkeypatch, capsys):
    write_run(runs, replace(WEAK, run="copy"))
    _, out, _ = compare(monkeypatch, capsys, "runs=[weak,copy,other]")
    assert "No difference in F1 between copy and weak is shown: 0.000 (0.000 to 0.000)." in out
    assert re.search(
        r"No difference in F1 between other and weak is shown: -?0\.\d{3} \(-0\.\d{3} to 0\.\d{3}\)\.", out
    )
    assert "Runs whose difference to the best" in out
    assert not re.search(r"equal|identical|same as", out + Path("comparison.json").read_text(), re.IGNORECASE)


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        (["runs=[weak,strong]", "require=better"], 0),
        (["runs=[strong,weak]", "require=better"], 1),
        (["runs=[weak,strong]", "baseline=strong", "require=better"], 1),
        (["runs=[weak,strong,other]", "require=better"], 1),
        (["runs=[strong,weak]"], 0),
    ],
)
def test_exit_code(runs, monkeypatch, capsys, overrides, code):
    found, _, err = compare(monkeypatch, capsys, *overrides)
    assert found == code
    assert ("Kind: better-not-shown" in err) == (code == 1)
    assert Path("comparison.json").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": WEAK.labels ^ (np.arange(540) == 4)}, "the label of post p00000, criterion A.5"),
        ({"fold": (WEAK.fold + (WEAK.post == 1)) % 5}, "the fold of post p00001, criterion A.1 is 1 and 2"),
        ({"post_ids": ["x", *WEAK.post_ids[1:]]}, "only weak has post p00000, criterion A.1"),
    ],
)  # fmt: skip
def test_other_posts_labels_or_folds_are_refused_with_the_first_difference(runs, monkeypatch, capsys, change, words):
    write_run(runs, replace(WEAK, run="changed", **change))
    code, _, err = compare(monkeypatch, capsys, "runs=[weak,changed]")
    assert code == 2
    said_refusal(err, "runs-differ", "weak", "changed", words)
    assert not Path("comparison.json").exists()


def test_an_untestable_criterion_is_named_and_counted(runs, monkeypatch, capsys):
    changed = [
        replace(one, labels=np.where(one.criterion == 2, 0, one.labels).astype(np.int8)) for one in (WEAK, STRONG)
    ]
    for one in changed:
        write_run(runs, replace(one, run=f"{one.run}2"))
    _, out, _ = compare(monkeypatch, capsys, "runs=[weak2,strong2]")
    assert "over 9 tests" in out
    # A.8 has two matched pairs, so more than 5 % of the draws have none.
    assert "Not testable, and counted: A.3, A.8." in out
    (row,) = [row for row in rows_of("comparison.csv") if row["criterion_id"] == "A.3"]
    assert (row["difference"], row["p"], row["p_holm"]) == ("", "", "")


def test_a_metric_of_which_less_is_better(runs):
    brier = [brier_score_loss(WEAK.labels, one.scores) for one in (WEAK, STRONG)]
    better = compare_all(["weak", "strong"], metric="brier", folder=runs)
    (row,) = better.result["comparisons"]
    assert row["pooled"]["brier"]["value"] == pytest.approx(brier[1] - brier[0])
    assert brier[1] < brier[0]
    assert row["sentence"].startswith("strong is better than weak in Brier score by 0.")
    assert (row["better"], better.not_better, better.result["best"]) == (True, [], "strong")
    assert "worse than strong in ROC-AUC" in repr(compare_all(["strong", "weak"], metric="roc_auc", folder=runs))
    with refuses("config-value", "metric=ece ", "roc_auc"):
        compare_all(["weak", "strong"], metric="ece", folder=runs)


def test_scores_of_others_are_judged_like_a_run(runs, monkeypatch, capsys):
    rows = given_rows(STRONG)
    write_scores([[*row, CANARY] for row in rows[::-1]], header=("post_id", "criterion_id", "score", "post"))
    code, out, _ = compare(monkeypatch, capsys, "runs=[weak,other.csv]")
    assert code == 0
    assert "raycv did not make the scores in other.csv, and cannot check that they are out of fold." in out
    assert "the threshold of each fold is tuned on the other folds" in out
    given = json.loads(Path("comparison.json").read_text())["comparisons"][0]
    own = compare_all(["weak", "strong"], folder=runs).result["comparisons"][0]
    for key in ("pooled", "p", "detectable", "flipped", "criteria"):
        assert given[key] == own[key]
    outputs = [path.read_bytes() for path in Path().glob("comparison.*")]
    assert not any(CANARY.encode() in each for each in [out.encode(), *outputs])
    reversed_ = compare_all([Path("other.csv"), "weak"], baseline="weak", folder=runs)
    assert reversed_.result["comparisons"][0]["run"] == "other.csv"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda rows: rows[:-1], "data-id", "only weak has post 'p00059', criterion 'A.9' (1 such pairs)"),
        (lambda rows: [*rows, ["x", "A.1", "0.5"]], "data-id", "only other.csv has post 'x', criterion 'A.1'"),
        (lambda rows: [*rows, rows[3]], "input-file", "line 542: a second score for post 'p00000', criterion 'A.4'"),
        (lambda rows: [["p00000", "A.1", "1.01"], *rows[1:]], "input-file", "line 2: score must be a number from 0"),
        (lambda rows: [["p00000", "A.1", "nan"], *rows[1:]], "input-file", "line 2: score must be a number from 0"),
        (lambda rows: [*rows, [CANARY * 5, "A.1", "0.5"]], "data-id", "has post a value of 60 characters"),
    ],
)
def test_faulty_scores_of_others_are_refused(runs, monkeypatch, capsys, change, kind, words):
    write_scores(change(given_rows(STRONG)))
    code, _, err = compare(monkeypatch, capsys, "runs=[weak,other.csv]")
    assert code == 2
    said_refusal(err, kind, "other.csv", words)
    assert CANARY not in err


def test_faults_of_the_command_line_and_the_files(runs, monkeypatch, capsys):
    cases = {
        ("runs=[weak,absent]",): ("run-missing", f"{runs} holds no run absent"),
        ("runs=[weak]",): ("config-value", "runs: ", "received ['weak']"),
        ("runs=[weak,weak]",): ("config-value", "Runs weak, weak with the baseline weak"),
        ("runs=[weak,strong]", "baseline=absent"): ("config-value", "weak, strong with the baseline absent"),
        ("runs=[a.csv,b.csv]",): ("config-value", "files of scores", "'a.csv', 'b.csv'", "runs=[<run>,<file>]"),
        ("runs=[weak,absent.csv]",): ("data-file", "absent.csv: No such file"),
        ("runs=[weak,strong]", "metric=auc"): ("config-value", "metric=auc ", "roc_auc"),
        ("runs=[weak,strong]", "output=absent/comparison"): (
            "disk-unwritable",
            "output: ",
            "/absent does not exist",
            "output=<name>",
        ),
    }
    for overrides, (kind, *parts) in cases.items():
        code, _, err = compare(monkeypatch, capsys, *overrides)
        assert code == 2
        said_refusal(err, kind, *parts)
    with refuses("config-value", "(none)", "baseline=<run>"):
        compare_all([], folder=runs)
    write_scores([["p1", "0.5"]], header=("post_id", "score"))
    said_refusal(compare(monkeypatch, capsys, "runs=[weak,other.csv]")[2], "input-file", "other.csv", "criterion_id")
    Path("comparison.csv").write_text("mine")
    code, _, err = compare(monkeypatch, capsys, "runs=[weak,strong]")
    assert code == 2
    said_refusal(err, "output-exists", "comparison.csv")
    assert Path("comparison.csv").read_text() == "mine"


def test_runs_of_one_name_in_two_folders_and_names_of_digits(runs, monkeypatch, capsys):
    write_run(runs.parent / "elsewhere", replace(STRONG, run="weak"))
    found = compare_all(["weak", "elsewhere/weak"], folder=runs).result
    assert [run["run"] for run in found["runs"]] == ["weak", "elsewhere/weak"]
    write_run(runs, replace(STRONG, run="12"))
    assert "12 is better than weak" in compare(monkeypatch, capsys, "runs=[weak,12]")[1]


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"), ("+1+2", "'+1+2"), ("-1-2", "'-1-2"), ("@SUM(1)", "'@SUM(1)"),
        ("\t=1", "'\t=1"), ("\r=1", "'\r=1"), (" =1", "' =1"), ("A.1", "A.1"), ("", ""), ("-0.25", "-0.25"),
        ("+3", "+3"), ("-1e-3", "-1e-3"),
    ],
)  # fmt: skip
def test_a_cell_that_a_spreadsheet_would_run_is_guarded_and_a_number_is_not(cell, written):
    assert for_spreadsheet(cell) == written


def test_names_with_formulas_are_guarded_in_the_table(runs, monkeypatch, capsys):
    for one in (WEAK, STRONG):
        names = ["=1+1", "[red]\x1b[31mA", "$x^2$", *one.criterion_ids[3:]]
        write_run(runs, replace(one, run=f"{one.run}3", criterion_ids=names))
    code, out, _ = compare(monkeypatch, capsys, "runs=[weak3,strong3]")
    assert code == 0
    assert "\x1b" not in out
    texts = [element.text for element in ElementTree.parse("comparison.svg").iter() if element.text]
    assert {"=1+1", "[red]\\x1b[31mA", "$x^2$"} <= set(texts)
    rows = rows_of("comparison.csv")
    assert "'=1+1" in {row["criterion_id"] for row in rows}
    assert all(not row["low"].startswith("'") for row in rows)
    assert any(row["low"].startswith("-") for row in rows)
