"""Expands the phrase book `phrases.txt` into sentences for synthetic posts."""

import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

PHRASES = Path(__file__).with_name("phrases.txt")
"""The phrase book, with one phrasing per line.

`{a|b}` is a choice, and `{who}` and `{over}` are slots. A line that begins with `~` is held out from pre-training. The
phrasings are mild on purpose: no methods, no graphic detail.
"""


@dataclass(frozen=True, slots=True)
class Phrasings:
    """Templates of one (symptom, kind): those that the tiny base saw in pre-training, and those that it did not see."""

    seen: tuple[str, ...]
    held_out: tuple[str, ...]


@cache
def phrase_book() -> dict[tuple[str, str], Phrasings]:
    """(symptom, kind) -> phrasings, read from `phrases.txt`. Neutral ones have FILLER or STUB as symptom."""
    book: dict[tuple[str, str], Phrasings] = {}
    for section in re.split(r"^\[", PHRASES.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, *lines = [line for line in section.splitlines() if line]
        symptom, kind = title.rstrip("]").split()
        seen = tuple(line for line in lines if not line.startswith("~"))
        book[symptom, kind] = Phrasings(seen, tuple(line[2:] for line in lines if line.startswith("~")))
    return book


# --- sentences ---------------------------------------------------------------------------------------------------

_ALTERNATIVES = re.compile(r"\{([^{}]*)\}")
_SLOTS = {
    "who": ("my brother", "my sister", "my best friend", "my dad", "my roommate", "a girl at work", "my cousin"),
    "over": ("but that is over", "but it passed", "and that is long behind me", "now it is different"),
}
# Evidence and hard negatives both get time phrases, so that these do not reveal the label.
_OPENERS_NOW = ("lately", "these days", "this month", "since the move", "since the summer", "right now", "this week")
_OPENERS_ANY = ("honestly,", "to be fair,", "for what it is worth,", "so", "well,", "I should say that")
_ENDERS_NOW = ("these days", "at the moment", "this week", "right now", "as of late", "so far this year")


def spell(template: str, rng: random.Random) -> str:
    """`template` with a random alternative for each `{a|b|c}` or `{slot}`."""
    return _ALTERNATIVES.sub(lambda match: rng.choice(_options(match[1])), template)


def expansions(template: str) -> set[str]:
    """Every text that `template` can spell."""
    parts = _ALTERNATIVES.split(template)  # Literals have even indices, and alternatives odd ones.
    choices = [_options(part) if i % 2 else (part,) for i, part in enumerate(parts)]
    return {"".join(choice) for choice in product(*choices)}


def _options(alternatives: str) -> tuple[str, ...]:
    return tuple(alternatives.split("|")) if "|" in alternatives else _SLOTS[alternatives]


def dress(clause: str, kind: str, rng: random.Random) -> str:
    """`clause` as a sentence, by chance with a time phrase or an opener.

    A clause about the past names its own time, so it gets no time phrase.
    """
    draw = rng.random()
    if draw < 0.35 and kind != "past":
        clause = f"{rng.choice(_OPENERS_NOW)} {clause}"
    elif draw < 0.5:
        clause = f"{rng.choice(_OPENERS_ANY)} {clause}"
    elif draw < 0.65 and kind != "past":
        clause = f"{clause} {rng.choice(_ENDERS_NOW)}"
    return capitalise(clause)


def capitalise(clause: str) -> str:
    return clause[0].upper() + clause[1:] + ("" if clause[-1] in ".?!" else ".")
