"""A trained fold on disk: a plain PEFT folder (adapter, head, tokenizer) and `raycv.json`, what inference must know."""

from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycv.errors import UserError
from raycv.paths import read_json, write_json
from raycv.prompts import TEMPLATE, PromptRules
from raycv.records import LABELS

if TYPE_CHECKING:
    from peft import PeftModel

MANIFEST = "raycv.json"
FORMAT = 1
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
    if values.get("format") != FORMAT:
        raise UserError(
            f"{manifest} has format {values.get('format')!r}; this raycv reads format {FORMAT}.",
            remedies=["use the version of raycv that made it: see versions in the file"],
        )
    fields = {name: values[name] for name in CheckpointInfo.__dataclass_fields__ if name != "rules"}
    return CheckpointInfo(rules=PromptRules(**values["rules"]), **fields)


def load_adapter(base: Any, folder: Path, *more: Path) -> "PeftModel":
    """`base` (a classifier without adapters) with the adapter and head of `folder`, in evaluation mode.

    Those of `more` folders lie beside it under names of their own; `folder`'s is the active one.
    """
    from peft import LoraConfig, PeftModel

    from raycv.dora import use_factored
    from raycv.model import float32_head

    float32_head(base)
    config = use_factored(LoraConfig.from_pretrained(str(folder)))
    model = PeftModel.from_pretrained(base, str(folder), config=config)
    for number, other in enumerate(more, 1):
        model.load_adapter(str(other), adapter_name=f"other_{number}")
    return model.eval()
