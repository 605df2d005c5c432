"""Reads a table (CSV, or criteria as JSON) strictly, and reports each fault with its line."""

import csv
import io
import json
import re
import stat
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from raycv.data.problems import FIELD_LIMIT, Faults, Kind, named

LINE_LIMIT = 8 * FIELD_LIMIT
"""Characters in one line of a file: bounds the memory where a file has no line breaks at all."""
JSON_LIMIT = 16 * FIELD_LIMIT
"""Bytes in a JSON file, which is read whole."""


class UnreadableError(Exception):
    """A fault after which the rest of a file cannot be read. Caught within the loader, which reports it as a fault."""

    def __init__(self, kind: Kind, detail: str, place: str = "") -> None:
        self.kind = kind
        self.detail = detail
        self.place = place
        super().__init__(detail)


@dataclass(frozen=True, slots=True)
class Row:
    """One record. `place`: where it starts (`line 7`, or `entry 3` of a JSON list); `broken`: its fields do not fit."""

    place: str
    values: Mapping[str, str]
    broken: bool = False

    def id(self, column: str) -> str:
        """The value of an id column without the spaces around it; empty where a broken row has none."""
        return self.values.get(column, "").strip()


@dataclass(frozen=True)
class Table:
    """A file's rows. `whole` is false if reading stopped at a fault: then absent ids prove nothing."""

    path: Path
    columns: tuple[str, ...]
    rows: list[Row]
    whole: bool


Report = Callable[[Kind, str, str], None]


def read_table(path: Path, faults: Faults) -> Table:
    """All rows of a CSV file, or the entries of a criteria JSON file; faults are added to `faults`, never raised."""

    def report(kind: Kind, detail: str, place: str) -> None:
        faults.add(kind, path, detail, place)

    columns: tuple[str, ...] = ()
    rows: list[Row] = []
    try:
        if path.suffix.casefold() == ".json":
            return Table(path, CRITERIA_COLUMNS, _json_rows(path, report), whole=True)
        for line, fields in _records(path, report):
            if not columns:
                columns = _header(fields)
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
    """The column names of a CSV or criteria JSON file in small letters; none if it is another JSON file.

    Raises: UnreadableError.
    """
    if path.suffix.casefold() == ".json":
        return CRITERIA_COLUMNS if _json_entries(path) is not None else ()
    with closing(_records(path, lambda *_: None)) as records:
        for _, fields in records:
            return _header(fields)
    return ()


def _header(fields: list[str]) -> tuple[str, ...]:
    return tuple(name.strip().casefold() for name in fields)


def _check_header(columns: tuple[str, ...], line: int, report: Report) -> None:
    for name in sorted({name for name in columns if name and columns.count(name) > 1}):
        report(Kind.DUPLICATE_COLUMN, f"the column {named(name)} occurs {columns.count(name)} times", f"line {line}")


# --- CSV -------------------------------------------------------------------------------------------------------------

# What bytes that are not UTF-8 are decoded to by `surrogateescape`; valid UTF-8 never yields these.
_UNDECODABLE = re.compile("[\udc80-\udcff]")
_MAGIC = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a zip archive or Excel workbook",
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a Parquet file",
}


def _records(path: Path, report: Report) -> Generator[tuple[int, list[str]], None, None]:
    """Yields the line on which each record starts (1-based) and its fields; blank lines are skipped.

    Raises: UnreadableError where the rest of the file cannot be read.
    """
    with field_limit():
        # strict: without it a stray quote is dropped from the text, and an unclosed one swallows the rest of the file.
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
        detail = "a quoted field of the record that starts here goes on after its closing quote; reading stopped"
    return UnreadableError(Kind.QUOTING, detail, place)


@contextmanager
def field_limit() -> Iterator[None]:
    """The csv module's limit is one for the whole process: set while a file is read, then put back."""
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
    """Raises: UnreadableError unless `path` is a regular file; opening a pipe, say, would wait for ever."""
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
    """`path` as text: a byte order mark is skipped, line ends are kept, bytes that are not UTF-8 become surrogates.

    Raises: UnreadableError if it is no regular file, or starts as no UTF-8 text does.
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
        # A disk or a network drive that fails while the file is read.
        raise UnreadableError(Kind.NO_FILE, str(error.strerror)) from None


# --- JSON ------------------------------------------------------------------------------------------------------------

CRITERIA_COLUMNS = ("criterion_id", "criterion")


def _json_entries(path: Path) -> list[object] | None:
    """The entries of a criteria JSON file; None if the file is JSON of another kind.

    Raises: UnreadableError if it is no JSON at all.
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
    # A bare list may be anything: it is one of criteria if an entry has an id and a text.
    is_criteria = isinstance(value, list) and any(None not in _id_and_text(entry) for entry in value)
    return value if is_criteria else None


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Of two values for one key Python would take the last."""
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
            # JSON can escape what no UTF-8 file can hold; the tokenizer and the hashes would fail on it.
            report(Kind.ENCODING, "an escape \\uXXXX that is no character", place)
            broken = True
        elif len(str(text)) > FIELD_LIMIT:
            report(Kind.LONG_FIELD, f"`text` has more than {FIELD_LIMIT:,} characters", place)
            broken = True
        found = {"criterion_id": criterion_id, "criterion": text}
        rows.append(Row(place, {name: value for name, value in found.items() if isinstance(value, str)}, broken))
    return rows


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold `text`: no surrogates, which stand for escapes or for bytes that are no character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def separator_of(columns: Sequence[str]) -> str | None:
    """What separates the columns, if not commas: Excel writes semicolons in half of Europe."""
    names = {";": "semicolons", "\t": "tabs", "|": "bars"}
    return next((name for mark, name in names.items() if len(columns) == 1 and mark in columns[0]), None)
