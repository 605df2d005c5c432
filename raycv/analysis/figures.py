"""Figures for Python: those of a run as matplotlib axes, and that of a comparison."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raycv.errors import printable
from raycv.evaluation.bootstrap import said
from raycv.evaluation.comparison import COMPARED
from raycv.evaluation.measures import NAMES
from raycv.rendering import charts
from raycv.rendering.svg import BLUE, GREEN, GRID, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = (ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
MARKS = ("s", "^", "D", "v", "P")
LONGEST = 40
"""Characters of a name in the figure; longer ones are cut."""


class Plots:
    """The figures of one run. Each method draws into `ax`, or into a new figure of pyplot, and returns the axes."""

    def __init__(self, evaluation: dict[str, Any]) -> None:
        """Takes the statistics as `raycv.evaluation.evaluate` returns them."""
        self.evaluation = evaluation

    def roc(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the ROC curve: the pooled one with its band, and that of each fold."""
        return self._drawn(charts.roc, f"ROC-AUC {self._score('roc_auc')}", ax)

    def precision_recall(self, ax: "Axes | None" = None) -> "Axes":
        """Draws precision against recall: the pooled curve with its band, that of each fold, and the prevalence."""
        return self._drawn(charts.precision_recall, f"Average precision {self._score('average_precision')}", ax)

    def threshold(self, ax: "Axes | None" = None) -> "Axes":
        """Draws F1, precision and recall against the threshold, and the thresholds of the folds."""
        return self._drawn(charts.threshold_sweep, "Metrics by threshold", ax)

    def criteria(self, ax: "Axes | None" = None) -> "Axes":
        """Draws F1 of each criterion with its interval, ordered by matched pairs; criteria with few are grey."""
        return self._drawn(charts.criteria_forest, "F1 by criterion", ax)

    def calibration(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the share of matched pairs against the mean score, before and after the temperature."""
        return self._drawn(charts.reliability, "Calibration", ax)

    def _score(self, metric: str) -> str:
        found = self.evaluation["score_metrics"]["pooled"][metric]
        return said(found["value"], found["fixed"])

    def _drawn(self, chart: Callable[["Axes", dict[str, Any]], None], title: str, ax: "Axes | None") -> "Axes":
        import matplotlib

        # A name of a criterion may hold a $, which begins a formula in matplotlib.
        with matplotlib.rc_context({"text.parse_math": False}):
            if ax is None:
                # pyplot shows the figure in a notebook. It takes a second to import.
                from matplotlib import pyplot

                ax = pyplot.subplots(figsize=(6.8, 4.2), layout="constrained")[1]
            chart(ax, self.evaluation)
            ax.set_title(title)
            # Outside of the axes, so that it covers no curve.
            ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, borderaxespad=0)
        return ax


def comparison_figure(result: dict[str, Any]) -> "Figure":
    """Draws the result of a comparison: a dumbbell per metric, differences by metric and by criterion."""
    # Without pyplot the figure needs no display, and nothing keeps it in memory.
    from matplotlib.figure import Figure

    rows = result["comparisons"]
    metrics = list(COMPARED)[::-1]
    criteria = [one["criterion"] for one in rows[0]["criteria"]][::-1]
    metric = result["metric"]
    height = 1.6 + 0.24 * max(len(metrics), len(criteria)) * max(1, len(rows) ** 0.5)
    figure = Figure(figsize=(13, height), layout="constrained")
    values, differences, by_criterion = figure.subplots(1, 3)
    _values(values, result, metrics)
    labels = [NAMES[name] for name in metrics]
    _differences(differences, labels, [[row["pooled"][name] for name in metrics] for row in rows])
    found = [{one["criterion"]: one[metric] for one in row["criteria"]} for row in rows]
    _differences(by_criterion, criteria, [[one[name] for name in criteria] for one in found])
    values.set(title="Values", xlabel="value, 95 % interval", xlim=(-0.02, 1.02))
    differences.set(title="Difference to the baseline", xlabel="run minus baseline, 95 % interval")
    by_criterion.set(title=f"Difference in {NAMES[metric]} by criterion", xlabel="run minus baseline, 95 % interval")
    figure.legend(
        *values.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, 1 + len(rows)), frameon=False
    )
    return figure


def _values(ax: "Axes", result: dict[str, Any], metrics: list[str]) -> None:
    pooled = {run["run"]: run["pooled"] for run in result["runs"]}
    baseline = result["baseline"]
    styles = {baseline: (BLUE, "o")} | {row["run"]: _style(number) for number, row in enumerate(result["comparisons"])}
    for place, metric in enumerate(metrics):
        ends = [found[metric]["value"] for found in pooled.values() if found[metric]["value"] is not None]
        if ends:
            ax.plot([min(ends), max(ends)], [place, place], color=GRID, lw=2, zorder=1)
    for number, (run, (colour, mark)) in enumerate(styles.items()):
        label: str | None = _plain(run) + (" (baseline)" if run == baseline else "")
        for place, metric in enumerate(metrics):
            # A legend needs each name once.
            _interval(ax, pooled[run][metric], place + _shift(number, len(styles)), colour, mark, label)
            label = None
    _rows(ax, [NAMES[metric] for metric in metrics])


def _differences(ax: "Axes", names: list[str], series: list[list[dict[str, Any]]]) -> None:
    ax.axvline(0, color="black", lw=0.8)
    for number, numbers in enumerate(series):
        for place, found in enumerate(numbers):
            _interval(ax, found, place + _shift(number, len(series)), *_style(number), None)
    _rows(ax, names)


def _interval(ax: "Axes", found: dict[str, Any], place: float, colour: str, mark: str, label: str | None) -> None:
    ends = found.get("reselected") or found["fixed"]
    if ends and ends["low"] is not None:
        ax.plot([ends["low"], ends["high"]], [place, place], color=colour, lw=1.2, zorder=2)
    # An undefined value is left out, and its row stays.
    x = [] if found["value"] is None else [found["value"]]
    ax.plot(x, [place] * len(x), mark, color=colour, ms=5, ls="", label=label, zorder=3)


def _shift(number: int, count: int) -> float:
    """Moves runs apart within a row, so that their intervals do not cover each other."""
    return 0.0 if count == 1 else 0.3 * (0.5 - number / (count - 1))


def _style(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]


def _rows(ax: "Axes", names: list[str]) -> None:
    ax.set_yticks(range(len(names)), [_plain(name) for name in names])
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.spines[["top", "right"]].set_visible(False)


def _plain(text: str) -> str:
    """A name in which matplotlib reads no formula, and without control characters, which an SVG may not hold."""
    text = printable(text)
    cut = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return cut.replace("$", r"\$")
