"""`python -m raycv.aggregate run=<name|latest|MLflow parent id>`: recomputes and logs the summary (user story 2)."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from raycv.cli import run_command
from raycv.config import AggregateConfig
from raycv.errors import UserError
from raycv.live import say
from raycv.paths import RunFolder, read_json, write_json
from raycv.records import FoldResult
from raycv.report import summarize, summary_table

if TYPE_CHECKING:
    from raycv.tracking import Tracker


def aggregate(config: AggregateConfig) -> None:
    """Reduces the folds of a finished run again, writes `report.json` and logs the parent summary.

    A run in `config.dir` is read from its folder; any other `config.run` is taken for the id of an MLflow parent run.
    Raises: UserError if there is no such run; RunFailedError if a fold of it is missing.
    """
    folder = find_run(Path(config.dir), config.run)
    console = Console()
    if folder and config.run == "latest":
        say(console, f"The newest finished run: {folder.root.name}")
    report, where = _from_folder(folder, config) if folder else _from_mlflow(config)
    console.print(summary_table(report))
    say(console, where)


def find_run(runs: Path, run: str) -> RunFolder | None:
    """The folder of the run named `run`, or for `latest` of the newest whose folds are all finished, else the newest.

    None if there is none of that name.

    Raises: UserError if `latest` is asked for and there is no run at all.
    """
    if run != "latest":
        # A name, or the path of the folder, as the shell completes it.
        named = (folder for folder in (runs / run, Path(run)) if (folder / "config.yaml").is_file())
        return next((RunFolder(folder.absolute()) for folder in named), None)
    made = sorted(runs.absolute().glob("*/config.yaml"), key=lambda path: (path.stat().st_mtime, path))
    if not made:
        raise UserError(
            f"There is no run in {runs.absolute()}.",
            remedies=[
                "make one: python -m raycv.run experiment=quickstart",
                "name the folder that holds them: dir=<folder>",
            ],
        )
    return RunFolder(([path for path in made if _is_finished(path)] or made)[-1].parent)


def _is_finished(config_file: Path) -> bool:
    folder = RunFolder(config_file.parent)
    try:
        return all(folder.fold(fold).result.is_file() for fold in range(_folds(config_file)))
    except UserError:
        return False


def _from_folder(folder: RunFolder, config: AggregateConfig) -> tuple[dict[str, Any], str]:
    from raycv.tracking import flat_params

    folds = _folds(folder.config)
    finished = [folder.fold(fold).result for fold in range(folds) if folder.fold(fold).result.is_file()]
    stats = read_json(folder.data_stats)
    report = summarize(folder.root.name, [FoldResult.read(path) for path in finished], folds, stats)
    write_json(folder.report, report)
    tracked = read_json(folder.tracking)
    parent_id = tracked["parent_run_id"]
    tracker = _tracker(config.tracking_uri or tracked["uri"])
    config_values = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    tracker.log_missing_folds(parent_id, folder, folds, flat_params(config_values))
    tracker.log_report(parent_id, report, folder.report)
    tracker.finish(parent_id, "FINISHED")
    return report, f"Report: {folder.report}\nMLflow: parent run {parent_id} at {tracker.shown_uri}"


def _from_mlflow(config: AggregateConfig) -> tuple[dict[str, Any], str]:
    tracker = _tracker(config.tracking_uri or "sqlite:///mlflow.db")
    name = _parent_name(tracker, config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary))
        results = []
        finished = {fold: run for fold, run in tracker.children(config.run).items() if run.info.status == "FINISHED"}
        for fold, run in finished.items():
            target = folder.fold(fold)
            target.root.mkdir()
            results.append(FoldResult.read(tracker.download(run.info.run_id, target.result.name, target.root)))
        stats = read_json(tracker.download(config.run, folder.data_stats.name, folder.root))
        folds = _folds(tracker.download(config.run, folder.config.name, folder.root))
        report = summarize(name, results, folds, stats)
        write_json(folder.report, report)
        tracker.log_report(config.run, report, folder.report)
    return report, f"MLflow: parent run {config.run} at {tracker.shown_uri} (artifact report.json)"


def _folds(config_file: Path) -> int:
    """How many folds the run was asked for."""
    try:
        return int(yaml.safe_load(config_file.read_text(encoding="utf-8"))["cv"]["folds"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{config_file} is damaged: it does not say how many folds were asked for.") from error


def _tracker(uri: str) -> "Tracker":
    from raycv.tracking import Tracker

    if "***" in uri:
        raise UserError(
            f"The run was tracked at {uri}, whose password was not written down.",
            remedies=["give the whole address: tracking_uri=http://user:password@host"],
        )
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).is_file():
        raise UserError(
            f"The MLflow database {Path(database).absolute()} does not exist.",
            remedies=["run it where the cross-validation ran", "tracking_uri=sqlite:////folder/mlflow.db"],
        )
    return Tracker(uri)


def _parent_name(tracker: "Tracker", config: AggregateConfig) -> str:
    remedies = ["the newest run: run=latest", f"the runs there are: ls {config.dir}", "another folder: dir=<folder>"]
    try:
        tags = tracker.run(config.run).data.tags
    except UserError as error:
        raise UserError(
            f"run={config.run} is neither a run in {Path(config.dir).absolute()} nor an MLflow run: {error.what}",
            remedies=remedies,
        ) from error
    if "raycv.run" not in tags:
        raise UserError(
            f"run={config.run} is an MLflow run, but not the parent of a cross-validation.", remedies=remedies
        )
    return str(tags["raycv.run"])


def main() -> None:
    run_command("aggregate", AggregateConfig, aggregate)


if __name__ == "__main__":
    main()
