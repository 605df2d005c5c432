"""Which run, which fold: from what the user names to checkpoint folders. Imports nothing heavy."""

import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from raycv.checkpoint import DAMAGED, MANIFEST, read_info
from raycv.config import RunConfig, validate
from raycv.errors import FaultsError, UserError, shown
from raycv.paths import AFRESH, GOOD_COPY, RunFolder, read_record, resume_command, sha256_of, write_json
from raycv.records import FoldResult
from raycv.report import best_fold
from raycv.utils import recorded_moment

if TYPE_CHECKING:
    from raycv.tracking import Tracker

logger = logging.getLogger(__name__)

Fold = int | Literal["best", "ensemble"]
ENSEMBLE: Literal["ensemble"] = "ensemble"
LATEST = "latest"
LOCAL_URI = "sqlite:///mlflow.db"
MOST_NAMES = 5
QUICKSTART = "make one: python -m raycv.run experiment=quickstart"


@dataclass(frozen=True)
class Chosen:
    """The checkpoints that answer, and where their run was tracked."""

    run: str
    fold: int | Literal["ensemble"]
    checkpoints: tuple[Path, ...]
    """absolute; one, or for an ensemble one per fold"""
    tracking_uri: str | None
    fold_asked: Fold
    """of the whole run; of a checkpoint or a fold's MLflow run it is the number"""
    parent_id: str | None = None
    """MLflow's id of the run, as far as it is known without asking"""
    fold_id: str | None = None
    """and of the fold"""
    finished: str | None = None
    """when the whole run was complete; None if it is not, or if nobody recorded it"""


def choose(run: str, fold: Fold, runs: Path, tracking_uri: str | None) -> Chosen:
    """The checkpoint(s) of `run`, which is a checkpoint folder, `latest`, a name or folder in `runs`, or an MLflow id.

    Raises: UserError if there is no such run, or it has no such fold.
    """
    path = Path(run)
    with _looking_for(run):
        if (path / MANIFEST).is_file():
            return _from_checkpoint(path.absolute(), fold)
        folder = _finished_run(runs) if run == LATEST else find_run(runs, run)
        if folder is not None:
            return _from_folder(folder, fold)
    if path.is_dir():
        raise UserError(
            f"run={run} is neither a run's folder nor a checkpoint: it has no config.yaml and no {MANIFEST}.",
            remedies=["name a folder like runs/<name>, or runs/<name>/fold_<k>/checkpoint"],
        )
    if path.name != run:
        raise UserError(f"run={run}: there is no such folder.", remedies=runs_there(runs, path.name))
    return _from_mlflow(run, fold, runs, tracking_uri or LOCAL_URI)


def find_run(runs: Path, run: str) -> RunFolder | None:
    """The folder of the run named `run`, or for `latest` of the newest whose folds are all finished, else the newest.

    None if there is none of that name.

    Raises: UserError if `latest` is asked for and there is no run at all, or if a folder may not be looked into.
    """
    with _looking_for(run):
        if run != LATEST:
            # A name, or the path of the folder, as the shell completes it.
            named = (folder for folder in (runs / run, Path(run)) if (folder / "config.yaml").is_file())
            return next((RunFolder(folder.absolute()) for folder in named), None)
        made = runs_in(runs)
        if not made:
            remedies = [QUICKSTART, "name the folder that holds them: dir=<folder>"]
            raise UserError(f"There is no run in {runs.absolute()}.", remedies=remedies)
        return ([folder for folder in made if _is_finished(folder)] or made)[-1]


@contextmanager
def _looking_for(run: str) -> Iterator[None]:
    """Raises: UserError if a place cannot be looked at: `run` is too long for a name, or leads where one may not."""
    try:
        yield
    except OSError as error:
        where = f"{shown(str(error.filename), most=200)}: {error.strerror}"
        remedies = [
            "give a run's name or folder, an MLflow run id, a checkpoint folder, or latest",
            "see to the permissions of that folder",
        ]
        raise UserError(f"run={shown(run)} cannot be looked for: {where}.", remedies=remedies) from error


def runs_in(runs: Path) -> list[RunFolder]:
    """All runs in the folder `runs`, the newest last."""
    made = sorted(runs.absolute().glob("*/config.yaml"), key=lambda path: (path.stat().st_mtime, path))
    return [RunFolder(path.parent) for path in made]


def runs_there(runs: Path, meant: str, folder_key: str = "dir") -> list[str]:
    """What to do when there is no run named `meant` in the folder `runs`, which `folder_key` sets."""
    names = [folder.root.name for folder in reversed(runs_in(runs))]
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    if near := difflib.get_close_matches(meant, [*names, LATEST], n=1):
        there = f"did you mean {near[0]}?"
    elif names:
        there = f"the runs there are ({LATEST} is the newest): {', '.join(names[:MOST_NAMES])}{rest}"
    else:
        there = QUICKSTART
    return [there, f"another folder: {folder_key}=<folder>"]


def mlflow_run(run: str, runs: Path, uri: str) -> tuple["Tracker", Any]:
    """The store at `uri` and its run with the id `run`, which is no run in the folder `runs`.

    Raises: UserError if there is none.
    """
    what = f"run={run} is neither a run in {runs.absolute()} nor an MLflow run"
    try:
        tracker = open_tracker(uri)
    except UserError as error:
        raise UserError(f"{what}: {error.what}", remedies=[*runs_there(runs, run), *error.remedies]) from error
    try:
        return tracker, tracker.run(run)
    except UserError as error:
        raise UserError(f"{what}: {error.what}", remedies=runs_there(runs, run)) from error


def make_newest(folder: RunFolder) -> None:
    """Sees to it that `latest` means the run in `folder`, also when the clock was set back since another was made."""
    others = (path for path in folder.root.parent.glob("*/config.yaml") if path != folder.config)
    newest = max((path.stat().st_mtime for path in others), default=0.0)
    if folder.config.stat().st_mtime <= newest:
        # File systems count whole seconds at worst, or two.
        os.utime(folder.config, (newest + 2, newest + 2))


def folds_of(config_file: Path) -> int:
    """How many folds the run was asked for. Raises: UserError if its config does not say."""
    try:
        return int(yaml.safe_load(config_file.read_text(encoding="utf-8"))["cv"]["folds"])
    except OSError as error:
        raise UserError(f"{config_file} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{config_file} is damaged: it does not say how many folds were asked for.") from error


def finished_at(folder: RunFolder) -> str | None:
    """When the run in `folder` was complete; None if it is not, or if its report does not say."""
    try:
        return recorded_moment(read_record(folder.report).get("finished"))
    except (UserError, OSError):
        # A report that is missing or damaged keeps no checkpoint from answering.
        return None


def open_tracker(uri: str, seconds: int | None = None) -> "Tracker":
    """The MLflow store at `uri`; `seconds`: as in Tracker.

    Raises: UserError if its password or its database is missing.
    """
    from raycv.tracking import Tracker

    check_password(uri)
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).is_file():
        raise UserError(
            f"The MLflow database {Path(database).absolute()} does not exist.",
            remedies=["run it where the cross-validation ran", "give its place: sqlite:////folder/mlflow.db"],
        )
    return Tracker(uri, seconds)


def with_fold_id(chosen: Chosen, seconds: int) -> Chosen:
    """`chosen` with the id of its fold in MLflow, if its store has it and says so within `seconds` a request."""
    if chosen.fold_id or chosen.fold == ENSEMBLE or chosen.parent_id is None or chosen.tracking_uri is None:
        return chosen
    try:
        children = open_tracker(chosen.tracking_uri, seconds).children(chosen.parent_id)
    except UserError:
        return chosen
    found = children.get(chosen.fold)
    return replace(chosen, fold_id=str(found.info.run_id)) if found else chosen


def recorded_config(folder: RunFolder) -> RunConfig:
    """The config of the run in `folder`. Raises: UserError if it is damaged, or of another version of raycv."""
    remedies = [GOOD_COPY, AFRESH]
    try:
        values = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("data"), dict):
            # Earlier versions had no such key and kept NaN and the like as text: the run must see the same data.
            values["data"].setdefault("missing", "text")
        return validate(RunConfig, values, recorded=True)
    except OSError as error:
        raise UserError(f"{folder.config} cannot be read: {error.strerror}.", remedies=remedies) from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder.config} is damaged: it is not YAML.", remedies=remedies) from error
    except FaultsError as error:
        what = f"{folder.config} is damaged, or of another version of raycv.\n{error.what}"
        raise UserError(what, remedies=remedies) from error


def tracked_run(folder: RunFolder, uri: str, key: str, *, given: bool) -> tuple["Tracker", str]:
    """The store at `uri`, the value of `key`, and the id there of the parent of the run in `folder`.

    A store that is `given`, not read from the folder, and lacks the run gets it from the folder: the other may be lost,
    or the file that says which run it is there. The folder then names the store that was given.
    Raises: UserError if the store cannot be used, or lacks the run and was not given.
    """
    from raycv.tracking import Tracker

    try:
        tracked = read_record(folder.tracking, "uri", "parent_run_id")
    except UserError:
        if not given:
            raise
        tracked = {}
    parent_id = str(tracked.get("parent_run_id"))
    try:
        tracker = Tracker(uri) if given else open_tracker(uri)
        if tracked and tracker.has(parent_id):
            if given and tracked["uri"] != tracker.shown_uri:
                write_json(folder.tracking, tracked | {"uri": tracker.shown_uri})
            return tracker, parent_id
    except UserError as error:
        raise UserError(error.what, remedies=[*error.remedies, _another_store(key)]) from error
    if not given:
        remedies = ["give the store that has it, by the same key", _another_store(key)]
        raise UserError(f"MLflow at {tracker.shown_uri} does not have run {parent_id}.", remedies=remedies)
    logger.warning("MLflow at %s does not have this run: it is logged there from its folder", tracker.shown_uri)
    config = recorded_config(folder)
    return tracker, tracker.start_family(folder, config, tracker.open_experiment(config.tracking))


def recorded_uri(folder: RunFolder, key: str) -> str:
    """The address of the store that has the run in `folder`; `key`: by which another could be given.

    Raises: UserError if the folder does not say.
    """
    try:
        return str(read_record(folder.tracking, "uri", "parent_run_id")["uri"])
    except UserError as error:
        raise UserError(error.what, remedies=[*error.remedies, _another_store(key)]) from error


def _another_store(key: str) -> str:
    return f"or give another, new or old, and what the run's folder has is logged there: {key}=sqlite:///new.db"


def check_password(uri: str) -> None:
    """Raises: UserError if `uri` comes from a file, where its password was masked."""
    if "***" in uri:
        raise UserError(
            f"The run was tracked at {uri}, whose password was not written down.",
            remedies=["give the whole address as the tracking URI, with user:password@ before the host"],
        )


def _is_finished(folder: RunFolder) -> bool:
    try:
        return len(_finished_folds(folder)) == folds_of(folder.config)
    except UserError:
        return False


def _finished_folds(folder: RunFolder) -> list[int]:
    return folder.finished(folds_of(folder.config))


def _finished_run(runs: Path) -> RunFolder:
    folder = find_run(runs, LATEST)
    assert folder is not None
    if not _is_finished(folder):
        raise UserError(
            f"No run in {runs.absolute()} is finished.",
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
            remedies=["leave fold out", "name the run instead of the checkpoint: run=<name>"],
        )
    # The tracking store of the run that the folder lies in, if it still lies in one.
    run = RunFolder(folder.parent.parent)
    uri, parent_id = _tracked_at(run)
    if info.run != run.root.name:
        return Chosen(info.run, info.fold, (folder,), uri, info.fold)
    return Chosen(info.run, info.fold, (folder,), uri, info.fold, parent_id, finished=finished_at(run))


def _from_folder(folder: RunFolder, fold: Fold) -> Chosen:
    finished, asked, fold_asked = _finished_folds(folder), folds_of(folder.config), fold
    if isinstance(fold, int) and fold not in finished:
        there = f"it has fold 0 to {asked - 1}" if fold >= asked else "that fold is not finished"
        remedies = [
            f"choose a finished one: {_listed(finished)}" if finished else f"finish it: {resume_command(folder)}"
        ]
        raise UserError(f"fold={fold}: run {folder.root.name} has no such checkpoint: {there}.", remedies=remedies)
    if not isinstance(fold, int) and len(finished) < asked:
        remedies = [f"finish the run: {resume_command(folder)}"]
        if finished:
            remedies.append(f"choose a finished fold: {_listed(finished)}")
        what = f"fold={fold}: {len(finished)} of {asked} folds of run {folder.root.name} are finished."
        raise UserError(what, remedies=remedies)
    if fold == "best":
        fold = best_fold([FoldResult.read(folder.fold(number).result) for number in finished])
    taken = finished if fold == ENSEMBLE else [fold]
    for number in taken:
        _check_manifest(folder, number)
    checkpoints = tuple(folder.fold(number).checkpoint for number in taken)
    uri, parent_id = _tracked_at(folder)
    return Chosen(folder.root.name, fold, checkpoints, uri, fold_asked, parent_id, finished=finished_at(folder))


def _check_manifest(folder: RunFolder, fold: int) -> None:
    """Raises: UserError if the checkpoint's `raycv.json`, which has the sums of its weights, is not the fold's.

    FoldResult.of would sum the weights too, which whoever loads them does.
    """
    files = folder.fold(fold)
    manifest = files.checkpoint / MANIFEST
    known = FoldResult.read(files.result).sha256.get(manifest.relative_to(files.root).as_posix())
    if known is not None and manifest.is_file() and sha256_of(manifest) != known:
        what = f"{manifest} is damaged: it does not have the checksum that {files.result.name} has of it."
        raise UserError(what, remedies=DAMAGED)


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
    """The checkpoints that a run logged to MLflow; those that are not files here are fetched once."""
    tracker, asked = mlflow_run(run, runs, uri)
    children, number = tracker.children(run), tracker.fold_of(asked)
    if number is not None:
        children = {number: asked}
    finished = {k: child for k, child in children.items() if child.info.status == "FINISHED"}
    if not finished:
        what = f"run={run} is an MLflow run, but neither a finished cross-validation nor a fold of one."
        raise UserError(what, remedies=runs_there(runs, run))
    taken = _taken(run, fold, finished, asked.data.metrics)
    places = tuple(tracker.checkpoint(finished[k].info.run_id, runs.absolute() / ".fetched") for k in taken)
    name, parent_id = read_info(places[0]).run, run if number is None else tracker.parent_of(asked)
    moment = tracker.finished_at(asked)
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
            remedies=[f"choose one: {_listed(sorted(finished))}"],
        )
    return [wanted]
