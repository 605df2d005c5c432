"""What a user sees when a run cannot begin or a fold fails: cause, remedy, exit code, and nothing averaged."""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from support.builders import base_without_numbers, no_gpu
from support.commands import ROOT, background, processes_with, raycv, statuses, users_environment, wait_until
from support.mlflow_runs import finished_run
from support.refusals import refuses, said_refusal

from raycv.common.files import read_json, write_json
from raycv.config.command_line import compose
from raycv.config.schema import RunConfig
from raycv.config.validation import validate
from raycv.cv.pipeline import cross_validate
from raycv.errors import UserError
from raycv.rendering.terminal import LiveView
from raycv.resources.nodes import NodeError, NodeNeeds
from raycv.resources.survey import survey
from raycv.results.run_folder import RunFolder

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    ("overrides", "kind", "parts"),
    [
        (["cv.folds=5"], "data-file", ["irlab-udc/redsm5", "experiment=quickstart", "data/redsm5"]),
        (["experiment=quickstart", "cv.folds=5000"], "data-split", ["cv.folds=5000", "110 posts"]),
        (["experiment=quickstart", "data.dir=nowhere"], "data-file", ["nowhere: "]),
    ],
)
@pytest.mark.long
def test_bad_data_is_refused_before_anything_heavy_is_imported_or_written(tmp_path, overrides, kind, parts):
    result = raycv("run", *overrides, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 2
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    }
    assert "raycv.cv.pipeline" in imported
    assert not imported & {"torch", "ray", "mlflow", "transformers"}
    message = "\n".join(line for line in result.stderr.splitlines() if not line.startswith("import time"))
    assert "Traceback" not in message
    said_refusal(message, kind, *parts)
    assert not list(tmp_path.iterdir())


@no_gpu
@pytest.mark.long
def test_a_gpu_that_torch_cannot_use_is_refused_before_ray_starts(tmp_path, unusable_gpu, monkeypatch):
    """Unless the CPU is asked for: the run then meets what it is given to stumble over."""
    import ray

    given = ["experiment=quickstart", f"run.dir={tmp_path}/runs", "tracking.uri=sqlite:////proc/refused-at-last.db"]

    def start(*more):
        cross_validate(validate(RunConfig, compose("run", [*given, *more])))

    for more in ([], ["resources.gpus_per_fold=1"], ["resources.gpus_per_fold=0.5"]):
        with refuses("gpu-unusable", "NVIDIA GPU of", "resources.gpus_per_fold=0"):
            start(*more)
    with refuses("tracking-store", "/proc/refused-at-last.db"):
        start("resources.gpus_per_fold=0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with refuses("tracking-store", "/proc/refused-at-last.db"):
        start()
    assert not ray.is_initialized()
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


@pytest.mark.long
def test_a_taken_name_is_refused(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    result = raycv("run", "experiment=quickstart", "run.name=mine", cwd=tmp_path)
    assert result.returncode == 2
    said_refusal(result.stderr, "run-exists", "run.name=mine: ", tmp_path / "runs/mine", "another run.name")
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.long
def test_a_config_that_does_not_suit_the_base_is_refused_and_nothing_is_written(tmp_path):
    overrides = ["experiment=quickstart", "model.target_modules=[q_proj,query]"]
    result = raycv("run", *overrides, cwd=tmp_path)
    assert result.returncode == 2
    said_refusal(result.stderr, "base-unsuitable", "model.target_modules: query ", "modules: down_proj, gate_proj")
    result = raycv("run", *overrides, "prompt.max_length=100000", cwd=tmp_path)
    assert result.returncode == 2
    said_refusal(result.stderr, "base-unsuitable", "prompt.max_length=100000", "4096 positions")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["a_file", "a_file/runs", "/proc/runs"])
@pytest.mark.long
def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "a_file").write_text("")
    result = raycv("run", "experiment=quickstart", f"run.dir={place}", cwd=tmp_path)
    assert result.returncode == 2
    said_refusal(result.stderr, "disk-unwritable", f"run.dir={place}: ", "run.dir=<folder>")
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("sqlite:////tmp", "unable to open database file"),
        ("sqlite:////proc/mlflow.db", "No such file"),
        ("sqlite:///notes.db", "file is not a database"),
    ],
)
def test_a_tracking_store_that_cannot_be_used_is_refused_in_seconds(tmp_path, uri, said):
    (tmp_path / "notes.db").write_text("These are notes. " * 100)
    result = raycv("run", "experiment=quickstart", f"tracking.uri={uri}", cwd=tmp_path)
    assert result.returncode == 2
    said_refusal(result.stderr, "tracking-store", said, "tracking.uri=sqlite:///")
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.db"]


@pytest.mark.ray
def test_a_cluster_that_does_not_answer_is_refused_in_seconds(tmp_path):
    result = raycv("run", "experiment=quickstart", cwd=tmp_path, RAY_ADDRESS="127.0.0.1:9")
    assert result.returncode == 2
    said_refusal(result.stderr, "cluster-unreachable", "RAY_ADDRESS=127.0.0.1:9")
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
def test_a_cluster_that_was_killed_is_not_waited_for(tmp_path):
    """`ray start` leaves an address behind, which outlives a cluster that is killed, or whose machine is."""
    # Short: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
        overrides = ["experiment=quickstart", "resources.gpus_per_fold=3"]
        result = raycv("run", *overrides, cwd=tmp_path, RAY_ADDRESS="", RAY_TMPDIR=folder)
    assert "WARNING: the Ray cluster that was started here, at 127.0.0.1:9, is gone" in result.stderr
    # A Ray of its own has looked for room, up to what this run is refused for.
    said_refusal(result.stderr, "cluster-resources", "3 GPUs, and no node")


@pytest.mark.ray
def test_a_cluster_of_ray_start_that_asks_for_a_token_is_joined(tmp_path):
    """Once a local Ray has left its token below HOME, `ray start` asks for it."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        places = {"HOME": str(tmp_path), "RAY_TMPDIR": folder}
        command = ["start", "--head", "--block", "--num-cpus=7", "--port=0", "--include-dashboard=false"]
        environment = users_environment(**places)
        del environment["RAY_ADDRESS"]
        address = Path(folder) / "ray" / "ray_current_cluster"
        with (tmp_path / "out").open("w") as said:
            head = subprocess.Popen(
                [str(Path(sys.executable).parent / "ray"), *command],
                env=environment, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        try:
            wait_until(address.is_file, head, tmp_path / "out", seconds=120)
            overrides = ["experiment=quickstart", "resources.gpus_per_fold=3"]
            result = raycv("run", *overrides, cwd=tmp_path, RAY_ADDRESS="", **places)
        finally:
            started = psutil.Process(head.pid).children(recursive=True)
            for process in (*started, head):
                process.kill()
            psutil.wait_procs(started, timeout=30)
    said_refusal(result.stderr, "cluster-resources", "(nodes: 7 CPUs")


@pytest.mark.ray
def test_artifacts_that_cannot_be_written_leave_no_run_behind(tmp_path):
    result = raycv("run", "experiment=quickstart", "tracking.artifacts=/proc/mlruns", "run.name=mine", cwd=tmp_path)
    assert result.returncode == 2
    said_refusal(result.stderr, "disk-unwritable", "/proc/mlruns ", "tracking.artifacts=<a folder")
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def running(folder, *overrides):
    """A quickstart run of two folds in `folder`, its first epoch done; yields its process. Output: `out`."""
    run = background(folder, "experiment=quickstart", "cv.folds=2", "run.name=mine", *overrides)
    with run as process:
        wait_until(lambda: ": epoch " in (folder / "out").read_text(), process, folder / "out")
        yield process


@pytest.mark.ray
@pytest.mark.parametrize(
    ("sent", "pause"), [*((signal.SIGINT, pause) for pause in (0.02, 0.3, 1.5, 3.0)), (signal.SIGTERM, 2.0)]
)
def test_ctrl_c_while_ray_starts_is_heeded_and_leaves_no_process(tmp_path, sent, pause):
    """Ray's start forks: what a signal raises there is lost, and a start that is broken off leaves processes."""
    mark = {"RAYCV_TEST": str(tmp_path)}
    with background(tmp_path, "experiment=quickstart", "cv.folds=2", "run.name=mine", **mark) as process:
        wait_until(lambda: "Starting Ray" in (tmp_path / "out").read_text(), process, tmp_path / "out")
        time.sleep(pause)
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)
        assert process.wait(timeout=60) == 130
    said = (tmp_path / "out").read_text()
    assert "Traceback" not in said
    assert said.rstrip().endswith("raycv.run: interrupted")
    assert not (tmp_path / "runs" / "mine" / "fold_0").exists()
    deadline = time.monotonic() + 20
    while (left := processes_with(f"RAYCV_TEST={tmp_path}")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


@pytest.mark.ray
def test_ctrl_c_that_is_dropped_while_ray_starts_is_heeded_after_it():
    """As a bare `except`, or a callback of C code, drops it."""
    code = """
import contextlib, signal
from raycv.orchestration.cluster import interruptible
with interruptible():
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    print("dropped", flush=True)
print("not heeded")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "dropped\n"
    assert result.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.core), signal.SIGHUP])
def test_ctrl_c_and_a_schedulers_end_stop_all_and_mark_the_runs_killed(tmp_path, sent):
    with running(tmp_path, "train.epochs=60", "train.patience=60") as process:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(sent)
        assert process.wait(timeout=60) == 130
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [process.name() for process in alive] == []
    said = (tmp_path / "out").read_text()
    assert "Interrupted: 0 of 2 folds are finished, and kept in" in said
    assert "Traceback" not in said
    assert set(statuses(tmp_path).values()) == {"KILLED"}


@pytest.mark.slow
@pytest.mark.ray
def test_a_schedulers_end_for_all_processes_is_no_cluster_that_is_gone(tmp_path):
    """The driver is slow to hear of it, and finds Ray gone."""
    with running(tmp_path, "train.epochs=60", "train.patience=60") as process:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGTERM)
        psutil.wait_procs([each for each in family if "raylet" in each.name()], timeout=30)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 130, (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert "Interrupted: 0 of 2 folds are finished, and kept in" in said
    assert "is gone" not in said
    assert set(statuses(tmp_path).values()) == {"KILLED"}


@pytest.mark.slow
@pytest.mark.ray
def test_a_database_locked_for_half_a_minute_loses_nothing(tmp_path):
    """Another process holds SQLite while epochs end and the folds finish: training goes on, and all is logged."""
    with running(tmp_path, "train.epochs=2") as process:
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", timeout=60)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(30)
        assert process.wait(timeout=300) == 0, (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert "Traceback" not in said
    assert "[SQL" not in said
    assert statuses(tmp_path) == {"mine": "FINISHED", "fold_0": "FINISHED", "fold_1": "FINISHED"}
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        steps = connection.execute("SELECT step FROM metrics WHERE key = 'val_loss' ORDER BY step").fetchall()
    assert [step for (step,) in steps] == [1, 1, 2, 2]


@pytest.mark.ray
def test_a_fold_that_can_never_be_placed_is_refused_at_once(tmp_path):
    result = raycv("run", "experiment=quickstart", "resources.gpus_per_fold=3", cwd=tmp_path)
    assert result.returncode == 2
    said_refusal(result.stderr, "cluster-resources", "3 GPUs, and no node", "resources.autoscaling=true")
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
def test_a_failed_fold_fails_the_run_with_its_own_error(tmp_path):
    """Weights that are no numbers: found when a worker computes with them."""
    base = base_without_numbers(tmp_path / "base")
    overrides = ["experiment=quickstart", "cv.folds=2", f"model.name={base}", "run.name=broken"]
    result = raycv("run", *overrides, cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    # One cause is told once, with the folds that it felled.
    cause = "fold 0, 1: The training loss is nan in epoch 1, step 1"
    said_refusal(result.stderr, "run-failed, training-loss", cause, "train.lr=", "fold_<k>/worker.log")
    # Said at once, too, not only when the other folds have ended; and Ray's tracebacks stay out of sight.
    assert re.search(r"fold [01]: The training loss is nan", result.stdout)
    assert "Traceback (most" not in result.stdout + result.stderr
    run = tmp_path / "runs" / "broken"
    assert not (run / "report.json").exists()
    kept = json.loads((run / "fold_0" / "error.json").read_text())
    assert "Traceback" in kept["traceback"]
    assert kept["kind"] == "training-loss"
    assert ": process " in (run / "fold_0" / "worker.log").read_text()
    aggregated = raycv("aggregate", "run=broken", cwd=tmp_path)
    assert aggregated.returncode == 1
    said_refusal(aggregated.stderr, "run-failed", "2 of 2 folds", "fold 0, 1", "python -m raycv.run resume=broken")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("raycv").experiment_id])
    assert {run.info.status for run in runs} == {"FAILED"}


@pytest.mark.parametrize(
    ("overrides", "kind", "said"),
    [
        (["run=nothing"], "run-missing, tracking-store", "run=nothing"),
        ([], "run-missing", "holds no run"),
        (["run=latest", "rum=3"], "config-unknown-key", "rum: "),
    ],
)
@pytest.mark.long
def test_aggregate_without_a_run(tmp_path, overrides, kind, said):
    result = raycv("aggregate", *overrides, cwd=tmp_path)
    assert result.returncode == 2
    said_refusal(result.stderr, kind, said)
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_one_damaged_run_does_not_hide_the_others(tmp_path):
    for name, config in (("a", "cv: {folds: 2}"), ("b", "cv: ["), ("c", "")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text(config)
    for fold in range(2):
        (tmp_path / f"runs/a/fold_{fold}").mkdir()
        (tmp_path / f"runs/a/fold_{fold}/result.json").write_text('{"fold": 0}')
    (tmp_path / "runs/a/data_stats.json").write_text("{}")
    latest = raycv("aggregate", cwd=tmp_path)
    assert "run=latest is a\n" in latest.stdout
    said_refusal(latest.stderr, "run-damaged", "runs/a/fold_0/result.json", "threshold", "raycv.run resume=a")
    damaged = raycv("aggregate", "run=runs/b", cwd=tmp_path)
    said_refusal(damaged.stderr, "run-damaged", "runs/b/config.yaml is damaged", "good copy")
    assert {latest.returncode, damaged.returncode} == {2}
    assert "Traceback" not in latest.stderr + damaged.stderr


# --- Nodes that differ -----------------------------------------------------------------------------------------------


def marked(root):
    """A run's folder with the nonce of its driver, and what a node must have for it."""
    root.mkdir(parents=True)
    return RunFolder(root), NodeNeeds.of(RunFolder(root))


def code_of(tmp_path, name, change=lambda package: None):
    """What `survey` finds in a process whose raycv is a copy, which `change` has changed."""
    package = tmp_path / name / "raycv"
    shutil.copytree(ROOT / "raycv", package, ignore=shutil.ignore_patterns("__pycache__"))
    change(package)
    survey_file = str(ROOT / "raycv" / "resources" / "survey.py")
    code = (
        "import json, runpy, sys; survey = runpy.run_path(sys.argv[1]);"
        "print(json.dumps([survey['source_hash'](), survey['version_of']('raycv'), survey['version_of']('torch')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, survey_file],
        **{"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(package.parent)}, "timeout": 60},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def not_code(package):
    (package / "notes.txt").write_text("not code")
    (package / ".#utils.py").symlink_to("the lock of an editor")


def one_line_more(package):
    with (package / "utils.py").open("a") as file:
        file.write("# one line more\n")


@pytest.mark.long
def test_the_hash_of_the_source_tells_a_changed_line_and_a_name_and_no_place(tmp_path):
    driver = NodeNeeds.of(marked(tmp_path / "run")[0])
    same = code_of(tmp_path, "same", not_code)
    assert same == [driver.source, driver.versions["raycv"], driver.versions["torch"]]
    others = [
        code_of(tmp_path, "line", one_line_more),
        code_of(tmp_path, "name", lambda package: (package / "utils.py").rename(package / "util.py")),
    ]
    assert len({driver.source, *(other[0] for other in others)}) == 3
    broken = code_of(tmp_path, "old", lambda package: (package / "__init__.py").write_text("raise ImportError"))
    assert broken[1] is None


@pytest.mark.long
def test_a_node_with_an_old_raycv_can_be_asked(tmp_path):
    """The question travels by value: what asks for a module of raycv would fail there before it could answer."""
    run, needs = marked(tmp_path / "run")
    (tmp_path / "old" / "raycv").mkdir(parents=True)
    (tmp_path / "old" / "raycv" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    sent = (
        "import sys, ray; from raycv.orchestration.cluster import node_survey;"
        "sys.stdout.buffer.write(ray.cloudpickle.dumps(node_survey()))"
    )
    question = subprocess.run([sys.executable, "-c", sent], capture_output=True, check=True, timeout=60).stdout
    asked = (
        "import json, pickle, sys; sys.modules['raycv.resources.survey'] = None;"
        "print(json.dumps(pickle.load(sys.stdin.buffer)(*json.loads(sys.argv[1]))))"
    )
    arguments = json.dumps(needs.question([str(tmp_path / "base")]))
    answer = subprocess.run(
        [sys.executable, "-c", asked, arguments],
        **{"input": question, "capture_output": True, "timeout": 60, "check": True},
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "old")},
    )
    found = json.loads(answer.stdout)
    faults, remedies = needs.compare("node 10.0.0.2 (gpu-2)", found)
    version = needs.versions["raycv"]
    assert faults == [
        f"node 10.0.0.2 (gpu-2) does not see {tmp_path / 'base'}",
        f"raycv: driver {version}, node 10.0.0.2 (gpu-2) 0.0.1",
        f"raycv's source: driver {needs.source[:16]}, node 10.0.0.2 (gpu-2) {found['source'][:16]}",
    ]
    assert len(remedies) == 2
    assert run.share.read_text() == needs.nonce


def test_a_node_that_differs_is_refused_with_all_that_differs_and_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr("raycv.resources.survey.SETTLE_SECONDS", 0.1)
    _, needs = marked(tmp_path / "runs" / "mine")
    found = survey(*needs.question())
    needs.check("id", "node 10.0.0.2 (gpu-2)", found)
    other = {"share": "sees another folder at /runs", "versions": needs.versions | {"torch": "2.12.1", "peft": None}}
    with pytest.raises(NodeError) as caught:
        needs.check("id", "node 10.0.0.2 (gpu-2)", found | other)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (type(error), error.node, error.exit_code) == (NodeError, "id", 1)
        assert "node 10.0.0.2 (gpu-2) sees another folder at /runs" in error.what
        assert f"torch: driver {needs.versions['torch']}, node 10.0.0.2 (gpu-2) 2.12.1" in error.what
        assert f"peft: driver {needs.versions['peft']}, node 10.0.0.2 (gpu-2) has none" in error.what
        assert "put run.dir" in error.remedies[0]
        assert "pip install" in error.remedies[1]
        assert "python -m raycv.run resume=mine" in error.remedies[2]


@pytest.mark.parametrize("hidden", ["gone", "empty", "another"])
def test_without_the_share_nothing_is_written_and_nothing_made(tmp_path, monkeypatch, hidden):
    """Before a write, and when the share goes while it is under way."""
    monkeypatch.setattr("raycv.resources.survey.SETTLE_SECONDS", 0.1)
    run, needs = marked(tmp_path / "runs" / "mine")
    share = needs.share_at("id", "node 10.0.0.2 (gpu-2)")

    def hide():
        run.root.parent.rename(tmp_path / "elsewhere")
        if hidden != "gone":
            run.root.mkdir(parents=True)
        if hidden == "another":
            marked(tmp_path / "other")[0].share.rename(run.share)

    def write():
        with share.held():
            hide()
            raise OSError("what a write would raise")

    node = "node 10.0.0.2 (gpu-2)"
    with refuses("cluster-node", node, run.root, "raycv.run resume=mine", error=NodeError):
        write()
    before = sorted(tmp_path.rglob("*"))
    with refuses("cluster-node", node, run.root, error=NodeError), share.held():
        pytest.fail("it is checked before")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.long
def test_what_a_fold_writes_never_makes_the_folder_of_the_run(tmp_path):
    """Where the check before comes too early: the writes themselves make no more than the fold's folder."""
    from raycv.orchestration.fold_task import ProgressBoard
    from raycv.orchestration.fold_worker import save_fold_checkpoint
    from raycv.training.state import StateFolder

    (tmp_path / "runs").mkdir()
    run = RunFolder(tmp_path / "runs" / "mine")
    writes = [
        StateFolder(run.fold(0).state).take,
        lambda: save_fold_checkpoint(run.fold(0), None, None, None),
        lambda: write_json(run.fold(0).error, {}),
    ]
    for write in writes:
        with pytest.raises((UserError, FileNotFoundError)):
            write()
    ProgressBoard(str(run.ray / "board.json")).begin(0)
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_board_keeps_restarts_for_its_next_process(tmp_path):
    from raycv.orchestration.fold_task import ProgressBoard

    kept = tmp_path / "board.json"
    board = ProgressBoard(str(kept))
    board.begin(1)
    board.restart(1, "a worker died")
    again = ProgressBoard(str(kept))
    assert (again.begun(1), again.restarts(1), again.restarts(0)) == (1, ["a worker died"], [])


def test_workers_that_begin_again_without_a_death_are_a_restart_by_ray(tmp_path):
    from raycv.orchestration.fold_task import NODE_LEAVES, ProgressBoard

    board = ProgressBoard(str(tmp_path / "board.json"))
    for _ in range(2):
        board.train(0)
    board.restart(0, "a worker died")
    board.train(0)
    board.train(1)
    assert (board.restarts(0), board.restarts(1)) == ([NODE_LEAVES, "a worker died"], [])


def test_a_resumed_run_keeps_the_restarts_and_counts_attempts_from_zero(tmp_path):
    from raycv.cv.resumed_run import clear_ray
    from raycv.orchestration.fold_task import ProgressBoard

    run = RunFolder(tmp_path)
    run.ray.mkdir()
    board = ProgressBoard(str(run.board))
    board.begin(1)
    board.restart(1, "a worker died")
    (run.ray / "tune").mkdir()
    clear_ray(run, finished=False)
    assert list(run.ray.iterdir()) == [run.board]
    resumed = ProgressBoard(str(run.board))
    assert (resumed.begun(1), resumed.restarts(1), resumed.left_out()) == (0, ["a worker died"], {})
    clear_ray(run, finished=True)
    assert not run.ray.exists()
    clear_ray(run, finished=False)
    assert not run.ray.exists()


@pytest.mark.long
def test_a_fold_is_finished_when_the_driver_finds_what_the_worker_wrote(tmp_path, monkeypatch):
    """Its weights are missing here, or others than the worker's: the result is set aside, and the node is named."""
    from raycv.orchestration.ray_tune import FoldStates

    monkeypatch.setattr("raycv.resources.survey.SETTLE_SECONDS", 0.1)
    run = finished_run(tmp_path / "runs" / "mine", folds=3)
    for fold in range(3):
        files = run.fold(fold)
        files.state.mkdir()
        worker = {"host": "gpu-2", "address": "10.0.0.2"}
        write_json(files.result, read_json(files.result) | {"sha256": files.sums(), "worker": worker})
    shutil.rmtree(run.fold(1).checkpoint)
    (run.fold(2).checkpoint / "raycv.json").write_text("{ }")
    view = LiveView(range(3), 1, 8, Console(file=io.StringIO()))
    states = FoldStates(view, run, task=None)
    assert [states.finished(fold) for fold in range(3)] == [True, False, False]
    assert run.finished(3) == [0]
    assert [run.fold(fold).state.is_dir() for fold in range(3)] == [False, True, True]
    assert "checkpoint/raycv.json is missing" in states.errors[1]
    assert "checkpoint/raycv.json is damaged" in states.errors[2]
    assert all("at node 10.0.0.2 (gpu-2); the driver does not find" in states.errors[fold] for fold in (1, 2))
    assert [states.finished(fold) for fold in range(3)] == [True, False, False]


def test_the_kind_of_a_failed_fold_is_that_of_its_error(tmp_path):
    """An earlier version wrote none, and a later one may write another."""
    from types import SimpleNamespace

    from raycv.orchestration.ray_tune import FoldStates

    run = RunFolder(tmp_path / "runs" / "mine")
    states = FoldStates(
        LiveView(range(3), 1, 8, Console(file=io.StringIO())), run, task=SimpleNamespace(published=None)
    )
    for fold, more in enumerate([{"kind": "memory-full"}, {}, {"kind": "of-a-later-version"}]):
        run.fold(fold).root.mkdir(parents=True)
        write_json(run.fold(fold).error, {"message": "why", "remedies": [], "traceback": "", **more})
        states.on_trial_complete(1, [], SimpleNamespace(config={"fold": fold}))
    assert states.kinds == ["memory-full", "run-failed", "run-failed"]
