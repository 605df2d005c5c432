"""Loads tokenizer, config and a classifier with a new head from a base model's files. Never runs the model's code."""

import copy
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from raycv.common.retry import cause_of
from raycv.data.types import LABELS
from raycv.errors import UserError, shown
from raycv.model.base_files import CONFIG, BaseFiles

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

POSITIONS_AFTER_PAD = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "longformer",
    "mpnet", "ibert", "esm",
)  # fmt: skip
"""Model types whose first position is the pad id + 1. Their 514 positions hold 512 tokens."""
TOKENIZER_CONFIG = "tokenizer_config.json"


def load_config(files: BaseFiles) -> Any:
    """Loads the model's transformers config.

    Raises:
        UserError: The config is damaged, asks for code of its own, or names weights that are not in `files`.
    """
    from transformers import AutoConfig

    with _loading("config", files) as folder:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        _rename(config, folder, files)
    weights = getattr(config, "transformers_weights", None)
    if weights is not None and weights not in files.files:
        raise _outside(files, CONFIG, "transformers_weights", weights)
    return config


def prepare_config(config: Any, tokenizer: Any) -> str | None:
    """Sets in `config` all that raycv's classifier needs: labels, pad token, attention.

    The attention is raycv's choice. The config may ask for a kernel that is not installed, such as flash_attention_2.

    Returns:
        The reason if the attention is not PyTorch's kernel, else None.

    Raises:
        UserError: The tokenizer has no pad token, or one without an embedding.
    """
    from raycv.model.attention import choose_attention

    config.num_labels = len(LABELS)
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: i for i, label in enumerate(LABELS)}
    for part in (config, config.get_text_config()):
        part.use_cache = False
    set_pad_token(tokenizer, config)
    config._attn_implementation, why = choose_attention(config)
    return why


def rows_of_embedding(config: Any) -> int | None:
    """Returns how many token ids have an embedding, or None if the config does not say (Canine takes any)."""
    # In a model that also reads images, the text settings are in a part of the config.
    return getattr(config.get_text_config(), "vocab_size", None)


def positions_of(config: Any) -> int | None:
    """Returns the most tokens that the model takes at once, or None if it sets no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None or positions < 0:  # XLNet's config has -1.
        return None
    if config.model_type in POSITIONS_AFTER_PAD:
        positions -= (config.pad_token_id or 0) + 1
    return positions


def check_max_length(config: Any, max_length: int) -> None:
    """Checks that the model has as many positions as prompts may have tokens (FR-002).

    Raises:
        UserError: The model has fewer positions than `max_length`.
    """
    positions = positions_of(config)
    if positions is not None and max_length > positions:
        raise UserError(
            f"prompt.max_length={max_length}, but the base model has {positions} positions.",
            kind="base-unsuitable",
            remedies=[f"set prompt.max_length to {positions} or less", "choose a base model with a longer context"],
        )


def load_tokenizer(files: BaseFiles, config: Any = None) -> Any:
    """Loads the model's tokenizer, which pads and truncates on the right, with a pad token that has an embedding.

    The tokenizer is fast if it is or can be converted, else slow (sentencepiece).
    Tokens are never added, since the embedding would not match.

    Args:
        files: The files of the base model.
        config: The model's config; None to load it here.

    Raises:
        UserError: No tokenizer can be read, or it cannot pad, or its config names a file that is not in `files`.
    """
    from transformers import AutoTokenizer

    _check_vocabularies(files)
    load = partial(
        AutoTokenizer.from_pretrained,
        trust_remote_code=False,
        local_files_only=True,
        padding_side="right",
        truncation_side="right",
    )
    try:
        with _loading("tokenizer", files) as folder:
            tokenizer = load(folder, use_fast=True)
            _rename(tokenizer, folder, files)
    except UserError as error:
        with _loading("tokenizer", files) as folder:
            tokenizer = load(folder, use_fast=False)
            _rename(tokenizer, folder, files)
        logger.warning("the fast tokenizer cannot be loaded, so raycv uses the slow one: %s", error.what)
    _choose_pad_token(tokenizer, rows_of_embedding(config or load_config(files)))
    return tokenizer


def _check_vocabularies(files: BaseFiles) -> None:
    """Checks that the tokenizer's config names no vocabulary on this machine outside of `files`.

    Raises:
        UserError: It names one.
    """
    if TOKENIZER_CONFIG not in files.files:
        return
    try:
        named = json.loads((files.path / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # transformers reports what is wrong with it.
        return
    own = {os.path.realpath(files.path / file) for file in files.files}
    for key, value in named.items() if isinstance(named, dict) else ():
        # transformers ignores the values of these two keys, so we allow them.
        names_a_file = key.endswith("_file") and key not in ("special_tokens_map_file", "tokenizer_config_file")
        if names_a_file and isinstance(value, str) and os.path.isfile(value) and os.path.realpath(value) not in own:
            raise _outside(files, TOKENIZER_CONFIG, key, value)


def _outside(files: BaseFiles, file: str, key: str, value: str) -> UserError:
    """Returns the error for a `key` in `file` that would let transformers read a file which raycv has not checked."""
    return UserError(
        f"{files.path / file}: {key}={shown(value, 200)} names a file that is not one of the base model's own.",
        kind="base-files",
        remedies=[f"remove {key} from {file}, and put the file into {files.path} under its usual name"],
    )


def _choose_pad_token(tokenizer: Any, rows: int | None) -> None:
    def is_usable(token_id: int | None) -> bool:
        # Some Llama derivatives ship a [PAD] beyond the rows of their embedding, so we check its id.
        return token_id is not None and (rows is None or token_id < rows)

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
        kind="base-unsuitable",
        remedies=["set pad_token in the model's tokenizer_config.json to one of its tokens"],
    )


def set_pad_token(tokenizer: Any, config: Any) -> None:
    """Gives `config` the tokenizer's pad id.

    The head pools at the last token that is not *the config's* pad token.

    Raises:
        UserError: The tokenizer has no pad token, or one without an embedding.
    """
    pad_id, rows = tokenizer.pad_token_id, rows_of_embedding(config)
    if pad_id is None or (rows is not None and pad_id >= rows):
        raise UserError(
            f"The tokenizer's pad id is {pad_id}; the model needs one below its vocabulary size {rows}.",
            kind="base-unsuitable",
            remedies=["load the tokenizer with raycv.model.loading.load_tokenizer, which chooses one"],
        )
    # The head of Gemma 3 reads the id in the part for text.
    for part in (config, config.get_text_config()):
        part.pad_token_id = pad_id


def check_weights(files: BaseFiles, config: Any) -> None:
    """Checks that safetensors weights fit the prepared `config`, by names and shapes, without reading a weight.

    transformers compares them as it does when it loads, so renamed tensors of old files are known.

    Raises:
        UserError: A tensor of the backbone is missing or has another shape, or a layer has no place in the model.
    """
    import torch
    from safetensors import safe_open
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    from raycv.model.adapters import check_loaded

    if files.weight_format != "safetensors":
        return
    shapes: dict[str, list[int]] = {}
    with _loading("weights", files) as folder:
        for file in files.files:
            if file.endswith(".safetensors"):
                with safe_open(os.path.join(folder, file), framework="pt") as opened:
                    shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        made: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
        model, found = made.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict={name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_loaded(model, found, files.name, shapes)


def load_classifier(
    files: BaseFiles,
    tokenizer: Any,
    dtype: "torch.dtype",
    *,
    seed: int,
    device: str = "cpu",
    plain_attention: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Any:
    """Loads the base as `AutoModelForSequenceClassification` with two labels and a new head (FR-001).

    Args:
        files: The files of the base model.
        tokenizer: The tokenizer of the base model.
        dtype: The type of the weights.
        seed: The seed of the new head. The head does not depend on format, dtype, device or the global random state,
            which stays as it was (FR-009).
        device: The device that gets the weights.
        plain_attention: Computes attention by transformers' plain code, as training did, and not by PyTorch's kernel.
        tell: Receives texts for the user: why the attention is not PyTorch's kernel, or was not compared with the plain
            code.

    Returns:
        The classifier in evaluation mode.

    Raises:
        UserError: The weights are damaged, unsafe, or do not fit the config's architecture.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from raycv.model.adapters import check_loaded, renew_head
    from raycv.model.attention import PLAIN, fuse_norms, with_right_attention

    config = load_config(files)
    why = prepare_config(config, tokenizer)
    if plain_attention:
        config._attn_implementation = PLAIN
    # transformers draws parts that the checkpoint lacks from the global generator, so we seed it. `torch.manual_seed`
    # would also seed the generators of the GPUs.
    with torch.random.fork_rng(devices=[]), _loading("weights", files) as folder:
        torch.default_generator.manual_seed(seed)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder,
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
        for part in (model, model.config):
            _rename(part, folder, files)
    lacking = check_loaded(model, found, files.name)
    logger.info("loaded %s (%s); the classification head is new", files.name, files.weight_format)
    renew_head(model, lacking, seed)
    model, found_wrong = with_right_attention(model.eval(), tokenizer, positions_of(config))
    for reason in filter(None, (why, found_wrong)):
        logger.info("%s: %s", files.name, reason)
        tell(reason)
    fuse_norms(model)
    return model


@contextmanager
def _loading(part: str, files: BaseFiles) -> Iterator[str]:
    """Yields a folder of links to `files` and nothing else, since transformers reads any file beside them.

    Such a file may be an adapter, which would replace the model.
    It may also be weights in another format, which would replace those that raycv checked.
    The errors of transformers for unusable files become `UserError`. Its own warnings are silenced.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    folder = ""
    try:
        with TemporaryDirectory(prefix="raycv-base-") as folder:
            for file in files.files:
                os.symlink(files.path / file, os.path.join(folder, file))
            yield folder
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # transformers and tokenizers raise anything, a bare Exception too
        cause = cause_of(error).replace(folder or str(files.path), str(files.path))
        raise UserError(
            f"The {part} of {files.name} cannot be loaded from {files.path}: {cause}",
            kind="base-files",
            remedies=_mended(files),
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _rename(loaded: Any, folder: str, files: BaseFiles) -> None:
    """Replaces the `folder` of links in `loaded` by the base model's own. A tokenizer copies files later."""
    for values in (vars(loaded), getattr(loaded, "init_kwargs", {})):
        for key, value in values.items():
            if isinstance(value, str) and folder in value:
                values[key] = value.replace(folder, str(files.path))


def _upgrade(files: BaseFiles) -> list[str]:
    """Returns the remedy for files that a newer transformers wrote than the one that is installed; else nothing."""
    import transformers
    from packaging.version import InvalidVersion, Version

    try:
        then = str(json.loads((files.path / CONFIG).read_text(encoding="utf-8")).get("transformers_version"))
        is_newer = Version(then) > Version(transformers.__version__)
    except (OSError, ValueError, AttributeError, InvalidVersion):
        return []
    upgrade = f"transformers {then} wrote {CONFIG}, and {transformers.__version__} is here: "
    return [f"{upgrade}pip install --upgrade 'transformers<5' tokenizers"] if is_newer else []


def _mended(files: BaseFiles) -> list[str]:
    remedies = [*_upgrade(files), "if a file may be damaged, delete the folder and download or copy it again"]
    if files.weight_format == "pytorch_bin":
        remedies.append(
            "a .bin that holds more than tensors is refused, since it could run code: use a safetensors version"
        )
    remedies.append("a model that needs code of its own (trust_remote_code) is never run; choose another base model")
    return remedies
