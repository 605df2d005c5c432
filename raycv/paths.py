"""Where things lie: what ships with the package, and the files of one run."""

import errno
import hashlib
import json
import os
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycv.errors import UserError

SQLITE = "sqlite:///"
GOOD_COPY = (
    "put a good copy in its place: MLflow may have it among the run's artifacts; finished folds stay as they are"
)
"""What to do about a damaged record of a run."""
AFRESH = "start afresh under a new name, with the settings that you want: python -m raycv.run run.name=<new> ..."
BUNDLED_SCHEME = "raycv://"
DEFAULT_CRITERIA = "data/dsm5"
"""The default criteria ship with raycv: where the working directory has no such folder, those are meant."""

PACKAGE = Path(__file__).resolve().parent


def bundled(relative: str) -> Path:
    """The path of something that ships with raycv: inside the package in a wheel, at top level in a checkout.

    Raises: UserError if it is in neither place (a broken installation).
    """
    for root in (PACKAGE / "bundled", PACKAGE.parent):
        if (root / relative).exists():
            return root / relative
    raise UserError(
        f"raycv's own {relative!r} is missing beside {PACKAGE}: the installation is incomplete.",
        remedies=["reinstall: pip install --force-reinstall --no-deps raycv (or pip install -e . in a checkout)"],
    )


def resolve(location: str) -> str:
    """A config's location as it is on this node: `raycv://x` is what ships with the package, all else is unchanged.

    Resolved at the point of use, not in the driver, since nodes may have the package installed in different places.
    """
    location = _or_bundled(location)
    if location.startswith(BUNDLED_SCHEME):
        return str(bundled(location.removeprefix(BUNDLED_SCHEME)))
    return location


def absolute_folder(location: str) -> str:
    """`location` as it holds from any working directory; what ships with the package stays by its raycv:// name."""
    location = _or_bundled(location)
    return location if location.startswith(BUNDLED_SCHEME) else str(Path(location).absolute())


def _or_bundled(location: str) -> str:
    return BUNDLED_SCHEME + location if location == DEFAULT_CRITERIA and not Path(location).is_dir() else location


def is_full(error: BaseException) -> bool:
    """Whether `error` says that a disk is full, or the user's share of it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # The error of a library in another language, or of another process, is a text.
    texts = ("No space left on device", "Disk quota exceeded", "database or disk is full")
    return any(text in str(error) for text in texts)


def unwritable(what: str, place: Path, error: BaseException, remedies: Sequence[str] = ()) -> UserError:
    """That `what` cannot be written to `place`; where its disk is full, which one that is."""
    cause = getattr(error, "strerror", None) or str(error)
    if not is_full(error):
        return UserError(f"{what} cannot be written to {place}: {cause}.", remedies=remedies)
    disk = place.absolute()
    while not disk.is_mount():
        disk = disk.parent
    usage = shutil.disk_usage(disk)
    room = f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB are free on it"
    return UserError(
        f"{what} cannot be written to {place}: the disk {disk} is full ({room}).",
        remedies=[f"make room on {disk}: du -xh {disk} | sort -h | tail", *remedies],
    )


@contextmanager
def replaced(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yields a temporary path that takes the place of `path` when the block ends well: a reader never sees half.

    A `private` file can be read by the user alone, others as the user's umask says.
    Raises: UserError if the disk is full; `path` is then as it was.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        # One level alone: where a share is not mounted, nobody may make the run's folder anew.
        path.parent.mkdir(exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if is_full(error):
            raise unwritable(path.name, path.parent, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises: OSError if it cannot be read."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Writes `text` whole or not at all."""
    with replaced(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Writes `value` as JSON, whole or not at all; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", private=private)


def read_json(path: Path) -> Any:
    """Raises: UserError if the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error}).") from error
    except RecursionError as error:
        raise UserError(f"{path} is damaged: it is nested too deeply.") from error


def read_record(path: Path, *texts: str, **kinds: Any) -> dict[str, Any]:
    """A JSON object of the run folder, which has the keys `texts`, each a text, and those of `kinds`, of that type.

    Raises: UserError if the file is missing or damaged, or has not these keys.
    """
    try:
        values = read_json(path)
    except UserError as error:
        raise UserError(error.what, remedies=[GOOD_COPY]) from error
    if not isinstance(values, dict):
        fault = "it is no JSON object"
    else:
        kinds = dict.fromkeys(texts, str) | kinds
        lacking = [key for key, kind in kinds.items() if key not in values or not isinstance(values[key], kind)]
        if not lacking:
            return values
        fault = f"it lacks {', '.join(lacking)}"
    raise UserError(f"{path} is damaged: {fault}.", remedies=[GOOD_COPY])


def check_writable(folder: Path) -> None:
    """Raises: OSError, its `filename` the folder that it is about, if files cannot be made in `folder`, or it itself.

    Leaves nothing behind.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        # Tried, not asked: permissions do not tell of file systems that cannot be written.
        tempfile.TemporaryDirectory(dir=place).cleanup()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from error


class RunFolder:
    """The files of one run. On several nodes it lies on storage that every node sees under the same path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.splits = root / "splits.json"
        self.data_stats = root / "data_stats.json"
        self.environment = root / "environment.json"
        self.tracking = root / "tracking.json"
        self.report = root / "report.json"
        """Written last of all: its presence means that the run is complete. Its `finished` says since when."""
        self.lock = root / ".lock"
        """Held by the process that runs it; gone when it is complete."""
        self.share = root / ".share"
        """A nonce of the driver, by which a node knows that it sees this folder; gone when the run is complete."""
        self.ray = root / "ray"
        """Ray's own storage of this run, gone when it is complete."""

    def fold(self, fold: int) -> "FoldFolder":
        """The files of fold `fold` (0-based)."""
        return FoldFolder(self.root / f"fold_{fold}")

    def has_begun(self) -> bool:
        """Whether there is something to go on with: MLflow has the run, or a fold has left something."""
        return self.tracking.is_file() or next(self.root.glob("fold_*"), None) is not None

    def finished(self, folds: int) -> list[int]:
        """Which of fold 0 to `folds` - 1 are finished."""
        return [fold for fold in range(folds) if self.fold(fold).result.is_file()]


def share_nonce(folder: RunFolder) -> str:
    """The nonce in the run's folder, which the driver writes there once. Nodes only read it."""
    if not folder.share.is_file():
        write_text(folder.share, secrets.token_hex(16))
    return folder.share.read_text(encoding="utf-8")


def resume_command(folder: RunFolder) -> str:
    """What to type to go on with the run in `folder`."""
    return _command("raycv.run", "resume", "run.dir", folder)


def aggregate_command(folder: RunFolder) -> str:
    """What to type for the summary of the run in `folder` once more, in MLflow too."""
    return _command("raycv.aggregate", "run", "dir", folder)


def infer_command(folder: RunFolder) -> str:
    """What to type to ask the best fold of the run in `folder`, but for the post."""
    return _command("raycv.infer", "run", "dir", folder)


def _command(module: str, name_key: str, place_key: str, folder: RunFolder) -> str:
    elsewhere = [] if folder.root.parent == Path("runs").absolute() else [f"{place_key}={folder.root.parent}"]
    return shlex.join(["python", "-m", module, f"{name_key}={folder.root.name}", *elsewhere])


class FoldFolder:
    """The files of one fold."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.result = root / "result.json"
        """Written last of the fold's files: its presence means that the fold is finished."""
        self.predictions = root / "predictions.csv"
        self.checkpoint = root / "checkpoint"
        self.error = root / "error.json"
        """Why the fold failed, if it did."""
        self.state = root / "state"
        """What training goes on from after an interruption; gone when the fold is finished."""

    def sums(self) -> dict[str, str]:
        """SHA-256 of the predictions and of each file of the checkpoint, by its path in the folder."""
        return {self.predictions.name: sha256_of(self.predictions), **self.checkpoint_sums()}

    def checkpoint_sums(self) -> dict[str, str]:
        """SHA-256 of each file of the checkpoint, by its path in the folder."""
        files = sorted(path for path in self.checkpoint.rglob("*") if path.is_file())
        return {file.relative_to(self.root).as_posix(): sha256_of(file) for file in files}

    def set_result_aside(self) -> None:
        """Makes the fold one that is not finished, since its files are not as its result says."""
        self.result.replace(self.result.with_suffix(".damaged.json"))


def absolute_uri(uri: str) -> str:
    """A tracking URI as it holds from any working directory: Ray changes it, and SQLite paths are relative to it."""
    if uri.startswith(SQLITE):
        path = str(Path(uri.removeprefix(SQLITE)).absolute())
        if set(path) & set("?#%"):
            raise UserError(
                f"tracking.uri={uri}: the database would be {path}, and a database URI cannot hold ?, # or %.",
                remedies=["run in another folder", "tracking.uri=sqlite:////another/folder/mlflow.db"],
            )
        return SQLITE + path
    return uri
