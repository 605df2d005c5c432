"""Which columns of a file of pairs are read, and which look as if they should be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from raycv.common.column_names import LONGEST, NearMiss, is_near_word, misspelt, near_misses, words_of
from raycv.common.table_reader import folded, repeated, separator_of
from raycv.errors import FaultsError, UserError, shown
from raycv.row_faults import listed, named

POST_COLUMNS = ("post", "text")
CRITERION_COLUMNS = ("criterion", "criterion_id")
ID_COLUMNS = ("post_id", "id")
"""Columns that are copied to the scores, so that each score can be matched with its post."""
KNOWN_COLUMNS = (POST_COLUMNS, CRITERION_COLUMNS, ID_COLUMNS)
COLUMNS_REMEDY = (
    "name the columns in the first line: post (or text); if you like, criterion (words) or criterion_id (A.4), post_id"
)
_SYNONYMS = {"symptom": "criterion", "dsm5_symptom": "criterion"}
"""Names that other tables give a criterion. If we ignored one, each post would be asked for every criterion."""


@dataclass(frozen=True)
class Layout:
    """The roles of a file's columns."""

    post: str
    criterion: str | None
    ids: tuple[str, ...]
    others: tuple[str, ...] = ()
    """columns that are not read"""
    notices: tuple[str, ...] = ()
    """warnings about unread columns that look like one that is read"""

    @property
    def wanted(self) -> list[str]:
        return [self.post, *([self.criterion] if self.criterion else []), *self.ids]


def find_layout(path: Path, spelt: Sequence[str], header: str, *, asked: bool = False) -> Layout:
    """Which columns are read.

    Args:
        path: The file.
        spelt: Its columns as it spells them.
        header: The place of these names, for messages.
        asked: Whether one criterion is given for all rows.

    Raises:
        UserError: The file has no column of posts, more than one, or a misspelt one.
    """
    columns = folded(spelt)
    if twice := repeated_known(columns):
        remedies = ["keep one column of each name"]
        raise UserError(
            f"{path}: the column {twice} occurs {columns.count(twice)} times.", kind="input-file", remedies=remedies
        )
    posts = [name for name in POST_COLUMNS if name in columns]
    criteria = [name for name in CRITERION_COLUMNS if name in columns]
    for found in (posts, criteria):
        if len(found) > 1:
            what = f"{path} has both {' and '.join(found)}: it is not clear which is asked."
            raise UserError(what, kind="input-file", remedies=["keep the one that is meant, or rename the other"])
    if not posts:
        have = f"its columns are {listed([name.strip() for name in spelt])}" if columns else "it is empty"
        if separator := separator_of(columns):
            have += f", separated by {separator} and not by commas"
        have += misspelt([POST_COLUMNS], spelt)
        remedy = "save it with commas" if separator else COLUMNS_REMEDY
        if separator and "sep=" in separator:
            remedy += ", without the line `sep=`"
        raise UserError(f"{path} has no column post or text: {have}.", kind="input-file", remedies=[remedy])
    near = unread_columns(spelt, every=not (criteria or asked))
    _refuse_near(path, [miss for miss in near if miss.beside is None], header)
    layout = Layout(posts[0], criteria[0] if criteria else None, tuple(name for name in ID_COLUMNS if name in columns))
    notices = tuple(f"the column {miss.shown} is not read, since {miss.beside} is" for miss in near)
    return replace(
        layout,
        others=tuple(name.strip() for name, read in zip(spelt, columns, strict=True) if read not in layout.wanted),
        notices=notices,
    )


def unread_columns(spelt: Sequence[str], *, every: bool) -> list[NearMiss]:
    """The columns that are not read and most likely should be.

    `every`: each post is asked for every criterion, so a column that may name one counts too.
    """
    near = near_misses(spelt, KNOWN_COLUMNS, _SYNONYMS)
    found = {miss.column for miss in near}
    return [*near, *(miss for miss in _criterion_columns(spelt) if every and miss.column not in found)]


def _refuse_near(path: Path, near: Sequence[NearMiss], header: str) -> None:
    """Raises: FaultsError if a column is probably misspelt: each post would be asked for every criterion."""
    if not near:
        return
    faults = [f"{header}: the column {miss.shown} is not read; did you mean {miss.meant}?" for miss in near]
    remedies = [
        *(f"rename {miss.shown} to {miss.meant}" for miss in near),
        f"to leave it unread, give it a name that is not nearly a known one (x_{near[0].meant}), or remove it",
    ]
    raise FaultsError(f"input={path} cannot be used", faults, kind="input-file", remedies=remedies)


def repeated_known(names: Sequence[str]) -> str | None:
    """A column that has a meaning and stands among `names`, in small letters, more than once."""
    return next((name for name in repeated(names) if any(name in group for group in KNOWN_COLUMNS)), None)


# --- Columns that may name a criterion -------------------------------------------------------------------------------

_CRITERION_WORDS = ("criterion", "criterium", "symptom", "crit", "kriterien")
_KEY_WORDS = {"id", "ids", "key", "number", "num", "no", "nr"}
_COUNTS = {"n", "num", "number", "no", "nr", "has", "is", "any"}
"""First words of a column that counts criteria, or tells whether there are any."""
_FACTS = {
    "n", "count", "total", "sum", "mean", "version", "date", "time", "timestamp", "year", "source", "url", "link",
    "file", "path", "hash", "length", "len", "size", "char", "token", "score", "prob", "probability", "threshold",
    "severity", "weight", "rank", "duration", "onset", "met", "present", "match", "matched", "status", "flag",
    "language", "lang", "set", "group", "category", "type", "author", "annotator", "rater", "annotation", "comment",
    "note", "evidence", "rationale", "explanation", "reason", "confidence", "agreement",
}  # fmt: skip
"""Words of a column that tells something of a criterion, or of how it was judged, and not which it is."""


def _criterion_columns(columns: Sequence[str]) -> list[NearMiss]:
    """Finds the columns that by one of their words may say which criterion a row is about: `symptom_id`.

    This is wider than `near_misses`, for files without a criterion column.

    Args:
        columns: The columns of a file as it spells them.
    """
    return [
        NearMiss(column, _named_column(column.strip(), number), _asked_column(column), None)
        for number, column in enumerate(columns, 1)
        if _names_criterion(column)
    ]


def _asked_column(column: str) -> str:
    return "criterion_id" if _KEY_WORDS.intersection(words_of(column)) else "criterion"


def _named_column(column: str, number: int) -> str:
    """`column` for a message. Its other words can be anything, so prose is shown by its place and length only."""
    return named(column) if named(column) == shown(column) else f"number {number} ({named(column)})"


@lru_cache(maxsize=4096)
def _names_criterion(column: str) -> bool:
    words = words_of(column)
    if not words or len(column) > LONGEST or words[0] in {"x", *_COUNTS}:
        return False
    if any(word.removesuffix("s") in _FACTS for word in words):
        return False
    near = [any(is_near_word(word, known) for known in _CRITERION_WORDS) for word in words]
    # criterion_2 is one column of several, and criterion_dsm5 is not.
    is_numbered = words[-1].isdigit() and near[-2:-1] == [True]
    return any(near) and not is_numbered
