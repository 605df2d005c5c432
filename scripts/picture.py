"""Draws a run's summary as README shows it: python scripts/picture.py runs/<name>/report.json docs/quickstart.svg"""

import json
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console

from raycv.report import summary_table


def draw(report: Path, picture: Path) -> None:
    """Writes the table of `report` as a picture of a terminal of 78 columns."""
    console = Console(record=True, width=78, file=StringIO(), force_terminal=True)
    console.print(summary_table(json.loads(report.read_text(encoding="utf-8"))))
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(console.export_svg(title="python -m raycv.run experiment=quickstart"), encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
