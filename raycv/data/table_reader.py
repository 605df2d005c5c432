"""Reads a table (CSV, or criteria as JSON) strictly, and reports each fault with its line."""

import csv
import io
import json
import re
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from raycv.data.problems import FIELD_LIMIT, Faults, Kind, named

LINE_LIMIT = 8 * FIELD_LIMIT
"""Characters in one line of a file at most. It bounds the memory for a file without line breaks."""
JSON_LIMIT = 16 * FIELD_LIMIT
"""Bytes in a JSON file at most, since it is read whole."""


class UnreadableError(Exception):
    """A fault after which the rest of a file cannot be read. The loader catches it and reports it as a fault."""

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
        for line, fields in _records(path, report):
            if not columns:
                columns = folded(fields)
                _check_header(columns, line, report)
                continue
            broken = len(fields) != len(columns)
            if broken:
                report(Kind.FIELD_COUNT, f"{len(fields)} fields instead of {len(columns)}", f"line {line}")
            rows.append(Row(f"line {line}", dict(zip(columns, fields, strict=False)), broken))
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
    with closing(_records(path, lambda *_: None)) as records:
        for _, fields in records:
            return tuple(fields)
    return ()


def folded(names: Iterable[str]) -> tuple[str, ...]:
    """Column names as raycv compares them: without the spaces around them, in small letters."""
    return tuple(name.strip().casefold() for name in names)


def _check_header(columns: tuple[str, ...], line: int, report: Report) -> None:
    for name in sorted({name for name in columns if name and columns.count(name) > 1}):
        report(Kind.DUPLICATE_COLUMN, f"the column {named(name)} occurs {columns.count(name)} times", f"line {line}")


# --- CSV -------------------------------------------------------------------------------------------------------------

# `surrogateescape` decodes bytes that are not UTF-8 to these characters. Valid UTF-8 never yields them.
_UNDECODABLE = re.compile("[\udc80-\udcff]")
_MAGIC = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a zip archive or Excel workbook",
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a Parquet file",
}


def _records(path: Path, report: Report) -> Generator[tuple[int, list[str]], None, None]:
    """Reads the records of a CSV file and skips blank lines.

    Yields:
        The line on which a record starts (from 1), and its fields.

    Raises:
        UnreadableError: The rest of the file cannot be read.
    """
    with field_limit():
        # Without `strict` the reader drops a stray quote, and an unclosed one takes in the rest of the file.
        reader = csv.reader(_lines(path, report), strict=True)
        while True:
            start = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise _csv_fault(str(error), start) from None
            if fields:
                yield start, fields


def _csv_fault(message: str, line: int) -> UnreadableError:
    place = f"line {line}"
    if "field limit" in message:
        detail = f"a field of the record that starts here has more than {FIELD_LIMIT:,} characters; reading stopped"
        return UnreadableError(Kind.LONG_FIELD, detail, place)
    if "unexpected end" in message:
        detail = "a quote is opened in the record that starts here and never closed"
    else:
        detail = "a quoted field of the record that starts here continues after its closing quote; reading stopped"
    return UnreadableError(Kind.QUOTING, detail, place)


@contextmanager
def field_limit() -> Iterator[None]:
    """Sets the field limit of the csv module in the block. The limit is one for the process, so it is restored."""
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _lines(path: Path, report: Report) -> Iterator[str]:
    with opened(path) as file:
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            place = f"line {number}"
            if len(line) > LINE_LIMIT:
                detail = f"a line of more than {LINE_LIMIT:,} characters, so a field that is too long; reading stopped"
                raise UnreadableError(Kind.LONG_FIELD, detail, place)
            if not line.isascii() and (found := _UNDECODABLE.search(line)):
                report(Kind.ENCODING, f"the byte 0x{ord(found[0]) - 0xDC00:02x} is not UTF-8", place)
            if "\0" in line:
                report(Kind.NUL, "a NUL character", place)
            yield line


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
    text = "".join(_lines(path, _raise))
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise UnreadableError(Kind.JSON, f"not JSON: {error.msg}", f"line {error.lineno}") from None
    except (RecursionError, ValueError):
        raise UnreadableError(Kind.JSON, "JSON that is nested too deeply, or has a number that is too long") from None
    if isinstance(value, dict):
        value = value.get("criteria")
        return value if isinstance(value, list) else None
    # A bare list can hold anything, so we take it for criteria only if an entry has an id and a text.
    is_criteria = isinstance(value, list) and any(None not in _id_and_text(entry) for entry in value)
    return value if is_criteria else None


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
