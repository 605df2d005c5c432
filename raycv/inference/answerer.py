"""Loads the chosen checkpoints together with the criteria of their run. Imports nothing heavy by itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

from raycv.config.schema import InferenceConfig
from raycv.data.types import Criterion
from raycv.errors import UserError
from raycv.inference.choose import Chosen
from raycv.inference.questions import Answerer, Question, asked_for, is_own_words

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
    """The model of `chosen` with the criteria of `criteria_dir`, or None for those of its run.

    `tell`: gets what a user should know; `base`: where the base model lies, if not where training found it;
    `questions`: what will be asked, if it is known. Raises: UserError if the model or the criteria cannot be had, or a
    question cannot be answered.
    """
    needed = not questions or any(
        question.criterion is None or not is_own_words(question.criterion) for question in questions
    )
    criteria = read_criteria(chosen.checkpoints[0], criteria_dir, tell, needed=needed)
    asked_for(questions, criteria)
    # Here: a mistyped run, an empty post or an unknown criterion is told before torch is imported.
    from raycv.inference.predictor import Predictor

    return Answerer(Predictor(chosen.checkpoints, config, tell, base), criteria, chosen.finished)


def read_criteria(checkpoint: Path, given: str | None, tell: Tell, *, needed: bool = True) -> dict[str, Criterion]:
    """The criteria to ask for, from `given` or where training read them; a word to `tell` if their wording differs.

    Raises: UserError if they cannot be read; where they are not `needed`, nor `given`, there are then none.
    """
    from raycv.common.locations import resolve
    from raycv.data.dataset import criteria_hash, load_criteria
    from raycv.model.checkpoint import read_info

    info = read_info(checkpoint)
    try:
        criteria = load_criteria(Path(resolve(given or info.criteria_dir)), missing=info.missing)
    except UserError as error:
        if not needed and given is None:
            tell(f"the run's criteria cannot be read, and the one given is taken as it stands: {error.what}")
            return {}
        remedies = ["name the folder that holds the run's criteria: criteria_dir=<folder>"]
        raise UserError(error.what, remedies=remedies) from error
    if criteria_hash(criteria) != info.criteria_hash:
        tell(
            f"the criteria in {given or info.criteria_dir} are not worded as those that the model was trained with: "
            "its scores may be off"
        )
    return criteria
