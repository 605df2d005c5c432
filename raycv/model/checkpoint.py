"""Writes and loads a trained fold: a plain PEFT folder (adapter, head, tokenizer), and `raycv.json` for inference."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raycv.common.environment import package_version
from raycv.common.files import read_json, record_of, sha256_of, write_json
from raycv.common.retry import cause_of
from raycv.common.table_reader import Missing
from raycv.data.prompt_template import TEMPLATE, PromptRules
from raycv.data.types import LABELS
from raycv.errors import UserError, counted

if TYPE_CHECKING:
    from peft import PeftModel

MANIFEST = "raycv.json"
WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
"""PEFT's names."""
SUMMED = (WEIGHTS, "adapter_config.json")
"""The files from which scores are computed. The manifest holds their SHA-256."""
MOST_TOKENS = 2**24
"""More than any model takes. A tokenizer fails at much larger numbers."""
FORMAT = 1
DAMAGED = ("take another fold: fold=<k>", "copy the checkpoint again, or train the fold again")
VERSIONED = ("raycv", "torch", "transformers", "peft")


@cache
def versions() -> Mapping[str, str | None]:
    """The versions of the packages that compute scores: name -> version, or None if it is not installed."""
    return {name: package_version(name) for name in VERSIONED}


@dataclass(frozen=True)
class CheckpointInfo:
    """The content of `raycv.json`, which keeps inference the same as training.

    It holds no text of posts or criteria.
    """

    base_model: str
    base_revision: str | None
    rules: PromptRules
    threshold: float
    criteria: dict[str, str | None]
    """criterion id -> symptom name"""
    criteria_hash: str
    criteria_dir: str
    run: str
    fold: int
    epoch: int
    precision: Literal["fp32", "bf16"]
    base_sums: dict[str, str] = field(default_factory=dict)
    """checksums of the base model's files, as `BaseFiles.sums`; earlier versions recorded none"""
    attention: str | None = None
    """the attention that training computed: sdpa or eager; earlier versions recorded none"""
    missing: Missing = "text"
    """how NaN and the like in the criteria's file were read; earlier versions kept them as text"""

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the file, without the checksums that `save_checkpoint` adds."""
        return {
            "format": FORMAT,
            **asdict(self),
            "template": TEMPLATE,
            "labels": {str(label): name for label, name in enumerate(LABELS)},
            "versions": dict(versions()),
        }


def save_checkpoint(folder: Path, model: "PeftModel", tokenizer: Any, info: CheckpointInfo) -> None:
    """Writes adapter and head (safetensors), the tokenizer, and last the manifest.

    A checkpoint that has its manifest is therefore complete.
    """
    config = model.peft_config["default"]
    # PEFT would record the snapshot folder that the base was loaded from. Nobody else has that folder, so we record the
    # name.
    config.base_model_name_or_path = info.base_model
    config.revision = info.base_revision
    # The order of a set differs between processes. We sort these, so that the same training writes the same bytes.
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), set):
            setattr(config, name, sorted(getattr(config, name)))
    # PEFT would ask the hub whether the vocabulary grew. The embeddings are frozen, so we save that request.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT's empty model card names the folder that the base was loaded from, so we remove it.
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    write_json(folder / MANIFEST, {**info.to_json(), "sha256": {name: sha256_of(folder / name) for name in SUMMED}})


def read_info(folder: Path) -> CheckpointInfo:
    """Reads the manifest of a checkpoint folder.

    Raises:
        UserError: `folder` is not a complete checkpoint, its manifest is damaged, or it has another format.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(
            f"{folder} is not a raycv checkpoint: it has no {MANIFEST}.",
            kind="run-missing",
            remedies=["name a folder like runs/<name>/fold_<k>/checkpoint"],
        )
    values = read_json(manifest, "checkpoint-damaged")
    if not isinstance(values, dict) or "format" not in values:
        raise UserError(
            f"{manifest} is damaged: it does not say its format.", kind="checkpoint-damaged", remedies=DAMAGED
        )
    if values["format"] != FORMAT:
        raise UserError(
            f"{manifest} has format {values['format']!r}; this raycv reads format {FORMAT}.",
            kind="package-version",
            remedies=["use the version of raycv that made it: see versions in the file"],
        )
    try:
        info = record_of(CheckpointInfo, values)
        _check_limits(info)
    except ValueError as error:
        raise UserError(f"{manifest} is damaged: {error}.", kind="checkpoint-damaged", remedies=DAMAGED) from error
    return info


def _check_limits(info: CheckpointInfo) -> None:
    """Raises: ValueError: A number lies outside its limits, or the base model has no name."""
    rules = info.rules
    if not info.base_model:
        raise ValueError("base_model is empty")
    if info.fold < 0:
        raise ValueError(f"fold is {info.fold}, which should be 0 or more")
    for name, tokens in (("max_length", rules.max_length), ("post_limit", rules.post_limit)):
        if not 1 <= tokens <= MOST_TOKENS:
            raise ValueError(f"rules.{name} is {tokens}, which should be from 1 to {MOST_TOKENS}")
    shares = {
        "threshold": info.threshold,
        "rules.head_fraction": rules.head_fraction,
        "rules.stride_fraction": rules.stride_fraction,
    }
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}, which should be from 0 to 1")


def _check_sums(folder: Path) -> None:
    """Compares the files with their checksums. Checkpoints of stock PEFT or of earlier versions have none.

    Raises:
        UserError: A file is not the one that was saved, or the manifest's checksums are damaged.
    """
    values = read_json(folder / MANIFEST, "checkpoint-damaged") if (folder / MANIFEST).is_file() else {}
    sums = values.get("sha256", {}) if isinstance(values, dict) else None
    if not isinstance(sums, dict):
        raise UserError(
            f"{folder / MANIFEST} is damaged: sha256 is not an object.", kind="checkpoint-damaged", remedies=DAMAGED
        )
    for name in SUMMED:
        if name in sums and (not (folder / name).is_file() or sums[name] != sha256_of(folder / name)):
            raise UserError(
                f"The checkpoint {folder} is damaged: {name} is not the file that was saved (its SHA-256 differs from "
                f"the one in {MANIFEST}).",
                kind="checkpoint-damaged",
                remedies=DAMAGED,
            )


def _check_tensors(model: "PeftModel", folders: Sequence[Path]) -> None:
    """Checks the tensors of each adapter of `model` against its folder. PEFT only warns of missing ones.

    Raises:
        UserError: A file lacks a tensor of its adapter, or a tensor holds NaN or infinity.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    for adapter, folder in zip(model.peft_config, folders, strict=True):
        tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        with safe_open(folder / WEIGHTS, "pt") as file:
            missing = sorted(set(tensors) - set(file.keys()))
        endless = sorted(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all()))
        for names, what in ((missing, "lacks"), (endless, "holds NaN or infinity in")):
            if names:
                raise UserError(
                    f"The checkpoint {folder} is damaged: {WEIGHTS} {what} {counted(len(names), 'tensor')}, the first "
                    f"being {names[0]}.",
                    kind="checkpoint-damaged",
                    remedies=DAMAGED,
                )


def _check_weights(folder: Path) -> None:
    """Refuses a folder without safetensors. PEFT would read a pickle instead, or ask the hub for one.

    Raises:
        UserError: The folder has no safetensors file.
    """
    if (folder / WEIGHTS).is_file():
        return
    pickled = (folder / PICKLED_WEIGHTS).exists()
    why = f"; {PICKLED_WEIGHTS} is a pickle, which could run code, and is never read" if pickled else ""
    raise UserError(
        f"The adapter in {folder} cannot be loaded: it has no {WEIGHTS}{why}.",
        kind="checkpoint-damaged",
        remedies=DAMAGED,
    )


def load_adapter(base: Any, folder: Path, *more: Path) -> "PeftModel":
    """Loads the adapters and heads of checkpoints into `base`, in evaluation mode.

    Args:
        base: A classifier without adapters.
        folder: The checkpoint whose adapter is active.
        more: Further checkpoints. Their adapters are loaded under names of their own, and are not active.

    Returns:
        `base` with the adapters.

    Raises:
        UserError: A checkpoint is damaged or does not fit the base.
    """
    from peft import LoraConfig, PeftModel
    from safetensors import SafetensorError

    from raycv.model.adapters import float32_head
    from raycv.model.dora import use_factored

    for each in (folder, *more):
        _check_weights(each)
        _check_sums(each)
    float32_head(base)
    current = folder
    try:
        config = use_factored(LoraConfig.from_pretrained(str(folder)))
        with warnings.catch_warnings():
            # `_check_tensors` refuses missing keys, so PEFT need not warn of them.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, str(folder), config=config)
            for number, current in enumerate(more, 1):
                model.load_adapter(str(current), adapter_name=f"other_{number}")
    except (
        AttributeError,
        RecursionError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise UserError(
            f"The adapter in {current} cannot be loaded: {cause_of(error)}", kind="checkpoint-damaged", remedies=DAMAGED
        ) from error
    _check_tensors(model, (folder, *more))
    return model.eval()
