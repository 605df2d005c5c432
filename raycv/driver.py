"""One cross-validation from config to summary: data -> splits -> base -> tokens -> folds -> report.

Nothing heavy is imported before the config and the data have been found usable: bad input is refused in seconds.
"""

import contextlib
import itertools
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from raycv import __version__
from raycv.base import check_name
from raycv.config import RunConfig, as_yaml
from raycv.data import count, load_dataset
from raycv.devices import CPU_FOR_RUNS, check_gpu_before_ray
from raycv.errors import RunFailedError, UserError, counted, together
from raycv.live import say
from raycv.paths import (
    RunFolder,
    aggregate_command,
    check_writable,
    infer_command,
    read_json,
    read_record,
    resolve,
    resume_command,
    sha256_of,
    write_json,
    write_text,
)
from raycv.records import Dataset, FoldResult
from raycv.report import summarize, summary_table
from raycv.resume import Earlier, earlier_run, sole_process
from raycv.retry import mask_secrets
from raycv.runs import make_newest, tracked_run
from raycv.splits import Split, make_splits, positives_table, splits_record
from raycv.utils import describe_environment, ignore_stops, utc_now

if TYPE_CHECKING:
    from raycv.base import BaseFiles
    from raycv.encoding import EncodedPairs, PromptEncoder
    from raycv.fold import Placement
    from raycv.tracking import Tracker


@dataclass(frozen=True)
class Base:
    """The base model as the driver needs it."""

    files: "BaseFiles"
    tokenizer: Any
    facts: dict[str, Any]
    """for `environment.json`"""


@dataclass(frozen=True)
class Prepared:
    """All that the folds need, made once in the driver."""

    dataset: Dataset
    splits: list[Split]
    base: "BaseFiles"
    encoder: "PromptEncoder"
    encoded: "EncodedPairs"
    base_facts: dict[str, Any]
    encoding_facts: dict[str, Any]
    warnings: list[str]


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
    dataset, splits = _data(config)
    if earlier:
        earlier.check(dataset, splits)
        for warning in earlier.warnings():
            say(console, f"Warning: {warning}", "yellow")
    try:
        _check_run_folder(config, taken=earlier is not None)
    except UserError as error:
        from raycv.tracking import new_store_faults

        # Where a folder cannot be written, others cannot either.
        raise together([error, *([] if earlier else new_store_faults(config.tracking))]) from error
    check_name(config.model.name, config.model.revision)
    if config.resources.gpus_per_fold != 0:
        check_gpu_before_ray(CPU_FOR_RUNS)
    _announce_data(console, config, dataset, splits)
    from raycv import cv
    from raycv.tracking import check_store, flat_params

    base = _base(config)
    if earlier:
        earlier.check_base(base.facts)
        earlier.check_states()
        tracker, parent_id = _earlier_store(earlier, typed)
    else:
        # Made when nothing can be refused any more.
        check_store(config.tracking)
    prepared = _prepare(config, dataset, splits, base, console)
    say(console, "Starting Ray ...")
    with cv.ray_cluster(ray_logs=config.resources.ray_logs) as dashboard:
        placement = cv.plan(config)
        _announce_ray(console, placement, dashboard)
        if earlier:
            folder = earlier.folder
            cv.check_nodes(folder, base.files)
        else:
            config, folder, tracker, parent_id = _start(config, prepared)
            held.enter_context(sole_process(folder))
            say(console, f"Run folder: {folder.root}   (if the run is broken off: {resume_command(folder)})")
        with _ended(tracker, parent_id, folder, config, console), contextlib.ExitStack() as logged:
            if earlier:
                _reopen(tracker, parent_id, earlier, console)
            results = _folds(config, folder, prepared, placement, parent_id, console, logged)
            stats = read_json(folder.data_stats)
            report = summarize(folder.root.name, results, config.cv.folds, stats, finished=utc_now())
            write_json(folder.report, report)
            _conclude(console, config, folder, report, parent_id)
            # After the report: a store that hangs is waited for.
            logged.close()
            with _as_warning(console, folder):
                tracker.log_missing_folds(parent_id, folder, config.cv.folds, flat_params(config.model_dump()))
                tracker.log_report(parent_id, report, folder.report)
                if earlier:
                    tracker.log_files(parent_id, [folder.environment])
    return report


def _earlier_store(earlier: Earlier, typed: Collection[str]) -> tuple["Tracker", str]:
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


def _data(config: RunConfig) -> tuple[Dataset, list[Split]]:
    data_dir, criteria_dir = Path(resolve(config.data.dir)), Path(resolve(config.data.criteria_dir))
    dataset = load_dataset(data_dir, criteria_dir, empty=config.data.empty, missing=config.data.missing)
    if config.data.shuffle_labels:
        dataset = _with_shuffled_labels(dataset, config.cv.seed)
    if config.privacy.log_text:
        warning = "privacy.log_text=true: predictions.csv holds posts and criteria, here and in MLflow"
        dataset = replace(dataset, warnings=[*dataset.warnings, warning])
    return dataset, make_splits(dataset.pairs, config.cv.folds, config.cv.seed)


def _with_shuffled_labels(dataset: Dataset, seed: int) -> Dataset:
    """The control: whatever a model learns from labels permuted over all pairs is not about the posts."""
    import random

    labels = [pair.label for pair in dataset.pairs]
    random.Random(seed).shuffle(labels)
    pairs = [replace(pair, label=label) for pair, label in zip(dataset.pairs, labels, strict=True)]
    warning = "data.shuffle_labels=true: the labels are permuted, so these scores are a control and not a result"
    stats = dataset.stats | count(dataset.posts, dataset.criteria, pairs)
    return replace(dataset, pairs=pairs, stats=stats, warnings=[*dataset.warnings, warning])


def _base(config: RunConfig) -> Base:
    """Fetches the base model once for all folds. Raises: UserError if it cannot be had, or is none for `config`."""
    from raycv.base import absolute_name, fetch_base
    from raycv.loading import check_max_length, load_config, load_tokenizer, set_pad_token
    from raycv.model import check_model

    # No spinner here: the hub's client shows progress bars of its own.
    files = fetch_base(absolute_name(config.model.name), config.model.revision)
    tokenizer, model_config = load_tokenizer(files), load_config(files)
    check_max_length(model_config, config.prompt.max_length)
    check_model(model_config, config.model)
    set_pad_token(tokenizer, model_config)
    return Base(files, tokenizer, files.describe(tokenizer, model_config))


def _prepare(config: RunConfig, dataset: Dataset, splits: list[Split], base: Base, console: Console) -> Prepared:
    """Tokenises once for all folds."""
    from raycv.encoding import encode_dataset, encoding_summary, encoding_warnings, prompt_encoder

    criteria = [criterion.text for criterion in dataset.criteria.values()]
    with console.status(f"Tokenising {len(dataset.pairs):,} prompts"):
        encoder = prompt_encoder(base.tokenizer, config.prompt, criteria)
        encoded, facts = encode_dataset(encoder, dataset)
    warnings = encoding_warnings(facts)
    for warning in warnings:
        say(console, f"Warning: {warning}", "yellow")
    say(console, encoding_summary(facts, len(dataset.posts)))
    return Prepared(dataset, splits, base.files, encoder, encoded, base.facts, facts, warnings)


def _check_run_folder(config: RunConfig, *, taken: bool = False) -> None:
    """Raises: UserError if runs cannot be written, or the run's folder exists; an earlier run's is `taken` for sure."""
    try:
        check_writable(Path(config.run.dir))
    except OSError as error:
        raise UserError(
            f"run.dir={config.run.dir}: {error.filename} is no folder that can be written ({error.strerror}).",
            remedies=["choose a folder that you may write to: run.dir=<folder>"],
        ) from error
    if not taken and config.run.name is not None and (Path(config.run.dir) / config.run.name).exists():
        folder = Path(config.run.dir).absolute() / config.run.name
        raise UserError(
            f"run.name={config.run.name}: {folder} exists, and a run never writes into another's folder.",
            remedies=[
                "choose another run.name, or leave it out",
                *(
                    [f"if it was interrupted, go on with it: {resume_command(RunFolder(folder))}"]
                    if RunFolder(folder).has_begun()
                    else []
                ),
                f"remove the old run: rm -r {folder}",
            ],
        )


def new_run_folder(config: RunConfig) -> RunFolder:
    """A fresh folder for the run, named `run.name`, or by the time.

    Raises: UserError if the name is taken or the folder cannot be made.
    """
    _check_run_folder(config)
    runs = Path(config.run.dir).absolute()
    first = config.run.name or time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in itertools.count(1):
        name = first if attempt == 1 else f"{first}-{attempt}"
        try:
            # Of two processes that make it at once one is told that it exists.
            (runs / name).mkdir(parents=True)
            break
        except OSError as error:
            if (runs / name).exists():
                _check_run_folder(config)
                continue
            raise UserError(
                f"run.dir={config.run.dir}: the folder {runs / name} cannot be made ({error.strerror}).",
                remedies=["choose a folder that you may write to: run.dir=<folder>"],
            ) from error
    return RunFolder(runs / name)


def _write_inputs(folder: RunFolder, config: RunConfig, prepared: Prepared) -> None:
    write_text(folder.config, as_yaml(config))
    make_newest(folder)
    write_json(folder.splits, splits_record(prepared.dataset, prepared.splits, config.cv.seed))
    stats = {
        **prepared.dataset.stats,
        "labels_shuffled": config.data.shuffle_labels,
        "positives_per_fold": positives_table(prepared.dataset, prepared.splits),
        "encoding": prepared.encoding_facts,
        "warnings": [*prepared.dataset.warnings, *prepared.warnings],
    }
    write_json(folder.data_stats, stats)
    recorded = {
        "seeds": {"cv": config.cv.seed, "train": config.train.seed},
        "base_model": prepared.base_facts,
        "config_sha256": sha256_of(folder.config),
    }
    write_json(folder.environment, describe_environment() | recorded)


def _start(config: RunConfig, prepared: Prepared) -> tuple[RunConfig, RunFolder, "Tracker", str]:
    """Makes the run's folder and its MLflow parent; takes both back if not all of it can be had.

    Returns the config under the name that the run has now, however it came to it, the folder, the store, and the id
    of the parent there.
    """
    from raycv import cv
    from raycv.tracking import Tracker

    folder = new_run_folder(config)
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": folder.root.name})})
    try:
        _write_inputs(folder, config, prepared)
        cv.check_nodes(folder, prepared.base)
        tracker = Tracker(config.tracking.uri)
        parent_id = tracker.start_family(folder, config, tracker.open_experiment(config.tracking))
    except BaseException:
        # Nothing is computed yet, and the name is free again.
        shutil.rmtree(folder.root, ignore_errors=True)
        raise
    return config, folder, tracker, parent_id


@contextlib.contextmanager
def _ended(
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
    from raycv import cv
    from raycv.callback import FoldRuns
    from raycv.live import LiveView
    from raycv.tracking import flat_params

    finished = folder.finished(config.cv.folds)
    folds = [split.fold for split in prepared.splits if split.fold not in finished]
    if folds:
        task = cv.fold_task(config, folder, prepared, placement)
        runs = FoldRuns(config.tracking, parent_id, folder, flat_params(config.model_dump()), cv.FOLD_KEY)
        with LiveView(folds, config.train.epochs, config.train.effective_batch_size, console) as view:
            logged.callback(runs.close)
            cv.run_folds(task, folds, placement, runs, view)
    return [FoldResult.read(folder.fold(split.fold).result) for split in prepared.splits]


def _announce_data(console: Console, config: RunConfig, dataset: Dataset, splits: list[Split]) -> None:
    stats = dataset.stats
    say(
        console,
        f"raycv {__version__}: {config.cv.folds} folds of {config.model.name} on {len(dataset.posts):,} posts x "
        f"{len(dataset.criteria)} criteria = {len(dataset.pairs):,} pairs, {stats['positive_rate']:.1%} matched",
    )
    for warning in dataset.warnings:
        say(console, f"Warning: {warning}", "yellow")
    title = "Matched pairs per validation fold and criterion"
    table = Table(box=None)
    rows = positives_table(dataset, splits)
    criteria = list(dataset.criteria)
    for column in ("fold", "pairs", "matched", *criteria):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["fold"]), str(row["pairs"]), str(row["matched"]), *map(str, row["per_criterion"].values())
        )
    if console.measure(table).minimum > console.width:
        say(console, f"{title}: too wide for here, data_stats.json has it")
    else:
        say(console, title)
        console.print(table)


def _announce_ray(console: Console, placement: "Placement", dashboard: str | None) -> None:
    gpus = f" and {counted(placement.gpus, 'GPU')}" if placement.gpus else ", no GPU"
    gpus += f", for {placement.workers} workers together" if placement.workers > 1 else ""
    where = f" Ray dashboard while it runs: http://{dashboard}" if dashboard else ""
    at_once = f"Up to {counted(placement.concurrent, 'fold')} at once, each with {counted(placement.cpus, 'CPU core')}"
    say(console, f"{at_once}{gpus}.{where}")


def _conclude(console: Console, config: RunConfig, folder: RunFolder, report: dict[str, Any], parent_id: str) -> None:
    console.print()
    console.print(summary_table(report))
    uri = mask_secrets(config.tracking.uri)
    look = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    say(
        console,
        f"Report:        {folder.report}\n"
        f"Best fold:     {folder.fold(report['best_fold']).checkpoint}\n"
        f'Ask it:        {infer_command(folder)} post="..."\n'
        f"MLflow:        {look}   (experiment {config.tracking.experiment}, run {report['run']}, {parent_id})\n"
        "Ray dashboard: ray start --head   keeps a cluster and its dashboard up; the next run joins it",
    )
    activate = Path(sys.executable).parent / "activate"
    if activate.is_file() and Path(shutil.which("python") or "").parent != activate.parent:
        here = activate.relative_to(Path.cwd()) if activate.is_relative_to(Path.cwd()) else activate
        say(console, f"Before you type these, once per shell: source {here}")
