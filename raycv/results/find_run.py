"""Finds a run folder by its name or as `latest`, and reads the config that it recorded."""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from raycv.common.environment import recorded_moment
from raycv.common.files import write_json
from raycv.common.locations import address_of, place_of
from raycv.config.plain import SafeLoader
from raycv.errors import FaultsError, UserError, first_of, shown
from raycv.results.run_folder import AFRESH, GOOD_COPY, RunFolder, read_record
from raycv.results.storage import fetched_run, published_runs

if TYPE_CHECKING:
    from raycv.config.schema import RunConfig

LATEST = "latest"
MOST_NAMES = 5
QUICKSTART = "make one: python -m raycv.run experiment=quickstart"


def find_run(runs: Path, run: str) -> RunFolder | None:
    """Returns the folder of the run named `run`, or None if no run has that name.

    `latest` means the newest run whose folds are all finished. If no run is finished, it means the newest of all.
    A run in an object storage is fetched first, without its checkpoints.

    Args:
        runs: The folder that holds the runs, or that of local copies of an object storage (`runs_folder`).
        run: A name, the path of a run's folder, or `latest`.

    Raises:
        UserError: `latest` is asked for and the folder holds no run, a folder cannot be read, or the object storage
            does not answer or refuses.
    """
    with looking_for(run):
        if address_of(runs.absolute()) and (run == LATEST or Path(run).name == run):
            return _latest_published(runs) if run == LATEST else fetched_run(runs, run)
        if run != LATEST:
            # The shell completes the path of a run's folder, so we accept it like a name.
            named = (folder for folder in (runs / run, Path(run)) if (folder / "config.yaml").is_file())
            return next((RunFolder(folder.absolute()) for folder in named), None)
        made = runs_in(runs)
        if not made:
            raise _no_run(runs)
        return next((folder for folder in reversed(made) if is_finished(folder)), made[-1])


def _no_run(runs: Path) -> UserError:
    remedies = [QUICKSTART, "name the folder that holds them: dir=<folder>"]
    return UserError(f"{place_of(runs.absolute())} holds no run.", kind="run-missing", remedies=remedies)


def _latest_published(runs: Path) -> RunFolder | None:
    """The run that `latest` means in an object storage. It fetches the records of few runs, the newest first."""
    there = published_runs(runs)
    for name in reversed(there):
        # A run is finished when it has its report, or all of its folds, which the fetched records tell.
        folder = fetched_run(runs, name)
        if folder is not None and is_finished(folder):
            return folder
    if not there:
        raise _no_run(runs)
    return fetched_run(runs, list(there)[-1])


def existing_run(runs: Path, run: str) -> RunFolder:
    """Returns the folder of the run named `run`, as `find_run` does. Raises: UserError if no run has that name."""
    folder = find_run(runs, run)
    if folder is None:
        there = runs_there(runs, Path(run).name)
        raise UserError(f"{place_of(runs.absolute())} holds no run {run}.", kind="run-missing", remedies=there)
    return folder


def said_latest(run: str, folder: RunFolder) -> str | None:
    """Returns which run `latest` is; None if the user named the run."""
    return f"run=latest is {folder.root.name}" if run == LATEST else None


@contextmanager
def looking_for(run: str) -> Iterator[None]:
    """Explains why the search for `run` failed.

    Raises:
        UserError: `run` is too long for a name, or leads to a folder that may not be read.
    """
    try:
        yield
    except OSError as error:
        where = f"{shown(str(error.filename), most=200)}: {error.strerror}"
        remedies = [
            "give a run's name or folder, an MLflow run id, a checkpoint folder, or latest",
            "see to the permissions of that folder",
        ]
        raise UserError(
            f"run={shown(run)} cannot be looked for: {where}.", kind="run-missing", remedies=remedies
        ) from error


def runs_in(runs: Path) -> list[RunFolder]:
    """Returns all runs in the folder `runs`, the newest last, by the time of their start."""
    made = [RunFolder(path.parent) for path in runs.absolute().glob("*/config.yaml")]
    return sorted(made, key=lambda folder: (started_at(folder), folder.root))


def started_at(folder: RunFolder) -> float:
    """When the run in `folder` started, in seconds since 1970.

    The run records it, so a copy is as old as its run. Earlier versions did not: then it is the time of `config.yaml`.
    """
    try:
        started = read_record(folder.environment).get("started")
    except (UserError, OSError):
        started = None
    return float(started) if isinstance(started, int | float) else folder.config.stat().st_mtime


def runs_there(runs: Path, meant: str, folder_key: str = "dir") -> list[str]:
    """Returns remedies if the folder `runs`, which `folder_key` sets, has no run named `meant`."""
    if place_of(runs.absolute()) != str(runs.absolute()):
        names = list(reversed(published_runs(runs)))
    else:
        names = [folder.root.name for folder in reversed(runs_in(runs))]
    if near := difflib.get_close_matches(meant, [*names, LATEST], n=1):
        there = f"did you mean {near[0]}?"
    elif names:
        there = f"the runs there are ({LATEST} is the newest): {first_of(names, MOST_NAMES)}"
    else:
        there = QUICKSTART
    return [there, f"another folder: {folder_key}=<folder>"]


def make_newest(folder: RunFolder) -> None:
    """Makes `latest` mean the run in `folder`, even if the clock was set back since another run was made."""
    newest = max((started_at(other) for other in runs_in(folder.root.parent) if other.root != folder.root), default=0.0)
    if started_at(folder) <= newest:
        # Some file systems count only whole seconds, or every second one, so we add two.
        os.utime(folder.config, (newest + 2, newest + 2))
        if folder.environment.is_file():
            write_json(folder.environment, read_record(folder.environment) | {"started": newest + 2})


def folds_of(config_file: Path) -> int:
    """Returns the number of folds that the run was asked for.

    Raises:
        UserError: Its config cannot be read, or does not hold the number.
    """
    try:
        return int(yaml.load(config_file.read_text(encoding="utf-8"), SafeLoader)["cv"]["folds"])
    except OSError as error:
        raise UserError(
            f"{config_file} cannot be read: {error.strerror}.", kind="run-damaged", remedies=[GOOD_COPY]
        ) from error
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(
            f"{config_file} is damaged: it does not say how many folds were asked for.",
            kind="run-damaged",
            remedies=[GOOD_COPY],
        ) from error


def is_control(folder: RunFolder) -> bool:
    """Whether the run learned from permuted labels; False if its record cannot be read."""
    try:
        return bool(read_record(folder.data_stats).get("labels_shuffled", False))
    except UserError:
        return False


def finished_at(folder: RunFolder) -> str | None:
    """Returns when the run in `folder` was complete, or None if it is not or its report has no time."""
    try:
        return recorded_moment(read_record(folder.report).get("finished"))
    except (UserError, OSError):
        # A checkpoint can answer without a report, so a missing or damaged one is not an error.
        return None


def recorded_config(folder: RunFolder) -> "RunConfig":
    """Returns the config of the run in `folder`.

    Raises:
        UserError: The config is damaged, cannot be read, or is from another version of raycv.
    """
    from raycv.config.schema import RunConfig
    from raycv.config.validation import validate

    remedies = [GOOD_COPY, AFRESH]
    try:
        values = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("data"), dict):
            # Earlier versions had no such key and kept NaN and the like as text. The run must see the same data, so we
            # set it.
            values["data"].setdefault("missing", "text")
        return validate(RunConfig, values, recorded=True)
    except OSError as error:
        raise UserError(
            f"{folder.config} cannot be read: {error.strerror}.", kind="run-damaged", remedies=remedies
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder.config} is damaged: it is not YAML.", kind="run-damaged", remedies=remedies
        ) from error
    except FaultsError as error:
        what = f"{folder.config} is damaged, or of another version of raycv.\n{error.what}"
        raise UserError(what, kind="run-damaged", remedies=remedies) from error


def is_finished(folder: RunFolder) -> bool:
    try:
        folds = folds_of(folder.config)
        return len(folder.finished(folds)) == folds
    except UserError:
        return False


def finished_folds(folder: RunFolder) -> list[int]:
    return folder.finished(folds_of(folder.config))
