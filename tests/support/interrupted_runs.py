"""Runs that are interrupted amid an epoch, and the unbroken run that they must equal."""

import contextlib
import sqlite3

import pytest

from raycv.common.files import read_json
from raycv.results.run_folder import RunFolder
from support.commands import background, raycv, statuses, wait_until

SMALL = ["experiment=quickstart", "cv.folds=2", "train.epochs=3", "train.checkpoint_minutes=0.01"]


def points(folder):
    """(run name, metric, step) of every point in the MLflow database of `folder`."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as connection:
        rows = connection.execute("SELECT r.name, m.key, m.step FROM metrics m JOIN runs r USING (run_uuid)").fetchall()
    return sorted(rows)


def without_seconds(value):
    if isinstance(value, dict):
        differ = ("seconds", "finished", "restarts")
        return {key: without_seconds(part) for key, part in value.items() if key not in differ}
    return [without_seconds(part) for part in value] if isinstance(value, list) else value


RUN = [*SMALL, "run.name=mine", "cv.max_concurrent=1", "resources.cpus_per_fold=1"]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted. `conftest.py` has it, so that all tests share one."""
    folder = tmp_path_factory.mktemp("whole")
    result = raycv("run", *RUN, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def started(folder, *more, **environment):
    """The same run in `folder`."""
    return background(folder, *RUN, *more, **environment)


def wait_for(process, folder, there):
    """Until `there()` holds, while the run goes on."""
    wait_until(there, process, folder / "out", seconds=1200)


def amid_an_epoch(fold):
    """Whether the newest state of `fold` lies within an epoch, another behind it."""
    return any(path.name > "000001" and not path.name.endswith("-000000000") for path in fold.state.glob("0*"))


def resume(folder, *words, kept=None):
    """Goes on with the run in `folder`; returns what that says. Its finished folds, or `kept`, are not touched."""
    run = RunFolder(folder / "runs" / "mine")
    kept = {fold: run.fold(fold).result.stat().st_mtime_ns for fold in kept or run.finished(2)}
    result = raycv("run", *words, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Resuming run mine: {len(kept)} finished fold" in result.stdout
    assert kept == {fold: run.fold(fold).result.stat().st_mtime_ns for fold in kept}
    return result.stdout


def assert_like_unbroken(folder, whole):
    """Files, numbers and weights of the run in `folder` are those of the one in `whole`, and so is MLflow."""
    run, expected = RunFolder(folder / "runs" / "mine"), RunFolder(whole / "runs" / "mine")
    for fold in range(2):
        one, other = run.fold(fold), expected.fold(fold)
        names = {"result.json", "predictions.csv", "epoch_scores.npy", "checkpoint"}
        assert {path.name for path in one.root.iterdir()} == names
        assert without_seconds(read_json(one.result)) == without_seconds(read_json(other.result))
        assert one.predictions.read_bytes() == other.predictions.read_bytes()
        assert one.epoch_scores.read_bytes() == other.epoch_scores.read_bytes()
        weights = "adapter_model.safetensors"
        assert (one.checkpoint / weights).read_bytes() == (other.checkpoint / weights).read_bytes()
    assert without_seconds(read_json(run.report)) == without_seconds(read_json(expected.report))
    assert run.pairs.read_bytes() == expected.pairs.read_bytes()
    assert run.near_duplicates.read_bytes() == expected.near_duplicates.read_bytes()
    assert {path.name for path in run.root.iterdir()} == {path.name for path in expected.root.iterdir()}
    assert statuses(folder) == {"mine": "FINISHED", "fold_0": "FINISHED", "fold_1": "FINISHED"}
    assert points(folder) == points(whole)
    assert len(points(folder)) == len(set(points(folder)))
