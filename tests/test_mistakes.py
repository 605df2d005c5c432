"""`raycv.mistakes`: the most confident mistakes by criterion; text only when asked, and never run by a spreadsheet."""

import csv
import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.refusals import said_refusal
from support.run_folders import write_run
from support.studies import study_of

from raycv.analysis.mistakes import mistakes_of, thresholds_of
from raycv.config.command_line import compose
from raycv.data.dataset import load_dataset, with_shuffled_labels
from raycv.evaluation.operating_points import Measurement
from raycv.mistakes import main

SAMPLE = Path(__file__).parent.parent / "data/sample"
CANARY = '=quokkacanary, "as said"\nsecond line'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run on the sample, in which every post holds a canary that a spreadsheet would run."""
    return made_run(tmp_path, monkeypatch)


def made_run(tmp_path, monkeypatch, *more):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("criteria.csv", "groundtruth.csv"):
        shutil.copy(SAMPLE / name, data / name)
    posts = pd.read_csv(SAMPLE / "posts.csv", dtype=str)
    posts.assign(post=CANARY + " " + posts["post"]).to_csv(data / "posts.csv", index=False)
    dataset = load_dataset(data, data)
    if "data.shuffle_labels=true" in more:
        dataset = with_shuffled_labels(dataset, 42)
    ids, criteria = sorted(dataset.posts), list(dataset.criteria)
    labels = np.array([pair.label for pair in dataset.pairs])
    post = np.array([ids.index(pair.post_id) for pair in dataset.pairs])
    criterion = np.array([criteria.index(pair.criterion_id) for pair in dataset.pairs])
    scores = 1 / (1 + np.exp(1 - labels * 1.5 + np.random.default_rng(3).normal(size=len(labels))))
    study = replace(
        study_of(labels, scores, post % 5, post, criterion, run="mine"), post_ids=ids, criterion_ids=criteria
    )
    config = compose("run", [f"data.dir={data}", f"data.criteria_dir={data}", *more])
    write_run(tmp_path / "runs", study, config, dataset.stats["data_hash"])
    monkeypatch.chdir(tmp_path)
    return study, dataset


def mistakes(monkeypatch, capsys, *overrides):
    monkeypatch.setattr(sys, "argv", ["raycv.mistakes", *overrides])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    return (code, *capsys.readouterr())


def table():
    return list(csv.DictReader(io.StringIO(Path("mistakes.csv").read_text())))


def test_the_most_confident_mistakes_of_each_criterion(run, monkeypatch, capsys):
    study, _ = run
    code, out, err = mistakes(monkeypatch, capsys, "most=4")
    assert code == 0
    assert "run=latest is mine" in out
    called = Measurement(study, study.scores).called["cross_fold"]
    every = pd.DataFrame(
        {
            "criterion_id": np.array(study.criterion_ids)[study.criterion],
            "post_id": np.array(study.post_ids)[study.post],
            "label": study.labels,
            "called": called.astype(int),
            "score": study.scores,
        }
    )
    wrong = every[every["label"] != every["called"]].copy()
    wrong["confidence"] = np.where(wrong["label"] == 1, 1 - wrong["score"], wrong["score"])
    best = wrong.sort_values("confidence", ascending=False).groupby("criterion_id").head(4)
    rows = table()
    assert len(rows) == len(best)
    for criterion, group in best.groupby("criterion_id"):
        own = [row for row in rows if row["criterion_id"] == criterion]
        assert [row["post_id"] for row in own] == group["post_id"].tolist()
        assert [row["rank"] for row in own] == [str(rank) for rank in range(1, len(own) + 1)]
        np.testing.assert_allclose([float(row["confidence"]) for row in own], group["confidence"], rtol=1e-12)
        assert {(row["label"], row["predicted"]) for row in own} <= {
            ("matched", "unmatched"), ("unmatched", "matched"),
        }  # fmt: skip
    first = every[every["criterion_id"] == "A.1"]
    false = ((first["called"] == 1) & (first["label"] == 0)).sum()
    missed = ((first["called"] == 0) & (first["label"] == 1)).sum()
    line = next(line for line in out.splitlines() if line.strip().startswith("A.1 "))
    assert line.split() == ["A.1", str(len(first)), str(false + missed), str(false), str(missed)]
    assert "quokkacanary" not in out + err + Path("mistakes.csv").read_text()
    assert Path("mistakes.csv").stat().st_mode & 0o077 == 0


def test_text_is_joined_only_when_asked_and_guarded(run, monkeypatch, capsys):
    _, dataset = run
    code, out, err = mistakes(monkeypatch, capsys, "most=2", "text=true", "run=mine")
    assert code == 0
    assert "only you can read it" in out
    assert "quokkacanary" not in out + err
    rows = table()
    assert all(row["post"] == "'" + dataset.posts[row["post_id"]] for row in rows)
    assert all(row["criterion"] == dataset.criteria[row["criterion_id"]].text for row in rows)
    assert all(float(row["score"]) >= 0 for row in rows)
    assert Path("mistakes.csv").stat().st_mode & 0o077 == 0


def test_other_data_are_refused_and_the_place_can_be_given(run, monkeypatch, capsys):
    given = ("text=true", f"data.dir={SAMPLE}", "run=mine")
    code, _, err = mistakes(monkeypatch, capsys, *given)
    assert code == 2
    said_refusal(err, "resume-differs", "run mine", "data.dir=<folder>")
    assert not Path("mistakes.csv").exists()
    moved = shutil.move("data", "moved")
    assert mistakes(monkeypatch, capsys, "text=true", "run=mine")[0] == 2
    assert mistakes(monkeypatch, capsys, "text=true", "run=mine", f"data.dir={moved}")[0] == 0
    apart = (f"data.dir={moved}", "data.criteria_dir=raycv://data/sample")
    assert mistakes(monkeypatch, capsys, "text=true", "run=mine", *apart)[0] == 0


def test_faults_and_files_of_others(run, monkeypatch, capsys):
    said_refusal(mistakes(monkeypatch, capsys, "run=absent")[2], "run-missing", "holds no run absent")
    Path("mistakes.csv").write_text("mine")
    code, _, err = mistakes(monkeypatch, capsys)
    assert code == 2
    said_refusal(err, "output-exists", "mistakes.csv")
    Path("runs/mine/fold_2/result.json").unlink()
    Path("mistakes.csv").unlink()
    said_refusal(mistakes(monkeypatch, capsys, "run=mine")[2], "run-failed", "fold 2", "raycv.run resume=mine")


def test_recorded_facts_are_beside_each_mistake():
    study = study_of(
        [0, 1, 0, 1], [0.9, 0.1, 0.2, 0.8], [0, 0, 1, 1], shortened=np.array([True, False, False, False]),
        hard_negative=np.array([True, False, False, False]),
    )  # fmt: skip
    rows = mistakes_of(study, 5)
    assert [(row["post_id"], row["shortened"], row["hard_negative"]) for row in rows[:2]] == [
        ("p00000", 1, 1), ("p00001", 0, 0),
    ]  # fmt: skip
    np.testing.assert_array_equal(thresholds_of(study, "fixed"), [0.5, 0.5])


def test_texts_are_joined_to_a_control_with_permuted_labels(tmp_path, monkeypatch, capsys):
    _, dataset = made_run(tmp_path, monkeypatch, "data.shuffle_labels=true", "cv.seed=42")
    code, _, err = mistakes(monkeypatch, capsys, "text=true", "run=mine")
    assert code == 0, err
    label = {(pair.post_id, pair.criterion_id): pair.label for pair in dataset.pairs}
    assert all(("unmatched", "matched")[label[row["post_id"], row["criterion_id"]]] == row["label"] for row in table())
