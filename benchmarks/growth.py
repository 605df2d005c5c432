"""How raycv's cost grows: pairs x2 and x4, post length x2, criteria 9 -> 27; a training epoch and a validation.

A small random-weight Llama in float32 on a CPU. A linear cost doubles with the pairs; a shared post makes more criteria
cheaper than more posts.
"""

from typing import Any

import numpy as np

from benchmarks.corpus import TOKENIZER, encode, pairs_of_posts, synthetic
from benchmarks.fold import SMALL, Raycv
from benchmarks.harness import Result, interleaved, parser, spread
from benchmarks.models import Shape, TokenCount
from raycv.encoding import EncodedPairs

SHAPE = Shape(hidden=128, intermediate=344, heads=4, layers=4, vocab=1400)
BATCHING = ("shuffled", "post_grouped")
BASE_WORDS = 100
"""Mean words of a post: its double still fits 512 tokens nearly always, so that cost is not capped by the cut."""


def data_sets(posts: int, words: float) -> dict[str, EncodedPairs]:
    """The base and what grows from it."""
    return {
        "base": encode(synthetic(posts, words_mean=words)),
        "pairs x2": encode(synthetic(2 * posts, words_mean=words)),
        "pairs x4": encode(synthetic(4 * posts, words_mean=words)),
        "post length x2": encode(synthetic(posts, words_mean=2 * words)),
        "criteria 9 -> 27": encode(synthetic(posts, words_mean=words, criteria=27)),
    }


class Case:
    """One data set under one way of batching, a quarter of its posts held out."""

    def __init__(self, shape: Shape, change: str, encoded: EncodedPairs, batching: str) -> None:
        posts = int(encoded.post_of_pair.max()) + 1
        self.val = pairs_of_posts(encoded, range(0, posts, 4))
        self.train = np.setdiff1d(np.arange(len(encoded.labels)), self.val)
        self.work = Raycv(shape, encoded, f"train.batching={batching}")
        self.count = TokenCount(self.work.model)
        self.row: dict[str, Any] = {"change": change, "batching": batching, "pairs": len(encoded.labels)}

    def epoch(self) -> None:
        """Training and validation."""
        self.work.epoch(self.train, self.val)

    def validate(self) -> None:
        """Validation alone."""
        self.work.validate(self.val)


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
    measured = {}
    for part in ("validate", "epoch"):
        calls = {name: getattr(case, part) for name, case in cases.items()}
        interleaved(calls, 0)  # a warm-up, to count its tokens
        tokens = {name: case.count.taken() for name, case in cases.items()}
        measured[part] = (tokens, interleaved(calls, options.repeats, warm_up=False))
        for case in cases.values():
            case.count.taken()
    for name, case in cases.items():
        (validation_tokens, validation), (epoch_tokens, epoch) = ((t[name], s[name]) for t, s in measured.values())
        result.add(
            case.row
            | {"epoch_seconds": spread(epoch), "epoch_tokens": epoch_tokens}
            | {"validation_seconds": spread(validation), "validation_tokens": validation_tokens}
        )
    result.report()


if __name__ == "__main__":
    main()
