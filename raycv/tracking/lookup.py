"""Finds a run in an MLflow store, or logs it there again from its folder."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycv.common.files import write_json
from raycv.common.locations import SQLITE
from raycv.errors import UserError
from raycv.results.find_run import recorded_config, runs_there
from raycv.results.run_folder import RunFolder, read_record

if TYPE_CHECKING:
    from raycv.tracking.cross_validation import CrossValidationStore

logger = logging.getLogger(__name__)
LOCAL_URI = f"{SQLITE}mlflow.db"


def mlflow_run(run: str, runs: Path, uri: str) -> tuple["CrossValidationStore", Any]:
    """Opens the store at `uri` and reads its run with the id `run`.

    Args:
        run: An MLflow run id. The caller has found no run of that name in `runs`.
        runs: The folder that holds the runs, for the message.
        uri: The address of the store.

    Returns:
        The store and the MLflow run.

    Raises:
        UserError: The store cannot be opened, or has no such run.
    """
    what = f"run={run} is neither a run in {runs.absolute()} nor an MLflow run"
    try:
        store = open_store(uri)
    except UserError as error:
        raise UserError(
            f"{what}: {error.what}",
            kind=("run-missing", *error.kinds),
            remedies=[*runs_there(runs, run), *error.remedies],
        ) from error
    try:
        return store, store.run(run)
    except UserError as error:
        raise UserError(f"{what}: {error.what}", kind="run-missing", remedies=runs_there(runs, run)) from error


def open_store(uri: str, seconds: int | None = None) -> "CrossValidationStore":
    """Opens the MLflow store at `uri`; `seconds` as in Store.

    Raises:
        UserError: The password or the database of the store is missing, or the store cannot be opened.
    """
    from raycv.tracking.cross_validation import CrossValidationStore

    check_password(uri)
    database = uri.removeprefix(SQLITE)
    if database != uri and not Path(database).is_file():
        raise UserError(
            f"The MLflow database {Path(database).absolute()} does not exist.",
            kind="tracking-store",
            remedies=["run it where the cross-validation ran", "give its place: sqlite:////folder/mlflow.db"],
        )
    return CrossValidationStore(uri, seconds)


def tracked_run(folder: RunFolder, uri: str, key: str, *, given: bool) -> tuple["CrossValidationStore", str]:
    """Opens the store at `uri` and finds the parent run of the run in `folder` there.

    If a `given` store lacks the run, the run is logged there from its folder. The recorded store may be lost, or the
    file in the folder that names the run's id. The folder then names the store that was given.

    Args:
        folder: The run folder.
        uri: The address of the store, which is the value of `key`.
        key: The config key of the address, for remedies.
        given: Whether the user gave `uri`. Otherwise it was read from the folder.

    Returns:
        The store, and the id of the parent run there.

    Raises:
        UserError: The store cannot be used, or it lacks the run and was not given.
    """
    from raycv.tracking.cross_validation import CrossValidationStore
    from raycv.tracking.experiment import open_experiment

    try:
        tracked = read_record(folder.tracking, "uri", "parent_run_id")
    except UserError:
        if not given:
            raise
        tracked = {}
    parent_id = str(tracked.get("parent_run_id"))
    try:
        store = CrossValidationStore(uri) if given else open_store(uri)
        if tracked and store.has(parent_id):
            if given and tracked["uri"] != store.shown_uri:
                write_json(folder.tracking, tracked | {"uri": store.shown_uri})
            return store, parent_id
    except UserError as error:
        raise UserError(error.what, kind=error.kinds, remedies=[*error.remedies, _another_store(key)]) from error
    if not given:
        remedies = ["give the store that has it, by the same key", _another_store(key)]
        raise UserError(
            f"MLflow at {store.shown_uri} does not have run {parent_id}.", kind="tracking-store", remedies=remedies
        )
    logger.warning("MLflow at %s does not have this run: it is logged there from its folder", store.shown_uri)
    config = recorded_config(folder)
    return store, store.start_family(folder, config, open_experiment(store, config.tracking))


def recorded_uri(folder: RunFolder, key: str) -> str:
    """The address of the store that has the run in `folder`; `key` is the config key for another address.

    Raises:
        UserError: The folder does not name the store.
    """
    try:
        return str(read_record(folder.tracking, "uri", "parent_run_id")["uri"])
    except UserError as error:
        raise UserError(error.what, kind=error.kinds, remedies=[*error.remedies, _another_store(key)]) from error


def _another_store(key: str) -> str:
    return f"or give another, new or old, and what the run's folder has is logged there: {key}=sqlite:///new.db"


def check_password(uri: str) -> None:
    """Raises: UserError if `uri` was read from a file and has its password masked there."""
    if "***" in uri:
        raise UserError(
            f"The run was tracked at {uri}, whose password was not written down.",
            kind="tracking-store",
            remedies=["give the whole address as the tracking URI, with user:password@ before the host"],
        )
