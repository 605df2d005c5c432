"""Tokens that a model computes over real tokens, by the way that pairs become batches; no model is run.

The full-size synthetic set, one epoch in steps of 32 pairs and micro-batches of 8. What raycv computes is counted at
the model's input, not derived.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.corpus import TOKENIZER, encode, synthetic
from benchmarks.harness import Bar, Result, parser
from raycv.encoding import EncodedPairs
from raycv.prefix import common_prefix
from raycv.scoring import RowScorer

EFFECTIVE, MICRO = 32, 8
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


def raycv_tokens(encoded: EncodedPairs, steps: list[np.ndarray], *, share: bool) -> int:
    """What RowScorer computes for `steps` (rows of each)."""
    model = CountingModel()
    scorer = RowScorer(model, encoded, torch.device("cpu"), nullcontext)
    for step in steps:
        for batch in scorer.batches(scorer.sorted(step, share=share), MICRO, share=share):
            scorer.logits(batch, share=share)
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
    tokens = {
        "pad_to_512": encoded.input_ids.size,
        "dynamic": sum(int(lengths[rows].max()) * len(rows) for rows in in_steps(shuffled, MICRO)),
        "shuffled": raycv_tokens(encoded, in_steps(shuffled, EFFECTIVE), share=False),
        "post_grouped": raycv_tokens(encoded, in_steps(grouped, EFFECTIVE), share=True),
    }
    real = int(lengths.sum())
    prefixes = np.sort(
        [common_prefix(encoded.input_ids[encoded.post_of_pair == post]) for post in range(len(dataset.posts))]
    )
    quantiles = prefixes[((np.arange(QUANTILES) + 0.5) / QUANTILES * len(prefixes)).astype(int)]
    rows = [{"batching": name, "tokens": count, "ratio": count / real} for name, count in tokens.items()]
    result = Result(
        "collate", options, tokenizer=TOKENIZER, posts=len(dataset.posts), pairs=len(lengths),
        effective_batch=EFFECTIVE, micro_batch=MICRO, real_tokens=real, tokens_mean=float(lengths.mean()),
        suffix_mean=float(lengths.mean() - prefixes.mean()), prefix_quantiles=quantiles.tolist(),
    )  # fmt: skip
    result.add(*rows, bars=[Bar("tokens computed over real tokens, shuffled", tokens["shuffled"] / real, 1.2, True)])
    result.report()


if __name__ == "__main__":
    main()
