"""`python -m raycv.infer post="..." criterion="..."`: matched or unmatched, and how sure (user story 3)."""

import contextlib
import errno
import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raycv.common.signals import discard
from raycv.config.command_line import run_command
from raycv.config.schema import InferConfig
from raycv.data.parsing import is_blank
from raycv.data.problems import FIELD_LIMIT
from raycv.data.types import Criterion
from raycv.errors import UserError
from raycv.inference.answerer import load_answerer, read_criteria
from raycv.inference.choose import Chosen, warn_of_control
from raycv.inference.last_answer import remember, warn_if_moved
from raycv.inference.log import NOT_LOGGED, InferenceLog, Record, record, record_answers, store_of
from raycv.inference.questions import Answer, Question, as_json, as_text, model_line, needs_criteria
from raycv.model.base_model import absolute_name
from raycv.model.checkpoint import read_info
from raycv.results.find_run import LATEST
from raycv.serving.client import ask, finder

logger = logging.getLogger("raycv.infer")

JSON = "json"
STDIN = "-"
LOG_SECONDS = 5
"""Limit for a request to MLflow, which has one attempt."""
POST_BYTES = 4 * FIELD_LIMIT
"""Most bytes of a post: UTF-8 for the longest field of a table. A device may be endless, so we read no further."""


def infer(config: InferConfig) -> None:
    """Answers a question on standard output, or scores a file of pairs into a file. MLflow gets the
    model and facts of the answers, never a text.

    Raises:
        UserError: Something is missing: the post, the run, its checkpoint or the base model.
    """
    if config.input is not None:
        score_many(config)
        return
    if config.engine == "ray":
        remedies = ["leave it out", "or give a file: input=pairs.csv output=scores.csv"]
        raise UserError(
            "engine=ray is for a file of posts, and there is no input.", kind="config-value", remedies=remedies
        )
    question = read_question(config)
    find = finder(config)
    reply = ask(config, [question], logger.warning, find)
    if reply is not None:
        answer(reply.answers[0], reply.criteria, config, single=question.criterion is not None)
        return
    started = time.monotonic()
    chosen = find()
    answerer = load_answerer(
        chosen, config.infer, config.criteria_dir, logger.warning, base=config.base, questions=[question]
    )
    loaded = time.monotonic()
    answers = answerer.answer([question])[0]
    seconds = {"seconds_load": loaded - started, "seconds_answer": time.monotonic() - loaded}
    try:
        answer(answers, answerer.criteria, config, single=question.criterion is not None)
    finally:
        computed_in = answerer.predictor.computed_in
        log(config, chosen, record_answers(chosen.checkpoints, [question], [answers], computed_in, seconds))


def score_many(config: InferConfig) -> None:
    """Scores the pairs of `config.input` into `config.output`.

    Raises:
        UserError: As in `infer`, or the input or the output cannot be used.
    """
    from rich.console import Console

    from raycv.batch_inference.score_file import Recipe, check_asked, facts, local_engine, score_file
    from raycv.terminal.console import say

    check_asked(config)
    started = time.monotonic()
    chosen = finder(config)()
    needed = needs_criteria(config.criterion)
    criteria = read_criteria(chosen.checkpoints[0], config.criteria_dir, logger.warning, needed=needed)
    warn_of_control(chosen, logger.warning)
    recipe = Recipe(chosen.checkpoints, config.infer, config.base and absolute_name(config.base))
    if config.engine == "ray":
        from raycv.orchestration.ray_data import ray_engine

        engine = ray_engine(recipe)
    else:
        engine = local_engine(lambda: recipe.load(logger.warning))
    info = read_info(chosen.checkpoints[0])
    model = {"run": info.run, "fold": chosen.fold, "base": info.base_model, "finished": chosen.finished}
    # The user should read this warning before hours of work, not after them.
    tell_of_move(config, model)
    params, counts = facts(score_file(config, chosen, criteria, engine), config)
    say(Console(stderr=True), model_line(model))
    remember(Path(config.dir), model)
    entry = record(model, chosen.checkpoints, params, {**counts, "seconds": time.monotonic() - started})
    log(config, chosen, entry, patient=True)


def read_question(config: InferConfig) -> Question:
    """Reads the question that the user asks.

    Raises:
        UserError: There is no post, or there are two. The file cannot be read. The format of the output is unknown.
    """
    if (config.post is None) == (config.post_file is None):
        if config.post is not None:
            raise UserError(
                "post and post_file are both given, and one post is asked for.",
                kind="config-value",
                remedies=["leave one out"],
            )
        remedies = ['give the text: post="..."', "or a file that holds it: post_file=post.txt (- is standard input)"]
        remedies += ["for many: input=pairs.csv output=scores.csv", "all keys: python -m raycv.infer --help"]
        raise UserError("There is nothing to answer: no post is given.", kind="input-empty", remedies=remedies)
    if config.output not in ("text", JSON):
        raise UserError(f"output={config.output}: must be text or json.", kind="config-value", remedies=["output=json"])
    return Question(config.post if config.post is not None else _read_post(str(config.post_file)), config.criterion)


def _read_post(file: str) -> str:
    if file == STDIN and sys.stdin is None:
        raise UserError(
            "post_file=-: standard input is closed.",
            kind="input-file",
            remedies=["pipe the post in", "post_file=<file>"],
        )
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if file == STDIN else open(file, "rb") as opened:
            data = opened.read(POST_BYTES + 1)
    except OSError as error:
        remedies = [f"give the path of a text file; this is {os.path.abspath(file)}"]
        raise UserError(
            f"post_file={file} cannot be read: {error.strerror}.", kind="input-file", remedies=remedies
        ) from error
    if len(data) > POST_BYTES:
        remedies = ["give one post; for a file of posts: input=pairs.csv output=scores.csv"]
        what = f"post_file={file} has more than {POST_BYTES:,} bytes, which is too long for a post."
        raise UserError(what, kind="input-file", remedies=remedies)
    try:
        # Editors and echo add a line break at the end. We drop it, so that the post is the text that post= would give.
        post = re.sub(r"\r?\n\Z", "", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        remedies = ["save it as UTF-8"]
        raise UserError(
            f"post_file={file} is not UTF-8 (byte {error.start}).", kind="input-file", remedies=remedies
        ) from error
    if is_blank(post):
        raise UserError(
            f"post_file={file}: the post is empty.",
            kind="input-empty",
            remedies=["give a file that holds the text of a post"],
        )
    return post


def answer(answers: Sequence[Answer], criteria: Mapping[str, Criterion], config: InferConfig, *, single: bool) -> None:
    """Warns if `latest` moved, and prints the answers. Raises: UserError if standard output does not take them."""
    model = answers[0]["model"]
    tell_of_move(config, model)
    show(answers, criteria, config, single=single)
    remember(Path(config.dir), model)


def tell_of_move(config: InferConfig, model: Mapping[str, Any]) -> None:
    """Warns that `latest` is not the run that answered last. A run that the user named needs no warning."""
    if config.run == LATEST:
        warn_if_moved(Path(config.dir), model, logger.warning)


def show(answers: Sequence[Answer], criteria: Mapping[str, Criterion], config: InferConfig, *, single: bool) -> None:
    """Prints only the answers to standard output. Raises: UserError if standard output does not take them."""
    text = as_json(answers, single=single) if config.output == JSON else as_text(answers, criteria, single=single)
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        what = f"The answer cannot be written to standard output: {error.strerror}."
        raise UserError(
            what, kind="disk-unwritable", remedies=["see what takes it: the command behind |, or the file and its disk"]
        ) from error


def log(config: InferConfig, chosen: Chosen, entry: Record, *, patient: bool = False) -> None:
    """Logs `entry` to MLflow, and warns if that fails: the answer stands.

    Without `patient` each request has one attempt of LOG_SECONDS, because a script waits for the command.
    """
    uri = store_of(config.tracking.uri, chosen.tracking_uri)
    if uri is None:
        return
    try:
        InferenceLog(uri, config.tracking.experiment, None if patient else LOG_SECONDS).write(entry)
    except UserError as error:
        logger.warning("%s: %s", NOT_LOGGED, error.what)


def main() -> None:
    # A lone - means standard input in other programs, but Hydra's grammar refuses it, so we replace it.
    sys.argv[1:] = [f"post_file={STDIN}" if argument == STDIN else argument for argument in sys.argv[1:]]
    run_command("infer", InferConfig, infer)


if __name__ == "__main__":
    main()
