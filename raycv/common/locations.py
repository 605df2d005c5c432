"""Where things lie: what ships with the package (raycv://...), absolute folders and store addresses."""

from pathlib import Path

from raycv.errors import UserError

SQLITE = "sqlite:///"
BUNDLED_SCHEME = "raycv://"
DEFAULT_CRITERIA = "data/dsm5"
"""The default criteria ship with raycv: where the working directory has no such folder, those are meant."""

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package `raycv`."""


def bundled(relative: str) -> Path:
    """The path of something that ships with raycv: inside the package in a wheel, at top level in a checkout.

    Raises: UserError if it is in neither place (a broken installation).
    """
    for root in (PACKAGE / "bundled", PACKAGE.parent):
        if (root / relative).exists():
            return root / relative
    raise UserError(
        f"raycv's own {relative!r} is missing beside {PACKAGE}: the installation is incomplete.",
        remedies=["reinstall: pip install --force-reinstall --no-deps raycv (or pip install -e . in a checkout)"],
    )


def resolve(location: str) -> str:
    """A config's location as it is on this node: `raycv://x` is what ships with the package, all else is unchanged.

    Resolved at the point of use, not in the driver, since nodes may have the package installed in different places.
    """
    location = _or_bundled(location)
    if location.startswith(BUNDLED_SCHEME):
        return str(bundled(location.removeprefix(BUNDLED_SCHEME)))
    return location


def absolute_folder(location: str) -> str:
    """`location` as it holds from any working directory; what ships with the package stays by its raycv:// name."""
    location = _or_bundled(location)
    return location if location.startswith(BUNDLED_SCHEME) else str(Path(location).absolute())


def _or_bundled(location: str) -> str:
    return BUNDLED_SCHEME + location if location == DEFAULT_CRITERIA and not Path(location).is_dir() else location


def absolute_uri(uri: str) -> str:
    """A tracking URI as it holds from any working directory: Ray changes it, and SQLite paths are relative to it."""
    if uri.startswith(SQLITE):
        path = str(Path(uri.removeprefix(SQLITE)).absolute())
        if set(path) & set("?#%"):
            raise UserError(
                f"tracking.uri={uri}: the database would be {path}, and a database URI cannot hold ?, # or %.",
                remedies=["run in another folder", "tracking.uri=sqlite:////another/folder/mlflow.db"],
            )
        return SQLITE + path
    return uri
