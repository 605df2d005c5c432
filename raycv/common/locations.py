"""Resolves locations: files that ship with the package (raycv://...), absolute folders, store addresses, local copies.

Checks the folder of Ray's files too, and knows the addresses within MLflow's page.
"""

import os
import re
from pathlib import Path

from raycv.common.files import check_writable
from raycv.errors import UserError, counted

SQLITE = "sqlite:///"
BUNDLED_SCHEME = "raycv://"
DEFAULT_CRITERIA = "data/dsm5"
"""Folder of the default criteria. If the working directory lacks it, the copy that ships with raycv is used."""

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package `raycv`."""


def bundled(relative: str) -> Path:
    """The path of a file or folder that ships with raycv: in the package in a wheel, at top level in a checkout.

    Raises:
        UserError: It is in neither place, so the installation is broken.
    """
    for root in (PACKAGE / "bundled", PACKAGE.parent):
        if (root / relative).exists():
            return root / relative
    raise UserError(
        f"raycv's own {relative!r} is missing beside {PACKAGE}: the installation is incomplete.",
        kind="package-damaged",
        remedies=["reinstall: pip install --force-reinstall --no-deps raycv (or pip install -e . in a checkout)"],
    )


def resolve(location: str) -> str:
    """Turns the location of a config into one that holds on this node: `raycv://x` becomes the path in the package.

    Other locations stay unchanged, except DEFAULT_CRITERIA where no such folder exists. Nodes may have the package in
    different places, so each caller resolves a location where it uses it, not in the driver.

    Raises:
        UserError: The package lacks the file.
    """
    location = _or_bundled(location)
    if location.startswith(BUNDLED_SCHEME):
        return str(bundled(location.removeprefix(BUNDLED_SCHEME)))
    return location


def absolute_folder(location: str) -> str:
    """`location` as an absolute path; a file that ships with the package keeps its raycv:// name."""
    location = _or_bundled(location)
    return location if location.startswith(BUNDLED_SCHEME) else str(Path(location).absolute())


def _or_bundled(location: str) -> str:
    return BUNDLED_SCHEME + location if location == DEFAULT_CRITERIA and not Path(location).is_dir() else location


def absolute_uri(uri: str) -> str:
    """Makes the path in a SQLite URI absolute, since Ray changes the working directory. Other URIs stay unchanged.

    Raises:
        UserError: The absolute path holds `?`, `#` or `%`, which a database URI cannot hold.
    """
    if uri.startswith(SQLITE):
        path = str(Path(uri.removeprefix(SQLITE)).absolute())
        if set(path) & set("?#%"):
            raise UserError(
                f"tracking.uri={uri}: the database would be {path}, and a database URI cannot hold ?, # or %.",
                kind="tracking-store",
                remedies=["run in another folder", "tracking.uri=sqlite:////another/folder/mlflow.db"],
            )
        return SQLITE + path
    return uri


OBJECT_STORAGE = "s3://"
"""The beginning of an address in an object storage."""
WORK, FETCHED = "work", "fetched"
"""The kinds of local copies of runs in an object storage: those of runs under way, and those of reading commands."""


def runs_folder(place: str, kind: str = FETCHED) -> Path:
    """The local folder of the runs in `place`: the folder itself, or where local copies of that kind lie."""
    if not place.startswith(OBJECT_STORAGE):
        return Path(place)
    return _copies(kind) / place.removeprefix(OBJECT_STORAGE).strip("/")


def place_of(path: Path) -> str:
    """The address of a local copy, or of a file in one; any other path as it is."""
    return address_of(path, WORK) or address_of(path) or str(path)


def address_of(path: Path, kind: str = FETCHED) -> str | None:
    """The address in the object storage if `path` is a local copy of that kind, or lies in one; otherwise None."""
    copies = _copies(kind)
    if path == copies or not path.is_relative_to(copies):
        return None
    return OBJECT_STORAGE + path.relative_to(copies).as_posix()


def _copies(kind: str) -> Path:
    cache = os.environ.get("RAYCV_CACHE") or os.path.expanduser("~/.cache/raycv")
    return Path(cache).absolute() / kind / OBJECT_STORAGE.removesuffix("://")


TRAINING_VIEW = "?workflowType=machine_learning"
"""The end of an address within MLflow's page, for its view of model training. Without it MLflow shows that of GenAI."""


def experiment_page(uri: str, experiment_id: str) -> str:
    """The address of an experiment's runs: at the server `uri`, else where `mlflow ui` serves a local store."""
    server = re.sub("//[^/]*@", "//", uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{server}/#/experiments/{experiment_id}/runs{TRAINING_VIEW}"


_SOCKET_LIMIT = 107
"""Bytes in the path of a Unix socket at most, on Linux."""


def ray_folder() -> Path:
    """The folder in which a Ray that starts on this machine keeps its files."""
    return Path(os.environ.get(_ray_variable(), "/tmp")) / "ray"


def _ray_variable() -> str:
    return "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ or "TMPDIR" not in os.environ else "TMPDIR"


def check_ray_folder() -> None:
    """Checks `ray_folder` if Ray starts on this machine. Ray itself would refuse it late, and not in words.

    Raises:
        UserError: The folder cannot be written, or its path is too long for the sockets of Ray.
    """
    if os.environ.get("RAY_ADDRESS", "") not in ("", "local"):
        return
    folder = ray_folder()
    received = f"{_ray_variable()}={folder.parent}"
    remedy = "name a short folder that you may write to: export RAY_TMPDIR=/tmp/$USER"
    # Ray names the folder of a session by the time and its process.
    socket = f"{folder}/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    if (excess := len(os.fsencode(socket)) - _SOCKET_LIMIT) > 0:
        raise UserError(
            f"{received} is too long for Ray by {counted(excess, 'byte')}: the sockets below it may have paths of "
            f"{_SOCKET_LIMIT} bytes.",
            kind="cluster-unreachable",
            remedies=[remedy],
        )
    try:
        check_writable(folder)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be written ({error.strerror}), and Ray keeps its files in {folder} ({received}).",
            kind="disk-unwritable",
            remedies=[remedy],
        ) from error
