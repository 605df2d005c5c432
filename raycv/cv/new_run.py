"""Makes the folder of a new run, writes its inputs, and opens its MLflow parent."""

import itertools
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from raycv.common.environment import describe_environment
from raycv.common.files import check_writable, sha256_of, write_json, write_text
from raycv.config.schema import RunConfig
from raycv.config.validation import as_yaml
from raycv.data.splits import positives_table, splits_record
from raycv.errors import UserError
from raycv.orchestration.fold_task import Prepared
from raycv.results.find_run import make_newest
from raycv.results.run_folder import RunFolder, resume_command

if TYPE_CHECKING:
    from raycv.tracking.tracker import Tracker


def check_run_folder(config: RunConfig, *, taken: bool = False) -> None:
    """Raises: UserError if runs cannot be written, or the run's folder exists; an earlier run's is `taken` for sure."""
    try:
        check_writable(Path(config.run.dir))
    except OSError as error:
        raise UserError(
            f"run.dir={config.run.dir}: {error.filename} is no folder that can be written ({error.strerror}).",
            remedies=["choose a folder that you may write to: run.dir=<folder>"],
        ) from error
    if not taken and config.run.name is not None and (Path(config.run.dir) / config.run.name).exists():
        folder = Path(config.run.dir).absolute() / config.run.name
        raise UserError(
            f"run.name={config.run.name}: {folder} exists, and a run never writes into another's folder.",
            remedies=[
                "choose another run.name, or leave it out",
                *(
                    [f"if it was interrupted, go on with it: {resume_command(RunFolder(folder))}"]
                    if RunFolder(folder).has_begun()
                    else []
                ),
                f"remove the old run: rm -r {folder}",
            ],
        )


def new_run_folder(config: RunConfig) -> RunFolder:
    """A fresh folder for the run, named `run.name`, or by the time.

    Raises: UserError if the name is taken or the folder cannot be made.
    """
    check_run_folder(config)
    runs = Path(config.run.dir).absolute()
    first = config.run.name or time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in itertools.count(1):
        name = first if attempt == 1 else f"{first}-{attempt}"
        try:
            # Of two processes that make it at once one is told that it exists.
            (runs / name).mkdir(parents=True)
            break
        except OSError as error:
            if (runs / name).exists():
                check_run_folder(config)
                continue
            raise UserError(
                f"run.dir={config.run.dir}: the folder {runs / name} cannot be made ({error.strerror}).",
                remedies=["choose a folder that you may write to: run.dir=<folder>"],
            ) from error
    return RunFolder(runs / name)


def write_inputs(folder: RunFolder, config: RunConfig, prepared: Prepared) -> None:
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
    }
    write_json(folder.environment, describe_environment() | recorded)


def start_run(config: RunConfig, prepared: Prepared) -> tuple[RunConfig, RunFolder, "Tracker", str]:
    """Makes the run's folder and its MLflow parent; takes both back if not all of it can be had.

    Returns the config under the name that the run has now, however it came to it, the folder, the store, and the id
    of the parent there.
    """
    from raycv.orchestration.cluster import check_nodes
    from raycv.tracking.tracker import Tracker

    folder = new_run_folder(config)
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": folder.root.name})})
    try:
        write_inputs(folder, config, prepared)
        check_nodes(folder, prepared.base)
        tracker = Tracker(config.tracking.uri)
        parent_id = tracker.start_family(folder, config, tracker.open_experiment(config.tracking))
    except BaseException:
        # Nothing is computed yet, and the name is free again.
        shutil.rmtree(folder.root, ignore_errors=True)
        raise
    return config, folder, tracker, parent_id
