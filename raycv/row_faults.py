"""The kinds of fault in a data set, with their remedies; collects them and reports all together, without text."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import ROUND_DOWN, ROUND_HALF_UP, Context, Decimal
from enum import Enum
from pathlib import Path

from raycv.common.text_files import FIELD_LIMIT
from raycv.errors import ErrorKind, FaultsError, counted, first_of, shown

_LISTED = 10
_EXAMPLES = 5

_ACCESS = (
    "to get ReDSM5, ask for access to irlab-udc/redsm5 on the Hugging Face hub (by signed agreement), and put"
    " redsm5_posts.csv and redsm5_annotations.csv into data/redsm5, or set data.dir to the folder that holds them"
)
_QUICKSTART = "to try raycv without it, on synthetic data: python -m raycv.run experiment=quickstart"
_CSV = "write the file with a CSV library (pandas.DataFrame.to_csv, or Excel's `CSV UTF-8`), which quotes where it must"
_IDS = "make the ids of the files agree: every pair needs a row in the posts and a row in the criteria"


class Kind(Enum):
    """The kinds of fault, each with the kind that its message shows, its plural for messages and its remedies."""

    FOLDER = "data-file", "folders that cannot be used", _ACCESS, _QUICKSTART
    NO_TABLE = (
        "data-file",
        "tables that are missing",
        "put the file there, with these column names",
        _ACCESS,
        _QUICKSTART,
    )
    NO_CRITERIA = (
        "data-file",
        "criteria that are missing",
        "set data.criteria_dir to the folder with the criteria: a CSV file with the columns criterion_id and criterion,"
        ' or a JSON file {"criteria": [{"id": "A.1", "text": "..."}]}; raycv ships one in data/dsm5',
    )
    NO_FILE = "data-file", "files that cannot be opened", "put a regular, readable file there"
    AMBIGUOUS = (
        "data-file",
        "tables that are ambiguous",
        "keep the one that is meant, and remove the others or move them elsewhere",
    )
    ENCODING = (
        "data-format",
        "lines that are not UTF-8",
        "save the file as UTF-8 (Excel: File, Save As, `CSV UTF-8`; Python: pandas.DataFrame.to_csv), from the original"
        " if you can",
    )
    NUL = (
        "data-format",
        "lines with a NUL character",
        "write the file again as UTF-8 text: a NUL character is a sign of damage",
    )
    QUOTING = "data-format", "records with broken quotes", _CSV
    LONG_FIELD = "data-format", "fields that are too long", f"{_CSV}; no field may exceed {FIELD_LIMIT:,} characters"
    FIELD_COUNT = (
        "data-format",
        "rows with a wrong number of fields",
        f"{_CSV}: text that holds commas or line breaks needs quotes",
    )
    JSON = (
        "data-format",
        "faults of the JSON",
        'give the criteria as {"criteria": [{"id": "A.1", "text": "..."}]}, and another table as'
        " pandas.DataFrame.to_json(orient='records') writes it",
    )
    COLUMN = "data-format", "columns that are missing", "name the columns in the first line as the message says"
    SEPARATOR = (
        "data-format",
        "tables that are separated by something else than commas",
        "write them with commas into a .csv: pandas.DataFrame.to_csv, or a spreadsheet's CSV export with the comma as"
        " separator; remove a line `sep=`",
    )
    DUPLICATE_COLUMN = "data-format", "columns that occur twice", "keep one column of each name"
    ID = "data-id", "ids that cannot be used", "give every row a short id; criterion ids also name files: no / or \\"
    SPELLING = (
        "data-id",
        "ids that the files spell differently",
        "spell each id alike in all files, as text: pandas.read_csv(..., dtype=str), or the column type Text when a"
        " spreadsheet imports the file",
    )
    ROUNDED = (
        "data-id",
        "ids that a spreadsheet rounded",
        "take the ids from the original file again, as text: pandas.read_csv(..., dtype=str), or the column type Text"
        " when a spreadsheet imports the file; it keeps 15 digits of a number",
    )
    DUPLICATE_ID = "data-id", "duplicate ids", "keep one row for each id"
    DUPLICATE_PAIR = "data-id", "duplicate pairs", "keep one row for each pair of post and criterion"
    LABEL = "data-label", "unknown labels", "write labels as yes or no, 1 or 0, true or false"
    NO_LABEL = (
        "data-label",
        "labels that are empty",
        "a pair that nobody judged cannot be used: judge it, or remove its post from every table (data.empty and"
        " data.missing are about texts only)",
    )
    SYMPTOM = (
        "data-label",
        "unknown symptom names",
        "correct the name, or teach raycv/data/types.py the new one: to drop such rows would turn positives into"
        " negatives",
    )
    NO_POST = "data-id", "post ids without a post", _IDS
    NO_CRITERION = (
        "data-id",
        "criterion ids without a criterion",
        f"{_IDS}; data.criteria_dir says which criteria are used",
    )
    UNUSED_POST = "data-id", "posts without any pair", _IDS
    UNUSED_CRITERION = "data-id", "criteria without any pair", f"{_IDS}; data.criteria_dir says which criteria are used"
    NO_PAIR = (
        "data-id",
        "missing pairs",
        "add the missing rows: every post is judged by every criterion, label no included",
    )
    EMPTY = (
        "data-text",
        "empty texts",
        "fill them in or remove them; data.empty=drop leaves them out with their pairs; NaN, NULL and the like count as"
        " empty, and data.missing=text keeps them as text",
    )
    CLASSES = (
        "data-split",
        "data sets that cannot be learnt from",
        "give posts with text, and labels of both classes, yes and no",
    )

    def __init__(self, shown: ErrorKind, many: str, *remedies: str) -> None:
        self.shown: ErrorKind = shown
        self.many = many
        self.remedies = remedies


def named(value: str) -> str:
    """An id, label or column name for a message; a value that could be prose is shown by its length only.

    Fields shift if a comma is not quoted, so any field can hold the text of a post. Only a single ASCII word of at most
    40 characters is shown, since three characters of Chinese are a sentence. A word that ends in a quote or comma is
    not shown, since a cut text can end so.
    """
    if re.fullmatch(r"""[!-~]{1,40}(?<!["',])|\S?""", value):
        return shown(value)
    return f"a value of {counted(len(value), 'character')}"


def listed(values: list[str], most: int = _LISTED) -> str:
    """The first `most` of `values`, quoted for a message, and the number of the others."""
    return first_of([named(value) for value in values], most)


# --- Ids that a program took for numbers ------------------------------------------------------------------------------

_NUMBER = re.compile(r"\d{1,100}(\.0{1,9})?|\d(\.\d{1,30})?[eE]\+?\d{1,3}")
Rounding = tuple[int, str]
"""The digits of a number that are kept, and the way in which the others are dropped."""
_EXACT: Rounding = (200, ROUND_DOWN)


def is_rounded(key: str) -> bool:
    """Whether `key` looks as if a spreadsheet or pandas had rounded it: `1.23457E+17`, or 12345678901234500."""
    return _rounding(key) is not None


def _rounding(key: str) -> Rounding | None:
    if match := re.fullmatch(r"\d(?:\.(\d{1,30}))?[eE]\+\d{2,3}", key):
        return 1 + len(match[1] or ""), ROUND_HALF_UP
    # A spreadsheet keeps 15 digits of a number, and zeros replace those that follow.
    return (15, ROUND_DOWN) if re.fullmatch(r"[1-9]\d{14}0{2,}", key) else None


def _rounded(key: str, rounding: Rounding) -> Decimal:
    return Context(prec=rounding[0], rounding=rounding[1]).plus(Decimal(key))


class NumberedIds:
    """Finds ids by their numbers: a program that takes ids for numbers drops zeros, adds `.0`, or rounds."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._ids = [key for key in ids if _NUMBER.fullmatch(key)]
        self._indexes: dict[Rounding, dict[Decimal, list[str]]] = {}
        self._damaged: dict[Rounding, dict[Decimal, list[str]]] = {}
        for key in self._ids:
            if rounding := _rounding(key):
                self._damaged.setdefault(rounding, {}).setdefault(_rounded(key, rounding), []).append(key)

    def find(self, key: str) -> list[str]:
        """The ids that are the same number as `key`; else those that round to it, or to which it rounds."""
        if not _NUMBER.fullmatch(key):
            return []
        for rounding in filter(None, (_EXACT, _rounding(key))):
            if found := self._index(rounding).get(_rounded(key, rounding)):
                return found
        return [id_ for rounding, index in self._damaged.items() for id_ in index.get(_rounded(key, rounding), [])]

    def _index(self, rounding: Rounding) -> dict[Decimal, list[str]]:
        if rounding not in self._indexes:
            index = self._indexes[rounding] = {}
            for key in self._ids:
                index.setdefault(_rounded(key, rounding), []).append(key)
        return self._indexes[rounding]


@dataclass
class _Group:
    """Faults of one kind in one file."""

    count: int = 0
    first: list[str] = field(default_factory=list)


class Faults:
    """Collects faults. If one file has many of one kind, the report counts them and shows a few examples."""

    def __init__(self) -> None:
        self._groups: dict[tuple[Kind, str], _Group] = {}

    def add(self, kind: Kind, path: Path, detail: str, place: str = "") -> None:
        """Adds a fault.

        Args:
            kind: Its kind.
            path: The file or folder that has it.
            detail: A description with the value and without text.
            place: The place in the file, such as `line 7`.
        """
        group = self._groups.setdefault((kind, str(path)), _Group())
        group.count += 1
        if len(group.first) < _LISTED:
            group.first.append(f"{place}: {detail}" if place else detail)

    def has(self, *kinds: Kind) -> bool:
        """Whether a fault of one of `kinds` was added."""
        return any(kind in kinds for kind, _ in self._groups)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def raise_any(self, title: str) -> None:
        """Raises: FaultsError with all faults, if a fault was added."""
        if not self._groups:
            return
        lines: list[str] = []
        # We sort by file, in the order in which the files were read, so that a user fixes one file at a time.
        order = list(dict.fromkeys(path for _, path in self._groups))
        for (kind, path), group in sorted(self._groups.items(), key=lambda item: order.index(item[0][1])):
            if group.count > _LISTED:
                lines.append(f"{path}: {group.count:,} {kind.many}, e.g. {'; '.join(group.first[:_EXAMPLES])}")
            else:
                lines.extend(
                    f"{path}, {one}" if re.match(r"(line|entry) ", one) else f"{path}: {one}" for one in group.first
                )
        remedies = dict.fromkeys(remedy for kind, _ in self._groups for remedy in kind.remedies)
        raise FaultsError(
            title, lines, kind=tuple(kind.shown for kind, _ in self._groups), remedies=list(remedies), most=200
        )
