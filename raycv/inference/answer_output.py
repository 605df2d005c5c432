"""Sends formed answers to standard output, and warns if `latest` is another run than the one that answered last."""

import errno
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raycv.common.locations import runs_folder
from raycv.config.process import discard
from raycv.data.types import Criterion
from raycv.errors import UserError
from raycv.inference.last_answer import remember, warn_if_moved
from raycv.inference.question_input import JSON
from raycv.inference.questions import Answer, as_json, as_text
from raycv.results.find_run import LATEST

if TYPE_CHECKING:
    from raycv.config.schema import InferConfig

Tell = Callable[[str], None]


def give(
    answers: Sequence[Answer],
    criteria: Mapping[str, Criterion],
    config: "InferConfig",
    tell: Tell,
    *,
    single: bool,
) -> None:
    """Warns if `latest` moved, and prints the answers. Raises: UserError if standard output does not take them."""
    model = answers[0]["model"]
    tell_of_move(config, model, tell)
    show(answers, criteria, config, single=single)
    remember(runs_folder(config.dir), model)


def tell_of_move(config: "InferConfig", model: Mapping[str, Any], tell: Tell) -> None:
    """Warns that `latest` is not the run that answered last. A run that the user named needs no warning."""
    if config.run == LATEST:
        warn_if_moved(runs_folder(config.dir), model, tell)


def show(answers: Sequence[Answer], criteria: Mapping[str, Criterion], config: "InferConfig", *, single: bool) -> None:
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
