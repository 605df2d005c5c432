"""`python -m raycv.report run=<name>`: makes the page of a finished run again, from its folder."""

from raycv.config.command_line import run_command
from raycv.config.schema import ReportConfig
from raycv.cv.aggregation import make_page


def main() -> None:
    run_command("report", ReportConfig, make_page)


if __name__ == "__main__":
    main()
