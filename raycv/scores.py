"""Scores of many pairs on disk: written as they come, continued after an interruption, moved into place when complete.

Beside `<output>` while it grows: `.part` (for Parquet `.parts/`, a file a chunk), `.state.json`, `.lock`; and
`.errors.csv`, which stays if rows were bad. A chunk counts once `.state.json` says so; what was written after that is
cut back. All of them can be read by the user alone, and none holds text.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from raycv.answers import label_of
from raycv.errors import UserError, shown
from raycv.pairs import FORMATS, BadRow
from raycv.paths import read_json, replaced, write_text
from raycv.records import LABELS
from raycv.utils import FIRST_NUMERICS, NUMERICS


@dataclass(frozen=True, slots=True)
class PairScore:
    """The score of one pair. `ids`: the values of the input's id columns."""

    row: int
    ids: tuple[str, ...]
    criterion_id: str | None
    score: float
    truncated: bool


@dataclass(frozen=True)
class ScoredChunk:
    """What became of a chunk. Holds no text."""

    records: int
    position: int
    threshold: float
    precision: str
    scores: list[PairScore] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """What is on disk for good."""

    identity: dict[str, Any]
    """what the scores depend on; they are continued with the same alone"""
    records: int = 0
    pairs: int = 0
    matched: int = 0
    truncated: int = 0
    bad: int = 0
    precision: str | None = None
    threshold: float | None = None
    part_bytes: int = 0
    errors_bytes: int = 0
    finished: bool = False
    """everything is scored; what is left is to move it into place"""
    numerics: int = FIRST_NUMERICS
    """the number of the arithmetic of the scores (raycv.utils.NUMERICS)"""


class Sink(Protocol):
    """Where rows go while the output is not complete."""

    path: Path
    """the file or folder of them"""

    def resume(self, progress: Progress) -> None:
        """Cuts back what came after `progress`. Raises: UserError if less than that is there."""

    def append(self, rows: Sequence[tuple[Any, ...]], records: int) -> int:
        """Writes the rows of the chunk that begins after `records` records; returns the bytes that are there now."""

    def left(self) -> bool:
        """Whether anything that was written lies there."""

    def finish(self, output: Path) -> None:
        """Moves everything to `output`."""

    def finished(self, output: Path, progress: Progress) -> bool:
        """Whether `output` is what `finish` makes of everything."""

    def discard(self) -> None:
        """Removes everything that is left."""


class ScoreFile:
    """The output of one run over a file, and of those that continue it."""

    def __init__(self, output: Path, ids: Sequence[str], fold: int | str, identity: Mapping[str, Any]) -> None:
        """`ids`: names of the id columns; `identity`: what the scores depend on, plain JSON values."""
        self.output = output
        self.errors = _beside(output, "errors.csv")
        self.progress = Progress(dict(identity), numerics=NUMERICS)
        self._fold = fold
        self._state = _beside(output, "state.json")
        self._begun = self._moved = False
        columns = ("row", *ids, "criterion_id", "label", "score", "threshold", "fold", "truncated")
        if output.suffix.casefold() == ".parquet":
            self._sink: Sink = _ParquetParts(_part(output), columns, type(fold))
        else:
            line_of = _json_line if output.suffix.casefold() == ".jsonl" else _csv_line
            self._sink = _TextPart(_part(output), columns, line_of)

    @contextlib.contextmanager
    def opened(self) -> Iterator["ScoreFile"]:
        """Starts or continues the output; `progress` then says where, and whether `finish` is all that is left.

        Nothing but a lock is made before the first chunk: what is refused until then leaves nothing behind.
        Raises: UserError if it is there already, belongs to other inputs, is written by another process, or cannot be.
        """
        check_output(self.output)
        with self._locked():
            with self._writing():
                self._resume()
            yield self

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock, in a folder that is made for it, and goes with it if nothing else came to lie in it."""
        lock = FileLock(_beside(self.output, "lock"), mode=0o600)
        folders = [self.output.parent, *self.output.parent.parents]
        made: list[Path] = []
        try:
            with self._writing():
                made = [folder for folder in folders if not folder.exists()]
                self.output.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0)
            try:
                yield
            finally:
                if _is_empty(Path(lock.lock_file)):
                    Path(lock.lock_file).unlink()
                lock.release()
        except Timeout as error:
            remedies = ["wait for it to end", "name another output"]
            raise UserError(f"Another process writes {self.output}.", remedies=remedies) from error
        finally:
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Timeout:
            raise
        except OSError as error:
            remedies = ["make room or give another place: output=<file>; what is written is kept, and continued"]
            raise UserError(f"output={self.output} cannot be written: {error.strerror}.", remedies=remedies) from error

    def _resume(self) -> None:
        found = self._found() if self._state.exists() else None
        if _is_there(self.output):
            if found is None or not self._made(found):
                raise _taken(self.output, self.output)
            self.progress = found
            self._begun = self._moved = True
        # What was finished and is not there was taken away; where nothing is scored, there is nothing to go on with.
        elif found is not None and found.records and (self._sink.left() or not found.finished):
            self.progress = self._continued(found)
            _cut(self.errors, self.progress.errors_bytes)
            self._sink.resume(self.progress)
            self._begun = True

    def _begin(self) -> None:
        """Makes the files that grow, now that there is something to write."""
        if self._begun:
            return
        # It may be long since that was asked.
        check_output(self.output)
        # The state comes first: without it, the rest would be taken for somebody else's.
        self._save(replace(self.progress, errors_bytes=0))
        for path in (self.errors, self._sink.path):
            _clear(path)
        self._save(replace(self.progress, errors_bytes=_append(self.errors, ERRORS_HEADER, at=0)))
        self._sink.resume(self.progress)
        self._begun = True

    def _made(self, found: Progress) -> bool:
        """Whether the output is this run's, which was ended between its move into place and the state's removal."""
        ours = self.progress
        same = found.finished and (found.identity, found.numerics) == (ours.identity, ours.numerics)
        return same and self._sink.finished(self.output, found)

    @property
    def _anew(self) -> str:
        return f"delete {self._state} and {self._sink.path.name} beside it"

    def _found(self) -> Progress:
        values = read_json(self._state)
        remedies = [f"to start anew, {self._anew}"]
        if not isinstance(values, dict) or values.pop(SUM, None) != _sum(values):
            raise UserError(f"{self._state} is damaged.", remedies=remedies)
        # States of earlier versions say no format.
        written = values.pop("format", FORMAT)
        if written != FORMAT:
            what = f"{self._state} was written by another version of raycv: its format is {written}, and not {FORMAT}."
            raise UserError(what, remedies=["continue with that version of raycv", *remedies])
        # They held every version for another arithmetic.
        values["identity"].pop("the version of raycv", None)
        return Progress(**values)

    def _continued(self, found: Progress) -> Progress:
        """`found`, if its scores depend on what this run's would."""
        wanted = self.progress.identity
        if found.numerics != NUMERICS:
            raise UserError(
                f"{self.output} was begun by another version of raycv, whose arithmetic has number {found.numerics}. "
                f"The arithmetic of this version has number {NUMERICS}, and its scores would differ.",
                remedies=["continue with that version of raycv", f"to start anew, {self._anew}", "name another output"],
            )
        names = [name for name in {**wanted, **found.identity} if wanted.get(name) != found.identity.get(name)]
        if names:
            what = f"{self.output} was begun with other inputs and cannot be continued: {', '.join(names)} changed."
            remedies = ["run the command as it was", f"to start anew, {self._anew}", "name another output"]
            raise UserError(what, remedies=remedies)
        return found

    def append(self, chunk: ScoredChunk) -> None:
        """Writes a chunk for good. Raises: UserError if it was computed in another precision than those before."""
        with self._writing():
            self._begin()
        before = self.progress
        if before.precision not in (None, chunk.precision):
            what = f"The scores so far were computed in {before.precision}, these would be in {chunk.precision}."
            raise UserError(what, remedies=[f"infer.precision={before.precision}", "name another output"])
        labels = [label_of(score.score, chunk.threshold) for score in chunk.scores]
        rows = [
            (one.row, *one.ids, one.criterion_id, label, one.score, chunk.threshold, self._fold, one.truncated)
            for one, label in zip(chunk.scores, labels, strict=True)
        ]
        errors = "".join(_csv_line(("row", "line", "reason"), (bad.row, bad.line, bad.reason)) for bad in chunk.bad)
        with self._writing():
            after = replace(
                before,
                records=chunk.records,
                pairs=before.pairs + len(rows),
                matched=before.matched + labels.count(LABELS[1]),
                truncated=before.truncated + sum(one.truncated for one in chunk.scores),
                bad=before.bad + len(chunk.bad),
                precision=chunk.precision,
                threshold=chunk.threshold,
                part_bytes=self._sink.append(rows, before.records),
                errors_bytes=_append(self.errors, errors.encode("utf-8"), at=before.errors_bytes),
            )
            self._save(after)

    def _save(self, progress: Progress) -> None:
        values = {"format": FORMAT, **asdict(progress)}
        write_text(self._state, json.dumps({**values, SUM: _sum(values)}, indent=2) + "\n", private=True)
        self.progress = progress

    def finish(self) -> None:
        """Moves the output into place.

        Raises: UserError if no pair was scored, the bad rows then stay listed; or if something came to lie there.
        """
        with self._writing():
            self._begin()
            move = self.progress.pairs and not self._moved
            if move and _is_there(self.output):
                raise UserError(
                    f"output={self.output} came to be there while the scores were computed, and is left as it is. They "
                    f"are complete, in {self._sink.path}.",
                    remedies=["move it away, and run the same command: it puts the scores in place"],
                )
            # What a kill leaves of the rest, the next run ends.
            self._save(replace(self.progress, finished=True))
            if move:
                self._sink.finish(self.output)
            self._sink.discard()
            if not self.progress.bad:
                self.errors.unlink(missing_ok=True)
            self._state.unlink()
        if not self.progress.pairs:
            why = f"all of its rows are bad, see {self.errors}" if self.progress.bad else "it has no rows"
            raise UserError(f"Nothing could be scored: {why}.", remedies=["mend the input, and run the command again"])


FORMAT = 1
"""How the state is written. Whoever changes it raises it by one."""
SUM = "sha256"
"""Of the state itself: what is continued from a damaged one would lack rows, or have some twice."""


def _sum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()


ERRORS_HEADER = b"row,line,reason\n"
"""Tells the list of an earlier run, which makes room, from a file of somebody else."""
BESIDE = ("errors.csv", "state.json", "part", "parts", "lock")
"""Endings of the files beside an output that are written and taken away."""


def check_output(output: Path, source: Path | None = None) -> None:
    """Raises: UserError if `output` or what it needs beside it is there already, and is not of a run that can go on.

    Or if its ending tells no format, or writing it would hurt `source`.
    """
    taken = [output, *(_beside(output, ending) for ending in BESIDE)]
    if source is not None and any(place.absolute() == source.absolute() or _same(place, source) for place in taken):
        raise UserError(
            f"output={output}: writing it would overwrite the input {source}.",
            remedies=["name another file: output=<file>"],
        )
    if output.suffix.casefold() not in FORMATS:
        remedies = [f"name the file to write: output=scores.csv (or {', '.join(FORMATS[1:])})"]
        raise UserError(f"output={output}: with input=, output is a file that ends in a format.", remedies=remedies)
    try:
        # Those beside it have longer names.
        there = _in_the_way(output)
    except OSError as error:
        remedies = ["name another file: output=<file>"]
        raise UserError(f"output={shown(output)} cannot be written: {error.strerror}.", remedies=remedies) from error
    if there:
        raise _taken(output, there[0])


def _is_there(path: Path) -> bool:
    """Whether there is something at `path`, be it a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def _in_the_way(output: Path) -> list[Path]:
    """What lies where a run would write, and is not its own: without its state nothing tells that it is."""
    state, errors = _beside(output, "state.json"), _beside(output, "errors.csv")
    there = [place for place in (output, _part(output), errors, state) if _is_there(place)]
    if state.exists():
        return []
    if errors in there and errors.is_file() and not errors.is_symlink():
        with errors.open("rb") as file:
            # Of an earlier run, which keeps it when it is over.
            if file.read(len(ERRORS_HEADER)) == ERRORS_HEADER:
                there.remove(errors)
    return there


def _taken(output: Path, place: Path) -> UserError:
    what = f"output={output}{'' if place == output else f': {place}'} is there already."
    return UserError(what, remedies=["name another output", "delete it, or move it away"])


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _part(output: Path) -> Path:
    """Where the scores are while they are not complete."""
    return _beside(output, "parts" if output.suffix.casefold() == ".parquet" else "part")


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(f"{output.name}.{ending}")


# --- CSV and JSON lines ----------------------------------------------------------------------------------------------


class _TextPart:
    """Lines in one file."""

    def __init__(self, path: Path, columns: Sequence[str], line_of: Any) -> None:
        self.path = path
        self._columns = tuple(columns)
        self._line_of = line_of
        self._bytes = 0

    def resume(self, progress: Progress) -> None:
        if progress.records == 0:
            header = _csv_line(self._columns, self._columns) if self._line_of is _csv_line else ""
            self._bytes = _append(self.path, header.encode("utf-8"), at=0)
            return
        _cut(self.path, progress.part_bytes)
        self._bytes = progress.part_bytes

    def append(self, rows: Sequence[tuple[Any, ...]], records: int) -> int:
        lines = "".join(self._line_of(self._columns, row) for row in rows)
        self._bytes = _append(self.path, lines.encode("utf-8"), at=self._bytes)
        return self._bytes

    def left(self) -> bool:
        return self.path.exists()

    def finish(self, output: Path) -> None:
        os.replace(self.path, output)

    def finished(self, output: Path, progress: Progress) -> bool:
        return not self.left() and output.is_file() and output.stat().st_size == progress.part_bytes

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


def _csv_line(columns: Sequence[str], row: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(
        str(value).lower() if isinstance(value, bool) else value for value in row
    )
    return buffer.getvalue()


def _json_line(columns: Sequence[str], row: Sequence[Any]) -> str:
    return json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False, allow_nan=False) + "\n"


def _append(path: Path, data: bytes, *, at: int) -> int:
    """Writes `data` at byte `at`, where the file then ends; returns that end. What is there is on disk for good."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.seek(at)
        file.write(data)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _cut(path: Path, size: int) -> None:
    """Cuts `path` to `size` bytes. Raises: UserError if it has fewer."""
    there = path.stat().st_size if path.exists() else 0
    if there < size:
        raise _changed(path, f"{there:,} bytes", f"{size:,}")
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_NOFOLLOW), "wb") as file:
        file.truncate(size)


def _clear(path: Path) -> None:
    """Removes a file, a link (not what it leads to), or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _changed(path: Path, there: str, written: str) -> UserError:
    remedies = ["delete it and the .state.json beside it, and start anew"]
    return UserError(f"{path} has {there}, and {written} were written: it was changed since.", remedies=remedies)


# --- Parquet ---------------------------------------------------------------------------------------------------------


class _ParquetParts:
    """A file for each chunk, named after the records before it; they become the row groups of one file."""

    def __init__(self, folder: Path, columns: Sequence[str], fold_type: type) -> None:
        self.path = folder
        self._columns = tuple(columns)
        self._fold_type = fold_type

    def resume(self, progress: Progress) -> None:
        self.path.mkdir(mode=0o700, exist_ok=True)
        for path in self._parts():
            if int(path.stem) >= progress.records:
                path.unlink()
        rows = sum(_parquet(path).metadata.num_rows for path in self._parts())
        if rows != progress.pairs:
            raise _changed(self.path, f"{rows:,} rows", f"{progress.pairs:,}")

    def left(self) -> bool:
        return self.path.exists()

    def append(self, rows: Sequence[tuple[Any, ...]], records: int) -> int:
        import pyarrow
        import pyarrow.parquet

        if rows:
            values = zip(*rows, strict=True)
            arrays = [pyarrow.array(column, kind.type) for column, kind in zip(values, self._schema(), strict=True)]
            table = pyarrow.Table.from_arrays(arrays, schema=self._schema())
            with replaced(self.path / f"{records:015}.parquet", private=True) as temporary:
                pyarrow.parquet.write_table(table, temporary)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
        return 0

    def finish(self, output: Path) -> None:
        import pyarrow.parquet

        with replaced(output, private=True) as temporary:
            with pyarrow.parquet.ParquetWriter(temporary, self._schema()) as writer:
                for path in self._parts():
                    writer.write_table(_parquet(path).read())
            temporary.chmod(0o600)

    def finished(self, output: Path, progress: Progress) -> bool:
        try:
            return bool(_parquet(output).metadata.num_rows == progress.pairs)
        except (OSError, ValueError):
            return False

    def discard(self) -> None:
        if self.left():
            shutil.rmtree(self.path)

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("*.parquet"))

    def _schema(self) -> Any:
        import pyarrow

        kinds = {
            "row": pyarrow.int64(),
            "score": pyarrow.float64(),
            "threshold": pyarrow.float64(),
            "fold": pyarrow.int64() if self._fold_type is int else pyarrow.string(),
            "truncated": pyarrow.bool_(),
        }
        return pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in self._columns])


def _parquet(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)
