"""The way of `raycv.infer` to a resident scorer (raycv.serve): finds one that has the model asked for, and asks it.

Imports nothing heavy, knows no proxies: a client starts in a fraction of what a model takes to load.
"""

import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raycv.answers import Answer, Question
from raycv.base import absolute_name
from raycv.checkpoint import MANIFEST
from raycv.config import Fraction, InferConfig
from raycv.errors import UserError
from raycv.inference_log import NOT_TRACKED, store_of
from raycv.paths import absolute_folder, absolute_uri
from raycv.records import Criterion
from raycv.retry import mask_secrets
from raycv.runs import LATEST, LOCAL_URI, Chosen, choose

AUTO = "auto"
IN_PROCESS = "none"
TOKEN_VARIABLE = "RAYCV_TOKEN"
PATTERN = ".scorer-*.json"
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 300.0
OVERLOADED = 503
REFUSED_INPUT = (400, 413, 422)
NO_SCORER = "not as a scorer does"
TOO_LARGE = (413, 422)
"""Of REFUSED_INPUT: what a scorer's limits refuse, and this process may compute."""
HOST = re.compile(r"[\w.:-]+")

Tell = Callable[[str], None]


class ServedModel(BaseModel):
    """What a scorer says of its model."""

    named: str
    """the run, as its folder is named"""
    run: str
    fold: int | str
    fold_asked: int | str
    base: str
    checkpoints: list[str]
    precision: str
    precision_of_auto: str
    """what `infer.precision=auto` would be in a process on the scorer's machine"""
    criteria_dir: str | None
    device: str | None = None
    """cpu or cuda; earlier versions did not say"""
    parent_id: str | None = None
    """of the run in MLflow"""
    fold_id: str | None = None
    """and of the fold"""
    base_given: str | None = None
    """where the base model lies, if not where training found it"""
    finished: str | None = None
    """when the run was complete, if that is known"""


class Health(BaseModel):
    """The part of GET /health that a client needs."""

    instance: str
    model: ServedModel


class ServedIdentity(BaseModel):
    """`model` of an answer."""

    run: str
    fold: int | str
    base: str
    finished: str | None = None


class ServedAnswer(BaseModel):
    """An answer, to tell a scorer's from another program's."""

    model_config = ConfigDict(extra="forbid", strict=True)
    label: Literal["matched", "unmatched"]
    score: Fraction
    threshold: Fraction
    criterion_id: str | None
    model: ServedIdentity
    truncated: bool


class Served(BaseModel):
    """The part of POST /score that a client needs."""

    model_config = ConfigDict(strict=True)
    answers: list[Annotated[list[ServedAnswer], Field(min_length=1)]]
    criteria: dict[str, str | None]
    warnings: list[str]


class Announcement(BaseModel):
    """What a scorer writes down for clients to find it by."""

    url: str
    token: str | None
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    host: str
    instance: str
    stamps: dict[str, list[int]]
    """of the files that it answers from, before they were loaded"""
    tracking_uri: str | None
    """where it logs, without a password; None: nowhere"""
    experiment: str
    model: ServedModel


@dataclass(frozen=True)
class Reply:
    """What a scorer answered."""

    answers: list[list[Answer]]
    """of each question"""
    criteria: dict[str, Criterion]
    """the run's, without their wording"""


class Unavailable(Exception):  # noqa: N818
    """A scorer that cannot answer now. Says why, without any text of a request."""


class RefusedError(UserError):
    """A scorer refuses the input. `status`: of its answer."""

    def __init__(self, status: int, what: str, *, remedies: Sequence[str]) -> None:
        self.status = status
        super().__init__(what, remedies=remedies)


def stamps_of(files: Iterable[Path]) -> dict[str, list[int]]:
    """What no copy over a file leaves as it was, by its path. Raises: OSError if a file cannot be read."""
    return {str(path): _stamp(path) for path in files}


def _stamp(path: Path) -> list[int]:
    """The time of change, the size, the number."""
    status = path.stat()
    return [status.st_ctime_ns, status.st_size, status.st_ino]


def ask(config: InferConfig, questions: Sequence[Question], tell: Tell) -> Reply | None:
    """The answers of a scorer, or None where this process is to compute them.

    Raises: UserError if the scorer that `config` names cannot be reached or has another model, or refuses a question.
    """
    if config.server == IN_PROCESS:
        return None
    if config.server == AUTO:
        return _ask_found(config, questions, tell)
    address, token = checked_address(config.server), checked_token(os.environ.get(TOKEN_VARIABLE))
    try:
        with Connection(address, token) as connection:
            _check_model(config, connection.health().model)
            return _ask(connection, config, questions, tell)
    except (Unavailable, ConnectionRefusedError) as error:
        raise UserError(
            f"server={address}: the scorer there cannot answer: {error}.",
            remedies=[
                "see that it runs, and on that port: python -m raycv.serve",
                f"if it asks for a token, set the environment variable {TOKEN_VARIABLE} to that",
                "compute in this process: server=none",
            ],
        ) from error


def discovery_file(runs: Path, port: int) -> Path:
    """Where a scorer of `runs` says how it is reached."""
    return runs.absolute() / PATTERN.replace("*", str(port))


def checked_address(server: str) -> str:
    """`server` as http://host:port. Raises: UserError if it is no such address."""
    try:
        parts = urlsplit(server)
        known = parts.scheme in ("http", "https") and not parts.username
        usable = known and parts.hostname is not None and HOST.fullmatch(parts.hostname)
        port = parts.port
    except ValueError:
        usable, port = False, None
    if not usable:
        remedies = ["server=http://127.0.0.1:8000", "server=auto, server=none"]
        raise UserError("server: must be auto, none, or an address like http://host:port.", remedies=remedies)
    return f"{parts.scheme}://{parts.netloc if port else parts.netloc.removesuffix(':')}"


def checked_token(token: str | None) -> str | None:
    """`token`, or None if it is empty. Raises: UserError if it is no token; it is not repeated."""
    if not token:
        return None
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{TOKEN_VARIABLE}: a token has 16 or more ASCII characters, without spaces; this one is none.",
            remedies=["this makes one: python -c 'import secrets; print(secrets.token_urlsafe())'"],
        )
    return token


class Connection:
    """One HTTP connection, kept for several requests. Raises (any method): Unavailable if there is no answer."""

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
        """Which model answers."""
        try:
            return Health.model_validate(self.get("/health"))
        except ValidationError as error:
            raise Unavailable(NO_SCORER) from error

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What `path` makes of `body`. Raises: RefusedError if it refuses the input."""
        status, answer = self.send("POST", path, body)
        if status in REFUSED_INPUT and isinstance(answer.get("error"), str):
            given = answer.get("remedies")
            remedies = [str(remedy) for remedy in given] if isinstance(given, list) else []
            raise RefusedError(status, answer["error"], remedies=remedies)
        return self._expect(200, status, answer)

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON object of the answer; an empty one where the answer is none."""
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
            # The last two: http.client's, over lengths that are none.
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


def _ask(connection: Connection, config: InferConfig, questions: Sequence[Question], tell: Tell) -> Reply:
    # Alone: the same bytes as from this process, whatever else the scorer is asked meanwhile.
    body = {"pairs": [asdict(question) for question in questions], "log": config.tracking.uri != NOT_TRACKED}
    answer = connection.post("/score", body | {"alone": True})
    try:
        served = Served.model_validate(answer)
    except ValidationError as error:
        raise Unavailable(NO_SCORER) from error
    if len(served.answers) != len(questions):
        raise Unavailable(NO_SCORER)
    for warning in served.warnings:
        tell(warning)
    # As they came: what is printed is their very digits, in their order.
    return Reply(answer["answers"], {key: Criterion(key, "", symptom) for key, symptom in served.criteria.items()})


def _check_model(config: InferConfig, model: ServedModel) -> None:
    """Raises: UserError if the scorer's model is not the one asked for; `run=latest fold=best` takes what it has."""
    whatever = config.run == LATEST and config.fold in ("best", model.fold, model.fold_asked)
    if not whatever and not _is_named(config, model):
        raise UserError(
            f"server={config.server}: the scorer has run {model.named}, fold {model.fold}, "
            f"not run={config.run} fold={config.fold}.",
            remedies=["leave run and fold out, and take what it has", "compute in this process: server=none"],
        )
    if config.infer.precision not in (AUTO, model.precision):
        raise UserError(
            f"infer.precision={config.infer.precision}: the scorer at {config.server} computes in {model.precision}.",
            remedies=["leave infer.precision out", "compute in this process: server=none"],
        )
    own = {"criteria_dir": config.criteria_dir, "base": config.base, "tracking.uri": _store(config)}
    given = [key for key, value in own.items() if value]
    if given:
        raise UserError(
            f"{given[0]}: is the scorer's own at {config.server}.",
            remedies=[f"give it where the scorer starts: python -m raycv.serve {given[0]}=...", "server=none"],
        )


def _store(config: InferConfig) -> str | None:
    return None if config.tracking.uri == NOT_TRACKED else config.tracking.uri


def _is_named(config: InferConfig, model: ServedModel) -> bool:
    path = Path(config.run)
    # The path of a folder that is here says more than its name: other folders hold runs too.
    by_name = path.name == config.run or not path.is_dir()
    if by_name and path.name in (model.named, model.run):
        return config.fold in (model.fold, model.fold_asked)
    if config.run == LATEST:
        return False
    # An MLflow id, or a checkpoint folder.
    return _is_tracked_as(config, model) or _same_files(
        choose(config.run, config.fold, Path(config.dir), _store(config)), model
    )


def _is_tracked_as(config: InferConfig, model: ServedModel) -> bool:
    """Whether `run` and `fold` name the scorer's model by MLflow's id of its run or its fold: MLflow is not loaded."""
    if config.run == model.parent_id:
        return config.fold in (model.fold, model.fold_asked)
    return config.run == model.fold_id and config.fold in ("best", model.fold)


def _same_files(chosen: Chosen, model: ServedModel) -> bool:
    return [str(folder) for folder in chosen.checkpoints] == model.checkpoints


def _ask_found(config: InferConfig, questions: Sequence[Question], tell: Tell) -> Reply | None:
    given = Path(config.run).absolute()
    # A run that was given by its place, or a checkpoint of it, lies where its scorer may have announced itself.
    folders = dict.fromkeys([Path(config.dir).absolute(), *(given.parents[:3] if given.is_dir() else ())])
    try:
        files = [file for folder in folders for file in sorted(folder.glob(PATTERN))]
    except OSError:
        # Who then looks for the run in there says so.
        return None
    found = [(file, record) for file in files if (record := _read(file)) is not None]
    if not found:
        return None
    same, chosen = _with_model(found, config)
    if not same:
        # Who started a scorer would wonder why it takes so long.
        others = ", ".join(f"run {record.model.named} at {record.url}" for _, record in found)
        tell(f"no scorer has what answers here (there is that of {others}): computing in this process")
    reasons = []
    for file, record in same:
        why = _difference(record, chosen, config)
        try:
            if why is None:
                return _ask_announced(record, config, questions, tell)
        except ConnectionRefusedError:
            _remove(file)
            why = "is gone"
        except Unavailable as error:
            why = f"cannot answer ({error})"
        except RefusedError as error:
            if error.status not in TOO_LARGE:
                raise
            why = "takes no question as large as this"
        reasons.append(f"the scorer at {record.url} {why}")
    if reasons:
        tell(f"{'; '.join(reasons)}: computing in this process")
    return None


def _ask_announced(record: Announcement, config: InferConfig, questions: Sequence[Question], tell: Tell) -> Reply:
    with Connection(record.url, record.token) as connection:
        # The port may be another program's by now, which is to get no post.
        if connection.health().instance != record.instance:
            raise Unavailable("another program answers on its port")
        return _ask(connection, config, questions, tell)


def _with_model(
    found: Sequence[tuple[Path, Announcement]], config: InferConfig
) -> tuple[list[tuple[Path, Announcement]], Chosen | None]:
    """Those of `found` that have what this process would load, and what that is; None if an MLflow id names them."""
    named = [each for each in found if _is_tracked_as(config, each[1].model)]
    if named:
        return named, None
    chosen = choose(config.run, config.fold, Path(config.dir), _store(config))
    return [each for each in found if _same_files(chosen, each[1].model)], chosen


def _read(file: Path) -> Announcement | None:
    """What `file` says of a scorer that may be alive; None if it is of no use, and a dead one's is removed."""
    try:
        status = file.stat()
        # Someone else's file could send posts anywhere.
        if status.st_uid != os.getuid() or status.st_mode & 0o077 or not stat.S_ISREG(status.st_mode):
            return None
        record = Announcement.model_validate_json(file.read_text(encoding="utf-8"))
        checked_address(record.url)
        checked_token(record.token)
        if record.host != socket.gethostname():
            return None
        os.kill(record.pid, 0)
    except ProcessLookupError:
        _remove(file)
        return None
    except (OSError, ValueError, UserError):
        return None
    return record


def _remove(file: Path) -> None:
    """Of a scorer that is gone; in a folder that others share it may have to stay."""
    with suppress(OSError):
        file.unlink()


def _difference(record: Announcement, chosen: Chosen | None, config: InferConfig) -> str | None:
    """Why the scorer, which has the right checkpoints, would answer otherwise than this process; None if it would not.

    `chosen`: what this process would load; None if MLflow's id names the scorer's run.
    """
    model = record.model
    if chosen is not None and chosen.finished != model.finished:
        return "does not know when its run finished, and has to be started again"
    tracked = chosen.tracking_uri if chosen is not None else _store(config) or LOCAL_URI
    if not model.checkpoints or any(str(Path(folder, MANIFEST)) not in record.stamps for folder in model.checkpoints):
        return "does not say which files it answers from"
    if (changed := first_changed(record.stamps)) is not None:
        return f"started before {changed} changed, and has to be started again"
    if config.infer.device == "cpu" and model.device != "cpu":
        return f"computes on {model.device or 'a device that it does not name'}, and asked for is the CPU"
    asked = model.precision_of_auto if config.infer.precision == AUTO else config.infer.precision
    if asked != model.precision:
        return f"computes in {model.precision}, and asked for is {asked}"
    if (config.criteria_dir and absolute_folder(config.criteria_dir)) != model.criteria_dir:
        return "has other criteria (criteria_dir)"
    if config.base is not None and absolute_name(config.base) != (model.base_given or model.base):
        return "has its base model from elsewhere (base)"
    store = store_of(config.tracking.uri, tracked)
    if store is not None and (mask_secrets(absolute_uri(store)), config.tracking.experiment) != (
        record.tracking_uri,
        record.experiment,
    ):
        return "logs elsewhere (tracking.uri, tracking.experiment)"
    return None


def first_changed(stamps: Mapping[str, list[int]]) -> str | None:
    """Of `stamps`, the first file that is not as it was, or cannot be read."""
    for file, stamp in stamps.items():
        try:
            same = _stamp(Path(file)) == stamp
        except (OSError, ValueError):
            same = False
        if not same:
            return file
    return None
