"""The description of a parent run in the MLflow page: the verdict, the folds that collapsed, and a table of all."""

from collections.abc import Mapping
from typing import Any

from mlflow.entities import Run

from raycv.common.locations import TRAINING_VIEW
from raycv.rendering.blocks import for_markdown
from raycv.training.metrics import METRICS, collapsed_because


def collapsed(report: Mapping[str, Any]) -> list[tuple[int, list[str]]]:
    """The folds that have collapsed, with the reasons."""
    return [(fold["fold"], fold["collapsed"]) for fold in report["folds"] if fold["collapsed"]]


def _verdict(evaluation: Mapping[str, Any]) -> list[str]:
    sentences = " ".join(for_markdown(sentence) for sentence in evaluation["verdict"]["sentences"])
    return [sentences, "", f"**{evaluation['notice']}**", ""]


def description(
    report: Mapping[str, Any], children: Mapping[int, Run], evaluation: Mapping[str, Any] | None = None
) -> str:
    """The description as Markdown: the verdict if the run has one, and a table of the folds with a link to each."""
    lines = [
        *(_verdict(evaluation) if evaluation else []),
        *(["**Control: the labels are permuted. These scores are not a result.**", ""] if report["control"] else []),
        *(line for fold, why in collapsed(report) for line in (f"**Fold {fold}: {collapsed_because(why)}.**", "")),
        f"Best fold: {report['best_fold']}",
        "",
        "| fold | " + " | ".join(METRICS) + " | threshold |",
        "|---" * (len(METRICS) + 2) + "|",
    ]
    for fold in report["folds"]:
        number = fold["fold"]
        run = children.get(number)
        link = (
            f"[{number}](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{TRAINING_VIEW})"
            if run
            else number
        )
        values = [fold["metrics"][key] for key in METRICS] + [fold["threshold"]]
        lines.append(f"| {link} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)
