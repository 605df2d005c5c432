"""Synthetic (post, criterion, label) data in the specification's schema: nobody wrote these posts, nobody is in them.

A post is a shuffled row of sentences: evidence for its positive criteria, hard negatives about criteria that it does
not meet (negated, about somebody else, or past), and neutral filler. Every sentence is drawn from the phrase book at
the end of this module. Phrasings marked "~" are held out: the tiny base in `models/tiny_llama` never saw them in its
pre-training, so that a data set made here asks for more than recall.

Counts, skew and lengths follow the published figures of ReDSM5 (1484 posts x 9 criteria, arXiv 2508.03399); its text
was neither read nor paraphrased. The same arguments give the same bytes on every platform: the only source of chance
is `random.Random`, and lines end in "\\n".
"""

import csv
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

from raycv.errors import UserError
from raycv.records import Criterion

# Own paraphrases, not the DSM-5 wording, and without its duration clauses: one sentence counts as evidence.
CRITERIA = (
    Criterion("A.1", "Mood is low: feels sad, empty, tearful or without hope", "DEPRESSED_MOOD"),
    Criterion("A.2", "No longer enjoys or cares about things that used to matter", "ANHEDONIA"),
    Criterion("A.3", "Eats much less or much more than usual, or weight shifts without trying", "APPETITE_CHANGE"),
    Criterion("A.4", "Sleeps badly, or sleeps far too much", "SLEEP_ISSUES"),
    Criterion("A.5", "Body slowed down, or too restless to keep still", "PSYCHOMOTOR"),
    Criterion("A.6", "Worn out, with little strength left for ordinary things", "FATIGUE"),
    Criterion("A.7", "Thinks badly of oneself: useless, a burden or always at fault", "WORTHLESSNESS"),
    Criterion("A.8", "Finds it hard to focus, to think clearly or to make up one's mind", "COGNITIVE_ISSUES"),
    Criterion("A.9", "Thinks about being dead or wishes not to be alive", "SUICIDAL_THOUGHTS"),
)
# Published counts of ReDSM5, scaled to the number of posts asked for.
REDSM5_POSTS = 1484
REDSM5_POSITIVES = (328, 124, 44, 102, 35, 124, 311, 59, 165)
REDSM5_POSTS_WITHOUT = 392

HARD_NEGATIVE_KINDS = ("negated", "third_person", "past")
SENTENCE_KINDS = ("evidence", *HARD_NEGATIVE_KINDS, "neutral")
SYNTHETIC_MARK = "SYNTHETIC DATA"
MOST_SYMPTOMS = 4  # per post; more than four at once is rare in posts of this length


@dataclass(frozen=True, slots=True)
class LengthProfile:
    """Words per post: log-normal, clipped. `sigma` is the standard deviation of the logarithm."""

    words_mean: float
    sigma: float
    words_min: int
    words_max: int
    stub_rate: float
    """Share of posts that are only a title or a greeting (2 to 4 words)."""
    paragraph: int
    """Sentences per paragraph; 0 for a post of one paragraph."""

    @property
    def mu(self) -> float:
        """Mean of the logarithm, so that the mean of the words themselves is `words_mean`."""
        return NormalDist(0, self.sigma).inv_cdf(0.5) + _log(self.words_mean) - self.sigma**2 / 2


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence. `kind` is one of SENTENCE_KINDS; `symptom` is None for a neutral one."""

    text: str
    kind: str
    symptom: str | None = None
    held_out: bool = False
