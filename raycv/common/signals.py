"""Ctrl-C, SIGTERM and SIGHUP end a run in the same way; a closed standard stream does not end it."""

import os
import signal
import threading
from contextlib import suppress
from typing import TextIO

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that stop a run: from Ctrl-C, from a scheduler at the end of the time, from a closed terminal."""


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


def discard(stream: TextIO | None) -> None:
    """Sends a standard stream that cannot be written to /dev/null, since Python writes its buffer once more at exit."""
    with suppress(AttributeError, OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]
