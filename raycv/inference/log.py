"""What MLflow keeps of an inference, whoever computed it: of which model, how long, lengths and hashes, never a text.

Imports nothing heavy before something is written.
"""

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from raycv import __version__
from raycv.errors import UserError, counted
from raycv.inference.questions import Answer, Question
from raycv.tracking.lookup import LOCAL_URI, check_password

logger = logging.getLogger(__name__)

NOT_TRACKED = "none"
NOT_LOGGED = "the answer stands, but is not in MLflow"
WAITING = 10_000
"""Records that may wait for a slow store; more are dropped and counted, since a scorer's memory must not grow."""
REST = 4.0
"""Between two records the writer rests that many times what one computed, while there are requests to answer."""


@dataclass(frozen=True)
class Record:
    """One inference as it stands in MLflow."""

    tags: Mapping[str, str]
    params: Mapping[str, Any]
    metrics: Mapping[str, float]


def record(
    model: Mapping[str, str | int | None],
    checkpoints: Sequence[Path],
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> Record:
    """What is kept of whatever `model` answered: `params`, `metrics`, which model, and versions.

    `model`: run, fold, base, and when the run finished, if that is known.
    """
    params = {
        **{f"model.{key}": value for key, value in model.items() if value is not None},
        "checkpoints": ", ".join(map(str, checkpoints)),
        **params,
        **{f"versions.{name}": version for name, version in _versions().items()},
    }
    return Record({"raycv.version": __version__, "raycv.run": str(model["run"])}, params, metrics)


def record_answers(
    checkpoints: Sequence[Path],
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    precision: str,
    seconds: Mapping[str, float],
) -> Record:
    """What is kept of `questions`, which were asked together, and of their `answers`. Holds no text."""
    given = [answer for each in answers for answer in each]
    params = {
        "threshold": given[0]["threshold"],
        "criterion_ids": ", ".join(str(answer["criterion_id"] or "free text") for answer in given),
        "precision": precision,
        **text_facts("post", [question.post for question in questions]),
        **text_facts("criterion", [question.criterion for question in questions if question.criterion is not None]),
    }
    matched = sum(answer["label"] == "matched" for answer in given)
    return record(given[0]["model"], checkpoints, params, {**seconds, "pairs": len(given), "matched": matched})


def text_facts(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """What may be known of texts: characters, and a hash to find them again by; of several their number too."""
    if not texts:
        return {}
    digest = hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()
    facts = {f"{name}.characters": sum(map(len, texts)), f"{name}.sha256": digest}
    return facts if len(texts) == 1 else {f"{name}.texts": len(texts), **facts}


@cache
def _versions() -> dict[str, str]:
    from raycv.common.environment import describe_environment
    from raycv.model.checkpoint import VERSIONED

    packages = describe_environment()["packages"]
    return {name: packages[name] for name in VERSIONED}


def store_of(asked: str | None, tracked: str | None) -> str | None:
    """Where an inference is logged: as `asked`, else where its run was `tracked`; None: nowhere."""
    return None if asked == NOT_TRACKED else asked or tracked or LOCAL_URI


class InferenceLog:
    """The experiment of inferences in one MLflow store. Raises (any method): UserError if the store is out of reach."""

    def __init__(self, uri: str, experiment: str, seconds: int | None = None) -> None:
        """`seconds`: for each request, which then has one attempt; None: MLflow's usual patience."""
        from raycv.config.schema import TrackingConfig
        from raycv.tracking.tracker import Tracker

        check_password(uri)
        self._tracker: Tracker = Tracker(uri, seconds)
        artifacts = str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlruns")
        self._experiment = self._tracker.open_experiment(
            TrackingConfig(uri=uri, artifacts=artifacts, experiment=experiment)
        )

    def write(self, entry: Record) -> None:
        """One MLflow run."""
        self._tracker.log_inference(self._experiment, entry.tags, entry.params, entry.metrics)


class InferenceWriter:
    """Writes records from a thread of its own: an answer never waits for MLflow, nor fails with it."""

    def __init__(self, uri: str, experiment: str, busy: Callable[[], bool] = lambda: False) -> None:
        """Starts to open the store; `opened` is set when that has worked or failed.

        `busy`: whether requests are being answered. MLflow's client computes as much as a small model does, and in
        the same process: without a rest the answers came at less than half their rate (`benchmarks.load`).
        """
        self.opened = threading.Event()
        self._busy = busy
        self._closing = threading.Event()
        self._place = (uri, experiment)
        self._queue: queue.Queue[Record | None] = queue.Queue(WAITING)
        self._trouble: str | None = None
        self._dropped = 0
        self._log: InferenceLog | None = None
        self._thread = threading.Thread(target=self._work, name="inference-log", daemon=True)
        self._thread.start()

    def put(self, entry: Record) -> None:
        """Takes `entry` over; never waits."""
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._dropped += 1

    def warnings(self) -> list[str]:
        """What a user should know of the store by now."""
        lost = [f"{counted(self._dropped, 'inference')} did not reach MLflow, which is slow"] if self._dropped else []
        return lost + ([f"{NOT_LOGGED}: {self._trouble}"] if self._trouble else [])

    def close(self, seconds: float) -> None:
        """Writes what is waiting, for at most `seconds`, and logs how many records were left."""
        self._closing.set()
        with suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
            self._thread.join(seconds)
        if left := sum(entry is not None for entry in self._queue.queue):
            logger.warning("%s did not reach MLflow before the end", counted(left, "inference"))

    def _work(self) -> None:
        self._attempt(None)
        self.opened.set()
        while (entry := self._queue.get()) is not None:
            # Of this thread alone: what waits for the store takes nothing from the answers.
            before = time.thread_time()
            self._attempt(entry)
            if self._busy():
                self._closing.wait(REST * (time.thread_time() - before))

    def _attempt(self, entry: Record | None) -> None:
        try:
            self._log = self._log or InferenceLog(*self._place)
            if entry is not None:
                self._log.write(entry)
            self._trouble = None
        except UserError as error:
            self._trouble = error.what
        except Exception as error:  # noqa: BLE001  (the thread must outlive whatever the store throws)
            self._trouble = type(error).__name__
