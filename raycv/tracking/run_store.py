"""Runs in an MLflow store, of any kind: starts, reads, fills and ends them."""

import itertools
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from raycv.tracking.store import Store

HIDDEN = "mlflow.raycv."
"""The beginning of tags that only machines read: MLflow's page hides those of `mlflow.`."""
START_TAG = f"{HIDDEN}start"
"""Marks the call that made a run, so that a retry finds the run if the answer to that call was lost."""
PARAM_LIMIT, TAG_LIMIT = 6000, 8000


class RunStore(Store):
    """An MLflow store with its runs. Raises: UserError as Store does."""

    def start(self, what: str, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
        """Makes a run and returns its id. It makes only one run, even if the answer to an attempt is lost."""
        mark, attempts = secrets.token_hex(8), itertools.count()

        def make() -> Run:
            if next(attempts) and (made := self.client.search_runs([experiment_id], f"tags.`{START_TAG}` = '{mark}'")):
                return made[0]
            return self.client.create_run(experiment_id, run_name=name, tags={**tags, START_TAG: mark})

        return str(self.call(what, make).info.run_id)

    def has(self, run_id: str) -> bool:
        """Whether the store has such a run."""

        def look() -> bool:
            try:
                self.client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False
            return True

        return self.call("look for a run", look)

    def run(self, run_id: str) -> Run:
        """Raises: UserError if the store has no such run."""
        return self.call("read a run", self.client.get_run, run_id)

    def reopen(self, run_id: str) -> None:
        """Sets a run that ended to RUNNING again."""
        self.call("reopen a run", self.client.update_run, run_id, status="RUNNING")

    def finish(self, run_id: str, status: str) -> None:
        """Ends a run as `status`: FINISHED, FAILED or KILLED. A run that has this status keeps its time.

        The end is never before the start, even if the clock was set back.
        """
        info = self.run(run_id).info
        if info.status == status:
            return
        ended = max(now_ms(), info.start_time)
        self.call("end a run", self.client.set_terminated, run_id, status, end_time=ended)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Logs parameters. MLflow limits the length of values, so we cut them; config.yaml has them whole."""
        batch = [Param(key, str(value)[:PARAM_LIMIT]) for key, value in params.items()]
        self.call("log parameters", self.client.log_batch, run_id, params=batch)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags, each cut to the length that MLflow takes."""
        batch = [RunTag(key, value[:TAG_LIMIT]) for key, value in tags.items()]
        self.call("set tags", self.client.log_batch, run_id, tags=batch)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0, moment: int | None = None) -> None:
        """Logs all of `metrics` in one request, with the time `moment` in ms, or now."""
        moment = now_ms() if moment is None else moment
        batch = [Metric(key, float(value), moment, step) for key, value in metrics.items()]
        self.call("log metrics", self.client.log_batch, run_id, metrics=batch)

    def log_summary(self, run_id: str, numbers: Mapping[str, float]) -> None:
        """Logs those of `numbers` that changed: MLflow would make a second point of a curve from the same number."""
        known = self.run(run_id).data.metrics
        self.log_metrics(run_id, {key: value for key, value in numbers.items() if known.get(key) != value})

    def log_files(self, run_id: str, files: Sequence[Path]) -> None:
        """Logs those of `files` that exist, as artifacts at the top level."""
        for file in files:
            if file.is_file():
                self.call(f"log {file.name}", self.client.log_artifact, run_id, str(file))

    def download(self, run_id: str, artifact: str, folder: Path) -> Path:
        """Copies an artifact of a run into `folder` and returns its path."""
        got = self.call(f"fetch {artifact}", self.client.download_artifacts, run_id, artifact, str(folder))
        return Path(got)


def now_ms() -> int:
    """The time as MLflow writes it: Unix time in ms."""
    return int(time.time() * 1000)


def log_inference(
    store: RunStore,
    experiment_id: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> str:
    """Logs a finished run: the model and facts of its answers, never a text (user story 3). Returns its id."""
    run_id = store.start("start a run", experiment_id, "infer", tags)
    store.log_params(run_id, params)
    store.log_metrics(run_id, metrics)
    store.finish(run_id, "FINISHED")
    return run_id
