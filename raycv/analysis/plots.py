"""The figures of a run, drawn by matplotlib from its evaluation. Each method draws into axes and returns them."""

from typing import TYPE_CHECKING, Any

import numpy as np

from raycv.evaluation.bootstrap import said
from raycv.evaluation.operating_points import CROSS_FOLD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
"""Colours of Okabe and Ito, which colour-blind readers tell apart."""


class Plots:
    """The figures of one run. Each method takes `ax`, or makes a new figure with pyplot."""

    def __init__(self, evaluation: dict[str, Any]) -> None:
        """Takes the statistics as `raycv.evaluation.evaluate` returns them."""
        self.evaluation = evaluation

    def roc(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the ROC curve: the pooled one with its band, and that of each fold."""
        ax = _axes(ax)
        ranking = self.evaluation["ranking"]
        band = ranking["band"]
        if band["recall_low"] is not None:
            ax.fill_between(band["grid"], band["recall_low"], band["recall_high"], color=BLUE, alpha=0.2, lw=0)
        for number, fold in enumerate(ranking["folds"]):
            ax.plot(*_numbers(fold, "false_positive_rate", "recall"), color=GREY, lw=0.8, label=_once("folds", number))
        area = self._score("roc_auc")
        ax.plot(*_numbers(ranking["pooled"], "false_positive_rate", "recall"), color=BLUE, lw=2, label="pooled")
        ax.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":", label="chance")
        return _finished(ax, f"ROC-AUC {area}", "false positive rate", "recall")

    def precision_recall(self, ax: "Axes | None" = None) -> "Axes":
        """Draws precision against recall: the pooled curve with its band, that of each fold, and the prevalence."""
        ax = _axes(ax)
        ranking = self.evaluation["ranking"]
        band = ranking["band"]
        if band["precision_low"] is not None:
            ax.fill_between(band["grid"], band["precision_low"], band["precision_high"], color=BLUE, alpha=0.2, lw=0)
        for number, fold in enumerate(ranking["folds"]):
            ax.plot(*_numbers(fold, "recall", "precision"), color=GREY, lw=0.8, label=_once("folds", number))
        area = self._score("average_precision")
        ax.plot(*_numbers(ranking["pooled"], "recall", "precision"), color=BLUE, lw=2, label="pooled")
        ax.axhline(ranking["prevalence"], color="black", lw=0.8, ls=":", label="prevalence")
        return _finished(ax, f"average precision {area}", "recall", "precision")

    def threshold(self, ax: "Axes | None" = None) -> "Axes":
        """Draws F1, precision and recall against the threshold, and the thresholds tuned on the other folds."""
        ax = _axes(ax)
        sweep = self.evaluation["threshold_sweep"]
        steps = sweep["thresholds"]
        for number, fold in enumerate(sweep["folds"]):
            ax.plot(steps, _array(fold["f1"]), color=GREY, lw=0.8, label=_once("F1 of the folds", number))
        for metric, colour, style in (("precision", ORANGE, "--"), ("recall", GREEN, "-."), ("f1", BLUE, "-")):
            name = "F1" if metric == "f1" else metric
            ax.plot(steps, _array(sweep["pooled"][metric]), color=colour, ls=style, lw=2, label=f"{name}, pooled")
        for number, mark in enumerate(sweep["marks"][CROSS_FOLD]):
            ax.axvline(mark, color="black", lw=0.8, ls=":", label=_once("tuned on other folds", number))
        return _finished(ax, "Metrics by threshold", "threshold", "value")

    def criteria(self, ax: "Axes | None" = None) -> "Axes":
        """Draws F1 of each criterion with its interval, ordered by matched pairs; criteria with few are grey."""
        ax = _axes(ax)
        rows = sorted(self.evaluation["criteria"], key=lambda row: (row["matched"], row["criterion"]))
        for place, row in enumerate(rows):
            found = row["metrics"]["f1"]
            if found["value"] is None:
                ax.text(0.02, place, "undefined", va="center", fontsize=8, color=GREY)
                continue
            colour = GREY if row["few"] else BLUE
            if found["fixed"]["low"] is not None:
                ax.plot([found["fixed"]["low"], found["fixed"]["high"]], [place, place], color=colour, lw=2)
            ax.plot(found["value"], place, "o", color=colour)
        ax.set_yticks(range(len(rows)), [f"{_plain(row['criterion'])}  (n={row['matched']})" for row in rows])
        point = next(one for one in self.evaluation["operating_points"] if one["name"] == CROSS_FOLD)
        if point["pooled"]["f1"]["value"] is not None:
            ax.axvline(point["pooled"]["f1"]["value"], color="black", lw=0.8, ls=":", label="all criteria together")
        ax.set_xlim(0, 1)
        return _finished(ax, "F1 by criterion, 95 % intervals", "F1", "criterion (matched pairs)", square=False)

    def calibration(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the share of matched pairs against the mean score, before and after the temperature, with counts."""
        ax = _axes(ax)
        ax.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":", label="calibrated")
        for when, colour, mark in (("before", BLUE, "o"), ("after", ORANGE, "s")):
            bins = [one for one in self.evaluation["calibration"][when]["reliability"] if one["pairs"]]
            x, y = [one["mean_score"] for one in bins], [one["share_matched"] for one in bins]
            ax.plot(x, y, color=colour, marker=mark, label=f"{when} the temperature")
            if when == "before":
                for one in bins:
                    ax.annotate(
                        f"{one['pairs']:,}", (one["mean_score"], one["share_matched"]), (0, 7),
                        textcoords="offset points", ha="center", fontsize=7, color=colour,
                    )  # fmt: skip
        return _finished(ax, "Calibration, with pairs per bin", "mean score", "share of matched pairs")

    def _score(self, metric: str) -> str:
        found = self.evaluation["score_metrics"]["pooled"][metric]
        return said(found["value"], found["fixed"])


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    # pyplot shows the figure in a notebook. It takes a second to import, so only this imports it.
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")[1]


def _finished(ax: "Axes", title: str, x: str, y: str, *, square: bool = True) -> "Axes":
    ax.set(title=title, xlabel=x, ylabel=y)
    if square:
        ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    ax.spines[["top", "right"]].set_visible(False)
    # Outside of the axes, so that it covers no curve.
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, borderaxespad=0)
    return ax


def _once(label: str, number: int) -> str | None:
    """The label for the first of several lines, since a legend names them together."""
    return label if number == 0 else None


def _array(values: list[float | None]) -> np.ndarray:
    """Undefined values as NaN, which matplotlib leaves out."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _numbers(curve: dict[str, Any], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    return _array(curve[x]), _array(curve[y])


def _plain(text: str) -> str:
    """A text in which matplotlib reads no formula."""
    return text.replace("$", r"\$")
