"""Remembers which run answered last from a folder of runs, to warn when `latest` is another one now."""

import os
import shlex
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from raycv.common.environment import recorded_moment
from raycv.common.files import write_json
from raycv.errors import UserError
from raycv.inference.questions import shown_finish
from raycv.results.run_folder import read_record

FILE = ".last_answer.json"
MOST_BYTES = 2_000
"""More bytes than raycv ever writes, so a larger file is not raycv's and is skipped."""


def warn_if_moved(runs: Path, model: Mapping[str, Any], tell: Callable[[str], None]) -> None:
    """Warns if `latest` in the folder `runs` means another run than the one that answered last from there.

    Args:
        runs: The folder that holds the runs.
        model: The run that `latest` means now, and when it finished, if that is known.
        tell: Gets the warning.
    """
    last = _last(runs)
    if last is None or _is_same(last, model):
        return
    other = str(last["run"])
    there = other != model["run"] and os.path.isfile(runs / other / "config.yaml")
    again = f" To ask that run again: run={shlex.quote(other)}" if there else ""
    tell(f"run=latest is {_named(model)}. The last answer here came from {_named(last)}.{again}")


def remember(runs: Path, model: Mapping[str, Any]) -> None:
    """Records in the folder `runs`, if it exists, that `model` answered."""
    answered = {"run": model["run"], "finished": model.get("finished")}
    # Most answers come from the same run, so we write only what changes: the folder may be slow or read-only.
    if os.path.isdir(runs) and _last(runs) != answered:
        with suppress(OSError, UserError):
            write_json(runs / FILE, answered)


def _last(runs: Path) -> dict[str, str | None] | None:
    """Run and finish time of the model that answered last; None if no readable file records them."""
    file = runs / FILE
    with suppress(OSError, UserError):
        status = file.stat()
        # Others may write into the folder. A pipe would block us for ever, so we open only a regular file.
        if stat.S_ISREG(status.st_mode) and status.st_size <= MOST_BYTES:
            values = read_record(file, "run")
            return {"run": values["run"], "finished": recorded_moment(values.get("finished"))}
    return None


def _is_same(last: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether both are the same run. A new run may have the name of a removed one, so the finish times count."""
    moments = {last["finished"], model.get("finished")} - {None}
    return last["run"] == model["run"] and len(moments) <= 1


def _named(model: Mapping[str, Any]) -> str:
    return f"run {model['run']} ({shown_finish(model.get('finished'))})"
