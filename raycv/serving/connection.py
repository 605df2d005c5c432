"""One HTTP connection to a scorer: requests, timeouts, token. Does not use proxies."""

import json
import re
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from raycv.common.files import record_of
from raycv.errors import ErrorKind, UserError, known_kind
from raycv.serving.messages import Health

TOKEN_VARIABLE = "RAYCV_TOKEN"
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 300.0
OVERLOADED = 503
REFUSED_INPUT = (400, 413, 422)
NO_SCORER = "not as a scorer does"
HOST = re.compile(r"[\w.:-]+")


class Unavailable(Exception):  # noqa: N818
    """A scorer cannot answer now. The message gives the reason, without any text of a request."""


class RefusedError(UserError):
    """A scorer refuses the input. `status` is that of its answer."""

    def __init__(self, status: int, what: str, *, kind: ErrorKind, remedies: Sequence[str]) -> None:
        self.status = status
        super().__init__(what, kind=kind, remedies=remedies)


def checked_address(server: str) -> str:
    """`server` as http://host:port. Raises: UserError if it is not such an address."""
    try:
        parts = urlsplit(server)
        known = parts.scheme in ("http", "https") and not parts.username
        usable = known and parts.hostname is not None and HOST.fullmatch(parts.hostname)
        port = parts.port
    except ValueError:
        usable, port = False, None
    if not usable:
        remedies = ["server=http://127.0.0.1:8000", "server=auto, server=none"]
        raise UserError(
            "server: must be auto, none, or an address like http://host:port.", kind="config-value", remedies=remedies
        )
    return f"{parts.scheme}://{parts.netloc if port else parts.netloc.removesuffix(':')}"


def checked_token(token: str | None) -> str | None:
    """`token`, or None if it is empty. Raises: UserError, without the token, if it is not a valid one."""
    if not token:
        return None
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{TOKEN_VARIABLE}: a token must have 16 or more ASCII characters and no spaces; this one does not.",
            kind="config-value",
            remedies=["this makes one: python -c 'import secrets; print(secrets.token_urlsafe())'"],
        )
    return token


class Connection:
    """One HTTP connection, kept for several requests.

    Raises:
        Unavailable: From any method, if there is no usable answer.
        ConnectionRefusedError: From any method, if nothing listens at the address.
    """

    def __init__(self, address: str, token: str | None) -> None:
        parts = urlsplit(address)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._http = kind(str(parts.hostname), parts.port, timeout=CONNECT_SECONDS)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`."""
        return self._expect(200, *self.send("GET", path))

    def health(self) -> Health:
        """The scorer's description of the model that answers."""
        try:
            return record_of(Health, self.get("/health"))
        except ValueError as error:
            raise Unavailable(NO_SCORER) from error

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that `path` returns for `body`. Raises: RefusedError if the scorer refuses the input."""
        status, answer = self.send("POST", path, body)
        if status in REFUSED_INPUT and isinstance(answer.get("error"), str):
            given = answer.get("remedies")
            remedies = [str(remedy) for remedy in given] if isinstance(given, list) else []
            kind = known_kind(answer.get("kind"), "scorer-request")
            raise RefusedError(status, answer["error"], kind=kind, remedies=remedies)
        return self._expect(200, status, answer)

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON object of the answer. The object is empty if the answer is not a JSON object."""
        data = None if body is None else json.dumps(body).encode("ascii")
        try:
            if self._http.sock is None:
                self._http.connect()
            self._http.sock.settimeout(ANSWER_SECONDS if method == "POST" else CONNECT_SECONDS)
            self._http.request(method, path, data, {"Content-Type": "application/json", **self._headers})
            response = self._http.getresponse()
            text = response.read()
        except ConnectionRefusedError:
            raise
        except TimeoutError as error:
            raise Unavailable("it takes too long; it may be busy, or starting again") from error
        except (OSError, HTTPException, ValueError, OverflowError) as error:
            # http.client raises the last two for an impossible length.
            raise Unavailable(type(error).__name__) from error
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = {}
        return response.status, answer if isinstance(answer, dict) else {}

    @staticmethod
    def _expect(wanted: int, status: int, answer: dict[str, Any]) -> dict[str, Any]:
        if status == OVERLOADED:
            raise Unavailable("it is overloaded (503)")
        if status == 401:
            raise Unavailable("it asks for a token (401)")
        if status != wanted or not answer:
            raise Unavailable(f"it answered {status}, and {NO_SCORER}")
        return answer
