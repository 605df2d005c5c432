"""The connection to an MLflow store: time limits, the lock of a database, errors with remedies.

The driver alone logs a cross-validation: workers write files, and the driver logs them. Several processes that open a
new SQLite store at once would break it. The run folder holds all that is logged of a cross-validation, so a lost server
loses nothing of it.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from alembic.util import CommandError
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from raycv.common.files import is_full, unwritable
from raycv.common.locations import SQLITE, absolute_uri
from raycv.common.retry import ATTEMPTS, ServiceError, call_with_retries, is_passing
from raycv.common.secrets import mask_secrets
from raycv.errors import UserError
from raycv.tracking.store_checks import LOCK_SECONDS, check_database, lock_of, place_of
from raycv.tracking.store_faults import REACHABLE, elsewhere, is_lasting, store_fault

# mlflow sets up its logger on import. Its lines about new tables do not help the user, so we hide them.
logging.getLogger("mlflow").setLevel(logging.WARNING)
# This logger prints the traceback of each error. We retry the call, or report the error in one line.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

T = TypeVar("T")

TIMEOUT, USUAL_SECONDS = "MLFLOW_HTTP_REQUEST_TIMEOUT", "30"
"""The value that `raycv/tracking/__init__.py` sets. MLflow reads it at each request."""
HANGING_SECONDS = 60.0
"""Seconds without requests to a store that let all attempts of a call time out: each call would wait as long."""
_hanging: dict[str, tuple[float, UserError]] = {}
"""For each such store: the moment at which requests start again, and the error to raise until then."""


class Store:
    """An MLflow store. Every call has at most three attempts (FR-011).

    Raises:
        UserError: From any method, if the store stays out of reach or the call fails.
    """

    def __init__(self, uri: str, seconds: int | None = None) -> None:
        """`seconds`, for callers that cannot wait, limits each HTTP request and lock; a call then has one attempt."""
        self._seconds = seconds
        self.uri = absolute_uri(uri)
        self.shown_uri = mask_secrets(self.uri)
        self.database = Path(self.uri.removeprefix(SQLITE)) if self.uri.startswith(SQLITE) else None
        if self.database:
            check_database(self.database, seconds)
        self.client = self.call("open the store", self.alone, partial(MlflowClient, tracking_uri=self.uri))

    def alone(self, call: Callable[[], T]) -> T:
        """Returns `call()` under a lock: two processes that make the tables of a SQLite file at once break the file."""
        seconds = self._seconds or LOCK_SECONDS
        with FileLock(lock_of(self.database), timeout=seconds) if self.database else contextlib.nullcontext():
            return call()

    def call(self, what: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        until, said = _hanging.get(self.uri, (0.0, None))
        if said is not None and time.monotonic() < until:
            raise UserError(said.what, kind=said.kinds, remedies=said.remedies)
        try:
            with _within(self._seconds):
                return call_with_retries(
                    f"MLflow at {self.shown_uri}: {what}",
                    partial(call, *args, **kwargs),
                    kind="tracking-unreachable",
                    passing=_may_pass,
                    remedies=[REACHABLE, elsewhere(self.uri)],
                    attempts=ATTEMPTS if self._seconds is None else 1,
                )
        except ServiceError as error:
            if "timed out" in str(error.cause):
                _hanging[self.uri] = time.monotonic() + HANGING_SECONDS, error
            raise
        except (MlflowException, SQLAlchemyError, CommandError, ImportError, OSError) as error:
            if is_full(error) and self.database:
                raise unwritable("What MLflow keeps", place_of(error, self.database), error) from error
            raise store_fault(what, self.shown_uri, error) from error


@contextlib.contextmanager
def _within(seconds: int | None) -> Iterator[None]:
    """Limits requests over HTTP to `seconds`, unless the user has set another time for them."""
    usual = os.environ[TIMEOUT]
    if seconds is not None and usual == USUAL_SECONDS:
        os.environ[TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        os.environ[TIMEOUT] = usual


def _may_pass(error: Exception) -> bool:
    """Whether a second attempt may succeed. The HTTP client wraps a lost connection into an MlflowException."""
    if is_full(error) or is_lasting(error):
        return False
    return is_passing(error) or (isinstance(error, MlflowException) and "Max retries exceeded" in str(error))
