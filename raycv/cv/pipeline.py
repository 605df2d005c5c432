"""One cross-validation from config to published report."""

import contextlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from raycv import __version__
from raycv.common.environment import utc_now
from raycv.common.files import read_json, write_json
from raycv.common.locations import check_ray_folder
from raycv.config.schema import RunConfig
from raycv.cv.new_run import NewRun
from raycv.cv.open_run import OpenRun
from raycv.cv.preparation import Base, check_base_and_gpu, load_data, make_encoder, prepare_base, tokenise
from raycv.cv.resumed_run import ResumedRun
from raycv.data.splits import Split
from raycv.data.types import Dataset
from raycv.errors import UserError
from raycv.orchestration.fold_task import Prepared
from raycv.rendering.terminal import announce_check, announce_data, announce_end, announce_placement, say, summary_table
from raycv.results.fold_result import FoldResult
from raycv.results.report import partial_summary, summarize
from raycv.results.run_folder import resume_command

if TYPE_CHECKING:
    from raycv.resources.placement import Placement


class Run(Protocol):
    """A new run or a resumed one. The pipeline calls its methods in this order, each once."""

    config: RunConfig
    wants_all_folds: bool
    """Whether folds that `cv.only` leaves out are missing. A reproduction needs no others."""

    def check_data(self, dataset: Dataset, splits: list[Split]) -> None:
        """Raises: UserError if the run cannot use the data, or its folder. Imports neither torch nor Ray."""

    def check_base(self, base: Base) -> None:
        """Raises: UserError if the run cannot use the base model, or its MLflow store."""

    def check_nodes(self, base: Base) -> None:
        """Raises: UserError if a node does not see the run's folder, or differs. A new run makes that folder first."""

    def open(self, prepared: Prepared) -> OpenRun:
        """Opens the run's folder and MLflow parent. After that its folds may start."""


def cross_validate(config: RunConfig, console: Console | None = None, typed: Collection[str] = ()) -> dict[str, Any]:
    """Runs the whole cross-validation of `config` (user stories 1 and 2).

    Args:
        config: with `resume`, it names an earlier run, whose own config then counts.
        console: the run prints there.
        typed: the keys that the command line sets; a resumed run compares them.

    Returns:
        The report, with the content of `report.json`. If `cv.only` leaves folds for later, it has `run`, the finished
        `folds` and `missing_folds` alone, and no file holds it. With `check`, what was measured.

    Raises:
        UserError: for anything that the user can correct, before Ray or torch start where that is possible.
        RunFailedError: if a fold fails.
    """
    console = console or Console()
    if config.check:
        return _measure(config, console)
    # `held` keeps other processes out of the run's folder until Ray's processes have ended.
    with contextlib.ExitStack() as held:
        resumes = config.resume is not None
        run: Run = ResumedRun(config, typed, console, held) if resumes else NewRun(config, console, held)
        return run_to_its_end(run, console)


def run_to_its_end(run: Run, console: Console) -> dict[str, Any]:
    """Prepares, trains and publishes `run`. Returns and raises as `cross_validate` does."""
    config = run.config
    dataset, splits = load_data(config)
    run.check_data(dataset, splits)
    check_ray_folder()
    check_base_and_gpu(config)
    announce_data(console, config, dataset, splits)
    # From here on torch and Ray are imported, which takes seconds.
    with console.status("Loading torch, transformers and Ray"):
        import raycv.model.adapters  # noqa: F401
        from raycv.orchestration.cluster import joins_cluster, ray_cluster

    base = prepare_base(config)
    with console.status("Checking the MLflow store"):
        run.check_base(base)
    encoder = make_encoder(config, dataset, base)
    # Tokenising may refuse posts, so it comes before a Ray of this machine. It takes minutes, so the nodes of a cluster
    # are asked before it.
    prepared = None if joins_cluster() else tokenise(encoder, dataset, splits, base, console)
    say(console, "Starting Ray ...")
    with contextlib.ExitStack() as joined:
        with console.status("Waiting for Ray and its nodes"):
            asked = ray_cluster(ray_logs=config.resources.ray_logs, metadata=_of_job(config))
            dashboard = joined.enter_context(asked)
            placement = _plan(config, console, dashboard)
            run.check_nodes(base)
        if prepared is None:
            prepared = tokenise(encoder, dataset, splits, base, console)
            # A node may have been lost or have joined meanwhile.
            placement = _plan(config, console, dashboard, placement)
        with console.status("Opening the run in MLflow"):
            opened = run.open(prepared)
        with opened.under_way(), contextlib.ExitStack() as logged:
            results = _train_folds(opened, prepared, placement, logged)
            if len(results) < config.cv.folds:
                return _leave_the_others(opened, results, logged, tell=run.wants_all_folds)
            # After the folds: a run starts sooner, and they have the cores for themselves.
            opened.record_pairs(prepared)
            return _publish(opened, results, logged)


def _measure(config: RunConfig, console: Console) -> dict[str, Any]:
    """Measures what the run of `config` would take where its folds would run, prints it, and writes nothing."""
    if config.resume is not None:
        raise UserError(
            f"check=true measures a new run, and resume={config.resume} names an old one.",
            kind="config-value",
            remedies=["leave out one of them"],
        )
    dataset, splits = load_data(config)
    check_ray_folder()
    check_base_and_gpu(config)
    announce_data(console, config, dataset, splits)
    from raycv.orchestration.cluster import ray_cluster
    from raycv.orchestration.ray_train import measure

    base = prepare_base(config)
    prepared = tokenise(make_encoder(config, dataset, base), dataset, splits, base, console)
    say(console, "Starting Ray ...")
    with ray_cluster(ray_logs=config.resources.ray_logs, metadata=_of_job(config)) as dashboard:
        placement = _plan(config, console, dashboard)
        with console.status("Loading the base model, and training its heaviest step"):
            found = measure(config, prepared, placement)
    announce_check(console, config, placement, found)
    return found


def _of_job(config: RunConfig) -> dict[str, str]:
    """Facts about the run for the list of jobs in Ray's dashboard."""
    return {
        "raycv": __version__,
        "run": config.resume or config.run.name or "named by the time of its start",
        "model": config.model.name,
        "folds": str(config.cv.folds),
        "experiment": config.tracking.experiment,
    }


def _plan(
    config: RunConfig, console: Console, dashboard: str | None, announced: "Placement | None" = None
) -> "Placement":
    """Plans the folds on the nodes that are there now, and prints the plan unless it is the one that was `announced`.

    Raises: UserError if no node could ever hold a fold.
    """
    from raycv.orchestration.cluster import node_resources
    from raycv.resources.placement import CLUSTER_FILE, accelerators, cluster_line, node_types, plan

    nodes = node_resources()
    types = node_types(CLUSTER_FILE.expanduser()) if config.resources.autoscaling else []
    placement = plan(config, nodes, types)
    if placement != announced:
        could = [*nodes, *(kind.resources for kind in types or [])]
        announce_placement(console, placement, dashboard, cluster_line(nodes, types), accelerators(could))
    return placement


def _train_folds(
    run: OpenRun, prepared: Prepared, placement: "Placement", logged: contextlib.ExitStack
) -> list[FoldResult]:
    """Trains the folds of `cv.only` that are not finished, with a child run each in MLflow and the live view on.

    The end of `logged` waits until MLflow has them. Returns the results of all finished folds.
    """
    from raycv.orchestration.fold_task import FOLD_KEY
    from raycv.orchestration.mlflow_callback import FoldRuns
    from raycv.orchestration.ray_tune import fold_task, run_folds
    from raycv.rendering.terminal import LiveView

    config, folder = run.config, run.folder
    every = range(config.cv.folds)
    finished = folder.finished(config.cv.folds)
    folds = [fold for fold in every if fold not in finished and fold in (config.cv.only or every)]
    if folds:
        task = fold_task(config, folder, prepared, placement, resumed=run.make_ready is not None)
        children = FoldRuns(config.tracking, run.parent_id, folder, run.params, FOLD_KEY)
        epochs, batch = config.train.epochs, config.train.effective_batch_size
        with LiveView(folds, epochs, batch, run.console, placement) as view:
            logged.callback(children.close)
            run_folds(task, folds, placement, children, view)
    return [FoldResult.read(folder.fold(fold).result) for fold in folder.finished(config.cv.folds)]


def _leave_the_others(
    run: OpenRun, results: list[FoldResult], logged: contextlib.ExitStack, *, tell: bool
) -> dict[str, Any]:
    """Logs the finished folds of a run whose others `cv.only` leaves for later. It writes no report.

    `tell`: whether to print them, and how to train the others.
    """
    found = partial_summary(run.folder.root.name, results, run.config.cv.folds, read_json(run.folder.data_stats))
    if tell:
        run.console.print(summary_table(found))
        said = f"The run has no report, since it lacks fold {', '.join(map(str, found['missing_folds']))}."
        say(run.console, f"{said}\nTrain the missing folds: {resume_command(run.folder)}")
    logged.close()
    run.log(None)
    run.publish()
    return found


def _publish(run: OpenRun, results: list[FoldResult], logged: contextlib.ExitStack) -> dict[str, Any]:
    """Writes the report, prints it, and logs it. The report comes first: a store that hangs is waited for."""
    folder, config = run.folder, run.config
    stats = read_json(folder.data_stats)
    report = summarize(folder.root.name, results, config.cv.folds, stats, finished=utc_now())
    write_json(folder.report, report)
    evaluation = run.make_page()
    announce_end(run.console, config, folder, report, run.parent_id, evaluation)
    with run.console.status("Waiting for MLflow to have all of it"):
        logged.close()
        run.log(report)
    run.publish()
    return report
