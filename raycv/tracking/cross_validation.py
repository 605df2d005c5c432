"""A cross-validation in an MLflow store: a parent run, and a child run per fold."""

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset as TrackedDataset
from mlflow.entities import DatasetInput, InputTag, Run
from mlflow.utils.file_utils import local_file_uri_to_path

from raycv import __version__
from raycv.common.environment import recorded_moment
from raycv.common.files import read_json, write_json
from raycv.common.secrets import mask_secrets
from raycv.config.schema import RunConfig
from raycv.errors import UserError
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import FoldFolder, RunFolder, read_record
from raycv.tracking.description import collapsed, description
from raycv.tracking.run_store import HIDDEN, RunStore
from raycv.training.metrics import METRICS, THRESHOLD, TRAIN_LOSS, VAL_LOSS

PARENT_TAG = "mlflow.parentRunId"
FOLD_TAG = "raycv.fold"
RUN_TAG = "raycv.run"
FINISHED_TAG = "raycv.finished"
COLLAPSED_TAG = "raycv.collapsed"
REASONS_TAG = "raycv.collapsed_reasons"
CHECK_TAG = "raycv.check"
"""followed by a dot and the code of a check that found something"""
EPOCH_METRICS = (TRAIN_LOSS, VAL_LOSS, *METRICS, THRESHOLD, "learning_rate")
"""The metrics that are logged per epoch, with the epoch as the step. Tune passes on more, which is not logged."""
BEST_PREFIX = "best_"
BEST_FOLD = "best_fold"
"""A metric and a tag of the parent."""
CHECKPOINT = "checkpoint"


class CrossValidationStore(RunStore):
    """An MLflow store with its cross-validations. Raises: UserError as Store does."""

    def start_parent(self, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
        """Starts the parent run and returns its id."""
        return self.start("start the parent run", experiment_id, name, {RUN_TAG: name, **tags})

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

    def describe_parent(self, run_id: str, folder: RunFolder, params: Mapping[str, Any]) -> None:
        """Logs the parent's parameters and those of its files that exist."""
        self.log_params(run_id, params)
        self.log_files(run_id, [folder.config, folder.splits, folder.data_stats, folder.environment])

    def log_dataset(self, run_id: str, name: str, source: str, digest: str) -> None:
        """Logs the name, place and hash of a run's data set, without its content."""
        dataset = TrackedDataset(name=name, digest=digest[:36], source_type="local", source=json.dumps({"uri": source}))
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        self.call("log the data set", self.client.log_inputs, run_id, inputs)

    def children(self, parent_id: str, fold: int | None = None) -> dict[int, Run]:
        """Maps each fold, or `fold` alone, to its child run, or to the newest if a fold has several."""
        experiment_id = self.run(parent_id).info.experiment_id
        query = f"tags.`{PARENT_TAG}` = '{parent_id}'"
        # All children of a large study would take longer to read with each one that starts.
        query += "" if fold is None else f" AND tags.`{FOLD_TAG}` = '{fold}'"
        runs = self.call(
            "find the child runs",
            self.client.search_runs,
            [experiment_id],
            query,
            order_by=["attributes.start_time ASC"],
        )
        return {int(run.data.tags[FOLD_TAG]): run for run in runs if FOLD_TAG in run.data.tags}

    def start_child(self, parent_id: str, fold: int, params: Mapping[str, Any]) -> str:
        """Returns the id of the child run of `fold`, which it finds by its tag or makes."""
        found, params = self.children(parent_id, fold).get(fold), {**params, "fold": fold}
        if found is not None:
            self.reopen(found.info.run_id)
            # The store may have gone away between the run and its parameters, so we log those that are missing.
            self.log_params(found.info.run_id, {k: v for k, v in params.items() if k not in found.data.params})
            return str(found.info.run_id)
        experiment_id = self.run(parent_id).info.experiment_id
        tags = {PARENT_TAG: parent_id, FOLD_TAG: str(fold)}
        run_id = self.start("start a child run", experiment_id, f"fold_{fold}", tags)
        self.log_params(run_id, params)
        return run_id

    def log_epoch(self, run_id: str, metrics: Mapping[str, float], moment: int | None = None) -> None:
        """Logs the EPOCH_METRICS among `metrics` at the loop's epoch number. `moment` is in ms; None means now."""
        self.log_metrics(run_id, {key: metrics[key] for key in EPOCH_METRICS}, int(metrics["epoch"]), moment)

    def logged_epochs(self, run_id: str) -> set[int]:
        """The epochs that the store has of a child run."""
        history = self.call("read a child run", self.client.get_metric_history, run_id, VAL_LOSS)
        return {metric.step for metric in history}

    def log_fold(self, run_id: str, result: FoldResult, folder: FoldFolder, config: Path) -> None:
        """Logs a finished fold: epochs that are not logged yet, final metrics, threshold, checkpoint and files."""
        logged = self.logged_epochs(run_id)
        for epoch in result.history:
            if int(epoch["epoch"]) not in logged:
                self.log_epoch(run_id, epoch)
        best = {f"{BEST_PREFIX}{key}": value for key, value in result.metrics.items()}
        best |= {f"{BEST_PREFIX}{THRESHOLD}": result.threshold, "best_epoch": result.best_epoch}
        best |= {"epochs": result.epochs, "fold_seconds": result.seconds, "out_of_memory": result.out_of_memory()}
        # Earlier versions did not record restarts, which is not the same as none.
        best |= {} if result.restarts is None else {"restarts": len(result.restarts)}
        self.log_summary(run_id, best)
        self._mark_collapsed(run_id, result.collapse())
        self.log_files(run_id, [config, folder.result, folder.predictions, folder.epoch_scores])
        if folder.checkpoint.is_dir():
            self.call(
                "log a checkpoint",
                self.client.log_artifacts,
                run_id,
                str(folder.checkpoint),
                CHECKPOINT,
            )

    def log_missing_folds(self, parent_id: str, folder: RunFolder, folds: int, params: Mapping[str, Any]) -> None:
        """Logs from the run folder every finished fold whose child run is not complete, as after a store was away."""
        complete = {fold for fold, run in self.children(parent_id).items() if run.info.status == "FINISHED"}
        for fold in sorted(set(folder.finished(folds)) - complete):
            run_id = self.start_child(parent_id, fold, params)
            files = folder.fold(fold)
            self.log_fold(run_id, FoldResult.read(files.result), files, folder.config)
            self.finish(run_id, "FINISHED")

    def log_report(self, parent_id: str, report: Mapping[str, Any], folder: RunFolder) -> None:
        """Logs the parent summary: means, deviations, best fold, and a link to each child (user story 2)."""
        numbers: dict[str, float] = {BEST_FOLD: report["best_fold"]}
        for key, value in report["mean"].items():
            numbers[f"metric_mean_{key}"] = value
            numbers[f"metric_std_{key}"] = report["std"][key]
        self.log_summary(parent_id, numbers)
        children = self.children(parent_id)
        for fold, reasons in collapsed(report):
            # An earlier version may have logged this fold without its mark or the reasons, so we add them.
            if fold in children and REASONS_TAG not in children[fold].data.tags:
                self._mark_collapsed(children[fold].info.run_id, reasons)
        tags = {f"{HIDDEN}fold_{fold}.run_id": run.info.run_id for fold, run in children.items()}
        # Beside the metric, which MLflow's table shows as a number with decimals.
        tags[BEST_FOLD] = str(report["best_fold"])
        if report["finished"]:
            tags[FINISHED_TAG] = report["finished"]
        if report["collapsed_folds"]:
            tags[COLLAPSED_TAG] = f"fold {', '.join(map(str, report['collapsed_folds']))}"
            tags[REASONS_TAG] = "\n".join(f"fold {fold}: {'; '.join(why)}" for fold, why in collapsed(report))
        evaluation = read_record(folder.evaluation) if folder.evaluation.is_file() else None
        if evaluation:
            found = [check for check in evaluation["checks"] if check["status"] == "found"]
            tags |= {f"{CHECK_TAG}.{check['code']}": check["finding"] for check in found}
        self.set_tags(parent_id, tags | {"mlflow.note.content": description(report, children, evaluation)})
        made = [folder.evaluation, folder.page, folder.page_markdown, folder.model_card]
        self.log_files(parent_id, [folder.pairs, folder.near_duplicates, *made, folder.report])
        for place in (folder.tables, folder.figures):
            if place.is_dir():
                self.call(f"log {place.name}", self.client.log_artifacts, parent_id, str(place), place.name)

    def _mark_collapsed(self, run_id: str, reasons: Sequence[str]) -> None:
        """Marks the child run of a fold as collapsed. Without reasons it does nothing."""
        if reasons:
            self.set_tags(run_id, {COLLAPSED_TAG: "true", REASONS_TAG: "; ".join(reasons)})

    def finish_family(self, parent_id: str, status: str) -> None:
        """Ends the parent run, and its children that are still running, as FINISHED, FAILED or KILLED.

        A child that still runs when the parent is FINISHED lacks something, so it ends as KILLED. It may be completed
        later.
        """
        self.finish(parent_id, status)
        for run in self.children(parent_id).values():
            if run.info.status == "RUNNING":
                self.finish(run.info.run_id, "KILLED" if status == "FINISHED" else status)

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


def flat_params(config: Mapping[str, Any]) -> dict[str, str]:
    """A run's config as MLflow parameters, `section.key` -> value, with passwords in addresses masked."""
    sections = {name: values for name, values in config.items() if isinstance(values, Mapping)}
    return {
        f"{section}.{key}": mask_secrets(str(value))
        for section, values in sections.items()
        for key, value in values.items()
    }
