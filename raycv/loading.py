"""The base model's files -> tokenizer, config, classifier with a fresh head. Nothing of the model's own code is run."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from raycv.base import CONFIG, BaseFiles
from raycv.errors import UserError
from raycv.records import LABELS
from raycv.retry import cause_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

POSITIONS_AFTER_PAD = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "longformer",
    "mpnet", "ibert", "esm",
)  # fmt: skip
"""Model types whose first position is the pad id + 1: 514 positions hold 512 tokens."""


COMPUTED = (".inv_freq", ".masked_bias", ".position_ids")
"""Buffers that old files hold though the model computes them."""


def load_config(files: BaseFiles) -> Any:
    """The model's transformers config. Raises: UserError if it is damaged or asks for code of its own."""
    from transformers import AutoConfig

    with _loading("config", files):
        return AutoConfig.from_pretrained(files.path, trust_remote_code=False, local_files_only=True)


def check_max_length(config: Any, max_length: int) -> None:
    """Raises: UserError if the model has fewer positions than `max_length` tokens (FR-002)."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in POSITIONS_AFTER_PAD:
        positions -= (config.pad_token_id or 0) + 1
    if positions is not None and max_length > positions:
        raise UserError(
            f"prompt.max_length={max_length}, but the base model has {positions} positions.",
            remedies=[f"set prompt.max_length to {positions} or less", "choose a base model with a longer context"],
        )


def load_tokenizer(files: BaseFiles) -> Any:
    """The model's tokenizer, padding and cutting on the right, with a pad token that the model has an embedding for.

    Fast if it is or can be made so, else slow (sentencepiece). Never adds a token: the embedding would not match.
    Raises: UserError if the folder has no tokenizer that can be read, or none that can pad.
    """
    from transformers import AutoTokenizer

    load = partial(
        AutoTokenizer.from_pretrained,
        files.path,
        trust_remote_code=False,
        local_files_only=True,
        padding_side="right",
        truncation_side="right",
    )
    try:
        with _loading("tokenizer", files):
            tokenizer = load(use_fast=True)
    except UserError as error:
        with _loading("tokenizer", files):
            tokenizer = load(use_fast=False)
        logger.warning("the fast tokenizer cannot be had, using the slow one: %s", error.what)
    vocab_size = load_config(files).vocab_size
    _choose_pad_token(tokenizer, vocab_size)
    if len(tokenizer) > vocab_size:
        logger.warning(
            "%d token(s) of the tokenizer have no embedding in %s; a text that spells one of them fails",
            *(len(tokenizer) - vocab_size, files.name),
        )
    return tokenizer


def _choose_pad_token(tokenizer: Any, vocab_size: int) -> None:
    def is_usable(token_id: int | None) -> bool:
        # Some Llama derivatives ship a [PAD] beyond the rows of their embedding.
        return token_id is not None and token_id < vocab_size

    if is_usable(tokenizer.pad_token_id):
        return
    before = tokenizer.pad_token
    for token, token_id in (
        (tokenizer.unk_token, tokenizer.unk_token_id),
        (tokenizer.eos_token, tokenizer.eos_token_id),
    ):
        if is_usable(token_id):
            tokenizer.pad_token = token
            logger.info("pad token %s -> %s (id %d)", before, token, token_id)
            return
    raise UserError(
        "The tokenizer has no pad, unk or eos token with an embedding, so prompts cannot be padded.",
        remedies=["set pad_token in the model's tokenizer_config.json to one of its tokens"],
    )


def set_pad_token(tokenizer: Any, config: Any) -> None:
    """Gives `config` the tokenizer's pad id: the head pools at the last token that is not *the config's* pad token.

    Raises: UserError if the tokenizer has none, or one without an embedding.
    """
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id >= config.vocab_size:
        raise UserError(
            f"The tokenizer's pad id is {pad_id}; the model needs one below its vocabulary size {config.vocab_size}.",
            remedies=["load the tokenizer with raycv.base.load_tokenizer, which chooses one"],
        )
    config.pad_token_id = pad_id


def load_classifier(files: BaseFiles, tokenizer: Any, dtype: "torch.dtype", *, seed: int, device: str = "cpu") -> Any:
    """The base as `AutoModelForSequenceClassification` with two labels and a fresh head (FR-001), in eval mode.

    Weights are in `dtype` on `device`. The head depends on `seed` alone, not on format, dtype, device or the global
    random state, which is left as it was (FR-009).
    Raises: UserError if the weights are damaged, unsafe, or not those of the config's architecture.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from raycv.norm import fuse_norms

    config = load_config(files)
    config.num_labels = len(LABELS)
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: i for i, label in enumerate(LABELS)}
    config.use_cache = False
    set_pad_token(tokenizer, config)
    config._attn_implementation = _attention(config)
    # Parts that the checkpoint lacks are drawn from the global generator. torch.manual_seed would also seed the GPUs'.
    with torch.random.fork_rng(devices=[]), _loading("weights", files):
        torch.default_generator.manual_seed(seed)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            files.path,
            config=config,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=files.weight_format == "safetensors",
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    lacking = _check_loaded(model, found, files)
    _renew_head(model, lacking, seed)
    fuse_norms(model)
    return model.eval()


def _attention(config: Any) -> str:
    """The attention that a model computes with, whatever is installed beside: PyTorch's own.

    Kernels are pinned in one place (raycv.utils.pin_kernels). Families that have not got it compute theirs.
    """
    from transformers import AutoModelForSequenceClassification

    classes: Any = AutoModelForSequenceClassification._model_mapping
    known = type(config) in classes and classes[type(config)]._supports_sdpa
    return "sdpa" if known else "eager"


def _check_loaded(model: Any, found: Mapping[str, Any], files: BaseFiles) -> set[str]:
    """The keys that the checkpoint lacks, all of them the head's: transformers only warns, and trains random values."""
    from raycv.model import head_modules

    head = tuple(f"{name}." for name in head_modules(model))
    lacking = [*found["missing_keys"], *found["mismatched_keys"]]
    broken = [key for key in lacking if not key.startswith(head)]
    if broken:
        raise UserError(
            f"The weights of {files.name} do not fit its {CONFIG}: {len(broken)} tensor(s) are missing or of another "
            f"shape, the first being {sorted(broken)[0]}.",
            remedies=["copy or download the model again", "check that config and weights belong together"],
        )
    left = _left_out(model, found["unexpected_keys"])
    if left:
        raise UserError(
            f"The weights of {files.name} do not fit its {CONFIG}: {len(left)} tensor(s) of its layers have no place "
            f"in the model that it describes, the first being {left[0]}.",
            remedies=["copy or download the model again", "check that config and weights belong together"],
        )
    logger.info("loaded %s (%s); the classification head is new", files.name, files.weight_format)
    return set(lacking)


def _left_out(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Those of the `unexpected` keys that are of the backbone's layers: with them left out it is another model.

    Heads of other tasks are to be left out, and so are old buffers (inv_freq), which are computed.
    """
    prefix = f"{model.base_model_prefix}."

    def is_of_a_layer(key: str) -> bool:
        # A bare backbone's keys are without the prefix.
        named = key if key.startswith(prefix) else prefix + key
        return re.sub(r"\.\d+\.", ".#.", named) in kinds or (
            key.startswith(prefix) and re.search(r"\.\d+\.", key) is not None and not key.endswith(COMPUTED)
        )

    kinds = {re.sub(r"\.\d+\.", ".#.", key) for key in model.state_dict()}
    return sorted(key for key in unexpected if is_of_a_layer(key))


def _renew_head(model: Any, lacking: set[str], seed: int) -> None:
    """Draws what the checkpoint lacks, and the last layer always, as transformers does: normal, biases zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", 0.02)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        in_backbone = name.startswith(f"{model.base_model_prefix}.")
        if f"{name}.weight" in lacking or (module.out_features == len(LABELS) and not in_backbone):
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
                if module.bias is not None:
                    module.bias.zero_()


@contextmanager
def _loading(part: str, files: BaseFiles) -> Iterator[None]:
    """Turns what transformers raises for unusable files into a UserError, and keeps its own warnings quiet."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        RuntimeError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise UserError(
            f"The {part} of {files.name} cannot be loaded from {files.path}: {cause_of(error)}", remedies=_mended(files)
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _mended(files: BaseFiles) -> list[str]:
    remedies = ["if a file may be damaged, delete the folder and download or copy it again"]
    if files.weight_format == "pytorch_bin":
        remedies.append(
            "a .bin that holds more than tensors is refused, since it could run code: use a safetensors version"
        )
    remedies.append("a model that needs code of its own (trust_remote_code) is never run; choose another base model")
    return remedies
