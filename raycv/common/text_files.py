"""Reads text files strictly and with bounded memory: lines, CSV records and JSON, each fault with its line."""

import csv
import io
import json
import re
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from raycv.errors import counted

FIELD_LIMIT = 1_000_000
"""Characters in one field at most. The longest post of ReDSM5 has 6,990 words, so a longer field is a broken file."""
LINE_LIMIT = 8 * FIELD_LIMIT
"""Characters in one line of a file at most. It bounds the memory for a file without line breaks."""
READ_AGAIN = 1_000_000
"""Lines that may be read again, beside ten per line of the file: each broken record may reach to the end."""

FileFault = Literal["NO_FILE", "ENCODING", "NUL", "QUOTING", "LONG_FIELD", "FIELD_COUNT", "JSON", "DUPLICATE_COLUMN"]
"""The kinds of fault of a file. `raycv.row_faults.Kind` has their remedies."""


class UnreadableError(Exception):
    """The fault of a record that cannot be read. Raised, it says that the rest of the file cannot be read either."""

    def __init__(self, kind: FileFault, detail: str, place: str = "") -> None:
        self.kind = kind
        self.detail = detail
        self.place = place
        super().__init__(detail)


_MAGIC = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a zip archive or Excel workbook",
    b"\xd0\xcf\x11\xe0": "an Excel workbook of the old kind (.xls)",
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a Parquet file",
}


def check_file(path: Path) -> None:
    """Raises: UnreadableError if `path` is not a regular file. To open a pipe, for example, would wait forever."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        link = "a symbolic link that cannot be followed: " if path.is_symlink() else ""
        raise UnreadableError("NO_FILE", f"{link}{error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise UnreadableError("NO_FILE", "a folder where a file is expected")
    if not stat.S_ISREG(mode):
        raise UnreadableError("NO_FILE", "no regular file (a pipe, socket or device)")


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
        raise UnreadableError("NO_FILE", str(error.strerror)) from None
    try:
        with binary:
            head = binary.read(4)
            for magic, what in _MAGIC.items():
                if head.startswith(magic):
                    raise UnreadableError("ENCODING", f"not UTF-8 text but {what}", "line 1")
            if b"\0" in head:
                raise UnreadableError("ENCODING", "not UTF-8 text but UTF-16 text, or no text at all", "line 1")
            binary.seek(0)
            yield io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        # A disk or a network drive can fail while the caller reads the file.
        raise UnreadableError("NO_FILE", str(error.strerror)) from None


# --- Lines ------------------------------------------------------------------------------------------------------------

# `surrogateescape` decodes bytes that are not UTF-8 to these characters. Valid UTF-8 never yields them.
_UNDECODABLE = re.compile("[\udc80-\udcff]")
Report = Callable[[UnreadableError], None]


class Lines:
    """The lines of a text file, numbered from 1. Those of a broken record can be read again from its second on.

    With `report`, which takes the faults of lines, the file must be whole: a line that is too long raises its fault.

    Attributes:
        number: The number of the last line.
        fault: The fault of the record if one of its lines was longer than LINE_LIMIT, and was cut.
    """

    def __init__(self, file: Any, report: Report | None = None) -> None:
        self.number = 0
        self.fault: UnreadableError | None = None
        self._file = file
        self._report = report
        self._again: deque[str] = deque()
        self._record: list[str] = []
        self._read_again = 0

    def __iter__(self) -> Iterator[str]:
        read, again = self._file.readline, self._again
        while True:
            if again:
                line = again.popleft()
            else:
                line = read(LINE_LIMIT + len("\r\n"))
                if self._report:
                    self._check(line, self._report)
                if len(line) > LINE_LIMIT:
                    self._skip_rest(line)
            if not line:
                return
            self.number += 1
            # A line may be read again, so its own length tells whether it was cut.
            if len(line) > LINE_LIMIT and _is_too_long(line):
                self.fault = _too_long("line", LINE_LIMIT, self.number)
            self._record.append(line)
            yield line

    def _check(self, line: str, report: Report) -> None:
        if len(line) > LINE_LIMIT and _is_too_long(line):
            raise stopped(_too_long("line", LINE_LIMIT, self.number + 1))
        if not line.isascii() and (found := _UNDECODABLE.search(line)):
            detail = f"the byte 0x{ord(found[0]) - 0xDC00:02x} is not UTF-8"
            report(UnreadableError("ENCODING", detail, f"line {self.number + 1}"))
        if "\0" in line:
            report(UnreadableError("NUL", "a NUL character", f"line {self.number + 1}"))

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
            raise UnreadableError("QUOTING", detail, f"line {self.number}")
        self._again.extendleft(reversed(again))


def _is_too_long(line: str) -> bool:
    return len(line.rstrip("\r\n")) > LINE_LIMIT


def _too_long(what: str, limit: int, line: int) -> UnreadableError:
    return UnreadableError("LONG_FIELD", f"a {what} has more than {limit:,} characters", f"line {line}")


def stopped(fault: UnreadableError) -> UnreadableError:
    """`fault` for a file that must be whole: reading stops there."""
    return UnreadableError(fault.kind, f"{fault.detail}; reading stopped", fault.place)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold `text`. It cannot hold surrogates, which come from escapes and from damaged bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


# --- Records ----------------------------------------------------------------------------------------------------------

Records = Generator[tuple[int, list[str], UnreadableError | None], None, None]


@contextmanager
def csv_records(path: Path, report: Report | None = None) -> Iterator[tuple[Lines, Records]]:
    """Opens a CSV file, or a TSV file, whose fields are separated by tabs; `report` as in `Lines`.

    Yields:
        The lines, and the records except blank lines. A record is the line on which it starts (from 1), its fields, and
        its fault or None. The line after that of a broken record starts the next one.

    Raises:
        UnreadableError: The file cannot be read, or its rest cannot.
    """
    with opened(path) as file, _field_limit():
        lines = Lines(file, report)
        yield lines, _records(lines, "\t" if path.suffix.casefold() == ".tsv" else ",")


def _records(lines: Lines, separator: str) -> Records:
    width = 0
    # Without `strict` the reader drops a stray quote, and an unclosed one takes in the rest of the file.
    reader = csv.reader(lines, strict=True, delimiter=separator)
    while True:
        line = lines.start_record()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, [], _csv_fault(str(error), line)
            lines.back_to_second()
            reader = csv.reader(lines, strict=True, delimiter=separator)
            continue
        width = width or len(fields)
        if lines.fault:
            yield line, fields, lines.fault
        elif len(fields) == width:
            yield line, fields, None
        elif fields:
            detail = f"{counted(len(fields), 'field')} instead of {width}"
            yield line, fields, UnreadableError("FIELD_COUNT", detail, f"line {line}")


def _csv_fault(message: str, line: int) -> UnreadableError:
    if "field limit" in message:
        fault = _too_long("field", FIELD_LIMIT, line)
        return UnreadableError(fault.kind, f"{fault.detail}; perhaps a quote is never closed", fault.place)
    is_open = "unexpected end" in message
    detail = "a quote is opened and never closed" if is_open else "a quoted field continues after its closing quote"
    return UnreadableError("QUOTING", detail, f"line {line}")


@contextmanager
def _field_limit() -> Iterator[None]:
    """Sets the field limit of the csv module in the block. The limit is one for the process, so it is restored."""
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


class Spelt(str):
    """A number of a JSON file as the file spells it, since an id must not change: 1.50 and 123456789012345678."""

    __slots__ = ()


def parsed_json(text: str, pairs_hook: Callable[[list[tuple[str, object]]], object]) -> Any:
    """The value of `text`, with numbers as `Spelt`; `pairs_hook` makes its objects.

    Raises:
        UnreadableError: It is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs_hook, parse_int=Spelt, parse_float=Spelt, parse_constant=Spelt)
    except json.JSONDecodeError as error:
        raise UnreadableError("JSON", f"not JSON: {error.msg}", f"line {error.lineno}") from None
    except (RecursionError, ValueError):
        raise UnreadableError("JSON", "JSON that is nested too deeply") from None
