"""Chooses the precision of training and the modules that get DoRA, adds a float32 head, freezes everything else."""

import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from raycv.common.retry import cause_of
from raycv.config.schema import DoraConfig, ModelConfig
from raycv.data.types import LABELS
from raycv.errors import UserError, counted, shown
from raycv.model.base_files import CONFIG
from raycv.model.dora import factored_layers, start_at_the_base, use_factored, without_autocast

if TYPE_CHECKING:
    from peft import PeftModel

Precision = Literal["bf16", "fp32"]

WORTH_SAYING = 1.5
"""How many times as fast bf16 must be before `auto` mentions it on a CPU. Training is more than products."""
POOLER = "pooler"
WHOLE_CHUNKS = ("reformer",)
"""Model types whose training refuses rows of other lengths than a multiple of their chunks."""
OTHER_FAMILY = (
    "choose a base model of another family, such as Llama, Qwen3, Gemma 3 or BERT: model.name=<hub id or folder>"
)
COMPUTED = (".inv_freq", ".masked_bias", ".position_ids")
"""Endings of buffers that old files hold, although the model computes them."""


class Float32Head(nn.Linear):
    """A linear head that computes in float32, also within autocast.

    In bf16, small updates of the head vanish and its scores fall on a coarse grid.
    The parameters keep the names of `nn.Linear`, so checkpoints stay plain PEFT folders.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Computes the head's output.

        Args:
            hidden: Hidden states [..., in_features], in any float type.

        Returns:
            float32 logits [..., out_features].
        """
        with without_autocast(hidden.device):
            return super().forward(hidden.to(self.weight.dtype))


def choose_precision(asked: Literal["auto", "bf16", "fp32"]) -> tuple[Precision, str]:
    """Returns the precision that training uses, and the reason in words for the log (FR-007).

    On a CPU `auto` is fp32, so that a run has the same numbers on every machine. If bf16 would be faster there, the
    reason names that.
    """
    if asked == "fp32":
        return "fp32", "fp32 as asked"
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return "bf16", "bf16 autocast on the GPU"
    speed = bf16_speed()
    found = f"this CPU multiplies bf16 {speed:.1f} times as fast as fp32"
    if asked == "bf16":
        return "bf16", f"bf16 autocast as asked; {found}"
    why = "fp32: no GPU with bf16 support was found"
    return "fp32", f"{why}; {found}, which train.precision=bf16 uses" if speed >= WORTH_SAYING else why


def bf16_speed() -> float:
    """Times a product of matrices on the CPU, in some milliseconds: how many times as fast bf16 is as float32."""

    def seconds(dtype: torch.dtype) -> float:
        # Ones take no random numbers, so a seed that is set gives the same ones afterwards.
        x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        taken = []
        for _ in range(4):
            started = time.perf_counter()
            functional.linear(x, weight)
            taken.append(time.perf_counter() - started)
        return min(taken)

    return seconds(torch.float32) / seconds(torch.bfloat16)


def base_dtype(precision: Precision) -> torch.dtype:
    """Returns the type in which the frozen base is loaded."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def check_model(config: Any, model: ModelConfig) -> None:
    """Checks, without loading weights, that the classifier of a prepared transformers `config` can take DoRA.

    Raises:
        UserError: The classifier has no classification head, or lacks one of the target modules.
    """
    if config.model_type in WHOLE_CHUNKS:
        raise UserError(
            f"raycv cannot train {model.name}: its model_type is {shown(config.model_type)}, whose training takes only "
            "rows of whole chunks of tokens, and prompts have any length.",
            kind="base-unsuitable",
            remedies=[OTHER_FAMILY],
        )
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"transformers has no classifier of texts (AutoModelForSequenceClassification) for {model.name}, whose "
            f"model_type is {shown(config.model_type)}.",
            kind="base-unsuitable",
            remedies=[OTHER_FAMILY],
        )
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except Exception as error:  # transformers raises anything, from AssertionError to ZeroDivisionError
        raise UserError(
            f"The config of {model.name} describes no classifier that transformers can build: {cause_of(error)}",
            kind="base-unsuitable",
            remedies=["correct the model's config.json", "choose another base model: model.name=<hub id or folder>"],
        ) from error
    _check_targets(classifier, model, [*head_modules(classifier), *_beside_the_text(classifier)])


def add_dora(model: "PreTrainedModel", config: ModelConfig, dora: DoraConfig) -> "PeftModel":
    """Freezes `model`, adds DoRA to `config.target_modules`, and makes the head trainable in float32.

    DoRA: Liu et al. 2024, arXiv 2402.09353. The adapters are float32 for every type of the base.

    Raises:
        UserError: The model has no classification head, or lacks one of the target modules.
    """
    head = head_modules(model)
    elsewhere = [*head, *_beside_the_text(model)]
    _check_targets(model, config, elsewhere)
    float32_head(model)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        use_dora=True,
        r=dora.r,
        lora_alpha=dora.alpha,
        lora_dropout=dora.lora_dropout,
        target_modules=config.target_modules,
        modules_to_save=head,
        # `all-linear`, or a name like `dense`, would also match the head's own layers. We exclude these, since they are
        # trained in full. Layers for images would get adapters that no gradient reaches.
        exclude_modules="|".join(rf"{re.escape(name)}(\..*)?" for name in elsewhere),
    )
    if dora.implementation == "factored":
        use_factored(lora)
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=True)
    for layer in factored_layers(adapted):
        layer.dropout_path = dora.dropout
    start_at_the_base(adapted)
    for parameter in trainable(adapted):
        parameter.data = parameter.data.float()
    return adapted


def backbone_name(model: nn.Module) -> str | None:
    """Returns the name of the backbone in a classifier, or None if it has none."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        return prefix
    # Models that also read images have an empty prefix.
    names = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    return names[0] if len(names) == 1 else None


def _beside_the_text(model: Any) -> list[str]:
    """Returns the names of the backbone's parts that text does not pass: the tower and projector of images."""
    if not hasattr(model.config, "text_config"):
        return []
    prefix, embedding = backbone_name(model), model.get_input_embeddings()
    children = model.get_submodule(prefix).named_children()
    return [f"{prefix}.{name}" for name, child in children if all(part is not embedding for part in child.modules())]


def head_modules(model: nn.Module) -> list[str]:
    """Returns the names of the modules of the classification head, which are trained and saved in full.

    The head is every module with parameters that does not belong to the backbone.
    The backbone's pooler counts as part of the head. Many checkpoints lack it, and it is then as new as the rest of the
    head.

    Raises:
        UserError: `model` has no head beside its backbone.
    """
    prefix = backbone_name(model)
    names = [name for name, child in model.named_children() if name != prefix and list(child.parameters())]
    if prefix is None or not names:
        raise UserError(
            f"{type(model).__name__} has no classification head beside its backbone, so there is nothing to train.",
            kind="base-unsuitable",
            remedies=["choose a base model whose AutoModelForSequenceClassification has one, as Llama and BERT do"],
        )
    pooler = getattr(model.get_submodule(prefix), POOLER, None)
    return names + ([f"{prefix}.{POOLER}"] if isinstance(pooler, nn.Module) and list(pooler.parameters()) else [])


def check_loaded(
    model: Any, found: Mapping[str, Any], name: str, shapes: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> set[str]:
    """Returns the keys that the checkpoint lacks, after checking that they all belong to the head.

    transformers only warns of missing keys, and would train random values.

    Args:
        model: The classifier that transformers loaded.
        found: Its report about the keys: `missing_keys`, `mismatched_keys`, `unexpected_keys`.
        name: The base model's name, for the message.
        shapes: The shape of each tensor of the weights, for the message, as far as it is known.

    Raises:
        UserError: A key of the backbone is missing or has another shape, or the checkpoint has layers that the model
            lacks.
    """
    head = tuple(f"{part}." for part in head_modules(model))
    lacking = [*found["missing_keys"], *found["mismatched_keys"]]
    broken = sorted(key for key in lacking if not key.startswith(head))
    if broken:
        first = broken[0]
        raise UserError(
            f"The weights of {name} do not fit its {CONFIG}: missing or of another shape: "
            f"{counted(len(broken), 'tensor')}, the first being {first}. It is {_shape(first, shapes)} in the weights, "
            f"and {list(model.state_dict()[first].shape)} by {CONFIG}.",
            kind="base-files",
            remedies=["copy or download the model again", "check that config and weights belong together"],
        )
    left = _left_out(model, f"{backbone_name(model)}.", found["unexpected_keys"])
    if left:
        raise UserError(
            f"The weights of {name} do not fit its {CONFIG}: the model that it describes has no "
            f"place for {counted(len(left), 'tensor')} of the weights, the first being {left[0]}.",
            kind="base-files",
            remedies=["copy or download the model again", "check that config and weights belong together"],
        )
    return set(lacking)


def _shape(key: str, shapes: Mapping[str, Sequence[int]]) -> str:
    """Returns the shape of a tensor in the weights. A bare backbone names it without the first parts of `key`."""
    parts = key.split(".")
    named = (".".join(parts[start:]) for start in range(len(parts)))
    return next((str(list(shapes[name])) for name in named if name in shapes), "missing" if shapes else "another")


def _left_out(model: Any, prefix: str, unexpected: Iterable[str]) -> list[str]:
    """Returns the `unexpected` keys that belong to layers of the backbone. Without these it is another model.

    The heads of other tasks may be left out, and so may old buffers (`inv_freq`), which are computed.

    Args:
        model: The classifier.
        prefix: The beginning of the names of its backbone's tensors.
        unexpected: The keys of the checkpoint that have no place in `model`.
    """

    def is_of_a_layer(key: str) -> bool:
        # The keys of a bare backbone lack the prefix, so we add it.
        named = key if key.startswith(prefix) else prefix + key
        return re.sub(r"\.\d+\.", ".#.", named) in kinds or (
            key.startswith(prefix) and re.search(r"\.\d+\.", key) is not None and not key.endswith(COMPUTED)
        )

    kinds = {re.sub(r"\.\d+\.", ".#.", key) for key in model.state_dict()}
    return sorted(key for key in unexpected if is_of_a_layer(key))


def renew_head(model: nn.Module, lacking: Collection[str], seed: int) -> None:
    """Draws the linear layers that the checkpoint lacks, and always the last layer.

    Weights are normal and biases are zero, as in transformers.

    Args:
        model: A classifier of transformers.
        lacking: The names of the tensors that the checkpoint lacks.
        seed: The seed of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", 0.02)
    backbone = f"{backbone_name(model)}."
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        in_backbone = name.startswith(backbone)
        if f"{name}.weight" in lacking or (module.out_features == len(LABELS) and not in_backbone):
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
                if module.bias is not None:
                    module.bias.zero_()


def float32_head(model: nn.Module) -> None:
    """Replaces the head's linear layers by `Float32Head`, and converts the rest of the head to float32."""
    for name in head_modules(model):
        head = model.get_submodule(name).float()
        inner = [f"{name}.{part}".rstrip(".") for part, module in head.named_modules() if type(module) is nn.Linear]
        for linear in inner:
            model.set_submodule(linear, _in_float32(model.get_submodule(linear)))


def _in_float32(linear: nn.Module) -> Float32Head:
    assert isinstance(linear, nn.Linear)
    with torch.device("meta"):
        replacement = Float32Head(linear.in_features, linear.out_features, bias=linear.bias is not None)
    replacement.weight, replacement.bias = linear.weight, linear.bias
    return replacement.train(linear.training)


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters that training changes."""
    return (parameter for _, parameter in trainable_by_name(model))


def trainable_by_name(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters of `trainable` with their names, in the same order."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Returns the number of all parameters and that of the trainable ones."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(parameter.numel() for parameter in trainable(model)),
    }


def _check_targets(model: nn.Module, config: ModelConfig, elsewhere: list[str]) -> None:
    if config.target_modules == "all-linear":
        return
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not any(f"{name}.".startswith(f"{part}.") for part in elsewhere)
    }
    missing = [
        target for target in config.target_modules if not any(f".{name}".endswith(f".{target}") for name in linear)
    ]
    if missing:
        names = sorted({name.rpartition(".")[2] for name in linear})
        raise UserError(
            f"model.target_modules: {', '.join(missing)} not found in {type(model).__name__} ({config.name}).",
            kind="base-unsuitable",
            remedies=[f"choose among its linear modules: {', '.join(names)}", "model.target_modules=all-linear"],
        )
