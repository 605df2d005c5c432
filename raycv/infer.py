"""`python -m raycv.infer post="..." criterion="..."`: matched or unmatched, and how sure (user story 3)."""

import contextlib
import hashlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raycv import __version__
from raycv.answers import Answer, Answerer, Question, as_json, as_text
from raycv.checkpoint import read_info
from raycv.cli import run_command
from raycv.config import InferConfig
from raycv.errors import UserError
from raycv.faults import FIELD_LIMIT
from raycv.records import Criterion
from raycv.runs import LOCAL_URI, Chosen, check_password, choose

logger = logging.getLogger("raycv.infer")

JSON = "json"
STDIN = "-"
NOT_TRACKED = "none"
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
    started = time.monotonic()
    chosen = choose(config.run, config.fold, Path(config.dir), _tracking_uri(config))
    answerer = load_answerer(chosen, config)
    loaded = time.monotonic()
    answers = answerer.answer([question])[0]
    seconds = {"seconds_load": loaded - started, "seconds_answer": time.monotonic() - loaded}
    show(answers, answerer.criteria, config, single=question.criterion is not None)
    log_inference(config, chosen, question, answers, answerer.predictor.computed_in, seconds)


def score_many(config: InferConfig) -> None:
    """Scores the pairs of `config.input` into `config.output`.

    Raises: UserError as `infer`, or if the input or the output cannot be used.
    """
    from raycv.many import Recipe, check_asked, facts, local_engine, score_file

    check_asked(config)
    started = time.monotonic()
    chosen = choose(config.run, config.fold, Path(config.dir), _tracking_uri(config))
    criteria = criteria_of(chosen, config)
    recipe = Recipe(chosen.checkpoints, config.infer)
    if config.engine == "ray":
        from raycv.ray_scoring import ray_engine

        engine = ray_engine(recipe)
    else:
        engine = local_engine(lambda: recipe.load(logger.warning))
    params, counts = facts(score_file(config, chosen, criteria, engine), config)
    log_run(config, chosen, params, {**counts, "seconds": time.monotonic() - started})


def read_question(config: InferConfig) -> Question:
    """What the user asks. Raises: UserError if there is no post, or two, or the file cannot be read."""
    if (config.post is None) == (config.post_file is None):
        there = "no post is given" if config.post is None else "post and post_file are both given"
        remedies = ['give the text: post="..."', "or a file that holds it: post_file=post.txt (- is standard input)"]
        raise UserError(f"There is nothing to answer: {there}.", remedies=remedies)
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


def load_answerer(chosen: Chosen, config: Any) -> Answerer:
    """The model of `chosen` with the criteria of its run. `config`: has `infer` and `criteria_dir`.

    Raises: UserError if either cannot be had.
    """
    criteria = criteria_of(chosen, config)
    # Here: a mistyped run or an unknown criterion is told before torch is imported.
    from raycv.predict import Predictor

    return Answerer(Predictor(chosen.checkpoints, config.infer, logger.warning), criteria)


def criteria_of(chosen: Chosen, config: Any) -> dict[str, Criterion]:
    """The criteria of `chosen`'s run. `config`: has `criteria_dir`. Raises: UserError if they cannot be read."""
    info = read_info(chosen.checkpoints[0])
    return read_criteria(info.criteria_dir, info.criteria_hash, config.criteria_dir)


def read_criteria(trained_with: str, trained_hash: str, given: str | None) -> dict[str, Criterion]:
    """The criteria to ask for, from `given` or where training read them; a warning if their wording differs."""
    from raycv.data import criteria_hash, load_criteria
    from raycv.paths import resolve

    try:
        criteria = load_criteria(Path(resolve(given or trained_with)))
    except UserError as error:
        remedies = ["name the folder that holds the run's criteria: criteria_dir=<folder>"]
        raise UserError(error.what, remedies=remedies) from error
    if criteria_hash(criteria) != trained_hash:
        logger.warning(
            "the criteria in %s are not worded as those that the model was trained with: its scores may be off",
            given or trained_with,
        )
    return criteria


def show(answers: Sequence[Answer], criteria: Mapping[str, Criterion], config: InferConfig, *, single: bool) -> None:
    """Prints the answers and nothing else to standard output."""
    text = as_json(answers, single=single) if config.output == JSON else as_text(answers, criteria, single=single)
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.flush()


def _tracking_uri(config: InferConfig) -> str | None:
    return None if config.tracking.uri in (None, NOT_TRACKED) else config.tracking.uri


def log_inference(
    config: InferConfig,
    chosen: Chosen,
    question: Question,
    answers: Sequence[Answer],
    precision: str,
    seconds: dict[str, float],
) -> None:
    """One MLflow run: threshold, latency, lengths and hashes of the texts, and what `log_run` adds."""
    params = {
        "threshold": answers[0]["threshold"],
        "criterion_ids": ", ".join(str(answer["criterion_id"] or "free text") for answer in answers),
        "precision": precision,
        **text_facts("post", question.post),
        **(text_facts("criterion", question.criterion) if question.criterion is not None else {}),
    }
    metrics = {**seconds, "pairs": len(answers), "matched": sum(answer["label"] == "matched" for answer in answers)}
    log_run(config, chosen, params, metrics)


def log_run(config: InferConfig, chosen: Chosen, params: dict[str, Any], metrics: dict[str, float]) -> None:
    """One MLflow run with `params` and `metrics`, which model it was, and versions. Never fails the answer."""
    if config.tracking.uri == NOT_TRACKED:
        return
    from raycv.config import TrackingConfig
    from raycv.tracking import Tracker
    from raycv.utils import describe_environment

    uri = _tracking_uri(config) or chosen.tracking_uri or LOCAL_URI
    versions = describe_environment()["packages"]
    params = {
        "model.run": chosen.run,
        "model.fold": chosen.fold,
        "model.base": read_info(chosen.checkpoints[0]).base_model,
        "checkpoints": ", ".join(map(str, chosen.checkpoints)),
        **params,
        **{f"versions.{name}": versions[name] for name in ("raycv", "torch", "transformers", "peft")},
    }
    try:
        check_password(uri)
        tracker = Tracker(uri)
        artifacts = str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlruns")
        experiment = tracker.open_experiment(
            TrackingConfig(uri=uri, artifacts=artifacts, experiment=config.tracking.experiment)
        )
        tracker.log_inference(experiment, {"raycv.version": __version__, "raycv.run": chosen.run}, params, metrics)
    except UserError as error:
        logger.warning("the answer stands, but is not in MLflow: %s", error.what)


def text_facts(name: str, text: str) -> dict[str, Any]:
    """What may be known of a text: its length, and a hash to find it again by."""
    return {
        f"{name}.characters": len(text),
        f"{name}.sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
    }


def main() -> None:
    run_command("infer", InferConfig, infer)


if __name__ == "__main__":
    main()
