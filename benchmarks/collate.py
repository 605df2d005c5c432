"""Tokens that a model computes over real tokens, by the way that pairs become batches; no model is run.

The full-size synthetic set, one epoch in steps of 32 pairs. What raycv computes is counted at the model's input, not
derived.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.corpus import TOKENIZER, encode, synthetic
from benchmarks.harness import Bar, Result, parser, tell
from raycv.data.prompt_encoder import EncodedPairs
from raycv.training.forward import Layout, RowScorer
from raycv.training.packing import common_prefix

EFFECTIVE, MICRO = 32, 8
DYNAMIC = "shuffled, each micro-batch padded to its longest"
SORTED = "shuffled, packing=false: steps sorted by length"
QUANTILES = 16
"""Posts whose lengths stand for all, for `benchmarks.gpu`."""


class CountingModel:
    """Takes the place of a classifier (`model`: its backbone) and computes nothing but the size of its input."""

    def __init__(self) -> None:
        self.tokens = 0
        self.model = self
        self.config = SimpleNamespace(_attn_implementation="sdpa")

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        self.tokens += input_ids.numel()
        shape = input_ids.shape
        return SimpleNamespace(logits=torch.zeros(shape[0], 2), last_hidden_state=torch.zeros(*shape, 2))

    def score(self, states: torch.Tensor) -> torch.Tensor:
        return states


def raycv_tokens(encoded: EncodedPairs, steps: list[np.ndarray], size: int, layout: Layout) -> int:
    """What RowScorer computes for `steps` (rows of each) in micro-batches of `size`."""
    model = CountingModel()
    scorer = RowScorer(model, encoded, torch.device("cpu"), nullcontext)
    for step in steps:
        for batch in scorer.batches(scorer.sorted(step, layout), size, layout):
            scorer.logits(batch)
    return model.tokens


def in_steps(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """`rows` in pieces of `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def main() -> None:
    options = parser(__doc__, repeats=1).parse_args()
    dataset = synthetic(40) if options.small else synthetic()
    encoded = encode(dataset)
    lengths = encoded.lengths.astype(np.int64)
    generator = np.random.default_rng(0)
    shuffled = generator.permutation(len(lengths))
    grouped = np.argsort(generator.permutation(len(dataset.posts))[encoded.post_of_pair], kind="stable")
    steps, grouped_steps = in_steps(shuffled, EFFECTIVE), in_steps(grouped, EFFECTIVE)
    tokens: dict[tuple[str, int], int] = {}
    for size in (MICRO, EFFECTIVE):
        tell(f"{len(lengths):,} pairs, micro-batches of {size}")
        tokens |= {
            ("padded to 512", size): encoded.input_ids.size,
            (DYNAMIC, size): sum(int(lengths[rows].max()) * len(rows) for rows in in_steps(shuffled, size)),
            (SORTED, size): raycv_tokens(encoded, steps, size, "padded"),
            ("shuffled", size): raycv_tokens(encoded, steps, size, "packed"),
            ("post_grouped", size): raycv_tokens(encoded, grouped_steps, size, "shared"),
        }
    real = int(lengths.sum())
    prefixes = np.sort(
        [common_prefix(encoded.input_ids[encoded.post_of_pair == post]) for post in range(len(dataset.posts))]
    )
    quantiles = prefixes[((np.arange(QUANTILES) + 0.5) / QUANTILES * len(prefixes)).astype(int)]
    rows = [
        {"batching": name, "micro_batch": size, "tokens": count, "ratio": count / real}
        for (name, size), count in tokens.items()
    ]
    result = Result(
        "collate", options, tokenizer=TOKENIZER, posts=len(dataset.posts), pairs=len(lengths),
        effective_batch=EFFECTIVE, real_tokens=real, tokens_mean=float(lengths.mean()),
        suffix_mean=float(lengths.mean() - prefixes.mean()), prefix_quantiles=quantiles.tolist(),
    )  # fmt: skip
    bars = [
        Bar(
            f"tokens computed over real tokens, shuffled, micro-batches of {size}",
            tokens["shuffled", size] / real,
            1.2,
            True,
        )
        for size in (MICRO, EFFECTIVE)
    ]
    result.add(*rows, bars=bars)
    result.report()


if __name__ == "__main__":
    main()
