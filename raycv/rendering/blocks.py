"""The parts of a report (sections of texts, tables, figures), and tables as CSV, LaTeX and Markdown.

No text of a cell can become markup or a formula there.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from raycv.evaluation.floors_and_slices import FLOOR_NAMES

UNDEFINED = "undefined"
NOT_RECORDED = "not recorded"
LABELS = {
    "f1": "F1", "roc_auc": "ROC-AUC", "average_precision": "average precision", "brier": "Brier score", "ece": "ECE",
    "mcc": "MCC", "balanced_accuracy": "balanced accuracy", "fixed": "fixed 0.5", "tuned_in_fold": "tuned in fold",
    "cross_fold": "cross-fold", "cross_fold_epoch": "cross-fold, epoch too", "pooled": "pooled (to deploy)",
} | FLOOR_NAMES  # fmt: skip
"""Names for people of what the evaluation names for programs."""


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
} | {character: "\\" + character for character in "&%$#_{}"}  # fmt: skip
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")


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


def for_latex(text: str) -> str:
    """Returns a text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


def for_markdown(text: str) -> str:
    """Returns a text that Markdown shows as it is, in a table cell too."""
    escaped = _MARKDOWN.sub(_escape, _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    # "1. " makes a list, and GitHub makes links of bare addresses.
    escaped = re.sub(r"^(\d+)([.)])(?= |$)", r"\1\\\2", escaped)
    return re.sub(r"(?i)\b(https?|ftp)://|\b(www)\.", _unlinked, escaped)


def _unlinked(found: re.Match[str]) -> str:
    return f"{found[1]}&#58;//" if found[1] else f"{found[2]}&#46;"


def _escape(found: re.Match[str]) -> str:
    before = found.string[: found.start()]
    after = found.string[found.end() :]
    # `-` and `+` make a list only at the start of a line, before a space; a bar of dashes would be a heading.
    if found[0] in "-+" and (before or after[:1].isdigit()):
        return found[0]
    # Brackets are links only together with square brackets, which are escaped.
    return found[0] if found[0] in "()" else "\\" + found[0]


def for_spreadsheet(text: str) -> str:
    """Returns a text that no spreadsheet runs as a formula. A number stays as it is."""
    if _NUMBER.fullmatch(text):
        return text
    # A spreadsheet skips spaces before a formula.
    runs = text.lstrip(" \t\r\n").startswith(("=", "+", "-", "@")) or text.startswith(("\t", "\r", "\n"))
    return "'" + text if runs else text


def csv_of(table: Table) -> str:
    """Returns all rows as CSV. An interval takes two more columns, and an undefined value leaves its cell empty."""
    wide = [any(isinstance(row[at], Estimate) for row in table.rows) for at in range(len(table.columns))]
    names = []
    for column, three in zip(table.columns, wide, strict=True):
        names += [column.key, f"{column.key}_low", f"{column.key}_high"] if three else [column.key]
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow([for_spreadsheet(name) for name in names])
    for row in table.rows:
        cells: list[object] = []
        for cell, three in zip(row, wide, strict=True):
            if isinstance(cell, Estimate):
                cells += [cell.value, cell.low, cell.high]
            else:
                cells += [for_spreadsheet(cell) if isinstance(cell, str) else cell, *([None, None] if three else [])]
        writer.writerow(cells)
    return output.getvalue()


def latex_of(table: Table) -> str:
    r"""Returns the rows that the page shows as a `tabular`, which needs `\usepackage{booktabs}`."""
    form = "".join("l" if column.kind == "text" else "r" for column in table.columns)
    head = " & ".join(for_latex(column.label) for column in table.columns)
    rows = [" & ".join(for_latex(cell) for cell in cells) for cells in _shown_cells(table)]
    body = "".join(f"{row} \\\\\n" for row in rows)
    return (
        f"% {for_latex(table.title)}. Needs \\usepackage{{booktabs}}.\n"
        f"\\begin{{tabular}}{{{form}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"
    )


def markdown_of(table: Table) -> str:
    """Returns the rows that the page shows as a table of Markdown."""
    lines = [
        [for_markdown(column.label) for column in table.columns],
        ["---" if column.kind == "text" else "---:" for column in table.columns],
        *([for_markdown(cell) for cell in cells] for cells in _shown_cells(table)),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def code_block(text: str) -> str:
    """Returns lines of a command as a code block of Markdown, which its content cannot close."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _shown_cells(table: Table) -> list[list[str]]:
    kinds = [column.kind for column in table.columns]
    return [[shown(cell, kind) for cell, kind in zip(row, kinds, strict=True)] for _, row in table.shown]


def _one_line(text: str) -> str:
    return " ".join(text.split())
