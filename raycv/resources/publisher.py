"""Publishes what a fold leaves to the object storage, from the node that trains it. Does not use Ray."""

import os
import secrets
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from raycv.common.files import write_text
from raycv.errors import RunFailedError, UserError
from raycv.results.storage import PublishedRun, persistently, states_folder

Tell = Callable[[str], None]
WRITER = "writer"
PAUSE_SECONDS = 5.0
"""Between two attempts to publish a state."""


def make_local_copy(share: Path, nonce: str) -> None:
    """Makes the folder of this node's local copy, and removes that of another run that had the same name.

    Args:
        share: The file in that folder which holds the nonce.
        nonce: The nonce of the run.

    Raises:
        OSError: The folder cannot be made.
    """
    if share.is_file() and share.read_text(encoding="utf-8") != nonce:
        aside = share.parent.with_name(f".{share.parent.name}-{secrets.token_hex(4)}")
        os.replace(share.parent, aside)
        shutil.rmtree(aside, ignore_errors=True)
    share.parent.mkdir(parents=True, exist_ok=True)
    if not share.is_file():
        write_text(share, nonce)


def bring_states(run: PublishedRun, fold: int, *, alone: bool, tell: Tell, begun: bool = True) -> None:
    """Fetches the newest published training state of a fold, if the local ones are older.

    Args:
        run: The run.
        fold: The fold.
        alone: Whether one worker trains it. Several must resume from the same state, so only the published one counts.
        tell: Gets a line if the storage does not answer, and is waited for.
        begun: Whether there should be a state. One worker without any begins, if the storage does not answer.

    Raises:
        UserError: The storage still does not answer, or it refuses.
    """
    needed = begun or not alone
    try:
        newest = persistently(lambda: run.newest_state(fold), tell, None if needed else 0)
    except UserError:
        if needed:
            raise
        return
    here = sorted(path.name for path in run.folder.fold(fold).state.glob("[0-9]*"))
    if newest and (not alone or newest > max(here, default="")):
        persistently(lambda: run.fetch(f"{states_folder(fold)}/{newest}"), tell)
    if not alone:
        for name in here:
            if name != newest:
                shutil.rmtree(run.folder.fold(fold).state / name, ignore_errors=True)


def hand_over(run: PublishedRun, part: str, tell: Tell, *, needed: bool, where: str) -> None:
    """Publishes a part of a fold. If another node needs it, it waits for a storage that does not answer.

    Args:
        run: The run.
        part: The part.
        tell: Gets a line if the storage does not answer, or refuses.
        needed: Whether a process on another node needs the part now. Otherwise the run's end publishes it.
        where: The name of this node.

    Raises:
        RunFailedError: The part is needed and could not be published.
    """
    try:
        persistently(lambda: run.publish(part), tell, None if needed else 0)
    except UserError as error:
        kept = f"{error.what} It is kept in {run.folder.root / part}"
        if needed:
            raise RunFailedError(f"{kept} at {where}.", kind=error.kinds, remedies=error.remedies) from error
        tell(f"{kept}, and is published at the end of the run.")


class StatePublisher:
    """Publishes the newest training state of a fold in a thread, again and again while the storage does not answer."""

    def __init__(self, run: PublishedRun, fold: int, tell: Tell) -> None:
        """`tell`: gets a line when the storage stops answering, and when it answers again."""
        self._run = run
        self._states = states_folder(fold)
        self._tell = tell
        self._writer = secrets.token_hex(8)
        self._claimed = False
        self._newest: str | None = None
        self._failed: RunFailedError | None = None
        self._offered, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def offer(self, state: str) -> None:
        """Publishes `state`, the name of a local one, instead of an older one that still waits. Returns at once.

        Raises: RunFailedError if another process has taken the fold.
        """
        if self._failed is not None:
            raise self._failed
        self._newest = state
        self._offered.set()

    def stop(self) -> None:
        """Publishes no more states. Raises: RunFailedError if another process has taken the fold."""
        self._over.set()
        self._offered.set()
        self._thread.join()
        with suppress(UserError):
            self._failed = self._failed or self._taken()
        if self._failed is not None:
            raise self._failed

    def _work(self) -> None:
        away = False
        while True:
            self._offered.wait()
            if self._over.is_set():
                return
            state = self._newest
            try:
                self._publish(str(state))
            except RunFailedError as error:
                self._failed = error
                return
            except UserError as error:
                if not away:
                    kept = f"the states are kept in {self._run.folder.root / self._states}"
                    self._tell(f"{error.what} Training continues: {kept}, and published when the storage answers.")
                away = True
                self._over.wait(PAUSE_SECONDS)
                continue
            except OSError:
                # Training has removed this state meanwhile, since there are newer ones.
                pass
            else:
                if away:
                    self._tell(f"the object storage answers again: the training state {state} is published")
                away = False
            if self._newest == state:
                self._offered.clear()
                if self._newest != state or self._over.is_set():
                    # Another was offered in between.
                    self._offered.set()

    def _publish(self, state: str) -> None:
        if not self._claimed:
            self._run.bucket.write(f"{self._states}/{WRITER}", self._writer.encode())
            self._claimed = True
        if (taken := self._taken()) is not None:
            raise taken
        self._run.publish(f"{self._states}/{state}")
        older = {name.split("/")[-2] for name in self._run.bucket.list(self._states) if name.count("/") == 3}
        for name in sorted(older):
            if name < state:
                self._run.bucket.delete_folder(f"{self._states}/{name}")

    def _taken(self) -> RunFailedError | None:
        """The error if another process publishes this fold now: this one may be on a node that counts as lost."""
        there = self._run.bucket.read(f"{self._states}/{WRITER}") if self._claimed else None
        if there in (None, self._writer.encode()):
            return None
        what = f"Another process trains the fold of {self._run.bucket.address}/{self._states}: this one ends."
        return RunFailedError(what, kind="run-busy")
