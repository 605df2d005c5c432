"""Finds the columns whose names are near misses of known ones: `criteria` or `Criterion ID` for `criterion_id`."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from raycv.common.table_reader import folded
from raycv.errors import shown
from raycv.row_faults import named

_PLURALS = {"criterion": "criteria"}
"""Plurals that do not end in -s."""
_COMPOUNDS = {
    "criterion": {"text", "words", "wording", "description", "name", "code"},
    "post": {"text", "body"},
    "symptom": {"name"},
}
"""Words that can follow the name of a column without a change of its meaning."""
LONGEST = 40
"""Characters of a near miss at most. Its letters are nearly those of a known name, so a message may show it."""


def misspelt(groups: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    """Guesses the names that missing columns have in a file, for a message.

    Args:
        groups: The required columns, alternative names together.
        columns: The columns of the file as it spells them.
    """
    spellings = dict(zip(folded(columns), columns, strict=True))
    free = [name for name in spellings if not any(name in names for names in groups)]
    hints = []
    for names in groups:
        near = [(name, found) for name in names for found in difflib.get_close_matches(name, free, n=1)]
        if near and not set(names) & set(spellings):
            name, found = near[0]
            # Callers end the sentence, so this must not be a question.
            hints.append(f"; perhaps {named(spellings[found].strip())} is the {name}")
    return "".join(hints)


@dataclass(frozen=True)
class NearMiss:
    """A column that is not read, with the known column that its author most likely meant."""

    column: str
    shown: str
    """Its name for a message."""
    meant: str
    beside: str | None
    """The column that is read instead, if the file has one."""


def near_misses(
    columns: Sequence[str], groups: Sequence[Sequence[str]], synonyms: Mapping[str, str] | None = None
) -> list[NearMiss]:
    """Finds the columns whose names are near misses of known ones.

    Args:
        columns: The columns of a file as it spells them.
        groups: The known columns, alternative names together.
        synonyms: Further names of some known columns: the synonym -> the known name.
    """
    synonyms, found, names_read = synonyms or {}, [], folded(columns)
    for column, name in zip(columns, names_read, strict=True):
        if any(name in group for group in groups) or len(name) > LONGEST:
            continue
        for group in groups:
            names = (*group, *(other for other, known in synonyms.items() if known in group))
            if near := nearest(column, names):
                beside = next((name for name in group if name in names_read), None)
                found.append(NearMiss(column, shown(column.strip()), synonyms.get(near, near), beside))
                break
    return found


@lru_cache(maxsize=4096)
def nearest(column: str, known: tuple[str, ...]) -> str | None:
    """The name in `known` that `column` misspells, if any: `criteria` and `Criterion ID` misspell known names.

    raycv refuses a near miss, so this is stricter than a hint. It does not take `criteria_version`, `poster_id` and
    `label_2` for misspellings.
    """
    near = [name for name in known if _is_near(column, name)]
    return max(near, key=lambda name: difflib.SequenceMatcher(None, column, name).ratio(), default=None)


def _is_near(column: str, known: str) -> bool:
    words, wanted = words_of(column), words_of(known)
    if "".join(words) in map("".join, product(*map(_forms, wanted))):
        return True
    if len(words) == len(wanted) + 1 and words[-1] in _COMPOUNDS.get(known, ()):
        words = words[:-1]
    return len(words) == len(wanted) and all(map(is_near_word, words, wanted))


def words_of(name: str) -> list[str]:
    """The words of a column: `criterion`, `Text` and `2` of `criterionText_2`.

    We count a number as a word, since criterion_2 is not the column criterion.
    """
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return re.findall(r"[^\W\d_]+|\d+", apart.casefold())


def is_near_word(word: str, known: str) -> bool:
    """Whether a word of a column misspells a word of a known one."""
    if len(known) < len("label"):
        # Many short words differ by one letter (cost, host and past from post), so we take only a plural or swapped
        # letters.
        return word in _forms(known) or (word[0] == known[0] and sorted(word) == sorted(known))
    return bool(difflib.get_close_matches(word, _forms(known), n=1, cutoff=0.8))


def _forms(word: str) -> tuple[str, ...]:
    return word, f"{word}s", _PLURALS.get(word, word)
