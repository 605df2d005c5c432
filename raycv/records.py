"""The few types that cross a module or process boundary. Plain data, no torch, no Ray, no MLflow."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycv.errors import UserError
from raycv.metrics import METRICS
from raycv.paths import read_json

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


@dataclass(frozen=True)
class FoldResult:
    """A finished fold, as it stands in `result.json`. `fold` counts from 0, epochs from 1."""

    fold: int
    threshold: float
    best_epoch: int
    epochs: int
    metrics: dict[str, float]
    """the five metrics on the validation pairs at `threshold`, after the best epoch"""
    seconds: float
    """wall time of the training loop, model loading included"""
    train_pairs: int
    val_pairs: int
    val_matched: int
    history: list[dict[str, float]]
    """a dict per epoch: epoch, losses, the five metrics, threshold, learning_rate, micro_batch, seconds"""
    events: list[str]
    """what a reader should know: out-of-memory events, early stopping"""
    worker: dict[str, Any]
    """where and how it trained: host, device, precision, parameters"""

    @classmethod
    def read(cls, path: Path) -> "FoldResult":
        """Raises: UserError if the file is missing, damaged, or not a fold's result."""
        values = read_json(path)
        try:
            result = cls(**values)
            missing = [name for name in METRICS if not isinstance(result.metrics[name], int | float)]
            if missing:
                raise TypeError(f"{', '.join(missing)} is no number")
            return result
        except (TypeError, KeyError) as error:
            raise UserError(f"{path} is no fold result of this version of raycv: {error}.") from error
