"""A finished run folder, and an MLflow server over HTTP that can be killed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict

import pytest

from raycv.common.files import write_json
from raycv.config.schema import TrackingConfig
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import RunFolder
from raycv.training.metrics import METRICS


def config(uri, folder, experiment="raycv"):
    return TrackingConfig(uri=uri, artifacts=str(folder / "mlruns"), experiment=experiment)


def fold_result(fold, epochs=2):
    metrics = dict.fromkeys(METRICS, 0.5 + fold / 10)
    history = [
        {"epoch": e, "train_loss": 1 / e, "val_loss": 2 / e, **metrics, "threshold": 0.4, "learning_rate": 1e-3}
        | {"micro_batch": 8, "seconds": 1.0}
        for e in range(1, epochs + 1)
    ]
    return FoldResult(fold, 0.4, 1, epochs, metrics, 3.0, 80, 20, 2, history, [], {"device": "cpu"}, collapsed=[])


def finished_run(root, folds=2):
    """A run folder as a cross-validation leaves it."""
    folder = RunFolder(root)
    root.mkdir(parents=True)
    folder.config.write_text("cv: {folds: 2}\n")
    for fold in range(folds):
        files = folder.fold(fold)
        files.checkpoint.mkdir(parents=True)
        (files.checkpoint / "raycv.json").write_text("{}")
        files.predictions.write_text("post_id,criterion_id,label,score\n")
        write_json(files.result, asdict(fold_result(fold)))
    return folder


def kill(process):
    """The server with its workers, which share its process group; once dead, nothing is left to do."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_health(port, process, log, host="127.0.0.1"):
    """Waits until the server of `process`, which writes `log`, answers at /health."""
    while True:
        try:
            urllib.request.urlopen(f"http://{host}:{port}/health", timeout=1)
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)


@contextlib.contextmanager
def serving(folder, port, host="127.0.0.1"):
    """A real MLflow server on `port` of `host`, its store in `folder`; yields its process when it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    # Half a dozen processes that nobody needs here.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    try:
        wait_for_health(port, process, folder / "server.log", host)
        yield process
    finally:
        kill(process)


@pytest.fixture
def server(tmp_path):
    port = free_port()
    with serving(tmp_path, port) as process:
        yield f"http://127.0.0.1:{port}", process
