"""The question to a node. It travels by value, so it imports the standard library alone."""

import hashlib
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

SETTLE_SECONDS = 5.0
"""How long a fault of a file may last before it counts: NFS shows a node late what another has written."""


def survey(share: str, nonce: str, packages: Sequence[str], paths: Sequence[str]) -> dict[str, Any]:
    """Looks at the node that it runs on, and writes nothing.

    Args:
        share: The file in the run's folder that the driver wrote `nonce` into.
        packages: Names of the packages whose versions are asked for.
        paths: Further files or folders that must exist.

    Returns:
        `share`, the fault of the run's folder or None; `missing`, those of `paths` that do not exist; `versions`, by
        package; `source`, the hash of raycv's code.
    """
    return {
        "share": share_fault(share, nonce),
        "missing": [path for path in paths if not os.path.exists(path)],
        "versions": {package: version_of(package) for package in packages},
        "source": source_hash(),
    }


def share_fault(share: str, nonce: str) -> str | None:
    """Why the folder of the file `share` is not the one that the driver wrote `nonce` into; None if it is."""

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
        if package == "raycv":  # It may run from a checkout, of which the installed packages know nothing.
            return str(importlib.import_module(package).__version__)
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ImportError, AttributeError):
        return None


def source_hash() -> str | None:
    """A hash of the names and contents of raycv's Python files; None without raycv."""
    found = importlib.util.find_spec("raycv")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        for part in (file.relative_to(folder).as_posix().encode(), file.read_bytes()):
            # The length first: otherwise text could move from one file to the next without a trace.
            total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()
