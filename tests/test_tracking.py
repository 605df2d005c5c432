"""MLflow for real: SQLite in a folder, and an HTTP server that is killed."""

import calendar
import contextlib
import logging
import pickle
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from support.commands import raycv
from support.mlflow_runs import config, finished_run, fold_result, kill, server  # noqa: F401
from support.refusals import refuses, said_refusal

from raycv.common.environment import recorded_moment
from raycv.common.files import read_json, write_json, write_text
from raycv.common.locations import experiment_page
from raycv.common.retry import ATTEMPTS
from raycv.common.secrets import mask_secrets
from raycv.config.command_line import compose
from raycv.config.schema import AggregateConfig, RunConfig
from raycv.config.validation import as_yaml, validate
from raycv.config.values import STORES
from raycv.cv.aggregation import aggregate
from raycv.cv.open_run import OpenRun
from raycv.cv.resume import sole_process
from raycv.errors import UserError
from raycv.orchestration.mlflow_callback import FoldRuns
from raycv.results.fold_result import FoldResult
from raycv.results.report import summarize
from raycv.results.run_folder import RunFolder
from raycv.tracking.cross_validation import EPOCH_METRICS, CrossValidationStore, flat_params
from raycv.tracking.experiment import check_store, open_experiment
from raycv.training.metrics import VAL_LOSS


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """A store on a new SQLite store, its parent run, and a finished run folder."""
    monkeypatch.chdir(tmp_path)
    settings = config("sqlite:///mlflow.db", tmp_path)
    store = CrossValidationStore(settings.uri)
    experiment_id = open_experiment(store, settings)
    folder = finished_run(tmp_path / "runs" / "mine")
    parent_id = store.start_parent(experiment_id, folder.root.name, {"k": "v"})
    store.describe_parent(parent_id, folder, {"a.b": 1, "long": "x" * 9000})
    return store, parent_id, folder, settings


DAMAGES = {
    "no predictions": lambda files: files.predictions.unlink(),
    "predictions of others": lambda files: files.predictions.write_text(
        "post_id,criterion_id,label,score\nx,A.1,1,1\n"
    ),
    "no scores of epochs": lambda files: files.epoch_scores.unlink(),
    "other scores of epochs": lambda files: files.epoch_scores.write_bytes(b"others"),
    "no checkpoint": lambda files: shutil.rmtree(files.checkpoint),
    "a cut checkpoint": lambda files: (files.checkpoint / "raycv.json").write_text("{"),
    "another fold's": lambda files: write_json(files.result, asdict(fold_result(0))),
    "a metric of 5": lambda files: changed(files, metrics={**fold_result(1).metrics, "f1": 5}),
    "a metric that is NaN": lambda files: files.result.write_text(files.result.read_text().replace("0.4", "NaN")),
    "a metric that is missing": lambda files: changed(files, metrics={}),
    "a threshold that is a text": lambda files: changed(files, threshold="0.4"),
    "empty": lambda files: files.result.write_text(""),
}


def changed(files, **values):
    write_json(files.result, read_json(files.result) | values)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_finished_fold_is_what_it_left_or_damaged(tmp_path, damage):
    folder = finished_run(tmp_path / "mine")
    for fold in range(2):
        files = folder.fold(fold)
        # As results were before they knew of the other files.
        assert FoldResult.of(folder, fold).sha256 == {}
        changed(files, sha256=files.sums())
        # As they were before they knew of the scores of every epoch.
        assert set(FoldResult.of(folder, fold).sha256) == {"predictions.csv", "checkpoint/raycv.json"}
        files.epoch_scores.write_bytes(b"scores")
        assert FoldResult.of(folder, fold).fold == fold
        changed(files, sha256=files.sums())
        summed = {"predictions.csv", "epoch_scores.npy", "checkpoint/raycv.json"}
        assert set(FoldResult.of(folder, fold).sha256) == summed
    DAMAGES[damage](folder.fold(1))
    assert FoldResult.of(folder, 0).fold == 0
    with refuses("run-damaged", folder.fold(1).root, "good copy"):
        FoldResult.of(folder, 1)


@pytest.mark.long
def test_what_a_lost_store_had_is_logged_into_another(tmp_path):
    """The database is deleted, emptied, or replaced; the run folder has it all."""
    folder = finished_run(tmp_path / "runs" / "mine")
    write_text(folder.config, as_yaml(validate(RunConfig, compose("run", ["cv.folds=2", "run.name=mine"]))))
    counts = dict.fromkeys(("posts", "criteria", "pairs", "positives"), 9)
    write_json(folder.data_stats, {**counts, "data_hash": "0" * 64})
    write_json(folder.environment, {"git": None})
    write_json(folder.tracking, {"uri": f"sqlite:///{tmp_path}/mlflow.db", "parent_run_id": "0" * 32})
    gone = raycv("aggregate", "run=mine", cwd=tmp_path)
    assert gone.returncode == 2
    said_refusal(gone.stderr, "tracking-store", f"{tmp_path}/mlflow.db", "tracking_uri=sqlite:///new.db")
    assert "tracking.uri" not in gone.stderr
    unreachable = raycv("aggregate", "run=mine", "tracking_uri=databricks", cwd=tmp_path)
    said_refusal(unreachable.stderr, "tracking-unreachable", "at databricks", "databricks-sdk", "tracking_uri=sqlite:")
    assert "tracking.uri" not in unreachable.stderr
    (tmp_path / "mlflow.db").write_text("no database")
    emptied = raycv("aggregate", "run=mine", cwd=tmp_path)
    said_refusal(emptied.stderr, "tracking-store", f"{tmp_path}/mlflow.db", "tracking_uri=sqlite:///new.db")
    for again in (["tracking_uri=sqlite:///new.db"], []):
        logged = raycv("aggregate", "run=mine", *again, cwd=tmp_path)
        assert logged.returncode == 0, logged.stderr
        # Its checkpoint holds no weights.
        assert "Warning: the model of the best fold is not in MLflow: " in logged.stdout
        store = CrossValidationStore(f"sqlite:///{tmp_path}/new.db")
        parent_id = read_json(folder.tracking)["parent_run_id"]
        parent = store.run(parent_id)
        assert (parent.info.status, parent.info.run_name) == ("FINISHED", "mine")
        assert parent.data.metrics["metric_mean_f1"] == pytest.approx(0.55)
        assert {run.info.status for run in store.children(parent_id).values()} == {"FINISHED"}
        assert sorted(store.children(parent_id)) == [0, 1]


@pytest.mark.long
def test_a_sqlite_store_is_absolute_and_its_artifacts_lie_beside(tracked, tmp_path, monkeypatch):
    store, parent_id, _, _ = tracked
    monkeypatch.chdir("/")
    store.log_metrics(parent_id, {"x": 1.0})
    assert store.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert list((tmp_path / "mlruns").rglob("config.yaml"))
    assert not Path("/mlflow.db").exists()
    assert not Path("/mlruns").exists()


@pytest.mark.long
def test_parent_children_and_report(tracked):
    store, parent_id, folder, _ = tracked
    store.log_missing_folds(parent_id, folder, 2, {"p": 1})
    children = store.children(parent_id)
    assert sorted(children) == [0, 1]
    child = store.run(children[1].info.run_id)
    assert child.info.status == "FINISHED"
    assert child.data.metrics["best_f1"] == 0.6
    assert set(EPOCH_METRICS) <= set(child.data.metrics)
    report = summarize("mine", [fold_result(0), fold_result(1)], 2)
    write_json(folder.report, report)
    store.log_report(parent_id, report, folder)
    parent = store.run(parent_id)
    assert parent.data.metrics["metric_mean_f1"] == pytest.approx(0.55)
    assert parent.data.metrics["metric_std_f1"] == pytest.approx(0.0707106781)
    address = f"#/experiments/{child.info.experiment_id}/runs/{child.info.run_id}?workflowType=machine_learning"
    assert f"| [1]({address}) |" in parent.data.tags["mlflow.note.content"]
    experiment = store.client.get_experiment(child.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert (parent.data.metrics["best_fold"], parent.data.tags["best_fold"]) == (1, "1")
    for run in (parent, child):
        shown = {key for key in run.data.tags if not key.startswith("mlflow.")}
        assert shown == ({"raycv.run", "k", "best_fold"} if run is parent else {"raycv.fold"})
    assert len(parent.data.params["long"]) == 6000


@pytest.mark.long
def test_the_parent_has_the_page_its_verdict_and_the_checks_that_found_something(tracked):
    store, parent_id, folder, _ = tracked
    report = summarize("mine", [fold_result(0), fold_result(1)], 2)
    checks = [
        {"code": "RCV004", "status": "found", "finding": "F1 is at a floor."},
        {"code": "RCV005", "status": "clear", "finding": "Nothing found."},
    ]
    verdict = {"sentences": ["F1 is 0.5.", "It is better than *all*.", "The weakest is A.1."]}
    write_json(folder.evaluation, {"verdict": verdict, "checks": checks, "notice": "Research use, not for diagnosis."})
    for file in (
        folder.page,
        folder.page_markdown,
        folder.model_card,
        folder.tables / "a.csv",
        folder.figures / "a.svg",
    ):
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    store.log_missing_folds(parent_id, folder, 2, {})
    store.log_report(parent_id, report, folder)
    tags = store.run(parent_id).data.tags
    assert {key: value for key, value in tags.items() if key.startswith("raycv.check")} == {
        "raycv.check.RCV004": "F1 is at a floor."
    }
    note = tags["mlflow.note.content"]
    assert note.startswith(r"F1 is 0.5. It is better than \*all\*. The weakest is A.1.")
    assert "**Research use, not for diagnosis.**" in note
    assert f"/runs/{store.children(parent_id)[1].info.run_id}" in note
    made = ("evaluation.json", "report.html", "report.md", "model_card.md", "tables/a.csv", "figures/a.svg")
    for number, artifact in enumerate(made):
        place = folder.root / f"fetched_{number}"
        place.mkdir()
        assert store.download(parent_id, artifact, place).is_file()


@pytest.mark.long
def test_a_useless_fold_is_marked_on_child_and_parent_with_its_reasons(tracked):
    """Fold 0 is of an earlier version, whose child in MLflow has no mark; fold 1 is marked as it is logged."""
    store, parent_id, folder, _ = tracked
    useless = {"metrics": {"precision": 0.1, "recall": 1.0, "f1": 2 / 11, "accuracy": 0.1, "roc_auc": 0.58}}
    store.log_missing_folds(parent_id, folder, 1, {})
    changed(folder.fold(0), **useless, collapsed=None)
    changed(folder.fold(1), **useless, collapsed=["the scores hardly vary"])
    store.log_missing_folds(parent_id, folder, 2, {})

    def tags(fold):
        found = store.children(parent_id)[fold].data.tags
        return found.get("raycv.collapsed"), found.get("raycv.collapsed_reasons")

    assert [tags(0), tags(1)] == [(None, None), ("true", "the scores hardly vary")]
    report = summarize("mine", [FoldResult.read(folder.fold(fold).result) for fold in range(2)], 2)
    store.log_report(parent_id, report, folder)
    reasons = (
        "all 20 pairs get the label matched; F1 0.182 is not above 0.182, which the label matched for all pairs gives; "
        "the ROC-AUC 0.580 is within chance, which reaches 0.863 on these pairs"
    )
    assert [tags(0), tags(1)] == [("true", reasons), ("true", "the scores hardly vary")]
    parent = store.run(parent_id).data.tags
    assert parent["raycv.collapsed"] == "fold 0, 1"
    assert parent["raycv.collapsed_reasons"] == f"fold 0: {reasons}\nfold 1: the scores hardly vary"
    assert f"**Fold 0: the classifier has collapsed: {reasons}.**" in parent["mlflow.note.content"]


@pytest.mark.long
def test_the_summary_again_keeps_when_the_run_finished(tracked, capsys):
    store, parent_id, folder, settings = tracked
    write_json(folder.tracking, {"uri": f"{settings.uri}", "parent_run_id": parent_id})
    write_json(folder.data_stats, {})
    store.log_files(parent_id, [folder.config, folder.data_stats])

    def again(run):
        values = {"run": run, "dir": "runs", "tracking_uri": None if run == "mine" else settings.uri}
        aggregate(validate(AggregateConfig, values))
        return read_json(folder.report)["finished"], store.run(parent_id).data.tags.get("raycv.finished")

    # A report of an earlier version does not say, and its run did not finish now.
    write_json(folder.report, {"run": "mine"})
    assert again("mine") == (None, None)
    # The process of this run died before it wrote one.
    folder.report.unlink()
    first, tag = again("mine")
    assert recorded_moment(first) == first == tag
    assert abs(calendar.timegm(time.strptime(first, "%Y-%m-%dT%H:%M:%SZ")) - time.time()) < 60
    write_json(folder.report, read_json(folder.report) | {"finished": "2026-03-01T10:00:00Z"})
    for run in ("mine", parent_id):
        assert again(run) == ("2026-03-01T10:00:00Z", "2026-03-01T10:00:00Z")
    got = store.download(parent_id, "report.json", folder.root / "copy")
    assert read_json(got)["finished"] == "2026-03-01T10:00:00Z"


@pytest.mark.long
def test_a_run_of_an_earlier_version_with_its_tags_is_logged_again(tracked):
    """Its machines' tags are visible ones, and its best fold is a metric alone."""
    store, parent_id, folder, _ = tracked
    store.log_missing_folds(parent_id, folder, 2, {})
    children = store.children(parent_id)
    store.set_tags(parent_id, {f"raycv.fold_{fold}.run_id": run.info.run_id for fold, run in children.items()})
    store.set_tags(parent_id, {"raycv.start": "0" * 16})
    report = summarize("mine", [fold_result(0), fold_result(1)], 2)
    for _ in range(2):
        store.log_report(parent_id, report, folder)
    assert store.children(parent_id).keys() == {0, 1}
    assert store.run(parent_id).data.tags["best_fold"] == "1"


@pytest.mark.long
def test_logging_again_adds_nothing(tracked):
    store, parent_id, folder, _ = tracked
    for _ in range(2):
        store.log_missing_folds(parent_id, folder, 2, {})
    run_id = store.start_child(parent_id, 0, {})
    assert run_id == store.children(parent_id)[0].info.run_id
    store.log_fold(run_id, FoldResult.read(folder.fold(0).result), folder.fold(0), folder.config)
    history = store.client.get_metric_history(run_id, "val_loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]


@pytest.mark.long
def test_a_fold_has_its_restarts_and_out_of_memory_events_as_metrics(tracked):
    store, parent_id, folder, _ = tracked
    file = folder.fold(1).result
    events = ["training: out of memory: micro-batch 8 -> 4", "stopped early after epoch 3"]
    write_json(file, read_json(file) | {"restarts": ["worker 0 of the fold died, or its node"], "events": events})
    store.log_missing_folds(parent_id, folder, 2, {})
    first, second = (store.children(parent_id)[fold].data.metrics for fold in (0, 1))
    # Fold 0 is of an earlier version, which did not record restarts.
    assert (first.get("restarts"), first["out_of_memory"]) == (None, 0)
    assert (second["restarts"], second["out_of_memory"]) == (1, 1)


@pytest.mark.long
def test_rays_callback_logs_a_child_and_survives_a_store_that_fails(tracked, caplog):
    class Trial:
        config = {"fold": 1}  # noqa: RUF012

    store, parent_id, folder, settings = tracked
    runs = FoldRuns(settings, parent_id, folder, {"p": 1}, "fold")
    runs.setup()
    trial = Trial()
    runs.log_trial_start(trial)
    epoch = fold_result(1).history[0]
    runs.log_trial_result(1, trial, {**epoch, "pid": 1, "time_total_s": 3.0})
    runs.close()
    child = store.run(store.children(parent_id)[1].info.run_id)
    assert set(child.data.metrics) == set(EPOCH_METRICS)
    assert child.info.status == "RUNNING"
    # A process that goes on with the run trains the epoch again: one point of the curve all the same.
    runs = FoldRuns(settings, parent_id, folder, {"p": 1}, "fold")
    runs.setup()
    store.finish_family(parent_id, "KILLED")
    runs.log_trial_start(trial)
    for epoch in fold_result(1).history:
        runs.log_trial_result(1, trial, epoch)
    runs.close()
    assert store.run(child.info.run_id).info.status == "RUNNING"
    # A trial may die when its fold is done.
    for failed in (False, True):
        runs._writer = ThreadPoolExecutor(1)
        runs.log_trial_end(trial, failed=failed)
        runs.close()
    for key, steps in (("val_loss", [1, 2]), ("best_f1", [0]), ("fold_seconds", [0])):
        history = store.client.get_metric_history(child.info.run_id, key)
        assert [point.step for point in history] == steps
    assert store.run(child.info.run_id).info.status == "FINISHED"
    assert "not logged" not in caplog.text
    runs.store.client.set_terminated = lambda *_, **__: (_ for _ in ()).throw(
        UserError("away", kind="tracking-unreachable")
    )
    runs._writer = ThreadPoolExecutor(1)
    folder.fold(1).result.unlink()
    runs.log_trial_end(trial)
    runs.close()
    assert "not logged for now, the run folder has it: away" in caplog.text


@pytest.mark.long
def test_a_deleted_experiment_is_named(tracked, tmp_path):
    store, _, _, settings = tracked
    experiment = store.client.get_experiment_by_name("raycv")
    store.client.delete_experiment(experiment.experiment_id)
    with refuses("tracking-store", "'raycv'", "mlflow experiments restore -x"):
        open_experiment(store, settings)


@pytest.mark.long
def test_an_unknown_run_is_refused_without_a_second_attempt(tracked, tmp_path, caplog):
    with caplog.at_level(logging.WARNING), refuses("tracking-unreachable", tmp_path, "0" * 32, "tracking.uri"):
        tracked[0].run("0" * 32)
    assert "attempt" not in caplog.text


def test_the_schema_knows_the_stores_that_mlflow_has():
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    # Plain folders are no longer supported.
    # Stores of Databricks for models alone are refused.
    assert {*STORES, "sqlite", "", "file", "uc", "databricks-uc"} == set(_tracking_store_registry._registry)


@pytest.mark.long
def test_a_child_that_lacks_something_is_not_finished_with_its_parent(tracked):
    """The store was away while it was logged, and is back for the end: it can still be completed."""
    store, parent_id, folder, _ = tracked
    store.start_child(parent_id, 0, {})
    store.finish_family(parent_id, "FINISHED")
    assert store.run(parent_id).info.status == "FINISHED"
    assert store.children(parent_id)[0].info.status == "KILLED"
    store.log_missing_folds(parent_id, folder, 2, {})
    children = store.children(parent_id)
    assert [children[fold].info.status for fold in range(2)] == ["FINISHED", "FINISHED"]
    assert children[0].data.metrics["best_f1"] == 0.5


@pytest.mark.long
def test_a_complete_run_that_is_broken_off_is_finished_and_says_what_to_type(tracked, capsys):
    """Ctrl-C, or an error, after the report: nothing is left to go on with."""
    store, parent_id, folder, _ = tracked
    settings = validate(RunConfig, compose("run", ["cv.folds=2"]))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def broken_off(complete, error):
        with sole_process(folder), OpenRun(settings, folder, store, parent_id, Console()).under_way():
            if complete:
                write_json(folder.report, {})
            raise error

    try:
        for error, status in ((KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")):
            for complete in (False, True):
                folder.report.unlink(missing_ok=True)
                store.reopen(parent_id)
                with pytest.raises(error):
                    broken_off(complete, error)
                said = capsys.readouterr().out
                assert ("raycv.run resume=mine" in said) is not complete
                assert ("raycv.aggregate run=mine" in said) is complete
                assert folder.lock.exists() is not complete
                assert store.run(parent_id).info.status == ("FINISHED" if complete else status)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.core
@pytest.mark.slow
def test_processes_that_open_a_new_database_at_once_all_succeed(tmp_path):
    code = (
        "from raycv.config.schema import TrackingConfig; from raycv.tracking.experiment import open_experiment;"
        "from raycv.tracking.store import Store; uri = 'sqlite:///mlflow.db';"
        "open_experiment(Store(uri), TrackingConfig(uri=uri, artifacts='a', experiment='e'))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(3)]
    ends = [process.communicate()[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ends


@pytest.mark.core
@pytest.mark.slow
def test_a_database_that_is_locked_before_the_start_is_waited_for(tmp_path, caplog):
    """By another process, and longer than SQLite itself waits."""
    settings = config(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    CrossValidationStore(settings.uri)
    code = "import sqlite3, sys, time; held = sqlite3.connect(sys.argv[1]); held.execute('BEGIN EXCLUSIVE');"
    code += "print('locked', flush=True); time.sleep(15)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "mlflow.db"], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        check_store(settings)
        assert open_experiment(CrossValidationStore(settings.uri), settings)


@pytest.mark.long
def test_who_cannot_wait_is_refused_by_a_database_that_is_locked(tmp_path):
    settings = config(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    CrossValidationStore(settings.uri)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with refuses("tracking-store", tmp_path / "mlflow.db", "locked") as caught:
            CrossValidationStore(settings.uri, seconds=1)
    assert caught.value.remedies == ["wait until the other process has let go of it"]


SCHEMAS = {
    "of an older MLflow": (
        "UPDATE alembic_version SET version_num = '7ac759974ad8'",
        "out-of-date",
        ["mlflow db upgrade sqlite:///{file}", "tracking.uri=sqlite:///new.db"],
    ),
    "of a newer MLflow": (
        "UPDATE alembic_version SET version_num = 'ffffffffffff'",
        "ffffffffffff",
        [
            "pip install --upgrade mlflow",
            "mlflow server --backend-store-uri sqlite:///{file}, and here tracking.uri=http://127.0.0.1:5000",
            "tracking.uri=sqlite:///new.db",
        ],
    ),
    "of two versions at once": (
        "INSERT INTO alembic_version VALUES ('7ac759974ad8')",
        "more than one head",
        ["(tracking.uri)", "tracking.uri=sqlite:///new.db"],
    ),
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_database_of_another_schema_says_of_which_mlflow_it_is(tmp_path, schema):
    CrossValidationStore(f"sqlite:///{tmp_path}/new.db")
    # MLflow keeps what it knows of a store that this process has opened.
    file = tmp_path / "other.db"
    shutil.copy(tmp_path / "new.db", file)
    statement, value, remedies = SCHEMAS[schema]
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute(statement)
        connection.commit()
    uri = f"sqlite:///{file}"
    kind = "tracking-unreachable" if "two" in schema else "tracking-store"
    with refuses(kind, uri, value) as caught:
        CrossValidationStore(uri)
    assert len(caught.value.remedies) == len(remedies)
    for remedy, command in zip(caught.value.remedies, remedies, strict=True):
        assert remedy.endswith(command.format(file=file))
        assert ("db upgrade" in remedy) == ("db upgrade" in command)


def test_params_are_flat_and_masked():
    params = flat_params({"tracking": {"uri": "http://user:secret@host"}, "cv": {"folds": 5}})
    assert params == {"tracking.uri": "http://***@host", "cv.folds": "5"}


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("sqlite:///mlflow.db", "http://127.0.0.1:5000"),
        ("https://host/mlflow/", "https://host/mlflow"),
        ("http://ann:s3cret@host:5000", "http://host:5000"),
    ],
)
def test_the_page_of_an_experiment_opens_in_the_view_of_training(uri, server):
    assert experiment_page(uri, "7") == f"{server}/#/experiments/7/runs?workflowType=machine_learning"


def test_what_ray_keeps_of_the_callback_holds_no_password(tmp_path):
    """Tune pickles its callbacks into the run folder, where the state of a failed run stays."""
    settings = config("http://ann:s3cret@host:5000", tmp_path)
    runs = FoldRuns(settings, "0" * 32, RunFolder(tmp_path), {}, "fold")
    assert runs.tracking.uri == settings.uri
    assert b"s3cret" not in pickle.dumps(runs)
    assert b"http://***@host:5000" in pickle.dumps(runs)


@contextlib.contextmanager
def answering(answer):
    """An HTTP server for which `answer(handler, body)` answers each request; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do(self):
            answer(self, self.rfile.read(int(self.headers["Content-Length"] or 0)))

        do_GET = do_POST = do_PUT = do_CONNECT = do  # noqa: N815  # the names that http.server looks for

        def log_message(self, *_):
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


PAGE = b"<!DOCTYPE html><html><title>Sign in</title></html>"
ANSWERS = {
    "no password": (401, b"You are not authenticated.", "MLFLOW_TRACKING_USERNAME"),
    "no right": (403, b"", "MLFLOW_TRACKING_USERNAME"),
    "a login page": (200, PAGE, "MLFLOW_TRACKING_USERNAME"),
    "another name of the server": (
        403,
        b"Invalid Host header - possible DNS rebinding attack detected",
        "mlflow server --allowed-hosts 127.0.0.1:{port}",
    ),
    "another page": (404, PAGE, "correct tracking.uri"),
    "another service": (200, b"[]", "correct tracking.uri"),
    "another service's JSON": (200, b'{"status": "up"}', "correct tracking.uri"),
    "HTTPS": (
        400,
        b"<html>The plain HTTP request was sent to HTTPS port</html>",
        "tracking.uri=https://127.0.0.1:{port}",
    ),
    "a proxy": (407, PAGE, "HTTPS_PROXY"),
    "a limit of a proxy": (413, PAGE, "client_max_body_size"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_a_server_answers_decides_the_remedy(tmp_path, caplog, name):
    status, body, remedy = ANSWERS[name]

    def answer(handler, _):
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(body)

    with answering(answer) as url, refuses("tracking-unreachable", url) as caught:
        check_store(config(url, tmp_path))
    assert remedy.format(port=url.rpartition(":")[2]) in caught.value.remedies[0]
    if remedy == "MLFLOW_TRACKING_USERNAME":
        # Printed, and not masked away.
        assert "user:password@" in mask_secrets(caught.value.remedies[0])
    assert "Sign in" not in str(caught.value)
    assert "attempt" not in caplog.text


@pytest.mark.parametrize("refusal", ["no HTTPS", "a certificate that nobody signed", "a proxy"])
def test_a_connection_that_no_attempt_would_change_is_tried_once(tmp_path, caplog, monkeypatch, refusal):
    def answer(handler, _):
        handler.send_response(407 if handler.command == "CONNECT" else 200)
        handler.end_headers()

    with answering(answer) as url, contextlib.ExitStack() as stack:
        uri, remedy = url.replace("http:", "https:"), f"tracking.uri={url}"
        if refusal == "a proxy":
            monkeypatch.setenv("HTTPS_PROXY", url)
            uri, remedy = "https://mlflow.example:5000", "NO_PROXY=mlflow.example"
        elif refusal != "no HTTPS":
            uri, remedy = stack.enter_context(unsigned(tmp_path)), "MLFLOW_TRACKING_SERVER_CERT_PATH"
        with refuses("tracking-unreachable", uri, remedy):
            check_store(config(uri, tmp_path))
    assert "attempt" not in caplog.text


@contextlib.contextmanager
def unsigned(folder):
    """An HTTPS server with a certificate of its own; yields its address."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    make = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=me -keyout {key} -out {certificate}"
    subprocess.run(make.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def losing_answers(url, path, part, times):
    """A server that hands on to the one at `url`, but hangs up on answers to requests at `path` that hold `part`."""
    lost = []

    def hand_on(handler, body):
        asked = urllib.request.Request(url + handler.path, body or None, dict(handler.headers), method=handler.command)
        try:
            got = urllib.request.urlopen(asked)
        except urllib.error.HTTPError as error:
            got = error
        answer = got.read()
        if handler.path.endswith(path) and part in body and len(lost) < times:
            lost.append(answer)
            handler.close_connection = True
            return
        handler.send_response(got.status)
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer)

    return answering(hand_on)


def test_an_epoch_that_arrives_twice_is_one_point(tmp_path):
    """Of an attempt that a server finished after it was given up, and of the next."""
    settings = config(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    store = CrossValidationStore(settings.uri)
    parent_id = store.start_parent(open_experiment(store, settings), "mine", {})
    epoch = fold_result(0).history[0]
    for _ in range(2):
        store.log_epoch(parent_id, epoch, 1_700_000_000_000)
    assert len(store.client.get_metric_history(parent_id, VAL_LOSS)) == 1


@pytest.mark.core
@pytest.mark.slow
def test_an_epoch_that_was_logged_but_not_acknowledged_is_one_point(server, tmp_path, caplog):
    """As of a server that dies when it has written, and comes back."""

    class Trial:
        config = {"fold": 0}  # noqa: RUF012

    url, _ = server
    folder, trial = finished_run(tmp_path / "runs" / "mine"), Trial()
    with losing_answers(url, "/runs/log-batch", VAL_LOSS.encode(), ATTEMPTS) as bad_line:
        settings = config(bad_line, tmp_path)
        store = CrossValidationStore(bad_line)
        parent_id = store.start_parent(open_experiment(store, settings), folder.root.name, {})
        runs = FoldRuns(settings, parent_id, folder, {}, "fold")
        runs.setup()
        runs.log_trial_start(trial)
        for epoch in fold_result(0).history:
            runs.log_trial_result(int(epoch["epoch"]), trial, epoch)
        runs.log_trial_end(trial)
        runs.close()
        assert "not logged for now" in caplog.text
        child = store.children(parent_id)[0]
        points = store.client.get_metric_history(child.info.run_id, VAL_LOSS)
    assert child.info.status == "FINISHED"
    assert [(point.step, point.value) for point in points] == [(1, 2.0), (2, 1.0)]


@pytest.mark.core
@pytest.mark.slow
def test_an_http_server_and_its_death(server, tmp_path, caplog):
    url, process = server
    with losing_answers(url, "/runs/create", b"", 1) as bad_line:
        store = CrossValidationStore(bad_line)
        experiment_id = open_experiment(store, config(bad_line, tmp_path, "bad line"))
        made = store.start_parent(experiment_id, "one", {})
        assert "start the parent run: attempt 1 of 3 failed" in caplog.text
        assert [run.info.run_id for run in store.client.search_runs([experiment_id])] == [made]
    settings = config(url, tmp_path)
    store = CrossValidationStore(url)
    folder = finished_run(tmp_path / "runs" / "mine")
    parent_id = store.start_parent(open_experiment(store, settings), folder.root.name, {})
    store.log_missing_folds(parent_id, folder, 2, {})
    assert sorted(store.children(parent_id)) == [0, 1]
    got = store.download(store.children(parent_id)[0].info.run_id, "result.json", tmp_path)
    assert FoldResult.read(got) == fold_result(0)
    child_id = store.children(parent_id)[1].info.run_id
    for _ in range(2):  # fetched, and found again
        checkpoint = store.checkpoint(child_id, tmp_path / "runs" / ".fetched")
        assert checkpoint == tmp_path / "runs" / ".fetched" / child_id / "checkpoint"
        assert [path.name for path in checkpoint.iterdir()] == ["raycv.json"]
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]
    kill(process)
    with caplog.at_level(logging.WARNING), refuses("tracking-unreachable", url, "tracking.uri=sqlite:///mlflow.db"):
        store.log_metrics(parent_id, {"x": 1.0})
    assert "attempt 1 of 3" in caplog.text
    assert "attempt 2 of 3" in caplog.text
