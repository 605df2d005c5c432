"""`python -m raycv.compare runs=[a,b] baseline=a`: is one run better than another, on the same pairs and folds?"""

from rich.console import Console

from raycv.common.locations import runs_folder
from raycv.config.command_line import run_command
from raycv.config.schema import CompareConfig
from raycv.errors import NotShownError
from raycv.rendering.terminal import say


def compare(config: CompareConfig) -> None:
    """Prints the comparison and writes its files.

    Raises:
        UserError: A run cannot be read, or posts, labels or folds differ.
        NotShownError: `require=better`, and a run is not shown to be better than the baseline.
    """
    from raycv.analysis.comparison import compare_all, output_paths
    from raycv.analysis.printed import comparison_tables

    output_paths(config.output)
    found = compare_all(config.runs, config.baseline, config.metric, runs_folder(config.dir))
    console = Console()
    console.print(comparison_tables(found.result))
    for note in found.result["notes"]:
        say(console, note)
    say(console, f"Written: {', '.join(map(str, found.save(config.output)))}")
    if config.require == "better" and found.not_better:
        baseline = found.result["baseline"]
        what = f"require=better: not shown to be better than {baseline}: {', '.join(found.not_better)}."
        raise NotShownError(what, kind="better-not-shown")


def main() -> None:
    run_command("compare", CompareConfig, compare)


if __name__ == "__main__":
    main()
