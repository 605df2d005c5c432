"""The lines that a run prints at its start and its end: data, placement, and the places of its results."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from raycv import __version__
from raycv.common.secrets import mask_secrets
from raycv.config.schema import RunConfig
from raycv.data.splits import Split, positives_table
from raycv.data.types import Dataset
from raycv.errors import counted
from raycv.rendering.blocks import estimate, label, shown
from raycv.results.run_folder import RunFolder, infer_command
from raycv.terminal.console import say
from raycv.terminal.summary_table import summary_table

if TYPE_CHECKING:
    from raycv.resources.placement import Placement


def announce_data(console: Console, config: RunConfig, dataset: Dataset, splits: list[Split]) -> None:
    stats = dataset.stats
    say(
        console,
        f"raycv {__version__}: {config.cv.folds} folds of {config.model.name} on {len(dataset.posts):,} posts x "
        f"{len(dataset.criteria)} criteria = {len(dataset.pairs):,} pairs, {stats['positive_rate']:.1%} matched",
    )
    for warning in dataset.warnings:
        say(console, f"Warning: {warning}", "yellow")
    title = "Matched pairs per validation fold and criterion"
    table = Table(box=None)
    rows = positives_table(dataset, splits)
    criteria = list(dataset.criteria)
    for column in ("fold", "pairs", "matched", *criteria):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["fold"]), str(row["pairs"]), str(row["matched"]), *map(str, row["per_criterion"].values())
        )
    if console.measure(table).minimum > console.width:
        say(console, f"{title}: too wide for here, data_stats.json has it")
    else:
        say(console, title)
        console.print(table)


def announce_placement(console: Console, placement: "Placement", dashboard: str | None) -> None:
    gpus = f" and {counted(placement.gpus, 'GPU')}" if placement.gpus else ", no GPU"
    gpus += f", for {placement.workers} workers together" if placement.workers > 1 else ""
    where = f" Ray dashboard while it runs: http://{dashboard}" if dashboard else ""
    at_once = f"Up to {counted(placement.concurrent, 'fold')} at once, each with {counted(placement.cpus, 'CPU core')}"
    say(console, f"{at_once}{gpus}.{where}")


def verdict_lines(evaluation: Mapping[str, Any], folder: RunFolder) -> str:
    """Returns what the statistics say in short: honest F1, best floor, weakest criteria, checks, place of the page."""
    verdict, floors = evaluation["verdict"], evaluation["floors"]
    floor = next(row["metrics"]["f1"] for row in floors["table"] if row["name"] == floors["best"])
    f1_of = {row["criterion"]: row["metrics"]["f1"]["value"] for row in evaluation["criteria"]}
    weakest = ", ".join(f"{name} {shown(f1_of[name], 'threshold')}" for name in verdict["weakest"])
    honest, best = (shown(estimate(f1), "metric") for f1 in (verdict["f1"], floor))
    return (
        f"Honest F1:     {honest}, at thresholds tuned on other folds\n"
        f"Best floor:    {best} ({label(verdict['floor'])})\n"
        f"Weakest F1:    {weakest or 'undefined'}\n"
        f"Checks:        {', '.join(verdict['checks']) or 'none found anything'}\n"
        f"Page:          {folder.page}"
    )


def announce_end(
    console: Console,
    config: RunConfig,
    folder: RunFolder,
    report: dict[str, Any],
    parent_id: str,
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """Prints the table of the folds, what the statistics say (None if they failed), and where everything is."""
    console.print()
    console.print(summary_table(report))
    if evaluation is not None:
        say(console, verdict_lines(evaluation, folder))
    uri = mask_secrets(config.tracking.uri)
    look = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    say(
        console,
        f"Report:        {folder.report}\n"
        f"Best fold:     {folder.fold(report['best_fold']).checkpoint}\n"
        f'Ask it:        {infer_command(folder)} post="..."\n'
        f"MLflow:        {look}   (experiment {config.tracking.experiment}, run {report['run']}, {parent_id})\n"
        "Ray dashboard: ray start --head   keeps a cluster and its dashboard up; the next run joins it",
    )
    activate = Path(sys.executable).parent / "activate"
    if activate.is_file() and Path(shutil.which("python") or "").parent != activate.parent:
        here = activate.relative_to(Path.cwd()) if activate.is_relative_to(Path.cwd()) else activate
        say(console, f"Before you type these, once per shell: source {here}")
