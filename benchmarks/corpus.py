"""Synthetic posts of realistic length as token arrays, by raycv's own loader and encoder."""

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raycv.config.command_line import compose
from raycv.config.schema import RunConfig, TrainConfig
from raycv.config.validation import validate
from raycv.data.dataset import load_dataset
from raycv.data.prompt_encoder import EncodedPairs, encode_dataset, prompt_encoder
from raycv.data.synthetic import REDSM5_POSTS, write_dataset
from raycv.data.types import Dataset
from raycv.model.base_model import fetch_base
from raycv.model.loading import load_tokenizer

BASE = "raycv://models/tiny_llama"
TOKENIZER = "models/tiny_llama: BPE of 1400 tokens, trained on other posts of the same generator"


def run_config(*overrides: str) -> RunConfig:
    """raycv's defaults under `overrides`."""
    return validate(RunConfig, compose("run", ["data=sample", *overrides]))


def train_config(*overrides: str) -> TrainConfig:
    """raycv's defaults of the loop, for one epoch on a CPU under gradient checkpointing, and `overrides`."""
    return run_config("train.epochs=1", "train.precision=fp32", "train.gradient_checkpointing='on'", *overrides).train


def synthetic(posts: int = REDSM5_POSTS, *, seed: int = 7, **changes: Any) -> Dataset:
    """`posts` synthetic posts of realistic length; `changes`: `words_mean`, `criteria`."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), posts=posts, seed=seed, **changes)
        return load_dataset(Path(folder), Path(folder))


def quantile_posts(dataset: Dataset, count: int) -> list[str]:
    """Ids of `count` posts at even quantiles of length, shortest first: few posts with the lengths of all."""
    by_length = sorted(dataset.posts, key=lambda post_id: (len(dataset.posts[post_id].split()), post_id))
    return [by_length[int((index + 0.5) / count * len(by_length))] for index in range(count)]


def subset(dataset: Dataset, posts: Iterable[str]) -> Dataset:
    """The pairs of `posts` alone."""
    chosen = set(posts)
    pairs = [pair for pair in dataset.pairs if pair.post_id in chosen]
    return replace(dataset, posts={key: text for key, text in dataset.posts.items() if key in chosen}, pairs=pairs)


def tokenizer() -> Any:
    """The tokenizer of the tiny base, which ships with raycv."""
    return load_tokenizer(fetch_base(BASE, None))


def encode(dataset: Dataset, *overrides: str) -> EncodedPairs:
    """`dataset` under the default prompt rules and `overrides`: at most 512 tokens, long posts cut to head and tail."""
    criteria = [criterion.text for criterion in dataset.criteria.values()]
    return encode_dataset(prompt_encoder(tokenizer(), run_config(*overrides).prompt, criteria), dataset)[0]


def pairs_of_posts(encoded: EncodedPairs, posts: Iterable[int]) -> np.ndarray:
    """Indices of the pairs of `posts` (numbers)."""
    return np.flatnonzero(np.isin(encoded.post_of_pair, list(posts)))
