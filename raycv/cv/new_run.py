"""A new run: names and makes its folder, writes its inputs, and starts its MLflow parent."""

import contextlib
import itertools
import shutil
import time
from pathlib import Path

from rich.console import Console

from raycv.common.environment import describe_environment
from raycv.common.files import check_writable, sha256_of, write_json, write_text
from raycv.common.locations import OBJECT_STORAGE, WORK, place_of, runs_folder
from raycv.config.schema import RunConfig
from raycv.config.validation import as_yaml
from raycv.cv.open_run import OpenRun
from raycv.cv.preparation import Base
from raycv.cv.resume import check_only, sole_process
from raycv.data.splits import Split, positives_table, splits_record
from raycv.data.types import Dataset
from raycv.errors import UserError, together
from raycv.orchestration.fold_task import Prepared
from raycv.rendering.terminal import say
from raycv.results.find_run import make_newest
from raycv.results.run_folder import RunFolder, resume_command
from raycv.results.storage import RECORDS, Bucket, PublishedRun, retire


def check_runs_folder(config: RunConfig) -> None:
    """Raises: UserError if raycv cannot write to the folder of runs, `run.dir`, or to the object storage there."""
    if config.run.dir.startswith(OBJECT_STORAGE):
        Bucket(config.run.dir).check()
    try:
        check_writable(_runs(config))
    except OSError as error:
        raise UserError(
            f"run.dir={config.run.dir}: raycv cannot write to {error.filename} ({error.strerror}).",
            kind="disk-unwritable",
            remedies=["choose a folder that you may write to: run.dir=<folder>"],
        ) from error


def _runs(config: RunConfig) -> Path:
    """The folder of runs, or where this machine's copies of runs under way lie."""
    return runs_folder(config.run.dir, WORK).absolute()


def _is_published(folder: Path) -> bool:
    run = PublishedRun.of(RunFolder(folder), WORK)
    return run is not None and run.manifest(RECORDS) is not None


def check_name(config: RunConfig) -> None:
    """Raises: UserError if `run.name` is set and its folder exists, here or in the object storage."""
    if config.run.name is None:
        return
    folder = _runs(config) / config.run.name
    if _is_published(folder):
        raise UserError(
            f"run.name={config.run.name}: {place_of(folder)} exists, and a run never writes into another's folder.",
            kind="run-exists",
            remedies=[
                "choose another run.name, or leave it out",
                f"if it was interrupted, resume it: {resume_command(RunFolder(folder))}",
                f"remove the old run: aws s3 rm --recursive {place_of(folder)}",
            ],
        )
    if folder.exists():
        raise UserError(
            f"run.name={config.run.name}: {folder} exists, and a run never writes into another's folder.",
            kind="run-exists",
            remedies=[
                "choose another run.name, or leave it out",
                *(
                    [f"if it was interrupted, resume it: {resume_command(RunFolder(folder))}"]
                    if RunFolder(folder).has_begun()
                    else []
                ),
                f"remove the old run: rm -r {folder}",
            ],
        )


def new_run_folder(config: RunConfig) -> RunFolder:
    """Makes a folder for the run, named `run.name`, or by the time.

    Raises: UserError if the name is taken, or raycv cannot make the folder.
    """
    runs = _runs(config)
    first = config.run.name or time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in itertools.count(1):
        name = first if attempt == 1 else f"{first}-{attempt}"
        try:
            # If two processes make it at the same time, one of them fails here.
            (runs / name).mkdir(parents=True)
            if not _is_published(runs / name):
                break
            (runs / name).rmdir()
            check_name(config)
        except OSError as error:
            if (runs / name).exists():
                check_name(config)
                continue
            raise UserError(
                f"run.dir={config.run.dir}: raycv cannot make the folder {runs / name} ({error.strerror}).",
                kind="disk-unwritable",
                remedies=["choose a folder that you may write to: run.dir=<folder>"],
            ) from error
    return RunFolder(runs / name)


def write_inputs(folder: RunFolder, config: RunConfig, prepared: Prepared) -> None:
    """Writes what the folds depend on: config, splits, counts of the data, environment."""
    write_text(folder.config, as_yaml(config))
    make_newest(folder)
    write_json(folder.splits, splits_record(prepared.dataset, prepared.splits, config.cv.seed))
    stats = {
        **prepared.dataset.stats,
        "labels_shuffled": config.data.shuffle_labels,
        "positives_per_fold": positives_table(prepared.dataset, prepared.splits),
        "encoding": prepared.encoding_facts,
        "warnings": [*prepared.dataset.warnings, *prepared.warnings],
    }
    write_json(folder.data_stats, stats)
    recorded = {
        "seeds": {"cv": config.cv.seed, "train": config.train.seed},
        "base_model": prepared.base_facts,
        "config_sha256": sha256_of(folder.config),
        "started": folder.config.stat().st_mtime,
    }
    write_json(folder.environment, describe_environment() | recorded)


class NewRun:
    """A run that does not exist yet. It keeps other processes out of its folder from `open` until `held` ends."""

    wants_all_folds = True
    _folder: RunFolder
    _is_open = False

    def __init__(self, config: RunConfig, console: Console, held: contextlib.ExitStack) -> None:
        """Raises: UserError if `cv.only` names a fold that the run does not have."""
        check_only(config)
        self.config = config
        self._console = console
        self._held = held

    def check_data(self, dataset: Dataset, splits: list[Split]) -> None:
        """Raises: UserError if raycv cannot make the run's folder, with all faults of a new MLflow store."""
        try:
            check_runs_folder(self.config)
            check_name(self.config)
        except UserError as error:
            from raycv.tracking.store_checks import new_store_faults

            # A disk that refuses this folder may refuse the store's too: the user hears of both at once.
            raise together([error, *new_store_faults(self.config.tracking)]) from error

    def check_base(self, base: Base) -> None:
        """Raises: UserError if raycv cannot use the MLflow store. A new run accepts any base model."""
        from raycv.tracking.experiment import check_store
        from raycv.tracking.store_checks import network_warning

        check_store(self.config.tracking)
        if warning := network_warning(self.config.tracking.uri):
            say(self._console, f"Warning: {warning}", "yellow")

    def check_nodes(self, base: Base) -> None:
        """Makes the run's folder, and asks all nodes for it. If the run is never opened, its folder is removed."""
        from raycv.orchestration.cluster import check_nodes

        self._folder = new_run_folder(self.config)
        self._held.callback(self._tidy)
        check_nodes(self._folder, base.files)

    def open(self, prepared: Prepared) -> OpenRun:
        """Fills the run's folder, and makes its MLflow parent."""
        from raycv.tracking.cross_validation import CrossValidationStore
        from raycv.tracking.experiment import open_experiment

        folder = self._folder
        config = self.config.model_copy(update={"run": self.config.run.model_copy(update={"name": folder.root.name})})
        write_inputs(folder, config, prepared)
        store = CrossValidationStore(config.tracking.uri)
        parent_id = store.start_family(folder, config, open_experiment(store, config.tracking))
        self._is_open = True
        self._held.enter_context(sole_process(folder))
        resume = resume_command(folder, config.cv.only)
        say(self._console, f"Run folder: {folder.root}   (if the run is interrupted: {resume})")
        opened = OpenRun(config, folder, store, parent_id, self._console)
        opened.publish_records()
        return opened

    def _tidy(self) -> None:
        """Removes a folder in which nothing is computed yet, so that the name is free. Retires a published copy."""
        if self._is_open:
            retire(self._folder)
        else:
            shutil.rmtree(self._folder.root, ignore_errors=True)
