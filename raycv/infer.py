"""`python -m raycv.infer post="..." criterion="..."`: matched or unmatched, and how sure (user story 3)."""

import contextlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from raycv.answers import Answer, Question, as_json, as_text
from raycv.checkpoint import read_info
from raycv.cli import run_command
from raycv.client import ask
from raycv.config import InferConfig
from raycv.errors import UserError
from raycv.faults import FIELD_LIMIT
from raycv.inference_log import NOT_LOGGED, NOT_TRACKED, InferenceLog, Record, record, record_answers, store_of
from raycv.loaded import load_answerer, read_criteria
from raycv.records import Criterion
from raycv.runs import Chosen, choose

logger = logging.getLogger("raycv.infer")

JSON = "json"
STDIN = "-"
POST_BYTES = 4 * FIELD_LIMIT
"""As many as UTF-8 takes at most for the longest field of a table; a device may have no end."""


def infer(config: InferConfig) -> None:
    """Answers a question on standard output, or a file of them in a file; MLflow gets which model was asked, no text.

    Raises: UserError if something is missing: the post, the run, its checkpoint, the base model.
    """
    if config.input is not None:
        score_many(config)
        return
    question = read_question(config)
    reply = ask(config, [question], logger.warning)
    if reply is not None:
        show(reply.answers[0], reply.criteria, config, single=question.criterion is not None)
        return
    started = time.monotonic()
    chosen = choose(config.run, config.fold, Path(config.dir), _tracking_uri(config))
    answerer = load_answerer(chosen, config.infer, config.criteria_dir, logger.warning)
    loaded = time.monotonic()
    answers = answerer.answer([question])[0]
    seconds = {"seconds_load": loaded - started, "seconds_answer": time.monotonic() - loaded}
    show(answers, answerer.criteria, config, single=question.criterion is not None)
    log(
        config,
        chosen,
        record_answers(chosen.checkpoints, [question], [answers], answerer.predictor.computed_in, seconds),
    )


def score_many(config: InferConfig) -> None:
    """Scores the pairs of `config.input` into `config.output`.

    Raises: UserError as `infer`, or if the input or the output cannot be used.
    """
    from raycv.many import Recipe, check_asked, facts, local_engine, score_file

    check_asked(config)
    started = time.monotonic()
    chosen = choose(config.run, config.fold, Path(config.dir), _tracking_uri(config))
    criteria = read_criteria(chosen.checkpoints[0], config.criteria_dir, logger.warning)
    recipe = Recipe(chosen.checkpoints, config.infer)
    if config.engine == "ray":
        from raycv.ray_scoring import ray_engine

        engine = ray_engine(recipe)
    else:
        engine = local_engine(lambda: recipe.load(logger.warning))
    params, counts = facts(score_file(config, chosen, criteria, engine), config)
    model = {"run": chosen.run, "fold": chosen.fold, "base": read_info(chosen.checkpoints[0]).base_model}
    log(config, chosen, record(model, chosen.checkpoints, params, {**counts, "seconds": time.monotonic() - started}))


def read_question(config: InferConfig) -> Question:
    """What the user asks. Raises: UserError if there is no post, or two, or the file cannot be read."""
    if (config.post is None) == (config.post_file is None):
        if config.post is not None:
            raise UserError("post and post_file are both given, and one post is asked for.", remedies=["leave one out"])
        remedies = ['give the text: post="..."', "or a file that holds it: post_file=post.txt (- is standard input)"]
        raise UserError("There is nothing to answer: no post is given.", remedies=remedies)
    if config.output not in ("text", JSON):
        raise UserError(f"output={config.output}: must be text or json.", remedies=["output=json"])
    return Question(config.post if config.post is not None else _read_post(str(config.post_file)), config.criterion)


def _read_post(file: str) -> str:
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if file == STDIN else open(file, "rb") as opened:
            data = opened.read(POST_BYTES + 1)
    except OSError as error:
        raise UserError(f"post_file={file} cannot be read: {error.strerror}.", remedies=["post_file=<file>"]) from error
    if len(data) > POST_BYTES:
        remedies = ["give one post; for a file of posts: input=pairs.csv output=scores.csv"]
        raise UserError(f"post_file={file} has more than {POST_BYTES:,} bytes: no post.", remedies=remedies)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        remedies = ["save it as UTF-8"]
        raise UserError(f"post_file={file} is not UTF-8 (byte {error.start}).", remedies=remedies) from error


def show(answers: Sequence[Answer], criteria: Mapping[str, Criterion], config: InferConfig, *, single: bool) -> None:
    """Prints the answers and nothing else to standard output."""
    text = as_json(answers, single=single) if config.output == JSON else as_text(answers, criteria, single=single)
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.flush()


def _tracking_uri(config: InferConfig) -> str | None:
    return None if config.tracking.uri in (None, NOT_TRACKED) else config.tracking.uri


def log(config: InferConfig, chosen: Chosen, entry: Record) -> None:
    """`entry` in MLflow. Never fails the answer."""
    uri = store_of(config.tracking.uri, chosen.tracking_uri)
    if uri is None:
        return
    try:
        InferenceLog(uri, config.tracking.experiment).write(entry)
    except UserError as error:
        logger.warning("%s: %s", NOT_LOGGED, error.what)


def main() -> None:
    run_command("infer", InferConfig, infer)


if __name__ == "__main__":
    main()
