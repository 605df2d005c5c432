"""The training loop of one fold: epochs, validation, patience, training states. Knows no Ray and no MLflow."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch

from raycv.common.environment import describe_device
from raycv.config.schema import TrainConfig
from raycv.data.prompt_encoder import EncodedPairs
from raycv.errors import UserError
from raycv.model.adapters import Precision
from raycv.training.memory import Room
from raycv.training.metrics import binary_metrics, tune_threshold
from raycv.training.progress import (
    WORKERS,
    EpochResult,
    Progress,
    set_training_tensors,
    set_weights,
    training_tensors,
    workers_tensors,
)
from raycv.training.state import TrainState
from raycv.training.steps import Steps, epoch_order
from raycv.utils import random_state, set_random_state

EVAL_STEP_PAIRS = 256
"""Pairs in a step of validation, after which the loss is checked. `eval_batch_size` sets the batches within a step."""


MEASURED_STEPS = 10
"""Steps of an epoch that `FoldTrainer.measure` times at most."""


@dataclass(frozen=True)
class Pace:
    """How fast a fold trains on a device."""

    steps: int
    """optimizer steps of an epoch"""
    step_seconds: float
    val_seconds: float
    """seconds of a validation"""
    micro_batch: int
    """the size that fits the heaviest step"""
    checkpointing: bool

    def seconds(self, epochs: int) -> float:
        """Seconds of `epochs` epochs."""
        return epochs * (self.steps * self.step_seconds + self.val_seconds)


@dataclass
class TrainResult:
    """The result of a finished fold: all epochs, and the scores of the best one."""

    epochs: list[EpochResult]
    best: EpochResult
    val_scores: np.ndarray
    """float64 [n_val]: probability of `matched` at the best epoch, in the order of the validation pairs"""
    epoch_scores: np.ndarray | None
    """float64 [epochs, n_val]: the same after each epoch; None if it resumed from a state without the earlier ones"""
    events: list[str]
    """events that a reader of the results should know: out-of-memory, early stopping"""


class Listener(Protocol):
    """Receives the progress of training."""

    def on_step(self, epoch: int, step: int, steps: int, loss: float, micro_batch: int) -> None:
        """Called after every optimizer step. `loss` is the mean over the step's pairs."""

    def on_epoch(self, result: EpochResult, scores: np.ndarray, is_best: bool) -> None:
        """Called after every epoch, while the model has that epoch's weights. `scores`: float64 [n_val]."""

    def on_state(self, state: TrainState) -> None:
        """Called with a training state after every epoch and every `checkpoint_minutes`.

        The state's tensors change later, so write or copy them at once.
        """

    def on_event(self, text: str) -> None:
        """Called with an event that the user should know."""


class FoldTrainer(Steps):
    """Trains and validates one fold. Both use the same pass."""

    def __init__(
        self,
        model: torch.nn.Module,
        encoded: EncodedPairs,
        config: TrainConfig,
        precision: Precision,
        listener: Listener,
        memory_share: float = 1.0,
    ) -> None:
        """Prepares the model for training on its device.

        Args:
            model: The classifier.
            encoded: The token arrays of all pairs.
            config: The settings of training.
            precision: The precision that training uses.
            listener: Receives the progress.
            memory_share: The part of the device's memory that belongs to this fold, if folds share a device.
        """
        self.precision = precision
        self.listener = listener
        self.events: list[str] = []
        self.progress = Progress()
        super().__init__(model, encoded, config, precision, memory_share, self._tell)

    def fit(self, train_pairs: np.ndarray, val_pairs: np.ndarray, state: TrainState | None = None) -> TrainResult:
        """Trains until F1 on `val_pairs` has not improved for `patience` epochs, at most `epochs` (FR-005, FR-007).

        It leaves the model with the weights of the best epoch.

        Args:
            train_pairs: Indices [n] of the pairs to train on.
            val_pairs: Indices [n] of the pairs to validate on.
            state: A training state that an equal training gave its listener. Training resumes from it as if it had
                never stopped.

        Raises:
            UserError: Memory runs out with a micro-batch of 1 or in the optimizer's step. A loss is NaN or infinity.
                `state` has another precision or attention. The layers cannot be compiled.
        """
        self.progress = Progress()
        self._prepare(train_pairs)
        if state is not None:
            self._restore(state)
        self._val_labels = self.encoded.labels[val_pairs]
        progress, config = self.progress, self.config
        # From here to the end of the block, only the optimizer changes weights.
        with self.scorer.prepared() as self.refresh, self._compiled(train_pairs) as compiled:
            chosen = self._choose_checkpointing(train_pairs) if state is None else None
            for said in filter(None, (compiled, chosen)):
                self.listener.on_event(said)
            self._saved = time.monotonic()
            while len(progress.epochs) < config.epochs and progress.since_best() < config.patience:
                result, scores = self._epoch(train_pairs, val_pairs)
                is_best = progress.add(result, scores, self.model)
                self.listener.on_epoch(result, scores, is_best)
                self._save()
        if len(progress.epochs) < config.epochs:
            self._tell(f"stopped early after epoch {len(progress.epochs)}: no better F1 for {config.patience} epochs")
        assert progress.best is not None
        set_weights(self.model, progress.best.weights)
        every = None if progress.scores is None else np.stack(progress.scores)
        return TrainResult(progress.epochs, progress.best.result, progress.best.scores, every, self.events)

    def measure(self, train_pairs: np.ndarray, val_pairs: np.ndarray, seconds: float) -> Pace:
        """Trains the step with the longest pairs, then the first steps of an epoch, and validates a few pairs.

        It changes the weights, and gives its listener no state.

        Args:
            train_pairs: Indices [n] of the pairs of a fold to train on.
            val_pairs: Indices [n] of the pairs to validate on.
            seconds: The time after which no further step begins; three steps are always timed if there are so many.
        """
        self.progress = Progress()
        self._prepare(train_pairs)
        order, size = epoch_order(self.config, self.encoded, train_pairs, 1), self.config.effective_batch_size
        longest = np.zeros(len(self.encoded.labels), dtype=np.int64)
        np.maximum.at(longest, self.encoded.pair_of_row, self.encoded.lengths)
        heaviest = train_pairs[np.argsort(longest[train_pairs], kind="stable")[-size:]]
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        with self.scorer.prepared() as self.refresh, self._compiled(train_pairs) as compiled:
            for said in filter(None, (compiled, self._choose_checkpointing(train_pairs))):
                self.listener.on_event(said)
            # The first steps of a process are slow, so the heaviest one is not timed.
            for _ in self._pass([heaviest], training=True):
                pass
            started, done = time.monotonic(), 0
            for _ in self._pass(steps[:MEASURED_STEPS], training=True):
                done += 1
                if done >= 3 and time.monotonic() - started > seconds:
                    break
            step_seconds = (time.monotonic() - started) / done
            few = val_pairs[: 2 * size]
            started = time.monotonic()
            self.scores(few)
            val_seconds = (time.monotonic() - started) / len(few) * len(val_pairs)
        return Pace(len(steps), step_seconds, val_seconds, self.micro_batch[True].size, self.checkpointing.on)

    def scores(self, pairs: np.ndarray) -> tuple[np.ndarray, float]:
        """Validates `pairs`.

        Returns:
            Probabilities of `matched` (float64 [n]; the maximum over a pair's windows), and the mean loss.
        """
        # Sorting over the whole fold leaves hardly any padding. If memory runs out, it does so at the start.
        rows = self.scorer.sorted(self.encoded.rows_of(pairs), self.layout[False])
        order = self.encoded.pair_of_row[rows]
        order = order[np.sort(np.unique(order, return_index=True)[1])]
        step = EVAL_STEP_PAIRS
        steps = [order[start : start + step] for start in range(0, len(order), step)]
        scores, loss = np.zeros(len(self.encoded.labels)), 0.0
        with self.scorer.prepared():
            for step_loss, rows, logits in self._pass(steps, training=False):
                probabilities = torch.softmax(logits.double(), dim=-1)[:, 1].numpy()
                np.maximum.at(scores, self.encoded.pair_of_row[rows], probabilities)
                loss += step_loss
        return scores[pairs], loss / len(pairs)

    def _epoch(self, train_pairs: np.ndarray, val_pairs: np.ndarray) -> tuple[EpochResult, np.ndarray]:
        """Runs the next epoch, or the rest of it."""
        progress = self.progress
        epoch, started = len(progress.epochs) + 1, time.monotonic() - progress.seconds
        order = epoch_order(self.config, self.encoded, train_pairs, epoch)
        size = self.config.effective_batch_size
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        for pairs, (loss, _, _) in zip(
            steps[progress.step :], self._pass(steps[progress.step :], training=True), strict=True
        ):
            progress.step += 1
            progress.loss += loss
            progress.seconds = time.monotonic() - started
            micro_batch = self.micro_batch[True].size
            self.listener.on_step(epoch, progress.step, len(steps), loss / len(pairs), micro_batch)
            if self._save_is_due():
                self._save()
        scores, val_loss = self.scores(val_pairs)
        threshold = tune_threshold(self._val_labels, scores)
        result = EpochResult(
            epoch=epoch,
            train_loss=progress.loss / len(order),
            val_loss=val_loss,
            threshold=threshold,
            metrics=binary_metrics(self._val_labels, scores, threshold),
            learning_rate=progress.learning_rate,
            micro_batch=self.micro_batch[True].size,
            seconds=time.monotonic() - started,
        )
        return result, scores

    def _pass(self, steps: list[np.ndarray], *, training: bool) -> Iterator[tuple[float, np.ndarray, torch.Tensor]]:
        """Runs one pass over `steps` (the pairs of each).

        Training updates the weights after each step. Validation computes the same without gradients.

        Yields:
            Each step's summed loss, its rows, and their logits on the CPU.

        Raises:
            UserError: The loss of a step is NaN or infinity.
        """
        self.model.train(training)
        last = self.progress.step + len(steps)
        ahead = None
        for pairs, following in zip_longest(steps, steps[1:]):
            with torch.set_grad_enabled(training):
                total, rows, logits = self._step(pairs, training, ahead)
            # A GPU gets the update and the next norms to do before the host waits for the loss. Meanwhile the host
            # packs the next step. A loss of NaN spoils the weights in memory, but it ends the training before anything
            # is saved.
            if training:
                self.progress.learning_rate = self._update()
            ahead = None if following is None else self._ahead(following, training)
            loss = float(total)
            if not math.isfinite(loss):
                epoch = len(self.progress.epochs) + 1
                place = f"epoch {epoch}, step {self.progress.step + 1} of {last}" if training else f"epoch {epoch}"
                raise UserError(
                    f"The {'training' if training else 'validation'} loss is {loss} in {place}.",
                    kind="training-loss",
                    remedies=self._other_settings(),
                )
            yield loss, rows, logits.cpu()

    def _other_settings(self) -> list[str]:
        """Returns remedies that may keep the loss finite.

        All of them make another run, since `resume=` would reach the same loss.
        """
        new, config = "run.name=<new>", self.config
        remedies = [f"lower the learning rate, in a new run: {new} train.lr={config.lr / 4:g}"]
        if self.precision != "fp32":
            remedies.append(f"compute in more bits, in a new run: {new} train.precision=fp32")
        return [*remedies, f"warm up for longer, in a new run: {new} train.warmup_steps={2 * config.warmup_steps + 50}"]

    def _save_is_due(self) -> bool:
        minutes = self.config.checkpoint_minutes
        if minutes is None:
            return False
        # All workers take part in saving, so they decide together.
        return self.workers.any(time.monotonic() - self._saved >= 60 * minutes, self.accelerator.device)

    def _save(self) -> None:
        """Gives the listener a training state of this moment.

        It need not hold the order of pairs, which follows from the epoch.
        """
        device = self.accelerator.device
        sizes = (self.micro_batch[True].size, self.micro_batch[False].size, self.checkpointing.on)
        own = random_state(device) | {"sizes": torch.tensor(sizes), "room": torch.tensor(self.checkpointing.room)}
        tensors = {f"{WORKERS}{name}": self.workers.gather(tensor, device) for name, tensor in own.items()}
        tensors |= training_tensors(self.model, self.optimizer)
        facts = {"schedule": self.schedule.state_dict(), "events": list(self.events), "precision": self.precision}
        facts["device"] = describe_device(device)
        facts["attention"] = self.scorer.attention
        self.listener.on_state(self.progress.to_state(facts, tensors))
        self._saved = time.monotonic()

    def _restore(self, state: TrainState) -> None:
        """Brings this training to the point of the one that made `state`.

        Raises:
            UserError: The fold was trained in another precision or with another attention.
        """
        if state.facts["precision"] != self.precision:
            raise UserError(
                f"The fold was trained in {state.facts['precision']}, and would resume in {self.precision} here.",
                kind="resume-differs",
                remedies=["resume the run on the kind of device that it began on", "or start it afresh"],
            )
        self._check_attention(state)
        self.progress = Progress.from_state(state)
        set_training_tensors(self.model, self.optimizer, state.tensors)
        self.schedule.load_state_dict(state.facts["schedule"])
        for group, lr in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        # `torch.set_rng_state` crashes on a row of a larger tensor, so we clone.
        own = {name: tensor[self.workers.rank].clone() for name, tensor in workers_tensors(state.tensors).items()}
        self.micro_batch[True].size, self.micro_batch[False].size, checkpointing = own.pop("sizes").tolist()
        # Earlier versions recorded no room.
        room = own.pop("room", None)
        self.checkpointing.restore(bool(checkpointing), room if room is None else Room(*room.tolist()))
        set_random_state(own, self.accelerator.device)
        self.events[:] = state.facts["events"]
        then, now = state.facts.get("device"), describe_device(self.accelerator.device)
        if then not in (None, now):
            # Other threads, or the kernels of another GPU, add in another order, so we warn.
            self._tell(f"Warning: resumes with {now}, and had {then}: numbers may differ in their last bits")

    def _check_attention(self, state: TrainState) -> None:
        """Checks that the fold was trained with this attention. Otherwise its numbers would come from two functions.

        Raises:
            UserError: It was trained with another attention.
        """
        # Earlier versions recorded no attention. They used the kernel if the family has it.
        then = state.facts.get("attention", self.scorer.earlier_attention)
        if then != self.scorer.attention:
            raise UserError(
                f"The fold was trained with {then} attention, and would be computed with {self.scorer.attention} here.",
                kind="resume-differs",
                remedies=[
                    "resume the run with the version of raycv, and on the kind of device, that began it",
                    "or start it afresh under another name: run.name=<new>",
                ],
            )

    def _tell(self, text: str) -> None:
        self.events.append(text)
        self.listener.on_event(text)
