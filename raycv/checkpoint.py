"""A trained fold on disk: a plain PEFT folder (adapter, head, tokenizer) and `raycv.json`, what inference must know."""

from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycv.errors import UserError
from raycv.paths import read_json, write_json
from raycv.prompts import TEMPLATE, PromptRules
from raycv.records import LABELS
from raycv.retry import cause_of

if TYPE_CHECKING:
    from peft import PeftModel

MANIFEST = "raycv.json"
WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
"""PEFT's names."""
FORMAT = 1
DAMAGED = ("take another fold: fold=<k>", "copy the checkpoint again, or train the fold again")
VERSIONED = ("raycv", "torch", "transformers", "peft")


@dataclass(frozen=True)
class CheckpointInfo:
    """`raycv.json`: with it, training and inference cannot drift apart. Holds no text of posts or criteria."""

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
    precision: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "format": FORMAT,
            **asdict(self),
            "template": TEMPLATE,
            "labels": {str(label): name for label, name in enumerate(LABELS)},
            "versions": {name: metadata.version(name) for name in VERSIONED},
        }


def save_checkpoint(folder: Path, model: "PeftModel", tokenizer: Any, info: CheckpointInfo) -> None:
    """Writes adapter and head (safetensors), tokenizer, and last of all the manifest: its presence means complete."""
    config = model.peft_config["default"]
    # Not the snapshot folder that it was loaded from, which nobody else has.
    config.base_model_name_or_path = info.base_model
    config.revision = info.base_revision
    # The embeddings are frozen: looking on the hub whether the vocabulary grew would only cost a request.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT's empty model card, which names the folder that the base was loaded from.
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    write_json(folder / MANIFEST, info.to_json())


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
        fields = {name: values[name] for name in CheckpointInfo.__dataclass_fields__ if name != "rules"}
        return CheckpointInfo(rules=PromptRules(**values["rules"]), **fields)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{manifest} is damaged: {error} is missing or not what it should be.", remedies=DAMAGED
        ) from error


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

    from raycv.dora import use_factored
    from raycv.model import float32_head

    for each in (folder, *more):
        _check_weights(each)
    float32_head(base)
    current = folder
    try:
        config = use_factored(LoraConfig.from_pretrained(str(folder)))
        model = PeftModel.from_pretrained(base, str(folder), config=config)
        for number, current in enumerate(more, 1):
            model.load_adapter(str(current), adapter_name=f"other_{number}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"The adapter in {current} cannot be loaded: {cause_of(error)}", remedies=DAMAGED) from error
    return model.eval()
