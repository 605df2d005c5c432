"""Copies the page of a quickstart into the docs as an example, and takes the picture of its top with Chromium.

python -m scripts.example_page runs/quickstart     (`make example` also makes that run)
"""

import argparse
import shutil
import subprocess
from pathlib import Path

from raycv.errors import UserError
from raycv.rendering.publish import publish
from raycv.results.run_folder import RunFolder
from scripts.markdown import ROOT

PAGE = ROOT / "docs" / "examples" / "quickstart-report.html"
PICTURE = ROOT / "docs" / "images" / "report.png"
SIZE = "1200,760"


def main() -> None:
    """Makes the page of the run again and copies it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished quickstart")
    folder = RunFolder(parser.parse_args().run.absolute())
    try:
        publish(folder)
    except UserError as error:
        parser.error(str(error))
    PAGE.parent.mkdir(exist_ok=True)
    shutil.copyfile(folder.page, PAGE)
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("chromium is missing, so the picture stays as it was: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={SIZE}"]
    subprocess.run([chromium, *flags, f"--screenshot={PICTURE}", PAGE.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
