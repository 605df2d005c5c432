"""The way of `raycv.infer` to a resident scorer (raycv.serve): finds one that has the model asked for, and asks it.

Standard library only, no proxies: a client starts in a fraction of what a model takes to load.
"""

import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raycv.answers import Answer, Question
from raycv.checkpoint import MANIFEST
from raycv.config import InferConfig
from raycv.errors import UserError
from raycv.inference_log import NOT_TRACKED
from raycv.paths import absolute_folder
from raycv.records import Criterion
from raycv.runs import LATEST, Chosen, choose

AUTO = "auto"
IN_PROCESS = "none"
TOKEN_VARIABLE = "RAYCV_TOKEN"
PATTERN = ".scorer-*.json"
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 300.0
OVERLOADED = 503
REFUSED_INPUT = (400, 413, 422)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Reply:
    """What a scorer answered."""

    answers: list[list[Answer]]
    """of each question"""
    criteria: dict[str, Criterion]
    """the run's, without their wording"""


class Unavailable(Exception):  # noqa: N818
    """A scorer that cannot answer now. Says why, without any text of a request."""


def ask(config: InferConfig, questions: Sequence[Question], tell: Tell) -> Reply | None:
    """The answers of a scorer, or None where this process is to compute them.

    Raises: UserError if the scorer that `config` names cannot be reached or has another model, or refuses a question.
    """
    if config.server == IN_PROCESS:
        return None
    if config.server == AUTO:
        return _ask_found(config, questions, tell)
    address, token = checked_address(config.server), os.environ.get(TOKEN_VARIABLE)
    try:
        with Connection(address, token) as connection:
            _check_model(config, connection.get("/health"))
            return _ask(connection, config, questions, tell)
    except (Unavailable, ConnectionRefusedError) as error:
        raise UserError(
            f"server={address}: the scorer there cannot answer: {error}.",
            remedies=[
                "see that it runs, and on that port: python -m raycv.serve",
                f"if it asks for a token: {TOKEN_VARIABLE}=<token>",
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
        usable = parts.scheme in ("http", "https") and parts.hostname and not parts.username
        port = parts.port
    except ValueError:
        usable, port = False, None
    if not usable:
        remedies = ["server=http://127.0.0.1:8000", "server=auto, server=none"]
        raise UserError("server: must be auto, none, or an address like http://host:port.", remedies=remedies)
    return f"{parts.scheme}://{parts.netloc}" if port else f"{parts.scheme}://{parts.hostname}"


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

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What `path` makes of `body`. Raises: UserError if it refuses the input."""
        status, answer = self.send("POST", path, body)
        if status in REFUSED_INPUT and isinstance(answer.get("error"), str):
            raise UserError(answer["error"], remedies=[str(remedy) for remedy in answer.get("remedies", [])])
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
        except (OSError, HTTPException, UnicodeError) as error:
            raise Unavailable(type(error).__name__) from error
        try:
            answer = json.loads(text)
        except ValueError:
            answer = {}
        return response.status, answer if isinstance(answer, dict) else {}

    @staticmethod
    def _expect(wanted: int, status: int, answer: dict[str, Any]) -> dict[str, Any]:
        if status == OVERLOADED:
            raise Unavailable("it is overloaded (503)")
        if status == 401:
            raise Unavailable("it asks for a token (401)")
        if status != wanted or not answer:
            raise Unavailable(f"it answered {status}, and not as a scorer does")
        return answer


def _ask(connection: Connection, config: InferConfig, questions: Sequence[Question], tell: Tell) -> Reply:
    body = {"pairs": [asdict(question) for question in questions], "log": config.tracking.uri != NOT_TRACKED}
    answer = connection.post("/score", body)
    for warning in answer["warnings"]:
        tell(warning)
    criteria = {key: Criterion(key, "", symptom) for key, symptom in answer["criteria"].items()}
    return Reply(answer["answers"], criteria)


def _check_model(config: InferConfig, health: dict[str, Any]) -> None:
    """Raises: UserError if the scorer's model is not the one asked for; `run=latest` takes whatever it has."""
    model = health.get("model")
    if not isinstance(model, dict):
        raise Unavailable("what answers there is no scorer")
    if config.run != LATEST and not _is_named(config, model):
        raise UserError(
            f"server={config.server}: the scorer has run {model['named']}, fold {model['fold']}, "
            f"not run={config.run} fold={config.fold}.",
            remedies=["leave run and fold out, and take what it has", "compute in this process: server=none"],
        )
    if config.infer.precision not in (AUTO, model["precision"]):
        raise UserError(
            f"infer.precision={config.infer.precision}: the scorer at {config.server} computes in "
            f"{model['precision']}.",
            remedies=["leave infer.precision out", "compute in this process: server=none"],
        )
    given = [key for key, value in (("criteria_dir", config.criteria_dir), ("tracking.uri", _store(config))) if value]
    if given:
        raise UserError(
            f"{given[0]}: is the scorer's own at {config.server}.",
            remedies=[f"give it where the scorer starts: python -m raycv.serve {given[0]}=...", "server=none"],
        )


def _store(config: InferConfig) -> str | None:
    return None if config.tracking.uri == NOT_TRACKED else config.tracking.uri


def _is_named(config: InferConfig, model: dict[str, Any]) -> bool:
    name = Path(config.run).name
    if name in (model["named"], model["run"]):
        return config.fold in (model["fold"], model["fold_asked"])
    # A checkpoint folder, or an MLflow id.
    return _same_files(choose(config.run, config.fold, Path(config.dir), _store(config)), model)


def _same_files(chosen: Chosen, model: dict[str, Any]) -> bool:
    return [str(folder) for folder in chosen.checkpoints] == model["checkpoints"]


def _ask_found(config: InferConfig, questions: Sequence[Question], tell: Tell) -> Reply | None:
    files = sorted(Path(config.dir).absolute().glob(PATTERN))
    records = [(file, record) for file in files if (record := _read(file)) is not None]
    if not records:
        return None
    chosen = choose(config.run, config.fold, Path(config.dir), _store(config))
    for file, record in records:
        if not _serves(record, chosen, config):
            continue
        try:
            with Connection(record["url"], record["token"]) as connection:
                # The port may be another program's by now, which is to get no post.
                if connection.get("/health").get("instance") != record["instance"]:
                    raise Unavailable("another program answers on its port")
                return _ask(connection, config, questions, tell)
        except ConnectionRefusedError:
            file.unlink(missing_ok=True)
            tell(f"the scorer at {record['url']} is gone: computing in this process")
        except Unavailable as error:
            tell(f"the scorer at {record['url']} cannot answer ({error}): computing in this process")
    return None


def _read(file: Path) -> dict[str, Any] | None:
    """What `file` says of a scorer that may be alive; None if it is of no use, and a dead one's is removed."""
    try:
        status = file.stat()
        # Someone else's file could send posts anywhere.
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            return None
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["host"] != socket.gethostname():
            return None
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        file.unlink(missing_ok=True)
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if isinstance(record.get("model"), dict) else None


def _serves(record: dict[str, Any], chosen: Chosen, config: InferConfig) -> bool:
    """Whether the scorer has the very model, criteria and store that `config` asks for."""
    model = record["model"]
    criteria_dir = config.criteria_dir and absolute_folder(config.criteria_dir)
    unchanged = all((folder / MANIFEST).stat().st_mtime <= record["started"] for folder in chosen.checkpoints)
    same_log = config.tracking.uri == NOT_TRACKED or (
        config.tracking.uri in (None, record["tracking_uri"]) and config.tracking.experiment == record["experiment"]
    )
    return (
        _same_files(chosen, model)
        and unchanged
        and config.infer.precision in (AUTO, model["precision"])
        and criteria_dir == model["criteria_dir"]
        and same_log
    )
