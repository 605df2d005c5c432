"""Finds a run in an MLflow store, or logs it there anew from its folder."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycv.common.files import read_record, write_json
from raycv.errors import UserError
from raycv.results.find_run import recorded_config, runs_there
from raycv.results.run_folder import RunFolder

if TYPE_CHECKING:
    from raycv.tracking.tracker import Tracker

logger = logging.getLogger(__name__)
LOCAL_URI = "sqlite:///mlflow.db"


def mlflow_run(run: str, runs: Path, uri: str) -> tuple["Tracker", Any]:
    """The store at `uri` and its run with the id `run`, which is no run in the folder `runs`.

    Raises: UserError if there is none.
    """
    what = f"run={run} is neither a run in {runs.absolute()} nor an MLflow run"
    try:
        tracker = open_tracker(uri)
    except UserError as error:
        raise UserError(f"{what}: {error.what}", remedies=[*runs_there(runs, run), *error.remedies]) from error
    try:
        return tracker, tracker.run(run)
    except UserError as error:
        raise UserError(f"{what}: {error.what}", remedies=runs_there(runs, run)) from error


def open_tracker(uri: str, seconds: int | None = None) -> "Tracker":
    """The MLflow store at `uri`; `seconds`: as in Tracker.

    Raises: UserError if its password or its database is missing.
    """
    from raycv.tracking.tracker import Tracker

    check_password(uri)
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).is_file():
        raise UserError(
            f"The MLflow database {Path(database).absolute()} does not exist.",
            remedies=["run it where the cross-validation ran", "give its place: sqlite:////folder/mlflow.db"],
        )
    return Tracker(uri, seconds)


def tracked_run(folder: RunFolder, uri: str, key: str, *, given: bool) -> tuple["Tracker", str]:
    """The store at `uri`, the value of `key`, and the id there of the parent of the run in `folder`.

    A store that is `given`, not read from the folder, and lacks the run gets it from the folder: the other may be lost,
    or the file that says which run it is there. The folder then names the store that was given.
    Raises: UserError if the store cannot be used, or lacks the run and was not given.
    """
    from raycv.tracking.tracker import Tracker

    try:
        tracked = read_record(folder.tracking, "uri", "parent_run_id")
    except UserError:
        if not given:
            raise
        tracked = {}
    parent_id = str(tracked.get("parent_run_id"))
    try:
        tracker = Tracker(uri) if given else open_tracker(uri)
        if tracked and tracker.has(parent_id):
            if given and tracked["uri"] != tracker.shown_uri:
                write_json(folder.tracking, tracked | {"uri": tracker.shown_uri})
            return tracker, parent_id
    except UserError as error:
        raise UserError(error.what, remedies=[*error.remedies, _another_store(key)]) from error
    if not given:
        remedies = ["give the store that has it, by the same key", _another_store(key)]
        raise UserError(f"MLflow at {tracker.shown_uri} does not have run {parent_id}.", remedies=remedies)
    logger.warning("MLflow at %s does not have this run: it is logged there from its folder", tracker.shown_uri)
    config = recorded_config(folder)
    return tracker, tracker.start_family(folder, config, tracker.open_experiment(config.tracking))


def recorded_uri(folder: RunFolder, key: str) -> str:
    """The address of the store that has the run in `folder`; `key`: by which another could be given.

    Raises: UserError if the folder does not say.
    """
    try:
        return str(read_record(folder.tracking, "uri", "parent_run_id")["uri"])
    except UserError as error:
        raise UserError(error.what, remedies=[*error.remedies, _another_store(key)]) from error


def _another_store(key: str) -> str:
    return f"or give another, new or old, and what the run's folder has is logged there: {key}=sqlite:///new.db"


def check_password(uri: str) -> None:
    """Raises: UserError if `uri` comes from a file, where its password was masked."""
    if "***" in uri:
        raise UserError(
            f"The run was tracked at {uri}, whose password was not written down.",
            remedies=["give the whole address as the tracking URI, with user:password@ before the host"],
        )
