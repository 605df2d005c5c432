"""Reads a table (CSV, or criteria as JSON) strictly, and reports each fault with its line.

Files of pairs (`batch_inference`) use the same lines, CSV records and limits, but a broken record does not end them.
"""

import csv
import io
import json
import re
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycv.data.problems import FIELD_LIMIT, Faults, Kind, named
from raycv.errors import counted

LINE_LIMIT = 8 * FIELD_LIMIT
"""Characters in one line of a file at most. It bounds the memory for a file without line breaks."""
JSON_LIMIT = 16 * FIELD_LIMIT
"""Bytes in a JSON file at most, since it is read whole."""
READ_AGAIN = 1_000_000
"""Lines that may be read again, beside ten per line of the file: each broken record may reach to the end."""


class UnreadableError(Exception):
    """The fault of a record that cannot be read. Raised, it says that the rest of the file cannot be read either."""

    def __init__(self, kind: Kind, detail: str, place: str = "") -> None:
        self.kind = kind
        self.detail = detail
        self.place = place
        super().__init__(detail)


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file.

    Attributes:
        place: The place where it starts: `line 7`, or `entry 3` of a JSON list.
        values: Column -> value.
        broken: Whether its fields do not fit the columns, or an entry of JSON has a fault.
    """

    place: str
    values: Mapping[str, str]
    broken: bool = False

    def id(self, column: str) -> str:
        """The value of an id column without the spaces around it; empty if a broken row lacks the column."""
        return self.values.get(column, "").strip()


@dataclass(frozen=True)
class Table:
    """The rows of a file. `whole` is false if reading stopped at a fault, so that ids may be missing."""

    path: Path
    columns: tuple[str, ...]
    rows: list[Row]
    whole: bool


Report = Callable[[Kind, str, str], None]


def read_table(path: Path, faults: Faults) -> Table:
    """Reads all rows of a CSV file, or all entries of a criteria JSON file. It adds faults and never raises them."""

    def report(kind: Kind, detail: str, place: str) -> None:
        faults.add(kind, path, detail, place)

    columns: tuple[str, ...] = ()
    rows: list[Row] = []
    try:
        if path.suffix.casefold() == ".json":
            return Table(path, CRITERIA_COLUMNS, _json_rows(path, report), whole=True)
        with csv_records(path, _line_check(report)) as (_, records):
            for line, fields, fault in records:
                place = f"line {line}"
                if fault and fault.kind is not Kind.FIELD_COUNT:
                    raise _stopped(fault, line)
                if not columns:
                    columns = folded(fields)
                    for name in repeated(columns):
                        detail = f"the column {named(name)} occurs {columns.count(name)} times"
                        report(Kind.DUPLICATE_COLUMN, detail, place)
                    continue
                if fault:
                    report(fault.kind, fault.detail, place)
                rows.append(Row(place, dict(zip(columns, fields, strict=False)), fault is not None))
    except UnreadableError as stop:
        report(stop.kind, stop.detail, stop.place)
        return Table(path, columns, rows, whole=False)
    return Table(path, columns, rows, whole=True)


def read_columns(path: Path) -> tuple[str, ...]:
    """The column names of a CSV or criteria JSON file as they are spelt; empty for other JSON or an empty file.

    Raises:
        UnreadableError: The first record cannot be read, or the file is not JSON despite its name.
    """
    if path.suffix.casefold() == ".json":
        return CRITERIA_COLUMNS if _json_entries(path) is not None else ()
    with csv_records(path) as (_, records):
        for _, fields, fault in records:
            if fault:
                raise fault
            return tuple(fields)
    return ()


def folded(names: Iterable[str]) -> tuple[str, ...]:
    """Column names as raycv compares them: without the spaces around them, in small letters."""
    return tuple(name.strip().casefold() for name in names)


def repeated(names: Sequence[str]) -> list[str]:
    """The names that occur more than once, sorted. A column without a name does not count."""
    return sorted({name for name in names if name and names.count(name) > 1})


# --- Lines -----------------------------------------------------------------------------------------------------------

# `surrogateescape` decodes bytes that are not UTF-8 to these characters. Valid UTF-8 never yields them.
_UNDECODABLE = re.compile("[\udc80-\udcff]")
_MAGIC = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a zip archive or Excel workbook",
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a Parquet file",
}

LineCheck = Callable[[str, int], None]
"""Takes each line and its number, before the rest of a line that is too long is skipped."""


class Lines:
    """The lines of a text file, numbered from 1. Those of a broken record can be read again from its second on.

    Attributes:
        number: The number of the last line.
        fault: The fault of the record if one of its lines was longer than LINE_LIMIT, and was cut.
    """

    def __init__(self, file: Any, check: LineCheck | None = None) -> None:
        self.number = 0
        self.fault: UnreadableError | None = None
        self._file = file
        self._check = check
        self._again: deque[str] = deque()
        self._record: list[str] = []
        self._read_again = 0

    def __iter__(self) -> Iterator[str]:
        read, again, check = self._file.readline, self._again, self._check
        while True:
            if again:
                line = again.popleft()
            else:
                line = read(LINE_LIMIT + len("\r\n"))
                if check:
                    check(line, self.number + 1)
                if len(line) > LINE_LIMIT:
                    self._skip_rest(line)
            if not line:
                return
            self.number += 1
            # A line may be read again, so its own length tells whether it was cut.
            if len(line) > LINE_LIMIT and _is_too_long(line):
                self.fault = _too_long("line", LINE_LIMIT)
            self._record.append(line)
            yield line

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
        self._record.clear()
        self.fault = None
        return self.number + 1

    def back_to_second(self) -> None:
        """Goes back to the second line of a broken record.

        An unclosed quote swallows the lines that follow, so we give up only the line that holds the quote.

        Raises:
            UnreadableError: Too many lines were read again.
        """
        again = self._record[1:]
        self._read_again += len(again)
        self.number -= len(again)
        if self._read_again > READ_AGAIN + 10 * (self.number + len(again)):
            detail = "up to here one quote after the other is opened and never closed"
            raise UnreadableError(Kind.QUOTING, detail, f"line {self.number}")
        self._again.extendleft(reversed(again))


def _is_too_long(line: str) -> bool:
    return len(line.rstrip("\r\n")) > LINE_LIMIT


def _too_long(what: str, limit: int) -> UnreadableError:
    """The fault of a field or line (`what`) of more than `limit` characters."""
    return UnreadableError(Kind.LONG_FIELD, f"a {what} has more than {limit:,} characters")


def _line_check(report: Report) -> LineCheck:
    """The check of a table that must be whole. It reports what is not UTF-8, and raises at a line that is too long."""

    def check(line: str, number: int) -> None:
        if len(line) > LINE_LIMIT and _is_too_long(line):
            raise _stopped(_too_long("line", LINE_LIMIT), number)
        if not line.isascii() and (found := _UNDECODABLE.search(line)):
            report(Kind.ENCODING, f"the byte 0x{ord(found[0]) - 0xDC00:02x} is not UTF-8", f"line {number}")
        if "\0" in line:
            report(Kind.NUL, "a NUL character", f"line {number}")

    return check


def _stopped(fault: UnreadableError, line: int) -> UnreadableError:
    return UnreadableError(fault.kind, f"{fault.detail}; reading stopped", f"line {line}")


def check_file(path: Path) -> None:
    """Raises: UnreadableError if `path` is not a regular file. To open a pipe, for example, would wait forever."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        link = "a symbolic link that cannot be followed: " if path.is_symlink() else ""
        raise UnreadableError(Kind.NO_FILE, f"{link}{error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise UnreadableError(Kind.NO_FILE, "a folder where a file is expected")
    if not stat.S_ISREG(mode):
        raise UnreadableError(Kind.NO_FILE, "no regular file (a pipe, socket or device)")


@contextmanager
def opened(path: Path) -> Iterator[io.TextIOWrapper]:
    """Opens a file as text, with its line ends and without a byte order mark.

    Bytes that are not UTF-8 become surrogates.

    Raises:
        UnreadableError: It is not a regular file, cannot be read, or begins as UTF-8 text cannot.
    """
    check_file(path)
    try:
        binary = path.open("rb")
    except OSError as error:
        raise UnreadableError(Kind.NO_FILE, str(error.strerror)) from None
    try:
        with binary:
            head = binary.read(4)
            for magic, what in _MAGIC.items():
                if head.startswith(magic):
                    raise UnreadableError(Kind.ENCODING, f"not UTF-8 text but {what}", "line 1")
            if b"\0" in head:
                raise UnreadableError(Kind.ENCODING, "not UTF-8 text but UTF-16 text, or no text at all", "line 1")
            binary.seek(0)
            yield io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        # A disk or a network drive can fail while the caller reads the file.
        raise UnreadableError(Kind.NO_FILE, str(error.strerror)) from None


# --- CSV -------------------------------------------------------------------------------------------------------------

Records = Generator[tuple[int, list[str], UnreadableError | None], None, None]


@contextmanager
def csv_records(path: Path, check: LineCheck | None = None) -> Iterator[tuple[Lines, Records]]:
    """Opens a CSV file; `check` sees each of its lines.

    Yields:
        The lines, and the records except blank lines. A record is the line on which it starts (from 1), its fields, and
        its fault or None. The line after that of a broken record starts the next one.

    Raises:
        UnreadableError: The file cannot be read, or its rest cannot.
    """
    with opened(path) as file, _field_limit():
        lines = Lines(file, check)
        yield lines, _records(lines)


def _records(lines: Lines) -> Records:
    width = 0
    # Without `strict` the reader drops a stray quote, and an unclosed one takes in the rest of the file.
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
        width = width or len(fields)
        if lines.fault:
            yield line, fields, lines.fault
        elif len(fields) == width:
            yield line, fields, None
        elif fields:
            detail = f"{counted(len(fields), 'field')} instead of {width}"
            yield line, fields, UnreadableError(Kind.FIELD_COUNT, detail)


def _csv_fault(message: str) -> UnreadableError:
    if "field limit" in message:
        fault = _too_long("field", FIELD_LIMIT)
        return UnreadableError(fault.kind, f"{fault.detail}; perhaps a quote is never closed")
    if "unexpected end" in message:
        return UnreadableError(Kind.QUOTING, "a quote is opened and never closed")
    return UnreadableError(Kind.QUOTING, "a quoted field continues after its closing quote")


@contextmanager
def _field_limit() -> Iterator[None]:
    """Sets the field limit of the csv module in the block. The limit is one for the process, so it is restored."""
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# --- JSON ------------------------------------------------------------------------------------------------------------

CRITERIA_COLUMNS = ("criterion_id", "criterion")


def _json_entries(path: Path) -> list[object] | None:
    """The entries of a criteria JSON file; None if the file is JSON of another kind.

    Raises:
        UnreadableError: The file is not JSON, is too large or too deep, or has an object with a key twice.
    """
    check_file(path)
    if path.stat().st_size > JSON_LIMIT:
        raise UnreadableError(Kind.JSON, f"larger than {JSON_LIMIT:,} bytes, so no criteria file")
    with opened(path) as file:
        value = parsed_json("".join(Lines(file, _line_check(_raise))), _without_repeats)
    if isinstance(value, dict):
        value = value.get("criteria")
        return value if isinstance(value, list) else None
    # A bare list can hold anything, so we take it for criteria only if an entry has an id and a text.
    is_criteria = isinstance(value, list) and any(None not in _id_and_text(entry) for entry in value)
    return value if is_criteria else None


def parsed_json(text: str, pairs_hook: Callable[[list[tuple[str, object]]], object]) -> Any:
    """The value of `text`; `pairs_hook` makes its objects. Raises: UnreadableError if it is not JSON."""
    try:
        return json.loads(text, object_pairs_hook=pairs_hook)
    except json.JSONDecodeError as error:
        raise UnreadableError(Kind.JSON, f"not JSON: {error.msg}", f"line {error.lineno}") from None
    except (RecursionError, ValueError):
        raise UnreadableError(Kind.JSON, "JSON that is nested too deeply, or has a number that is too long") from None


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Builds an object. Refuses a key that occurs twice, since Python would silently take its last value."""
    if len(dict(pairs)) < len(pairs):
        raise UnreadableError(Kind.JSON, "an object that has a key twice")
    return dict(pairs)


def _id_and_text(entry: object) -> tuple[object, object]:
    values = entry if isinstance(entry, dict) else {}
    return values.get("id", values.get("criterion_id")), values.get("text", values.get("criterion"))


def _raise(kind: Kind, detail: str, place: str) -> None:
    raise UnreadableError(kind, detail, place)


def _json_rows(path: Path, report: Report) -> list[Row]:
    rows = []
    for number, entry in enumerate(_json_entries(path) or [], 1):
        place = f"entry {number}"
        criterion_id, text = _id_and_text(entry)
        if isinstance(criterion_id, int) and not isinstance(criterion_id, bool):
            criterion_id = str(criterion_id)
        broken = not (isinstance(criterion_id, str) and isinstance(text, str))
        if broken:
            report(Kind.JSON, "needs `id` and `text`, both strings", place)
        elif not is_unicode(f"{criterion_id}{text}") or "\0" in f"{criterion_id}{text}":
            # JSON can escape characters that UTF-8 cannot hold. The tokenizer and the hashes would fail on them.
            report(Kind.ENCODING, "an escape \\uXXXX that is not a character", place)
            broken = True
        elif len(str(text)) > FIELD_LIMIT:
            report(Kind.LONG_FIELD, f"`text` has more than {FIELD_LIMIT:,} characters", place)
            broken = True
        found = {"criterion_id": criterion_id, "criterion": text}
        rows.append(Row(place, {name: value for name, value in found.items() if isinstance(value, str)}, broken))
    return rows


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold `text`. It cannot hold surrogates, which come from escapes and from damaged bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def separator_of(columns: Sequence[str]) -> str | None:
    """The separator if it is not a comma: Excel writes semicolons in half of Europe. None for commas."""
    names = {";": "semicolons", "\t": "tabs", "|": "bars"}
    return next((name for mark, name in names.items() if len(columns) == 1 and mark in columns[0]), None)
