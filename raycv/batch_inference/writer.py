"""Writes the file of scores and the list of bad rows, chunk by chunk; continues them after an interruption."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raycv.batch_inference.identity import changed
from raycv.batch_inference.input_formats import FORMATS
from raycv.batch_inference.output_formats import (
    ERRORS_HEADER,
    ParquetParts,
    Progress,
    Sink,
    TextPart,
    append_bytes,
    beside,
    clear,
    csv_line,
    cut_to,
    json_line,
    part_of,
)
from raycv.batch_inference.pairs import BadRow
from raycv.common.files import read_json, write_text
from raycv.common.numerics import NUMERICS
from raycv.data.types import LABELS
from raycv.errors import UserError, shown
from raycv.inference.questions import label_of


@dataclass(frozen=True, slots=True)
class PairScore:
    """The score of one pair. `ids` has the values of the input's id columns."""

    row: int
    ids: tuple[str, ...]
    criterion_id: str | None
    score: float
    truncated: bool


@dataclass(frozen=True)
class ScoredChunk:
    """The result of a chunk. Holds no text."""

    records: int
    position: int
    threshold: float
    precision: str
    attention: str
    earlier_attention: str
    """the attention of earlier versions, which recorded none"""
    scores: list[PairScore] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


class ScoreFile:
    """The output of one run over a file, and of the runs that continue it."""

    def __init__(self, output: Path, ids: Sequence[str], fold: int | str, identity: Mapping[str, Any]) -> None:
        """Makes no file yet.

        Args:
            output: The file of scores.
            ids: Names of the id columns.
            fold: The fold that answers, or `ensemble`.
            identity: The facts that the scores depend on, as plain JSON values.
        """
        self.output = output
        self.errors = beside(output, "errors.csv")
        self.progress = Progress(dict(identity), numerics=NUMERICS)
        self._fold = fold
        self._state = beside(output, "state.json")
        self._begun = self._moved = False
        columns = ("row", *ids, "criterion_id", "label", "score", "threshold", "fold", "truncated")
        if output.suffix.casefold() == ".parquet":
            self._sink: Sink = ParquetParts(part_of(output), columns, type(fold))
        else:
            line_of = json_line if output.suffix.casefold() == ".jsonl" else csv_line
            self._sink = TextPart(part_of(output), columns, line_of)

    @contextlib.contextmanager
    def opened(self) -> Iterator["ScoreFile"]:
        """Starts or continues the output. `progress` then has its place, and whether only `finish` is left.

        Before the first chunk it makes only a lock, so that a refusal leaves nothing behind.

        Raises:
            UserError: The output exists already, belongs to other inputs, is being written by another process, or
                cannot be written.
        """
        check_output(self.output)
        with self._locked():
            with self._writing():
                self._resume()
            yield self

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock. Makes the folders for it, and removes those folders afterwards if they are empty."""
        lock = FileLock(beside(self.output, "lock"), mode=0o600)
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
            raise UserError(f"Another process writes {self.output}.", kind="run-busy", remedies=remedies) from error
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
            raise UserError(
                f"output={self.output} cannot be written: {error.strerror}.", kind="disk-unwritable", remedies=remedies
            ) from error

    def _resume(self) -> None:
        found = self._found() if self._state.exists() else None
        if _is_there(self.output):
            if found is None or not self._made(found):
                raise _taken(self.output, self.output)
            self.progress = found
            self._begun = self._moved = True
        # If a finished output is gone, the user took it away, so we start from the first record. A state without
        # records has nothing to continue either.
        elif found is not None and found.records and (self._sink.left() or not found.finished):
            self.progress = self._continued(found)
            cut_to(self.errors, self.progress.errors_bytes)
            self._sink.resume(self.progress)
            self._begun = True

    def _begin(self) -> None:
        """Makes the files that grow, before the first chunk is written."""
        if self._begun:
            return
        # The first check may be long ago, so we check again.
        check_output(self.output)
        # Without the state, a later run would take the other files for those of another program. So it comes first.
        self._save(replace(self.progress, errors_bytes=0))
        for path in (self.errors, self._sink.path):
            clear(path)
        self._save(replace(self.progress, errors_bytes=append_bytes(self.errors, ERRORS_HEADER, at=0)))
        self._sink.resume(self.progress)
        self._begun = True

    def _made(self, found: Progress) -> bool:
        """Whether an earlier run made the output and ended between its move into place and the state's removal."""
        ours = self.progress
        same = found.finished and found.numerics == ours.numerics and not changed(found.identity, ours.identity)
        return same and self._sink.finished(self.output, found)

    @property
    def _to_start_again(self) -> str:
        return f"delete {self._state} and {self._sink.path.name} beside it"

    def _found(self) -> Progress:
        values = read_json(self._state, "output-differs")
        remedies = [f"to start again, {self._to_start_again}"]
        if not isinstance(values, dict) or values.pop(SUM, None) != sum_of_state(values):
            raise UserError(f"{self._state} is damaged.", kind="output-differs", remedies=remedies)
        # States of earlier versions say no format.
        written = values.pop("format", FORMATS_READ[0])
        if written not in FORMATS_READ:
            what = f"{self._state} was written by another version of raycv: its format is {written}, and not {FORMAT}."
            raise UserError(what, kind="package-version", remedies=["continue with that version of raycv", *remedies])
        # Earlier versions counted each version of raycv as another arithmetic, so we drop that entry.
        values["identity"].pop("the version of raycv", None)
        return Progress(**values)

    def _continued(self, found: Progress) -> Progress:
        """`found`, if its scores depend on what this run's would."""
        if found.numerics != NUMERICS:
            raise UserError(
                f"{self.output} was begun by another version of raycv, whose arithmetic has number {found.numerics}. "
                f"The arithmetic of this version has number {NUMERICS}, and its scores would differ.",
                kind="package-version",
                remedies=[
                    "continue with that version of raycv",
                    f"to start again, {self._to_start_again}",
                    "name another output",
                ],
            )
        if names := changed(found.identity, self.progress.identity):
            what = f"{self.output} was begun with other inputs and cannot be continued: {', '.join(names)} changed."
            remedies = ["run the command as it was", f"to start again, {self._to_start_again}", "name another output"]
            raise UserError(what, kind="output-differs", remedies=remedies)
        return found

    def append(self, chunk: ScoredChunk) -> None:
        """Writes a chunk for good.

        Raises: UserError if it was computed in another precision or with another attention than those before.
        """
        with self._writing():
            self._begin()
        before = self.progress
        self._check_computed(before, chunk)
        labels = [label_of(score.score, chunk.threshold) for score in chunk.scores]
        rows = [
            (one.row, *one.ids, one.criterion_id, label, one.score, chunk.threshold, self._fold, one.truncated)
            for one, label in zip(chunk.scores, labels, strict=True)
        ]
        errors = "".join(csv_line(("row", "line", "reason"), (bad.row, bad.line, bad.reason)) for bad in chunk.bad)
        with self._writing():
            after = replace(
                before,
                records=chunk.records,
                pairs=before.pairs + len(rows),
                matched=before.matched + labels.count(LABELS[1]),
                truncated=before.truncated + sum(one.truncated for one in chunk.scores),
                bad=before.bad + len(chunk.bad),
                precision=chunk.precision,
                attention=chunk.attention,
                threshold=chunk.threshold,
                part_bytes=self._sink.append(rows, before.records),
                errors_bytes=append_bytes(self.errors, errors.encode("utf-8"), at=before.errors_bytes),
            )
            self._save(after)

    def _check_computed(self, before: Progress, chunk: ScoredChunk) -> None:
        """Raises: UserError if `chunk` was computed in another precision or with another attention than `before`."""
        if before.precision not in (None, chunk.precision):
            what = f"The scores so far were computed in {before.precision}, these would be in {chunk.precision}."
            raise UserError(
                what, kind="output-differs", remedies=[f"infer.precision={before.precision}", "name another output"]
            )
        if not before.records:
            return
        then = before.attention or chunk.earlier_attention
        if then != chunk.attention:
            raise UserError(
                f"The scores so far were computed with {then} attention, these would be with {chunk.attention}.",
                kind="output-differs",
                remedies=[
                    "continue with the version of raycv and on the kind of device that began the file",
                    f"to start again, {self._to_start_again}",
                    "name another output: output=<file>",
                ],
            )

    def _save(self, progress: Progress) -> None:
        values = {"format": FORMAT, **asdict(progress)}
        write_text(self._state, json.dumps({**values, SUM: sum_of_state(values)}, indent=2) + "\n", private=True)
        self.progress = progress

    def finish(self) -> None:
        """Moves the output into place.

        Raises:
            UserError: No pair was scored (the list of bad rows then stays), or another file has appeared there.
        """
        with self._writing():
            self._begin()
            move = self.progress.pairs and not self._moved
            if move and _is_there(self.output):
                raise UserError(
                    f"output={self.output} came to be there while the scores were computed, and is left as it is. They "
                    f"are complete, in {self._sink.path}.",
                    kind="output-exists",
                    remedies=["move it away, and run the same command: it puts the scores in place"],
                )
            # If the process is killed after this line, the next run does the rest.
            self._save(replace(self.progress, finished=True))
            if move:
                self._sink.finish(self.output)
            self._sink.discard()
            if not self.progress.bad:
                self.errors.unlink(missing_ok=True)
            self._state.unlink()
        if not self.progress.pairs:
            why = f"all of its rows are bad, see {self.errors}" if self.progress.bad else "it has no rows"
            raise UserError(
                f"Nothing could be scored: {why}.",
                kind="input-empty",
                remedies=["fix the input, and run the command again"],
            )


FORMAT = 2
"""The number of the state's format. Raise it by one when the format changes. Format 1 has no attention."""
FORMATS_READ = (1, FORMAT)
SUM = "sha256"
"""Key of the state's own checksum. An output that continues a damaged state would lack rows, or repeat some."""


def sum_of_state(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()


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
        raise _taken(output, there[0])


def _is_there(path: Path) -> bool:
    """Whether there is something at `path`, even a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def _in_the_way(output: Path) -> list[Path]:
    """Files in the places where a run would write that are not its own. Only its state proves that they are."""
    state, errors = beside(output, "state.json"), beside(output, "errors.csv")
    there = [place for place in (output, part_of(output), errors, state) if _is_there(place)]
    if state.exists():
        return []
    if errors in there and errors.is_file() and not errors.is_symlink():
        with errors.open("rb") as file:
            # An earlier run leaves its list of bad rows when it ends, so a new run may replace the list.
            if file.read(len(ERRORS_HEADER)) == ERRORS_HEADER:
                there.remove(errors)
    return there


def _taken(output: Path, place: Path) -> UserError:
    what = f"output={output}{'' if place == output else f': {place}'} is there already."
    return UserError(what, kind="output-exists", remedies=["name another output", "delete it, or move it away"])


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
