"""Reads a table (CSV, TSV, JSON) strictly, each fault with its line; decides which cells are blank or missing.

Files of pairs (`batch_inference`) use the same lines, CSV records and limits, but a broken record does not end them.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raycv.common.text_files import (
    FIELD_LIMIT,
    Lines,
    Report,
    Spelt,
    UnreadableError,
    check_file,
    csv_records,
    is_unicode,
    opened,
    parsed_json,
    stopped,
)
from raycv.row_faults import Faults, Kind, named

Missing = Literal["empty", "text"]
"""How a cell counts that holds a mark of a missing value and nothing else: as an empty text, or as that text."""
JSON_LIMIT = 16 * FIELD_LIMIT
"""Bytes in a JSON file at most, since it is read whole."""

# Unicode's Default_Ignorable_Code_Point: characters that stay invisible in fonts and programs that do not know them.
# Python's unicodedata lacks the property, so we list the ranges of DerivedCoreProperties.txt of Unicode 18.0. They
# include reserved code points. A test compares them with the tables of the regex package.
IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Controls, format characters and separators are invisible, and a combining mark needs a letter below it.
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Mc", "Me")
# Unicode counts these characters as symbols or letters, but their glyphs are empty. We know them by name, since a name
# is normative and never changes.
_INKLESS = ("BRAILLE PATTERN BLANK", "EGYPTIAN HIEROGLYPH FULL BLANK", "EGYPTIAN HIEROGLYPH HALF BLANK",
            "MUSICAL SYMBOL NULL NOTEHEAD")  # fmt: skip

MISSING = frozenset({
    # People let pandas write these (na_rep), since it reads them as missing by default. R writes NA, and Python None.
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null",
    # pandas writes this for a missing time.
    "NaT",
    # Databases write these in their exports: MySQL and PostgreSQL the first, Oracle the second.
    "\\N", "(null)",
    # Excel, LibreOffice and Google Sheets write these for a formula without a value, some as #N/A in other languages.
    "#VALUE!", "#REF!", "#DIV/0!", "#NAME?", "#NUM!", "#NULL!", "#SPILL!", "#CALC!", "#FIELD!", "#GETTING_DATA",
    "#ERROR!", "#NV", "#N/D", "#N/B", "#I/T",
})  # fmt: skip
"""The exact spellings that software writes into a cell for a missing value.

People write words such as `none`, `Null`, `na` or `Nan`, so other spellings are text.
"""


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


def read_table(path: Path, faults: Faults) -> Table:
    """Reads all rows of a CSV or TSV file, or all entries of a JSON file. It adds faults and never raises them."""

    def report(fault: UnreadableError) -> None:
        faults.add(Kind[fault.kind], path, fault.detail, fault.place)

    columns: tuple[str, ...] = ()
    rows: list[Row] = []
    try:
        if path.suffix.casefold() == ".json":
            names, entries = _json_entries(path)
            _check_repeats(folded(names), "entry 1", report)
            rows = _criteria_rows(entries, report) if names == CRITERIA_COLUMNS else _json_rows(names, entries, report)
            return Table(path, folded(names), rows, whole=True)
        with csv_records(path, report) as (_, records):
            for line, fields, fault in records:
                if fault:
                    if fault.kind != "FIELD_COUNT":
                        raise stopped(fault)
                    report(fault)
                if columns:
                    rows.append(Row(f"line {line}", dict(zip(columns, fields, strict=False)), fault is not None))
                    continue
                columns = folded(fields)
                _check_repeats(columns, f"line {line}", report)
    except UnreadableError as stop:
        report(stop)
        return Table(path, columns, rows, whole=False)
    return Table(path, columns, rows, whole=True)


def read_columns(path: Path) -> tuple[str, ...]:
    """The column names of a file as they are spelt; empty for other JSON than a list of objects, or an empty file.

    Raises:
        UnreadableError: The first record cannot be read, or the file is not JSON despite its name.
    """
    if path.suffix.casefold() == ".json":
        return _json_entries(path)[0]
    # With a report, a first line without end is not read to its end.
    with csv_records(path, lambda _: None) as (_, records):
        for _, fields, fault in records:
            if fault:
                raise fault
            return tuple(fields)
    return ()


def _check_repeats(columns: Sequence[str], place: str, report: Report) -> None:
    for name in repeated(columns):
        detail = f"the column {named(name)} occurs {columns.count(name)} times"
        report(UnreadableError("DUPLICATE_COLUMN", detail, place))


def folded(names: Iterable[str]) -> tuple[str, ...]:
    """Column names as raycv compares them: without the spaces around them, in small letters."""
    return tuple(name.strip().casefold() for name in names)


def repeated(names: Sequence[str]) -> list[str]:
    """The names that occur more than once, sorted. A column without a name does not count."""
    return sorted({name for name in names if name and names.count(name) > 1})


# --- JSON ------------------------------------------------------------------------------------------------------------

CRITERIA_COLUMNS = ("criterion_id", "criterion")


def _json_entries(path: Path) -> tuple[tuple[str, ...], list[object]]:
    """The columns and entries of a JSON file: CRITERIA_COLUMNS for criteria, else the keys of its first object.

    Both are empty if the file is JSON of another kind.

    Raises:
        UnreadableError: The file is not JSON, is too large or too deep, or has an object with a key twice.
    """
    check_file(path)
    if path.stat().st_size > JSON_LIMIT:
        raise UnreadableError("JSON", f"larger than {JSON_LIMIT:,} bytes: write it as CSV")
    with opened(path) as file:
        value = parsed_json("".join(Lines(file, _raise)), _without_repeats)
    listed = value.get("criteria") if isinstance(value, dict) else value
    if not isinstance(listed, list):
        return (), []
    first = next((entry for entry in listed if isinstance(entry, dict)), {})
    # A bare list can hold anything, so we take it for criteria only if an entry has an id and a text, and no post.
    is_table = listed is value and "post_id" in folded(first)
    if not is_table and (listed is not value or any(None not in _id_and_text(entry) for entry in listed)):
        return CRITERIA_COLUMNS, listed
    return tuple(first), listed if first else []


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Builds an object. Refuses a key that occurs twice, since Python would silently take its last value."""
    if len(dict(pairs)) < len(pairs):
        raise UnreadableError("JSON", "an object that has a key twice")
    return dict(pairs)


def _id_and_text(entry: object) -> tuple[object, object]:
    values = entry if isinstance(entry, dict) else {}
    return values.get("id", values.get("criterion_id")), values.get("text", values.get("criterion"))


def _raise(fault: UnreadableError) -> None:
    raise fault


def _json_rows(names: Sequence[str], entries: Sequence[object], report: Report) -> list[Row]:
    """The rows of a JSON table, as pandas.DataFrame.to_json(orient="records") writes one."""
    rows = []
    for number, entry in enumerate(entries, 1):
        place = f"entry {number}"
        known = entry if isinstance(entry, dict) else {}
        values, fault = {}, None if isinstance(entry, dict) else UnreadableError("JSON", "not an object", place)
        for name in names if known else ():
            text = _cell(known.get(name))
            if text is None:
                fault = UnreadableError("JSON", f"{named(name)} is neither a text nor a number", place)
            else:
                fault = fault or _text_fault(text, name, place)
                values[name.strip().casefold()] = text
        if fault:
            report(fault)
        rows.append(Row(place, values, fault is not None))
    return rows


def _cell(value: object) -> str | None:
    """A value of JSON as the cell of a table; None for a list or an object."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "true", False: "false"}[value]
    return value if isinstance(value, str) else None


def _text_fault(text: str, name: str, place: str) -> UnreadableError | None:
    if not is_unicode(text) or "\0" in text:
        # JSON can escape characters that UTF-8 cannot hold. The tokenizer and the hashes would fail on them.
        return UnreadableError("ENCODING", "an escape \\uXXXX that is not a character", place)
    if len(text) > FIELD_LIMIT:
        return UnreadableError("LONG_FIELD", f"{named(name)} has more than {FIELD_LIMIT:,} characters", place)
    return None


def _criteria_rows(entries: Sequence[object], report: Report) -> list[Row]:
    rows = []
    for number, entry in enumerate(entries, 1):
        place = f"entry {number}"
        criterion_id, text = _id_and_text(entry)
        broken = not (isinstance(criterion_id, str) and isinstance(text, str)) or isinstance(text, Spelt)
        if broken:
            report(UnreadableError("JSON", "needs `id` and `text`, both strings", place))
        elif fault := _text_fault(f"{criterion_id}", "id", place) or _text_fault(str(text), "text", place):
            report(fault)
            broken = True
        found = {"criterion_id": criterion_id, "criterion": text}
        rows.append(Row(place, {name: value for name, value in found.items() if isinstance(value, str)}, broken))
    return rows


def separator_of(columns: Sequence[str], *, tabs: bool = False) -> str | None:
    """The separator if it is another than expected: Excel writes semicolons in half of Europe. None for the expected.

    Args:
        columns: The first line, split where a separator was expected.
        tabs: Whether tabs were expected, as in a `.tsv`, and not commas.
    """
    if columns and columns[0].strip().startswith("sep="):
        return "the mark of the line `sep=`, which stands before the column names for Excel"
    names = {";": "semicolons", "\t": "tabs", "|": "bars"} | ({",": "commas"} if tabs else {})
    return next((name for mark, name in names.items() if len(columns) == 1 and mark in columns[0]), None)


def is_blank(text: str) -> bool:
    """Whether `text` is empty to a reader: only white space, invisible characters and combining marks, or nothing."""
    return not any(_is_seen(character) for character in text)


def _is_seen(character: str) -> bool:
    """Whether `character` is visible without others.

    Private characters can be visible, so they count. Unassigned ones count too, since a later version of Unicode can
    make them letters. Otherwise a post would be blank in one version of Python only. Surrogates count, since they are
    damage, which is reported elsewhere.
    """
    if unicodedata.category(character) in _UNSEEN or IGNORABLE.match(character):
        return False
    is_noncharacter = ord(character) & 0xFFFE == 0xFFFE or "\ufdd0" <= character <= "\ufdef"
    return not is_noncharacter and unicodedata.name(character, "") not in _INKLESS


def is_missing(text: str) -> bool:
    """Whether `text` is a spelling that software writes for a missing value, and people do not."""
    return text.strip() in MISSING
