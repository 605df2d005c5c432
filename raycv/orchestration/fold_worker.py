"""The worker of a fold: loads the model, runs the training loop, writes checkpoint and predictions."""

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train

from raycv.common.environment import seldom_collecting, utc_now
from raycv.common.files import unwritable
from raycv.errors import UserError
from raycv.orchestration.cluster import own_resources, share_of
from raycv.orchestration.fold_task import FoldGauges, FoldTask, SharedArrays
from raycv.resources.nodes import NodeError, Share
from raycv.resources.placement import Placement
from raycv.resources.publisher import StatePublisher, bring_states, hand_over
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import FoldFolder, RunFolder
from raycv.results.storage import UNREACHABLE, checkpoint_part
from raycv.training.metrics import EPOCH_KEY, F1, THRESHOLD, TRAIN_LOSS, VAL_LOSS, collapse_reasons, collapsed_because
from raycv.utils import NUMERICS

if TYPE_CHECKING:
    import numpy as np

    from raycv.config.schema import RunConfig
    from raycv.data.splits import Split
    from raycv.model.adapters import Precision
    from raycv.model.base_files import BaseFiles
    from raycv.model.checkpoint import CheckpointInfo
    from raycv.training.loop import TrainResult
    from raycv.training.progress import EpochResult
    from raycv.training.state import StateFolder, TrainState

STEP_POST_SECONDS = 1.0
MEASURE_SECONDS = 20.0
"""For each way of batching, no step is timed that begins later."""


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs on the fold's own GPU (or CPU): loads the base, trains, and returns FoldResult and scores.

    Resumes from the fold's training state if there is one; leaves the checkpoint in the fold's folder.
    """
    started = time.monotonic()
    task: FoldTask = arguments["task"]
    fold: int = arguments["fold"]
    if not task.config.resources.ray_logs:
        keep_output(RunFolder(Path(task.root)).fold(fold))
    task.board.post.remote(fold, {"state": "loading"})
    # Here and not at the top: trial drivers and Ray's controllers import this module too, and need none of it.
    with seldom_collecting():
        import torch
        from ray.train.torch import get_device

        from raycv.common.environment import describe_device
        from raycv.model.adapters import count_parameters
        from raycv.model.base_model import fetch_base
        from raycv.model.loading import load_tokenizer
        from raycv.training.loop import FoldTrainer
        from raycv.training.progress import spent
        from raycv.training.state import StateFolder

    config = task.config
    shared: SharedArrays = ray.get(task.shared)
    split = shared.splits[fold]
    # On the driver's node this only finds the files; another node fetches them once for all of its folds.
    base = fetch_base(task.base.name, task.base.revision)
    share = share_of(task)
    _check_storage(task, fold, share)
    share.check_base(base.path, task.base_sums, base.sums())
    tokenizer = load_tokenizer(base)
    device = get_device()
    told: list[str] = []
    adapted, precision, why, attention = _adapted(config, base, tokenizer, device, told.append)
    rank = ray.train.get_context().get_world_rank()
    if rank:
        # The same weights on every worker, but other rows: dropout must differ.
        torch.manual_seed(config.train.seed + rank)
    folder = RunFolder(Path(task.root)).fold(fold)
    states = StateFolder(folder.state)
    if not rank:
        with share.held():
            states.take()
        ray.get(task.board.train.remote(fold))
    tokens = float(shared.encoded.lengths[shared.encoded.rows_of(split.train_indices)].sum())
    per_step = tokens / len(split.train_indices) * config.train.effective_batch_size
    gauges = FoldGauges(task.run, fold, config.train.epochs, per_step)
    listener = _RayListener(task, fold, rank, states, share, gauges)
    listener.on_event(f"{why}, {attention} attention, on {describe_device(device)}")
    for text in told:
        listener.on_event(text)
    published = task.published
    publisher = None
    if published is not None:
        # Ray Train may restart a worker automatically, so even the first attempt looks for a state.
        alone, begun = task.placement.workers == 1, arguments["begun"]
        bring_states(published, fold, alone=alone, tell=listener.on_event, begun=begun)
        if not rank:
            publisher = listener.publisher = StatePublisher(published, fold, listener.on_event)
    memory = _memory_share(task.placement, device)
    trainer = FoldTrainer(adapted, shared.encoded, config.train, precision, listener, memory)
    state = states.newest(listener.on_event)
    if state is not None:
        listener.resumes(state)
        # `seconds` counts all processes of the fold, not only this one.
        started -= spent(state)
    outcome = trainer.fit(split.train_indices, split.val_indices, state)
    labels = shared.encoded.labels[split.val_indices]
    collapsed = collapse_reasons(outcome.best.metrics, int(labels.sum()), len(labels), outcome.val_scores, labels)
    if collapsed:
        outcome.events.append(collapsed_because(collapsed))
        if not rank:
            listener.on_event(f"Warning: {collapsed_because(collapsed)}")
    if not rank:
        info = _checkpoint_info(task, fold, outcome.best, precision, attention)
        with share.held():
            states.check_writer()
            save_fold_checkpoint(folder, adapted, tokenizer, info)
            sums = folder.checkpoint_sums()
        if published is not None and publisher is not None:
            publisher.stop()
            elsewhere = share.node != arguments["node"]
            part = checkpoint_part(fold)
            hand_over(published, part, listener.on_event, needed=elsewhere, where=share.name)
            if elsewhere:
                # The storage has all of it now.
                shutil.rmtree(folder.root, ignore_errors=True)
    else:
        sums = {}
    worker = {
        "host": socket.gethostname(),
        "address": ray.util.get_node_ip_address(),
        "device": describe_device(device),
        "precision": precision,
        # The log has the speed of this CPU beside it, which each worker measures again.
        "precision_reason": why.partition(";")[0],
        "attention": attention,
        "workers": trainer.workers.size,
        "gradient_checkpointing": trainer.checkpointing.on,
        **count_parameters(adapted),
    }
    seconds = time.monotonic() - started
    result = _fold_result(fold, split, shared.encoded.labels, outcome, seconds, worker, collapsed)
    return {
        "result": replace(result, sha256=sums),
        "predictions": _predictions(shared, split, outcome.val_scores),
        "epoch_scores": outcome.epoch_scores,
        "node": share.node,
    }


def keep_output(folder: FoldFolder) -> None:
    """Sends what this process prints from now on, native libraries included, to a file in the fold's folder.

    A process that the kernel kills can leave nothing behind later. Without the file only the log is missing.
    """
    with contextlib.suppress(OSError):
        folder.root.mkdir(exist_ok=True)
        file = os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(file, f"{utc_now()}: process {os.getpid()} on {socket.gethostname()}\n".encode())
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(file)


def _adapted(
    config: "RunConfig", base: "BaseFiles", tokenizer: Any, device: Any, tell: Callable[[str], None]
) -> tuple[Any, "Precision", str, str]:
    """Returns the classifier with DoRA on `device`, its precision, the reason for that, and its attention."""
    from raycv.model.adapters import add_dora, base_dtype, choose_precision
    from raycv.model.attention import attention_of
    from raycv.model.loading import load_classifier
    from raycv.utils import set_seed

    precision, why = choose_precision(config.train.precision)
    dtype = base_dtype(precision)
    model = load_classifier(base, tokenizer, dtype, seed=config.train.seed, device=str(device), tell=tell)
    attention = attention_of(model)
    set_seed(config.train.seed)
    return add_dora(model, config.model, config.dora), precision, why, attention


def measure_worker(
    config: "RunConfig", shared: SharedArrays, base: "BaseFiles", placement: Placement
) -> dict[str, Any]:
    """Runs where a fold would: loads the base, and measures training in both ways of batching. Writes nothing.

    Returns `device`, `precision`, `attention`, `taken` and `limit` (bytes), `told` (texts for the user), and `paces`: a
    Pace for each `train.batching`.
    """
    with seldom_collecting():
        from accelerate import Accelerator

        from raycv.common.environment import describe_device
        from raycv.model.base_model import fetch_base
        from raycv.model.loading import load_tokenizer
        from raycv.training.loop import FoldTrainer, Pace
        from raycv.training.memory import memory_limit, memory_taken

    told: list[str] = []
    files = fetch_base(base.name, base.revision)
    tokenizer, device = load_tokenizer(files), Accelerator().device
    adapted, precision, _, attention = _adapted(config, files, tokenizer, device, told.append)
    split, share = shared.splits[0], _memory_share(placement, device)
    limit = memory_limit(device, share)
    paces: dict[str, Pace] = {}
    for batching in ("shuffled", "post_grouped"):
        train = config.train.model_copy(update={"batching": batching})
        trainer = FoldTrainer(adapted, shared.encoded, train, precision, _Told(told), share)
        paces[batching] = trainer.measure(split.train_indices, split.val_indices, MEASURE_SECONDS)
    return {
        "device": describe_device(device), "precision": precision, "attention": attention, "told": told,
        "taken": memory_taken(device), "limit": limit, "paces": paces,
    }  # fmt: skip


class _Told:
    """A listener that keeps events alone."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def on_event(self, text: str) -> None:
        self._events.append(text)

    def on_step(self, *_: Any, **__: Any) -> None:
        pass

    on_epoch = on_state = on_step


def _check_storage(task: FoldTask, fold: int, share: Share) -> None:
    """Raises: NodeError if the object storage of the run, if it has one, refuses what this node asks."""
    if task.published is None:
        return
    try:
        task.published.bucket.check()
    except UserError as error:
        if error.kind != UNREACHABLE:
            raise NodeError(f"{share.name}: {error.what}", share.node, remedies=error.remedies) from error
        task.board.tell.remote(fold, f"{error.what} Training begins all the same.")


def _checkpoint_info(
    task: FoldTask, fold: int, best: "EpochResult", precision: "Precision", attention: str
) -> "CheckpointInfo":
    from raycv.model.checkpoint import CheckpointInfo

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
        base_sums=dict(task.base_sums),
        attention=attention,
        missing=task.config.data.missing,
    )


def save_fold_checkpoint(folder: FoldFolder, model: Any, tokenizer: Any, info: "CheckpointInfo") -> None:
    """Writes the fold's checkpoint whole or not at all."""
    from safetensors import SafetensorError

    from raycv.model.checkpoint import save_checkpoint

    try:
        folder.root.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=folder.root) as temporary:
            save_checkpoint(Path(temporary) / "checkpoint", model, tokenizer, info)
            # A process that was killed before it wrote the fold's result may have left one.
            shutil.rmtree(folder.checkpoint, ignore_errors=True)
            os.replace(Path(temporary) / "checkpoint", folder.checkpoint)
    except (OSError, SafetensorError) as error:
        remedies = ["resume the run when the folder can be written: the training itself is done and kept"]
        raise unwritable("The checkpoint", folder.root, error, remedies) from error


def _memory_share(placement: Placement, device: Any) -> float:
    """The share of a device that one worker may use: its part of a GPU, or an equal part of the machine's memory."""
    if device.type == "cuda":
        return min(1.0, placement.gpus / placement.workers)
    return 1 / placement.workers_on(own_resources())


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
    """An epoch as plain numbers, for Tune, MLflow and `result.json`."""
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
    """Passes on what the loop reports: epochs to Ray Train, steps to the progress board, states to their folder."""

    def __init__(
        self, task: FoldTask, fold: int, rank: int, states: "StateFolder", share: Share, gauges: FoldGauges
    ) -> None:
        self.task = task
        self.fold = fold
        self.gauges = gauges
        self.rank = rank
        self.states = states
        self.share = share
        self.publisher: StatePublisher | None = None
        """the first worker has one if the run is in an object storage"""
        self._posted = 0.0

    def resumes(self, state: "TrainState") -> None:
        """Tells the board that training resumes from `state`."""
        if self.rank:
            return
        self.on_event(f"resumes after {state}")
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
        import torch

        memory = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else None
        self.gauges.step(epoch, step, steps, loss, memory)

    def on_epoch(self, result: "EpochResult", scores: "np.ndarray", is_best: bool) -> None:
        metrics = epoch_metrics(result)
        if not self.rank:
            self.task.board.post.remote(self.fold, {"history": metrics})
            self.gauges.epoch(result.epoch, result.metrics[F1], result.seconds)
        # Ray Train waits until each worker reports, and hands on the first one's metrics.
        ray.train.report(metrics)

    def on_state(self, state: "TrainState") -> None:
        # The first worker saves the states of all workers.
        if not self.rank:
            with self.share.held():
                saved = self.states.save(state)
            if self.publisher is not None:
                self.publisher.offer(saved.name)

    def on_event(self, text: str) -> None:
        self.task.board.tell.remote(self.fold, f"worker {self.rank}: {text}" if self.rank else text)
