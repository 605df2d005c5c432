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
    report, where = _from_folder(folder, config) if folder else _from_mlflow(config)
    console = Console()
    console.print(summary_table(report))
    say(console, where)


def find_run(runs: Path, run: str) -> RunFolder | None:
    """The folder of the run named `run`, or for `latest` of the newest whose folds are all finished, else the newest.

    None if there is none of that name.

    Raises: UserError if `latest` is asked for and there is no run at all.
    """
    if run != "latest":
        return RunFolder(runs.absolute() / run) if (runs / run / "config.yaml").is_file() else None
    made = sorted(runs.absolute().glob("*/config.yaml"), key=lambda path: (path.stat().st_mtime, path))
    if not made:
        raise UserError(
            f"There is no run in {runs.absolute()}.",
            remedies=[
                "make one: python -m raycv.run experiment=quickstart",
                "name the folder that holds them: dir=<folder>",
            ],
        )
    finished = [
        path for path in made if all(RunFolder(path.parent).fold(k).result.is_file() for k in range(_folds(path)))
    ]
    return RunFolder((finished or made)[-1].parent)


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
        for fold, run in tracker.children(config.run).items():
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
    return int(yaml.safe_load(config_file.read_text(encoding="utf-8"))["cv"]["folds"])


def _tracker(uri: str) -> "Tracker":
    from raycv.tracking import Tracker

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
