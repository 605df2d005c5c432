"""Renders the results as Markdown between the markers of the README."""

import json
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"


def render(result: dict[str, Any]) -> list[str]:
    return [json.dumps(result, indent=1)]
