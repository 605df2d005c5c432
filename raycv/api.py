"""The Python API, which `import raycv` offers: open a run, compare runs, start a cross-validation."""

import os
from collections.abc import Sequence
from pathlib import Path

from raycv.analysis.comparison import Comparison, compare_all
from raycv.analysis.run import Run, open_run
from raycv.common.locations import runs_folder
from raycv.config.command_line import compose_checked, keys_set
from raycv.config.schema import RunConfig
from raycv.errors import UserError

__all__ = ["Comparison", "Run", "compare_runs", "cross_validate", "load_run"]


def load_run(run: str | Path = "latest", *, dir: str | Path | None = None) -> Run:
    """Opens a run.

    Args:
        run: Its name, the path of its folder, or `latest`: the newest run whose folds are all finished.
        dir: The folder that holds the runs; None for the variable RAYCV_RUN_DIR, or `runs`.

    Raises:
        UserError: No run has that name.
    """
    return open_run(run, _folder(dir))


def compare_runs(
    *runs: Run | str | Path,
    baseline: Run | str | Path | None = None,
    metric: str = "f1",
    dir: str | Path | None = None,
) -> Comparison:
    """Compares runs that scored the same posts in the same folds.

    Args:
        runs: At least two: runs, their names or folders, or CSV files of post_id, criterion_id and score.
        baseline: The one that the others are compared with; None for the first.
        metric: The metric of the sentences, such as `f1` or `roc_auc`.
        dir: The folder that holds the runs; None for the variable RAYCV_RUN_DIR, or `runs`.

    Raises:
        UserError: A run cannot be read, or posts, labels or folds differ. The message has the first difference.
    """
    return compare_all(runs, baseline, metric, _folder(dir))


def cross_validate(overrides: Sequence[str] = ()) -> Run:
    """Runs a cross-validation in this process, as `python -m raycv.run` does, and opens it.

    Args:
        overrides: The arguments of the command line, such as `["experiment=quickstart", "train.epochs=3"]`.

    Raises:
        UserError: The config, the data or the model cannot be used.
        RunFailedError: A fold failed.
    """
    config = compose_checked("run", RunConfig, overrides)
    if config.check:
        raise UserError(
            "check=true makes no run.", kind="config-value", remedies=["python -m raycv.run check=true ..."]
        )
    from raycv.cv.pipeline import cross_validate as run_folds

    typed = keys_set("run", RunConfig, overrides) if config.resume is not None else ()
    return load_run(run_folds(config, typed=typed)["run"], dir=config.run.dir)


def _folder(given: str | Path | None) -> Path:
    return runs_folder(str(given if given is not None else os.environ.get("RAYCV_RUN_DIR", "runs")))
