"""One fold, trained for an epoch and validated: Hugging Face's Trainer with PEFT's DoRA, and raycv.

A random-weight Llama, 768 wide and 8 layers deep, on a CPU in float32, gradient checkpointing on for all. The posts
stand at even quantiles of the lengths of the full-size synthetic set; they are few, since padded to 512 a pair takes
seconds on two cores. Beside the times the parity: without dropout the same pairs in the same order give the same
losses.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.corpus import (
    TOKENIZER,
    encode,
    pairs_of_posts,
    quantile_posts,
    run_config,
    subset,
    synthetic,
    tokenizer,
    train_config,
)
from benchmarks.harness import Bar, Result, interleaved, parser, spread
from benchmarks.models import ADAPTERS, Shape, TokenCount, classifier
from benchmarks.peers import Rows, peer_trainer
from raycv.encoding import EncodedPairs
from raycv.model import add_dora
from raycv.sampling import epoch_order
from raycv.train import FoldTrainer

POSTS = 6
MIDSIZE = Shape(hidden=768, intermediate=2048, heads=12, layers=8, vocab=1400)
SMALL = Shape(hidden=64, intermediate=128, heads=4, layers=2, vocab=1400)
PARITY_STEPS = 20
VALIDATIONS = 3
"""Measured validations per measured epoch: one is short."""
TITLES = {
    "trainer_512": "Trainer + PEFT DoRA, padded to 512",
    "trainer_dynamic": "Trainer + PEFT DoRA, dynamic padding",
    "shuffled": "raycv, shuffled",
    "post_grouped": "raycv, post_grouped",
}


class StepLosses:
    """A listener of FoldTrainer that keeps the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, epoch: int, step: int, steps: int, loss: float, micro_batch: int) -> None:
        self.losses.append(loss)

    def on_epoch(self, *_: object) -> None:
        """Nothing to keep."""

    def on_state(self, *_: object) -> None:
        """Nothing to keep."""

    def on_event(self, text: str) -> None:
        """Nothing to keep."""


class Raycv:
    """raycv's loop over a fresh model."""

    def __init__(self, shape: Shape, encoded: EncodedPairs, *overrides: str) -> None:
        config = run_config(*overrides)
        self.model: Any = add_dora(classifier(shape, seed=1, pad_id=encoded.pad_id), config.model, config.dora)
        self.listener = StepLosses()
        self._loop = FoldTrainer(self.model, encoded, train_config(*overrides), "fp32", self.listener)

    def epoch(self, train_pairs: np.ndarray, val_pairs: np.ndarray) -> None:
        """Training on `train_pairs` and validation of `val_pairs`."""
        self._loop.fit(train_pairs, val_pairs)

    def validate(self, val_pairs: np.ndarray) -> None:
        """Validation alone."""
        self._loop.scores(val_pairs)

    def order(self, train_pairs: np.ndarray) -> np.ndarray:
        """The order in which the first epoch takes `train_pairs`."""
        return epoch_order(self._loop.config, self._loop.encoded, train_pairs, 1)


class Peer:
    """The same with Hugging Face's Trainer and PEFT's layer; trains `train_pairs` in their order."""

    def __init__(self, shape: Shape, encoded: EncodedPairs, train_pairs: np.ndarray, *overrides: str, padded: bool):
        self._encoded, self._padded = encoded, padded
        dora = run_config(*overrides).dora
        model = classifier(shape, seed=1, pad_id=encoded.pad_id)
        self.model = ADAPTERS["dora_peft"].on(model, dropout=dora.lora_dropout)
        self.trainer = peer_trainer(
            self.model, encoded, tokenizer(), train_config(*overrides), train_pairs, padded=padded
        )

    def epoch(self, _train_pairs: np.ndarray, val_pairs: np.ndarray) -> None:
        """Training on the pairs that it was made with, and validation of `val_pairs`."""
        self.trainer.losses = []
        self.trainer.train()
        self.validate(val_pairs)

    def validate(self, val_pairs: np.ndarray) -> None:
        """Validation alone."""
        self.trainer.evaluate(Rows(self._encoded, val_pairs, padded=self._padded))


def parity(encoded: EncodedPairs, shape: Shape, pairs: np.ndarray) -> dict[str, Any]:
    """Losses of each step of one epoch of `pairs`, without dropout, in the same order and from the same start."""
    overrides = ["dora.lora_dropout=0.0", "train.imbalance=none", "train.warmup_steps=4", "train.lr=1e-3"]
    ours = Raycv(shape, encoded, *overrides)
    theirs = Peer(shape, encoded, ours.order(pairs), *overrides, padded=True)
    theirs.model.load_state_dict(ours.model.state_dict())
    ours.epoch(pairs, pairs[:2])
    theirs.trainer.train()
    losses = {"raycv": ours.listener.losses, "trainer": theirs.trainer.losses}
    difference = np.abs(np.subtract(losses["raycv"], losses["trainer"])).max()
    return {"steps": len(ours.listener.losses), "pairs": len(pairs), "largest_difference": float(difference)} | losses


def rows(works: dict[str, Raycv | Peer], train: np.ndarray, val: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """Seconds and tokens of an epoch (training and validation) and of validation alone, interleaved."""

    def calls(work: Callable[[Any], object]) -> dict[str, Callable[[], object]]:
        return {name: lambda each=each: work(each) for name, each in works.items()}  # type: ignore[misc]

    counts = {name: TokenCount(each.model) for name, each in works.items()}
    interleaved(calls(lambda each: each.validate(val)), 0)  # a warm-up, to count its tokens
    validation_tokens = {name: count.taken() for name, count in counts.items()}
    epoch = interleaved(calls(lambda each: each.epoch(train, val)), repeats, warm_up=False)
    epoch_tokens = {name: count.taken() // repeats for name, count in counts.items()}
    validation = interleaved(calls(lambda each: each.validate(val)), VALIDATIONS * repeats, warm_up=False)
    return [
        {
            "variant": name,
            "epoch_seconds": spread(epoch[name]),
            "epoch_tokens": epoch_tokens[name],
            "validation_seconds": spread(validation[name]),
            "validation_tokens": validation_tokens[name],
        }
        for name in works
    ]


def bars(measured: list[dict[str, Any]], difference: float) -> list[Bar]:
    """The claims over what a user would write."""
    epoch = {row["variant"]: row["epoch_seconds"]["median"] for row in measured}
    validation = {row["variant"]: row["validation_seconds"]["median"] for row in measured}
    over = "times faster than the Trainer padded to 512"
    return [
        Bar(f"shuffled: an epoch with validation, {over}", epoch["trainer_512"] / epoch["shuffled"], 2.5),
        Bar(f"post_grouped: an epoch with validation, {over}", epoch["trainer_512"] / epoch["post_grouped"], 6),
        Bar(f"validation alone, {over}", validation["trainer_512"] / validation["shuffled"], 5),
        Bar("largest difference of a step's loss from the Trainer's, no dropout", difference, 1e-4, at_most=True),
    ]


def main() -> None:
    options = parser(__doc__, repeats=2).parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    shape, posts = (SMALL, 4) if options.small else (MIDSIZE, POSTS)
    dataset = synthetic(60) if options.small else synthetic()
    chosen = subset(dataset, quantile_posts(dataset, posts))
    encoded = encode(chosen)
    number = {post_id: index for index, post_id in enumerate(chosen.posts)}
    held_out = [number[post_id] for post_id in quantile_posts(chosen, posts)[2::4]]
    val = pairs_of_posts(encoded, held_out)
    train = np.setdiff1d(np.arange(len(encoded.labels)), val)
    works: dict[str, Raycv | Peer] = {
        "trainer_512": Peer(shape, encoded, np.random.default_rng(0).permutation(train), padded=True),
        "trainer_dynamic": Peer(shape, encoded, np.random.default_rng(0).permutation(train), padded=False),
        "shuffled": Raycv(shape, encoded, "train.batching=shuffled"),
        "post_grouped": Raycv(shape, encoded, "train.batching=post_grouped"),
    }
    result = Result(
        "fold", options, **vars(shape), tokenizer=TOKENIZER, dtype="float32", gradient_checkpointing=True, posts=posts,
        train_pairs=len(train), validation_pairs=len(val), effective_batch=32, micro_batch=8, titles=TITLES,
        mean_tokens={"train": float(encoded.lengths[train].mean()), "validation": float(encoded.lengths[val].mean())},
    )  # fmt: skip
    measured = rows(works, train, val, options.repeats)
    result.add(*measured)
    many = encode(subset(dataset, list(dataset.posts)[: 60 if options.small else 72]))
    compared = parity(many, SMALL, np.arange((2 if options.small else PARITY_STEPS) * 32))
    result.add(parity=compared | {"shape": vars(SMALL)}, bars=bars(measured, compared["largest_difference"]))
    result.report()


if __name__ == "__main__":
    main()
