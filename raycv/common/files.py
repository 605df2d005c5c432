"""Reads and writes files whole or not at all: JSON, text, checksums, full disks."""

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

from raycv.errors import ErrorKind, UserError, shown

if TYPE_CHECKING:
    import numpy as np

R = TypeVar("R")


def is_full(error: BaseException) -> bool:
    """Whether `error` reports a full disk, or a user's exhausted quota."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # A library in another language, or another process, passes on the text of its error only.
    texts = ("No space left on device", "Disk quota exceeded", "database or disk is full")
    return any(text in str(error) for text in texts)


def unwritable(what: str, place: Path, error: BaseException, remedies: Sequence[str] = ()) -> UserError:
    """The error for a file that cannot be written. It names the disk if that is full.

    Args:
        what: The file as a noun, with which the message begins.
        place: The file or folder that was to be written.
        error: The cause.
        remedies: Further steps for the user.
    """
    cause = getattr(error, "strerror", None) or str(error)
    if not is_full(error):
        return UserError(f"{what} cannot be written to {place}: {cause}.", kind="disk-unwritable", remedies=remedies)
    disk = place.absolute()
    while not disk.is_mount():
        disk = disk.parent
    usage = shutil.disk_usage(disk)
    room = f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB are free on it"
    return UserError(
        f"{what} cannot be written to {place}: the disk {disk} is full ({room}).",
        kind="disk-full",
        remedies=[f"make room on {disk}: du -xh {disk} | sort -h | tail", *remedies],
    )


@contextmanager
def replaced(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` when the block succeeds, so readers never see half a file.

    If the block fails, `path` stays unchanged.

    Args:
        path: The file to replace. Its folder is made if only that is missing.
        private: Only the user may read the file. Otherwise the umask decides.

    Raises:
        UserError: The disk is full.
        OSError: The file cannot be written for another reason.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        # We make one level only: if a share is not mounted, a new folder for the run would hide that.
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
    """The SHA-256 of a file's content in hexadecimal. Raises: OSError if the file cannot be read."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes `content`, whole or not at all. Raises: UserError if the disk is full."""
    with replaced(path, private=private) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Writes `text` as UTF-8, whole or not at all. Raises: UserError if the disk is full."""
    write_bytes(path, text.encode("utf-8"), private=private)


def array_bytes(array: "np.ndarray") -> bytes:
    """The content of a .npy file with `array`. Equal arrays have equal bytes."""
    import numpy as np

    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Writes `value` as JSON, whole or not at all.

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON cannot.
        UserError: The disk is full.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", private=private)


def read_json(path: Path, kind: ErrorKind = "run-damaged") -> Any:
    """Reads a JSON file. Raises: UserError of that kind if it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", kind=kind) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error}).", kind=kind) from error
    except RecursionError as error:
        raise UserError(f"{path} is damaged: it is nested too deeply.", kind=kind) from error


def record_of(kind: type[R], values: object) -> R:
    """An instance of the dataclass `kind` from the values of a JSON object; keys that it does not know are ignored.

    pydantic could do this, but a client of a scorer would import it for nothing else, in as much time as all it does.

    Raises:
        ValueError: A key is missing, or its value does not have the type of the field. The message begins with the key.
    """
    record: R = _value_of(kind, values, "")
    return record


def _record_at(kind: Any, values: Mapping[str, Any], key: str) -> Any:
    given = {}
    for field in fields(kind):
        name = f"{key}.{field.name}".lstrip(".")
        if field.name in values:
            given[field.name] = _value_of(field.type, values[field.name], name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{name} is missing")
    return kind(**given)


NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", NoneType: "null"}
"""How an error names the types of JSON."""


def _value_of(kind: Any, value: Any, key: str) -> Any:
    """`value` as `kind`, which may be a dataclass, list, dict, Literal, union, or a type of JSON."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        return _record_at(kind, value, key)
    if origin is list and isinstance(value, list):
        return [_value_of(inner[0], each, f"{key}.{place}") for place, each in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _value_of(inner[1], each, f"{key}.{name}") for name, each in value.items()}
    if origin in (Union, UnionType):
        kind = next((each for each in inner if type(value) is each), inner[0])
        return _value_of(kind, value, key)
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            return float(value)
    if kind is Any or type(value) is kind or (origin is Literal and value in inner):
        return value
    wanted = f"one of {', '.join(map(str, inner))}" if origin is Literal else NAMES.get(kind, "an object or a list")
    raise ValueError(f"{key or 'it'} is {shown(value)}, which should be {wanted}")


def check_writable(folder: Path) -> None:
    """Checks that `folder` can be made if it is missing, and that files can be made in it. Leaves no file behind.

    Raises:
        OSError: They cannot be made. Its `filename` is the existing folder that refused.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        # A file system may be read-only in spite of the permissions, so we try.
        tempfile.TemporaryDirectory(dir=place).cleanup()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from error
