"""`python -m raycv.infer post="..." criterion="..."`: matched or unmatched, and how sure (user story 3)."""

import logging
import sys
from typing import TYPE_CHECKING

from raycv.config.plain import plain_question
from raycv.config.process import run_process
from raycv.errors import UserError

if TYPE_CHECKING:
    from raycv.config.schema import InferConfig

logger = logging.getLogger("raycv.infer")


def infer(config: "InferConfig") -> None:
    """Answers a question on standard output, or scores a file of pairs into a file.

    MLflow gets the model and facts of the answers, never a text.

    Raises:
        UserError: Something is missing: the post, the run, its checkpoint or the base model.
    """
    if config.input is not None:
        _score_pairs(config)
        return
    if config.engine == "ray":
        remedies = ["leave it out", "or give a file: input=pairs.csv output=scores.csv"]
        raise UserError(
            "engine=ray is for a file of posts, and there is no input.", kind="config-value", remedies=remedies
        )
    # We import these here, as neither --help nor a refused key needs them.
    from raycv.inference.answer_output import give
    from raycv.inference.answerer import answer_here
    from raycv.inference.choose import finder
    from raycv.inference.question_input import read_question
    from raycv.serving.client import ask

    question, find = read_question(config), finder(config)
    reply = ask(config, [question], logger.warning, find)
    if reply is None:
        answer_here(config, question, find(), logger.warning)
    else:
        single = question.criterion is not None
        give(reply.answers[0], reply.criteria, config, logger.warning, single=single)


def _score_pairs(config: "InferConfig") -> None:
    from raycv.batch_inference.command import score_pairs
    from raycv.batch_inference.score_file import Engine, Recipe, local_engine

    def engine_of(recipe: Recipe) -> Engine:
        if config.engine != "ray":
            return local_engine(lambda: recipe.load(logger.warning))
        from raycv.orchestration.ray_data import ray_engine

        return ray_engine(recipe)

    score_pairs(config, logger.warning, engine_of)


def main() -> None:
    # A lone - means standard input in other programs, but Hydra's grammar refuses it, so we replace it.
    sys.argv[1:] = ["post_file=-" if argument == "-" else argument for argument in sys.argv[1:]]
    run_process("infer", _config, infer)


def _config() -> "InferConfig | None":
    plain = plain_question(sys.argv[1:])
    if plain is not None:
        return plain
    from raycv.config.command_line import composed
    from raycv.config.schema import InferConfig

    return composed("infer", InferConfig)


if __name__ == "__main__":
    main()
