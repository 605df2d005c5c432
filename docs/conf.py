"""How Sphinx builds the docs: `make docs`. Nothing is fetched, neither to build the pages nor to read them."""

import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = PROJECT["name"]
version = release = PROJECT["version"]
copyright = "the raycv authors, Apache-2.0"

extensions = ["myst_parser"]
# Headings down to the third level can be linked to: [text](page.md#heading).
myst_heading_anchors = 3
# A block of code in a language that Pygments lacks is a warning, and so is each broken link (-W makes it an error).
nitpicky = True

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False
