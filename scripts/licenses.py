"""The license of each package of a lock, as installed: python scripts/licenses.py requirements.lock"""

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

NOT_STATED = "not stated"
LONGEST = 60
"""Some packages give the whole text of their license: longer than a name, and their classifier is taken."""


def license_of(package: str) -> str:
    """License expression (PEP 639), else the classifiers, else the free field.

    Raises: PackageNotFoundError.
    """
    stated: Any = metadata.metadata(package)
    classifiers = [each.split(" :: ")[-1] for each in stated.get_all("Classifier", []) if each.startswith("License ::")]
    named = [name for name in classifiers if name != "OSI Approved"]
    free = (stated.get("License") or "").strip()
    short = free if len(free) <= LONGEST and "\n" not in free else ""
    return stated.get("License-Expression") or ", ".join(named) or short or NOT_STATED


def table(lock: Path) -> list[tuple[str, str, str]]:
    """Package, version, license of each line of `lock`."""
    pins = (line.split("==") for line in lock.read_text(encoding="utf-8").split())
    return [(package, version, license_of(package)) for package, version in pins]


if __name__ == "__main__":
    for row in table(Path(sys.argv[1])):
        print("{:32} {:18} {}".format(*row))  # noqa: T201
