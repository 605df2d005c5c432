"""The best fold as a model of MLflow: what is logged, what it answers, and a real `mlflow models serve`."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from rich.console import Console
from support.mlflow_runs import config, free_port, kill, server, wait_for_health  # noqa: F401
from support.refusals import refuses
from support.trained_runs import CANARY, make_run

import raycv
from raycv.common.files import read_json, sha256_of
from raycv.config.command_line import compose
from raycv.config.schema import RunConfig
from raycv.config.validation import validate
from raycv.cv.open_run import OpenRun
from raycv.errors import UserError
from raycv.results.fold_result import FoldResult
from raycv.results.report import summarize
from raycv.results.run_folder import RunFolder
from raycv.tracking.cross_validation import CrossValidationStore
from raycv.tracking.experiment import open_experiment
from raycv.tracking.model import log_best_fold, log_model
from scripts.markdown import ROOT

REPORT = {"control": False, "best_fold": 1}
pytestmark = pytest.mark.long
PAIRS = pd.DataFrame({"post": ["w0 w5 w7", f"{CANARY} w3"], "criterion": ["C0", "w2 w1"]}, index=[7, 3])


@dataclass(frozen=True)
class Logged:
    store: CrossValidationStore
    parent_id: str
    folder: RunFolder
    model: LoggedModel

    @property
    def files(self) -> Path:
        return Path(self.model.artifact_location.removeprefix("file://"))


def parent_of(store, folder, root):
    """A parent run for the run in `folder`, in an experiment that keeps its artifacts in `root`."""
    return store.start_parent(open_experiment(store, config(store.uri, root, root.name)), folder.root.name, {})


def models_of(store, parent_id):
    experiment_id = store.run(parent_id).info.experiment_id
    return [model for model in store.client.search_logged_models([experiment_id]) if model.source_run_id == parent_id]


@pytest.fixture(autouse=True)
def _no_store_of_another_test():
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    root = tmp_path_factory.mktemp("logged")
    folder = RunFolder(make_run(root))
    store = CrossValidationStore(f"sqlite:///{root}/mlflow.db")
    parent_id = parent_of(store, folder, root)
    assert log_best_fold(store, parent_id, folder, REPORT) is None
    (model,) = models_of(store, parent_id)
    return Logged(store, parent_id, folder, model)


def test_the_model_holds_the_checkpoint_and_names_its_base(logged):
    checkpoint, data = logged.folder.fold(1).checkpoint, logged.files / "data" / "checkpoint"
    assert {path.name: sha256_of(path) for path in data.iterdir()} == {
        path.name: sha256_of(path) for path in checkpoint.iterdir()
    }
    others = {path.name for path in logged.files.iterdir()}
    assert others == {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "data"}
    info = read_json(checkpoint / "raycv.json")
    described = yaml.safe_load((logged.files / "MLmodel").read_text())
    assert described["flavors"]["python_function"]["loader_module"] == "raycv.pyfunc"
    assert described["run_id"] == logged.parent_id
    assert "saved_input_example_info" not in described
    assert described["metadata"] == logged.model.tags
    assert logged.model.tags == {
        "raycv.run": "toy",
        "raycv.fold": "1",
        "raycv.threshold": "0.5",
        "raycv.base_model": info["base_model"],
        "raycv.criteria_hash": info["criteria_hash"],
        "raycv.use": "research use, not for diagnosis",
        "raycv.checkpoint_sha256": sha256_of(checkpoint / "raycv.json"),
    }
    inputs = json.loads(described["signature"]["inputs"])
    assert [(column["name"], column["type"], column["required"]) for column in inputs] == [
        ("post", "string", True),
        ("criterion", "string", True),
    ]
    needs = (logged.files / "requirements.txt").read_text().split()
    assert f"raycv=={raycv.__version__}" in needs
    assert {need.partition("==")[0] for need in needs} == {"mlflow", "raycv", "torch", "transformers", "peft"}
    assert not [need for need in needs if "+" in need]


@pytest.mark.parametrize("uri", ["models:/{0.model.model_id}", "runs:/{0.parent_id}/model"])
def test_a_loaded_model_answers_as_the_predictor_of_the_run(logged, uri):
    mlflow.set_tracking_uri(logged.store.uri)
    found = mlflow.pyfunc.load_model(uri.format(logged)).predict(PAIRS)
    expected = raycv.Run(logged.folder).predictor(fold=1).predict(PAIRS)
    pd.testing.assert_frame_equal(found, expected[["label", "score", "truncated"]])


def test_the_base_and_the_criteria_may_have_moved(logged, monkeypatch, tmp_path):
    """`model_config` names them, and MLflow's variable does so too where only a command is typed."""
    elsewhere = tmp_path / "base"
    base = Path(read_json(logged.folder.fold(1).checkpoint / "raycv.json")["base_model"])
    base.rename(elsewhere)
    try:
        with refuses("base-files", base, "base=<folder or hub id>"):
            mlflow.pyfunc.load_model(str(logged.files))
        expected = mlflow.pyfunc.load_model(str(logged.files), model_config={"base": str(elsewhere)}).predict(PAIRS)
        settings = {"base": str(elsewhere), "precision": "fp32"}
        monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", json.dumps(settings))
        pd.testing.assert_frame_equal(mlflow.pyfunc.load_model(str(logged.files)).predict(PAIRS), expected)
    finally:
        elsewhere.rename(base)


@pytest.mark.parametrize(
    ("frame", "error", "words"),
    [
        (pd.DataFrame({"post": [CANARY], "criterium": ["C0"]}), MlflowException, "enforce model input schema"),
        (pd.DataFrame({"post": [CANARY], "criterion": [4]}), MlflowException, "enforce model input schema"),
        (pd.DataFrame({"post": [CANARY, " "], "criterion": ["C0", "C0"]}), UserError, "Pair 2: the post is not"),
        (pd.DataFrame({"post": [CANARY] * 2, "criterion": ["C0", None]}), UserError, "Pair 2: the criterion"),
        (pd.DataFrame({"post": [CANARY], "criterion": ["Z9"]}), UserError, "Z9"),
    ],
)
def test_a_refusal_repeats_no_post(logged, frame, error, words):
    with pytest.raises(error, match=words) as raised:
        mlflow.pyfunc.load_model(str(logged.files)).predict(frame)
    assert CANARY not in str(raised.value)


def test_a_second_time_logs_nothing_and_another_best_fold_is_another_model(logged, tmp_path):
    store, parent_id = logged.store, parent_of(logged.store, logged.folder, tmp_path)
    first = log_model(store, parent_id, logged.folder, 1)
    assert log_model(store, parent_id, logged.folder, 1) == first
    second = log_model(store, parent_id, logged.folder, 0)
    assert [model.model_id for model in models_of(store, parent_id)] == [second, first]
    assert {output.model_id for output in store.run(parent_id).outputs.model_outputs} == {first, second}
    # MLflow takes the newest one of a run.
    mlflow.set_tracking_uri(store.uri)
    assert mlflow.models.get_model_info(f"runs:/{parent_id}/model").metadata["raycv.fold"] == "0"


def test_a_fault_only_warns_and_the_model_is_completed_later(logged, tmp_path):
    store, parent_id = logged.store, parent_of(logged.store, logged.folder, tmp_path)
    settings = validate(RunConfig, compose("run", ["cv.folds=2"]))
    report = summarize("toy", [FoldResult.read(logged.folder.fold(fold).result) for fold in range(2)], 2)
    place = tmp_path / "mlruns" / "models"
    place.parent.mkdir(exist_ok=True)
    place.write_text("a file where MLflow wants a folder")
    printed = []
    for _ in range(2):
        said = io.StringIO()
        OpenRun(settings, logged.folder, store, parent_id, Console(file=said, width=300)).log(report)
        printed.append(said.getvalue())
        (model,) = models_of(store, parent_id)
        assert (model.tags["raycv.fold"], model.status) == ("1", "PENDING" if len(printed) == 1 else "READY")
        assert len(store.run(parent_id).outputs.model_outputs) == len(printed) - 1
        if place.is_file():
            place.unlink()
    assert "Warning: the model of the best fold is not in MLflow: " in printed[0]
    assert "Log it later: python -m raycv.aggregate run=toy" in printed[0]
    assert printed[1] == ""


def test_the_model_of_a_control_is_not_logged(logged, tmp_path):
    store, parent_id = logged.store, parent_of(logged.store, logged.folder, tmp_path)
    assert log_best_fold(store, parent_id, logged.folder, REPORT | {"control": True}) is None
    assert models_of(store, parent_id) == []


@pytest.mark.slow
def test_a_tracking_server_takes_the_model(logged, server):
    uri, _ = server
    store = CrossValidationStore(uri)
    parent_id = store.start_parent(open_experiment(store, config(uri, Path("unused"))), "toy", {})
    assert log_best_fold(store, parent_id, logged.folder, REPORT) is None
    mlflow.set_tracking_uri(uri)
    assert len(mlflow.pyfunc.load_model(f"runs:/{parent_id}/model").predict(PAIRS)) == 2


def asked(port, body, kind="application/json"):
    """Status and text of the server's answer."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


def serve_command(logged, port):
    """`mlflow models serve` as typed, and its environment."""
    # As after `source .venv/bin/activate`: MLflow calls uvicorn by its name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", f"runs:/{logged.parent_id}/model", "-p", str(port)]
    return command, {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": logged.store.uri}


@pytest.fixture
def scoring(logged, tmp_path):
    """`mlflow models serve` as typed: its port, and the file of all that it prints."""
    port = free_port()
    command, environment = serve_command(logged, port)
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for_health(port, process, tmp_path / "serve.log")
        yield port, tmp_path / "serve.log"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        kill(process)


@pytest.mark.slow
def test_a_taken_port_ends_mlflow_models_serve_as_the_docs_say(logged):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command, environment = serve_command(logged, taken.getsockname()[1])
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    guide = (ROOT / "docs" / "guides" / "serving.md").read_text(encoding="utf-8")
    reason, last = "[Errno 98] ... address already in use", "Return code = 3"
    assert f"`{reason}`" in guide
    assert f"`{last}`" in guide
    assert done.returncode == 1
    begins, _, ends = reason.partition(" ... ")
    assert any(begins in line and line.endswith(ends) for line in done.stderr.splitlines())
    assert done.stderr.rstrip().endswith(last)


@pytest.mark.slow
@pytest.mark.core
def test_mlflow_models_serve_answers_and_keeps_posts_to_itself(logged, scoring):
    port, log = scoring
    body = json.dumps({"dataframe_split": PAIRS.to_dict(orient="split")}).encode()
    status, text = asked(port, body)
    assert status == 200
    expected = raycv.Run(logged.folder).predictor(fold=1).predict(PAIRS)
    for answer, (_, row) in zip(json.loads(text)["predictions"], expected.iterrows(), strict=True):
        assert answer == {"label": row.label, "score": pytest.approx(row.score), "truncated": row.truncated}
    assert asked(port, PAIRS.to_csv(index=False).encode(), "text/csv") == (200, text)
    # Refusals too: a text that is not JSON, a column that is missing, an empty post, an unknown criterion.
    assert asked(port, f"{CANARY},C0\n".encode(), "text/csv")[0] == 400, "a table without a header"
    for frame in (
        f"{CANARY} {{".encode(),
        json.dumps({"dataframe_records": [{"post": CANARY, "criterium": "C0"}]}).encode(),
        json.dumps(
            {"dataframe_records": [{"post": CANARY, "criterion": "C0"}, {"post": "", "criterion": "C0"}]}
        ).encode(),
        json.dumps({"dataframe_records": [{"post": CANARY, "criterion": "Z9"}]}).encode(),
    ):
        assert asked(port, frame)[0] == 400
    printed = log.read_text()
    assert "POST /invocations" in printed
    assert CANARY not in printed
    root = logged.folder.root.parent.parent
    assert not [path for path in root.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
