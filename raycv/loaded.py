"""Chosen checkpoints -> what answers: the model with the criteria of its run. Imports nothing heavy by itself."""

from collections.abc import Callable
from pathlib import Path

from raycv.answers import Answerer
from raycv.config import InferenceConfig
from raycv.errors import UserError
from raycv.records import Criterion
from raycv.runs import Chosen

Tell = Callable[[str], None]


def load_answerer(chosen: Chosen, config: InferenceConfig, criteria_dir: str | None, tell: Tell) -> Answerer:
    """The model of `chosen` with the criteria of `criteria_dir`, or None for those of its run.

    `tell`: gets what a user should know. Raises: UserError if either cannot be had.
    """
    criteria = read_criteria(chosen.checkpoints[0], criteria_dir, tell)
    # Here: a mistyped run or an unknown criterion is told before torch is imported.
    from raycv.predict import Predictor

    return Answerer(Predictor(chosen.checkpoints, config, tell), criteria)


def read_criteria(checkpoint: Path, given: str | None, tell: Tell) -> dict[str, Criterion]:
    """The criteria to ask for, from `given` or where training read them; a word to `tell` if their wording differs.

    Raises: UserError if they cannot be read.
    """
    from raycv.checkpoint import read_info
    from raycv.data import criteria_hash, load_criteria
    from raycv.paths import resolve

    info = read_info(checkpoint)
    try:
        criteria = load_criteria(Path(resolve(given or info.criteria_dir)))
    except UserError as error:
        remedies = ["name the folder that holds the run's criteria: criteria_dir=<folder>"]
        raise UserError(error.what, remedies=remedies) from error
    if criteria_hash(criteria) != info.criteria_hash:
        tell(
            f"the criteria in {given or info.criteria_dir} are not worded as those that the model was trained with: "
            "its scores may be off"
        )
    return criteria
