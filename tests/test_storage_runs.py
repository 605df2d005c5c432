"""Runs whose folder is an object storage, for real: Ray, training, and a server that is away for a while."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import raycv, users_environment
from support.interrupted_runs import RUN, started, wait_for
from support.object_storage import RUNS, ObjectStorage, storage  # noqa: F401
from support.refusals import said_refusal

from raycv.common.locations import FETCHED, WORK, runs_folder
from raycv.results.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
STATE = re.compile(r"mine/fold_(\d)/state/[\d-]+/\.published\.json")
IMPATIENT = "import raycv.results.storage as s; s.WAIT_SECONDS = 3; from raycv.run import main; main()"


def has_state(storage: ObjectStorage, fold: int) -> bool:
    return any(match[1] == str(fold) for name in storage.names("mine") if (match := STATE.fullmatch(name)))


def said(folder: Path) -> str:
    return " ".join((folder / "out").read_text().split())


def same_folds(storage: ObjectStorage, whole: Path) -> None:
    """The published folds are those of a run that nothing interrupted, and their states are gone."""
    for fold in (0, 1):
        files = RunFolder(whole / "runs" / "mine").fold(fold)
        assert storage.read(f"mine/fold_{fold}/predictions.csv") == files.predictions.read_bytes()
        assert storage.read(f"mine/fold_{fold}/epoch_scores.npy") == files.epoch_scores.read_bytes()
        weights = files.checkpoint / "adapter_model.safetensors"
        assert storage.read(f"mine/fold_{fold}/checkpoint/{weights.name}") == weights.read_bytes()
    assert not any("/state/" in name for name in storage.names("mine"))


def test_a_run_whose_machine_is_lost_resumes_from_the_bucket(storage, whole, tmp_path):
    with started(tmp_path, f"run.dir={RUNS}") as process:
        wait_for(process, tmp_path, lambda: has_state(storage, 1))
    shutil.rmtree(runs_folder(RUNS, WORK))
    done = raycv("run", "resume=latest", f"run.dir={RUNS}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 finished fold of 2 kept" in done.stdout
    assert "resumes after epoch" in done.stdout
    assert f"Published:     {RUNS}/mine" in done.stdout
    same_folds(storage, whole)
    assert not (runs_folder(RUNS, WORK) / "mine").exists()
    assert (runs_folder(RUNS, FETCHED) / "mine" / "report.html").is_file()
    again = raycv("run", "resume=mine", f"run.dir={RUNS}", cwd=tmp_path)
    said_refusal(again.stderr, "run-exists", f"dir={RUNS}")


def test_training_continues_while_the_storage_is_away(storage, whole, tmp_path):
    with started(tmp_path, f"run.dir={RUNS}") as process:
        wait_for(process, tmp_path, lambda: has_state(storage, 0))
        storage.stop()
        wait_for(process, tmp_path, lambda: "Training continues" in said(tmp_path))
        storage.come_back()
        wait_for(process, tmp_path, lambda: "the object storage answers again" in said(tmp_path))
        assert process.wait(600) == 0, said(tmp_path)
    assert f"Published: {RUNS}/mine" in said(tmp_path)
    same_folds(storage, whole)


def test_a_run_that_cannot_be_published_keeps_everything_and_publishes_it_later(storage, whole, tmp_path):
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, *RUN, f"run.dir={RUNS}"],
            cwd=tmp_path,
            env=users_environment(),
            stdout=out,
            stderr=out,
        )
    wait_for(process, tmp_path, lambda: has_state(storage, 0))
    storage.stop()
    kept = runs_folder(RUNS, WORK) / "mine"
    assert process.wait(900) == 1, said(tmp_path)
    said_refusal((tmp_path / "out").read_text(), "storage-unreachable", "complete, but not published", kept)
    assert f"python -m raycv.aggregate run=mine dir={RUNS}" in said(tmp_path)
    assert RunFolder(kept).report.is_file()
    storage.come_back()
    later = raycv("aggregate", "run=mine", f"dir={RUNS}", cwd=tmp_path)
    assert later.returncode == 0, later.stderr
    same_folds(storage, whole)
    assert not kept.exists()
