"""Criterion, Pair and Dataset: the validated data set. Which spellings and symptom names mean a criterion."""

import re
from dataclasses import dataclass, field
from typing import Any

LABELS = ("unmatched", "matched")
"""Class names by label id, as in the groundtruth: 0 no, 1 yes."""
SYMPTOMS = {
    "DEPRESSED_MOOD": "A.1",
    "ANHEDONIA": "A.2",
    "APPETITE_CHANGE": "A.3",
    "SLEEP_ISSUES": "A.4",
    "PSYCHOMOTOR": "A.5",
    "FATIGUE": "A.6",
    "WORTHLESSNESS": "A.7",
    "COGNITIVE_ISSUES": "A.8",
    "SUICIDAL_THOUGHTS": "A.9",
}
"""ReDSM5's symptom names -> the DSM-5 criteria that they stand for."""
ALIASES = {"LEEP_ISSUES": "SLEEP_ISSUES"}
"""Typing errors of the release -> the right names."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """One criterion of the classification grid. Its wording is model input."""

    criterion_id: str
    text: str
    symptom: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """One (post, criterion) pair. `label` is 1 for matched and 0 for unmatched."""

    post_id: str
    criterion_id: str
    label: int
    n_evidence: int = 0
    """Sentences annotated as evidence (official release only)."""
    explicit_negative: bool = False
    """A hard negative: an annotator examined a sentence and found no evidence (official release only)."""


@dataclass(frozen=True)
class Dataset:
    """A validated data set. `pairs` are sorted by (post_id, criterion_id) as strings; folds depend on it."""

    posts: dict[str, str]
    criteria: dict[str, Criterion]
    pairs: list[Pair]
    stats: dict[str, Any] = field(default_factory=dict)
    """The content of `data_stats.json`, also sent to MLflow: counts, positives, drops and hashes, but never text."""
    warnings: list[str] = field(default_factory=list)


def criterion_code(name: str) -> str | None:
    """`A.1` to `A.9` for another spelling (`A1`, `a.1`) or a symptom name of ReDSM5; None for any other id."""
    return _numbered(name) or SYMPTOMS.get(ALIASES.get(symptom_name(name), symptom_name(name)))


def _numbered(name: str) -> str | None:
    match = re.fullmatch(r"A[._]?([1-9])", symptom_name(name))
    return f"A.{match[1]}" if match else None


def is_same(asked: str, known: str) -> bool:
    """Whether `asked` means the id or name `known`: `A1` means `A.1`, and `sleep issues` means `SLEEP_ISSUES`.

    A symptom name does not mean an id: other criteria may have the id `A.1` too.
    """
    code = criterion_code(asked)
    return code is not None and code == criterion_code(known) and bool(_numbered(asked) or not _numbered(known))


def symptom_name(name: str) -> str:
    """`name` as the release spells symptoms: `SLEEP_ISSUES` for `sleep issues`."""
    return re.sub(r"[\s-]+", "_", name.strip().upper())
