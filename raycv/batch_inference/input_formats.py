"""Reads the records of a CSV, JSON lines or Parquet file, and marks the broken ones."""

import csv
import json
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raycv.data.problems import FIELD_LIMIT, Kind
from raycv.data.table_reader import LINE_LIMIT, UnreadableError, check_file, field_limit, folded, opened
from raycv.errors import UserError, counted

POST_COLUMNS = ("post", "text")
CRITERION_COLUMNS = ("criterion", "criterion_id")
ID_COLUMNS = ("post_id", "id")
"""Columns that are copied to the scores, so that each score can be matched with its post."""
KNOWN_COLUMNS = (POST_COLUMNS, CRITERION_COLUMNS, ID_COLUMNS)
_PARQUET_ROWS = 256
COLUMNS_REMEDY = (
    "name the columns in the first line: post (or text); if you like, criterion (words) or criterion_id (A.4), post_id"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file as it was read. `number` and `line` count from 1. For Parquet, `line` is the row."""

    number: int
    line: int
    values: Mapping[str, object]
    fault: str | None = None
    """why the record could not be read, without its text"""


# --- Files -----------------------------------------------------------------------------------------------------------


class PairFile:
    """The records of a CSV, JSONL or Parquet file. `position` of `total` (bytes or rows) have been read."""

    place = "line"
    """the unit that `Record.line` counts"""
    header = "line 1"
    """the place of the column names"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    @property
    def total(self) -> int:
        return self.path.stat().st_size

    def columns(self) -> tuple[str, ...]:
        """The names of the columns as they are spelt. Raises: UserError, UnreadableError."""
        raise NotImplementedError

    def records(self, wanted: Sequence[str]) -> Generator[Record, None, None]:
        """The records with at least the `wanted` columns. Raises: UserError, UnreadableError."""
        raise NotImplementedError


class _Lines:
    """The physical lines of a file, numbered from 1. Those of a broken record can be read again from its second on."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._again: deque[str] = deque()
        self._taken: list[str] = []
        self._read_again = 0
        self.number = 0
        self.cut = False
        """whether a line of the record was longer than LINE_LIMIT, and was cut"""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._read()
        if not line:
            raise StopIteration
        self.number += 1
        # A line may be read again, so its own length tells whether it was cut.
        self.cut |= _is_cut(line)
        self._taken.append(line)
        return line

    def _read(self) -> str:
        line: str = self._file.readline(LINE_LIMIT + len("\r\n"))
        if _is_cut(line):
            self._skip_rest(line)
        return line

    def _skip_rest(self, line: str) -> None:
        while line and not line.endswith(("\n", "\r")):
            line = self._file.readline(LINE_LIMIT)
        # The last read may have ended between the two characters of a line end, so we skip the second.
        place = self._file.tell()
        if line.endswith("\r") and self._file.read(1) != "\n":
            self._file.seek(place)

    @property
    def bytes_read(self) -> int:
        """Bytes of the file that were read, including those still in buffers."""
        return int(self._file.buffer.tell())

    def start_record(self) -> int:
        """The line on which the next record starts."""
        self._taken.clear()
        self.cut = False
        return self.number + 1

    def back_to_second(self) -> None:
        """Goes back to the second line of a broken record.

        An unclosed quote swallows the lines that follow, so we give up only the line that holds the quote.

        Raises:
            UnreadableError: Too many lines were read again.
        """
        again = self._taken[1:]
        self._read_again += len(again)
        if self._read_again > READ_AGAIN + 10 * self.number:
            detail = "up to here one quote after the other is opened and never closed"
            raise UnreadableError(Kind.QUOTING, detail, f"line {self.number - len(again)}")
        self._again.extendleft(reversed(again))
        self.number -= len(again)


def _is_cut(line: str) -> bool:
    return len(line) > LINE_LIMIT and len(line.rstrip("\r\n")) > LINE_LIMIT


READ_AGAIN = 1_000_000
"""Lines that may be read again, beside ten per line of the file: each broken record may reach to the end."""


class CsvFile(PairFile):
    """Comma-separated, with a header."""

    def columns(self) -> tuple[str, ...]:
        with opened(self.path) as file, field_limit(), closing(_csv_records(_Lines(file))) as records:
            for line, fields, fault in records:
                if fault:
                    raise UserError(f"{self.path}, line {line}: {fault}.", kind="input-file", remedies=[COLUMNS_REMEDY])
                return tuple(fields)
        return ()

    def records(self, wanted: Sequence[str]) -> Generator[Record, None, None]:
        with opened(self.path) as file, field_limit(), closing(_csv_records(lines := _Lines(file))) as records:
            columns = folded(next(records)[1])
            for number, (line, fields, fault) in enumerate(records, 1):
                if fault is None and len(fields) != len(columns):
                    fault = f"{counted(len(fields), 'field')} instead of {len(columns)}"
                self.position = lines.bytes_read
                yield Record(number, line, dict(zip(columns, fields, strict=False)), fault)


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
    return "a quoted field continues after its closing quote"


def _too_long(what: str, limit: int) -> str:
    return f"a {what} has more than {limit:,} characters"


class JsonLinesFile(PairFile):
    """One JSON object per line. The first one with keys names the columns."""

    header = "the first object"

    def columns(self) -> tuple[str, ...]:
        fault = None
        with closing(self._objects()) as objects:
            for _, line, entries, found in objects:
                if entries:
                    return tuple(key for key, _ in entries)
                fault = fault or f"line {line}: {found or 'an object without keys'}"
        if fault:
            remedies = ['write a JSON object on each line: {"post": "..."}']
            raise UserError(
                f"{self.path}: no line of it is a JSON object that can be used; {fault}.",
                kind="input-file",
                remedies=remedies,
            )
        return ()

    def records(self, wanted: Sequence[str]) -> Generator[Record, None, None]:
        for number, line, entries, fault in self._objects():
            yield Record(
                number,
                line,
                dict(zip(folded(key for key, _ in entries), (value for _, value in entries), strict=True)),
                fault,
            )

    def _objects(self) -> Generator[tuple[int, int, "_Entries", str | None], None, None]:
        """The number and line of each object, its entries, and why it cannot be read."""
        with opened(self.path) as file:
            lines, number = _Lines(file), 0
            line = lines.start_record()
            for text in lines:
                if not text.isspace():
                    number += 1
                    entries, fault = (
                        _json_object(text) if not lines.cut else (_Entries(), _too_long("line", LINE_LIMIT))
                    )
                    self.position = lines.bytes_read
                    yield number, line, entries, fault
                line = lines.start_record()


def _json_object(text: str) -> tuple["_Entries", str | None]:
    try:
        value = json.loads(text, object_pairs_hook=_Entries)
    except json.JSONDecodeError as error:
        return _Entries(), f"not JSON: {error.msg}"
    except (RecursionError, ValueError):
        return _Entries(), "JSON that is nested too deeply, or has a number that is too long"
    if not isinstance(value, _Entries):
        return _Entries(), "not a JSON object"
    names = folded(key for key, _ in value)
    if twice := repeated(names):
        return _Entries(), f"the key {twice} occurs {names.count(twice)} times"
    return value, None


class _Entries(list[tuple[str, object]]):
    """The keys and values of a JSON object with repetitions. A dict would keep only the last of these."""


def repeated(names: Sequence[str]) -> str | None:
    """A column that has a meaning and stands among `names`, in small letters, more than once."""
    return next((name for group in KNOWN_COLUMNS for name in group if names.count(name) > 1), None)


class ParquetFile(PairFile):
    """A Parquet file, read batch by batch because a row group may be larger than the memory."""

    place = "row"
    header = "the schema"

    @cached_property
    def _names(self) -> dict[str, str]:
        """Column in small letters -> as the file has it."""
        names = self._opened().schema_arrow.names
        return dict(zip(folded(names), names, strict=True))

    @property
    def total(self) -> int:
        return int(self._opened().metadata.num_rows)

    def columns(self) -> tuple[str, ...]:
        # With repetitions, which are refused.
        return tuple(self._opened().schema_arrow.names)

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
            raise UserError(
                f"{self.path} is damaged after row {number:,}.", kind="input-file", remedies=["write it again"]
            ) from error

    def _opened(self) -> Any:
        import pyarrow.parquet

        check_file(self.path)
        try:
            return pyarrow.parquet.ParquetFile(self.path, pre_buffer=False)
        except (OSError, ValueError) as error:
            what = f"{self.path} is not a Parquet file, or is damaged."
            raise UserError(
                what, kind="input-file", remedies=["write it again, or name a CSV or JSONL file"]
            ) from error


def _column_values(column: Any) -> list[object]:
    """The values of an Arrow array. Bytes of a string column that are not UTF-8 become surrogates."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pyarrow.types.is_temporal(kind) or pyarrow.types.is_nested(kind):
        # Such a value is neither text nor number, and some do not fit a Python object. So the type stands for it.
        return [kind if there else None for there in column.is_valid().to_pylist()]
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return list(column.to_pylist())
    raw = column.cast(pyarrow.binary() if pyarrow.types.is_string(kind) else pyarrow.large_binary())
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw.to_pylist()]


_FILES = {".csv": CsvFile, ".jsonl": JsonLinesFile, ".parquet": ParquetFile}
FORMATS = tuple(_FILES)


def pair_file(path: Path) -> PairFile:
    """The reader for `path`. Raises: UserError if its ending is not that of a known format."""
    kind = _FILES.get(path.suffix.casefold())
    if kind is None:
        remedies = [f"name a file that ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"]
        raise UserError(f"input={path}: its ending does not tell how to read it.", kind="input-file", remedies=remedies)
    return kind(path)


def unreadable(path: Path, error: UnreadableError | OSError) -> UserError:
    """The error to raise for a file that cannot be read."""
    if isinstance(error, OSError):
        remedies = [f"give the path of a table (CSV, JSONL or Parquet); this is {path.absolute()}"]
        return UserError(f"input={path} cannot be read: {error.strerror}.", kind="input-file", remedies=remedies)
    place = f", {error.place}" if error.place else ""
    return UserError(
        f"input={path}{place}: {error.detail}.",
        kind="input-file",
        remedies=["input=<a readable file>", *error.kind.remedies],
    )
