"""Logs a run, its folds and an inference to MLflow: parameters, metrics, tags, files. Imports mlflow.

The driver alone logs a cross-validation: workers write files, and the driver logs them. Several processes that open a
new SQLite store at once would break it. The run folder holds all that is logged of a cross-validation, so a lost server
loses nothing of it.
"""

import contextlib
import itertools
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset as TrackedDataset
from mlflow.entities import DatasetInput, Experiment, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy.exc import SQLAlchemyError

from raycv import __version__
from raycv.common.environment import recorded_moment
from raycv.common.files import is_full, read_json, unwritable, write_json
from raycv.common.locations import SQLITE, absolute_uri
from raycv.common.retry import ATTEMPTS, ServiceError, call_with_retries, is_passing, without_statement
from raycv.common.secrets import mask_secrets
from raycv.config.schema import RunConfig, TrackingConfig
from raycv.errors import UserError, together
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import FoldFolder, RunFolder
from raycv.tracking.store_checks import (
    LOCK_SECONDS,
    LOG_IN,
    NO_ENTRY,
    check_artifacts,
    check_database,
    check_new_artifacts,
    lock_of,
    new_database,
    new_store_faults,
    place_of,
)
from raycv.training.metrics import METRICS, THRESHOLD, TRAIN_LOSS, VAL_LOSS, collapsed_because

logger = logging.getLogger(__name__)

# mlflow sets up its logger on import. Its lines about new tables do not help the user, so we hide them.
logging.getLogger("mlflow").setLevel(logging.WARNING)
# This logger prints the traceback of each error. We retry the call, or report the error in one line.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

T = TypeVar("T")

TIMEOUT, USUAL_SECONDS = "MLFLOW_HTTP_REQUEST_TIMEOUT", "30"
"""The value that `raycv/tracking/__init__.py` sets. MLflow reads it at each request."""
HANGING_SECONDS = 60.0
"""Seconds without requests to a store that let all attempts of a call time out: each call would wait as long."""
_hanging: dict[str, tuple[float, UserError]] = {}
"""For each such store: the moment at which requests start again, and the error to raise until then."""

PARENT_TAG = "mlflow.parentRunId"
FOLD_TAG = "raycv.fold"
RUN_TAG = "raycv.run"
FINISHED_TAG = "raycv.finished"
COLLAPSED_TAG = "raycv.collapsed"
REASONS_TAG = "raycv.collapsed_reasons"
EPOCH_METRICS = (TRAIN_LOSS, VAL_LOSS, *METRICS, THRESHOLD, "learning_rate")
"""The metrics that are logged per epoch, with the epoch as the step. Tune passes on more, which is not logged."""
BEST_PREFIX = "best_"
CHECKPOINT = "checkpoint"
START_TAG = "raycv.start"
"""Marks the call that made a run, so that a retry finds the run if the answer to that call was lost."""
PARAM_LIMIT = 6000


class Tracker:
    """An MLflow store. Every call has at most three attempts (FR-011).

    Raises:
        UserError: From any method, if the store stays out of reach or the call fails.
    """

    def __init__(self, uri: str, seconds: int | None = None) -> None:
        """`seconds`, for callers that cannot wait, limits each HTTP request and lock; a call then has one attempt."""
        self._seconds = seconds
        self.uri = absolute_uri(uri)
        self.shown_uri = mask_secrets(self.uri)
        self._database = Path(self.uri.removeprefix(SQLITE)) if self.uri.startswith(SQLITE) else None
        if self._database:
            check_database(self._database, seconds)
        self._client = self._call("open the store", self._alone, partial(MlflowClient, tracking_uri=self.uri))

    def open_experiment(self, config: TrackingConfig) -> str:
        """The id of the experiment of `config`. Makes the experiment if it does not exist."""
        return self._call("open the experiment", self._alone, partial(self._experiment, config))

    def _alone(self, call: Callable[[], T]) -> T:
        """Returns `call()` under a lock: two processes that make the tables of a SQLite file at once break the file."""
        seconds = self._seconds or LOCK_SECONDS
        with FileLock(lock_of(self._database), timeout=seconds) if self._database else contextlib.nullcontext():
            return call()

    def start_parent(self, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
        """Starts the parent run and returns its id."""
        return self._new_run("start the parent run", experiment_id, name, {RUN_TAG: name, **tags})

    def _new_run(self, what: str, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
        """Makes a run and returns its id. It makes only one run, even if the answer to an attempt is lost."""
        mark, attempts = secrets.token_hex(8), itertools.count()

        def make() -> Run:
            if next(attempts) and (made := self._client.search_runs([experiment_id], f"tags.`{START_TAG}` = '{mark}'")):
                return made[0]
            return self._client.create_run(experiment_id, run_name=name, tags={**tags, START_TAG: mark})

        return str(self._call(what, make).info.run_id)

    def start_family(self, folder: RunFolder, config: RunConfig, experiment_id: str) -> str:
        """Starts the parent run of the run in `folder`, logs the files there, records the id there, and returns it."""
        stats, git = read_json(folder.data_stats), read_json(folder.environment)["git"]
        tags = {
            "raycv.version": __version__,
            "raycv.data_hash": stats["data_hash"],
            "mlflow.source.name": "python -m raycv.run",
            "mlflow.source.type": "LOCAL",
            **({"mlflow.source.git.commit": git["commit"]} if git else {}),
            **({"raycv.control": "labels permuted"} if config.data.shuffle_labels else {}),
        }
        counts = {f"data.{key}": stats[key] for key in ("posts", "criteria", "pairs", "positives")}
        parent_id = self.start_parent(experiment_id, folder.root.name, tags)
        try:
            self.describe_parent(parent_id, folder, flat_params(config.model_dump()) | counts)
            self.log_dataset(parent_id, Path(config.data.dir).absolute().name, config.data.dir, stats["data_hash"])
            tracked = {"uri": self.shown_uri, "experiment_id": experiment_id, "parent_run_id": parent_id}
            write_json(folder.tracking, tracked)
        except BaseException as error:
            with contextlib.suppress(UserError):
                self.finish(parent_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        return parent_id

    def has(self, run_id: str) -> bool:
        """Whether the store has such a run."""

        def look() -> bool:
            try:
                self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False
            return True

        return self._call("look for a run", look)

    def reopen(self, run_id: str) -> None:
        """Sets a run that ended to RUNNING again."""
        self._call("reopen a run", self._client.update_run, run_id, status="RUNNING")

    def describe_parent(self, run_id: str, folder: RunFolder, params: Mapping[str, Any]) -> None:
        """Logs the parent's parameters and those of its files that exist."""
        self._log_params(run_id, params)
        self.log_files(run_id, [folder.config, folder.splits, folder.data_stats, folder.environment])

    def log_dataset(self, run_id: str, name: str, source: str, digest: str) -> None:
        """Logs the name, place and hash of a run's data set, without its content."""
        dataset = TrackedDataset(name=name, digest=digest[:36], source_type="local", source=json.dumps({"uri": source}))
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        self._call("log the data set", self._client.log_inputs, run_id, inputs)

    def children(self, parent_id: str) -> dict[int, Run]:
        """Maps each fold to its child run, or to the newest if a fold has several."""
        experiment_id = self.run(parent_id).info.experiment_id
        query = f"tags.`{PARENT_TAG}` = '{parent_id}'"
        runs = self._call(
            "find the child runs",
            self._client.search_runs,
            [experiment_id],
            query,
            order_by=["attributes.start_time ASC"],
        )
        return {int(run.data.tags[FOLD_TAG]): run for run in runs if FOLD_TAG in run.data.tags}

    def start_child(self, parent_id: str, fold: int, params: Mapping[str, Any]) -> str:
        """Returns the id of the child run of `fold`, which it finds by its tag or makes."""
        found, params = self.children(parent_id).get(fold), {**params, "fold": fold}
        if found is not None:
            self.reopen(found.info.run_id)
            # The store may have gone away between the run and its parameters, so we log those that are missing.
            self._log_params(found.info.run_id, {k: v for k, v in params.items() if k not in found.data.params})
            return str(found.info.run_id)
        experiment_id = self.run(parent_id).info.experiment_id
        tags = {PARENT_TAG: parent_id, FOLD_TAG: str(fold)}
        run_id = self._new_run("start a child run", experiment_id, f"fold_{fold}", tags)
        self._log_params(run_id, params)
        return run_id

    def log_epoch(self, run_id: str, metrics: Mapping[str, float], moment: int | None = None) -> None:
        """Logs the EPOCH_METRICS among `metrics` at the loop's epoch number. `moment` is in ms; None means now."""
        self.log_metrics(run_id, {key: metrics[key] for key in EPOCH_METRICS}, int(metrics["epoch"]), moment)

    def logged_epochs(self, run_id: str) -> set[int]:
        """The epochs that the store has of a child run."""
        history = self._call("read a child run", self._client.get_metric_history, run_id, VAL_LOSS)
        return {metric.step for metric in history}

    def log_fold(self, run_id: str, result: FoldResult, folder: FoldFolder, config: Path) -> None:
        """Logs a finished fold: epochs that are not logged yet, final metrics, threshold, checkpoint and files."""
        logged = self.logged_epochs(run_id)
        for epoch in result.history:
            if int(epoch["epoch"]) not in logged:
                self.log_epoch(run_id, epoch)
        best = {f"{BEST_PREFIX}{key}": value for key, value in result.metrics.items()}
        best |= {f"{BEST_PREFIX}{THRESHOLD}": result.threshold, "best_epoch": result.best_epoch}
        self._log_summary(run_id, best | {"epochs": result.epochs, "fold_seconds": result.seconds})
        self._mark_collapsed(run_id, result.collapse())
        self.log_files(run_id, [config, folder.result, folder.predictions, folder.epoch_scores])
        if folder.checkpoint.is_dir():
            self._call(
                "log a checkpoint",
                self._client.log_artifacts,
                run_id,
                str(folder.checkpoint),
                CHECKPOINT,
            )

    def log_missing_folds(self, parent_id: str, folder: RunFolder, folds: int, params: Mapping[str, Any]) -> None:
        """Logs from the run folder every fold whose child run is not complete, perhaps because the store was away."""
        complete = {fold for fold, run in self.children(parent_id).items() if run.info.status == "FINISHED"}
        for fold in sorted(set(range(folds)) - complete):
            run_id = self.start_child(parent_id, fold, params)
            files = folder.fold(fold)
            self.log_fold(run_id, FoldResult.read(files.result), files, folder.config)
            self.finish(run_id, "FINISHED")

    def log_report(self, parent_id: str, report: Mapping[str, Any], folder: RunFolder) -> None:
        """Logs the parent summary: means, deviations, best fold, and a link to each child (user story 2).

        It also logs the files that the run writes at its end.
        """
        numbers: dict[str, float] = {"best_fold": report["best_fold"]}
        for key, value in report["mean"].items():
            numbers[f"metric_mean_{key}"] = value
            numbers[f"metric_std_{key}"] = report["std"][key]
        self._log_summary(parent_id, numbers)
        children = self.children(parent_id)
        for fold, reasons in _collapsed(report):
            # An earlier version may have logged this fold without its mark or the reasons, so we add them.
            if fold in children and REASONS_TAG not in children[fold].data.tags:
                self._mark_collapsed(children[fold].info.run_id, reasons)
        tags = {f"raycv.fold_{fold}.run_id": run.info.run_id for fold, run in children.items()}
        if report["finished"]:
            tags[FINISHED_TAG] = report["finished"]
        if report["collapsed_folds"]:
            tags[COLLAPSED_TAG] = f"fold {', '.join(map(str, report['collapsed_folds']))}"
            tags[REASONS_TAG] = "\n".join(f"fold {fold}: {'; '.join(why)}" for fold, why in _collapsed(report))
        self._set_tags(parent_id, tags | {"mlflow.note.content": _note(report, children)})
        self.log_files(parent_id, [folder.pairs, folder.near_duplicates, folder.report])

    def _mark_collapsed(self, run_id: str, reasons: Sequence[str]) -> None:
        """Marks the child run of a fold as collapsed. Without reasons it does nothing."""
        if reasons:
            self._set_tags(run_id, {COLLAPSED_TAG: "true", REASONS_TAG: "; ".join(reasons)})

    def finish_family(self, parent_id: str, status: str) -> None:
        """Ends the parent run, and its children that are still running, as FINISHED, FAILED or KILLED.

        A child that still runs when the parent is FINISHED lacks something, so it ends as KILLED. It may be completed
        later.
        """
        self.finish(parent_id, status)
        for run in self.children(parent_id).values():
            if run.info.status == "RUNNING":
                self.finish(run.info.run_id, "KILLED" if status == "FINISHED" else status)

    def finish(self, run_id: str, status: str) -> None:
        """Ends a run as `status`: FINISHED, FAILED or KILLED. A run that has this status keeps its time.

        The end is never before the start, even if the clock was set back.
        """
        info = self.run(run_id).info
        if info.status == status:
            return
        ended = max(now_ms(), info.start_time)
        self._call("end a run", self._client.set_terminated, run_id, status, end_time=ended)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0, moment: int | None = None) -> None:
        """Logs all of `metrics` in one request, with the time `moment` in ms, or now."""
        moment = now_ms() if moment is None else moment
        batch = [Metric(key, float(value), moment, step) for key, value in metrics.items()]
        self._call("log metrics", self._client.log_batch, run_id, metrics=batch)

    def _log_summary(self, run_id: str, numbers: Mapping[str, float]) -> None:
        # MLflow makes a second point of a curve from a number that is logged again, so we log only what changed.
        known = self.run(run_id).data.metrics
        self.log_metrics(run_id, {key: value for key, value in numbers.items() if known.get(key) != value})

    def log_files(self, run_id: str, files: Sequence[Path]) -> None:
        """Logs those of `files` that exist, as artifacts at the top level."""
        for file in files:
            if file.is_file():
                self._call(f"log {file.name}", self._client.log_artifact, run_id, str(file))

    def download(self, run_id: str, artifact: str, folder: Path) -> Path:
        """Copies an artifact of a run into `folder` and returns its path."""
        got = self._call(f"fetch {artifact}", self._client.download_artifacts, run_id, artifact, str(folder))
        return Path(got)

    def checkpoint(self, run_id: str, fetched: Path) -> Path:
        """The checkpoint folder that a child run logged. A folder on a server is first fetched into `fetched`."""
        place = self.run(run_id).info.artifact_uri
        if place.startswith("file:"):
            return Path(local_file_uri_to_path(place)) / CHECKPOINT
        target = fetched / run_id
        if not (target / CHECKPOINT).is_dir():
            # We fetch into a temporary folder and move it, so that the checkpoint is there whole or not at all.
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target) as temporary:
                got = self.download(run_id, CHECKPOINT, Path(temporary))
                got.rename(target / CHECKPOINT)
        return target / CHECKPOINT

    def fold_of(self, run: Run) -> int | None:
        """The fold of a child run; None for any other run."""
        return int(run.data.tags[FOLD_TAG]) if FOLD_TAG in run.data.tags else None

    def parent_of(self, run: Run) -> str | None:
        """The id of a child's parent run; None for any other run."""
        return run.data.tags.get(PARENT_TAG)

    def finished_at(self, run: Run) -> str | None:
        """When the cross-validation of a parent or a child run was complete; None if nobody recorded it."""
        parent_id = self.parent_of(run)
        try:
            parent = run if parent_id is None else self.run(parent_id)
        except UserError:
            # A fold answers without its parent, which somebody may have deleted.
            return None
        return recorded_moment(parent.data.tags.get(FINISHED_TAG))

    def log_inference(
        self, experiment_id: str, tags: Mapping[str, str], params: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> str:
        """Logs a finished run: the model and facts of its answers, never a text (user story 3). Returns its id."""
        run_id = self._new_run("start a run", experiment_id, "infer", tags)
        self._log_params(run_id, params)
        self.log_metrics(run_id, metrics)
        self.finish(run_id, "FINISHED")
        return run_id

    def run(self, run_id: str) -> Run:
        """Raises: UserError if the store has no such run."""
        return self._call("read a run", self._client.get_run, run_id)

    def check_experiment(self, config: TrackingConfig) -> Experiment | None:
        """The experiment of `config`; None if it does not exist yet. Writes nothing.

        Raises:
            UserError: The experiment was deleted, or its folder for artifacts cannot be written.
        """
        found = self._call("look for the experiment", self._client.get_experiment_by_name, config.experiment)
        if found is None:
            if self._database:
                check_new_artifacts(config)
        elif found.lifecycle_stage != "active":
            raise UserError(
                f"The MLflow experiment {config.experiment!r} was deleted.",
                kind="tracking-store",
                remedies=[
                    f"restore it: mlflow experiments restore -x {found.experiment_id}",
                    "tracking.experiment=<other>",
                ],
            )
        elif (kept := self._artifacts_of(found)) is not None:
            other = ["tracking.experiment=<another>, which takes its place from tracking.artifacts"]
            check_artifacts(kept, other, f"the experiment {config.experiment!r} keeps its artifacts there")
        return found

    def _artifacts_of(self, experiment: Experiment) -> Path | None:
        """The folder of the artifacts; None if a server, or another store, keeps them."""
        is_folder = self._database and str(experiment.artifact_location).startswith("file:")
        return Path(local_file_uri_to_path(experiment.artifact_location)) if is_folder else None

    def _experiment(self, config: TrackingConfig) -> str:
        asked = Path(config.artifacts).absolute()
        found = self.check_experiment(config)
        if found is None:
            # A server chooses its place for artifacts. For a database in a file, MLflow would take the working
            # directory, so we name the place.
            place = asked.as_uri() if self._database else None
            # MLflow's page asks for the kind of an experiment that lacks this tag, so we set it.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            try:
                return str(self._client.create_experiment(config.experiment, artifact_location=place, tags=tags))
            except MlflowException as error:
                # Another client of the server may have made the experiment meanwhile, so we take that one.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return self._experiment(config)
        if (kept := self._artifacts_of(found)) not in (None, asked):
            logger.warning(
                "tracking.artifacts=%s is not used: the experiment %s keeps its artifacts in %s",
                *(config.artifacts, config.experiment, kept),
            )
        return str(found.experiment_id)

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        # MLflow limits the length of values, so we cut them. config.yaml has them whole.
        batch = [Param(key, str(value)[:PARAM_LIMIT]) for key, value in params.items()]
        self._call("log parameters", self._client.log_batch, run_id, params=batch)

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        batch = [RunTag(key, value[:8000]) for key, value in tags.items()]
        self._call("set tags", self._client.log_batch, run_id, tags=batch)

    def _call(self, what: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        remedies = [
            "see that the tracking server or database can be reached and written (tracking.uri)",
            "or track into a local file: tracking.uri=sqlite:///mlflow.db",
        ]
        until, said = _hanging.get(self.uri, (0.0, None))
        if said is not None and time.monotonic() < until:
            raise UserError(said.what, kind=said.kinds, remedies=said.remedies)
        try:
            with _within(self._seconds):
                return call_with_retries(
                    f"MLflow at {self.shown_uri}: {what}",
                    partial(call, *args, **kwargs),
                    kind="tracking-unreachable",
                    passing=_may_pass,
                    remedies=remedies,
                    attempts=ATTEMPTS if self._seconds is None else 1,
                )
        except ServiceError as error:
            if "timed out" in str(error.cause):
                _hanging[self.uri] = time.monotonic() + HANGING_SECONDS, error
            raise
        except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
            if is_full(error) and self._database:
                raise unwritable("What MLflow keeps", place_of(error, self._database), error) from error
            cause = mask_secrets(without_statement(error))
            if getattr(error, "error_code", None) in NO_ENTRY:
                remedies = [LOG_IN, *remedies[1:]]
            if "out-of-date database schema" in cause:
                remedies = [f"keep a copy of the database, then: mlflow db upgrade {self.shown_uri}", *remedies[1:]]
            raise UserError(
                f"MLflow at {self.shown_uri} could not {what}: {cause}", kind="tracking-unreachable", remedies=remedies
            ) from error


@contextlib.contextmanager
def _within(seconds: int | None) -> Iterator[None]:
    """Limits requests over HTTP to `seconds`, unless the user has set another time for them."""
    usual = os.environ[TIMEOUT]
    if seconds is not None and usual == USUAL_SECONDS:
        os.environ[TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        os.environ[TIMEOUT] = usual


def now_ms() -> int:
    """The time as MLflow writes it: Unix time in ms."""
    return int(time.time() * 1000)


def check_store(config: TrackingConfig) -> None:
    """Raises: UserError if the store of a new run cannot be used. Creates no store that does not exist yet."""
    if new_database(config) is None:
        Tracker(config.uri).check_experiment(config)
    elif faults := new_store_faults(config):
        raise together(faults)


def flat_params(config: Mapping[str, Any]) -> dict[str, str]:
    """A run's config as MLflow parameters, `section.key` -> value, with passwords in addresses masked."""
    sections = {name: values for name, values in config.items() if isinstance(values, Mapping)}
    return {
        f"{section}.{key}": mask_secrets(str(value))
        for section, values in sections.items()
        for key, value in values.items()
    }


def _may_pass(error: Exception) -> bool:
    """Whether a second attempt may succeed. The HTTP client wraps a lost connection into an MlflowException."""
    if is_full(error):
        return False
    return is_passing(error) or (isinstance(error, MlflowException) and "Max retries exceeded" in str(error))


def _collapsed(report: Mapping[str, Any]) -> list[tuple[int, list[str]]]:
    """The folds that have collapsed, with the reasons."""
    return [(fold["fold"], fold["collapsed"]) for fold in report["folds"] if fold["collapsed"]]


def _note(report: Mapping[str, Any], children: Mapping[int, Run]) -> str:
    """The parent's description in the MLflow page: a table of the folds with a link to each."""
    lines = [
        *(["**Control: the labels are permuted. These scores are not a result.**", ""] if report["control"] else []),
        *(line for fold, why in _collapsed(report) for line in (f"**Fold {fold}: {collapsed_because(why)}.**", "")),
        f"Best fold: {report['best_fold']}",
        "",
        "| fold | " + " | ".join(METRICS) + " | threshold |",
        "|---" * (len(METRICS) + 2) + "|",
    ]
    for fold in report["folds"]:
        number = fold["fold"]
        run = children.get(number)
        link = f"[{number}](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})" if run else number
        values = [fold["metrics"][key] for key in METRICS] + [fold["threshold"]]
        lines.append(f"| {link} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)
