"""The scorer's HTTP interface: bodies, limits, token, errors, OpenAPI page."""

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raycv import __version__
from raycv.config.schema import ServerConfig
from raycv.errors import ErrorKind, UserError
from raycv.inference.questions import Question
from raycv.serving.messages import Served, ServedModel

logger = logging.getLogger(__name__)

PAGE_FILES = "/static"
OPEN_PATHS = ("/docs", "/openapi.json", f"{PAGE_FILES}/")
"""Beginnings of paths that need no token: they show nothing of a model or a post, and a browser has no token."""

BODY_SECONDS = 30.0
"""Limit for a whole body. A client that sends half of one and waits would hold a place in the queue for ever."""

ALONE = (
    "compute this request alone, not with others that arrive at the same time: the same scores whenever it is "
    "asked, for more time. Else they move with what is computed beside them: by 1e-6 in fp32, by some 1e-4 in bf16, "
    "which can flip the label of a score at the threshold"
)


class Overloaded(Exception):  # noqa: N818
    """More requests wait than `serve.max_queued` allows."""


class TooManyPairsError(UserError):
    """A request asks for more pairs than `serve.max_pairs` allows."""


class Scores(Protocol):
    """The scorer behind the interface."""

    async def score(self, questions: Sequence[Question], log: bool, alone: bool) -> dict[str, Any]:
        """Answers `questions`; `log` keeps the inference in MLflow, `alone` computes no other request with it.

        Returns:
            The body of the response: answers, criteria, model, warnings.

        Raises:
            UserError: A question cannot be answered.
            TooManyPairsError: The request asks for too many pairs.
            Overloaded: Too many requests wait.
        """

    def health(self) -> dict[str, Any]:
        """The model, the time since its start, and the counts of its work."""


@dataclass(frozen=True)
class Scored(Served):
    """`answers` has a list for each pair: one answer, or one for each of the run's criteria if the pair names none."""

    model: ServedModel


class Refused(BaseModel):
    """The fault of a request, its kind, and the remedies for it."""

    error: str
    kind: Annotated[ErrorKind, Field(description="the stable short name of what went wrong")]
    remedies: list[str]


def build_api(scorer: Scores, limits: ServerConfig) -> FastAPI:
    """The application. `limits` holds the token too."""
    text = Annotated[str, Field(max_length=limits.max_post_characters)]
    logged = Annotated[bool, Field(description="keep the inference in MLflow, without its text")]
    by_itself = Annotated[bool, Field(description=ALONE)]

    class Pair(BaseModel):
        """A post and a criterion: its id, symptom name or any words. Without one, each of the run's criteria."""

        model_config = ConfigDict(extra="forbid", strict=True)
        post: text
        criterion: text | None = None

    class OnePair(Pair):
        """One pair."""

        log: logged = False
        alone: by_itself = False

    class ManyPairs(BaseModel):
        """Many pairs at once. Pairs of one post share its computation."""

        model_config = ConfigDict(extra="forbid", strict=True)
        pairs: Annotated[list[Pair], Field(min_length=1, max_length=limits.max_pairs)]
        log: logged = False
        alone: by_itself = False

    body_kind = Annotated[
        Annotated[OnePair, Tag("one")] | Annotated[ManyPairs, Tag("many")], Discriminator(_kind_of_body)
    ]
    known = {"body", "pairs", *OnePair.model_fields}
    refusals: dict[int | str, dict[str, Any]] = {code: {"model": Refused} for code in (400, 401, 413, 422, 503)}

    # A node that holds such posts often has no web access, so the scripts of the page come from the package.
    app = FastAPIOffline(
        title="raycv scorer", version=__version__, responses=refusals, redoc_url=None, static_url=PAGE_FILES
    )
    app.add_middleware(Gate, token=limits.token, most_bytes=limits.max_body_bytes)

    @app.post("/score", response_model=Scored)
    async def score(body: body_kind) -> JSONResponse:
        """Matched or unmatched, for one pair or many. A research tool, not for diagnosis."""
        pairs = body.pairs if isinstance(body, ManyPairs) else [body]
        questions = [Question(pair.post, pair.criterion) for pair in pairs]
        try:
            # The tests check the shape of the answer, so pydantic need not check it at every request.
            return JSONResponse(await scorer.score(questions, body.log, body.alone))
        except (UserError, Overloaded):
            raise
        except Exception as error:  # noqa: BLE001  (its message, which the server would log, may hold a text)
            logger.error("a request failed: %s at %s", type(error).__name__, _origin(error))
            return refusal(500, f"The scorer failed: {type(error).__name__}.", "scorer-failed", ["see its log"])

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """The model that answers, the time since its start, and the counts of its work."""
        return scorer.health()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if "json" not in request.headers.get("content-type", ""):
            remedies = ["send the header Content-Type: application/json", "see the page /docs"]
            return refusal(422, "The body is not said to be JSON.", "scorer-request", remedies)
        faults = "; ".join(_told(fault, known) for fault in error.errors()[:20])
        return refusal(422, f"The body cannot be read: {faults}", "scorer-request", ["see the page /docs"])

    app.add_exception_handler(HTTPException, _http_refusal)
    app.add_exception_handler(Overloaded, _overloaded)
    app.add_exception_handler(UserError, _user_error)
    return app


def refusal(
    status: int, error: str, kind: ErrorKind, remedies: Sequence[str], headers: dict[str, str] | None = None
) -> JSONResponse:
    """`error`, `kind` and `remedies` in the form of every refusal of the scorer."""
    return JSONResponse({"error": error, "kind": kind, "remedies": list(remedies)}, status, headers)


def _kind_of_body(value: Any) -> str:
    return "many" if isinstance(value, dict) and "pairs" in value else "one"


def _told(fault: dict[str, Any], known: set[str]) -> str:
    if fault["type"] == "json_invalid":
        return f"it is not JSON from character {fault['loc'][-1]} on"
    return f"{_place(fault['loc'], known)}: {fault['msg']}"


def _place(loc: Sequence[int | str], known: set[str]) -> str:
    """The place of a fault in the body. It never names an unknown key, because that may be a text."""
    parts = [str(part) if isinstance(part, int) or part in known else "(unknown key)" for part in loc]
    return ".".join(part for part, raw in zip(parts, loc, strict=True) if raw not in ("one", "many", "body")) or "body"


async def _http_refusal(_: Request, error: Any) -> JSONResponse:
    # The detail comes from starlette or from raycv, never from the client, so it holds no text of a post.
    return refusal(error.status_code, str(error.detail), "scorer-request", ["see the page /docs"], error.headers)


async def _overloaded(_: Request, error: Exception) -> JSONResponse:
    what, remedies = "The scorer has too many requests waiting.", ["try again in a moment"]
    return refusal(503, what, "scorer-unavailable", remedies, {"Retry-After": "1"})


async def _user_error(_: Request, error: Any) -> JSONResponse:
    status = 413 if isinstance(error, TooManyPairsError) else 400
    return refusal(status, error.what, error.kind, error.remedies)


def _origin(error: BaseException) -> str:
    """File and line that raised `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"


class Gate:
    """Checks the token before anything reads the body, and limits the size and the time of the body."""

    def __init__(self, app: ASGIApp, token: str | None, most_bytes: int, body_seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._body_seconds = body_seconds
        self._token = token
        self._most = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refusal(scope)
        if refused is not None:
            await refused(scope, receive, send)
            return
        seen, whole = 0, False
        ends = time.monotonic() + self._body_seconds

        async def counted() -> Message:
            nonlocal seen, whole
            # After the body only the end of the connection can come, so that wait has no limit.
            try:
                message = await asyncio.wait_for(receive(), None if whole else max(0.0, ends - time.monotonic()))
            except TimeoutError:
                raise HTTPException(408, f"The body did not come within {self._body_seconds:g} seconds.") from None
            whole = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, f"The body has more than {self._most} bytes.")
            return message

        await self._app(scope, counted, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        if self._token and not scope["path"].startswith(OPEN_PATHS):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given, self._token.encode()) or scheme.lower() != b"bearer":
                what, remedies = "The token is missing or wrong.", ["send Authorization: Bearer <token>"]
                return refusal(401, what, "scorer-request", remedies, {"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._most:
            what = f"The body has more than {self._most} bytes."
            return refusal(413, what, "scorer-request", ["send fewer pairs at a time"])
        return None
