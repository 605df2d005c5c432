"""The pages of the docs, as tests hold them against what raycv does."""

import re
from collections.abc import Iterable
from pathlib import Path

PLACES = {"<k>": r"\d+", "<metric>": r"(?:precision|recall|f1|accuracy|roc_auc|threshold)", "<package>": r"\w[\w-]*"}
PLACES |= {"<name>": r"\w+", "<number>": r"\d+"}
"""What stands for several names on the pages, and what fits there."""


def page(name: str) -> str:
    """The text of `docs/<name>`."""
    return (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8")


def python_blocks(name: str) -> list[str]:
    """The Python programs of a page."""
    return re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)


def undocumented(names: Iterable[str], page_name: str) -> set[str]:
    """Those of `names` that no inline code of a page has."""
    patterns = []
    for code in re.findall(r"`([^`\n]+)`", page(page_name)):
        pattern = re.escape(code)
        for place, fitting in PLACES.items():
            pattern = pattern.replace(re.escape(place), fitting)
        patterns.append(pattern)
    return {name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)}
