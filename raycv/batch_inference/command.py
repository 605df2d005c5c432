"""The command `raycv.infer input=...`: chooses the model, scores the file, and logs that to MLflow."""

import time
from collections.abc import Callable

from rich.console import Console

from raycv.batch_inference.score_file import Engine, Recipe, check_asked, facts, score_file
from raycv.common.locations import runs_folder
from raycv.config.schema import InferConfig
from raycv.inference.answer_output import Tell, tell_of_move
from raycv.inference.answerer import read_criteria
from raycv.inference.choose import finder, warn_of_control
from raycv.inference.last_answer import remember
from raycv.inference.log import log_answered, record
from raycv.inference.questions import model_line, needs_criteria
from raycv.model.base_model import absolute_name
from raycv.model.checkpoint import read_info
from raycv.rendering.terminal import say


def score_pairs(config: InferConfig, tell: Tell, engine_of: Callable[[Recipe], Engine]) -> None:
    """Scores the pairs of `config.input` into `config.output`, and logs that to MLflow.

    Args:
        config: The config of the command.
        tell: Gets each warning for the user.
        engine_of: Gives the engine that scores with a model.

    Raises:
        UserError: The run, its checkpoint, the base model, the input or the output cannot be used.
    """
    check_asked(config)
    started = time.monotonic()
    chosen = finder(config)()
    needed = needs_criteria(config.criterion)
    criteria = read_criteria(chosen.checkpoints[0], config.criteria_dir, tell, needed=needed)
    warn_of_control(chosen, tell)
    recipe = Recipe(chosen.checkpoints, config.infer, config.base and absolute_name(config.base))
    engine = engine_of(recipe)
    info = read_info(chosen.checkpoints[0])
    model = {"run": info.run, "fold": chosen.fold, "base": info.base_model, "finished": chosen.finished}
    # The user should read this warning before hours of work, not after them.
    tell_of_move(config, model, tell)
    params, counts = facts(score_file(config, chosen, criteria, engine), config)
    say(Console(stderr=True), model_line(model))
    remember(runs_folder(config.dir), model)
    entry = record(model, chosen.checkpoints, params, {**counts, "seconds": time.monotonic() - started})
    log_answered(config, chosen.tracking_uri, entry, tell, patient=True)
