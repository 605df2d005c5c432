"""Decides whether a scorer can answer as this process would, and asks it. Imports nothing heavy."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from raycv.common.files import record_of
from raycv.common.locations import absolute_folder, absolute_uri, runs_folder
from raycv.common.secrets import mask_secrets
from raycv.data.types import Criterion
from raycv.errors import UserError
from raycv.inference.choose import Chosen, Find, finder
from raycv.inference.log import NOT_TRACKED, named_store, store_of
from raycv.inference.questions import Question
from raycv.model.base_model import absolute_name
from raycv.results.find_run import LATEST
from raycv.serving.connection import (
    NO_SCORER,
    TOKEN_VARIABLE,
    Connection,
    RefusedError,
    Unavailable,
    checked_address,
    checked_token,
)
from raycv.serving.discovery import PATTERN, read_announcement, remove_announcement
from raycv.serving.fingerprint import files_of, fingerprint, stamps_of
from raycv.serving.messages import Announcement, Health, Reply, Served, ServedAnswer, ServedModel
from raycv.tracking.lookup import LOCAL_URI

if TYPE_CHECKING:
    from raycv.config.schema import InferConfig

AUTO = "auto"
IN_PROCESS = "none"
TOO_LARGE = (413, 422)
"""Those of REFUSED_INPUT that come from a scorer's limits. This process may compute such a request."""

Tell = Callable[[str], None]


def ask(config: "InferConfig", questions: Sequence[Question], tell: Tell, find: Find | None = None) -> Reply | None:
    """The answers of a scorer, or None if this process must compute them.

    Args:
        config: The model to ask, and how.
        questions: The questions.
        tell: Gets each warning for the user.
        find: Finds the checkpoints that this process would load; None to find them as `config` says. A caller that
            computes then gives its own, because `latest` may move between two searches.

    Raises:
        UserError: The scorer that `config` names cannot be reached or has another model, or a scorer refuses a
            question.
    """
    if config.server == IN_PROCESS:
        return None
    find = find or finder(config)
    if config.server == AUTO:
        return _ask_found(config, questions, tell, find)
    address, token = checked_address(config.server), checked_token(os.environ.get(TOKEN_VARIABLE))
    try:
        with Connection(address, token) as connection:
            _check_model(config, connection.health().model, find)
            return _ask(connection, config, questions, tell)
    except (Unavailable, ConnectionRefusedError) as error:
        raise UserError(
            f"server={address}: the scorer there cannot answer: {error}.",
            kind="scorer-unavailable",
            remedies=[
                "see that it runs, and on that port: python -m raycv.serve",
                f"if it asks for a token, set the environment variable {TOKEN_VARIABLE} to that",
                "compute in this process: server=none",
            ],
        ) from error


def _ask(connection: Connection, config: "InferConfig", questions: Sequence[Question], tell: Tell) -> Reply:
    # The answer must have the bytes that this process would give, even if other requests come in, so we ask alone.
    body = {"pairs": [asdict(question) for question in questions], "log": config.tracking.uri != NOT_TRACKED}
    answer = connection.post("/score", body | {"alone": True})
    try:
        served = record_of(Served, answer)
    except ValueError as error:
        raise Unavailable(NO_SCORER) from error
    if len(served.answers) != len(questions) or not all(map(_are_answers, served.answers, answer["answers"])):
        raise Unavailable(NO_SCORER)
    for warning in served.warnings:
        tell(warning)
    # The user should see the digits and the order that the scorer sent, so we pass on its raw answers.
    return Reply(answer["answers"], {key: Criterion(key, "", symptom) for key, symptom in served.criteria.items()})


def _are_answers(served: Sequence[ServedAnswer], received: Sequence[Mapping[str, object]]) -> bool:
    """Whether these are the answers to a question. Another program's may have further keys, or numbers out of range."""
    known = {field.name for field in fields(ServedAnswer)}
    exact = all(answer.keys() == known for answer in received)
    return exact and bool(served) and all(0 <= each.score <= 1 and 0 <= each.threshold <= 1 for each in served)


def _check_model(config: "InferConfig", model: ServedModel, find: Find) -> None:
    """Accepts any model for `run=latest fold=best`, else only the one that `config` names.

    Raises:
        UserError: The scorer has another model or precision, or `config` sets a key that the scorer decides.
    """
    whatever = config.run == LATEST and config.fold in ("best", model.fold, model.fold_asked)
    if not whatever and not _is_named(config, model, find):
        raise UserError(
            f"server={config.server}: the scorer has run {model.named}, fold {model.fold}, "
            f"not run={config.run} fold={config.fold}.",
            kind="config-value",
            remedies=["leave run and fold out, and take what it has", "compute in this process: server=none"],
        )
    if config.infer.precision not in (AUTO, model.precision):
        raise UserError(
            f"infer.precision={config.infer.precision}: the scorer at {config.server} computes in {model.precision}.",
            kind="config-value",
            remedies=["leave infer.precision out", "compute in this process: server=none"],
        )
    own = {"criteria_dir": config.criteria_dir, "base": config.base, "tracking.uri": named_store(config.tracking.uri)}
    given = [key for key, value in own.items() if value]
    if given:
        raise UserError(
            f"{given[0]}: is the scorer's own at {config.server}.",
            kind="config-value",
            remedies=[f"give it where the scorer starts: python -m raycv.serve {given[0]}=...", "server=none"],
        )


def _is_named(config: "InferConfig", model: ServedModel, find: Find) -> bool:
    path = Path(config.run)
    # Other folders may hold a run of the same name, so a path to a folder on this machine is not a mere name.
    by_name = path.name == config.run or not path.is_dir()
    if by_name and path.name in (model.named, model.run):
        return config.fold in (model.fold, model.fold_asked)
    if config.run == LATEST:
        return False
    # `run` is now an MLflow id, or the path of a run or a checkpoint.
    return _is_tracked_as(config, model) or _same_files(find(), model)


def _is_tracked_as(config: "InferConfig", model: ServedModel) -> bool:
    """Whether `run` and `fold` name the scorer's model by MLflow's id of its run or fold. Does not import mlflow."""
    if config.run == model.parent_id:
        return config.fold in (model.fold, model.fold_asked)
    return config.run == model.fold_id and config.fold in ("best", model.fold)


def _same_files(chosen: Chosen, model: ServedModel) -> bool:
    return [str(folder) for folder in chosen.checkpoints] == model.checkpoints


def _ask_found(config: "InferConfig", questions: Sequence[Question], tell: Tell, find: Find) -> Reply | None:
    given = Path(config.run).absolute()
    # If `run` is the path of a run or a checkpoint, its scorer may have announced itself in a folder above it.
    folders = dict.fromkeys([runs_folder(config.dir).absolute(), *(given.parents[:3] if given.is_dir() else ())])
    try:
        files = [file for folder in folders for file in sorted(folder.glob(PATTERN))]
    except OSError:
        # The search for the run will look into the same folder and report the error, so we do not.
        return None
    reasons = []
    for file in files:
        if (record := read_announcement(file)) is None:
            continue
        try:
            with Connection(record.url, record.token) as connection:
                why = _difference(record, connection.health(), config, find)
                if why is None:
                    return _ask(connection, config, questions, tell)
        except ConnectionRefusedError:
            remove_announcement(file)
            why = "is gone"
        except Unavailable as error:
            why = f"cannot answer ({error})"
        except RefusedError as error:
            if error.status not in TOO_LARGE:
                raise
            why = "takes no question as large as this"
        reasons.append(f"the scorer at {record.url} {why}")
    if reasons:
        # The user may have started a scorer and wonder why the answer takes so long, so we give the reasons.
        tell(f"{'; '.join(reasons)}: computing in this process")
    return None


def _difference(record: Announcement, health: Health, config: "InferConfig", find: Find) -> str | None:
    """Why a scorer would not answer as this process would; None if it would.

    Raises:
        Unavailable: Another program answers in place of the scorer.
    """
    # Another program may have the port by now, and it must not get a post.
    if health.instance != record.instance:
        raise Unavailable("another program answers on its port")
    if health.fingerprint is None:
        return "is of an earlier version of raycv, and has to be started again"
    model = health.model
    if _is_tracked_as(config, model):
        checkpoints, finished = [Path(folder) for folder in model.checkpoints], model.finished
        tracked = named_store(config.tracking.uri) or LOCAL_URI
    else:
        chosen = find()
        checkpoints, finished, tracked = list(chosen.checkpoints), chosen.finished, chosen.tracking_uri or LOCAL_URI
    if health.fingerprint != _own_fingerprint(config, model, checkpoints, finished):
        device = f" on {model.device}" if model.device else ""
        return (
            f"has run {model.named}, fold {model.fold}, in {model.precision}{device}; this command asks for another "
            "model, precision, device or criteria, or files changed since the scorer started"
        )
    store = store_of(config.tracking.uri, tracked)
    if store is not None and (mask_secrets(absolute_uri(store)), config.tracking.experiment) != (
        record.tracking_uri,
        record.experiment,
    ):
        return "logs elsewhere (tracking.uri, tracking.experiment)"
    return None


def _own_fingerprint(
    config: "InferConfig", model: ServedModel, checkpoints: Sequence[Path], finished: str | None
) -> str | None:
    """The fingerprint of the answers that this process would give; None if it cannot give any.

    It takes from the scorer's `model` what only torch could tell, and where the base model is now.
    """
    base = config.base and absolute_name(config.base)
    criteria_dir = absolute_folder(config.criteria_dir) if config.criteria_dir else None
    try:
        stamps = stamps_of(files_of(checkpoints, criteria_dir, base or model.base_given))
    except (OSError, UserError, IndexError):
        # The load of the model will report what is wrong with the files, so we do not.
        return None
    precision = model.precision_of_auto if config.infer.precision == AUTO else config.infer.precision
    device = "cpu" if config.infer.device == "cpu" else model.device
    return fingerprint(stamps, base or model.base_given or model.base, precision, device, finished)
