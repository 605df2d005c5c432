"""`python -m raycv.reproduce run=<name> folds=[0]`: trains folds of a run again, and compares what they came to."""

from raycv.config.command_line import run_command
from raycv.config.schema import ReproduceConfig
from raycv.cv.reproduce import reproduce


def main() -> None:
    run_command("reproduce", ReproduceConfig, reproduce)


if __name__ == "__main__":
    main()
