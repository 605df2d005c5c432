"""Decides what a synthetic post says: evidence, hard negatives and filler, from the phrase book `phrases.txt`."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, product
from pathlib import Path

from raycv.data.types import SYMPTOMS

PHRASES = Path(__file__).with_name("phrases.txt")
"""The phrase book, with one phrasing per line.

`{a|b}` is a choice, and `{who}` and `{over}` are slots. A line that begins with `~` is held out from pre-training. The
phrasings are mild on purpose: no methods, no graphic detail.
"""


EVIDENCE = "evidence"
NEUTRAL = "neutral"
HARD_NEGATIVE_KINDS = ("negated", "third_person", "past")


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence. `kind` is EVIDENCE, NEUTRAL or one of HARD_NEGATIVE_KINDS; a neutral one has no symptom."""

    text: str
    kind: str
    symptom: str | None = None
    held_out: bool = False


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


# --- clauses ---------------------------------------------------------------------------------------------------

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


# --- posts ---


def compose(rng: random.Random, present: Sequence[str], words: int, *, held_out_rate: float) -> list[Sentence]:
    """Makes the sentences of one post, shuffled, so that evidence can be anywhere.

    The evidence is always complete, so a post can be longer than `words`. Hard negatives and filler use the words that
    remain.

    Args:
        rng: The source of chance.
        present: The symptoms for which the post is positive.
        words: The number of words to aim at.
        held_out_rate: The chance of a phrasing that pre-training leaves out; 0 for the pre-training corpus.
    """

    def labelled(kind: str, symptom: str) -> Sentence:
        held_out = rng.random() < held_out_rate
        phrasings = phrase_book()[symptom, kind]
        template = rng.choice(phrasings.held_out if held_out else phrasings.seen)
        return Sentence(dress(spell(template, rng), kind, rng), kind, symptom, held_out)

    sentences = [labelled(EVIDENCE, symptom) for symptom in present for _ in range(1 + (rng.random() < 0.25))]
    absent = [symptom for symptom in SYMPTOMS if symptom not in present]
    rng.shuffle(absent)
    count = sum(_words(sentence.text) for sentence in sentences)
    for symptom in absent[: 1 + rng.randrange(2) + words // 150]:
        if sentences and count + 8 > words:
            break
        sentences.append(labelled(rng.choice(HARD_NEGATIVE_KINDS), symptom))
        count += _words(sentences[-1].text)
    templates = list(phrase_book()["FILLER", NEUTRAL].seen)
    rng.shuffle(templates)
    for template in cycle(templates):
        if count + 5 > words:  # 5 words are half a filler sentence, so posts meet their target on average.
            break
        sentences.append(Sentence(capitalise(spell(template, rng)), NEUTRAL))
        count += _words(sentences[-1].text)
    rng.shuffle(sentences)
    return sentences


def _words(text: str) -> int:
    return len(text.split())


def paragraphs(sentences: Sequence[Sentence], per_paragraph: int) -> str:
    """The sentences as text, a blank line after every `per_paragraph` of them."""
    texts = [sentence.text for sentence in sentences]
    starts = range(0, len(texts), per_paragraph)
    return "\n\n".join(" ".join(texts[start : start + per_paragraph]) for start in starts)
