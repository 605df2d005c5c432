"""One fold: a Tune trial that builds a TorchTrainer, whose worker runs the training loop. The Ray Train seam.

Ray changes the working directory of trials and workers: every path in here is absolute.
"""

import hashlib
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train

from raycv import survey
from raycv.config import RunConfig
from raycv.errors import RunFailedError, UserError, counted
from raycv.metrics import EPOCH_KEY, F1, THRESHOLD, TRAIN_LOSS, VAL_LOSS, collapse_reasons, collapsed_because
from raycv.nodes import SHARE_REMEDY, NodeError, NodeNeeds, Share, node_name
from raycv.paths import FoldFolder, RunFolder, is_full, unwritable, write_json, write_text
from raycv.prompts import PromptRules
from raycv.records import FoldResult, Pair
from raycv.retry import mask_secrets
from raycv.utils import NUMERICS, seldom_collecting

if TYPE_CHECKING:
    import numpy as np

    from raycv.base import BaseFiles
    from raycv.checkpoint import CheckpointInfo
    from raycv.encoding import EncodedPairs
    from raycv.model import Precision
    from raycv.splits import Split
    from raycv.state import StateFolder, TrainState
    from raycv.train import EpochResult, TrainResult

FOLD_KEY = "fold"
"""The one parameter of a trial."""

STEP_POST_SECONDS = 1.0
TRIAL_DIED = "the process that drives the fold died"


@dataclass(frozen=True)
class Placement:
    """What one fold gets, and how many folds run at once."""

    gpus: float
    """of the fold, shared by its workers"""
    cpus: float
    workers: int
    concurrent: int
    alone: bool = False
    """whether the cluster is one machine, and stays it"""


def places(nodes: Sequence[Mapping[str, float]], gpus: float, cpus: float, workers: int) -> int:
    """How many folds fit on `nodes` (their resources) at once; `gpus` and `cpus` are a fold's."""
    return sum(_workers_that_fit(node, gpus / workers, cpus / workers) for node in nodes) // workers


def _workers_that_fit(node: Mapping[str, float], gpus: float, cpus: float) -> int:
    by_gpu = node.get("GPU", 0) / gpus if gpus else float("inf")
    return int(min(node.get("CPU", 0) / cpus, by_gpu) + 1e-9)


def node_survey() -> Callable[..., dict[str, Any]]:
    """`survey`, made ready to travel by value: a node may have another raycv, or none."""
    ray.cloudpickle.register_pickle_by_value(survey)
    return survey.survey


@dataclass(frozen=True)
class SharedArrays:
    """What all folds read. Lives in the object store; workers map its arrays instead of copying them."""

    encoded: "EncodedPairs"
    splits: list["Split"]
    pairs: list[Pair]
    texts: tuple[dict[str, str], dict[str, str]] | None
    """of posts and criteria, by id; only if they are to stand in the predictions (privacy.log_text)"""


@dataclass(frozen=True)
class FoldTask:
    """Everything that a trial needs besides its fold number. Travels to trials and workers, so it stays small."""

    config: RunConfig
    run: str
    root: str
    shared: "ray.ObjectRef"
    """of SharedArrays"""
    base: "BaseFiles"
    rules: PromptRules
    criteria: dict[str, str | None]
    criteria_dir: str
    criteria_hash: str
    placement: Placement
    needs: NodeNeeds
    """what every node must have as the driver has it"""
    board: Any
    """handle of the ProgressBoard actor"""
    worker: Callable[[dict[str, Any]], dict[str, Any]]
    """train_worker, or what a benchmark puts in its place"""


def fold_trial(trial: dict[str, Any], task: FoldTask) -> None:
    """The Tune trainable: trains fold `trial["fold"]` under Ray Train and leaves its files in the run folder.

    A fold that fails for good leaves `error.json` instead of a result and ends like any other: what Tune sees as an
    error is then the death of this process, and that alone is tried again.
    """
    fold = trial[FOLD_KEY]
    if RunFolder(Path(task.root)).fold(fold).result.is_file():
        # Of an attempt whose process died when all was done: folds that are finished are not given to Tune.
        return
    try:
        _fit(task, fold)
    except Exception as error:  # noqa: BLE001  (whatever a worker raises; the driver reads it from the file)
        _keep_error(task, fold, error)


def _fit(task: FoldTask, fold: int) -> None:
    """Trains the fold; if a process of it dies, again from the fold's last state, `resources.retries` times in all.

    Ray Train's own retries would repeat errors of the training too, which come again. Lost nodes of which Ray was told
    in advance (a preemption) are its own to retry, without limit. A node that cannot train the fold is left out from
    then on, and another is tried: that costs no retry.
    Raises: whatever the worker raised; RunFailedError if its processes died too often, or if no node is left.
    """
    with seldom_collecting():
        from raycv.ray_train import Trainer, unfit_node, what_died

    attempt = ray.get(task.board.begin.remote(fold))
    if attempt > 1:
        free_place(task.board, fold)
        _tried_again(task, fold, TRIAL_DIED, attempt)
    folder = RunFolder(Path(task.root)).ray / f"fold_{fold}"
    while True:
        # Ray Train would make the run's folder where this node does not see it.
        _share(task).check()
        # It would also go on from what it finds under the same name; what training goes on from is ours.
        shutil.rmtree(folder, ignore_errors=True)
        left_out = ray.get(task.board.left_out.remote())
        _check_nodes_left(task, left_out)
        try:
            _keep_fold(task, fold, Trainer(task, fold, folder, left_out).fit())
            return
        except Exception as error:
            free_place(task.board, fold)
            unfit = unfit_node(error)
            if unfit is not None:
                _leave_out(task, fold, unfit)
                continue
            died = what_died(error)
            if died is None:
                raise
            attempt = ray.get(task.board.begin.remote(fold))
            _tried_again(task, fold, died, attempt, error)


def _leave_out(task: FoldTask, fold: int, unfit: NodeError) -> None:
    """Leaves the node of `unfit` out for the rest of the run, and tells so.

    Raises: `unfit` if it is this process's own node: what it does not find, it cannot find after another training.
    """
    if unfit.node == ray.get_runtime_context().get_node_id():
        raise unfit
    ray.get(task.board.leave_out.remote(unfit.node, unfit.what, unfit.remedies))
    task.board.tell.remote(fold, f"{unfit.what} This node is left out from now on.")


def _check_nodes_left(task: FoldTask, left_out: Mapping[str, tuple[str, list[str]]]) -> None:
    """Raises: RunFailedError if no node but those of `left_out` can take a fold, instead of waiting for one for ever.

    A cluster that grows can always give one more: there it is raised when more than `resources.retries` are left out.
    """
    given = task.placement
    others = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in left_out]
    if task.config.resources.autoscaling:
        over = len(left_out) > task.config.resources.retries
    else:
        over = bool(left_out) and places(others, given.gpus, given.cpus, given.workers) == 0
    if over:
        remedies = [remedy for _, each in left_out.values() for remedy in each]
        raise RunFailedError(
            "\n".join(["No node is left that can take the fold:", *(why for why, _ in left_out.values())]),
            remedies=list(dict.fromkeys(remedies)),
        )


def _share(task: FoldTask) -> Share:
    """The run's folder as this process sees it."""
    return task.needs.share_at(ray.get_runtime_context().get_node_id(), _here())


def _here() -> str:
    return node_name(ray.util.get_node_ip_address(), socket.gethostname())


def _tried_again(task: FoldTask, fold: int, died: str, attempt: int, error: Exception | None = None) -> None:
    """Tells that attempt number `attempt` begins, since a process died.

    Raises: RunFailedError if it is one too many.
    """
    retries = task.config.resources.retries
    if attempt > retries + 1:
        raise died_too_often(died, retries, attempt - 1) from error
    task.board.tell.remote(fold, f"{died}; the fold is tried again from its last state")


def died_too_often(died: str, retries: int, attempts: int) -> RunFailedError:
    """The error of a fold that was begun `attempts` times, `died` being what ended the last of them."""
    return RunFailedError(
        f"{died}, and resources.retries={retries}: it was trained {counted(attempts, 'time')} in all.",
        remedies=["where memory ran out the kernel ends a process (`dmesg` tells): lower cv.max_concurrent"],
    )


def free_place(board: Any, fold: int) -> None:
    """Gives back the cores and GPUs of an attempt: if its trial died they are held until the run ends.

    `board`: handle of the ProgressBoard actor.
    """
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    place = ray.get(board.held.remote(fold))
    if place is not None:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(place))))


def _keep_error(task: FoldTask, fold: int, error: Exception) -> None:
    """Writes why the fold failed where the driver and the user find it."""
    folder = RunFolder(Path(task.root)).fold(fold)
    # Of a worker, or of Ray's controller where a worker failed before its training began.
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None) or error]
    cause = getattr(failures[0], "_base_exc", failures[0])
    text = "".join(traceback.format_exception(cause))
    if not isinstance(cause, UserError) and is_full(cause):
        # Ray keeps its own files beside the run's, and may be the first to meet a full disk.
        cause = unwritable("What Ray keeps of a fold", Path(task.root), cause)
    what, remedies = f"{type(cause).__name__}: {cause}", []
    if isinstance(cause, UserError):
        what, remedies = cause.what, cause.remedies
    message = mask_secrets(what)
    record = {"message": message, "remedies": remedies, "traceback": mask_secrets(f"{error}\n{text}")}
    try:
        with _share(task).held():
            write_json(folder.error, record)
    except (OSError, UserError):
        # The disk or share that it failed for: the driver hears of it all the same.
        ray.get(task.board.fail.remote(fold, message, remedies))


def _keep_fold(task: FoldTask, fold: int, trained: Any) -> None:
    """Writes what the worker returned beside the checkpoint that it left; `result.json` comes last.

    The checksums in it are the worker's own, and not those of what is found here: the driver compares.
    Raises: NodeError if the checkpoint is not the one that the worker wrote, or this node lost the run's folder.
    """
    folder = RunFolder(Path(task.root)).fold(fold)
    result: FoldResult = trained.return_value["result"]
    predictions = trained.return_value["predictions"].to_csv(index=False, lineterminator="\n")
    with _share(task).held():
        fault = survey.settled(lambda: _unseen(folder, result.sha256))
        if fault is not None:
            # The states are still there, so another node has little to train.
            where = node_name(result.worker["address"], result.worker["host"])
            what = f"{fault} {where} trained the fold; {_here()} does not find what it wrote."
            raise NodeError(what, trained.return_value["node"], remedies=[SHARE_REMEDY])
        folder.root.mkdir(exist_ok=True)
        folder.error.unlink(missing_ok=True)
        # Scores say something about the authors of posts.
        write_text(folder.predictions, predictions, private=True)
        sums = {folder.predictions.name: hashlib.sha256(predictions.encode()).hexdigest(), **result.sha256}
        write_json(folder.result, asdict(replace(result, sha256=sums)))
    shutil.rmtree(folder.state, ignore_errors=True)


def _unseen(folder: FoldFolder, sums: Mapping[str, str]) -> str | None:
    """The first file of the checkpoint that is missing here, or another than the worker wrote; None if there is none.

    `sums`: the worker's own checksums.
    """
    there = folder.checkpoint_sums()
    name = next((name for name in sums if there.get(name) != sums[name]), None)
    return None if name is None else f"{folder.root / name} is {'another file' if name in there else 'missing'}."


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs on the fold's own GPU (or CPU): loads the base, trains, and returns FoldResult and predictions.

    Goes on from the fold's training state if there is one; leaves the checkpoint in the fold's folder.
    """
    started = time.monotonic()
    task: FoldTask = arguments["task"]
    fold: int = arguments["fold"]
    task.board.post.remote(fold, {"state": "loading"})
    # Here and not at the top: trial drivers and Ray's controllers import this module too, and need none of it.
    with seldom_collecting():
        import torch
        from ray.train.torch import get_device

        from raycv.attention import attention_of
        from raycv.base import fetch_base
        from raycv.loading import load_classifier, load_tokenizer
        from raycv.model import add_dora, base_dtype, choose_precision, count_parameters
        from raycv.progress import spent
        from raycv.state import StateFolder
        from raycv.train import FoldTrainer
        from raycv.utils import describe_device, set_seed

    config = task.config
    shared: SharedArrays = ray.get(task.shared)
    split = shared.splits[fold]
    precision, why = choose_precision(config.train.precision)
    # On the driver's node this only finds the files; another node fetches them once for all of its folds.
    base = fetch_base(task.base.name, task.base.revision)
    tokenizer = load_tokenizer(base)
    device = get_device()
    told: list[str] = []
    dtype = base_dtype(precision)
    model = load_classifier(base, tokenizer, dtype, seed=config.train.seed, device=str(device), tell=told.append)
    set_seed(config.train.seed)
    adapted = add_dora(model, config.model, config.dora)
    rank = ray.train.get_context().get_world_rank()
    if rank:
        # The same weights on every worker, but other rows: dropout must differ.
        torch.manual_seed(config.train.seed + rank)
    folder = RunFolder(Path(task.root)).fold(fold)
    states = StateFolder(folder.state)
    share = _share(task)
    if not rank:
        with share.held():
            states.take()
    listener = _RayListener(task, fold, rank, states, share)
    listener.on_event(f"{why}, {attention_of(model)} attention, on {describe_device(device)}")
    for text in told:
        listener.on_event(text)
    memory = _memory_share(task.placement, device)
    trainer = FoldTrainer(adapted, shared.encoded, config.train, precision, listener, memory)
    state = states.newest(listener.on_event)
    if state is not None:
        listener.goes_on(state)
        # The time that the fold took, not this process alone.
        started -= spent(state)
    outcome = trainer.fit(split.train_indices, split.val_indices, state)
    labels = shared.encoded.labels[split.val_indices]
    collapsed = collapse_reasons(outcome.best.metrics, int(labels.sum()), len(labels), outcome.val_scores)
    if collapsed:
        outcome.events.append(collapsed_because(collapsed))
        if not rank:
            listener.on_event(f"Warning: {collapsed_because(collapsed)}")
    if not rank:
        info = _checkpoint_info(task, fold, base, outcome.best, precision, attention_of(model))
        with share.held():
            states.check_writer()
            _save_checkpoint(folder, adapted, tokenizer, info)
            sums = folder.checkpoint_sums()
    else:
        sums = {}
    worker = {
        "host": socket.gethostname(),
        "address": ray.util.get_node_ip_address(),
        "device": describe_device(device),
        "precision": precision,
        "precision_reason": why,
        "attention": attention_of(model),
        "workers": trainer.workers.size,
        "gradient_checkpointing": trainer.checkpointing.on,
        **count_parameters(adapted),
    }
    seconds = time.monotonic() - started
    result = _fold_result(fold, split, shared.encoded.labels, outcome, seconds, worker, collapsed)
    return {
        "result": replace(result, sha256=sums),
        "predictions": _predictions(shared, split, outcome.val_scores),
        "node": share.node,
    }


def _checkpoint_info(
    task: FoldTask, fold: int, base: "BaseFiles", best: "EpochResult", precision: "Precision", attention: str
) -> "CheckpointInfo":
    from raycv.checkpoint import CheckpointInfo

    return CheckpointInfo(
        base_model=task.base.name,
        base_revision=task.base.revision,
        rules=task.rules,
        threshold=best.threshold,
        criteria=task.criteria,
        criteria_hash=task.criteria_hash,
        criteria_dir=task.criteria_dir,
        run=task.run,
        fold=fold,
        epoch=best.epoch,
        precision=precision,
        base_sums=base.sums(),
        attention=attention,
        missing=task.config.data.missing,
    )


def _save_checkpoint(folder: FoldFolder, model: Any, tokenizer: Any, info: "CheckpointInfo") -> None:
    """Writes the fold's checkpoint whole or not at all."""
    from safetensors import SafetensorError

    from raycv.checkpoint import save_checkpoint

    try:
        folder.root.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=folder.root) as temporary:
            save_checkpoint(Path(temporary) / "checkpoint", model, tokenizer, info)
            # Of a process that was killed before the fold's result was written.
            shutil.rmtree(folder.checkpoint, ignore_errors=True)
            os.replace(Path(temporary) / "checkpoint", folder.checkpoint)
    except (OSError, SafetensorError) as error:
        remedies = ["resume the run when the folder can be written: the training itself is done and kept"]
        raise unwritable("The checkpoint", folder.root, error, remedies) from error


def _memory_share(placement: Placement, device: Any) -> float:
    """The part of a worker's device that is its own: of a GPU as asked for, of the machine one among all workers."""
    if device.type == "cuda":
        return min(1.0, placement.gpus / placement.workers)
    return 1 / (placement.concurrent * placement.workers)


def _fold_result(
    fold: int,
    split: "Split",
    labels: "np.ndarray",
    outcome: "TrainResult",
    seconds: float,
    worker: dict[str, Any],
    collapsed: list[str],
) -> FoldResult:
    return FoldResult(
        fold=fold,
        threshold=outcome.best.threshold,
        best_epoch=outcome.best.epoch,
        epochs=len(outcome.epochs),
        metrics=outcome.best.metrics,
        seconds=seconds,
        train_pairs=len(split.train_indices),
        val_pairs=len(split.val_indices),
        val_matched=int(labels[split.val_indices].sum()),
        history=[epoch_metrics(epoch) for epoch in outcome.epochs],
        events=outcome.events,
        worker=worker,
        collapsed=collapsed,
        numerics=NUMERICS,
    )


def _predictions(shared: SharedArrays, split: "Split", scores: "np.ndarray") -> Any:
    """A DataFrame: post_id, criterion_id, label, score; a row per validation pair; text only if it was asked for."""
    import pandas as pd

    pairs = [shared.pairs[index] for index in split.val_indices]
    columns = {
        "post_id": [pair.post_id for pair in pairs],
        "criterion_id": [pair.criterion_id for pair in pairs],
        "label": [pair.label for pair in pairs],
        "score": scores,
    }
    if shared.texts is not None:
        posts, criteria = shared.texts
        columns["post"] = [posts[pair.post_id] for pair in pairs]
        columns["criterion"] = [criteria[pair.criterion_id] for pair in pairs]
    return pd.DataFrame(columns)


def epoch_metrics(result: "EpochResult") -> dict[str, float]:
    """An epoch as plain numbers: what goes to Tune, to MLflow and into `result.json`."""
    return {
        EPOCH_KEY: result.epoch,
        TRAIN_LOSS: result.train_loss,
        VAL_LOSS: result.val_loss,
        **result.metrics,
        THRESHOLD: result.threshold,
        "learning_rate": result.learning_rate,
        "micro_batch": result.micro_batch,
        "seconds": result.seconds,
    }


class _RayListener:
    """Carries the loop's news on: epochs through Ray Train, steps to the progress board, states to their folder."""

    def __init__(self, task: FoldTask, fold: int, rank: int, states: "StateFolder", share: Share) -> None:
        self.task = task
        self.fold = fold
        self.rank = rank
        self.states = states
        self.share = share
        self._posted = 0.0

    def goes_on(self, state: "TrainState") -> None:
        """Training will go on from `state`."""
        if self.rank:
            return
        self.on_event(f"goes on after {state}")
        best = max((epoch["metrics"][F1] for epoch in state.facts["epochs"]), default=0.0)
        self.task.board.post.remote(self.fold, {"earlier_f1": best})

    def on_step(self, epoch: int, step: int, steps: int, loss: float, micro_batch: int) -> None:
        now = time.monotonic()
        if self.rank or (now - self._posted < STEP_POST_SECONDS and step < steps):
            return
        self._posted = now
        post = {
            "state": "training" if step < steps else "validating",
            "epoch": epoch,
            "step": step,
            "steps": steps,
            "loss": loss,
            "micro_batch": micro_batch,
        }
        self.task.board.post.remote(self.fold, post)

    def on_epoch(self, result: "EpochResult", scores: "np.ndarray", is_best: bool) -> None:
        metrics = epoch_metrics(result)
        if not self.rank:
            self.task.board.post.remote(self.fold, {"history": metrics})
        # All workers report, the first for them all: Ray Train waits for each.
        ray.train.report(metrics)

    def on_state(self, state: "TrainState") -> None:
        # One for all workers: it holds what each has for itself.
        if not self.rank:
            with self.share.held():
                self.states.save(state)

    def on_event(self, text: str) -> None:
        self.task.board.tell.remote(self.fold, f"worker {self.rank}: {text}" if self.rank else text)
