"""Criterion, Pair and Dataset: the validated data set that every later room works on."""

from dataclasses import dataclass, field
from typing import Any

LABELS = ("unmatched", "matched")
"""Class names by label id, as in the groundtruth: 0 no, 1 yes."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """One criterion of the classification grid, its wording being model input."""

    criterion_id: str
    text: str
    symptom: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """One (post, criterion) pair. `label`: 1 matched, 0 unmatched."""

    post_id: str
    criterion_id: str
    label: int
    n_evidence: int = 0
    """Sentences annotated as evidence (official release only)."""
    explicit_negative: bool = False
    """An annotator looked at a sentence for this criterion and said no (official release only): a hard negative."""


@dataclass(frozen=True)
class Dataset:
    """A validated data set. `pairs` are sorted by (post_id, criterion_id) as strings, on which the folds depend."""

    posts: dict[str, str]
    criteria: dict[str, Criterion]
    pairs: list[Pair]
    stats: dict[str, Any] = field(default_factory=dict)
    """What goes to `data_stats.json` and MLflow: counts, positives, drops, hashes; never text."""
    warnings: list[str] = field(default_factory=list)
