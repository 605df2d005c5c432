"""Draws the charts of a report (lines, bars, bins, legends) on axes that it is given, so notebooks use them too."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raycv.rendering.blocks import Estimate, estimate, label
from raycv.rendering.svg import BLUE, FOLD, GREEN, INK, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST_NAME = 26
"""Characters of a name beside an axis."""


def roc(axes: "Axes", evaluation: dict[str, Any]) -> None:
    """The ROC curve: folds thin, pooled bold with its band, and the diagonal of a coin."""
    ranking = evaluation["ranking"]
    band = ranking["band"]
    if band["recall_low"] is not None:
        axes.fill_between(band["grid"], band["recall_low"], band["recall_high"], color=BLUE, alpha=0.2, linewidth=0)
    for number, curve in enumerate(ranking["folds"]):
        axes.plot(
            *_points(curve, "false_positive_rate", "recall"), color=FOLD, linewidth=0.8, label=_once("folds", number)
        )
    axes.plot(*_points(ranking["pooled"], "false_positive_rate", "recall"), color=BLUE, label="pooled, 95 % band")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (3, 3)), label="chance")
    _square(axes, "false positive rate", "recall")


def precision_recall(axes: "Axes", evaluation: dict[str, Any]) -> None:
    """The precision-recall curve: folds thin, pooled bold with its band, and the prevalence."""
    ranking = evaluation["ranking"]
    band = ranking["band"]
    if band["precision_low"] is not None:
        ends = (band["precision_low"], band["precision_high"])
        axes.fill_between(band["grid"], *ends, color=BLUE, alpha=0.2, linewidth=0)
    for number, curve in enumerate(ranking["folds"]):
        axes.plot(*_points(curve, "recall", "precision"), color=FOLD, linewidth=0.8, label=_once("folds", number))
    axes.plot(*_points(ranking["pooled"], "recall", "precision"), color=BLUE, label="pooled, 95 % band")
    share = ranking["prevalence"]
    axes.axhline(share, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), label=f"prevalence {share:.3f}")
    _square(axes, "recall", "precision")


def threshold_sweep(axes: "Axes", evaluation: dict[str, Any]) -> None:
    """F1 over the threshold, folds thin and pooled bold, with precision and recall, and where the folds stand."""
    sweep = evaluation["threshold_sweep"]
    for number, fold in enumerate(sweep["folds"]):
        axes.plot(
            *_defined(sweep["thresholds"], fold["f1"]), color=FOLD, linewidth=0.8, label=_once("F1 of folds", number)
        )
    axes.plot(*_defined(sweep["thresholds"], sweep["pooled"]["f1"]), color=BLUE, linewidth=2.2, label="F1 pooled")
    for name, colour, style in (("precision", ORANGE, (0, (5, 2))), ("recall", GREEN, (0, (1, 1.5)))):
        line = _defined(sweep["thresholds"], sweep["pooled"][name])
        axes.plot(*line, color=colour, linewidth=1.3, linestyle=style, label=f"{name} pooled")
    # The marks stand above the curves, a row for each way to choose a threshold.
    marks = {name: sweep["marks"][name] for name in ("tuned_in_fold", "cross_fold") if name in sweep["marks"]}
    for row, (name, marker) in enumerate(zip(marks, "ox", strict=False)):
        heights = [1.06 + 0.07 * row] * len(marks[name])
        axes.plot(marks[name], heights, marker, color=INK, markersize=4.5, fillstyle="none", label=label(name))
    axes.set(xlim=(0, 1), ylim=(0, 1.19), xlabel="threshold", ylabel="F1, precision, recall")
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])


def learning_curves(axes: "Axes", evaluation: dict[str, Any]) -> None:
    """F1 of each fold after each epoch, with the epoch that it kept and the one that the other folds choose."""
    epochs = evaluation["epochs"]
    longest = max(map(len, epochs["f1_by_epoch"]))
    own, cross = [], []
    for fold, values in enumerate(epochs["f1_by_epoch"]):
        axes.plot(range(1, len(values) + 1), values, color=FOLD, linewidth=1)
        own.append((epochs["own"][fold], values[epochs["own"][fold] - 1]))
        cross.append((epochs["cross"][fold], values[epochs["cross"][fold] - 1]))
    every = [value for values in epochs["f1_by_epoch"] for value in values]
    ends = [(len(values), values[-1]) for values in epochs["f1_by_epoch"]]
    for (epoch, value), fold in _spread(ends, gap=0.055 * (max(every) - min(every))):
        axes.annotate(f"{fold}", (epoch, value), (8, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.plot(*zip(*own, strict=True), "o", color=BLUE, markersize=5, label="epoch kept")
    axes.plot(*zip(*cross, strict=True), "D", color=ORANGE, markersize=8, fillstyle="none", label="epoch of the others")
    axes.set(xlabel="epoch (a number at the end names the fold)", ylabel="F1, threshold tuned in the fold")
    axes.set_xlim(0.8, longest + 0.35)
    axes.set_xticks(range(1, longest + 1, max(1, longest // 10)))


def operating_points(axes: "Axes", evaluation: dict[str, Any]) -> None:
    """Pooled F1 with interval at each operating point, and F1 of each fold."""
    points = [point for point in evaluation["operating_points"] if point["pooled"]]
    names = [label(point["name"]) for point in points]
    values = [estimate(point["pooled"]["f1"]) for point in points]
    for row, point in enumerate(points):
        folds = [value for value in point["fold_mean"]["f1"]["folds"] if value is not None]
        axes.plot(
            folds, [row + 0.22] * len(folds), "|", color=FOLD, markersize=7, markeredgewidth=1.3,
            label=_once("each fold", row),
        )  # fmt: skip
    _dots(axes, names, values, "pooled F1, 95 % interval")
    axes.set_xlabel("F1")


def criteria_forest(axes: "Axes", evaluation: dict[str, Any]) -> None:
    """F1 of each criterion with its interval and its floor, the criterion with most matched pairs first."""
    rows = by_matched(evaluation["criteria"])
    names = [f"{short(row['criterion'])} ({row['matched']})" for row in rows]
    few = [at for at, row in enumerate(rows) if row["few"]]
    _dots(axes, names, [estimate(row["metrics"]["f1"]) for row in rows], "F1, 95 % interval", few)
    floors = [(row["floor_f1"], at) for at, row in enumerate(rows) if row["floor_f1"] is not None]
    if floors:
        axes.plot(*zip(*floors, strict=True), "|", color=ORANGE, markersize=9, markeredgewidth=2, label="all matched")
    axes.set_xlabel("F1 by criterion (in brackets: its matched pairs)")
    axes.set_xlim(-0.02, 1)


def slice_forest(axes: "Axes", evaluation: dict[str, Any]) -> None:
    """Specificity of each slice, the one metric of labels that every slice has and that no prevalence moves."""
    names, values = [], []
    for name, part in parts_of(evaluation):
        names.append(name)
        values.append(estimate(part["metrics"]["specificity"]) if part["metrics"] else None)
    _dots(axes, names, values, "specificity, 95 % interval")
    axes.set_xlabel("specificity: unmatched pairs labelled unmatched")


def reliability(axes: "Axes", evaluation: dict[str, Any]) -> None:
    """The share of matched pairs over the mean score of a bin, before and after the temperature."""
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (3, 3)), label="perfect")
    for when, colour, marker in (("before", BLUE, "o"), ("after", ORANGE, "s")):
        bins = [one for one in evaluation["calibration"][when]["reliability"] if one["pairs"]]
        most = max(one["pairs"] for one in bins)
        where = ([one["mean_score"] for one in bins], [one["share_matched"] for one in bins])
        # The area of a mark is the number of its pairs, with a least size that stays visible.
        sizes = [9 + 75 * one["pairs"] / most for one in bins]
        axes.plot(*where, color=colour, linewidth=1.2)
        axes.scatter(*where, s=sizes, color=colour, marker=marker, linewidths=0, label=f"{when} (area: pairs)")
    _square(axes, "mean score of the bin", "share of matched pairs")


def score_histogram(axes: "Axes", evaluation: dict[str, Any]) -> None:
    """The number of matched and unmatched pairs by score, on a logarithmic scale."""
    histogram = evaluation["errors"]["histogram"]
    for name, colour, style in (("unmatched", FOLD, "-"), ("matched", BLUE, "-")):
        axes.stairs(
            histogram[name], histogram["edges"], baseline=0.5, fill=name == "unmatched", color=colour, linestyle=style,
            linewidth=1.8, alpha=0.55 if name == "unmatched" else 1, label=f"{name} pairs",
        )  # fmt: skip
    axes.set(xlim=(0, 1), xlabel="score", ylabel="pairs (each step is 10 times as many)", yscale="log")
    axes.set_ylim(bottom=0.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    axes.minorticks_off()


def floors(axes: "Axes", evaluation: dict[str, Any]) -> None:
    """Pooled F1 of the model and of each floor, with intervals."""
    rows = [("this model", evaluation["verdict"]["f1"])]
    rows += [(label(row["name"]), row["metrics"]["f1"]) for row in evaluation["floors"]["table"]]
    _dots(axes, [name for name, _ in rows], [estimate(f1) for _, f1 in rows], "F1, 95 % interval", range(1, len(rows)))
    axes.set_xlabel("F1 at cross-fold thresholds")
    axes.set_xlim(left=-0.02)


def by_matched(criteria: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the criteria, those with most matched pairs first."""
    return sorted(criteria, key=lambda row: -row["matched"])


def parts_of(evaluation: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns every slice with its name for people."""
    return [(label(part["name"]), part) for row in evaluation["slices"] for part in row["slices"]]


def short(name: str) -> str:
    """Returns a name that fits beside an axis."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _dots(
    axes: "Axes",
    names: Sequence[str],
    values: Sequence[Estimate | None],
    legend: str,
    faint: Sequence[int] | range = (),
) -> None:
    """A row for each name, from above: its value and its interval. Undefined values are written as a word."""
    drawn = False
    for row, value in enumerate(values):
        if value is None or value.value is None:
            axes.annotate("undefined", (0.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=7.5)
            continue
        colour = FOLD if row in faint else BLUE
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot([value.value], [row], "o", color=colour, markersize=5.5, label=None if drawn else legend)
        drawn = True
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=6)


def _points(curve: dict[str, Any], x: str, y: str) -> tuple[list[float], list[float]]:
    return _defined(curve[x], curve[y])


def _defined(x: Sequence[float | None], y: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """The points of which both numbers are defined."""
    known = [(one, other) for one, other in zip(x, y, strict=True) if one is not None and other is not None]
    return [one for one, _ in known], [other for _, other in known]


def _spread(ends: Sequence[tuple[int, float]], gap: float) -> list[tuple[tuple[int, float], int]]:
    """The ends of lines with the numbers of their folds, moved apart where they would overlap."""
    placed: list[tuple[tuple[int, float], int]] = []
    for fold, (epoch, value) in sorted(enumerate(ends), key=lambda one: one[1][1]):
        below = [at[1] for at, _ in placed if at[0] == epoch]
        placed.append(((epoch, max(value, max(below, default=-1.0) + gap)), fold))
    return placed


def _once(name: str, number: int) -> str | None:
    """The name for the legend of the first of several equal lines."""
    return name if number == 0 else None


def _square(axes: "Axes", x: str, y: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=x, ylabel=y)
