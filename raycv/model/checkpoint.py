"""A trained fold on disk: a plain PEFT folder (adapter, head, tokenizer) and `raycv.json`, what inference must know."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from raycv.common.environment import package_version
from raycv.common.files import read_json, sha256_of, write_json
from raycv.common.retry import cause_of
from raycv.config.values import Fraction, NonEmpty
from raycv.data.parsing import Missing
from raycv.data.types import LABELS
from raycv.errors import UserError, shown
from raycv.prompts.template import TEMPLATE, PromptRules

if TYPE_CHECKING:
    from peft import PeftModel

MANIFEST = "raycv.json"
WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
"""PEFT's names."""
SUMMED = (WEIGHTS, "adapter_config.json")
"""The files whose SHA-256 the manifest holds: what the scores are computed from."""
MOST_TOKENS = 2**24
"""More than any model takes; a tokenizer fails at much larger numbers."""
FORMAT = 1
DAMAGED = ("take another fold: fold=<k>", "copy the checkpoint again, or train the fold again")
VERSIONED = ("raycv", "torch", "transformers", "peft")


def _sound(rules: PromptRules) -> PromptRules:
    for name in ("max_length", "post_limit"):
        if not 1 <= getattr(rules, name) <= MOST_TOKENS:
            raise ValueError(f"{name} must be from 1 to {MOST_TOKENS}")
    for name in ("head_fraction", "stride_fraction"):
        if not 0 <= getattr(rules, name) <= 1:
            raise ValueError(f"{name} must be from 0 to 1")
    return rules


@dataclass(frozen=True)
class CheckpointInfo:
    """`raycv.json`: with it, training and inference cannot drift apart. Holds no text of posts or criteria."""

    base_model: NonEmpty
    base_revision: str | None
    rules: Annotated[PromptRules, AfterValidator(_sound)]
    threshold: Fraction
    criteria: dict[str, str | None]
    """criterion id -> symptom name"""
    criteria_hash: str
    criteria_dir: str
    run: str
    fold: Annotated[int, Field(ge=0)]
    epoch: int
    precision: Literal["fp32", "bf16"]
    base_sums: dict[str, str] = field(default_factory=dict)
    """of the base model's files, as BaseFiles.sums; earlier versions kept none"""
    attention: str | None = None
    """that training computed: sdpa or eager; earlier versions kept none"""
    missing: Missing = "text"
    """what NaN and the like were in the criteria's file; earlier versions kept them as text"""

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "format": FORMAT,
            **asdict(self),
            "template": TEMPLATE,
            "labels": {str(label): name for label, name in enumerate(LABELS)},
            "versions": {name: package_version(name) for name in VERSIONED},
        }


def save_checkpoint(folder: Path, model: "PeftModel", tokenizer: Any, info: CheckpointInfo) -> None:
    """Writes adapter and head (safetensors), tokenizer, and last of all the manifest: its presence means complete."""
    config = model.peft_config["default"]
    # Not the snapshot folder that it was loaded from, which nobody else has.
    config.base_model_name_or_path = info.base_model
    config.revision = info.base_revision
    # Sets, whose order would be another in each process: the same training leaves the same bytes.
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), set):
            setattr(config, name, sorted(getattr(config, name)))
    # The embeddings are frozen: looking on the hub whether the vocabulary grew would only cost a request.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT's empty model card, which names the folder that the base was loaded from.
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    write_json(folder / MANIFEST, {**info.to_json(), "sha256": {name: sha256_of(folder / name) for name in SUMMED}})


def read_info(folder: Path) -> CheckpointInfo:
    """The manifest of a checkpoint folder.

    Raises: UserError if `folder` is no complete checkpoint, or one of another format.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(
            f"{folder} is no raycv checkpoint: it has no {MANIFEST}.",
            remedies=["name a folder like runs/<name>/fold_<k>/checkpoint"],
        )
    values = read_json(manifest)
    if not isinstance(values, dict) or "format" not in values:
        raise UserError(f"{manifest} is damaged: it does not say its format.", remedies=DAMAGED)
    if values["format"] != FORMAT:
        raise UserError(
            f"{manifest} has format {values['format']!r}; this raycv reads format {FORMAT}.",
            remedies=["use the version of raycv that made it: see versions in the file"],
        )
    try:
        # From JSON: in strict mode only there may a dataclass be an object.
        return TypeAdapter(CheckpointInfo).validate_json(manifest.read_bytes(), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"]) or "the file"
        what = "is missing" if fault["type"] == "missing" else f"is {shown(fault['input'])}: {fault['msg']}"
        raise UserError(f"{manifest} is damaged: {key} {what}.", remedies=DAMAGED) from error


def _check_sums(folder: Path) -> None:
    """Raises: UserError if a file is not what was saved. A checkpoint of stock PEFT, or an older one, has no sums."""
    values = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    sums = values.get("sha256", {}) if isinstance(values, dict) else None
    if not isinstance(sums, dict):
        raise UserError(f"{folder / MANIFEST} is damaged: sha256 is no object.", remedies=DAMAGED)
    for name in SUMMED:
        if name in sums and (not (folder / name).is_file() or sums[name] != sha256_of(folder / name)):
            raise UserError(
                f"The checkpoint {folder} is damaged: {name} is not the file that was saved (its SHA-256 differs from "
                f"the one in {MANIFEST}).",
                remedies=DAMAGED,
            )


def _check_tensors(model: "PeftModel", folders: Sequence[Path]) -> None:
    """Raises: UserError if a file lacks a tensor of its adapter (PEFT only warns), or one holds NaN or infinity."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    for adapter, folder in zip(model.peft_config, folders, strict=True):
        tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        with safe_open(folder / WEIGHTS, "pt") as file:
            missing = sorted(set(tensors) - set(file.keys()))
        endless = sorted(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all()))
        for names, what in ((missing, "are missing"), (endless, "hold NaN or infinity")):
            if names:
                raise UserError(
                    f"The checkpoint {folder} is damaged: {len(names)} tensor(s) of {WEIGHTS} {what}, the first being "
                    f"{names[0]}.",
                    remedies=DAMAGED,
                )


def _check_weights(folder: Path) -> None:
    """Raises: UserError without safetensors: PEFT would then read a pickle, or ask the hub for one."""
    if (folder / WEIGHTS).is_file():
        return
    pickled = (folder / PICKLED_WEIGHTS).exists()
    why = f"; {PICKLED_WEIGHTS} is a pickle, which could run code, and is never read" if pickled else ""
    raise UserError(f"The adapter in {folder} cannot be loaded: it has no {WEIGHTS}{why}.", remedies=DAMAGED)


def load_adapter(base: Any, folder: Path, *more: Path) -> "PeftModel":
    """`base` (a classifier without adapters) with the adapter and head of `folder`, in evaluation mode.

    Those of `more` folders lie beside it under names of their own; `folder`'s is the active one.
    Raises: UserError if one of them is damaged or does not fit the base.
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
            # Refused below.
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
        raise UserError(f"The adapter in {current} cannot be loaded: {cause_of(error)}", remedies=DAMAGED) from error
    _check_tensors(model, (folder, *more))
    return model.eval()
