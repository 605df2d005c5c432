"""Limits and forms of single values: the least share of a core or GPU, paths, store addresses, free text."""

import os
import re
from importlib.metadata import entry_points
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo

from raycv.common.locations import BUNDLED_SCHEME, SQLITE

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LEAST_SHARE = 0.01
"""Of a core or a GPU; Ray counts in steps of 1e-4."""


def check_share(value: float) -> float:
    if 0 < value < LEAST_SHARE:
        raise ValueError(f"must be 0, or {LEAST_SHARE} or more")
    return value


Share = Annotated[float, Field(ge=0), AfterValidator(check_share)]


def check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    return text


RECORDED = {"recorded": True}
"""Validation context of a config that a run wrote down: earlier versions made a local folder of any address."""
_ADDRESS = re.compile(r"[^/]+:\.{0,2}(/|\Z)")
"""An address: its first name ends in a colon, as in `s3://b`, `s3:/b` (what pathlib makes of it) and `file:./b`."""


def check_path(text: str, info: ValidationInfo) -> str:
    if _ADDRESS.match(text) and info.context != RECORDED:
        raise ValueError(
            "must be a path, and this is an address: mount that storage and name its folder here, or name a local or "
            "shared folder (one whose own name ends in a colon is written ./name:/...)"
        )
    # What is longer can on Linux neither be there nor be made: each look at it would be an error. Deeper folders are
    # more than Python can make.
    names = [len(os.fsencode(name)) for name in text.split("/")]
    if max(names) > 255 or len(names) > 256 or sum(names) + len(names) > 4096:
        raise ValueError("is too long for a path: 4,095 bytes, 255 between two slashes, and 255 slashes at most")
    return text


def check_location(text: str, info: ValidationInfo) -> str:
    return text if text.startswith(BUNDLED_SCHEME) else check_path(text, info)


def check_store(uri: str, info: ValidationInfo) -> str:
    try:
        scheme = urlsplit(uri).scheme
    except ValueError as error:
        raise ValueError(f"is no address ({error})") from error
    kind, _, driver = scheme.partition("+")
    if kind == "sqlite":
        file = uri.removeprefix(SQLITE)
        if file == uri:
            raise ValueError("a database in a file is written sqlite:///mlflow.db, or sqlite:////folder/mlflow.db")
        if not file or ":memory:" in file:
            raise ValueError("keeps nothing in memory: name a file, sqlite:///mlflow.db")
        return SQLITE + check_path(file, info)
    if any(character.isspace() for character in uri):
        raise ValueError("holds white space: write %20 for it (a space in a password too)")
    named = uri if uri in BARE else kind if "://" in uri else None
    if (named not in STORES or (driver and kind not in DATABASES)) and scheme not in entry_points(group=PLUGINS).names:
        raise ValueError("is no MLflow store: name a database, sqlite:///mlflow.db, or a server, http://host:5000")
    return uri


DATABASES = ("mssql", "mysql", "postgresql")
PLUGINS = "mlflow.tracking_store"
"""The entry points of further stores."""
BARE = ("databricks", "databricks-uc")
"""Stores whose name alone is an address."""
STORES = (*DATABASES, "http", "https", *BARE, "uc")
"""Schemes that MLflow has a store for, but for sqlite and plain folders, which it no longer supports."""

NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(check_text)]
PathText = Annotated[NonEmpty, AfterValidator(check_path)]
"""The path of a file or folder, or a name that is looked for in one: the type of every key that becomes a path."""
Location = Annotated[NonEmpty, AfterValidator(check_location)]
"""The same for what may also ship with raycv (raycv://...), or be an id on the hub."""
StoreAddress = Annotated[NonEmpty, AfterValidator(check_store)]
VERBATIM = "verbatim"
FreeText = Annotated[str, VERBATIM]
"""Text that the command line hands over as it stands, whatever it holds."""
