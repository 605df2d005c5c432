"""A file of many pairs -> chunks that can be scored. Bounded memory whatever the file holds; bad rows are set apart.

Knows no model: says what each row asks, with the line on which it stands.
"""

import csv
import json
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from raycv.answers import find_criterion
from raycv.errors import FaultsError, UserError, counted, shown
from raycv.faults import FIELD_LIMIT, Kind, listed, named
from raycv.labels import Missing, id_fault, is_blank, is_missing
from raycv.records import Criterion
from raycv.sources import NearMiss, misspelt, near_misses
from raycv.tables import LINE_LIMIT, UnreadableError, check_file, field_limit, is_unicode, opened, separator_of

CHUNK_PAIRS = 2304
"""Pairs that are scored, written and committed together: as many as the predictor sorts at once."""
CHUNK_CHARACTERS = 8_000_000
"""Characters of posts after which a chunk ends, however few its pairs: bounds the memory where posts are huge."""

POST_COLUMNS = ("post", "text")
CRITERION_COLUMNS = ("criterion", "criterion_id")
ID_COLUMNS = ("post_id", "id")
"""Carried over to the scores, so that they find back to their posts."""
_COLUMNS = (POST_COLUMNS, CRITERION_COLUMNS, ID_COLUMNS)
_SYNONYMS = {"symptom": "criterion", "dsm5_symptom": "criterion"}
"""What other tables call a criterion. To ignore it would ask each post for every criterion."""
_PARQUET_ROWS = 256
_COLUMNS_REMEDY = (
    "name the columns in the first line: post (or text); if you like, criterion (words) or criterion_id (A.4), post_id"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file as it was read. `number` and `line` count from 1; Parquet has rows for lines."""

    number: int
    line: int
    values: Mapping[str, object]
    fault: str | None = None
    """why the record could not be read, without its text"""


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
    """A record, or a pair of it, that cannot be scored. `reason` holds no text of it."""

    row: int
    """the record's number, from 1, as in the output"""
    line: int
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive records. Where a chunk ends depends on the file alone, so that a continued run has the same ones."""

    records: int
    """records of the file up to the end of this chunk"""
    position: int
    """how much of the file was read by then, of `PairFile.total`"""
    pairs: list[AskedPair] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


# --- Files -----------------------------------------------------------------------------------------------------------


class PairFile:
    """The records of a CSV, JSONL or Parquet file. `position` of `total` (bytes or rows) have been read."""

    place = "line"
    """what `Record.line` counts"""
    header = "line 1"
    """where the columns stand"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    @property
    def total(self) -> int:
        return self.path.stat().st_size

    def columns(self) -> tuple[str, ...]:
        """The names of the columns in small letters. Raises: UserError, UnreadableError."""
        raise NotImplementedError

    def records(self, wanted: Sequence[str]) -> Generator[Record, None, None]:
        """The records with at least the `wanted` columns. Raises: UserError, UnreadableError."""
        raise NotImplementedError


class _Lines:
    """The physical lines of a file, numbered from 1; a broken record's can be read again from its second line on."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._again: deque[str] = deque()
        self._taken: list[str] = []
        self._read_again = 0
        self.number = 0
        self.cut = False
        """whether a line of the record was longer than any may be, and was cut"""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._read()
        if not line:
            raise StopIteration
        self.number += 1
        self._taken.append(line)
        return line

    def _read(self) -> str:
        line: str = self._file.readline(LINE_LIMIT + len("\r\n"))
        if len(line.rstrip("\r\n")) > LINE_LIMIT:
            self.cut = True
            self._skip_rest(line)
        return line

    def _skip_rest(self, line: str) -> None:
        while line and not line.endswith(("\n", "\r")):
            line = self._file.readline(LINE_LIMIT)
        # What was read may have ended between the two characters of a line end.
        place = self._file.tell()
        if line.endswith("\r") and self._file.read(1) != "\n":
            self._file.seek(place)

    @property
    def bytes_read(self) -> int:
        """Of the file, what lies in buffers included."""
        return int(self._file.buffer.tell())

    def start_record(self) -> int:
        """The line on which the next record starts."""
        self._taken.clear()
        self.cut = False
        return self.number + 1

    def back_to_second(self) -> None:
        """An unclosed quote swallows what follows: only the line on which it stands is given up."""
        again = self._taken[1:]
        self._read_again += len(again)
        if self._read_again > READ_AGAIN + 10 * self.number:
            detail = "up to here one quote after the other is opened and never closed"
            raise UnreadableError(Kind.QUOTING, detail, f"line {self.number - len(again)}")
        self._again.extendleft(reversed(again))
        self.number -= len(again)


READ_AGAIN = 1_000_000
"""Lines: each of many broken records may reach to the end of the file, and is read again from its second line."""


class CsvFile(PairFile):
    """Comma-separated, with a header."""

    def columns(self) -> tuple[str, ...]:
        with opened(self.path) as file, field_limit(), closing(_csv_records(_Lines(file))) as records:
            for line, fields, fault in records:
                if fault:
                    raise UserError(f"{self.path}, line {line}: {fault}.", remedies=[_COLUMNS_REMEDY])
                return _folded(fields)
        return ()

    def records(self, wanted: Sequence[str]) -> Generator[Record, None, None]:
        with opened(self.path) as file, field_limit(), closing(_csv_records(lines := _Lines(file))) as records:
            columns = _folded(next(records)[1])
            for number, (line, fields, fault) in enumerate(records, 1):
                if fault is None and len(fields) != len(columns):
                    fault = f"{counted(len(fields), 'field')} instead of {len(columns)}"
                self.position = lines.bytes_read
                yield Record(number, line, dict(zip(columns, fields, strict=False)), fault)


def _folded(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.strip().casefold() for name in names)


def _csv_records(lines: _Lines) -> Generator[tuple[int, list[str], str | None], None, None]:
    """The line on which each record starts, its fields, and why it cannot be read; blank lines are skipped."""
    reader = csv.reader(lines, strict=True)
    while True:
        line = lines.start_record()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, [], _csv_fault(str(error))
            lines.back_to_second()
            reader = csv.reader(lines, strict=True)
            continue
        if fields or lines.cut:
            yield line, fields, _too_long("line", LINE_LIMIT) if lines.cut else None


def _csv_fault(message: str) -> str:
    if "field limit" in message:
        return f"{_too_long('field', FIELD_LIMIT)}; perhaps a quote is never closed"
    if "unexpected end" in message:
        return "a quote is opened and never closed"
    return "a quoted field goes on after its closing quote"


def _too_long(what: str, limit: int) -> str:
    return f"a {what} has more than {limit:,} characters"


class JsonLinesFile(PairFile):
    """A JSON object a line; the first tells the columns."""

    header = "the first object"

    def columns(self) -> tuple[str, ...]:
        fault = None
        with closing(self.records(())) as records:
            for record in records:
                if record.values:
                    return tuple(record.values)
                fault = fault or f"line {record.line}: {record.fault or 'an object without keys'}"
        if fault:
            remedies = ['write a JSON object on each line: {"post": "..."}']
            raise UserError(
                f"{self.path}: no line of it is a JSON object that can be used; {fault}.", remedies=remedies
            )
        return ()

    def records(self, wanted: Sequence[str]) -> Generator[Record, None, None]:
        with opened(self.path) as file:
            lines, number = _Lines(file), 0
            line = lines.start_record()
            for text in lines:
                if not text.isspace():
                    number += 1
                    values, fault = _json_object(text) if not lines.cut else ({}, _too_long("line", LINE_LIMIT))
                    self.position = lines.bytes_read
                    yield Record(number, line, values, fault)
                line = lines.start_record()


def _json_object(text: str) -> tuple[dict[str, object], str | None]:
    try:
        value = json.loads(text, object_pairs_hook=_Entries)
    except json.JSONDecodeError as error:
        return {}, f"not JSON: {error.msg}"
    except (RecursionError, ValueError):
        return {}, "JSON that is nested too deeply, or has a number that is too long"
    if not isinstance(value, _Entries):
        return {}, "not a JSON object"
    names = _folded([key for key, _ in value])
    if twice := _repeated(names):
        return {}, f"the key {twice} occurs {names.count(twice)} times"
    return dict(zip(names, (entry for _, entry in value), strict=True)), None


class _Entries(list[tuple[str, object]]):
    """The keys and values of a JSON object, repetitions included: of these Python would take the last."""


def _repeated(names: Sequence[str]) -> str | None:
    """A column that has a meaning and stands among `names` more than once."""
    return next((name for group in _COLUMNS for name in group if names.count(name) > 1), None)


class ParquetFile(PairFile):
    """Read batch by batch: a row group may be larger than the memory."""

    place = "row"
    header = "the schema"

    @cached_property
    def _names(self) -> dict[str, str]:
        """Column in small letters -> as the file has it."""
        return {name.strip().casefold(): name for name in self._opened().schema_arrow.names}

    @property
    def total(self) -> int:
        return int(self._opened().metadata.num_rows)

    def columns(self) -> tuple[str, ...]:
        # With repetitions, which are refused.
        return tuple(name.strip().casefold() for name in self._opened().schema_arrow.names)

    def records(self, wanted: Sequence[str]) -> Generator[Record, None, None]:
        names = [self._names[name] for name in wanted]
        number = 0
        try:
            for batch in self._opened().iter_batches(_PARQUET_ROWS, columns=names):
                columns = [_column_values(batch.column(name)) for name in names]
                for row in zip(*columns, strict=True):
                    number += 1
                    self.position = number
                    yield Record(number, number, dict(zip(wanted, row, strict=True)))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is damaged after row {number:,}.", remedies=["write it anew"]) from error

    def _opened(self) -> Any:
        import pyarrow.parquet

        check_file(self.path)
        try:
            return pyarrow.parquet.ParquetFile(self.path, pre_buffer=False)
        except (OSError, ValueError) as error:
            what = f"{self.path} is no Parquet file, or is damaged."
            raise UserError(what, remedies=["write it anew, or name a CSV or JSONL file"]) from error


def _column_values(column: Any) -> list[object]:
    """The values of an Arrow array. Bytes of a string column that are not UTF-8 become surrogates."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pyarrow.types.is_temporal(kind) or pyarrow.types.is_nested(kind):
        # Neither text nor number, and Python has no room for some of them: the type stands for any of its values.
        return [kind if there else None for there in column.is_valid().to_pylist()]
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return list(column.to_pylist())
    raw = column.cast(pyarrow.binary() if pyarrow.types.is_string(kind) else pyarrow.large_binary())
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw.to_pylist()]


_FILES = {".csv": CsvFile, ".jsonl": JsonLinesFile, ".parquet": ParquetFile}
FORMATS = tuple(_FILES)


def pair_file(path: Path) -> PairFile:
    """The reader for `path`. Raises: UserError if its ending tells no format."""
    kind = _FILES.get(path.suffix.casefold())
    if kind is None:
        remedies = [f"name a file that ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"]
        raise UserError(f"input={path}: its ending does not tell how to read it.", remedies=remedies)
    return kind(path)


# --- What the rows ask -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which columns of a file are which."""

    post: str
    criterion: str | None
    ids: tuple[str, ...]
    others: tuple[str, ...] = ()
    """columns that are not read"""
    notices: tuple[str, ...] = ()
    """what to tell of those that look like one that is read"""

    @property
    def wanted(self) -> list[str]:
        return [self.post, *([self.criterion] if self.criterion else []), *self.ids]


def find_layout(path: Path, columns: Sequence[str], header: str = PairFile.header) -> Layout:
    """Which of `columns` are read; `header`: where they stand.

    Raises: UserError if there is no column of posts, it is not clear which is meant, or one is misspelt.
    """
    if twice := _repeated(columns):
        remedies = ["keep one column of each name"]
        raise UserError(f"{path}: the column {twice} occurs {columns.count(twice)} times.", remedies=remedies)
    posts = [name for name in POST_COLUMNS if name in columns]
    criteria = [name for name in CRITERION_COLUMNS if name in columns]
    for found in (posts, criteria):
        if len(found) > 1:
            what = f"{path} has both {' and '.join(found)}: it is not clear which is asked."
            raise UserError(what, remedies=["keep the one that is meant, or rename the other"])
    if not posts:
        have = f"its columns are {listed(list(columns))}" if columns else "it is empty"
        if separator := separator_of(columns):
            have += f", separated by {separator} and not by commas"
        have += misspelt([POST_COLUMNS], columns)
        remedy = "save it with commas" if separator else _COLUMNS_REMEDY
        raise UserError(f"{path} has no column post or text: {have}.", remedies=[remedy])
    near = near_misses(columns, _COLUMNS, _SYNONYMS)
    _refuse_near(path, [miss for miss in near if miss.beside is None], header)
    layout = Layout(posts[0], criteria[0] if criteria else None, tuple(name for name in ID_COLUMNS if name in columns))
    notices = tuple(f"the column {shown(miss.column)} is not read, since {miss.beside} is" for miss in near)
    return replace(layout, others=tuple(name for name in columns if name not in layout.wanted), notices=notices)


def _refuse_near(path: Path, near: Sequence[NearMiss], header: str) -> None:
    """Raises: FaultsError if a column is most likely a misspelt one: each post would be asked for every criterion."""
    if not near:
        return
    faults = [f"{header}: the column {shown(miss.column)} is not read; did you mean {miss.meant}?" for miss in near]
    remedies = [
        *(f"rename {shown(miss.column)} to {miss.meant}" for miss in near),
        f"to leave it unread, give it a name that is not nearly a known one (x_{near[0].meant}), or remove it",
    ]
    raise FaultsError(f"input={path} cannot be used", faults, remedies=remedies)


@dataclass(frozen=True)
class PairSource:
    """A file and what its rows are asked for. Plain data: Ray sends it to where the file is read."""

    path: Path
    layout: Layout
    criteria: Mapping[str, Criterion]
    asked: Criterion | None
    """the one criterion of all rows, for a file that names none"""
    chunk_records: int
    missing: Missing = "empty"
    """what NaN and the like are, alone in a cell of text"""

    def chunks(self, done: int = 0) -> Iterator[Chunk]:
        """The chunks after the first `done` records. Raises: UserError if the file cannot be read any more."""
        try:
            yield from self._chunks(done)
        except (UnreadableError, OSError) as error:
            raise unreadable(self.path, error) from error

    def _chunks(self, done: int) -> Iterator[Chunk]:
        file = pair_file(self.path)
        chunk, characters, begun = Chunk(done, 0), 0, done
        for record in file.records(self.layout.wanted):
            if record.number <= done:
                continue
            asked = self._asked(record)
            if isinstance(asked, BadRow):
                chunk.bad.append(asked)
            else:
                chunk.pairs.extend(asked)
                characters += len(asked[0].post)
            if record.number - begun == self.chunk_records or characters >= CHUNK_CHARACTERS:
                yield Chunk(record.number, file.position, chunk.pairs, chunk.bad)
                chunk, characters, begun = Chunk(record.number, 0), 0, record.number
            else:
                chunk = Chunk(record.number, file.position, chunk.pairs, chunk.bad)
        if chunk.records > begun:
            yield chunk

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
            for miss in near_misses(given, _COLUMNS, _SYNONYMS):
                if miss.meant in CRITERION_COLUMNS:
                    raise ValueError(f"has {shown(miss.column)}, which the first record has not; is it {miss.meant}?")
            return [self.asked] if self.asked else list(self.criteria.values())
        name = _text(record, column)
        found = find_criterion(name, self.criteria)
        if column == "criterion_id" and not found.criterion_id:
            raise ValueError(f"criterion_id {named(name)} is none of the run's")
        if not found.criterion_id:
            # An id or name of the run's may be spelt like that.
            self._refuse_missing(column, name)
        return [found]

    def _refuse_missing(self, column: str, text: str) -> None:
        """Raises: ValueError if `text` is what software writes for nothing, and is to be taken so."""
        if self.missing == "empty" and is_missing(text):
            raise ValueError(f"the {column} is empty: it holds {text.strip()} (missing=text takes it as text)")


def _text(record: Record, column: str) -> str:
    """Raises: ValueError, whose message holds no text."""
    value = record.values.get(column)
    if value is None:
        raise ValueError(f"the {column} is missing")
    if not isinstance(value, str):
        raise ValueError(f"the {column} is no text")
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
    """The value of an id column, empty where there is none. Raises: ValueError if it could be a text."""
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
    """What is asked of `path`. `criterion`: the one for all its rows; `chunk_pairs`: CHUNK_PAIRS, in tests fewer.

    `missing`: whether NaN and the like, alone in a cell of text, are an empty text or that text.

    Raises: UserError if the file cannot be read or has not the columns, or `criterion` is given twice or is unknown.
    """
    try:
        file = pair_file(path)
        layout = find_layout(path, file.columns(), file.header)
    except (UnreadableError, OSError) as error:
        raise unreadable(path, error) from error
    if layout.criterion and criterion is not None:
        what = f"criterion is given on the command line, and {path} has a column {layout.criterion}."
        raise UserError(what, remedies=["leave criterion out", "remove or rename the column"])
    asked = find_criterion(criterion, criteria) if criterion is not None else None
    of_record = 1 if layout.criterion or asked else len(criteria)
    chunk_records = max(1, (chunk_pairs or CHUNK_PAIRS) // of_record)
    return PairSource(path.absolute(), layout, dict(criteria), asked, chunk_records, missing)


def unreadable(path: Path, error: UnreadableError | OSError) -> UserError:
    """What to tell of a file that cannot be read."""
    if isinstance(error, OSError):
        remedies = [f"give the path of a table (CSV, JSONL or Parquet); this is {path.absolute()}"]
        return UserError(f"input={path} cannot be read: {error.strerror}.", remedies=remedies)
    place = f", {error.place}" if error.place else ""
    return UserError(
        f"input={path}{place}: {error.detail}.", remedies=["input=<a readable file>", *error.kind.remedies]
    )
