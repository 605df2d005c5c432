"""DoRA's linear layer without its waste: the same function, parameters and checkpoints as PEFT's, computed faster.

DoRA (Liu et al. 2024, arXiv 2402.09353): y = gamma * (W x + s B A x) + bias, gamma = m / ||W + s B A|| row by row, the
norm a constant for the gradient (its section 4.3). Per forward, PEFT multiplies an identity by A and B to get a dense
B A, adds it to W and takes row norms, and with dropout it computes W x a second time. Here

- the norm is factored, ||W + s B A||^2 = ||W||^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum((B (A A^T)) * B), so that no
  dense B A exists, and computed once per change of A or B: once per optimizer step, not per micro-batch or recompute;
- dropout acts on the low-rank path alone (`lora_path`, as in torchtune), which needs W x once; `peft` is the original;
- GPT-2's Conv1D, a linear layer with its weights transposed, is one too.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.lora import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

DropoutPath = Literal["lora_path", "peft"]

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Weights that are turned to float32 at a time while a norm is computed: 16 MB, or 256 MB of a GPU, whose launches
would take longer than its work."""


class Parts(NamedTuple):
    """The tensors of one DoRA layer."""

    weight: torch.Tensor
    """[out, in], frozen"""
    bias: torch.Tensor | None
    """[out], frozen"""
    a: torch.Tensor
    """[r, in]"""
    b: torch.Tensor
    """[out, r]"""
    magnitude: torch.Tensor
    """[out]"""


class Ready(NamedTuple):
    """What a forward takes of a layer's parameters; from `gamma` on in the type of the activations."""

    norm: torch.Tensor
    """[out], float32 at least: ||W + s B A||"""
    scaling: torch.Tensor
    """[1], likewise: s"""
    gamma: torch.Tensor
    """[out]: m / norm"""
    excess: torch.Tensor
    """[out]: gamma - 1, rounded after the difference"""
    a: torch.Tensor
    """[r, in]"""
    up: torch.Tensor
    """[out, r]: s B"""


class _Product(torch.autograd.Function):
    """gamma * (W x + s B A x'), where x' is x after dropout, and its gradients with the norm as a constant.

    By hand, since each pass over the activations and, on a GPU, each kernel's launch counts: autograd would make a
    graph of the small tensors too, and add up the two parts of the gradient of x in two more passes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        magnitude: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: torch.Tensor,
        ready: Ready,
        probability: float,
        path: DropoutPath,
    ) -> torch.Tensor:
        """`x`: [..., in]; `probability`: of dropout; `path`: peft, where gamma - 1 scales W x' and not W x.

        Returns [n, out], a row for each of the n vectors in `x`.
        """
        rows, cast = x.reshape(-1, x.shape[-1]), weight.to(x.dtype)
        low, kept, scale = dropout(rows, probability, as_peft=path == "peft") if probability else (rows, None, 1.0)
        hidden = functional.linear(low, ready.a)
        unscaled = functional.linear(rows, cast).addmm_(hidden, ready.up.T)
        # gamma t = t + (gamma - 1) t: in bf16 gamma itself would lose what gamma - 1 keeps, and the activations need
        # not be turned to float32 and back.
        base_too = kept is not None and path == "peft"
        apart = base_too or x.dtype.itemsize < 4
        out = unscaled
        if base_too:
            unscaled = functional.linear(low, cast).addmm_(hidden, ready.up.T)
        out = torch.addcmul(out, unscaled, ready.excess) if apart else unscaled * ready.gamma
        ctx.save_for_backward(low, hidden, unscaled, kept)
        # Not saved for backward, which costs checkpointing a hook for each of them twice: nothing changes them in
        # between. The weights as they are: a copy in the type of `x` would be kept for each layer.
        ctx.weight, ctx.ready = weight, ready
        ctx.scale, ctx.base_too, ctx.apart, ctx.shape = scale, base_too, apart, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`grad`: [n, out]."""
        with without_autocast(grad.device):
            return _Product._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, hidden, unscaled, kept = ctx.saved_tensors
        weight, ready = ctx.weight.to(grad.dtype), ctx.ready
        of_magnitude = (grad * unscaled).sum(dim=0, dtype=ready.norm.dtype) / ready.norm
        scaled = torch.addcmul(grad, grad, ready.excess) if ctx.apart else grad * ready.gamma
        of_b = (scaled.T @ hidden) * ready.scaling
        of_hidden = scaled @ ready.up
        of_a = of_hidden.T @ low
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_hidden @ ready.a
            if ctx.base_too:
                of_x.addmm_(grad * ready.excess, weight)
            if kept is not None:
                of_x = _where_kept(of_x, kept, ctx.scale)
            of_x = of_x.addmm_(grad if ctx.base_too else scaled, weight).reshape(ctx.shape)
        return of_x, of_magnitude, of_a, of_b, None, None, None, None


def dropout(x: torch.Tensor, probability: float, *, as_peft: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`x` after dropout, where it was kept (bool), and what was kept is multiplied with.

    On a CPU drawing the mask takes longer than all else: there 16 random bits are drawn for an element, and not 32 to
    64 (`probability` is rounded to a multiple of 2^-16, and the scale follows); `as_peft`: the draws of PEFT's dropout.
    """
    if as_peft or x.device.type != "cpu" or probability > 1 - 2**-16:
        return *torch.native_dropout(x, probability, True), 1 / (1 - probability) if probability < 1 else 0.0
    dropped = round(probability * 2**16)
    bits = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), device=x.device).view(torch.int16)
    kept = (bits[: x.numel()] >= dropped - 2**15).view_as(x)
    scale = 2**16 / (2**16 - dropped)
    return _where_kept(x, kept, scale), kept, scale


def _where_kept(x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
    """x * kept * scale, on a GPU by one kernel: it is the gradient of dropout, and what dropout returns."""
    return torch.ops.aten.native_dropout_backward(x, kept, scale)


_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# A fused optimizer, as AdamW(fused=True), does not count up the versions of the tensors that it updates.
register_optimizer_step_post_hook(_count_step)


class Norms:
    """What a layer has computed of its weights. Copies and pickles of a layer start without."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[object, torch.Tensor]] = {}
        """||W + s B A|| of each adapter"""
        self.ready: dict[tuple[str, torch.dtype], tuple[object, Ready]] = {}
        """what a forward in a type takes of the parameters"""
        self.base: tuple[object, torch.Tensor] | None = None
        """||W||^2"""

    def __reduce__(self) -> tuple[type["Norms"], tuple[()]]:
        return Norms, ()


class FactoredDoraLinear(PeftLoraLinear):
    """PEFT's DoRA linear layer with another forward. Anything but plain DoRA of one adapter is left to PEFT's."""

    dropout_path: DropoutPath = "lora_path"

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        layer = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        # In the shared config, as PEFT does, so that the same is saved.
        config.fan_in_fan_out = isinstance(layer, Conv1D)
        kwargs["is_target_conv_1d_layer"] = config.fan_in_fan_out
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self._norms = Norms()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x`: [..., in]; returns [..., out] in the type of the base layer's output."""
        adapter = self._plain_adapter(kwargs)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        parts, dtype = self.parts(adapter), _computed_in(x)
        ready = self._ready(adapter, parts, dtype)
        module: Any = self.lora_dropout[adapter]
        probability = module.p if module.training and isinstance(module, nn.Dropout) else 0.0
        rows = _Product.apply(
            x.to(dtype),
            parts.magnitude,
            parts.a,
            parts.b,
            parts.weight,
            ready,
            probability,
            self.dropout_path,
        )
        # Not within the product: what that returns as a view could not be changed in place, as OLMo changes it.
        out = rows.reshape(*x.shape[:-1], rows.shape[-1])
        return out if parts.bias is None else out + parts.bias.to(out.dtype)

    def parts(self, adapter: str) -> Parts:
        """The layer's tensors, from where PEFT keeps them."""
        base: Any = self.get_base_layer()
        a: Any = self.lora_A[adapter]
        b: Any = self.lora_B[adapter]
        magnitude: Any = self.lora_magnitude_vector[adapter]
        weight = base.weight.T if self.fan_in_fan_out else base.weight
        return Parts(weight, base.bias, a.weight, b.weight, magnitude.weight)

    def _ready(self, adapter: str, parts: Parts, dtype: torch.dtype) -> Ready:
        """What the forward takes of the parameters, made once per change of them: once per optimizer step."""
        weight, _, a, b, magnitude = parts
        scaling = self.scaling[adapter]
        key = _state(weight, a, b, magnitude, scaling, _optimizer_steps)
        kept = self._norms.ready.get((adapter, dtype))
        if kept is not None and key is not None and kept[0] == key:
            return kept[1]
        with torch.inference_mode(False), torch.no_grad(), without_autocast(weight.device):
            norm = self.row_norm(adapter)
            gamma = magnitude / norm
            ready = Ready(
                norm=norm,
                scaling=torch.full_like(norm[:1], scaling),
                gamma=gamma.to(dtype),
                excess=(gamma - 1).to(dtype),
                a=a.to(dtype, copy=True),  # so that backward has what forward had, whatever becomes of A
                up=(scaling * b).to(dtype),
            )
        self._norms.ready[adapter, dtype] = (key, ready)
        return ready

    def row_norm(self, adapter: str) -> torch.Tensor:
        """||W + s B A|| of each row, [out], float32 at least; kept until A, B, W or s change, or an optimizer steps.

        Other changes that autograd does not see (`tensor.data.mul_`) are not seen here either.
        """
        weight, _, a, b, _ = self.parts(adapter)
        scaling = self.scaling[adapter]
        key = _state(weight, a, b, scaling, _optimizer_steps)
        kept = self._norms.rows.get(adapter)
        if kept is not None and key is not None and kept[0] == key:
            return kept[1]
        # Not an inference tensor, whoever asks first: training may use it later.
        with torch.inference_mode(False), torch.no_grad(), without_autocast(weight.device):
            norm = factored_norm(weight, self._square_norm(weight), a, b, scaling)
        self._norms.rows[adapter] = (key, norm)
        return norm

    def _square_norm(self, weight: torch.Tensor) -> torch.Tensor:
        """||W||^2 of each row: the base is frozen, so once."""
        key, kept = _state(weight), self._norms.base
        if kept is not None and key is not None and kept[0] == key:
            return kept[1]
        square = torch.cat([chunk.square().sum(dim=1) for chunk in _chunks(weight)])
        self._norms.base = (key, square)
        return square

    def _plain_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The one active DoRA adapter, if there is nothing else to mind."""
        plain = not self.disable_adapters and not self.merged and len(self.active_adapters) == 1
        if not plain or kwargs.get("adapter_names") is not None:
            return None
        adapter = self.active_adapters[0]
        if adapter not in self.lora_magnitude_vector or self.lora_bias[adapter]:
            return None
        return adapter


def _state(*values: torch.Tensor | float) -> object:
    """What equals another state only if `values` are what they were; None for tensors whose changes are not counted.

    In-place updates, as optimizers and load_state_dict make them, count up a tensor's version. A storage is known by a
    weak reference: the address of one that is gone may be another's, and a reference would keep it in memory.
    """
    if any(isinstance(value, torch.Tensor) and value.is_inference() for value in values):
        return None
    return tuple(
        (StorageWeakRef(value.untyped_storage()), value.storage_offset(), value._version)
        if isinstance(value, torch.Tensor)
        else value
        for value in values
    )


def _computed_in(x: torch.Tensor) -> torch.dtype:
    """The type that a product of `x` is computed in: autocast's, where it is on."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Computes in the tensors' own types; a device that knows no autocast (meta) needs nothing."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def factored_norm(
    weight: torch.Tensor, square_norm: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Row norms of W + s B A without B A: factored norms, arXiv 2603.22276.

    `weight` [out, in], `square_norm` [out]: ||W||^2, `a` [r, in], `b` [out, r]; returns [out], float32 at least.
    """
    a, b = a.to(square_norm.dtype), b.to(square_norm.dtype)
    cross = torch.cat([chunk @ a.T for chunk in _chunks(weight)])
    square = square_norm + 2 * scaling * (b * cross).sum(dim=1) + scaling**2 * ((b @ (a @ a.T)) * b).sum(dim=1)
    # Rounding may take a row that A and B cancel below zero; and one of zeros shall be scaled to zeros, not to 0/0.
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def _chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Groups of rows of `weight` in float32 (float64 stays)."""
    elements = CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS["cpu"])
    rows = max(1, elements // weight.shape[1])
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for start in range(0, weight.shape[0], rows):
        yield weight[start : start + rows].to(dtype)


def use_factored(config: LoraConfig) -> LoraConfig:
    """Makes PEFT build FactoredDoraLinear for linear layers and Conv1D, by its extension point for custom modules.

    The mapping lives in memory only: what PEFT saves, and what stock PEFT opens, is a plain DoRA adapter.
    """
    config._register_custom_module({nn.Linear: FactoredDoraLinear, Conv1D: FactoredDoraLinear})
    return config


def factored_layers(model: nn.Module) -> list[FactoredDoraLinear]:
    """The layers of `model` that compute DoRA here and not in PEFT."""
    return [module for module in model.modules() if isinstance(module, FactoredDoraLinear)]


def start_at_the_base(model: nn.Module) -> None:
    """Sets fresh magnitudes to the row norms in float32, so that gamma is 1 and the untrained model is the base.

    PEFT takes them in the type of the weights: with a bf16 base every row would start up to 0.4 % off.
    """
    for layer in factored_layers(model):
        for adapter in layer.lora_magnitude_vector:
            layer.parts(adapter).magnitude.data = layer.row_norm(adapter).clone()
