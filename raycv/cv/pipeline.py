"""One cross-validation from config to summary: data, splits, base model, tokens, folds, report."""

import contextlib
import shutil
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raycv.common.devices import CPU_FOR_RUNS, check_gpu_before_ray
from raycv.common.environment import describe_environment, utc_now
from raycv.common.files import read_json, read_record, write_json
from raycv.common.signals import ignore_stops
from raycv.config.schema import RunConfig
from raycv.cv.new_run import check_run_folder, start_run
from raycv.cv.preparation import load_data, prepare_base, tokenise
from raycv.cv.resume import Earlier, earlier_run, sole_process
from raycv.errors import RunFailedError, UserError, counted, together
from raycv.model.base_model import check_name
from raycv.orchestration.fold_task import Prepared
from raycv.results.fold_result import FoldResult
from raycv.results.report import summarize
from raycv.results.run_folder import RunFolder, aggregate_command, resume_command
from raycv.terminal.announcements import announce_data, announce_end, announce_placement
from raycv.terminal.console import say
from raycv.tracking.lookup import tracked_run

if TYPE_CHECKING:
    from raycv.resources.placement import Placement
    from raycv.tracking.tracker import Tracker


def cross_validate(config: RunConfig, console: Console | None = None, typed: Collection[str] = ()) -> dict[str, Any]:
    """Runs the whole cross-validation of `config` and returns its report (user stories 1 and 2).

    With `config.resume` an earlier run goes on, under its own config; `typed`: the keys that the command line sets.
    Raises: UserError for anything that the user can mend, before Ray or torch start where that is possible;
    RunFailedError if a fold fails.
    """
    with contextlib.ExitStack() as held:
        return _cross_validate(config, console or Console(), typed, held)


def _cross_validate(
    config: RunConfig, console: Console, typed: Collection[str], held: contextlib.ExitStack
) -> dict[str, Any]:
    """`held` keeps other processes out of the run's folder until all of this one's have ended."""
    earlier = earlier_run(config, typed) if config.resume is not None else None
    config = earlier.config if earlier else config
    if earlier:
        held.enter_context(sole_process(earlier.folder))
        say(console, f"Resuming run {earlier.folder.root.name} in {earlier.folder.root.parent}")
    dataset, splits = load_data(config)
    if earlier:
        earlier.check(dataset, splits)
        for warning in earlier.warnings():
            say(console, f"Warning: {warning}", "yellow")
    try:
        check_run_folder(config, taken=earlier is not None)
    except UserError as error:
        from raycv.tracking.store_checks import new_store_faults

        # Where a folder cannot be written, others cannot either.
        raise together([error, *([] if earlier else new_store_faults(config.tracking))]) from error
    check_name(config.model.name, config.model.revision)
    if config.resources.gpus_per_fold != 0:
        check_gpu_before_ray(CPU_FOR_RUNS)
    announce_data(console, config, dataset, splits)
    from raycv.orchestration.cluster import check_nodes, node_resources, ray_cluster
    from raycv.resources.placement import plan
    from raycv.tracking.tracker import check_store, flat_params

    base = prepare_base(config)
    if earlier:
        earlier.check_base(base.facts)
        earlier.check_states()
        tracker, parent_id = earlier_store(earlier, typed)
    else:
        # Made when nothing can be refused any more.
        check_store(config.tracking)
    prepared = tokenise(config, dataset, splits, base, console)
    say(console, "Starting Ray ...")
    with ray_cluster(ray_logs=config.resources.ray_logs) as dashboard:
        placement = plan(config, node_resources())
        announce_placement(console, placement, dashboard)
        if earlier:
            folder = earlier.folder
            check_nodes(folder, base.files)
        else:
            config, folder, tracker, parent_id = start_run(config, prepared)
            held.enter_context(sole_process(folder))
            say(console, f"Run folder: {folder.root}   (if the run is broken off: {resume_command(folder)})")
        with ends_parent_run(tracker, parent_id, folder, config, console), contextlib.ExitStack() as logged:
            if earlier:
                _reopen(tracker, parent_id, earlier, console)
            results = _folds(config, folder, prepared, placement, parent_id, console, logged)
            stats = read_json(folder.data_stats)
            report = summarize(folder.root.name, results, config.cv.folds, stats, finished=utc_now())
            write_json(folder.report, report)
            announce_end(console, config, folder, report, parent_id)
            # After the report: a store that hangs is waited for.
            logged.close()
            with _as_warning(console, folder):
                tracker.log_missing_folds(parent_id, folder, config.cv.folds, flat_params(config.model_dump()))
                tracker.log_report(parent_id, report, folder.report)
                if earlier:
                    tracker.log_files(parent_id, [folder.environment])
    return report


def earlier_store(earlier: Earlier, typed: Collection[str]) -> tuple["Tracker", str]:
    """The MLflow store of an earlier run, and the id of its parent there."""
    return tracked_run(earlier.folder, earlier.config.tracking.uri, "tracking.uri", given="tracking.uri" in typed)


def _reopen(tracker: "Tracker", parent_id: str, earlier: Earlier, console: Console) -> None:
    """Makes the earlier run one that is under way, records where, and removes what its processes left half."""
    folds = earlier.config.cv.folds
    for fold in earlier.folder.finished(folds):
        try:
            FoldResult.of(earlier.folder, fold)
        except UserError as error:
            say(console, f"Warning: fold {fold} is trained again: {error.what}", "yellow")
            earlier.folder.fold(fold).set_result_aside()
    finished = earlier.folder.finished(folds)
    kept = f"{counted(len(finished), 'finished fold')} of {folds} kept as they are"
    say(console, f"Going on with run {earlier.folder.root.name}: {kept}")
    for fold in range(folds):
        files = earlier.folder.fold(fold)
        files.error.unlink(missing_ok=True)
        if fold in finished:
            shutil.rmtree(files.state, ignore_errors=True)
        for half in files.root.glob(".*"):
            shutil.rmtree(half) if half.is_dir() else half.unlink()
    # Ray Train would go on from what it finds under the same name; what training goes on from is ours.
    shutil.rmtree(earlier.folder.ray, ignore_errors=True)
    environment = read_record(earlier.folder.environment)
    resumed = [*environment.get("resumed", []), describe_environment()]
    write_json(earlier.folder.environment, environment | {"resumed": resumed})
    tracker.reopen(parent_id)


@contextlib.contextmanager
def ends_parent_run(
    tracker: "Tracker", parent_id: str, folder: RunFolder, config: RunConfig, console: Console
) -> Iterator[None]:
    """Ends the MLflow parent run as FINISHED, FAILED or KILLED whatever happens in the block.

    A run that has its report is complete: what may be missing is in MLflow alone.
    """
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        ignore_stops()
        status = "KILLED"
        finished = len(folder.finished(config.cv.folds))
        kept = f"{finished} of {config.cv.folds} folds are finished, and kept in {folder.root}"
        say(console, f"Interrupted: {kept}\n{_what_is_left(folder)}\nStopping Ray ...")
        raise
    except RunFailedError:
        raise  # It says how to go on.
    except Exception:
        say(console, f"The run stopped before its end.\n{_what_is_left(folder)}")
        raise
    finally:
        if folder.report.is_file():
            status = "FINISHED"
        # Neither a result nor the error that ended the run may be hidden by a store that is away.
        with contextlib.suppress(UserError):
            tracker.finish_family(parent_id, status)


def _what_is_left(folder: RunFolder) -> str:
    """What to type after a run that ended before its time."""
    if folder.report.is_file():
        return f"The run is complete, its report is {folder.report}\nLog it into MLflow: {aggregate_command(folder)}"
    return f"Go on where it stopped: {resume_command(folder)}"


@contextlib.contextmanager
def _as_warning(console: Console, folder: RunFolder) -> Iterator[None]:
    """What MLflow could not take is said, with the command that logs it later: all of it lies in the run folder."""
    try:
        yield
    except UserError as error:
        later = f"Log it later: {aggregate_command(folder)}"
        say(console, f"Warning: the summary is not in MLflow: {error.what}\n{later}", "yellow")


def _folds(
    config: RunConfig,
    folder: RunFolder,
    prepared: Prepared,
    placement: "Placement",
    parent_id: str,
    console: Console,
    logged: contextlib.ExitStack,
) -> list[FoldResult]:
    """Trains all folds that are not finished under Ray, with a child run each and the live view on.

    The end of `logged` waits until MLflow has them.
    """
    from raycv.orchestration.fold_task import FOLD_KEY
    from raycv.orchestration.mlflow_callback import FoldRuns
    from raycv.orchestration.ray_tune import fold_task, run_folds
    from raycv.terminal.live_view import LiveView
    from raycv.tracking.tracker import flat_params

    finished = folder.finished(config.cv.folds)
    folds = [split.fold for split in prepared.splits if split.fold not in finished]
    if folds:
        task = fold_task(config, folder, prepared, placement)
        runs = FoldRuns(config.tracking, parent_id, folder, flat_params(config.model_dump()), FOLD_KEY)
        with LiveView(folds, config.train.epochs, config.train.effective_batch_size, console) as view:
            logged.callback(runs.close)
            run_folds(task, folds, placement, runs, view)
    return [FoldResult.read(folder.fold(split.fold).result) for split in prepared.splits]
