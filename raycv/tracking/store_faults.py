"""Why an MLflow store cannot be used, in words: what the error of a call means, and what to do about it."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from alembic.script import ScriptDirectory

from raycv.common.locations import SQLITE
from raycv.common.retry import without_statement
from raycv.common.secrets import mask_secrets
from raycv.errors import ErrorKind, UserError

NO_ENTRY = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")
LOG_IN = (
    "log in: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), "
    "or write user:password@ before the host in tracking.uri; the user must have the right to do this"
)
REACHABLE = "see that the tracking server or database can be reached and written (tracking.uri)"
_DATABRICKS = (
    "install its client, and log in: pip install databricks-sdk, then set DATABRICKS_HOST and DATABRICKS_TOKEN",
    "name the experiment by its folder in the workspace: tracking.experiment=/Users/<you>/raycv",
)
_OTHER = "the server does not answer as MLflow does"
_CORRECT = (
    "open {uri} in a browser: if MLflow is not there, correct tracking.uri to http://host:port, followed by the path "
    "of MLflow if it has one"
)
_ANSWERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "was successful.*(<!doctype html|<html)",
        "the server answers with a web page, as a login page in front of MLflow does",
        (LOG_IN, "where a proxy has that page, ask its administrator for a MLFLOW_TRACKING_TOKEN", _CORRECT),
    ),
    ("was successful", _OTHER, (_CORRECT,)),
    (
        "Invalid Host header",
        "the server takes no requests under the name {host}",
        ("start it with this name: mlflow server --allowed-hosts {host}",),
    ),
    ("to HTTPS port", "the server speaks HTTPS at this port", ("tracking.uri=https{rest}",)),
    ("WRONG_VERSION_NUMBER", "the server does not speak HTTPS at this port", ("tracking.uri=http{rest}",)),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the certificate of the server is not one that this machine trusts",
        ("set MLFLOW_TRACKING_SERVER_CERT_PATH to the file of the certificate that signed it",),
    ),
    (
        "error code 407|407 Proxy",
        "a proxy of this machine wants a login (HTTP 407)",
        (
            "write user:password@ before the host of the proxy in HTTP_PROXY and HTTPS_PROXY",
            "or leave the proxy out for this server: NO_PROXY={name}",
        ),
    ),
    (
        "error code 413|413 Client Error",
        "a proxy in front of MLflow takes no uploads of this size (HTTP 413)",
        ("raise its limit, which nginx calls client_max_body_size",),
    ),
    (
        "error code 40[45].*(<!doctype html|<html)",
        "the server answers with a web page that says an error, so MLflow is not at this address",
        (_CORRECT,),
    ),
)
"""For each known answer of a server: its pattern, what it means, and remedies. MLflow itself answers with JSON."""


def store_fault(what: str, uri: str, error: BaseException) -> UserError:
    """The error to raise for a call that failed.

    Args:
        what: The call as an infinitive, such as "open the store".
        uri: The address of the store, with its password masked.
        error: The error of the call.
    """
    text = mask_secrets(without_statement(error))
    why, remedies, kind = _explained(text, getattr(error, "error_code", None), uri)
    return UserError(f"MLflow at {uri} could not {what}: {why}", kind=kind, remedies=[*remedies, elsewhere(uri)])


def elsewhere(uri: str) -> str:
    """The remedy of another store than that at `uri`."""
    return f"or track into a local file: tracking.uri={SQLITE}{'new' if uri.startswith(SQLITE) else 'mlflow'}.db"


def is_lasting(error: BaseException) -> bool:
    """Whether the answer of a server is known, so that another attempt would not change it."""
    return any(_matches(pattern, str(error)) for pattern, _, _ in _ANSWERS)


def not_mlflow(uri: str) -> UserError:
    """The error for a server that answers with JSON of another kind."""
    return UserError(
        f"MLflow at {uri} cannot be used: {_OTHER}.",
        kind="tracking-unreachable",
        remedies=[_CORRECT.format(uri=uri), elsewhere(uri)],
    )


def _explained(text: str, code: str | None, uri: str) -> tuple[str, list[str], ErrorKind]:
    """The meaning of an error's text, its remedies and its kind."""
    if "out-of-date database schema" in text:
        return _schema(text, uri)
    if uri.startswith("databricks"):
        # The rest of MLflow's text is a paragraph about profiles.
        return f"{text.partition('. ')[0]}.", [*_DATABRICKS], "tracking-unreachable"
    address = urlsplit(uri)
    host = address.netloc.rpartition("@")[2]
    names = {"uri": uri, "host": host, "name": address.hostname, "rest": uri.removeprefix(address.scheme)}
    for pattern, why, remedies in _ANSWERS:
        if _matches(pattern, text):
            return f"{why.format(**names)}.", [remedy.format(**names) for remedy in remedies], "tracking-unreachable"
    return text, [LOG_IN if code in NO_ENTRY else REACHABLE], "tracking-unreachable"


def _matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE | re.DOTALL) is not None


def _schema(text: str, uri: str) -> tuple[str, list[str], ErrorKind]:
    """MLflow calls any other schema out of date, and a newer one too."""
    found = re.search(r"found version (\S+),", text)
    folder = Path(mlflow.__file__).parent / "store" / "db_migrations"
    known = {script.revision for script in ScriptDirectory(str(folder)).walk_revisions()}
    if found and found[1] not in (*known, "None"):
        serve = f"mlflow server --backend-store-uri {uri}, and here tracking.uri=http://127.0.0.1:5000"
        why = f"a newer MLflow than {mlflow.__version__} made or upgraded it (its schema {found[1]} is not known here)."
        return why, [
            "install that version of MLflow here: pip install --upgrade mlflow",
            f"or serve it with the newer MLflow: {serve}",
        ], "tracking-store"  # fmt: skip
    why = f"{text.partition(' Take a backup')[0]} An older MLflow made it."
    return why, [f"keep a copy of the database, then: mlflow db upgrade {uri}"], "tracking-store"
