"""Prints the tables of `raycv.compare` and `raycv.mistakes` in the terminal, with their number formats."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from raycv.errors import counted, printable
from raycv.evaluation.comparison import COMPARED
from raycv.evaluation.measures import NAMES


def comparison_tables(result: Mapping[str, Any]) -> Group:
    """A table of metrics for each run of a comparison, in the shape that `raycv.evaluation.comparison` describes."""
    values = {run["run"]: run["pooled"] for run in result["runs"]}
    tables = [_table(row, values, result) for row in result["comparisons"]]
    same = result["same"]
    title = (
        f"{same['pairs']:,} pairs of {same['posts']:,} posts in {same['folds']} folds: posts, labels and folds agree"
    )
    return Group(Text(title, "bold"), *tables)


def _table(row: Mapping[str, Any], values: Mapping[str, Any], result: Mapping[str, Any]) -> Group:
    run, baseline, metric = row["run"], row["baseline"], result["metric"]
    df = result["same"]["folds"] - 1
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in ("metric", "baseline", "run", "diff.", "post bootstrap", "corrected t"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for name in COMPARED:
        found = row["pooled"][name]
        weak = row["fold_mean"][name]["corrected_t"]
        cells = [_said(values[each][name]["value"]) for each in (baseline, run)]
        style = "bold" if name == metric else None
        ends = found.get("reselected") or found["fixed"]
        table.add_row(NAMES[name], *cells, _signed(found["value"]), _between(ends), _between(weak), style=style)
    lines = [_plain(row["sentence"], "bold"), *(_plain(line, "dim") for line in _lines(row, metric, result))]
    # Names go into plain lines: they may be long, and rich would read markup into the cells of a table.
    title = _plain(f"Run {run}, baseline {baseline}")
    note = Text(f"95 % intervals; corrected t: {df + 1} folds, df {df}, weak", "dim")
    return Group(Text(), title, table, note, *lines)


def _lines(row: Mapping[str, Any], metric: str, result: Mapping[str, Any]) -> list[str]:
    flipped, criteria = row["flipped"], row["criteria"]
    right = sum(flipped[name]["only_run"] for name in ("matched", "unmatched"))
    wrong = sum(flipped[name]["only_baseline"] for name in ("matched", "unmatched"))
    shown = [one["criterion"] for one in criteria if one["p_holm"] is not None and one["p_holm"] <= 0.05]
    untested = [one["criterion"] for one in criteria if one["p"] is None]
    runs = counted(len(result["comparisons"]), "run")
    lines = [
        f"p {_said(row['p'])}, after Holm over {runs} {_said(row['p_holm'])}.",
        f"Smallest difference in {NAMES[metric]} that these data could show: {_said(row['detectable'])}.",
        f"Criteria with a difference after Holm over {_tests(result)} tests: {', '.join(shown) or 'none'}."
        + (f" Not testable, and counted: {', '.join(untested)}." if untested else ""),
        f"Flipped labels: {flipped['pairs']:,} of {flipped['of']:,} pairs, {right:,} to right and {wrong:,} to wrong.",
    ]
    if row is result["comparisons"][-1]:
        lines.append(f"Runs whose difference to the best ({result['best']}) is not shown: {_tied(result)}.")
    return lines


def _tests(result: Mapping[str, Any]) -> int:
    return sum(len(row["criteria"]) for row in result["comparisons"])


def _tied(result: Mapping[str, Any]) -> str:
    return ", ".join(run for run in result["tied"] if run != result["best"]) or "none"


def mistakes_table(run: str, counts: Sequence[Mapping[str, Any]]) -> Group:
    """How many pairs of each criterion get the wrong label."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("criterion", "pairs", "mistakes", "false positives", "false negatives"):
        table.add_column(name, justify="left" if name == "criterion" else "right", no_wrap=True)
    for row in counts:
        table.add_row(_plain(row["criterion_id"]), *(f"{row[name]:,}" for name in list(row)[1:]))
    return Group(_plain(f"{run}: mistakes at thresholds tuned on other folds", "bold"), table)


def _plain(text: str, style: str = "") -> Text:
    """A line without markup. Codes replace control characters, which ids and names of folders may hold."""
    return Text(printable(text), style)


def _said(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.3f}"


def _between(ends: Mapping[str, Any]) -> str:
    return "undefined" if ends["low"] is None else f"{ends['low']:+.3f} to {ends['high']:+.3f}"
