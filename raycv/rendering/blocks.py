"""The parts of a report, which the page and its Markdown render alike: sections of texts, tables and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from raycv.evaluation.context import FLOOR_NAMES

UNDEFINED = "undefined"
NOT_RECORDED = "not recorded"
LABELS = {
    "f1": "F1", "roc_auc": "ROC-AUC", "average_precision": "average precision", "brier": "Brier score", "ece": "ECE",
    "mcc": "MCC", "balanced_accuracy": "balanced accuracy", "fixed": "fixed 0.5", "tuned_in_fold": "tuned in fold",
    "cross_fold": "cross-fold", "cross_fold_epoch": "cross-fold, epoch too", "pooled": "pooled (to deploy)",
} | FLOOR_NAMES  # fmt: skip
"""Names for people of what the evaluation names for programs."""


@dataclass(frozen=True)
class Estimate:
    """A number with an interval."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    key: str
    """its name in the CSV file"""
    label: str
    kind: str = "text"
    """text, count, metric, difference, threshold or share"""


@dataclass(frozen=True)
class Table:
    """A table, shown in the page, and a file each as CSV and LaTeX."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    """cells: a text, a number, an Estimate, or None where undefined"""
    faint: frozenset[int] = frozenset()
    """the rows that rest on few matched pairs"""
    sortable: bool = False
    every: int = 1
    """The page shows every so many rows, and the files show all."""
    kind: ClassVar[str] = "table"

    @property
    def shown(self) -> list[tuple[int, Sequence[Any]]]:
        """The rows that the page shows, with their positions."""
        return [(at, row) for at, row in enumerate(self.rows) if at % self.every == 0 or at == len(self.rows) - 1]


@dataclass(frozen=True)
class Figure:
    """A figure with its finding in one sentence, and the table of its numbers."""

    name: str
    title: str
    finding: str
    svg: str
    table: Table
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Terms:
    """Terms with their explanations."""

    terms: Sequence[tuple[str, Sequence[str]]]
    kind: ClassVar[str] = "terms"


@dataclass(frozen=True)
class Code:
    """Commands, a line each."""

    text: str
    kind: ClassVar[str] = "code"


Block = Table | Figure | Text | Terms | Code


@dataclass(frozen=True)
class Section:
    """A section: the question that it answers, and its blocks."""

    name: str
    title: str
    question: str
    blocks: list[Block] = field(default_factory=list)

    def tables(self) -> list[Table]:
        """Returns its tables, those behind figures too."""
        found = [block.table if isinstance(block, Figure) else block for block in self.blocks]
        return [block for block in found if isinstance(block, Table)]


def label(name: str) -> str:
    """Returns the name for people of a metric, an operating point or a floor."""
    return LABELS.get(name, name.replace("_", " "))


def estimate(number: Mapping[str, Any] | None, *intervals: str) -> Estimate | None:
    """Returns a number with the first of `intervals` that it has; by default that of the threshold chosen again."""
    if number is None or number["value"] is None:
        return None
    for name in intervals or ("reselected", "fixed"):
        if number.get(name):
            return Estimate(number["value"], number[name]["low"], number[name]["high"])
    return Estimate(number["value"], None, None)


def shown(value: Any, kind: str = "text") -> str:
    """Returns a cell as people read it, without markup."""
    if isinstance(value, Estimate):
        if value.value is None:
            return UNDEFINED
        if value.low is None or value.high is None:
            return shown(value.value, kind)
        return f"{shown(value.value, kind)} ({shown(value.low, kind)} to {shown(value.high, kind)})"
    if value is None:
        return UNDEFINED
    if isinstance(value, str):
        return value
    forms = {"count": ",", "metric": ".3f", "difference": "+.3f", "threshold": ".2f", "share": ".1%"}
    return format(value, forms[kind]) if kind in forms else str(value)
