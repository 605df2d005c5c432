"""Optimizer, learning-rate schedule and warm-up; the pairs, loss and update of each optimizer step."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional

from raycv.common.devices import is_out_of_memory
from raycv.common.retry import cause_of
from raycv.config.schema import TrainConfig
from raycv.data.prompt_encoder import EncodedPairs
from raycv.errors import UserError
from raycv.model.adapters import Precision, trainable
from raycv.training.forward import Batch, Inputs, Layout, RowScorer, compiled_layers, in_order
from raycv.training.memory import REMEDIES, Checkpointing, MicroBatch, Room
from raycv.training.packing import Group, on_device
from raycv.training.workers import Workers
from raycv.utils import random_state, set_random_state

PASSES = 3
"""Passes of a step under `train.batch_size=auto` before gradient checkpointing begins. More of them would be so small
that a GPU waits for the host."""
TRIED_ROWS = 8
"""Rows whose memory `train.batch_size=auto` measures. The memory grows evenly with the rows."""


class Ready(NamedTuple):
    """A batch with all that its loss is computed from, on the device."""

    batch: Batch
    inputs: Inputs
    labels: torch.Tensor
    """int64 [n]"""
    weights: torch.Tensor
    """float32 [n]"""


class Ahead(NamedTuple):
    """A worker's part of one step, packed."""

    rows: np.ndarray
    """the rows of all workers, sorted: int [n]"""
    part: np.ndarray
    """the positions of this worker's among them: int [m]"""
    cut: tuple[int, Room]
    """the sizes that decided how the batches were cut"""
    batches: list[Ready]


class Steps:
    """Computes the steps of one fold, on its own or together with the fold's other workers.

    Training and validation compute their loss in the same way. `FoldTrainer` makes epochs of it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        encoded: EncodedPairs,
        config: TrainConfig,
        precision: Precision,
        memory_share: float,
        tell: Callable[[str], None],
    ) -> None:
        """Moves the model to its device, and chooses the layout of batches.

        Args:
            model: The classifier.
            encoded: The token arrays of all pairs.
            config: The settings of training.
            precision: The precision that training uses.
            memory_share: The part of the device's memory that belongs to this fold.
            tell: Receives each event.
        """
        self.accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
        self.model = model.to(self.accelerator.device)
        self.scorer = RowScorer(self.model, encoded, self.accelerator.device, self.accelerator.autocast)
        self.encoded = encoded
        self._rows_per_pair = np.bincount(encoded.pair_of_row)
        self.config = config
        self.tell = tell
        self.workers = Workers()
        self.checkpointing = Checkpointing(self.model, config.gradient_checkpointing, memory_share, tell)
        self.micro_batch = {
            True: MicroBatch(self._most_rows, lambda text: tell(f"training: {text}"), self._relieve),
            False: MicroBatch(config.eval_batch_size, lambda text: tell(f"validation: {text}")),
        }
        self.class_weights = torch.ones(2, device=self.accelerator.device)
        self.refresh: Callable[[], None] = lambda: None
        self.layout = self._layouts()

    def _ahead(self, pairs: np.ndarray, training: bool) -> Ahead:
        """Packs one step, and starts to move it to the device."""
        layout, cut = self.layout[training], self._cut(training)
        rows = self.scorer.sorted(self.encoded.rows_of(pairs), layout)
        part = self.scorer.part(rows, self.workers, layout)
        batches = [
            Ready(batch, self.scorer.inputs(batch), *self._answers(batch.rows))
            for batch in self._batches(rows[part], cut[0], training)
        ]
        return Ahead(rows, part, cut, batches)

    def _cut(self, training: bool) -> tuple[int, Room]:
        """Returns what a step is cut into batches by. It changes when memory runs out."""
        return self.micro_batch[training].size, self.checkpointing.room

    def _step(
        self, pairs: np.ndarray, training: bool, ahead: Ahead | None = None
    ) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
        """Runs forward (and backward) over all rows of one step, in micro-batches that fit the memory.

        The rows are packed or sorted, so that a micro-batch holds little padding. The step's gradient is a sum over its
        pairs, so their order does not change it.

        On out-of-memory the whole step is replayed from its start, with the same random state. No pair is lost or
        counted twice. Each loss is divided by the step's true number of pairs, so a short last step has its right
        weight.

        Each of several workers computes its part of the rows. All return the whole step's loss and logits.

        Args:
            pairs: The pairs of the step.
            training: Whether to compute gradients, with the batches of training.
            ahead: The step as `_ahead` packed it; None to pack it now.

        Returns:
            The summed loss, the sorted rows, and their logits. Loss and logits are on the device, so that the host does
            not wait for them.
        """
        packed = ahead or self._ahead(pairs, training)
        rows, part = packed.rows, packed.part
        before = random_state(self.accelerator.device)
        losses: list[torch.Tensor] = []
        done: list[tuple[np.ndarray, torch.Tensor]] = []

        def work(_: int) -> torch.Tensor:
            nonlocal packed
            if packed.cut != self._cut(training):
                packed = self._ahead(pairs, training)
            for ready in packed.batches:
                if training:
                    self.checkpointing.prepare(self.scorer.positions(ready.batch))
                logits = self.scorer.logits(ready.batch, ready.inputs)
                loss = self._loss(logits, ready.labels, ready.weights)
                if training:
                    self.accelerator.backward(loss / len(pairs))
                losses.append(loss.detach())
                done.append((ready.batch.rows, logits.detach()))
            return torch.stack(losses).sum() if losses else torch.zeros((), device=self.accelerator.device)

        def reset() -> None:
            losses.clear()
            done.clear()
            set_random_state(before, self.accelerator.device)
            if training:
                self.optimizer.zero_grad(set_to_none=True)

        total = self.workers.sum(self.micro_batch[training].run(work, reset))
        mine = in_order(rows[part], done) if done else None
        whole = self.workers.join(mine, part, len(rows), self.accelerator.device)
        return total, rows, whole

    @property
    def _most_rows(self) -> int:
        """The rows of a micro-batch at the start."""
        config = self.config
        return config.effective_batch_size if config.batch_size == "auto" else config.batch_size

    def _relieve(self) -> bool:
        """Frees memory other than by a smaller micro-batch. For `batch_size=auto` a few smaller ones come first."""
        if self.config.batch_size == "auto" and self.micro_batch[True].size * PASSES > self._most_rows:
            return False
        return self.checkpointing.relieve()

    def _batches(self, rows: np.ndarray, size: int, training: bool) -> Sequence[Batch]:
        """Returns the sorted `rows` of one worker in batches of at most `size`, or of the size that fits the memory.

        The latter are as few as fit without gradient checkpointing, but at most `PASSES`. Beyond that number, batches
        may use it, and there are as few as fit then.
        """
        layout = self.layout[training]
        if not training or self.config.batch_size != "auto" or not len(rows):
            return list(self.scorer.batches(rows, size, layout))
        batches: list[Batch] = []
        for number in range(-(-len(rows) // size), len(rows) + 1):
            batches = self.scorer.even_batches(rows, number, layout)
            heaviest = max(self.scorer.positions(batch) for batch in batches)
            if self.checkpointing.fits(heaviest, recomputing=number >= PASSES):
                break
        return batches

    def _answers(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the labels [n] of `rows` and their weights [n]. A pair counts once, however many windows it has."""
        pairs, device = self.encoded.pair_of_row[rows], self.accelerator.device
        weights = (1 / self._rows_per_pair[pairs]).astype(np.float32)
        return on_device(self.encoded.labels[pairs], device), on_device(weights, device)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the weighted losses of rows."""
        return (cross_entropy(logits, labels) * self.class_weights[labels] * weights).sum()

    def _layouts(self) -> dict[bool, Layout]:
        """Returns the layout of batches in training (True) and in validation (False)."""
        if not self.config.packing:
            return {True: "padded", False: "padded"}
        trouble = self.scorer.check_packing()
        # Workers that divide a step in two ways would leave rows out and compute others twice, so all use one layout.
        if self.workers.any(trouble is not None, self.accelerator.device):
            trouble = trouble or "another worker of the fold found that it must be"
            self.tell(f"every prompt is computed on its own: {trouble}")
            return {True: "padded", False: "padded"}
        # In a shuffled step each pair draws its own dropout, so even two pairs of one post share nothing.
        return {True: "shared" if self.config.batching == "post_grouped" else "packed", False: "shared"}

    def _heaviest(self, train_pairs: np.ndarray, size: int) -> Batch:
        """Returns a micro-batch with as many positions as any of `size` rows in training can have.

        It has the longest row in each line.
        """
        rows = self.encoded.rows_of(train_pairs)
        size, longest = min(size, len(rows)), rows[[self.encoded.lengths[rows].argmax()]]
        if self.layout[True] == "padded":
            return Batch(np.repeat(longest, size))
        return Batch.packed([[Group(longest, int(self.encoded.lengths[longest[0]]))]] * size)

    def _choose_checkpointing(self, train_pairs: np.ndarray) -> str | None:
        """Lets `auto` try the fold's heaviest micro-batch. Weights and random state stay unchanged.

        Returns the choice in words, or None if there was nothing to choose.
        """
        largest = self.config.batch_size == "auto"
        if not largest and not self.checkpointing.auto:
            return None
        # AdamW keeps two numbers for each trainable parameter, and the gradient is a third.
        later = 3 * sum(parameter.numel() * parameter.element_size() for parameter in trainable(self.model))
        heaviest = self.scorer.positions(self._heaviest(train_pairs, self._most_rows))
        rows = min(TRIED_ROWS, self._most_rows) if largest else self._most_rows
        said = self.checkpointing.choose(
            self.accelerator.device, lambda size: self._tried(train_pairs, size), rows, heaviest, later
        )
        if not largest:
            return said
        room = self.checkpointing.room
        return f"{said}; a pass has up to {room.without} positions without it, and {room.most} with it"

    def _tried(self, train_pairs: np.ndarray, size: int) -> int:
        """Runs forward and backward over the heaviest micro-batch of `size` rows, and returns its positions."""
        batch = self._heaviest(train_pairs, size)
        self._try(batch)
        return self.scorer.positions(batch)

    def _try(self, batch: Batch) -> None:
        """Runs forward and backward over `batch`. Weights and random state stay unchanged."""
        before = random_state(self.accelerator.device)
        self.model.train()
        try:
            self.accelerator.backward(self._loss(self.scorer.logits(batch), *self._answers(batch.rows)))
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            set_random_state(before, self.accelerator.device)

    @contextmanager
    def _compiled(self, train_pairs: np.ndarray) -> Iterator[str | None]:
        """A block in which the decoder layers are compiled, if that is asked for.

        Yields:
            The number of compiled layers and the seconds in words, or None.

        Raises:
            UserError: The model has no decoder layers, or they cannot be compiled.
        """
        if self.config.compile != "on":
            yield None
            return
        began = time.monotonic()
        with compiled_layers(self.scorer.classifier) as layers:
            fault = self._compile(train_pairs) if layers else "it has no layers that transformers can checkpoint"
            if fault:
                name = type(self.scorer.classifier).__name__
                raise UserError(
                    f"train.compile=on: torch cannot compile the layers of {name} here: {fault}",
                    kind="base-unsuitable",
                    remedies=[
                        "train.compile=off",
                        "if a compiler is missing: install g++ for a CPU, and Triton with a C compiler for a GPU",
                    ],
                )
            yield f"compiled {layers} layers in {time.monotonic() - began:.0f} s"

    def _compile(self, train_pairs: np.ndarray) -> str | None:
        """Computes small batches of every form, so that the layers are compiled now.

        The graphs then come from the same batches in a fold that resumes, and have the same numbers.

        Returns:
            None, or why torch cannot compile the layers.
        """
        try:
            for batch in self._forms(train_pairs):
                self._try(batch)
                self.model.eval()
                with torch.no_grad():
                    self.scorer.logits(batch)
        except RuntimeError as error:
            # Training will find out whether its batches fit, and say what helps.
            return None if is_out_of_memory(error) else cause_of(error)
        return None

    def _forms(self, train_pairs: np.ndarray) -> list[Batch]:
        """Returns a batch of each form that torch.compile tells apart: one line or several, of one row or several."""
        rows = self.encoded.rows_of(train_pairs)
        lengths = self.encoded.lengths[rows]
        longest, shortest = rows[[lengths.argmax()]], rows[[lengths.argmin()]]
        if self.layout[True] == "padded":
            # Rows of one length need no mask, and others do.
            return [Batch(np.concatenate(part)) for part in ([longest], [longest, longest], [longest, shortest])]
        group = Group(longest, int(lengths.max()))
        return [Batch.packed([[group] * across] * lines) for lines in (1, 2) for across in (1, 2)]

    def _update(self) -> float:
        """Updates the weights by the gradients of a step. Returns the learning rate that it used.

        Raises:
            UserError: Memory runs out.
        """
        self.workers.sum_gradients(trainable(self.model))
        if self.config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(list(trainable(self.model)), self.config.max_grad_norm)
        learning_rate = float(self.schedule.get_last_lr()[0])
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Half of the weights may be updated, so we cannot replay this step.
            raise UserError(
                f"Out of memory in the optimizer's step: {error}", kind="memory-full", remedies=REMEDIES
            ) from error
        self.refresh()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return learning_rate

    def _prepare(self, train_pairs: np.ndarray) -> None:
        """Makes class weights, optimizer and schedule for a training on `train_pairs`."""
        from transformers import get_scheduler

        weights = class_weights(self.config, self.encoded.labels[train_pairs])
        self.class_weights = torch.from_numpy(weights).to(self.accelerator.device)
        self.optimizer = torch.optim.AdamW(
            trainable(self.model), lr=self.config.lr, weight_decay=self.config.weight_decay
        )
        steps = math.ceil(len(train_pairs) / self.config.effective_batch_size) * self.config.epochs
        if self.config.warmup_steps >= steps:
            self.tell(
                f"the warm-up of {self.config.warmup_steps} steps takes all of the {steps} steps of training, and the "
                "learning rate stays low: lower train.warmup_steps"
            )
        name = {"constant": "constant_with_warmup"}.get(self.config.schedule, self.config.schedule)
        self.schedule = get_scheduler(
            name, self.optimizer, num_warmup_steps=min(self.config.warmup_steps, steps), num_training_steps=steps
        )


def class_weights(config: TrainConfig, labels: np.ndarray) -> np.ndarray:
    """Returns the weight of each class in the loss, float32 [2], from the labels [n] of the training pairs."""
    if config.imbalance != "weighted_loss":
        return np.ones(2, dtype=np.float32)
    # As with sklearn's "balanced", the mean weight over the training fold is 1, so losses keep their scale.
    return (len(labels) / (2 * np.bincount(labels, minlength=2))).astype(np.float32)


def epoch_order(config: TrainConfig, encoded: EncodedPairs, pairs: np.ndarray, epoch: int) -> np.ndarray:
    """Returns the training `pairs` [n] of one epoch in their order; `weighted_sampling` draws with replacement.

    The order depends only on the seed and the epoch, so a restart finds it again.
    """
    generator = np.random.default_rng([config.seed, epoch])
    if config.batching == "post_grouped":
        posts = encoded.post_of_pair[pairs]
        place = generator.permutation(posts.max() + 1)
        return pairs[np.argsort(place[posts], kind="stable")]
    if config.imbalance != "weighted_sampling":
        return generator.permutation(pairs)
    labels = encoded.labels[pairs]
    chance = (1 / np.bincount(labels, minlength=2))[labels] / 2
    return generator.choice(pairs, size=len(pairs), replace=True, p=chance)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy [n] of two-class `logits` [n, 2] against `labels` [n].

    It is computed as softplus of the margin, which is the same number, since NLLLoss has no deterministic CUDA kernel.
    """
    margin = logits[:, 1] - logits[:, 0]
    return functional.softplus(torch.where(labels == 1, -margin, margin))
