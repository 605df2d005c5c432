"""How a test expects a refusal: its kind, and the places, values and commands that its text names, not its prose."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from raycv.errors import UserError


@contextmanager
def refuses(
    kind: str, part: object, *parts: object, error: type[UserError] = UserError
) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expects the block to raise an `error` of `kind`, or of several as in "data-format, data-id".

    Its text has each part: a file, line or key, a value received, or the command or key of a remedy.
    """
    with pytest.raises(error) as caught:
        yield caught
    said_refusal(str(caught.value), kind, part, *parts)


def said_refusal(output: str, kind: str, part: object, *parts: object) -> None:
    """Expects that the last refusal in `output`, which a process or a log shows, is of `kind` and has each part."""
    assert re.findall(r"Kind: (.*)", output)[-1:] == [kind], output
    assert [str(each) for each in (part, *parts) if str(each) not in output] == [], output
