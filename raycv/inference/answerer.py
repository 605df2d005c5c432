"""Loads the chosen checkpoints together with the criteria of their run. Imports nothing heavy before it loads."""

from collections.abc import Callable, Sequence
from pathlib import Path

from raycv.config.schema import InferenceConfig
from raycv.data.types import Criterion
from raycv.errors import UserError
from raycv.inference.choose import Chosen, warn_of_control
from raycv.inference.questions import Answerer, Question, asked_for, needs_criteria

Tell = Callable[[str], None]


def load_answerer(
    chosen: Chosen,
    config: InferenceConfig,
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
