"""Writes the file of scores and the list of bad rows, chunk by chunk; continues them after an interruption."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

from raycv.batch_inference.output_formats import append_bytes, clear, csv_lines, cut_to, sink_of
from raycv.batch_inference.output_place import ERRORS_HEADER, beside, check_output, is_there, locked, taken_by, writing
from raycv.batch_inference.pairs import ScoredChunk
from raycv.batch_inference.state import Progress, check_computed, check_continues, is_same, read_state, write_state
from raycv.data.types import LABELS
from raycv.errors import UserError
from raycv.utils import NUMERICS


class Stage(Enum):
    """How far an output is. Each run takes it through the stages in this order, from where it finds it."""

    NEW = auto()
    """nothing of it is on disk"""
    GROWING = auto()
    """its state, its rows and the list of bad rows are there"""
    SCORED = auto()
    """as GROWING, and no record is left"""
    MOVED = auto()
    """the output is in place; what lies beside it can go"""


class ScoreFile:
    """The output of one run over a file, and of the runs that continue it.

    Attributes:
        output: The file of scores.
        errors: The list of bad rows.
        stage: How far the output is.
        progress: The part that is safely on disk.
    """

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
        self.stage = Stage.NEW
        self.progress = Progress(dict(identity), numerics=NUMERICS)
        self._fold = fold
        self._state = beside(output, "state.json")
        columns = ("row", *ids, "criterion_id", "label", "score", "threshold", "fold", "truncated")
        self._sink = sink_of(output, columns, type(fold))
        self._restart = f"delete {self._state} and {self._sink.path.name} beside it"

    @contextlib.contextmanager
    def opened(self) -> Iterator["ScoreFile"]:
        """Starts or continues the output. `stage` and `progress` then tell how far it is.

        Before the first chunk it makes only a lock, so that a refusal leaves nothing behind.

        Raises:
            UserError: The output exists already, belongs to other inputs, is being written by another process, or
                cannot be written.
        """
        check_output(self.output)
        with locked(self.output):
            with writing(self.output):
                self._find()
            yield self

    def _find(self) -> None:
        found = read_state(self._state, self._restart) if self._state.exists() else None
        if is_there(self.output):
            if found is None or not self._made(found):
                raise taken_by(self.output, self.output)
            self.progress, self.stage = found, Stage.MOVED
        # If a finished output is gone, the user took it away, so we start from the first record. A state without
        # records has nothing to continue either.
        elif found is not None and found.records and (self._sink.left() or not found.finished):
            check_continues(found, self.progress, self.output, self._restart)
            cut_to(self.errors, found.errors_bytes)
            self._sink.resume(found)
            self.progress, self.stage = found, Stage.SCORED if found.finished else Stage.GROWING

    def _made(self, found: Progress) -> bool:
        """Whether an earlier run made the output and ended between its move into place and the state's removal."""
        return found.finished and is_same(found, self.progress) and self._sink.finished(self.output, found)

    def _begin(self) -> None:
        """Makes the files that grow, before the first chunk is written."""
        if self.stage is not Stage.NEW:
            return
        # The first check may be long ago, so we check again.
        check_output(self.output)
        # Without the state, a later run would take the other files for those of another program. So it comes first.
        self._save(replace(self.progress, errors_bytes=0))
        for path in (self.errors, self._sink.path):
            clear(path)
        self._save(replace(self.progress, errors_bytes=append_bytes(self.errors, ERRORS_HEADER, at=0)))
        self._sink.resume(self.progress)
        self.stage = Stage.GROWING

    def append(self, chunk: ScoredChunk) -> None:
        """Writes a chunk for good.

        Raises: UserError if it was computed in another precision or with another attention than those before.
        """
        with writing(self.output):
            self._begin()
        before = self.progress
        check_computed(before, chunk, self.output, self._restart)
        rows = [
            (one.row, *one.ids, one.criterion_id, one.label, one.score, chunk.threshold, self._fold, one.truncated)
            for one in chunk.scores
        ]
        errors = csv_lines((bad.row, bad.line, bad.reason) for bad in chunk.bad)
        with writing(self.output):
            after = replace(
                before,
                records=chunk.records,
                pairs=before.pairs + len(rows),
                matched=before.matched + sum(one.label == LABELS[1] for one in chunk.scores),
                truncated=before.truncated + sum(one.truncated for one in chunk.scores),
                bad=before.bad + len(chunk.bad),
                precision=chunk.precision,
                attention=chunk.attention,
                threshold=chunk.threshold,
                part_bytes=self._sink.append(rows, before),
                errors_bytes=append_bytes(self.errors, errors.encode("utf-8"), at=before.errors_bytes),
            )
            self._save(after)

    def _save(self, progress: Progress) -> None:
        write_state(self._state, progress)
        self.progress = progress

    def finish(self) -> None:
        """Moves the output into place, and removes what lies beside it.

        Raises:
            UserError: No pair was scored (the list of bad rows then stays), or another file has appeared there.
        """
        with writing(self.output):
            self._begin()
            if self.stage is not Stage.MOVED:
                self._move()
            self._sink.discard()
            if not self.progress.bad:
                self.errors.unlink(missing_ok=True)
            self._state.unlink()
        if not self.progress.pairs:
            why = f"all of its rows are bad, see {self.errors}" if self.progress.bad else "it has no rows"
            raise UserError(
                f"Nothing could be scored for {self.output}: {why}.",
                kind="input-empty",
                remedies=["fix the input, and run the command again"],
            )

    def _move(self) -> None:
        if self.progress.pairs and is_there(self.output):
            raise UserError(
                f"output={self.output} came to be there while the scores were computed, and is left as it is. They "
                f"are complete, in {self._sink.path}.",
                kind="output-exists",
                remedies=["move it away, and run the same command: it puts the scores in place"],
            )
        # If the process is killed after this line, the next run does the rest.
        self._save(replace(self.progress, finished=True))
        self.stage = Stage.SCORED
        if self.progress.pairs:
            self._sink.finish(self.output)
            self.stage = Stage.MOVED
