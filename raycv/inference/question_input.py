"""Reads the question of the command `raycv.infer`: a post from the command line, a file or standard input."""

import contextlib
import os
import re
import sys
from typing import TYPE_CHECKING

from raycv.common.table_reader import is_blank
from raycv.common.text_files import FIELD_LIMIT
from raycv.errors import UserError
from raycv.inference.questions import Question

if TYPE_CHECKING:
    from raycv.config.schema import InferConfig

JSON = "json"
STDIN = "-"
POST_BYTES = 4 * FIELD_LIMIT
"""Most bytes of a post: UTF-8 for the longest field of a table. A device may be endless, so we read no further."""


def read_question(config: "InferConfig") -> Question:
    """Reads the question that the user asks.

    Raises:
        UserError: No post is given, or two are. The file cannot be read. The format of the output is unknown.
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
        raise UserError("No post is given, so raycv has nothing to answer.", kind="input-empty", remedies=remedies)
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
