"""The files of a base model in a folder: which belong to it, whether they are complete, their checksums."""

import hashlib
import json
import os
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from raycv.common.files import sha256_of
from raycv.common.retry import cause_of
from raycv.errors import UserError, first_of

WeightFormat = Literal["safetensors", "pytorch_bin"]

CONFIG = "config.json"

# The formats are in order of preference. Each has a file with all weights, or an index that names the shards.
_ENTRIES: tuple[tuple[WeightFormat, str, str], ...] = (
    ("safetensors", "model.safetensors", "model.safetensors.index.json"),
    ("pytorch_bin", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)
INDEXES = frozenset(index for _, _, index in _ENTRIES)
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's file. If transformers finds it, it loads the base model named in it instead of the weights beside it."""
RARE = ("bpe.codes", "dict.txt", "*.spm", "prophetnet.tokenizer", "*.tiktoken", "*.jinja")
"""Vocabularies of a few tokenizers, and templates of chats. Earlier versions did not record them."""
QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Keys of a config whose weights are quantised, in transformers and MLX."""
QUANTISED_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
"""Files that the makers of quantised weights wrote before transformers knew them, and their methods."""
# These are config and tokenizer files: JSON, sentencepiece models, WordPiece and BPE vocabularies. Code matches no
# pattern, and `is_small_file` excludes adapters and pickles, which can run code.
_SMALL = ("*.json", "*.model", "vocab*", "merges*.txt", *RARE)
_ADAPTER, _PICKLE = "adapter_*", "*.pkl"
_GIT_LFS_POINTER = b"version https://git-lfs"
WHOLE_BYTES, BLOCK_BYTES, SAMPLE_BYTES = 64 * 2**20, 2 * 2**20, 4096
"""`checksum` hashes a file of up to `WHOLE_BYTES` whole. In a larger file it reads `SAMPLE_BYTES` of each block of
`BLOCK_BYTES`."""


@dataclass(frozen=True)
class BaseFiles:
    """The files of one base model, complete and on this node."""

    name: str
    """as in the config: hub id, folder, or `raycv://...`"""
    path: Path
    """the folder that holds the files"""
    revision: str | None
    """commit on the hub; None for a folder"""
    weight_format: WeightFormat
    files: Mapping[str, int]
    """the only files that may be read: name -> bytes"""

    def sums(self) -> dict[str, str]:
        """Returns the checksum of each file, which tells it from a file of another model.

        Returns:
            name -> SHA-256 of the file, or of samples if it is large.
        """
        return {file: checksum(self.path / file) for file in self.files}

    def describe(self, tokenizer: Any, config: Any) -> dict[str, Any]:
        """Returns a description as plain values for `environment.json`.

        Args:
            tokenizer: The tokenizer, loaded from these files.
            config: The transformers config, loaded from these files.
        """
        return {
            "name": self.name,
            "revision": self.revision,
            "weight_format": self.weight_format,
            "files": dict(self.files),
            "sha256": self.sums(),
            "architectures": list(config.architectures or []),
            "model_type": config.model_type,
            "vocab_size": getattr(config.get_text_config(), "vocab_size", None),
            "tokenizer": type(tokenizer).__name__,
            "tokenizer_is_fast": bool(tokenizer.is_fast),
            "tokenizer_size": len(tokenizer),
            "pad_token": tokenizer.pad_token,
            "pad_token_id": tokenizer.pad_token_id,
        }


def inspect_folder(name: str, folder: Path, revision: str | None) -> BaseFiles:
    """Returns the files of the base model `name` in `folder`, after checking that they are complete.

    Args:
        name: The model's name, as in the config.
        folder: The folder that holds the files.
        revision: The commit on the hub; None for a folder of the user.

    Raises:
        UserError: `folder` lacks the config or some of the weights, or an index of weights is damaged. A folder of the
            user is also refused if it holds an adapter beside the model.
    """
    # The hub's client gives a relative folder where HF_HOME is one, and transformers gets links to these files.
    folder = folder.absolute()
    if not os.path.isdir(folder):
        raise UserError(
            f"The folder {folder}, which is to hold the base model, does not exist.",
            kind="base-files",
            remedies=["correct the path"],
        )
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if CONFIG not in present:
        raise UserError(
            f"{folder} is not a model: it has no {CONFIG}; it holds {listed_files(present)}.",
            kind="base-files",
            remedies=[
                "model.name wants a base model; a fold's checkpoint is an adapter, which belongs on top of one"
                if ADAPTER_CONFIG in present
                else "set model.name to a folder written by save_pretrained or by `hf download`"
            ],
        )
    weight_format, entry = find_entry(name, present)
    weights = weight_files(folder, entry)
    faults = [file for file in weights if file not in present or _is_pointer(folder / file)]
    if faults:
        raise UserError(
            f"{folder} lacks weights: {listed_files(faults)} missing, or only a git-lfs pointer.",
            kind="base-files",
            remedies=[
                "copy or download the folder again",
                "after a git clone without git-lfs: `git lfs install && git lfs pull` in that folder",
            ],
        )
    if ADAPTER_CONFIG in present and revision is None:
        raise UserError(
            f"{folder} holds a whole model and an adapter ({ADAPTER_CONFIG}): raycv trains on the whole model alone.",
            kind="base-files",
            remedies=_without_adapter(folder),
        )
    used = sorted({file for file in present if is_small_file(file)} | {entry, *weights})
    return BaseFiles(name, folder, revision, weight_format, {file: (folder / file).stat().st_size for file in used})


def find_entry(name: str, present: Iterable[str]) -> tuple[WeightFormat, str]:
    """Returns format and entry file of the weights: safetensors if there are any, else `.bin`.

    Args:
        name: The model's name, for the message.
        present: The names of the files that exist.

    Raises:
        UserError: PyTorch can read none of the files as weights.
    """
    names = set(present)
    for weight_format, single, index in _ENTRIES:
        for entry in (single, index):
            if entry in names:
                return weight_format, entry
    raise UserError(
        f"The base model {name} has no weights that PyTorch can read; it holds {listed_files(names)}.",
        kind="base-files",
        remedies=[
            "choose a model with model.safetensors or pytorch_model.bin, whole or in shards (GGUF, GPTQ, TensorFlow "
            "and .pth files cannot be fine-tuned here)"
        ],
    )


def weight_files(folder: Path, entry: str) -> list[str]:
    """Returns the names of the weight files behind `entry`, also of files that do not exist.

    Raises:
        UserError: The index is damaged, or names files outside of `folder`.
    """
    if entry not in INDEXES:
        return [entry]
    try:
        shards = sorted(set(json.loads((folder / entry).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{folder / entry} is damaged: {cause_of(error)}.",
            kind="base-files",
            remedies=["copy or download the folder again"],
        ) from error
    # The index comes from outside, so we refuse paths that lead out of the folder.
    if not shards or any(Path(shard).name != shard for shard in shards):
        raise UserError(
            f"{folder / entry} does not name plain files of its own folder; it is not used.", kind="base-files"
        )
    return shards


def check_not_quantised(name: str, folder: Path) -> None:
    """Checks that the weights are not quantised, since DoRA here trains on top of whole numbers of 16 or 32 bits only.

    Args:
        name: The model's name, for the message.
        folder: The folder that holds its config. The weights may still be missing.

    Raises:
        UserError: The config, or a file beside it, says that the weights are quantised.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # transformers reports what is wrong with it.
        return
    parts = [part for part in (config, *getattr(config, "values", list)()) if isinstance(part, dict)]
    for key, how in ((key, part.get(key)) for part in parts for key in QUANTISED):
        if how:
            facts = how if isinstance(how, dict) else {}
            bits = next((f"load_in_{count}bit" for count in (4, 8) if facts.get(f"load_in_{count}bit")), None)
            method = facts.get("quant_method") or ("bitsandbytes" if bits else facts.get("mode") or "method not named")
            raise _quantised(name, str(method), f"{key} in {CONFIG}", [f"remove {key} from {folder / CONFIG}"])
    for file, method in QUANTISED_FILES.items():
        if (folder / file).is_file():
            raise _quantised(name, method, f"the file {file}", [f"remove {folder / file}"])


def _quantised(name: str, method: str, where: str, undo: list[str]) -> UserError:
    return UserError(
        f"The weights of {name} are quantised ({method}), says {where}: raycv trains on bf16, fp16 or fp32 weights.",
        kind="base-unsuitable",
        remedies=[
            "choose the model that these weights were made from, whose name lacks GPTQ, AWQ, FP8, 4bit and the like",
            *(f"if they are not quantised: {step}" for step in undo),
        ],
    )


def _without_adapter(folder: Path) -> list[str]:
    """Returns the remedies for a folder that holds an adapter beside a whole model."""
    here, aside = (shlex.quote(str(path)) for path in (folder, folder.with_name(f"{folder.name}-adapter")))
    return [
        f"if the whole model is meant, move the adapter away: mkdir {aside} && mv {here}/{_ADAPTER} {aside}/",
        "if the adapter is meant, merge it into its base and give that folder: PeftModel.from_pretrained(base, "
        f"{str(folder)!r}).merge_and_unload().save_pretrained(<new folder>)",
    ]


def is_small_file(file: str) -> bool:
    if file in INDEXES or fnmatch(file, _ADAPTER) or fnmatch(file, _PICKLE):
        return False
    return any(fnmatch(file, pattern) for pattern in _SMALL)


def comparable(files: Iterable[str], recorded: Collection[str]) -> list[str]:
    """Those of `files` whose sums can be compared with the `recorded` ones: earlier versions left RARE files out."""
    return [file for file in files if file in recorded or not any(fnmatch(file, rare) for rare in RARE)]


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as opened:
        return opened.read(len(_GIT_LFS_POINTER)) == _GIT_LFS_POINTER


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file, or of samples of a file of more than `WHOLE_BYTES`, so that it is quick.

    The samples are the first bytes of each block and the last bytes of the file.
    In a model of that size every matrix spans many blocks, so other weights have another checksum.
    """
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return sha256_of(path)
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as opened:
        for start in range(0, size, BLOCK_BYTES):
            digest.update(os.pread(opened.fileno(), SAMPLE_BYTES, start))
        digest.update(os.pread(opened.fileno(), SAMPLE_BYTES, size - SAMPLE_BYTES))
    return digest.hexdigest()


def listed_files(names: Iterable[str], most: int = 8) -> str:
    """`names` for a message, sorted; `no files` if there are none."""
    return first_of(sorted(names), most) or "no files"
