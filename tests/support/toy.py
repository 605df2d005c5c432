"""A toy task for the loop: posts of words, a criterion is matched when its word stands in the post."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raycv.config.schema import DoraConfig, ModelConfig, PromptConfig, TrainConfig
from raycv.data.dataset import criteria_hash
from raycv.data.prompt_encoder import EncodedPairs, PromptEncoder, encode_dataset, prompt_encoder
from raycv.data.types import Criterion, Dataset, Pair
from raycv.model.adapters import add_dora
from raycv.model.base_files import BaseFiles
from raycv.model.base_model import fetch_base
from raycv.model.checkpoint import CheckpointInfo, save_checkpoint
from raycv.model.loading import load_classifier, load_tokenizer
from raycv.utils import set_seed
from support.builders import tiny_llama, wordlevel_tokenizer

WORDS = [f"w{i}" for i in range(12)]
FRAME = [
    "post:",
    ",",
    "criterion:",
    "Does",
    "the",
    "post",
    "match",
    "the",
    "criterion",
    "description?",
    "Output",
    "yes",
    "or",
    "no",
    "...",
]
LLAMA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def toy_dataset(
    posts: int = 16, seed: int = 0, words: int = 6, criteria: int = 3, ids: Sequence[str] | None = None
) -> Dataset:
    """`posts` posts x `criteria` criteria; the words of a post vary in number, so that rows vary in length."""
    generator = np.random.default_rng(seed)
    keys = ids or [f"C{i}" for i in range(criteria)]
    asked = {key: Criterion(key, WORDS[i]) for i, key in enumerate(keys)}
    texts, pairs = {}, []
    for index in range(posts):
        chosen = generator.choice(WORDS, size=int(generator.integers(2, words + 1)), replace=True).tolist()
        if index < 2:
            chosen.append(WORDS[index])  # both classes are there for sure
        post_id = f"p{index:02}"
        texts[post_id] = " ".join(chosen)
        pairs += [Pair(post_id, key, int(criterion.text in chosen)) for key, criterion in asked.items()]
    return Dataset(texts, asked, sorted(pairs, key=lambda pair: (pair.post_id, pair.criterion_id)))


def prompt_config(**changes: object) -> PromptConfig:
    values = {"max_length": 48, "long_post": "head_tail", "head_fraction": 0.25, "stride_fraction": 0.5}
    return PromptConfig(**(values | changes))


def train_config(**changes: object) -> TrainConfig:
    values = {
        "epochs": 2,
        "patience": 2,
        "batch_size": 8,
        "effective_batch_size": 8,
        "eval_batch_size": 4,
        "packing": True,
        "batching": "shuffled",
        "lr": 1e-2,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "warmup_steps": 0,
        "schedule": "constant",
        "imbalance": "none",
        "precision": "fp32",
        "gradient_checkpointing": "off",
        "seed": 1,
        "checkpoint_minutes": None,
    }
    return TrainConfig(**(values | changes))


def toy_base(folder: Path, build: Callable[..., Path] = tiny_llama) -> BaseFiles:
    words = [*FRAME, *WORDS, *(f"{word}," for word in WORDS)]
    return fetch_base(str(build(folder / "base", tokenizer=wordlevel_tokenizer(words))), None)


@dataclass
class Toy:
    """Everything that a FoldTrainer wants."""

    base: BaseFiles
    dataset: Dataset = field(default_factory=toy_dataset)
    prompt: PromptConfig = field(default_factory=prompt_config)

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.base)
        texts = [criterion.text for criterion in self.dataset.criteria.values()]
        self.encoder: PromptEncoder = prompt_encoder(self.tokenizer, self.prompt, texts)
        self.encoded: EncodedPairs = encode_dataset(self.encoder, self.dataset)[0]

    def model(self, seed: int = 1, dropout: float = 0.0, dtype: str = "float32", modules: object = None, r: int = 4):
        import torch

        base = load_classifier(self.base, self.tokenizer, getattr(torch, dtype), seed=seed)
        set_seed(seed)
        targets = ModelConfig(name=self.base.name, revision=None, target_modules=modules or LLAMA_MODULES)
        return add_dora(
            base,
            targets,
            DoraConfig(r=r, alpha=8, lora_dropout=dropout, dropout="lora_path", implementation="factored"),
        )

    def info(self, **changes: Any) -> CheckpointInfo:
        """What a checkpoint of fold 0 of a run named toy says about itself."""
        values = {
            "base_model": self.base.name,
            "base_revision": None,
            "rules": self.encoder.rules,
            "threshold": 0.5,
            "criteria": dict.fromkeys(self.dataset.criteria),
            "criteria_hash": criteria_hash(self.dataset.criteria),
            "criteria_dir": "/criteria",
            "run": "toy",
            "fold": 0,
            "epoch": 1,
            "precision": "fp32",
        }
        return CheckpointInfo(**(values | changes))

    def save_with_criteria(self, folder: Path, model: Any) -> Path:
        """Saves `model` as a checkpoint in `folder`, with its criteria beside it."""
        checkpoint = folder / "checkpoint"
        save_checkpoint(checkpoint, model, self.tokenizer, self.info(criteria_dir=str(self.write_criteria(folder))))
        return checkpoint

    def write_criteria(self, folder: Path) -> Path:
        """The folder in `folder` that holds the criteria."""
        criteria = folder / "criteria"
        criteria.mkdir()
        rows = [f"{key},{criterion.text}" for key, criterion in self.dataset.criteria.items()]
        (criteria / "criteria.csv").write_text("\n".join(["criterion_id,criterion", *rows]) + "\n")
        return criteria


@contextmanager
def positions(model: Any) -> Iterator[list[int]]:
    """The positions that each forward of a Llama (under PEFT or not) computes, padding included."""
    computed: list[int] = []
    backbone = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
    hook = backbone.embed_tokens.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].numel()))
    try:
        yield computed
    finally:
        hook.remove()


class Recorder:
    """A listener that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[tuple] = []
        self.epochs: list[tuple] = []
        self.events: list[str] = []

    def on_step(self, *step: object) -> None:
        self.steps.append(step)

    def on_epoch(self, result: object, scores: np.ndarray, is_best: bool) -> None:
        self.epochs.append((result, scores, is_best))

    def on_state(self, state: object) -> None:
        """Not kept: its tensors change."""

    def on_event(self, text: str) -> None:
        self.events.append(text)
