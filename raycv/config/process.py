"""How the process of a command runs and ends: warnings, exit code, errors without tracebacks, Ctrl-C and SIGTERM."""

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import NoReturn, TextIO, TypeVar

from rich.cells import cell_len

from raycv.common.environment import seldom_collecting
from raycv.common.secrets import mask_secrets
from raycv.errors import UserError, printable

C = TypeVar("C")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that stop a run: from Ctrl-C, from a scheduler at the end of the time, from a closed terminal."""


def run_process(
    name: str,
    read: Callable[[], C | None],
    body: Callable[[C], None],
    own_names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Reads the config of a command and calls `body` with it.

    Exit codes:

    - 0: done
    - 1: the run failed (`RunFailedError`), or an unexpected error
    - 2: a fault that the user can fix, printed without a traceback
    - 130: interrupted

    Args:
        name: The command, such as `run`.
        read: Gives the config; None if the user asked for an answer such as `--help`, which is then printed.
        body: The work of the command.
        own_names: Keys as remedies name them, and the names that this command has for them.
    """
    sys.excepthook = _show_traceback
    if sys.stderr is None:
        # The stream is closed. The next file to be opened would get its number, and with it the output of libraries.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        config = read()
        if config is not None:
            _show_warnings()
            with seldom_collecting():
                body(config)
    except UserError as error:
        raise _refused(name, error, own_names) from None
    except KeyboardInterrupt:
        say(f"\nraycv.{name}: interrupted\n")
        _leave(130)


def _leave(code: int) -> NoReturn:
    """Ends the process at once. After an interrupted start of Ray an orderly exit can crash in Ray's native threads."""
    logging.shutdown()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # Nobody may read them any more.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _show_warnings() -> None:
    """Sends raycv's warnings (retries, fallbacks) to standard error, since Hydra's logging is off."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Masked("%(levelname)s: %(message)s"))
    logger = logging.getLogger("raycv")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    for name, known in logging.root.manager.loggerDict.items():
        if name.startswith("raycv") and isinstance(known, logging.Logger):
            known.disabled = False


class _Masked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(mask_secrets(super().format(record)))


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints Python's traceback with masked passwords: an unexpected error of a client can hold a whole address."""
    sys.stderr.write(mask_secrets("".join(traceback.format_exception(kind, error, trace))))


_WORD = re.compile(r"""([ \t]*)((?:(?<![^\s=:])(?:'[^'\n]*'|"[^"\n]*")|\S)+)""")


def unbroken(text: str, width: int) -> str:
    """Fills rows with spaces, so that a terminal of `width` columns breaks no word, address or quoted path.

    No line break is added, so a command that takes two rows can still be copied as one line. Only a word that is longer
    than a row is broken, and it begins a row.
    """

    def row(line: str) -> str:
        parts: list[str] = []
        column = 0
        for gap, word in _WORD.findall(line):
            size = cell_len(word)
            if column and column + len(gap) + size > width:
                gap = " " * max(width - column, 1)
            column = (column + len(gap) + size - 1) % width + 1
            parts += [gap, word]
        return "".join(parts)

    return "\n".join(row(line) for line in text.split("\n"))


def say(text: str) -> None:
    """Writes to standard error. A command does not fail because that fails, as on a full disk."""
    try:
        if sys.stderr.isatty():
            text = unbroken(text, shutil.get_terminal_size().columns)
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO | None) -> None:
    """Sends a standard stream that cannot be written to /dev/null, since Python writes its buffer once more at exit."""
    with contextlib.suppress(AttributeError, OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def stop_like_ctrl_c() -> None:
    """Makes STOP_SIGNALS raise KeyboardInterrupt, except ignored ones (nohup). Acts in the main thread only."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)


def ignore_stops() -> None:
    """Ignores STOP_SIGNALS from now on. Acts in the main thread only.

    After the first Ctrl-C raycv marks the runs and ends Ray's processes, which a second one would interrupt.
    """
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _refused(name: str, error: UserError, own_names: Mapping[str, str]) -> SystemExit:
    text = str(error)
    for key, own in own_names.items():
        text = text.replace(key, own)
    say(printable(mask_secrets(f"\nraycv.{name}: {text}\n")))
    return SystemExit(error.exit_code)
