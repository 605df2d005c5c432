"""Makes the page of a finished run again from its folder, and from its data set if that is given."""

from pathlib import Path

from rich.console import Console

from raycv.config.schema import ReportConfig, RunConfig
from raycv.cv.preparation import load_data
from raycv.errors import UserError
from raycv.rendering.terminal import say, verdict_lines
from raycv.results.find_run import find_run, recorded_config, runs_there


def make_page(config: ReportConfig) -> None:
    """Writes the statistics, the page and the other files of a finished run again, and prints the verdict.

    Raises:
        UserError: No run has that name, a fold is not finished, a file is damaged, or the data set is another one.
    """
    from raycv.rendering.publish import publish

    runs = Path(config.dir)
    folder = find_run(runs, config.run)
    if folder is None:
        raise UserError(
            f"There is no run {config.run} in {runs.absolute()}.",
            kind="run-missing",
            remedies=runs_there(runs, config.run),
        )
    console = Console()
    if config.run == "latest":
        say(console, f"run=latest is {folder.root.name}")
    dataset = None
    if config.data.dir is not None:
        dataset, _ = load_data(_with_data(recorded_config(folder), config.data.dir))
    with console.status("Computing the statistics"):
        evaluation = publish(folder, dataset)
    say(console, verdict_lines(evaluation, folder))


def _with_data(config: RunConfig, place: str) -> RunConfig:
    """The recorded config with the data in another folder. The criteria move along if they lay beside the posts."""
    data = {"dir": place}
    if config.data.criteria_dir == config.data.dir:
        data["criteria_dir"] = place
    return config.model_copy(update={"data": config.data.model_copy(update=data)})
