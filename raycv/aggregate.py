"""`python -m raycv.aggregate run=<name>`: writes a run's summary again (user story 2)."""

from raycv.config.command_line import run_command
from raycv.config.schema import AggregateConfig
from raycv.cv.aggregation import aggregate


def main() -> None:
    run_command("aggregate", AggregateConfig, aggregate)


if __name__ == "__main__":
    main()
