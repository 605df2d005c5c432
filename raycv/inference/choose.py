"""Finds the checkpoint folders that answer for a run and a fold. Imports nothing heavy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raycv.common.files import sha256_of
from raycv.common.locations import place_of, runs_folder
from raycv.errors import UserError
from raycv.inference.log import named_store
from raycv.model.checkpoint import DAMAGED, MANIFEST, read_info
from raycv.results.find_run import (
    LATEST,
    QUICKSTART,
    find_run,
    finished_at,
    finished_folds,
    folds_of,
    is_control,
    is_finished,
    looking_for,
    runs_there,
)
from raycv.results.fold_result import FoldResult
from raycv.results.report import best_fold
from raycv.results.run_folder import RunFolder, read_record, resume_command
from raycv.results.storage import fetch_checkpoints
from raycv.tracking.lookup import LOCAL_URI, mlflow_run, open_store

if TYPE_CHECKING:
    from raycv.config.schema import InferConfig

Fold = int | Literal["best", "ensemble"]
ENSEMBLE: Literal["ensemble"] = "ensemble"


@dataclass(frozen=True)
class Chosen:
    """The checkpoints that answer, and the MLflow store of their run."""

    run: str
    fold: int | Literal["ensemble"]
    checkpoints: tuple[Path, ...]
    """absolute paths: one, or for an ensemble one per fold"""
    tracking_uri: str | None
    fold_asked: Fold
    """the fold as the user asked for it; for a checkpoint or a fold's MLflow run, its number"""
    parent_id: str | None = None
    """MLflow's id of the run, if it is known without a request for it"""
    fold_id: str | None = None
    """MLflow's id of the fold, if it is known without a request for it"""
    finished: str | None = None
    """when the whole run was complete; None if it is not complete, or if nobody recorded it"""
    control: bool = False
    """whether the run learned from permuted labels (data.shuffle_labels)"""


Find = Callable[[], Chosen]


def finder(config: "InferConfig") -> Find:
    """A function that finds the checkpoints of `config` when it is first called, and then returns the same ones."""
    return cache(partial(choose, config.run, config.fold, runs_folder(config.dir), named_store(config.tracking.uri)))


def choose(run: str, fold: Fold, runs: Path, tracking_uri: str | None) -> Chosen:
    """Finds the checkpoints that answer.

    Args:
        run: A checkpoint folder, `latest`, a name or folder in `runs`, or an MLflow id.
        fold: The number of a fold, `best` or `ensemble`.
        runs: The folder that holds the runs.
        tracking_uri: The MLflow store to look for an id in; None for the local one.

    Raises:
        UserError: The run does not exist, or it does not have the fold.
    """
    path = Path(run)
    with looking_for(run):
        if (path / MANIFEST).is_file():
            return _from_checkpoint(path.absolute(), fold)
        folder = _finished_run(runs) if run == LATEST else find_run(runs, run)
        if folder is not None:
            return _from_folder(folder, fold)
    if path.is_dir():
        raise UserError(
            f"run={run} is neither a run's folder nor a checkpoint: it has no config.yaml and no {MANIFEST}.",
            kind="run-missing",
            remedies=["name a folder like runs/<name>, or runs/<name>/fold_<k>/checkpoint"],
        )
    if path.name != run:
        raise UserError(
            f"run={run}: the folder does not exist.", kind="run-missing", remedies=runs_there(runs, path.name)
        )
    return _from_mlflow(run, fold, runs, tracking_uri or LOCAL_URI)


def with_fold_id(chosen: Chosen, seconds: int) -> Chosen:
    """`chosen` with MLflow's id of its fold, if the store has it and answers each request within `seconds`."""
    if chosen.fold_id or chosen.fold == ENSEMBLE or chosen.parent_id is None or chosen.tracking_uri is None:
        return chosen
    try:
        children = open_store(chosen.tracking_uri, seconds).children(chosen.parent_id)
    except UserError:
        return chosen
    found = children.get(chosen.fold)
    return replace(chosen, fold_id=str(found.info.run_id)) if found else chosen


def warn_of_control(chosen: Chosen, tell: Callable[[str], None]) -> None:
    """Tells if the run that answers is a control: it learned nothing about posts."""
    if chosen.control:
        tell(
            f"run {chosen.run} is a control with permuted labels (data.shuffle_labels=true), so its answers mean "
            "nothing; name another run: run=<name>"
        )


def _finished_run(runs: Path) -> RunFolder:
    folder = find_run(runs, LATEST)
    assert folder is not None
    if not is_finished(folder):
        raise UserError(
            f"No run in {place_of(runs.absolute())} is finished.",
            kind="run-missing",
            remedies=[
                QUICKSTART,
                f"take a finished fold of an unfinished run: run={folder.root.name} fold=<k>",
                "name the folder that holds the runs: dir=<folder>",
            ],
        )
    return folder


def _from_checkpoint(folder: Path, fold: Fold) -> Chosen:
    info = read_info(folder)
    if fold not in ("best", info.fold):
        raise UserError(
            f"fold={fold}: {folder} is the checkpoint of fold {info.fold} alone.",
            kind="run-missing",
            remedies=["leave fold out", "name the run instead of the checkpoint: run=<name>"],
        )
    # The checkpoint may still be in the folder of its run, which names the MLflow store.
    run = RunFolder(folder.parent.parent)
    uri, parent_id = _tracked_at(run)
    if info.run != run.root.name:
        return Chosen(info.run, info.fold, (folder,), uri, info.fold)
    return Chosen(
        info.run, info.fold, (folder,), uri, info.fold, parent_id, finished=finished_at(run), control=is_control(run)
    )


def _from_folder(folder: RunFolder, fold: Fold) -> Chosen:
    finished, asked, fold_asked = finished_folds(folder), folds_of(folder.config), fold
    if isinstance(fold, int) and fold not in finished:
        there = f"it has fold 0 to {asked - 1}" if fold >= asked else "that fold is not finished"
        remedies = [
            f"choose a finished one: {_listed(finished)}" if finished else f"finish it: {resume_command(folder)}"
        ]
        raise UserError(
            f"fold={fold}: run {folder.root.name} has no such checkpoint: {there}.",
            kind="run-missing",
            remedies=remedies,
        )
    if not isinstance(fold, int) and len(finished) < asked:
        remedies = [f"finish the run: {resume_command(folder)}"]
        if finished:
            remedies.append(f"choose a finished fold: {_listed(finished)}")
        what = f"fold={fold}: {len(finished)} of {asked} folds of run {folder.root.name} are finished."
        raise UserError(what, kind="run-failed", remedies=remedies)
    if fold == "best":
        fold = best_fold([FoldResult.read(folder.fold(number).result) for number in finished])
    taken = finished if fold == ENSEMBLE else [fold]
    fetch_checkpoints(folder, taken)
    for number in taken:
        _check_manifest(folder, number)
    checkpoints = tuple(folder.fold(number).checkpoint for number in taken)
    uri, parent_id = _tracked_at(folder)
    moment, control = finished_at(folder), is_control(folder)
    return Chosen(folder.root.name, fold, checkpoints, uri, fold_asked, parent_id, finished=moment, control=control)


def _check_manifest(folder: RunFolder, fold: int) -> None:
    """Refuses a checkpoint whose `raycv.json`, which has the checksums of the weights, is not the fold's.

    FoldResult.of would read the weights for their checksums too, which the load of the model does anyway.

    Raises:
        UserError: `raycv.json` does not have the checksum that the fold's result recorded.
    """
    files = folder.fold(fold)
    manifest = files.checkpoint / MANIFEST
    known = FoldResult.read(files.result).sha256.get(manifest.relative_to(files.root).as_posix())
    if known is not None and manifest.is_file() and sha256_of(manifest) != known:
        what = f"{manifest} is damaged: it does not have the checksum that {files.result.name} has of it."
        raise UserError(what, kind="checkpoint-damaged", remedies=DAMAGED)


def _listed(folds: Sequence[int]) -> str:
    return " or ".join(f"fold={fold}" for fold in folds)


def _tracked_at(folder: RunFolder) -> tuple[str | None, str | None]:
    """The address of the store that has the run in `folder`, and the run's id there, if they are known."""
    if not folder.tracking.is_file():
        return None, None
    values = read_record(folder.tracking, "uri")
    parent_id = values.get("parent_run_id")
    return str(values["uri"]), parent_id and str(parent_id)


def _from_mlflow(run: str, fold: Fold, runs: Path, uri: str) -> Chosen:
    """The checkpoints that a run logged to MLflow. Those that are not files on this machine are fetched once."""
    store, asked = mlflow_run(run, runs, uri)
    children, number = store.children(run), store.fold_of(asked)
    if number is not None:
        children = {number: asked}
    finished = {k: child for k, child in children.items() if child.info.status == "FINISHED"}
    if not finished:
        what = f"run={run} is an MLflow run, but neither a finished cross-validation nor a fold of one."
        raise UserError(what, kind="run-missing", remedies=runs_there(runs, run))
    taken = _taken(run, fold, finished, asked.data.metrics)
    places = tuple(store.checkpoint(finished[k].info.run_id, runs.absolute() / ".fetched") for k in taken)
    name, parent_id = read_info(places[0]).run, run if number is None else store.parent_of(asked)
    moment = store.finished_at(asked)
    if fold == ENSEMBLE:
        return Chosen(name, ENSEMBLE, places, uri, ENSEMBLE, parent_id, finished=moment)
    fold_id = str(finished[taken[0]].info.run_id)
    return Chosen(name, taken[0], places, uri, fold if number is None else number, parent_id, fold_id, moment)


def _taken(run: str, fold: Fold, finished: dict[int, Any], metrics: dict[str, float]) -> list[int]:
    if fold == ENSEMBLE:
        return sorted(finished)
    best = next(iter(finished)) if len(finished) == 1 else int(metrics.get("best_fold", -1))
    wanted = best if fold == "best" else fold
    if wanted not in finished:
        raise UserError(
            f"fold={fold}: the MLflow run {run} has no such finished fold.",
            kind="run-missing",
            remedies=[f"choose one: {_listed(sorted(finished))}"],
        )
    return [wanted]
