"""How raycv's cost grows: pairs x2 and x4, post length x2, criteria 9 -> 27; a training epoch and a validation.

A small random-weight Llama in float32 on a CPU. More pairs are the same posts again under other ids, longer posts have
their own words twice: a factor is that of the change and not of other posts. A linear cost doubles with the pairs; a
shared post makes more criteria cheaper than more posts.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.corpus import TOKENIZER, encode, pairs_of_posts, subset, synthetic
from benchmarks.fold import SMALL, Raycv
from benchmarks.harness import Result, interleaved, parser, spread
from benchmarks.models import Shape
from raycv.data.prompt_encoder import EncodedPairs
from raycv.data.types import Dataset

SHAPE = Shape(hidden=128, intermediate=344, heads=4, layers=4, vocab=1400)
BATCHING = ("shuffled", "post_grouped")
BASE_WORDS = 100
"""Mean words of a post, before the long ones are left out."""
MOST_TOKENS = 256
"""Of a prompt of the base: its post doubled still fits 512, so that no cost is capped by the cut."""


def base_posts(posts: int, words: float) -> list[str]:
    """Ids of the first `posts` posts that can be doubled, of twice as many."""
    dataset = synthetic(2 * posts, words_mean=words)
    encoded = encode(dataset)
    longest = np.zeros(len(dataset.posts), dtype=int)
    np.maximum.at(longest, encoded.post_of_pair, encoded.lengths)
    return [post_id for post_id, length in zip(dataset.posts, longest, strict=True) if length <= MOST_TOKENS][:posts]


def repeated(dataset: Dataset, times: int) -> Dataset:
    """The posts of `dataset` that often, under an id of its own each time."""
    posts = {f"{copy}-{key}": text for copy in range(times) for key, text in dataset.posts.items()}
    pairs = [replace(pair, post_id=f"{copy}-{pair.post_id}") for copy in range(times) for pair in dataset.pairs]
    return replace(dataset, posts=posts, pairs=pairs)


def doubled(dataset: Dataset) -> Dataset:
    """Every post of `dataset` twice in a row, as one."""
    return replace(dataset, posts={key: f"{text} {text}" for key, text in dataset.posts.items()})


def data_sets(posts: int, words: float) -> dict[str, EncodedPairs]:
    """The base and what grows from it."""
    chosen = base_posts(posts, words)
    base = subset(synthetic(2 * posts, words_mean=words), chosen)
    grown = {
        "base": base,
        "pairs x2": repeated(base, 2),
        "pairs x4": repeated(base, 4),
        "post length x2": doubled(base),
        "criteria 9 -> 27": subset(synthetic(2 * posts, words_mean=words, criteria=27), chosen),
    }
    return {change: encode(dataset) for change, dataset in grown.items()}


class Case:
    """One data set under one way of batching, a quarter of its posts held out."""

    def __init__(self, shape: Shape, change: str, encoded: EncodedPairs, batching: str) -> None:
        posts = int(encoded.post_of_pair.max()) + 1
        self.val = pairs_of_posts(encoded, range(0, posts, 4))
        self.train = np.setdiff1d(np.arange(len(encoded.labels)), self.val)
        self.work = Raycv(shape, encoded, f"train.batching={batching}")
        self._facts: dict[str, Any] = {"change": change, "batching": batching, "pairs": len(encoded.labels)}

    def epoch(self) -> None:
        """Training and validation."""
        self.work.epoch(self.train, self.val)

    def warm_up(self) -> None:
        """A validation that does not count."""
        self.work.validate(self.val)
        self.work.meter.validation_seconds.clear()

    def row(self, epochs: list[float]) -> dict[str, Any]:
        """What was measured of it; `epochs`: seconds."""
        meter = self.work.meter
        return (
            self._facts
            | {"epoch_seconds": spread(epochs), "epoch_tokens": meter.epoch_tokens[-1]}
            | {"validation_seconds": spread(meter.validation_seconds), "validation_tokens": meter.validation_tokens[-1]}
        )


def main() -> None:
    options = parser(__doc__, repeats=3).parse_args()
    shape, posts, words = (SMALL, 4, 20) if options.small else (SHAPE, 24, BASE_WORDS)
    encoded = data_sets(posts, words)
    cases = {
        f"{change}, {batching}": Case(shape, change, data, batching)
        for change, data in encoded.items()
        for batching in BATCHING
    }
    tokens_mean = {change: float(data.lengths.mean()) for change, data in encoded.items()}
    result = Result(
        "growth", options, **vars(shape), tokenizer=TOKENIZER, dtype="float32", posts=posts, words_mean=words,
        gradient_checkpointing=True, tokens_mean=tokens_mean,
    )  # fmt: skip
    for case in cases.values():
        case.warm_up()
    epochs: dict[str, Callable[[], object]] = {name: case.epoch for name, case in cases.items()}

    def keep(seconds: dict[str, list[float]]) -> None:
        result.renew([case.row(seconds[name]) for name, case in cases.items()], [])

    interleaved(epochs, options.repeats, warm_up=False, after_round=keep)
    result.report()


if __name__ == "__main__":
    main()
