"""What a user would write instead of raycv: Hugging Face's Trainer over PEFT's DoRA or LoRA."""

import tempfile
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset, SequentialSampler
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from raycv.config.schema import TrainConfig
from raycv.data.prompt_encoder import EncodedPairs


class Rows(Dataset[dict[str, Any]]):
    """`pairs` in their order as a Trainer wants them: padded to the full width, or bare for a padding collator."""

    def __init__(self, encoded: EncodedPairs, pairs: np.ndarray, *, padded: bool) -> None:
        self._encoded, self._pairs, self._padded = encoded, pairs, padded

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self._pairs[index]
        length = int(self._encoded.lengths[pair])
        ids = self._encoded.input_ids[pair] if self._padded else self._encoded.input_ids[pair, :length]
        mask = (np.arange(len(ids)) < length).astype(np.int64)
        labels = int(self._encoded.labels[pair])
        return {"input_ids": ids.astype(np.int64), "attention_mask": mask, "labels": labels}


class PeerTrainer(Trainer):
    """A Trainer that takes the pairs in the order given, or grouped by length, and keeps each optimizer step's loss."""

    losses: list[float]

    def _get_train_sampler(self, *_: Any) -> Any:
        if self.args.group_by_length:
            return super()._get_train_sampler()
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """One micro-batch: its share of the step's mean loss."""
        loss = super().training_step(*arguments, **named)
        if self._step_done():
            self.losses.append(0.0)
        self.losses[-1] += float(loss)
        return loss

    def _step_done(self) -> bool:
        return self.state.global_step == len(self.losses)


def mean_of_step(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """The step's mean loss over its pairs.

    Without it Trainer adds up the means of the micro-batches, since Llama's classifier takes `num_items_in_batch` and
    does not use it: gradients would be as many times too large as a step has micro-batches.
    """
    total = functional.cross_entropy(outputs["logits"].float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def peer_trainer(
    model: Any,
    encoded: EncodedPairs,
    tokenizer: Any,
    config: TrainConfig,
    train_pairs: np.ndarray,
    *,
    padded: bool,
    by_length: bool = False,
) -> PeerTrainer:
    """A Trainer that does what raycv's FoldTrainer does under `config`, on a CPU, one epoch, nothing saved.

    `by_length` groups pairs of similar length, as its option group_by_length does.
    """
    assert isinstance(config.batch_size, int), "Trainer measures no memory"
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        num_train_epochs=1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.effective_batch_size // config.batch_size,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm or 0.0,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.schedule,
        group_by_length=by_length,
        use_cpu=True,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=config.seed,
    )
    trainer = PeerTrainer(
        model=model,
        args=arguments,
        train_dataset=Rows(encoded, train_pairs, padded=padded),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=mean_of_step,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.losses = []
    return trainer
