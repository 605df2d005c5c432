"""Forms of values that several keys share: shares of cores and GPUs, paths, store addresses, free text."""

import os
import re
from importlib.metadata import entry_points
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo

from raycv.common.locations import BUNDLED_SCHEME, OBJECT_STORAGE, SQLITE

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LEAST_SHARE = 0.01
"""The smallest share of a core or a GPU. Ray counts in steps of 1e-4."""


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
"""Validation context for the config of an earlier run. Earlier versions took any address for a local folder."""
_ADDRESS = re.compile(r"[^/]+:\.{0,2}(/|\Z)")
"""An address, whose first name ends in a colon: `s3://b`, `file:./b`, or `s3:/b`, which pathlib makes of the first."""


def check_path(text: str, info: ValidationInfo) -> str:
    if _ADDRESS.match(text) and info.context != RECORDED:
        raise ValueError(
            "must be a path, and this is an address: mount that storage and name its folder here, or name a local or "
            "shared folder (one whose own name ends in a colon is written ./name:/...)"
        )
    # Linux has no longer paths, so each look at one would be an error. Python cannot make deeper folders.
    names = [len(os.fsencode(name)) for name in text.split("/")]
    if max(names) > 255 or len(names) > 256 or sum(names) + len(names) > 4096:
        raise ValueError("is too long for a path: 4,095 bytes, 255 between two slashes, and 255 slashes at most")
    return text


def check_location(text: str, info: ValidationInfo) -> str:
    return text if text.startswith(BUNDLED_SCHEME) else check_path(text, info)


_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/(?!\.{1,2}(/|\Z))[\w.=@+-]+)*/?", re.ASCII)


def check_runs_place(text: str, info: ValidationInfo) -> str:
    if not text.startswith(OBJECT_STORAGE):
        return check_path(text, info)
    if _BUCKET.fullmatch(text) is None and info.context != RECORDED:
        raise ValueError(
            "is not an address of an object storage: write s3://bucket/folder, with letters, digits and . _ - = @ + in "
            "the folder's name"
        )
    return text


def check_store(uri: str, info: ValidationInfo) -> str:
    try:
        scheme = urlsplit(uri).scheme
    except ValueError as error:
        raise ValueError(f"is not an address ({error})") from error
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
    if kind in ("http", "https") and "#" in uri:
        raise ValueError("is the address of a page: name the server alone, http://host:5000 (%23 is a # in a password)")
    named = uri if uri == "databricks" else kind if "://" in uri else None
    if (named not in STORES or (driver and kind not in DATABASES)) and scheme not in entry_points(group=PLUGINS).names:
        raise ValueError("is not an MLflow store: name a database, sqlite:///mlflow.db, or a server, http://host:5000")
    return uri


DATABASES = ("mssql", "mysql", "postgresql")
PLUGINS = "mlflow.tracking_store"
"""The group of entry points under which plugins add further stores."""
STORES = (*DATABASES, "http", "https", "databricks")
"""Schemes for which MLflow has a store, without sqlite, which has its own check. MLflow no longer supports folders, and
the stores of Unity Catalog hold models alone."""

NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(check_text)]
PathText = Annotated[NonEmpty, AfterValidator(check_path)]
"""The path of a file or folder, or a name in a folder. Every key that becomes a path has this type."""
RunsPlace = Annotated[NonEmpty, AfterValidator(check_runs_place)]
"""The folder that holds the runs: a path, or an address in an object storage (s3://...)."""
Location = Annotated[NonEmpty, AfterValidator(check_location)]
"""The same for a file that may also ship with raycv (raycv://...), or be an id on the hub."""
StoreAddress = Annotated[NonEmpty, AfterValidator(check_store)]
VERBATIM = "verbatim"
FreeText = Annotated[str, VERBATIM]
"""Text that the command line passes on unchanged, with any characters."""
