"""`python -m raycv.run`: one cross-validation, begun or resumed.

`ray submit cluster.yaml raycv/run.py` copies this one file to the head node and runs it there, so it imports the
installed package by its full name and defines nothing that Ray would have to pickle.
"""

from raycv.config.command_line import run_command, typed_keys
from raycv.config.schema import RunConfig


def run(config: RunConfig) -> None:
    from raycv.cv.pipeline import cross_validate

    cross_validate(config, typed=typed_keys("run") if config.resume is not None else ())


def main() -> None:
    run_command("run", RunConfig, run)


if __name__ == "__main__":
    main()
