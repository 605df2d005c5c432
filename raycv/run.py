"""`python -m raycv.run`: starts or resumes one cross-validation.

`ray submit cluster.yaml raycv/run.py` copies this one file to the head node and runs it there. So the file imports the
installed package by its full name, and it defines nothing that Ray would have to pickle.
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
