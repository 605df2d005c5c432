"""Resolves locations: files that ship with the package (raycv://...), absolute folders and store addresses."""

from pathlib import Path

from raycv.errors import UserError

SQLITE = "sqlite:///"
BUNDLED_SCHEME = "raycv://"
DEFAULT_CRITERIA = "data/dsm5"
"""Folder of the default criteria. If the working directory lacks it, the copy that ships with raycv is used."""

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package `raycv`."""


def bundled(relative: str) -> Path:
    """The path of a file or folder that ships with raycv: in the package in a wheel, at top level in a checkout.

    Raises:
        UserError: It is in neither place, so the installation is broken.
    """
    for root in (PACKAGE / "bundled", PACKAGE.parent):
        if (root / relative).exists():
            return root / relative
    raise UserError(
        f"raycv's own {relative!r} is missing beside {PACKAGE}: the installation is incomplete.",
        kind="package-damaged",
        remedies=["reinstall: pip install --force-reinstall --no-deps raycv (or pip install -e . in a checkout)"],
    )


def resolve(location: str) -> str:
    """Turns the location of a config into one that holds on this node: `raycv://x` becomes the path in the package.

    Other locations stay unchanged, except DEFAULT_CRITERIA where no such folder exists. Nodes may have the package in
    different places, so each caller resolves a location where it uses it, not in the driver.

    Raises:
        UserError: The package lacks the file.
    """
    location = _or_bundled(location)
    if location.startswith(BUNDLED_SCHEME):
        return str(bundled(location.removeprefix(BUNDLED_SCHEME)))
    return location


def absolute_folder(location: str) -> str:
    """`location` as an absolute path; a file that ships with the package keeps its raycv:// name."""
    location = _or_bundled(location)
    return location if location.startswith(BUNDLED_SCHEME) else str(Path(location).absolute())


def _or_bundled(location: str) -> str:
    return BUNDLED_SCHEME + location if location == DEFAULT_CRITERIA and not Path(location).is_dir() else location


def absolute_uri(uri: str) -> str:
    """Makes the path in a SQLite URI absolute, since Ray changes the working directory. Other URIs stay unchanged.

    Raises:
        UserError: The absolute path holds `?`, `#` or `%`, which a database URI cannot hold.
    """
    if uri.startswith(SQLITE):
        path = str(Path(uri.removeprefix(SQLITE)).absolute())
        if set(path) & set("?#%"):
            raise UserError(
                f"tracking.uri={uri}: the database would be {path}, and a database URI cannot hold ?, # or %.",
                kind="tracking-store",
                remedies=["run in another folder", "tracking.uri=sqlite:////another/folder/mlflow.db"],
            )
        return SQLITE + path
    return uri
