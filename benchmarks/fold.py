"""One fold, trained for an epoch and validated: Hugging Face's Trainer with PEFT's DoRA or LoRA, and raycv.

A random-weight Llama, 768 wide and 8 layers deep, on a CPU in float32. Gradient checkpointing is on, apart from the
variants under each side's defaults: off for the Trainer, `auto` for raycv. The posts stand at even quantiles of the
lengths of the full-size synthetic set, every second one held out. They are few, since padded to 512 a pair takes
seconds on two cores. Beside the times the parity: without dropout the same pairs in the same order give the same
losses. Among the variants of a round is a large product, so that the share of its rate is one of the same minutes.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

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
from benchmarks.harness import Bar, Result, interleaved, parser, ratios, spread
from benchmarks.models import ADAPTERS, Shape, TokenCount, base_weights, classifier
from benchmarks.peers import Rows, peer_trainer
from raycv.data.prompt_encoder import EncodedPairs
from raycv.model.adapters import add_dora
from raycv.training.loop import FoldTrainer
from raycv.training.steps import epoch_order

POSTS = 9
MIDSIZE = Shape(hidden=768, intermediate=2048, heads=12, layers=8, vocab=1400)
SMALL = Shape(hidden=64, intermediate=128, heads=4, layers=2, vocab=1400)
PARITY_STEPS = 20
PARITY_LIMIT = 1e-6
"""Float noise: the losses are near 1, and float32 has seven digits."""
TITLES = {
    "trainer_512": "Trainer + PEFT DoRA, padded to 512",
    "trainer_dynamic": "Trainer + PEFT DoRA, dynamic padding",
    "trainer_by_length": "Trainer + PEFT DoRA, dynamic padding, group_by_length",
    "trainer_lora": "Trainer + PEFT LoRA, dynamic padding, group_by_length",
    "trainer_defaults": "Trainer + PEFT DoRA, padded to 512, its defaults",
    "shuffled": "raycv, shuffled",
    "shuffled_defaults": "raycv, shuffled, its defaults",
    "post_grouped": "raycv, post_grouped",
}
PRODUCT = "product"
"""A product of the model's widest weights, in turn with the variants."""
FLOPS = {"train": 6, "validation": 2}
"""FLOPs per base weight and token under checkpointing: forward, gradient of the input, recompute, 2 each."""


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


class Meter:
    """What the epochs of one model took: a value for each."""

    def __init__(self, model: Any) -> None:
        self.epoch_tokens: list[int] = []
        self.validation_tokens: list[int] = []
        self.validation_seconds: list[float] = []
        self._count = TokenCount(model)

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Training and validation, which is measured by itself."""
        self._count.taken()
        yield
        self.epoch_tokens.append(self.validation_tokens[-1] + self._count.taken())

    @contextmanager
    def validation(self) -> Iterator[None]:
        """Within an epoch or alone."""
        before, started = self._count.tokens, time.perf_counter()
        yield
        self.validation_seconds.append(time.perf_counter() - started)
        self.validation_tokens.append(self._count.tokens - before)
        self._count.tokens = before


class Loop(FoldTrainer):
    """raycv's loop, its validations measured."""

    meter: Meter

    def scores(self, pairs: np.ndarray) -> tuple[np.ndarray, float]:
        """As FoldTrainer."""
        with self.meter.validation():
            return super().scores(pairs)


class Raycv:
    """raycv's loop over a fresh model."""

    def __init__(self, shape: Shape, encoded: EncodedPairs, *overrides: str) -> None:
        config = run_config(*overrides)
        self.model: Any = add_dora(classifier(shape, seed=1, pad_id=encoded.pad_id), config.model, config.dora)
        self.listener = StepLosses()
        self._loop = Loop(self.model, encoded, train_config(*overrides), "fp32", self.listener)
        self.meter = self._loop.meter = Meter(self.model)

    def epoch(self, train_pairs: np.ndarray, val_pairs: np.ndarray) -> None:
        """Training on `train_pairs` and validation of `val_pairs`."""
        with self.meter.epoch():
            self._loop.fit(train_pairs, val_pairs)

    def validate(self, val_pairs: np.ndarray) -> None:
        """Validation alone."""
        self._loop.scores(val_pairs)

    def order(self, train_pairs: np.ndarray) -> np.ndarray:
        """The order in which the first epoch takes `train_pairs`."""
        return epoch_order(self._loop.config, self._loop.encoded, train_pairs, 1)


class Peer:
    """The same with Hugging Face's Trainer and PEFT's layer; trains `train_pairs` in their order."""

    def __init__(
        self,
        shape: Shape,
        encoded: EncodedPairs,
        train_pairs: np.ndarray,
        *overrides: str,
        padded: bool,
        by_length: bool = False,
        adapter: str = "dora_peft",
        checkpointing: bool = True,
    ) -> None:
        self._encoded, self._padded = encoded, padded
        dora = run_config(*overrides).dora
        model = classifier(shape, seed=1, pad_id=encoded.pad_id)
        self.model = ADAPTERS[adapter].on(model, dropout=dora.lora_dropout, checkpointing=checkpointing)
        config = train_config(*overrides)
        self.trainer = peer_trainer(
            self.model, encoded, tokenizer(), config, train_pairs, padded=padded, by_length=by_length
        )
        self.meter = Meter(self.model)

    def epoch(self, _train_pairs: np.ndarray, val_pairs: np.ndarray) -> None:
        """Training on the pairs that it was made with, and validation of `val_pairs`."""
        with self.meter.epoch():
            self.trainer.losses = []
            self.trainer.train()
            self.validate(val_pairs)

    def validate(self, val_pairs: np.ndarray) -> None:
        """Validation alone."""
        with self.meter.validation():
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


def rows(meters: dict[str, Meter], epochs: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Seconds and tokens of an epoch, its validation included, and of the validation within it; `epochs`: seconds."""
    return [
        {
            "variant": name,
            "epoch_seconds": spread(epochs[name]),
            "epoch_rounds": epochs[name],
            "epoch_tokens": meter.epoch_tokens[-1],
            "validation_seconds": spread(meter.validation_seconds),
            "validation_rounds": meter.validation_seconds,
            "validation_tokens": meter.validation_tokens[-1],
        }
        for name, meter in meters.items()
    ]


class Product:
    """A product of `rows` states with the model's widest weights, as often as a variant's products are many."""

    def __init__(self, shape: Shape, rows: int, times: int) -> None:
        self._x, self._weight = torch.randn(rows, shape.hidden), torch.randn(shape.intermediate, shape.hidden)
        self._times = times
        self.flops = 2 * rows * self._weight.numel() * times

    def __call__(self) -> None:
        for _ in range(self._times):
            torch.nn.functional.linear(self._x, self._weight)


def bars(measured: list[dict[str, Any]], weights: int, product_flops: int, product: list[float]) -> list[Bar]:
    """The claims over what a user would write, each round held against itself.

    Args:
        measured: The rows.
        weights: The number of base weights under adapters.
        product_flops: Operations of the large product.
        product: Its seconds of each round.
    """
    found = {row["variant"]: row for row in measured}

    def bar(claim: str, variant: str, part: str, limit: float, peer: str = "trainer_512") -> Bar:
        faster = ratios(found[peer][part], found[variant][part])
        return Bar.of_rounds(f"{claim}, times faster than the Trainer padded to 512", faster, limit)

    ours = found["shuffled"]
    trained = ours["epoch_tokens"] - ours["validation_tokens"]
    flops = weights * (FLOPS["train"] * trained + FLOPS["validation"] * ours["validation_tokens"])
    shares = [flops / took / (product_flops / alone) for took, alone in zip(ours["epoch_rounds"], product, strict=True)]
    return [
        bar("shuffled: an epoch with validation", "shuffled", "epoch_rounds", 4.4),
        bar(
            "shuffled, both with their defaults: an epoch with validation",
            "shuffled_defaults", "epoch_rounds", 6, "trainer_defaults",
        ),
        bar("post_grouped: an epoch with validation", "post_grouped", "epoch_rounds", 16),
        bar("validation alone", "shuffled", "validation_rounds", 10),
        Bar.of_rounds("share of the rate of a large float32 product, shuffled", shares, 0.7),
    ]  # fmt: skip


def main() -> None:
    options = parser(__doc__, repeats=4).parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    shape, posts = (SMALL, 4) if options.small else (MIDSIZE, POSTS)
    dataset = synthetic(60) if options.small else synthetic()
    by_length = quantile_posts(dataset, posts)
    chosen = subset(dataset, by_length)
    encoded = encode(chosen)
    number = {post_id: index for index, post_id in enumerate(chosen.posts)}
    val = pairs_of_posts(encoded, [number[post_id] for post_id in by_length[1::2]])
    train = np.setdiff1d(np.arange(len(encoded.labels)), val)
    order = np.random.default_rng(0).permutation(train)
    works: dict[str, Raycv | Peer] = {
        "trainer_512": Peer(shape, encoded, order, padded=True),
        "trainer_dynamic": Peer(shape, encoded, order, padded=False),
        "trainer_by_length": Peer(shape, encoded, order, padded=False, by_length=True),
        "trainer_lora": Peer(shape, encoded, order, padded=False, by_length=True, adapter="lora"),
        "trainer_defaults": Peer(shape, encoded, order, padded=True, checkpointing=False),
        "shuffled": Raycv(shape, encoded, "train.batching=shuffled"),
        "shuffled_defaults": Raycv(shape, encoded, "train.gradient_checkpointing=auto"),
        "post_grouped": Raycv(shape, encoded, "train.batching=post_grouped"),
    }
    config = train_config()
    result = Result(
        "fold", options, **vars(shape), tokenizer=TOKENIZER, dtype="float32", gradient_checkpointing=True, posts=posts,
        train_pairs=len(train), validation_pairs=len(val), effective_batch=config.effective_batch_size,
        micro_batch=config.batch_size, eval_batch=config.eval_batch_size, titles=TITLES,
        mean_tokens={"train": float(encoded.lengths[train].mean()), "validation": float(encoded.lengths[val].mean())},
    )  # fmt: skip
    many = encode(subset(dataset, list(dataset.posts)[: 60 if options.small else 72]))
    compared = parity(many, SMALL, np.arange((2 if options.small else PARITY_STEPS) * 32))
    difference = compared["largest_difference"]
    claim = "largest difference of a step's loss from the Trainer's, no dropout"
    same = Bar(claim, difference, PARITY_LIMIT, at_most=True)
    result.add(parity=compared | {"shape": vars(SMALL)})

    product = Product(shape, 1024, 2 if options.small else 400)
    weights = base_weights(works["shuffled"].model)

    def keep(epochs: dict[str, list[float]]) -> None:
        measured = rows({name: work.meter for name, work in works.items()}, epochs)
        result.renew(measured, [*bars(measured, weights, product.flops, epochs[PRODUCT]), same])

    for work in works.values():
        work.validate(val[:2])  # a warm-up
        work.meter.validation_seconds.clear()
    epochs = {name: partial(work.epoch, train, val) for name, work in works.items()}
    product()
    interleaved({PRODUCT: product, **epochs}, options.repeats, warm_up=False, after_round=keep)
    result.report()


if __name__ == "__main__":
    main()
