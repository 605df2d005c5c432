"""`import raycv`: numbers against scikit-learn, figures, models that score as in training, errors."""

import contextlib
import csv
import io
import shutil
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from support.pages import python_blocks
from support.refusals import refuses
from support.run_folders import noisy, write_run
from support.studies import study_of
from support.toy import Recorder, Toy, toy_base, toy_dataset, train_config

import raycv
from raycv.config.command_line import compose_checked, keys_set
from raycv.config.schema import RunConfig
from raycv.data.splits import make_splits
from raycv.evaluation.operating_points import Measurement
from raycv.model.checkpoint import save_checkpoint
from raycv.training.loop import FoldTrainer
from scripts.markdown import ROOT

matplotlib.use("agg")
STUDY = noisy("mine", 2.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "runs"
    write_run(folder, STUDY)
    return folder


@pytest.fixture(scope="module")
def mine(runs):
    return raycv.load_run("mine", dir=runs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of two toy folds that one epoch has trained, on the same pairs in the same folds."""
    folder = tmp_path_factory.mktemp("trained")
    # The tutorial names criteria of the example data.
    with (ROOT / "data" / "dsm5" / "criteria.csv").open(encoding="utf-8") as file:
        known = [row["criterion_id"] for row in csv.DictReader(file)]
    toy = Toy(toy_base(folder), toy_dataset(ids=known[2:5]))
    criteria = toy.write_criteria(folder)
    pairs = toy.dataset.pairs
    posts, ids = sorted(toy.dataset.posts), list(toy.dataset.criteria)
    splits = make_splits(pairs, 2, 1)
    for number, name in enumerate(("first", "second")):
        scores, fold, models = np.zeros(len(pairs)), np.zeros(len(pairs), dtype=int), []
        for split in splits:
            model = toy.model(seed=10 * number + split.fold, dropout=0.1)
            loop = FoldTrainer(model, toy.encoded, train_config(epochs=1, seed=split.fold), "fp32", Recorder())
            scores[split.val_indices] = loop.fit(split.train_indices, split.val_indices).val_scores
            fold[split.val_indices] = split.fold
            models.append(model)
        study = study_of(
            [pair.label for pair in pairs], scores, fold, [posts.index(pair.post_id) for pair in pairs],
            [ids.index(pair.criterion_id) for pair in pairs], run=name,
        )  # fmt: skip
        written = write_run(folder / "runs", replace(study, post_ids=posts, criterion_ids=ids))
        for one, model in enumerate(models):
            checkpoint = written.fold(one).checkpoint
            shutil.rmtree(checkpoint)
            checkpoint.mkdir()
            info = toy.info(threshold=0.4 + one / 10, criteria_dir=str(criteria), run=name, fold=one)
            save_checkpoint(checkpoint, model, toy.tokenizer, info)
    return folder, toy


def test_predictions_and_metrics_agree_with_scikit_learn(mine):
    frame = mine.predictions()
    assert list(frame.columns) == ["fold", "post_id", "criterion_id", "label", "score", "predicted"]
    assert len(frame) == len(STUDY.labels)
    called = Measurement(STUDY, STUDY.scores).called
    pd.testing.assert_series_equal(
        frame.set_index(["post_id", "criterion_id"])["predicted"].sort_index().reset_index(drop=True),
        pd.Series(called["cross_fold"].astype(int), name="predicted"),
    )
    fixed = mine.predictions("fixed")
    assert (fixed["predicted"] == (fixed["score"] >= 0.5)).all()
    flattered = mine.predictions("tuned_in_fold")
    for fold, threshold in mine.folds["threshold"].items():
        own = flattered[flattered["fold"] == fold]
        assert (own["predicted"] == (own["score"] >= threshold)).all()
    whole, by_fold, by_criterion = mine.metrics(), mine.metrics(by="fold"), mine.metrics(by="criterion")
    assert whole.loc["f1", "pooled"] == pytest.approx(f1_score(frame["label"], frame["predicted"]))
    assert whole.loc["f1", "low"] < whole.loc["f1", "pooled"] < whole.loc["f1", "high"]
    assert whole.loc["roc_auc", "fold_mean"] == pytest.approx(by_fold["roc_auc"].mean())
    assert whole.loc["roc_auc", "sd"] == pytest.approx(by_fold["roc_auc"].std(ddof=1))
    assert whole.loc["f1", "criterion_macro"] == pytest.approx(by_criterion["f1"].mean())
    for fold, own in frame.groupby("fold"):
        assert by_fold.loc[fold, "f1"] == pytest.approx(f1_score(own["label"], own["predicted"]))
        assert by_fold.loc[fold, "roc_auc"] == pytest.approx(roc_auc_score(own["label"], own["score"]))
        assert mine.folds.loc[fold, "roc_auc"] == pytest.approx(by_fold.loc[fold, "roc_auc"])
    for criterion, own in frame.groupby("criterion_id"):
        precision = average_precision_score(own["label"], own["score"])
        assert by_criterion.loc[criterion, "average_precision"] == pytest.approx(precision)
        assert by_criterion.loc[criterion, "matched"] == own["label"].sum()
    assert mine.report["mean"]["f1"] == pytest.approx(mine.folds["f1"].mean())
    assert mine.evaluation() is mine.evaluation()


def test_an_undefined_metric_is_nan_and_not_0(tmp_path):
    labels = np.where(STUDY.criterion == 2, 0, STUDY.labels).astype(np.int8)
    write_run(tmp_path, replace(STUDY, labels=labels))
    run = raycv.load_run("mine", dir=tmp_path)
    metrics = run.metrics(by="criterion")
    assert np.isnan(metrics.loc["A.3", ["recall", "f1", "roc_auc"]].to_numpy(dtype=float)).all()
    assert metrics["f1"].notna().sum() == 8
    assert any(text.get_text() == "undefined" for text in run.plot.criteria().texts)


@pytest.mark.parametrize("name", ["roc", "precision_recall", "threshold", "criteria", "calibration"])
def test_figures_are_axes_with_the_legend_beside_them(mine, name):
    axes = getattr(mine.plot, name)()
    assert isinstance(axes, Axes)
    assert axes.get_title()
    assert axes.get_xlabel()
    axes.figure.canvas.draw()
    legend, plotted = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert legend.x0 >= plotted.x1
    given = Figure().subplots()
    assert getattr(mine.plot, name)(ax=given) is given
    matplotlib.pyplot.close("all")


def test_the_roc_curve_never_decreases(mine):
    lines = mine.plot.roc(ax=Figure().subplots()).get_lines()
    assert len(lines) == 5 + 2
    for line in lines:
        assert (np.diff(line.get_xdata()) >= 0).all()
        assert (np.diff(line.get_ydata()) >= 0).all()


def test_a_notebook_shows_names_as_text(tmp_path, mine):
    assert "mine" in mine._repr_html_()
    for name in ("<b>x", "$y^2$"):
        write_run(tmp_path, replace(STUDY, run=name))
    odd = raycv.load_run(tmp_path / "<b>x")
    assert "&lt;b&gt;x" in odd._repr_html_()
    assert "<b>x" not in odd._repr_html_()
    comparison = raycv.compare_runs(odd, tmp_path / "$y^2$", baseline=odd)
    assert "&lt;b&gt;x" in comparison._repr_html_()
    assert "<b>x" not in comparison._repr_html_()
    figure = io.BytesIO()
    comparison.plot().savefig(figure, format="svg")
    odd.folder.report.unlink()
    assert "is not finished" in raycv.load_run(tmp_path / "<b>x")._repr_html_()


def test_compare_runs_is_the_command(tmp_path, runs):
    write_run(tmp_path, noisy("better", 3.5, seed=4))
    comparison = raycv.compare_runs("mine", tmp_path / "better", dir=runs)
    assert comparison.sentences[0].startswith("better is better than mine in F1 by 0.")
    assert repr(comparison) == comparison.sentences[0]
    table = comparison.table()
    found = comparison.result["comparisons"][0]["pooled"]["f1"]
    assert table.loc[("better", "mine", "f1"), "difference"] == found["value"]
    assert table.loc[("better", "mine", "f1"), "low"] == found["reselected"]["low"]
    mirrored = raycv.compare_runs("mine", tmp_path / "better", baseline=tmp_path / "better", dir=runs)
    assert mirrored.table().loc[("mine", "better", "f1"), "difference"] == pytest.approx(-found["value"])


@pytest.mark.parametrize(
    ("ask", "kind", "parts"),
    [
        (
            lambda run: raycv.load_run("mime", dir=run.folder.root.parent),
            "run-missing",
            ["holds no run mime", "did you mean mine"],
        ),
        (lambda run: raycv.load_run(dir="nowhere"), "run-missing", ["/nowhere holds no run"]),
        (lambda run: run.metrics(by="post"), "config-value", ["by=post"]),
        (lambda run: run.predictions("pooled"), "config-value", ["operating_point=pooled", "cross_fold"]),
        (lambda run: run.predictor(fold="worst"), "config-value", ["fold=worst"]),
        (lambda run: run.predictor(fold=7), "run-missing", ["fold=7: run mine"]),
        (lambda run: raycv.cross_validate(["train.epochs=none"]), "config-value", ["train.epochs: ", "'none'"]),
        (lambda run: raycv.cross_validate(["trian.epochs=3"]), "config-unknown-key", ["did you mean train.epochs"]),
        (lambda run: raycv.cross_validate(["epochs"]), "config-syntax", ["'epochs' is not key=value"]),
        (lambda run: raycv.cross_validate(["data.dir=nowhere"]), "data-file", ["nowhere: "]),
    ],
)
def test_errors_name_the_values_as_the_commands_do(mine, ask, kind, parts):
    with refuses(kind, *parts):
        ask(mine)


def test_overrides_are_those_of_the_command_line():
    given = ["experiment=quickstart", "train.lr=1e-3", "run.name=12"]
    config = compose_checked("run", RunConfig, given)
    assert (config.model.name, config.train.lr, config.run.name) == ("raycv://models/tiny_llama", 1e-3, "12")
    keys = keys_set("run", RunConfig, given)
    assert {"train.lr", "run.name", "model.name"} <= keys
    assert "data.missing" not in keys


def test_a_predictor_scores_as_training_did(trained):
    folder, toy = trained
    run = raycv.load_run("first", dir=folder / "runs")
    predictions = run.predictions()
    for fold in (0, 1):
        own = predictions[predictions["fold"] == fold]
        predictor = run.predictor(fold=fold, device="cpu", precision="fp32")
        assert predictor.threshold == 0.4 + fold / 10
        frame = pd.DataFrame(
            {"text": own["post_id"].map(toy.dataset.posts), "criterion_id": own["criterion_id"]}, index=own.index
        )
        found = predictor.predict(frame)
        assert list(found.columns) == ["criterion_id", "label", "score", "truncated"]
        assert found.index.equals(own.index)
        np.testing.assert_allclose(found["score"], own["score"], atol=1e-5)
        expected = np.where(found["score"] >= predictor.threshold, "matched", "unmatched")
        assert (found["label"] == expected).all()
    texts = list(zip(frame["text"], [toy.dataset.criteria[one].text for one in frame["criterion_id"]], strict=True))
    pd.testing.assert_frame_equal(predictor.predict(texts), found.reset_index(drop=True))
    every = predictor.predict(frame[["text"]].head(2))
    assert every["criterion_id"].tolist() == ["A.3", "A.4", "A.5"] * 2
    assert every.index.tolist() == [index for index in frame.index[:2] for _ in range(3)]
    assert predictor.predict([]).empty
    canary = "w1 quokkacanary"
    faults = [
        ("input-file", "neither post nor text", pd.DataFrame({"body": [canary]})),
        ("input-file", "post, text", pd.DataFrame({"post": [canary], "text": [canary]})),
        ("input-empty", "Pair 2: the post", pd.DataFrame({"post": [canary, np.nan]})),
        ("input-file", "Pair 1: the criterion", [(canary, 4)]),
        ("input-file", "Pair 1 is not", [canary]),
        ("criterion-unknown", "criterion=C9", [(canary, "C9")]),
    ]
    for kind, part, pairs in faults:
        with refuses(kind, part) as caught:
            predictor.predict(pairs)
        assert "quokkacanary" not in str(caught.value)


def test_the_tutorial_runs_as_written(trained, monkeypatch, tmp_path):
    folder, _ = trained
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYCV_RUN_DIR", str(folder / "runs"))
    said = io.StringIO()
    names: dict = {}
    blocks = python_blocks("guides/python.md")
    assert len(blocks) == 7
    with contextlib.redirect_stdout(said):
        for block in blocks:
            exec(compile(block, "python.md", "exec"), names)
    matplotlib.pyplot.close("all")
    assert "second" in said.getvalue()
    assert "holds no run no-such-run" in said.getvalue()
    assert {path.name for path in tmp_path.iterdir()} == {
        "calibration.svg", "comparison.json", "comparison.csv", "comparison.svg",
    }  # fmt: skip
    assert isinstance(names["run"], raycv.Run)
