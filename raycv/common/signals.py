"""Ctrl-C, SIGTERM and SIGHUP end a run in the same way; a closed standard stream ends nothing."""

import os
import signal
import threading
from contextlib import suppress
from typing import TextIO

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What stops a run: Ctrl-C, a scheduler at the end of the time, a terminal that is closed."""


def stop_like_ctrl_c() -> None:
    """All of STOP_SIGNALS end in KeyboardInterrupt from here on, but those that are ignored (nohup)."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)


def ignore_stops() -> None:
    """A second Ctrl-C would only break off what the first began: marking the runs and ending Ray's processes."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def discard(stream: TextIO | None) -> None:
    """Gives up a standard stream that cannot be written: what is in its buffer would be tried once more at the end."""
    with suppress(AttributeError, OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]
