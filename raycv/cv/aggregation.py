"""Makes the summary (user story 2) or the page of a finished run again, from its folder, its data set or MLflow."""

import contextlib
import shlex
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from raycv.common.environment import utc_now
from raycv.common.files import read_json, write_json
from raycv.common.locations import place_of, runs_folder
from raycv.config.schema import AggregateConfig, ReportConfig, RunConfig
from raycv.cv.bundle import check_bundle, check_free, write_bundle
from raycv.cv.preparation import load_data
from raycv.errors import UserError
from raycv.rendering.terminal import say, summary_table, verdict_lines
from raycv.results.find_run import (
    existing_run,
    find_run,
    finished_at,
    folds_of,
    recorded_config,
    runs_there,
    said_latest,
)
from raycv.results.fold_result import FoldResult
from raycv.results.report import summarize
from raycv.results.run_folder import RunFolder, read_record, resume_command
from raycv.results.storage import bring_up_to_date, fetch_checkpoints, publish_records
from raycv.tracking.lookup import LOCAL_URI, mlflow_run, recorded_uri, tracked_run


def aggregate(config: AggregateConfig) -> None:
    """Reduces the folds of a finished run again, writes `report.json` and logs the parent summary.

    A run in `config.dir` is read from its folder; any other `config.run` is taken for the id of an MLflow parent run.
    Raises: UserError if no run has that name or id; RunFailedError if the run lacks a fold.
    """
    bring_up_to_date(config.dir, config.run, folds_of)
    folder = find_run(runs_folder(config.dir), config.run)
    console = Console()
    if folder and (line := said_latest(config.run, folder)):
        say(console, line)
    report, where = _from_folder(folder, config) if folder else _from_mlflow(config)
    console.print(summary_table(report))
    say(console, where)


def _from_folder(folder: RunFolder, config: AggregateConfig) -> tuple[dict[str, Any], str]:
    from raycv.tracking.cross_validation import flat_params
    from raycv.tracking.model import log_best_fold

    folds = folds_of(folder.config)
    fetch_checkpoints(folder, folder.finished(folds))
    try:
        results = [FoldResult.of(folder, fold) for fold in folder.finished(folds)]
    except UserError as error:
        remedies = ["put a good copy in its place: MLflow has one", f"or train that fold again: {_again(folder)}"]
        raise UserError(error.what, kind=error.kinds, remedies=remedies) from error
    # The run finished when its first report was written. One of an earlier version does not say when that was.
    finished = finished_at(folder) if folder.report.is_file() else utc_now()
    report = summarize(folder.root.name, results, folds, read_record(folder.data_stats), _again(folder), finished)
    write_json(folder.report, report)
    uri = config.tracking_uri or recorded_uri(folder, "tracking_uri")
    store, parent_id = tracked_run(folder, uri, "tracking_uri", given=config.tracking_uri is not None)
    config_values = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    store.log_missing_folds(parent_id, folder, folds, flat_params(config_values))
    store.log_report(parent_id, report, folder)
    why = log_best_fold(store, parent_id, folder, report)
    store.finish(parent_id, "FINISHED")
    publish_records(folder)
    without = "" if why is None else f"\nWarning: the model of the best fold is not in MLflow: {why}"
    return report, f"Report: {place_of(folder.report)}\nMLflow: parent run {parent_id} at {store.shown_uri}{without}"


def _again(folder: RunFolder) -> str:
    # A run that has its report is finished: raycv resumes it only without that file.
    return (f"rm {shlex.quote(str(folder.report))}; " if folder.report.is_file() else "") + resume_command(folder)


def _from_mlflow(config: AggregateConfig) -> tuple[dict[str, Any], str]:
    runs = runs_folder(config.dir)
    store, parent = mlflow_run(config.run, runs, config.tracking_uri or LOCAL_URI)
    name = parent.data.tags.get("raycv.run")
    if name is None:
        what = f"run={config.run} is an MLflow run, but not the parent of a cross-validation."
        raise UserError(what, kind="run-missing", remedies=runs_there(runs, config.run))
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary))
        results = []
        finished = {fold: run for fold, run in store.children(config.run).items() if run.info.status == "FINISHED"}
        for fold, run in finished.items():
            target = folder.fold(fold)
            target.root.mkdir()
            results.append(FoldResult.read(store.download(run.info.run_id, target.result.name, target.root)))
        stats = read_json(store.download(config.run, folder.data_stats.name, folder.root))
        folds = folds_of(store.download(config.run, folder.config.name, folder.root))
        report = summarize(name, results, folds, stats, finished=store.finished_at(parent))
        write_json(folder.report, report)
        # The parent has it if the run made its page. Then its verdict stays in the description.
        with contextlib.suppress(UserError):
            store.download(config.run, folder.evaluation.name, folder.root)
        store.log_report(config.run, report, folder)
    return report, f"MLflow: parent run {config.run} at {store.shown_uri} (artifact report.json)"


def make_page(config: ReportConfig) -> None:
    """Writes the statistics, the page and the other files of a finished run again, and prints the verdict.

    With `bundle` it writes a bundle for reviewers instead, and with `check` it checks one.

    Raises:
        UserError: No run has that name, a fold is not finished, a file is damaged, or the data set is another one.
        NotShownError: The numbers of the bundle do not follow from its data.
    """
    from raycv.rendering.publish import publish

    if config.check is not None:
        check_bundle(Path(config.check), Console())
        return
    if config.bundle is not None:
        check_free(Path(config.bundle))
    runs = runs_folder(config.dir)
    folder = existing_run(runs, config.run)
    console = Console()
    if line := said_latest(config.run, folder):
        say(console, line)
    dataset = None
    if config.data.dir is not None:
        dataset, _ = load_data(_with_data(recorded_config(folder), config.data.dir))
    if config.bundle is not None:
        write_bundle(Path(config.bundle), folder, dataset, console)
        return
    with console.status("Computing the statistics"):
        evaluation = publish(folder, dataset)
    publish_records(folder)
    say(console, verdict_lines(evaluation, folder))


def _with_data(config: RunConfig, place: str) -> RunConfig:
    """The recorded config with the data in another folder. The criteria move along if they lay beside the posts."""
    data = {"dir": place}
    if config.data.criteria_dir == config.data.dir:
        data["criteria_dir"] = place
    return config.model_copy(update={"data": config.data.model_copy(update=data)})
