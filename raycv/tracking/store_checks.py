"""Checks before a run whether the MLflow store can be used: the database, and the folder of artifacts."""

import contextlib
import os
import re
import sqlite3
from functools import partial
from pathlib import Path

from raycv.common.files import check_writable
from raycv.common.locations import SQLITE, absolute_uri
from raycv.config.schema import TrackingConfig
from raycv.errors import UserError

NETWORK = re.compile(
    "nfs|cifs|smb|9p|afs|ceph|lustre|gpfs|beegfs|glusterfs|"
    r"fuse\.(sshfs|s3fs|mountpoint-s3|gcsfuse|rclone|juicefs|glusterfs|ceph|goofys|blobfuse)"
)
"""The types of file systems that other machines may write to."""
LOCK_SECONDS = 60
"""Seconds to wait for another process that makes or migrates the tables of a SQLite file."""


def new_database(config: TrackingConfig) -> Path | None:
    """The SQLite database that does not exist yet; None if it exists, or if the store is a server."""
    uri = absolute_uri(config.uri)
    database = Path(uri.removeprefix(SQLITE))
    return database if uri.startswith(SQLITE) and not os.path.exists(database) else None


def new_store_faults(config: TrackingConfig) -> list[UserError]:
    """Why a store that does not exist yet cannot be made; empty if it can, if it exists, or if it is a server."""
    database = new_database(config)
    if database is None:
        return []
    faults = []
    for check in (partial(_check_new_database, database), partial(check_new_artifacts, config)):
        try:
            check()
        except UserError as error:
            faults.append(error)
    return faults


def check_database(database: Path, seconds: int | None) -> None:
    """Refuses a database that cannot be used, because MLflow would retry it for minutes.

    Args:
        database: The SQLite file.
        seconds: How long to wait for a locked database before it is refused. None leaves a locked one to the retries.

    Raises:
        UserError: The database cannot be opened or made.
    """
    if not os.path.exists(database):
        _check_new_database(database)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        # This query would create a database that does not exist, so we ask only one that does.
        if os.path.exists(database):
            with contextlib.closing(sqlite3.connect(database, timeout=seconds or 5)) as connection:
                connection.execute("PRAGMA schema_version")
        # FileLock waits on a path that it cannot create, so we fail early.
        open(lock_of(database), "a").close()
    except (OSError, sqlite3.Error) as error:
        if "locked" in str(error) and seconds is None:
            # Another process holds the lock for a while, and the retries outlast it.
            return
        raise _no_database(database, error) from error


def _check_new_database(database: Path) -> None:
    """Raises: UserError if `database` cannot be made."""
    try:
        check_writable(database.parent)
    except OSError as error:
        raise _no_database(database, error) from error


def _no_database(database: Path, error: Exception) -> UserError:
    remedies = ["tracking.uri=sqlite:////folder/mlflow.db in a folder that you may write to"]
    if "locked" in str(error):
        remedies = ["wait until the other process has let go of it"]
    return UserError(
        f"The MLflow database {database} cannot be opened: {error}.", kind="tracking-store", remedies=remedies
    )


def check_new_artifacts(config: TrackingConfig) -> None:
    check_artifacts(Path(config.artifacts).absolute(), ["tracking.artifacts=<a folder that you may write to>"])


def check_artifacts(folder: Path, remedies: list[str], why: str = "it is to hold the artifacts") -> None:
    """Raises: UserError if `folder` cannot be written. MLflow would still bind the experiment to it."""
    try:
        check_writable(folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}), and {why}.", kind="disk-unwritable", remedies=remedies
        ) from error


def place_of(error: BaseException, otherwise: Path) -> Path:
    """The folder of the file that could not be written. The copy of an artifact names two files; we take its target."""
    file = getattr(error, "filename2", None) or getattr(error, "filename", None) or otherwise
    return Path(file).parent


def network_warning(uri: str) -> str | None:
    """Warns of a SQLite database on a network file system, whose locks SQLite cannot trust; None for any other store.

    Args:
        uri: The address of the store.
    """
    uri = absolute_uri(uri)
    if not uri.startswith(SQLITE):
        return None
    import psutil

    database = Path(uri.removeprefix(SQLITE))
    mounts = [part for part in psutil.disk_partitions(all=True) if database.is_relative_to(part.mountpoint)]
    mount = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    if mount is None or not NETWORK.match(mount.fstype):
        return None
    return (
        f"the MLflow database {database} is on a network file system ({mount.fstype}), where SQLite's locks may fail. "
        "Serve one from the disk of a machine: mlflow server --backend-store-uri sqlite:////disk/mlflow.db --host "
        "0.0.0.0, and name it: tracking.uri=http://<machine>:5000"
    )


def lock_of(database: Path) -> str:
    return f"{database}.lock"
