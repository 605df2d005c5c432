"""Reads the records of a CSV, TSV, JSON or Parquet file, and marks the broken ones."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raycv.batch_inference.columns import repeated_known
from raycv.common.table_reader import JSON_LIMIT, folded, read_columns
from raycv.common.text_files import Lines, UnreadableError, check_file, csv_records, opened, parsed_json
from raycv.data.discovery import unread_form
from raycv.errors import UserError
from raycv.row_faults import Kind

_PARQUET_ROWS = 256


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


class CsvFile(PairFile):
    """Separated by commas, or by tabs in a .tsv file, with a header."""

    def columns(self) -> tuple[str, ...]:
        return read_columns(self.path)

    def records(self, wanted: Sequence[str]) -> Generator[Record, None, None]:
        with csv_records(self.path) as (lines, records):
            columns = folded(next(records)[1])
            for number, (line, fields, fault) in enumerate(records, 1):
                self.position = lines.bytes_read
                yield Record(number, line, dict(zip(columns, fields, strict=False)), fault.detail if fault else None)


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
            names = folded(key for key, _ in entries)
            yield Record(number, line, dict(zip(names, (value for _, value in entries), strict=True)), fault)

    def _objects(self) -> Generator[tuple[int, int, "_Entries", str | None], None, None]:
        """The number and line of each object, its entries, and why it cannot be read."""
        with opened(self.path) as file:
            lines, number = Lines(file), 0
            for text in lines:
                if not text.isspace():
                    number += 1
                    entries, fault = _json_object(text) if lines.fault is None else (_Entries(), lines.fault)
                    self.position = lines.bytes_read
                    yield number, lines.number, entries, fault.detail if fault else None
                lines.start_record()


class JsonFile(JsonLinesFile):
    """One JSON list of objects, read whole. The first one with keys names the columns."""

    place = "entry"

    def _objects(self) -> Generator[tuple[int, int, "_Entries", str | None], None, None]:
        size = self.total
        if size > JSON_LIMIT:
            raise UnreadableError("JSON", f"larger than {JSON_LIMIT:,} bytes: write it as JSON lines (.jsonl)")
        with opened(self.path) as file:
            try:
                value = parsed_json("".join(Lines(file)), _Entries)
            except UnreadableError as error:
                detail = f"{error.detail} (a file with an object on each line ends in .jsonl)"
                raise UnreadableError(error.kind, detail, error.place) from None
        if not isinstance(value, list) or isinstance(value, _Entries):
            raise UnreadableError("JSON", "not a list of objects, such as pandas.DataFrame.to_json(orient='records')")
        for number, entry in enumerate(value, 1):
            entries, fault = _entries_of(entry)
            self.position = size * number // len(value)
            yield number, number, entries, fault.detail if fault else None


def _json_object(text: str) -> tuple["_Entries", UnreadableError | None]:
    try:
        return _entries_of(parsed_json(text, _Entries))
    except UnreadableError as fault:
        return _Entries(), fault


def _entries_of(value: object) -> tuple["_Entries", UnreadableError | None]:
    if not isinstance(value, _Entries):
        return _Entries(), UnreadableError("JSON", "not a JSON object")
    names = folded(key for key, _ in value)
    if twice := repeated_known(names):
        detail = f"the key {twice} occurs {names.count(twice)} times"
        return _Entries(), UnreadableError("DUPLICATE_COLUMN", detail)
    return value, None


class _Entries(list[tuple[str, object]]):
    """The keys and values of a JSON object with repetitions. A dict would keep only the last of these."""


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


_FILES = {".csv": CsvFile, ".tsv": CsvFile, ".jsonl": JsonLinesFile, ".json": JsonFile, ".parquet": ParquetFile}
INPUTS = tuple(_FILES)


def pair_file(path: Path) -> PairFile:
    """The reader for `path`. Raises: UserError if its ending is not that of a known format."""
    kind = _FILES.get(path.suffix.casefold())
    if kind is None:
        if fault := unread_form(path):
            raise unreadable(path, fault)
        remedies = [f"name a file that ends in {', '.join(INPUTS[:-1])} or {INPUTS[-1]}"]
        raise UserError(f"input={path}: its ending does not tell how to read it.", kind="input-file", remedies=remedies)
    return kind(path)


def unreadable(path: Path, error: UnreadableError | OSError) -> UserError:
    """The error to raise for a file that cannot be read."""
    if isinstance(error, OSError):
        remedies = [f"give the path of a table (CSV, TSV, JSON, JSONL or Parquet); this is {path.absolute()}"]
        return UserError(f"input={path} cannot be read: {error.strerror}.", kind="input-file", remedies=remedies)
    place = f", {error.place}" if error.place else ""
    return UserError(
        f"input={path}{place}: {error.detail}.",
        kind="input-file",
        remedies=["input=<a readable file>", *Kind[error.kind].remedies],
    )
