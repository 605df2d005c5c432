"""Optimizer, learning-rate schedule and warm-up; the pairs, loss and update of each optimizer step."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional

from raycv.common.devices import is_out_of_memory
from raycv.config.schema import TrainConfig
from raycv.data.prompt_encoder import EncodedPairs
from raycv.errors import UserError
from raycv.model.adapters import Precision, trainable
from raycv.training.forward import Batch, Layout, RowScorer, in_order
from raycv.training.memory import REMEDIES, Checkpointing, MicroBatch
from raycv.training.packing import Group
from raycv.training.workers import Workers
from raycv.utils import random_state, set_random_state

PASSES = 3
"""Passes of a step under `train.batch_size=auto` before gradient checkpointing begins. More of them would be so small
that a GPU waits for the host."""
TRIED_ROWS = 8
"""Rows whose memory `train.batch_size=auto` measures. The memory grows evenly with the rows."""


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

    def _step(self, pairs: np.ndarray, training: bool) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
        """Runs forward (and backward) over all rows of one step, in micro-batches that fit the memory.

        The rows are packed or sorted, so that a micro-batch holds little padding. The step's gradient is a sum over its
        pairs, so their order does not change it.

        On out-of-memory the whole step is replayed from its start, with the same random state. No pair is lost or
        counted twice. Each loss is divided by the step's true number of pairs, so a short last step has its right
        weight.

        Each of several workers computes its part of the rows. All return the whole step's loss and logits.

        Returns:
            The summed loss, the sorted rows, and their logits. Loss and logits are on the device, so that the host does
            not wait for them.
        """
        layout = self.layout[training]
        rows = self.scorer.sorted(self.encoded.rows_of(pairs), layout)
        part = self.scorer.part(rows, self.workers, layout)
        before = random_state(self.accelerator.device)
        losses: list[torch.Tensor] = []
        done: list[tuple[np.ndarray, torch.Tensor]] = []

        def work(size: int) -> torch.Tensor:
            for batch in self._batches(rows[part], size, training):
                if training:
                    self.checkpointing.prepare(self.scorer.positions(batch))
                logits = self.scorer.logits(batch)
                loss = self._loss(batch.rows, logits)
                if training:
                    self.accelerator.backward(loss / len(pairs))
                losses.append(loss.detach())
                done.append((batch.rows, logits.detach()))
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
        if not training or self.config.batch_size != "auto":
            return list(self.scorer.batches(rows, size, layout))
        batches: list[Batch] = []
        for number in range(-(-len(rows) // size), len(rows) + 1):
            batches = self.scorer.even_batches(rows, number, layout)
            heaviest = max(self.scorer.positions(batch) for batch in batches)
            if self.checkpointing.fits(heaviest, recomputing=number >= PASSES):
                break
        return batches

    def _loss(self, rows: np.ndarray, logits: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the weighted losses of `rows`. A pair counts once, however many windows it has."""
        pairs = self.encoded.pair_of_row[rows]
        labels = torch.from_numpy(self.encoded.labels[pairs]).to(logits.device)
        weights = torch.from_numpy((1 / self._rows_per_pair[pairs]).astype(np.float32)).to(logits.device)
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
        before = random_state(self.accelerator.device)

        def backward(size: int) -> int:
            batch = self._heaviest(train_pairs, size)
            self.model.train()
            try:
                self.accelerator.backward(self._loss(batch.rows, self.scorer.logits(batch)))
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                set_random_state(before, self.accelerator.device)
            return self.scorer.positions(batch)

        # AdamW keeps two numbers for each trainable parameter, and the gradient is a third.
        later = 3 * sum(parameter.numel() * parameter.element_size() for parameter in trainable(self.model))
        heaviest = self.scorer.positions(self._heaviest(train_pairs, self._most_rows))
        tried = min(TRIED_ROWS, self._most_rows) if largest else self._most_rows
        said = self.checkpointing.choose(self.accelerator.device, backward, tried, heaviest, later)
        if not largest:
            return said
        room = self.checkpointing.room
        return f"{said}; a pass has up to {room.without} positions without it, and {room.most} with it"

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
