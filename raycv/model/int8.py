"""Linear layers that multiply in 8 bits on a CPU: dynamic, symmetric, a scale per row of weights and per token.

They use torch's own `torch._int_mm`, which torchao's int8 uses as well. docs/concepts/int8.md compares the libraries.
On CPUs without AMX, torchao sums the weights again in every call. `torch.ao.quantization` is about to be removed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from raycv.errors import UserError

LEVELS = 127
"""The largest magnitude of a code. -128 is unused, so that scales are symmetric."""
BLOCK = 2**19
"""Numbers of a layer's input or output that are converted at a time."""


class Int8Linear(nn.Module):
    """Computes `y = W x + bias` with W in int8 and x rounded to int8 token by token. Sums are exact, in int32."""

    codes: torch.Tensor
    """int8 [out, in]"""
    scale: torch.Tensor
    """float32 [out]"""
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        """Rounds the weights of `linear`, which may be of any float type. A float32 copy exists meanwhile."""
        super().__init__()
        weight = linear.weight.detach().float()
        scale = _scale(weight)
        self.register_buffer("codes", (weight / scale).round_().to(torch.int8))
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the layer.

        Args:
            x: Activations [..., in].

        Returns:
            [..., out] in the type of `x`.
        """
        rows = x.reshape(-1, x.shape[-1])
        codes = rows.new_empty(rows.shape, dtype=torch.int8)
        scale = rows.new_empty(len(rows), 1, dtype=torch.float32)
        for part, codes_of, scale_of in _blocks(rows, codes, scale):
            scale_of.copy_(_scale(part))
            codes_of.copy_(part.to(torch.float32, copy=True).mul_(scale_of.reciprocal()).round_())
        sums = torch._int_mm(codes, self.codes.t())
        out = rows.new_empty(sums.shape)
        for part, out_of, scale_of in _blocks(sums, out, scale):
            product = part.float().mul_(self.scale).mul_(scale_of)
            out_of.copy_(product if self.bias is None else product.add_(self.bias))
        return out.reshape(*x.shape[:-1], -1)


def _blocks(rows: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields `rows` and `others`, all [n, ...], a few rows at a time, so that a block stays in the CPU's cache."""
    size = max(1, BLOCK // rows.shape[1])
    return zip(*(each.split(size) for each in (rows, *others)), strict=True)


def _scale(rows: torch.Tensor) -> torch.Tensor:
    """Returns the value of a code of 1 in each row of `rows` [n, m], as float32 [n, 1]."""
    # A row of zeros has codes of zero at any scale, so its scale only needs to be above 0.
    return rows.abs().amax(dim=1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny * LEVELS) / LEVELS


def check_int8(device: torch.device, folds: int) -> None:
    """Checks that int8 is possible and fast.

    Args:
        device: The device that computes.
        folds: The number of checkpoints.

    Raises:
        UserError: `device` is not a CPU, the CPU lacks 8-bit products, or there are several checkpoints.
    """
    asked = "infer.precision=int8"
    if device.type != "cpu":
        raise UserError(
            f"{asked} computes on a CPU, and this machine has a GPU.",
            kind="config-value",
            remedies=["infer.precision=bf16", "hide the GPU: CUDA_VISIBLE_DEVICES= python -m raycv.infer ..."],
        )
    if not has_fast_int8():
        raise UserError(
            f"{asked}: this CPU has no 8-bit products (AVX-512 VNNI or AMX), so it would be slower than float32.",
            kind="config-value",
            remedies=["infer.precision=auto"],
        )
    if folds > 1:
        raise UserError(
            f"{asked} merges a fold's adapter into the weights, so the ensemble would hold {folds} whole models.",
            kind="config-value",
            remedies=["take one fold: fold=best", "infer.precision=auto, where all folds share one base"],
        )


def has_fast_int8() -> bool:
    """Returns whether this CPU multiplies int8 in hardware."""
    return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())


def to_int8(model: Any) -> Any:
    """Merges the adapter of `model` and converts the linear layers to int8. The head stays unchanged.

    PEFT merges in float32 and layer by layer, so a second copy of the model never exists.

    Args:
        model: A `PeftModel` with one adapter. It cannot be used afterwards.

    Returns:
        The classifier inside `model`, in evaluation mode.

    Raises:
        UserError: The classifier has no linear layer outside its head.
    """
    base = model.get_base_model()
    for name in _names(base, BaseTunerLayer):
        layer: Any = base.get_submodule(name)
        layer.get_base_layer().float()
        layer.merge(safe_merge=True)
        base.set_submodule(name, layer.get_base_layer())
        quantise(base, name)
    classifier = model.unload()  # This takes the trained head out of PEFT's wrapper.
    for name in _names(classifier, nn.Linear):
        quantise(classifier, name)
    if not any(isinstance(module, Int8Linear) for module in classifier.modules()):
        raise UserError(
            f"infer.precision=int8: {type(classifier).__name__} has no nn.Linear outside its head.",
            kind="base-unsuitable",
            remedies=["infer.precision=auto"],
        )
    return classifier.eval()


def _names(classifier: nn.Module, kind: type) -> list[str]:
    """Returns the names of the modules of `kind`. A list of the modules would keep replaced ones in memory."""
    return [name for name, module in classifier.named_modules() if isinstance(module, kind)]


def quantise(classifier: nn.Module, name: str) -> None:
    """Replaces the plain linear layer `name` by an `Int8Linear`. Layers of the head are `Float32Head`, and stay."""
    linear = classifier.get_submodule(name)
    if type(linear) is nn.Linear:
        classifier.set_submodule(name, Int8Linear(linear))
