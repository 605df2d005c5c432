"""Ray Train: a trial trains its fold in a TorchTrainer, and again after the death of a process."""

import contextlib
import hashlib
import shutil
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray.exceptions
from ray import tune

from raycv.common.environment import seldom_collecting
from raycv.common.files import array_bytes, is_full, unwritable, write_bytes, write_json
from raycv.common.secrets import mask_secrets
from raycv.config.schema import RunConfig
from raycv.errors import RunFailedError, UserError, counted
from raycv.orchestration.cluster import node_resources, own_node_name, share_of
from raycv.orchestration.fold_task import FOLD_KEY, TRIAL_DIED, FoldTask, Prepared, SharedArrays
from raycv.orchestration.fold_worker import measure_worker
from raycv.resources import survey
from raycv.resources.nodes import SHARE_REMEDY, NodeError, node_name
from raycv.resources.placement import Placement
from raycv.resources.publisher import hand_over
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import FoldFolder, RunFolder
from raycv.results.storage import PublishedRun, checkpoint_part, fold_part, states_folder
from raycv.training.metrics import EPOCH_KEY

REPORT_SECONDS = 0.5
"""Between two looks for epochs to report."""


def fold_trial(trial: dict[str, Any], task: FoldTask) -> None:
    """The Tune trainable: trains fold `trial["fold"]` under Ray Train and leaves its files in the run folder.

    A fold that fails for good leaves `error.json` instead of a result, and its trial ends like any other. So Tune sees
    an error only if this process dies, and only then tries again.
    """
    fold = trial[FOLD_KEY]
    if RunFolder(Path(task.root)).fold(fold).result.is_file():
        # Tune gets no finished folds. An earlier attempt finished this one, and its process died after that.
        return
    try:
        _fit(task, fold)
    except Exception as error:  # noqa: BLE001  (whatever a worker raises; the driver reads it from the file)
        _keep_error(task, fold, error)


def measure(config: RunConfig, prepared: Prepared, placement: Placement) -> dict[str, Any]:
    """Runs `measure_worker` at a place for a worker of a fold, and returns what it found.

    Raises: the worker's error; RunFailedError if no place was free within `resources.wait_minutes`.
    """
    asked: dict[str, Any] = {
        "num_cpus": placement.cpus / placement.workers,
        "num_gpus": placement.gpus / placement.workers,
        "max_retries": 0,
    }
    if placement.accelerator:
        asked["accelerator_type"] = placement.accelerator
    worker = ray.remote(measure_worker).options(**asked)
    shared = SharedArrays(prepared.encoded, prepared.splits, prepared.dataset.pairs, None)
    found = worker.remote(config.without_secrets(), shared, prepared.base, placement)
    try:
        result: dict[str, Any] = ray.get(found, timeout=60 * config.resources.wait_minutes)
    except ray.exceptions.GetTimeoutError as error:
        raise RunFailedError(
            f"No place for a fold was free, or the check did not end, in {config.resources.wait_minutes:g} minutes.",
            kind="cluster-resources",
            remedies=["see what the cluster does: ray status", "wait for longer: resources.wait_minutes=600"],
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    return result


def _fit(task: FoldTask, fold: int) -> None:
    """Trains the fold. If a process dies, trains again from the fold's last state, up to `resources.retries` times.

    Ray Train's own retries would repeat errors of the training too, which come again. Ray Train retries after an
    announced loss of a node (a preemption), without limit. A node that cannot train the fold gets no further fold, and
    another node is tried, which costs no retry.

    Raises: the worker's error; RunFailedError if its processes died too often, or if no node is left.
    """
    with seldom_collecting():
        from raycv.orchestration.trainer import fold_trainer, unfit_node, what_died

    attempt = ray.get(task.board.begin.remote(fold))
    if attempt > 1:
        free_place(task, fold)
        _tried_again(task, fold, TRIAL_DIED, attempt)
    # Ray's dashboard names the fold by the last two parts.
    folder = RunFolder(Path(task.root)).ray / task.run / f"fold_{fold}"
    tried = attempt > 1
    while True:
        # Ray Train would make the run's folder where this node does not see it.
        share_of(task).check()
        # Ray Train would also resume from its own files under the same name; training resumes from ours.
        shutil.rmtree(folder, ignore_errors=True)
        left_out = ray.get(task.board.left_out.remote())
        _check_nodes_left(task, left_out)
        begun = task.resumed or tried
        tried = True
        try:
            _keep_fold(task, fold, _reported(task, fold, fold_trainer(task, fold, folder, left_out, begun=begun)))
            return
        except Exception as error:
            free_place(task, fold)
            unfit = unfit_node(error)
            if unfit is not None:
                _leave_out(task, fold, unfit)
                continue
            died = what_died(error)
            if died is None:
                raise
            attempt = ray.get(task.board.begin.remote(fold))
            _tried_again(task, fold, died, attempt, error)


def _reported(task: FoldTask, fold: int, trainer: Any) -> dict[str, Any]:
    """Runs `trainer`, and reports each epoch to Tune meanwhile. Returns what the worker returned.

    Tune's own callback for that has a queue of one place: a trial that ends while the driver stands still would wait
    for ever.
    """
    reported = set()

    def report(epochs: list[dict[str, float]]) -> None:
        for epoch in epochs:
            if epoch[EPOCH_KEY] not in reported:
                reported.add(epoch[EPOCH_KEY])
                tune.report(epoch)

    training: Future[Any] = Future()

    def train() -> None:
        try:
            training.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001  (the trial raises it)
            training.set_exception(error)

    # A daemon, unlike the threads of a pool: a trial whose cluster is gone does not wait for it.
    threading.Thread(target=train, daemon=True).start()
    while not training.done():
        wait([training], REPORT_SECONDS)
        report(ray.get(task.board.epochs.remote(fold)))
    returned: dict[str, Any] = training.result().return_value
    # The board's process may have died with an epoch.
    report(returned["result"].history)
    return returned


def _leave_out(task: FoldTask, fold: int, unfit: NodeError) -> None:
    """Leaves the node of `unfit` out for the rest of the run, and tells the board.

    Raises: `unfit` if it is this process's own node, where another training would end the same way.
    """
    if unfit.node == ray.get_runtime_context().get_node_id():
        raise unfit
    ray.get(task.board.leave_out.remote(unfit.node, unfit.what, unfit.remedies))
    why = f"{unfit.what} This node is left out from now on."
    ray.get(task.board.restart.remote(fold, why))
    task.board.tell.remote(fold, why)


def _check_nodes_left(task: FoldTask, left_out: Mapping[str, tuple[str, list[str]]]) -> None:
    """Raises: RunFailedError if no node but those of `left_out` can take a fold, instead of waiting for one for ever.

    A cluster that grows can always give one more: there it is raised when more than `resources.retries` are left out.
    """
    given = task.placement
    others = node_resources(left_out)
    if task.config.resources.autoscaling:
        over = len(left_out) > task.config.resources.retries
    else:
        over = bool(left_out) and given.places(others) == 0
    if over:
        remedies = [remedy for _, each in left_out.values() for remedy in each]
        raise RunFailedError(
            "\n".join(["No node is left that can take the fold:", *(why for why, _ in left_out.values())]),
            kind="cluster-node",
            remedies=list(dict.fromkeys(remedies)),
        )


def _tried_again(task: FoldTask, fold: int, died: str, attempt: int, error: Exception | None = None) -> None:
    """Tells the board that attempt number `attempt` begins, since a process died.

    Raises: RunFailedError if it is one too many.
    """
    retries = task.config.resources.retries
    if attempt > retries + 1:
        raise died_too_often(died, retries, attempt - 1) from error
    ray.get(task.board.restart.remote(fold, died))
    task.board.tell.remote(fold, f"{died}; the fold is tried again from its last state")


def died_too_often(died: str, retries: int, attempts: int) -> RunFailedError:
    """The error of a fold after `attempts` attempts; `died` names the process whose death ended the last one."""
    return RunFailedError(
        f"{died}, and resources.retries={retries}: it was trained {counted(attempts, 'time')} in all.",
        kind="run-failed",
        remedies=["where memory ran out the kernel ends a process (`dmesg` tells): lower cv.max_concurrent"],
    )


def free_place(task: FoldTask, fold: int) -> None:
    """Frees the cores and GPUs of an attempt. If its trial died, Ray holds them until the run ends.

    The board does it: a driver whose cluster is gone would wait for the answer, and end without a word.
    """
    if task.mark:
        ray.get(task.board.free.remote(task.mark_of(fold)))


def _keep_error(task: FoldTask, fold: int, error: Exception) -> None:
    """Writes why the fold failed where the driver and the user find it."""
    folder = RunFolder(Path(task.root)).fold(fold)
    # A worker failed, or Ray's controller if a worker failed before its training began.
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None) or error]
    cause = failures[0]
    text = "".join(traceback.format_exception(cause))
    if not isinstance(cause, UserError) and is_full(cause):
        # Ray keeps its own files beside the run's, and may be the first to meet a full disk.
        cause = unwritable("What Ray keeps of a fold", Path(task.root), cause)
    if not isinstance(cause, UserError):
        cause = RunFailedError(f"{type(cause).__name__}: {cause}", kind="run-failed")
    message, kind, remedies = mask_secrets(cause.what), cause.kind, cause.remedies
    trace = mask_secrets(f"{error}\n{text}")
    record = {"message": message, "kind": kind, "remedies": remedies, "traceback": trace}
    try:
        with share_of(task).held():
            write_json(folder.error, record)
        if task.needs.published:
            # The driver may be on another node.
            ray.get(task.board.fail.remote(fold, message, kind, remedies))
    except (OSError, UserError):
        # The disk or share may be the cause itself: the board tells the driver.
        ray.get(task.board.fail.remote(fold, message, kind, remedies))


def _keep_fold(task: FoldTask, fold: int, returned: Mapping[str, Any]) -> None:
    """Writes what the worker returned beside the checkpoint that it left; `result.json` comes last.

    The checksums in it are the worker's own, and not those of what is found here: the driver compares.
    Raises: NodeError if the checkpoint is not the one that the worker wrote, or this node lost the run's folder.
    """
    folder = RunFolder(Path(task.root)).fold(fold)
    result: FoldResult = returned["result"]
    files = {folder.predictions: returned["predictions"].to_csv(index=False, lineterminator="\n").encode()}
    epoch_scores = returned["epoch_scores"]
    if epoch_scores is not None:
        files[folder.epoch_scores] = array_bytes(epoch_scores)
    published = task.published
    if published is not None and _unseen(folder, result.sha256):
        published.fetch(checkpoint_part(fold))
    with share_of(task).held():
        fault = survey.settled(lambda: _unseen(folder, result.sha256))
        if fault is not None:
            # The states are still there, so another node has little to train.
            where = node_name(result.worker["address"], result.worker["host"])
            what = f"{fault} {where} trained the fold; {own_node_name()} does not find what it wrote."
            raise NodeError(what, returned["node"], remedies=[SHARE_REMEDY])
        folder.root.mkdir(exist_ok=True)
        folder.error.unlink(missing_ok=True)
        # An earlier training of this fold may have left one, and this training may have none.
        folder.epoch_scores.unlink(missing_ok=True)
        # Scores say something about the authors of posts.
        sums = {}
        for file, content in files.items():
            write_bytes(file, content, private=True)
            sums[file.name] = hashlib.sha256(content).hexdigest()
        restarts = ray.get(task.board.restarts.remote(fold))
        write_json(folder.result, asdict(replace(result, sha256=sums | result.sha256, restarts=restarts)))
    folder.log.unlink(missing_ok=True)
    shutil.rmtree(folder.state, ignore_errors=True)
    if published is not None:
        _publish_fold(task, fold, published)


def _publish_fold(task: FoldTask, fold: int, published: PublishedRun) -> None:
    """Publishes a finished fold, and deletes its published states. The run's end does what could not be done now."""

    def tell(text: str) -> None:
        task.board.tell.remote(fold, text)

    elsewhere = ray.get_runtime_context().get_node_id() != task.home
    hand_over(published, fold_part(fold), tell, needed=elsewhere, where=own_node_name())
    with contextlib.suppress(UserError):
        published.bucket.delete_folder(states_folder(fold))


def _unseen(folder: FoldFolder, sums: Mapping[str, str]) -> str | None:
    """Names the first file of the checkpoint that is missing here or differs from the worker's; None if all agree.

    `sums`: the worker's own checksums.
    """
    there = folder.checkpoint_sums()
    name = next((name for name in sums if there.get(name) != sums[name]), None)
    return None if name is None else f"{folder.root / name} is {'another file' if name in there else 'missing'}."
