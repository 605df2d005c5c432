"""Reads and writes files whole or not at all: JSON, text, checksums, full disks."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycv.errors import UserError

GOOD_COPY = (
    "put a good copy in its place: MLflow may have it among the run's artifacts; finished folds stay as they are"
)
"""What to do about a damaged record of a run."""
AFRESH = "start afresh under a new name, with the settings that you want: python -m raycv.run run.name=<new> ..."


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
