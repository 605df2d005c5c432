"""The table at the end of a run: a row per fold, mean and deviation, floors, and the faults of folds."""

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from raycv.training.metrics import METRICS, THRESHOLD, collapsed_because


def summary_table(report: dict[str, Any]) -> Group:
    """A row per fold of `report`, then mean and deviation if it has all folds. The title tells if it is a control."""
    control = "CONTROL, labels permuted, not a result: " if report.get("control") else ""
    missing = report.get("missing_folds", [])
    count, folds = len(report["folds"]), len(report["folds"]) + len(missing)
    part = f"{count} of {folds} folds, not the result of a " if missing else ""
    title = Text(f"{control}{report['run']}: {part}{folds}-fold cross-validation", "bold")
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("fold", "precision", "recall", "F1", "accuracy", "ROC-AUC", "threshold", "best epoch", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    collapsed = report.get("collapsed_folds", [])
    for fold in report["folds"]:
        mark = " *" if fold["fold"] == report.get("best_fold") else ""
        mark += " !" if fold["fold"] in collapsed else ""
        cells = [f"{fold['metrics'][key]:.3f}" for key in METRICS]
        cells += [f"{fold['threshold']:.2f}", f"{fold['best_epoch']}/{fold['epochs']}", f"{fold['seconds']:.0f}"]
        table.add_row(f"{fold['fold']}{mark}", *cells)
    if missing:
        said = f"Fold {', '.join(map(str, missing))} is missing, so raycv averages nothing."
    else:
        table.add_section()
        for name, row in (("mean", report["mean"]), ("std", report["std"])):
            table.add_row(name, *(f"{row[key]:.3f}" for key in METRICS), f"{row[THRESHOLD]:.2f}", "", "")
        floors = report["floors"]
        said = (
            f"* best fold by F1. std: ddof=1. Floors: F1 {floors['all_matched_f1']:.3f} (all matched), "
            f"accuracy {floors['all_unmatched_accuracy']:.3f} (all unmatched), ROC-AUC 0.5."
        )
    marked = [fold for fold in report["folds"] if fold["fold"] in collapsed]
    warnings = [f"! fold {fold['fold']}: {collapsed_because(fold.get('collapsed') or [])}" for fold in marked]
    return Group(title, table, Text(said, "dim"), *(Text(warning, "yellow") for warning in warnings))
