"""The driver makes these once for all folds: data set, splits, base model, token arrays."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raycv.common.devices import CPU_FOR_RUNS, check_gpu_before_ray
from raycv.common.locations import resolve
from raycv.config.schema import RunConfig
from raycv.data.dataset import load_dataset, with_shuffled_labels
from raycv.data.splits import Split, make_splits
from raycv.data.types import Dataset
from raycv.model.base_model import check_name
from raycv.orchestration.fold_task import Prepared
from raycv.rendering.terminal import say

if TYPE_CHECKING:
    from raycv.data.prompt_encoder import PromptEncoder
    from raycv.model.base_files import BaseFiles


@dataclass(frozen=True)
class Base:
    """The base model as the driver needs it."""

    files: "BaseFiles"
    tokenizer: Any
    config: Any
    """the model's config, of transformers"""
    facts: dict[str, Any]
    """for `environment.json`"""


def load_data(config: RunConfig) -> tuple[Dataset, list[Split]]:
    """The data set of `config` and its folds. Raises: FaultsError with every fault of the data."""
    data_dir, criteria_dir = Path(resolve(config.data.dir)), Path(resolve(config.data.criteria_dir))
    dataset = load_dataset(data_dir, criteria_dir, empty=config.data.empty, missing=config.data.missing)
    if config.data.shuffle_labels:
        dataset = with_shuffled_labels(dataset, config.cv.seed)
    if config.privacy.log_text:
        warning = "privacy.log_text=true: predictions.csv holds posts and criteria, here and in MLflow"
        dataset = replace(dataset, warnings=[*dataset.warnings, warning])
    return dataset, make_splits(dataset.pairs, config.cv.folds, config.cv.seed)


def check_base_and_gpu(config: RunConfig) -> None:
    """Raises: UserError if the base model's name or the GPU cannot be used, as far as torch is not needed to see it."""
    check_name(config.model.name, config.model.revision)
    if config.resources.gpus_per_fold != 0:
        check_gpu_before_ray(CPU_FOR_RUNS)


def prepare_base(config: RunConfig) -> Base:
    """Fetches the base model once for all folds. Raises: UserError if raycv cannot fetch it, or cannot train it."""
    from raycv.model.adapters import check_model
    from raycv.model.base_model import absolute_name, fetch_base
    from raycv.model.loading import check_max_length, check_weights, load_config, load_tokenizer, prepare_config

    # No spinner here: the hub's client shows progress bars of its own.
    files = fetch_base(absolute_name(config.model.name), config.model.revision)
    model_config = load_config(files)
    tokenizer = load_tokenizer(files, model_config)
    check_max_length(model_config, config.prompt.max_length)
    prepare_config(model_config, tokenizer)
    check_model(model_config, config.model)
    check_weights(files, model_config)
    return Base(files, tokenizer, model_config, files.describe(tokenizer, model_config))


def make_encoder(config: RunConfig, dataset: Dataset, base: Base) -> "PromptEncoder":
    """The encoder of all prompts. Raises: UserError if the criteria leave no room for a post."""
    from raycv.data.prompt_encoder import prompt_encoder
    from raycv.model.loading import rows_of_embedding

    criteria = [criterion.text for criterion in dataset.criteria.values()]
    return prompt_encoder(base.tokenizer, config.prompt, criteria, rows_of_embedding(base.config))


def tokenise(encoder: "PromptEncoder", dataset: Dataset, splits: list[Split], base: Base, console: Console) -> Prepared:
    """Tokenises once for all folds. Raises: UserError if the base model cannot read the posts or criteria as text."""
    from raycv.data.prompt_encoder import encode_dataset, encoding_summary, encoding_warnings

    with console.status(f"Tokenising {len(dataset.pairs):,} prompts"):
        encoded, facts = encode_dataset(encoder, dataset)
    warnings = encoding_warnings(facts)
    for warning in warnings:
        say(console, f"Warning: {warning}", "yellow")
    say(console, encoding_summary(facts, len(dataset.posts)))
    return Prepared(dataset, splits, base.files, encoder, encoded, base.facts, facts, warnings)
