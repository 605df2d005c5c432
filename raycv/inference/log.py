"""Logs an inference of the command or a scorer to MLflow: model, duration, lengths and hashes, never a text.

Imports nothing heavy before it logs.
"""

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycv import __version__
from raycv.common.locations import SQLITE
from raycv.errors import UserError, counted
from raycv.inference.questions import Answer, Question
from raycv.model.checkpoint import versions
from raycv.tracking.lookup import LOCAL_URI, check_password

if TYPE_CHECKING:
    from raycv.config.schema import InferConfig

logger = logging.getLogger(__name__)

NOT_TRACKED = "none"
NOT_LOGGED = "the answer stands, but is not in MLflow"
LOG_SECONDS = 5
"""Limit for a request to MLflow, which has one attempt."""
WAITING = 10_000
"""Records that may wait for a slow store. Further ones are dropped and counted, so that memory does not grow."""
REST = 4.0
"""Rest of the writer after a record, in multiples of the time that it computed, while requests wait."""


@dataclass(frozen=True)
class Record:
    """One inference as MLflow keeps it."""

    tags: Mapping[str, str]
    params: Mapping[str, Any]
    metrics: Mapping[str, float]


def record(
    model: Mapping[str, str | int | None],
    checkpoints: Sequence[Path],
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> Record:
    """The record of one inference of `model`, with the versions of packages.

    Args:
        model: Run, fold, base, and when the run finished, if that is known.
        checkpoints: The folders of the checkpoints that answered.
        params: Further parameters.
        metrics: The metrics.
    """
    params = {
        **{f"model.{key}": value for key, value in model.items() if value is not None},
        "checkpoints": ", ".join(map(str, checkpoints)),
        **params,
        **{f"versions.{name}": version for name, version in versions().items()},
    }
    return Record({"raycv.version": __version__, "raycv.run": str(model["run"])}, params, metrics)


def record_answers(
    checkpoints: Sequence[Path],
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    precision: str,
    seconds: Mapping[str, float],
) -> Record:
    """The record of `questions` that were asked together, and of their `answers`. Holds no text."""
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
    """Facts of texts without the texts: characters, a hash to find them again, and the number of several texts."""
    if not texts:
        return {}
    digest = hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()
    facts = {f"{name}.characters": sum(map(len, texts)), f"{name}.sha256": digest}
    return facts if len(texts) == 1 else {f"{name}.texts": len(texts), **facts}


def named_store(asked: str | None) -> str | None:
    """The store that the user named; None if the user named none, or wants no log."""
    return None if asked == NOT_TRACKED else asked


def store_of(asked: str | None, tracked: str | None) -> str | None:
    """The store for an inference: `asked`, else the one that `tracked` its run, else the local one; None for no log."""
    return None if asked == NOT_TRACKED else asked or tracked or LOCAL_URI


class InferenceLog:
    """The experiment of inferences in one MLflow store.

    Raises:
        UserError: From any method, if the store is out of reach.
    """

    def __init__(self, uri: str, experiment: str, seconds: int | None = None) -> None:
        """`seconds` limits each request, which then has one attempt; None means the usual limit and attempts."""
        from raycv.config.schema import TrackingConfig
        from raycv.tracking.experiment import open_experiment
        from raycv.tracking.run_store import RunStore

        check_password(uri)
        self._store = RunStore(uri, seconds)
        artifacts = str(Path(uri.removeprefix(SQLITE)).absolute().parent / "mlruns")
        self._experiment = open_experiment(
            self._store, TrackingConfig(uri=uri, artifacts=artifacts, experiment=experiment)
        )

    def write(self, entry: Record) -> None:
        """Logs `entry` as one MLflow run."""
        from raycv.tracking.run_store import log_inference

        log_inference(self._store, self._experiment, entry.tags, entry.params, entry.metrics)


def log_answered(
    config: "InferConfig", tracked: str | None, entry: Record, tell: Callable[[str], None], *, patient: bool = False
) -> None:
    """Logs `entry` to MLflow, and warns if that fails: the answer stands.

    Args:
        config: The config of the command.
        tracked: The store that has the run; None for the local one.
        entry: The record of the inference.
        tell: Gets the warning.
        patient: Whether each request has the usual attempts. Otherwise it has one of LOG_SECONDS, because a script
            waits for the command.
    """
    uri = store_of(config.tracking.uri, tracked)
    if uri is None:
        return
    try:
        InferenceLog(uri, config.tracking.experiment, None if patient else LOG_SECONDS).write(entry)
    except UserError as error:
        tell(f"{NOT_LOGGED}: {error.what}")


class InferenceWriter:
    """Writes records in its own thread, so that an answer neither waits for MLflow nor fails with it."""

    def __init__(self, uri: str, experiment: str, busy: Callable[[], bool] = lambda: False) -> None:
        """Starts to open the store, and sets `opened` when that has worked or failed.

        MLflow's client computes as much as a small model does, in the same process, so the thread rests while `busy`.
        Without a rest, answers came at less than half their rate (`benchmarks.load`).

        Args:
            uri: The address of the store.
            experiment: The name of the experiment.
            busy: Whether requests are being answered now.
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
        """Takes `entry` over, or drops and counts it if the queue is full. Never waits."""
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._dropped += 1

    def warnings(self) -> list[str]:
        """The warnings about the store that a user should read by now."""
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
            # We count only what this thread computes, because its waits for the store do not slow the answers.
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
        except Exception as error:  # noqa: BLE001  (the thread must outlive any error of the store)
            self._trouble = type(error).__name__
