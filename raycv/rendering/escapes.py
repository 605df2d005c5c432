"""Writes tables as CSV, LaTeX and Markdown. No text of a cell can become markup or a formula there."""

import csv
import io
import re

from raycv.rendering.blocks import Estimate, Table, shown

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
} | {character: "\\" + character for character in "&%$#_{}"}  # fmt: skip
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")


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
