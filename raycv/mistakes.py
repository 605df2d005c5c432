"""`python -m raycv.mistakes run=...`: the most confident mistakes by criterion, as CSV."""

from pathlib import Path

from rich.console import Console

from raycv.common.locations import runs_folder
from raycv.config.command_line import run_command
from raycv.config.schema import MistakesConfig
from raycv.rendering.terminal import say


def mistakes(config: MistakesConfig) -> None:
    """Writes the mistakes of a run. Raises: UserError if the run or its data cannot be read, or nothing be written."""
    from raycv.analysis.mistakes import COLUMNS, TEXTS, counts_of
    from raycv.analysis.printed import mistakes_table
    from raycv.analysis.run import open_run
    from raycv.analysis.spreadsheet import check_free, csv_text, write_output
    from raycv.results.find_run import said_latest

    output = Path(config.output)
    check_free(output, ",".join(COLUMNS))
    run = open_run(config.run, runs_folder(config.dir))
    console = Console()
    if line := said_latest(config.run, run.folder):
        say(console, line)
    rows = run.mistake_rows(config.most, config.text, config.data.dir, config.data.criteria_dir)
    console.print(mistakes_table(run.name, counts_of(run.study)))
    columns = [*COLUMNS, *(TEXTS if config.text else ())]
    write_output(output, csv_text(columns, rows).encode(), private=True)
    say(console, f"Written: {output} ({len(rows):,} mistakes)")
    if config.text:
        say(console, f"{output} holds posts: only you can read it, and you must not pass it on without permission.")


def main() -> None:
    run_command("mistakes", MistakesConfig, mistakes)


if __name__ == "__main__":
    main()
