"""Prints when a scorer stops or resumes answering, seen from the process that started it. It ends nothing."""

import time
from typing import NoReturn

from raycv.serving.connection import Connection, Unavailable
from raycv.serving.discovery import say
from raycv.serving.messages import Announcement

WATCH_SECONDS = 5
SILENT = 2
"""Looks in a row without an answer after which we print a line."""


def watch(record: Announcement, seconds: float = WATCH_SECONDS) -> NoReturn:
    """Asks the scorer every `seconds`, and prints when it stops or resumes answering. Ray restarts its processes."""
    silent = 0
    while True:
        time.sleep(seconds)
        try:
            with Connection(record.url, record.token) as connection:
                connection.get("/health")
        except (Unavailable, ConnectionRefusedError):
            silent += 1
            # The scorer may just be busy, so one look without an answer does not count.
            if silent == SILENT:
                say("it does not answer: busy, or a process of it died (of memory?), which Ray then starts again")
            continue
        if silent >= SILENT:
            say("it answers again")
        silent = 0
