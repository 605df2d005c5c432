"""Loads the chosen checkpoints with the criteria of their run, and answers. Imports nothing heavy before it loads."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raycv.common.environment import hidden
from raycv.data.types import Criterion
from raycv.errors import UserError
from raycv.inference.answer_output import Tell, give
from raycv.inference.choose import Chosen, warn_of_control
from raycv.inference.log import log_answered, record_answers
from raycv.inference.questions import Answerer, Question, asked_for, needs_criteria

if TYPE_CHECKING:
    from raycv.config.schema import InferConfig, InferenceConfig


def load_answerer(
    chosen: Chosen,
    config: "InferenceConfig",
    criteria_dir: str | None,
    tell: Tell,
    *,
    base: str | None = None,
    questions: Sequence[Question] = (),
) -> Answerer:
    """Loads the model of `chosen` with its criteria.

    Args:
        chosen: The checkpoints.
        config: Device, precision and batch size.
        criteria_dir: The folder of the criteria; None for those of the run.
        tell: Gets each warning for the user.
        base: Folder or hub id of the base model now; None for where training found it.
        questions: The questions to come, if they are known.

    Raises:
        UserError: The model or the criteria cannot be loaded, or a question cannot be answered.
    """
    needed = not questions or any(needs_criteria(question.criterion) for question in questions)
    criteria = read_criteria(chosen.checkpoints[0], criteria_dir, tell, needed=needed)
    warn_of_control(chosen, tell)
    asked_for(questions, criteria)
    # We import torch only here, so that a mistyped run, an empty post or an unknown criterion is refused at once.
    from raycv.inference.predictor import Predictor

    return Answerer(Predictor(chosen.checkpoints, config, tell, base), criteria, chosen.finished)


def answer_here(config: "InferConfig", question: Question, chosen: Chosen, tell: Tell) -> None:
    """Loads the model of `chosen` in this process, prints the answers to `question`, and logs them to MLflow.

    Raises:
        UserError: As `load_answerer`, or standard output does not take the answers.
    """
    started = time.monotonic()
    # transformers imports these, and with them pandas, wherever it finds them. No answer needs them, and they take a
    # fifth of a cold one's time.
    with hidden("sklearn", "scipy"):
        answerer = load_answerer(
            chosen, config.infer, config.criteria_dir, tell, base=config.base, questions=[question]
        )
    loaded = time.monotonic()
    answers = answerer.answer([question])[0]
    seconds = {"seconds_load": loaded - started, "seconds_answer": time.monotonic() - loaded}
    try:
        give(answers, answerer.criteria, config, tell, single=question.criterion is not None)
    finally:
        precision = answerer.predictor.computed_in
        entry = record_answers(chosen.checkpoints, [question], [answers], precision, seconds)
        log_answered(config, chosen.tracking_uri, entry, tell)


def read_criteria(checkpoint: Path, given: str | None, tell: Tell, *, needed: bool = True) -> dict[str, Criterion]:
    """Reads the criteria to ask for, from `given` or from where training read them.

    `tell` gets a warning if their wording is not that of training. Criteria that cannot be read and are neither
    `needed` nor `given` are left out, with a warning too.

    Raises:
        UserError: The criteria cannot be read, and they are `needed` or `given`.
    """
    from raycv.common.locations import resolve
    from raycv.data.dataset import criteria_hash, load_criteria
    from raycv.model.checkpoint import read_info

    info = read_info(checkpoint)
    try:
        criteria = load_criteria(Path(resolve(given or info.criteria_dir)), missing=info.missing)
    except UserError as error:
        if not needed and given is None:
            tell(f"the run's criteria cannot be read, and the one given is used unchanged: {error.what}")
            return {}
        remedies = ["name the folder that holds the run's criteria: criteria_dir=<folder>"]
        raise UserError(error.what, kind=error.kinds, remedies=remedies) from error
    if criteria_hash(criteria) != info.criteria_hash:
        tell(
            f"the criteria in {given or info.criteria_dir} are not worded as those that the model was trained with: "
            "its scores may be off"
        )
    return criteria
