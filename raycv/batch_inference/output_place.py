"""The places of a file of scores and of what a run writes beside it: whose they are, and the lock."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from raycv.errors import UserError, shown

FORMATS = (".csv", ".jsonl", ".parquet")
"""The endings of the files that raycv writes scores to."""
ERRORS_HEADER = b"row,line,reason\n"
"""Marks the list of an earlier run, which may be replaced. Without it the file belongs to another program."""


def part_of(output: Path) -> Path:
    """The place of the scores until they are complete."""
    return beside(output, "parts" if output.suffix.casefold() == ".parquet" else "part")


def beside(output: Path, ending: str) -> Path:
    return output.with_name(f"{output.name}.{ending}")


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Raises: UserError for an OSError of the block: `output`, or a file beside it, cannot be written."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        remedies = ["make room or give another place: output=<file>; what is written is kept, and continued"]
        raise UserError(
            f"output={output} cannot be written: {error.strerror}.", kind="disk-unwritable", remedies=remedies
        ) from error


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Holds the lock of `output`. Makes the folders for it, and removes those folders afterwards if they are empty.

    Raises:
        UserError: Another process holds the lock, or it cannot be made.
    """
    lock = FileLock(beside(output, "lock"), mode=0o600)
    made: list[Path] = []
    try:
        with writing(output):
            made = [folder for folder in output.parents if not folder.exists()]
            output.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        try:
            yield
        finally:
            if _is_empty(Path(lock.lock_file)):
                Path(lock.lock_file).unlink()
            lock.release()
    except Timeout as error:
        remedies = ["wait for it to end", "name another output"]
        raise UserError(f"Another process writes {output}.", kind="run-busy", remedies=remedies) from error
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


BESIDE = ("errors.csv", "state.json", "part", "parts", "lock")
"""Endings of the files that a run writes beside its output."""


def check_output(output: Path, source: Path | None = None) -> None:
    """Refuses an output that cannot be written.

    Raises:
        UserError: The output, or a file that it needs beside it, exists and is not part of a run to continue. Its
            ending is not that of a known format. Writing it would overwrite `source`.
    """
    taken = [output, *(beside(output, ending) for ending in BESIDE)]
    if source is not None and any(place.absolute() == source.absolute() or _same(place, source) for place in taken):
        raise UserError(
            f"output={output}: writing it would overwrite the input {source}.",
            kind="output-exists",
            remedies=["name another file: output=<file>"],
        )
    if output.suffix.casefold() not in FORMATS:
        remedies = [f"name the file to write: output=scores.csv (or {', '.join(FORMATS[1:])})"]
        raise UserError(
            f"output={output}: with input=, output is a file that ends in a format.",
            kind="config-value",
            remedies=remedies,
        )
    try:
        # The files beside the output have longer names, so one may fail where the output itself does not.
        there = _in_the_way(output)
    except OSError as error:
        remedies = ["name another file: output=<file>"]
        raise UserError(
            f"output={shown(output)} cannot be written: {error.strerror}.", kind="disk-unwritable", remedies=remedies
        ) from error
    if there:
        raise taken_by(output, there[0])


def is_there(path: Path) -> bool:
    """Whether there is something at `path`, even a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def _in_the_way(output: Path) -> list[Path]:
    """Files in the places where a run would write that are not its own. Only its state proves that they are."""
    state, errors = beside(output, "state.json"), beside(output, "errors.csv")
    there = [place for place in (output, part_of(output), errors, state) if is_there(place)]
    if state.exists():
        return []
    if errors in there and errors.is_file() and not errors.is_symlink():
        with errors.open("rb") as file:
            # An earlier run leaves its list of bad rows when it ends, so a new run may replace the list.
            if file.read(len(ERRORS_HEADER)) == ERRORS_HEADER:
                there.remove(errors)
    return there


def taken_by(output: Path, place: Path) -> UserError:
    what = f"output={output}{'' if place == output else f': {place}'} is there already."
    return UserError(what, kind="output-exists", remedies=["name another output", "delete it, or move it away"])


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
