"""Folds that are trained again: what counts as the same, what is named if it is not, and once for real."""

import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
from support.commands import ROOT, raycv
from support.mlflow_runs import fold_result
from support.refusals import refuses

from raycv.analysis.reproduction import BIT_FOR_BIT, DIFFERENT, WITHIN, compare_folds
from raycv.common.files import array_bytes, read_json, write_json, write_text
from raycv.config.command_line import compose
from raycv.config.schema import ReproduceConfig, RunConfig
from raycv.config.validation import as_yaml, validate
from raycv.cv.preparation import load_data
from raycv.cv.reproduce import reproduce
from raycv.data.splits import splits_record
from raycv.errors import NotShownError
from raycv.results.run_folder import RunFolder

ENVIRONMENT = {
    "python": "3.11.1",
    "platform": "Linux",
    "processor": "one",
    "cpus": 2,
    "packages": {"torch": "2.9.0", "raycv": "0.1.0"},
    "numerics": 1,
    "git": {"commit": "c0ffee", "dirty": False},
    "base_model": {"revision": None, "files": {"config.json": 5}, "sha256": {"config.json": "aa"}},
}


def write(runs, name, *, change=0.0, score=0.0, environment=(), overrides=(), loss=0.0):
    """A run of two folds; only fold 0 is finished."""
    run = RunFolder(runs / name)
    run.root.mkdir(parents=True)
    data = ROOT / "data/sample"
    given = ["experiment=quickstart", "cv.folds=2", f"data.dir={data}", f"data.criteria_dir={data}", *overrides]
    config = validate(RunConfig, compose("run", given))
    write_text(run.config, as_yaml(config))
    dataset, splits = load_data(config)
    write_json(run.data_stats, dataset.stats)
    write_json(run.splits, splits_record(dataset, splits, config.cv.seed))
    write_json(run.environment, ENVIRONMENT | dict(environment))
    write_json(run.tracking, {"uri": "sqlite:///nowhere.db", "parent_run_id": "0" * 32})
    files = run.fold(0)
    files.checkpoint.mkdir(parents=True)
    write_text(files.checkpoint / "raycv.json", "{}")
    scores = np.linspace(0.1, 0.9, 4)
    scores[2] += score
    rows = [f"p{index},A.1,{index % 2},{float(value)!r}" for index, value in enumerate(scores)]
    write_text(files.predictions, "\n".join(["post_id,criterion_id,label,score", *rows]) + "\n")
    files.epoch_scores.write_bytes(array_bytes(np.stack([scores / 2, scores])))
    made = fold_result(0)
    history = [dict(epoch) for epoch in made.history]
    history[1]["train_loss"] += loss
    history[1]["seconds"] = float(np.random.default_rng().random())
    metrics = made.metrics | {"f1": made.metrics["f1"] + change}
    worker = {"device": "cpu (2 threads)", "host": name}
    write_json(files.result, asdict(replace(made, history=history, metrics=metrics, worker=worker, restarts=[])))
    return run


@pytest.fixture
def original(tmp_path):
    return write(tmp_path / "runs", "mine")


def test_the_same_numbers_are_the_same_bit_for_bit_whatever_the_seconds(original, tmp_path):
    again = write(tmp_path / "runs", "again")
    found = compare_folds(original, again, [0])
    (fold,) = found["folds"]
    assert (found["result"], fold["result"], found["differences"]) == (BIT_FOR_BIT, BIT_FOR_BIT, [])
    assert fold["equal"] == {"predictions": True, "epochs": True, "epoch_scores": True}
    assert (fold["first_epoch_that_differs"], fold["largest_score_difference"]) == (None, 0.0)
    again.fold(0).epoch_scores.unlink()
    (fold,) = compare_folds(original, again, [0])["folds"]
    assert (fold["result"], fold["equal"]["epoch_scores"]) == (BIT_FOR_BIT, None)


@pytest.mark.parametrize(
    ("how", "record"),
    [({"score": 1e-15}, "predictions"), ({"score": 1e-15}, "epoch_scores"), ({"loss": 1e-12}, "epochs")],
)
def test_a_last_bit_of_a_score_or_a_loss_is_seen(original, tmp_path, how, record):
    found = compare_folds(original, write(tmp_path / "runs", "again", **how), [0])
    (fold,) = found["folds"]
    assert (found["result"], fold["equal"][record]) == (WITHIN, False)
    assert fold["first_epoch_that_differs"] == (2 if record == "epochs" else None)
    assert 0 <= fold["largest_score_difference"] < 1e-14


def test_a_last_bit_of_the_scores_of_another_epoch_is_seen(original, tmp_path):
    again = write(tmp_path / "runs", "again")
    scores = np.load(again.fold(0).epoch_scores)
    scores[0, 1] = np.nextafter(scores[0, 1], 1)
    again.fold(0).epoch_scores.write_bytes(array_bytes(scores))
    (fold,) = compare_folds(original, again, [0])["folds"]
    assert (fold["result"], fold["equal"]["epoch_scores"]) == (WITHIN, False)


@pytest.mark.parametrize(
    ("change", "result"), [(0.0049, WITHIN), (-0.0049, WITHIN), (0.0051, DIFFERENT), (-0.0051, DIFFERENT)]
)
def test_the_tolerance_is_half_a_percent_of_f1_either_way(original, tmp_path, change, result):
    again = write(tmp_path / "runs", "again", change=change, score=0.01)
    found = compare_folds(original, again, [0])
    assert found["result"] == result
    assert found["folds"][0]["f1"]["change"] == pytest.approx(change)
    assert found["folds"][0]["largest_score_difference"] == pytest.approx(0.01)


def test_what_differs_is_named_by_kind(original, tmp_path):
    git = {"commit": "c0ffee", "dirty": True}
    packages = {"torch": "2.10.0", "raycv": "0.1.0"}
    base = ENVIRONMENT["base_model"] | {"sha256": {"config.json": "bb"}}
    environment = {"processor": "two", "packages": packages, "git": git, "base_model": base}
    again = write(tmp_path / "runs", "again", environment=environment, overrides=["train.lr=1e-3", "run.name=x"])
    file = again.fold(0).result
    write_json(file, read_json(file) | {"restarts": ["a worker died"], "worker": {"device": "cpu (3 threads)"}})
    found = compare_folds(original, again, [0])
    assert found["result"] == BIT_FOR_BIT
    assert [tuple(one.values()) for one in found["differences"]] == [
        ("input", "base model, config.json", "aa", "bb"),
        ("setting", "train.lr", 0.002, 0.001),
        ("source", "commit of raycv", "c0ffee", "c0ffee, with changes that are not committed"),
        ("version", "torch", "2.9.0", "2.10.0"),
        ("hardware", "processor", "one", "two"),
        ("hardware", "fold 0, device", "cpu (2 threads)", "cpu (3 threads)"),
        ("hardware", "fold 0, restarts", 0, 1),
    ]


def test_a_run_that_resumed_elsewhere_has_both_values(original, tmp_path):
    write_json(original.environment, ENVIRONMENT | {"resumed": [ENVIRONMENT | {"processor": "two"}]})
    (one,) = compare_folds(original, write(tmp_path / "runs", "again"), [0])["differences"]
    assert (one["name"], one["then"], one["now"]) == ("processor", "one and two", "one")


def asked(tmp_path, *words):
    return validate(ReproduceConfig, compose("reproduce", [f"dir={tmp_path / 'runs'}", "run=mine", *words]))


def test_the_command_compares_a_run_that_is_trained_already(original, tmp_path, capsys):
    again = write(tmp_path / "runs", "again", score=1e-9)
    reproduce(asked(tmp_path, "trained=again"))
    said = " ".join(capsys.readouterr().out.split())
    assert "mine, reproduced as again: within tolerance" in said
    assert "Versions, hardware, source and settings are those of the original." in said
    assert read_json(again.reproduction)["result"] == WITHIN
    write_json(again.fold(0).result, read_json(again.fold(0).result) | {"metrics": fold_result(1).metrics})
    with refuses("not-reproduced", "Run mine ", "F1 of fold 0 moved by 0.005", error=NotShownError) as caught:
        reproduce(asked(tmp_path, "trained=again"))
    assert caught.value.exit_code == 1
    assert read_json(again.reproduction)["result"] == DIFFERENT


@pytest.mark.parametrize(("trained", "said"), [("mine", "it is the run itself"), ("again", "train.lr: 0.002, 0.001")])
def test_a_run_that_is_no_reproduction_is_refused_and_left_as_it_is(original, tmp_path, trained, said):
    again = write(tmp_path / "runs", "again", overrides=["train.lr=1e-3"])
    with refuses("runs-differ", f"Run {trained} ", said, "trained="):
        reproduce(asked(tmp_path, f"trained={trained}"))
    assert not again.reproduction.exists()
    assert not original.reproduction.exists()


def test_a_fold_that_the_finished_run_lacks_is_answered_with_those_it_has(tmp_path):
    write(tmp_path / "runs", "mine")
    with refuses("run-missing", "no finished fold 7", "folds=[0]"):
        reproduce(asked(tmp_path, "folds=[7]"))


def test_other_pairs_are_not_the_same_fold(original, tmp_path):
    again = write(tmp_path / "runs", "again")
    table = again.fold(0).predictions
    table.write_text(table.read_text().replace("p3,", "p4,"))
    with refuses("runs-differ", "Fold 0 ", "trained=<name>"):
        reproduce(asked(tmp_path, "trained=again"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["folds=[1]"], ["Run mine has no finished fold 1", "folds=[0]", "resume=mine"]),
        (["run=none"], ["runs holds no run none", "dir=<folder>"]),
        (["trained=none"], ["runs holds no run none", "dir=<folder>"]),
    ],
)
def test_what_is_not_there_is_refused(original, tmp_path, words, said):
    with refuses("run-missing", *said):
        reproduce(asked(tmp_path, *words))


def test_other_data_or_folds_are_refused_before_anything_is_made(original, tmp_path):
    data = shutil.copytree(ROOT / "data/sample", tmp_path / "data")
    lines = (data / "groundtruth.csv").read_text().splitlines()
    start, _, label = lines[-1].rpartition(",")
    lines[-1] = f"{start},{'no' if label == 'yes' else 'yes'}"
    (data / "groundtruth.csv").write_text("\n".join(lines) + "\n")
    with refuses("resume-differs", "Run mine ", "hash of posts and labels", "data.dir=<folder>"):
        reproduce(asked(tmp_path, f"data.dir={data}"))
    splits = read_json(original.splits)
    splits["folds"].reverse()
    write_json(original.splits, splits)
    with refuses("resume-differs", "Run mine ", "splits: "):
        reproduce(asked(tmp_path))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_fold_that_is_trained_again_is_the_recorded_one_bit_for_bit(tmp_path, whole):
    """In a folder of its own, beside an original that nothing changes; `latest` to resume is not this run."""
    shutil.copytree(whole / "runs", tmp_path / "runs")
    original = RunFolder(tmp_path / "runs" / "mine")
    before = {path: path.read_bytes() for path in original.root.rglob("*") if path.is_file()}
    words = ["run=mine", "folds=[1]", "tracking_uri=sqlite:///other.db"]
    done = raycv("reproduce", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine, reproduced as mine-reproduced: bit for bit" in " ".join(done.stdout.split())
    again = RunFolder(tmp_path / "runs" / "mine-reproduced")
    found = read_json(again.reproduction)
    assert (found["run"], found["result"], found["folds"][0]["fold"]) == ("mine", BIT_FOR_BIT, 1)
    assert all(found["folds"][0]["equal"].values())
    assert not [one for one in found["differences"] if one["kind"] != "source"]
    assert (again.finished(2), again.report.exists()) == ([1], False)
    assert before == {path: path.read_bytes() for path in original.root.rglob("*") if path.is_file()}
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'other.db'}")
    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    parent = runs["mine-reproduced"]
    assert (parent.info.status, runs["fold_1"].info.status) == ("FINISHED", "FINISHED")
    assert (parent.data.tags["raycv.reproduces"], parent.data.tags["raycv.reproduced"]) == ("mine", BIT_FOR_BIT)
    refused = raycv("run", "resume=latest", cwd=tmp_path)
    assert "resume=latest: " in refused.stderr, refused.stderr
