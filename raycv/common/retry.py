"""The one retry policy for the model hub and MLflow: how many attempts, which errors, how long the waits (FR-011)."""

import logging
import random
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

from raycv.common.secrets import mask_secrets
from raycv.errors import ErrorKind, UserError, counted

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Calls in total, the first one included (FR-011)."""
BASE_SECONDS = 1.0
"""Wait before the second attempt. It doubles before each further one, and jitter adds up to half of it."""
LONGEST_WAIT_SECONDS = 60.0

T = TypeVar("T")

# We compare names, so raycv recognises the errors of a client library without importing or installing it. The names are
# those of builtins, requests, urllib3, http.client and httpx.
_PASSING_NAMES = frozenset(
    {
        "ConnectionError",
        "TimeoutError",
        "Timeout",
        "ChunkedEncodingError",
        "ProtocolError",
        "MaxRetryError",
        "IncompleteRead",
        "TransportError",
    }
)
_PASSING_MLFLOW_CODES = frozenset({"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"})


class ServiceError(UserError):
    """A service failed at every attempt. `cause` is the error of the last one."""

    def __init__(self, what: str, cause: Exception, *, kind: ErrorKind, remedies: Sequence[str]) -> None:
        self.cause = cause
        super().__init__(what, kind=kind, remedies=remedies)


def call_with_retries(
    what: str,
    fn: Callable[[], T],
    *,
    kind: ErrorKind,
    remedies: Sequence[str],
    passing: Callable[[Exception], bool] | None = None,
    attempts: int = ATTEMPTS,
    base_seconds: float = BASE_SECONDS,
) -> T:
    """Calls `fn` up to `attempts` times (FR-011) and logs a warning for each attempt whose error can pass.

    Args:
        what: The call as a noun phrase, such as "the download of x".
        fn: The call.
        kind: The kind of the error if every attempt fails.
        remedies: Steps for the user if every attempt fails.
        passing: Tells whether an error can pass; the default is `is_passing`. A `UserError` cannot.
        attempts: Calls in total. With 1 a failure is not logged.
        base_seconds: Wait before the second attempt.

    Returns:
        The value that `fn` returns.

    Raises:
        ServiceError: The last attempt failed too. It holds the last cause and `remedies`.
        Exception: An error of `fn` that cannot pass, at once and unchanged.
    """
    import backoff

    can_pass = passing or is_passing

    def gives_up(error: Exception) -> bool:
        return isinstance(error, UserError) or not can_pass(error)

    def log(details: Any) -> None:
        logger.warning(
            "%s: attempt %d of %d failed (%s); the next one in %.1f s",
            *(mask_secrets(what), details["tries"], attempts, cause_of(details["exception"]), details["wait"]),
        )

    retrying = backoff.on_exception(
        _waits,
        Exception,
        max_tries=attempts,
        giveup=gives_up,
        jitter=_jittered,
        on_backoff=log,
        logger=None,
        base_seconds=base_seconds,
    )
    try:
        return retrying(fn)()
    except Exception as error:
        if gives_up(error):
            raise
        if attempts > 1:
            logger.warning("%s: attempt %d of %d failed (%s)", mask_secrets(what), attempts, attempts, cause_of(error))
        raise ServiceError(
            f"{mask_secrets(what)} failed {counted(attempts, 'time')}. The last cause: {cause_of(error)}",
            error,
            kind=kind,
            remedies=remedies,
        ) from error


def is_passing(error: BaseException) -> bool:
    """Whether the cause of `error` may pass: a lost connection, a timeout, HTTP 429 or 5xx, a busy MLflow.

    The first error in the chain of causes that allows a verdict decides. If no error does, the answer is False.
    """
    for link in _chain(error):
        # An untrusted certificate stays untrusted, and the user chose offline mode, so another attempt is useless.
        if "CERTIFICATE_VERIFY_FAILED" in str(link) or type(link).__name__ == "OfflineModeIsEnabled":
            return False
        status = status_of(link)
        if status is not None:
            return status == 429 or status >= 500
        code = getattr(link, "error_code", None)
        # MLflow reports INTERNAL_ERROR both for a lost connection and for its own faults, so the cause decides.
        if isinstance(code, str) and code != "INTERNAL_ERROR":
            return code in _PASSING_MLFLOW_CODES
        if any(base.__name__ in _PASSING_NAMES for base in type(link).__mro__):
            return True
    return False


def status_of(error: BaseException) -> int | None:
    """The HTTP status that `error` carries, as `error.response.status_code` or `error.status_code`; else None."""
    for holder in (getattr(error, "response", None), error):
        status = getattr(holder, "status_code", None)
        if isinstance(status, int):
            return status
    return None


def cause_of(error: BaseException, most: int = 300) -> str:
    """`error` as one line for a log or a message: without secrets, its text cut to about `most` characters."""
    text = mask_secrets(" ".join(without_statement(error).split()))
    if found := re.search(r"(\[Errno -?\d+\] [^'\")>]+|Read timed out[^'\")]*)", text):
        # The HTTP client wraps the fact in three layers of its own objects, so we take only that.
        text = found[1].rstrip()
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    name = type(error).__name__.lstrip("_")
    return f"{name}: {text}" if text else name


def without_statement(error: BaseException) -> str:
    """The text of `error` without the SQL statement, the parameters and the link that SQLAlchemy appends."""
    return re.split(r"\s*\[SQL: |\s*\(Background on this error", str(error), maxsplit=1)[0].strip()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, its cause, the cause of that, and so on, as a traceback shows them."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _waits(base_seconds: float) -> Generator[float, Any, None]:
    """Seconds before attempts 2, 3, 4, ...: the base times 1, 2, 4, ...

    If the server asks for a longer wait, that counts. The longest is LONGEST_WAIT_SECONDS, before jitter.
    """
    # backoff starts the generator with None and then sends each error, so the first value is not used.
    error = yield 0.0
    doubled = base_seconds
    while True:
        error = yield min(max(doubled, _asked_wait(error)), LONGEST_WAIT_SECONDS)
        doubled *= 2


def _asked_wait(error: object) -> float:
    """The Retry-After of the response (RFC 9110) in seconds; 0 if it is missing or a date."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    asked = str(headers.get("Retry-After", ""))
    return float(asked) if asked.isdigit() else 0.0


def _jittered(seconds: float) -> float:
    # backoff's own jitter draws from the global `random`, whose state belongs to the seeded run (FR-009).
    return seconds * random.SystemRandom().uniform(1.0, 1.5)
