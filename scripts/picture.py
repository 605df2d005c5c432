"""Draws a run's summary as README shows it: python scripts/picture.py runs/<name>/report.json quickstart.svg"""

import argparse
import json
from io import StringIO
from pathlib import Path

from rich.console import Console

from raycv.rendering.terminal import summary_table


def draw(report: Path, picture: Path) -> None:
    """Writes the table of `report` as a picture of a terminal of 78 columns."""
    console = Console(record=True, width=78, file=StringIO(), force_terminal=True)
    console.print(summary_table(json.loads(report.read_text(encoding="utf-8"))))
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(console.export_svg(title="python -m raycv.run experiment=quickstart"), encoding="utf-8")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("report", type=Path, help="report.json of a run")
    arguments.add_argument("picture", type=Path, help="the SVG to write")
    given = arguments.parse_args()
    if not given.report.is_file():
        arguments.error(f"there is no file {given.report}")
    draw(given.report, given.picture)
