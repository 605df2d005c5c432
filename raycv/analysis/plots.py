"""The figures of a run in Python: the charts of the report, each with a title and a legend, as matplotlib axes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raycv.evaluation.bootstrap import said
from raycv.rendering import charts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
