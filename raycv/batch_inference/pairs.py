"""Turns records of a file into pairs that can be scored, and gives the reasons for records that cannot."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from raycv.batch_inference.columns import CRITERION_COLUMNS, Layout, find_layout, unread_columns
from raycv.batch_inference.input_formats import Record, pair_file, unreadable
from raycv.common.table_reader import Missing, is_blank, is_missing
from raycv.common.text_files import FIELD_LIMIT, Spelt, UnreadableError, is_unicode
from raycv.data.parsing import id_fault
from raycv.data.types import Criterion
from raycv.errors import UserError
from raycv.inference.questions import CHUNK_PAIRS, find_criterion
from raycv.row_faults import named

CHUNK_CHARACTERS = 8_000_000
"""Characters of posts after which a chunk ends, even with few pairs. Bounds the memory if posts are huge."""


@dataclass(frozen=True, slots=True)
class AskedPair:
    """A post and a criterion of one record. `ids`: the values of the file's id columns."""

    row: int
    line: int
    ids: tuple[str, ...]
    post: str
    criterion: Criterion


@dataclass(frozen=True, slots=True)
class BadRow:
    """A record, or one of its pairs, that cannot be scored. `reason` holds no text of the record."""

    row: int
    """the record's number, from 1, as in the output"""
    line: int
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive records. Their division depends only on the file, so a continued run has the same chunks."""

    records: int
    """records of the file up to the end of this chunk"""
    position: int
    """how much of `PairFile.total` was read by then"""
    pairs: list[AskedPair] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PairScore:
    """The score of one pair. `ids` has the values of the input's id columns."""

    row: int
    ids: tuple[str, ...]
    criterion_id: str | None
    label: str
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


@dataclass(frozen=True)
class PairSource:
    """A file and the criteria to ask its rows for. Plain data: Ray sends it to the process that reads the file."""

    path: Path
    layout: Layout
    criteria: Mapping[str, Criterion]
    asked: Criterion | None
    """the one criterion of all rows, for a file that names none"""
    chunk_records: int
    missing: Missing = "empty"
    """how to take NaN and the like, alone in a cell of text: as an empty cell or as text"""

    def chunks(self, done: int = 0) -> Iterator[Chunk]:
        """The chunks after the first `done` records. Raises: UserError if the file cannot be read any more."""
        try:
            yield from self._chunks(done)
        except (UnreadableError, OSError) as error:
            raise unreadable(self.path, error) from error

    def _chunks(self, done: int) -> Iterator[Chunk]:
        file = pair_file(self.path)
        pairs: list[AskedPair] = []
        bad: list[BadRow] = []
        number, characters, begun = done, 0, done
        for record in file.records(self.layout.wanted):
            number = record.number
            if number <= done:
                continue
            asked = self._asked(record)
            if isinstance(asked, BadRow):
                bad.append(asked)
            else:
                pairs.extend(asked)
                characters += len(asked[0].post)
            if number - begun == self.chunk_records or characters >= CHUNK_CHARACTERS:
                yield Chunk(number, file.position, pairs, bad)
                pairs, bad, characters, begun = [], [], 0, number
        if number > begun:
            yield Chunk(number, file.position, pairs, bad)

    def _asked(self, record: Record) -> list[AskedPair] | BadRow:
        """The pairs of a record: one, or one for each criterion."""
        try:
            if record.fault:
                raise ValueError(record.fault)
            post = _text(record, self.layout.post)
            self._refuse_missing(self.layout.post, post)
            ids = tuple(_id(record, name) for name in self.layout.ids)
            return [AskedPair(record.number, record.line, ids, post, one) for one in self._criteria_of(record)]
        except (ValueError, UserError) as error:
            return BadRow(record.number, record.line, error.what if isinstance(error, UserError) else str(error))

    def _criteria_of(self, record: Record) -> list[Criterion]:
        column = self.layout.criterion
        if column is None:
            given = [name for name, value in record.values.items() if value is not None]
            if any(name in CRITERION_COLUMNS for name in given):
                raise ValueError("names a criterion, which the first record does not")
            for miss in unread_columns(given, every=self.asked is None):
                if miss.meant in CRITERION_COLUMNS:
                    raise ValueError(f"has {miss.shown}, which the first record has not; is it {miss.meant}?")
            return [self.asked] if self.asked else list(self.criteria.values())
        name = _text(record, column)
        found = find_criterion(name, self.criteria)
        if column == "criterion_id" and not found.criterion_id:
            raise ValueError(f"criterion_id {named(name)} is not one of the run's")
        if not found.criterion_id:
            # The run may have an id or name like NaN, so we refuse such a text only if the run lacks it.
            self._refuse_missing(column, name)
        return [found]

    def _refuse_missing(self, column: str, text: str) -> None:
        """Raises: ValueError if software writes `text` for a missing value, and `self.missing` takes it so."""
        if self.missing == "empty" and is_missing(text):
            raise ValueError(f"the {column} is empty: it holds {text.strip()} (missing=text takes it as text)")


def _text(record: Record, column: str) -> str:
    """The text of a column. Raises: ValueError if it cannot be used; the message does not hold the text."""
    value = record.values.get(column)
    if value is None:
        raise ValueError(f"the {column} is missing")
    if not isinstance(value, str) or (isinstance(value, Spelt) and column != "criterion_id"):
        raise ValueError(f"the {column} is not a text")
    if not is_unicode(value):
        raise ValueError(f"the {column} is not UTF-8")
    if "\0" in value:
        raise ValueError(f"the {column} holds a NUL character")
    if len(value) > FIELD_LIMIT:
        raise ValueError(f"the {column} has more than {FIELD_LIMIT:,} characters")
    if is_blank(value):
        raise ValueError(f"the {column} is empty")
    return value


def _id(record: Record, column: str) -> str:
    """The value of an id column, or an empty string. Raises: ValueError if it cannot be an id, such as a post."""
    value = record.values.get(column)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise ValueError(f"{column} is neither a text nor a number")
    text = "" if value is None else str(value).strip()
    if text and (fault := id_fault(text, is_criterion=False)):
        raise ValueError(f"{column} {fault}")
    return text


def open_source(
    path: Path,
    criteria: Mapping[str, Criterion],
    criterion: str | None,
    chunk_pairs: int | None = None,
    missing: Missing = "empty",
) -> PairSource:
    """Opens a file of pairs, and decides what to ask for.

    Args:
        path: The file.
        criteria: The run's criteria.
        criterion: The one criterion for all rows, if the file has no column for it.
        chunk_pairs: Pairs of a chunk; None for CHUNK_PAIRS. Tests give fewer.
        missing: Whether NaN and the like, alone in a cell of text, count as `empty` or as `text`.

    Raises:
        UserError: The file cannot be read or lacks the columns. `criterion` is unknown, or the file has a column too.
    """
    try:
        file = pair_file(path)
        layout = find_layout(path, file.columns(), file.header, asked=criterion is not None)
    except (UnreadableError, OSError) as error:
        raise unreadable(path, error) from error
    if layout.criterion and criterion is not None:
        what = f"criterion is given on the command line, and {path} has a column {layout.criterion}."
        raise UserError(what, kind="config-value", remedies=["leave criterion out", "remove or rename the column"])
    asked = find_criterion(criterion, criteria) if criterion is not None else None
    of_record = 1 if layout.criterion or asked else len(criteria)
    chunk_records = max(1, (chunk_pairs or CHUNK_PAIRS) // of_record)
    return PairSource(path.absolute(), layout, dict(criteria), asked, chunk_records, missing)
