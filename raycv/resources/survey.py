"""The question to a node. Ray sends this module by value, so it imports only the standard library."""

import hashlib
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

SETTLE_SECONDS = 5.0
"""Seconds for which a fault of a file does not count: NFS shows a node late what another node has written."""


def survey(share: str, nonce: str, packages: Sequence[str], paths: Sequence[str]) -> dict[str, Any]:
    """Looks at the node that it runs on, and writes nothing.

    Args:
        share: The file in the run's folder into which the driver wrote `nonce`; empty if each node has its own copy.
        nonce: The text that the file must hold.
        packages: Names of the packages whose versions to report.
        paths: Further files or folders that must exist.

    Returns:
        share: The fault of the run's folder, or None.
        missing: Those of `paths` that do not exist.
        versions: The version of each package.
        source: The hash of raycv's code.
    """
    return {
        "share": share_fault(share, nonce),
        "missing": [path for path in paths if not os.path.exists(path)],
        "versions": {package: version_of(package) for package in packages},
        "source": source_hash(),
    }


def share_fault(share: str, nonce: str) -> str | None:
    """Why the folder of the file `share` is not the one into which the driver wrote `nonce`; None if it is."""
    if not share:
        return None

    def look() -> str | None:
        try:
            with open(share, encoding="utf-8") as file:
                same = file.read() == nonce
        except OSError as error:
            return f"does not see the run's folder {os.path.dirname(share)} ({error.strerror})"
        return None if same else f"sees another folder at {os.path.dirname(share)}"

    return settled(look)


def settled(look: Callable[[], str | None]) -> str | None:
    """The fault that `look` still finds after SETTLE_SECONDS; None as soon as it finds none."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (fault := look()) is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    return fault


def version_of(package: str) -> str | None:
    """The installed version of a package; None if it is not installed, or cannot be imported (raycv itself)."""
    try:
        # raycv may run from a checkout, which is not an installed package, so we ask the module.
        if package == "raycv":
            return str(importlib.import_module(package).__version__)
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ImportError, AttributeError):
        return None


def source_hash() -> str | None:
    """A SHA-256 of the names and contents of raycv's Python files; None if raycv is not installed."""
    found = importlib.util.find_spec("raycv")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent
    total = hashlib.sha256()
    # Editors leave links of their own there (`.#x.py`), which may lead nowhere.
    files = [path for path in folder.rglob("*.py") if path.is_file() and not path.name.startswith(".")]
    for file in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        for part in (file.relative_to(folder).as_posix().encode(), file.read_bytes()):
            # Without the length, text could move from one file to the next and leave the hash the same.
            total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()
