"""Draws a chart as an SVG for the inside of a page: unique ids, text as text, colours that follow the page."""

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID, FOLD, BLUE, ORANGE, GREEN = "#1f2329", "#d0d7df", "#8b949e", "#0072b2", "#c44e00", "#00795a"
"""Colours that differ for the colour-blind, and in lightness; the last three are of Okabe and Ito, darkened."""
_VARIABLES = {INK: "ink", GRID: "grid", FOLD: "fold", BLUE: "blue", ORANGE: "orange", GREEN: "green"}
WIDTH, HEIGHT = 4.6, 3.0
"""Inches. The text stays readable on a telephone, where the figure is as wide as the screen."""
SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FOLD,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.parse_math": False,
}
"""They replace those of the user's matplotlibrc, so that the figures of a run stay the same."""

Chart = Callable[["Axes", dict[str, Any]], None]
"""Draws a part of the evaluation on the axes."""


def svg_of(name: str, title: str, finding: str, chart: Chart, evaluation: dict[str, Any], rows: int = 0) -> str:
    """Returns a chart as an SVG element.

    Args:
        name: The name of the figure: each id of the SVG begins with it.
        title: The title of the figure; a screen reader reads it.
        finding: One sentence; a screen reader reads it after the title.
        chart: Draws it.
        evaluation: The statistics, as `evaluate` returns them.
        rows: The rows of a chart with one row per thing, which decide its height. 0 for other charts.
    """
    import matplotlib
    from matplotlib.figure import Figure

    height = 1.15 + 0.24 * rows if rows else HEIGHT
    settings: Any = {**SETTINGS, "svg.hashsalt": name}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        chart(axes, evaluation)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(labels) > 1 else 1)
        output = io.StringIO()
        figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(name, title, finding, output.getvalue())


def _inline(name: str, title: str, finding: str, svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    # The comments repeat the texts of the figure. The style element would count for the whole page.
    for part in (r"<!--.*?-->\n?", r"<metadata>.*?</metadata>\n?", r"<style.*?</style>\n?", r"<defs>\s*</defs>\n?"):
        svg = re.sub(part, "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    svg = svg.replace("xlink:href=", "href=")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    # The page's own font is narrower than the one that the figure was laid out with, so nothing overlaps.
    svg = svg.replace("'DejaVu Sans', sans-serif", "'DejaVu Sans', Verdana, sans-serif")
    box = re.search(r'viewBox="[^"]+"', svg)
    if box is None:
        raise ValueError(f"figure {name} has no viewBox")
    body = svg[svg.index(">") + 1 :]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box[0]} role="img" '
        f'aria-labelledby="{name}-title {name}-finding" style="stroke-linejoin: round; stroke-linecap: butt">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-finding">{escape(finding)}</desc>'
        f"{body.strip()}\n"
    )
