"""Chooses the precision of training and the modules that get DoRA, adds a float32 head, freezes everything else."""

import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from raycv.common.retry import cause_of
from raycv.config.schema import DoraConfig, ModelConfig
from raycv.errors import UserError
from raycv.model.attention import choose_attention
from raycv.model.dora import factored_layers, start_at_the_base, use_factored, without_autocast

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Precision = Literal["bf16", "fp32"]

POOLER = "pooler"


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
    """Returns the precision that training uses, and the reason in words for the log (FR-007)."""
    if asked == "fp32":
        return "fp32", "fp32 as asked"
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return "bf16", "bf16 autocast on the GPU"
    if asked == "bf16":
        return "bf16", "bf16 autocast as asked (slow on most CPUs)"
    return "fp32", "fp32: no GPU with bf16 support was found"


def base_dtype(precision: Precision) -> torch.dtype:
    """Returns the type in which the frozen base is loaded."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def check_model(config: Any, model: ModelConfig) -> None:
    """Checks, without loading weights, that the classifier of a transformers `config` can take DoRA.

    Raises:
        UserError: The classifier has no classification head, or lacks one of the target modules.
    """
    config = copy.deepcopy(config)
    # Not the config's own wish, such as flash_attention_2, which may not be installed: raycv chooses the attention.
    config._attn_implementation = choose_attention(config)[0]
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except Exception as error:  # transformers raises anything, from AssertionError to ZeroDivisionError
        raise UserError(
            f"The config of {model.name} describes no classifier that transformers can build: {cause_of(error)}",
            kind="base-unsuitable",
            remedies=["correct the model's config.json", "choose another base model: model.name=<hub id or folder>"],
        ) from error
    _check_targets(classifier, model, head_modules(classifier))


def add_dora(model: "PreTrainedModel", config: ModelConfig, dora: DoraConfig) -> "PeftModel":
    """Freezes `model`, adds DoRA to `config.target_modules`, and makes the head trainable in float32.

    DoRA: Liu et al. 2024, arXiv 2402.09353. The adapters are float32 for every type of the base.

    Raises:
        UserError: The model has no classification head, or lacks one of the target modules.
    """
    head = head_modules(model)
    _check_targets(model, config, head)
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
        # trained in full.
        exclude_modules="|".join(rf"{re.escape(name)}(\..*)?" for name in head),
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


def head_modules(model: nn.Module) -> list[str]:
    """Returns the names of the modules of the classification head, which are trained and saved in full.

    The head is every module with parameters that does not belong to the backbone.
    The backbone's pooler counts as part of the head. Many checkpoints lack it, and it is then as new as the rest of the
    head.

    Raises:
        UserError: `model` has no head beside its backbone.
    """
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    names = [name for name, child in model.named_children() if child is not backbone and list(child.parameters())]
    if backbone is None or not names:
        raise UserError(
            f"{type(model).__name__} has no classification head beside its backbone, so there is nothing to train.",
            kind="base-unsuitable",
            remedies=["choose a base model whose AutoModelForSequenceClassification has one, as Llama and BERT do"],
        )
    pooler = getattr(backbone, POOLER, None)
    return names + ([f"{prefix}.{POOLER}"] if isinstance(pooler, nn.Module) and list(pooler.parameters()) else [])


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


def _check_targets(model: nn.Module, config: ModelConfig, head: list[str]) -> None:
    if config.target_modules == "all-linear":
        return
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not any(f"{name}.".startswith(f"{part}.") for part in head)
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
