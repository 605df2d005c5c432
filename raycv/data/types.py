"""Criterion, Pair and Dataset: the validated data set that every later room works on."""

from dataclasses import dataclass, field
from typing import Any

LABELS = ("unmatched", "matched")
"""Class names by label id, as in the groundtruth: 0 no, 1 yes."""


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
