"""DoRA's linear layer, faster than PEFT's: the same function, parameters and checkpoints.

DoRA (Liu et al. 2024, arXiv 2402.09353) computes `y = gamma * (W x + s B A x) + bias`.
Row by row, `gamma = m / ||W + s B A||`. The gradient treats this norm as a constant (its section 4.3).

In each forward, PEFT multiplies an identity by A and B to get a dense `B A`, adds it to W and takes row norms.
With dropout, PEFT computes `W x` a second time. This layer saves that work:

- The norm is factored, so that no dense `B A` exists:
  `||W + s B A||^2 = ||W||^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum((B (A A^T)) * B)`.
- Within `prepared`, the norm is computed once per optimizer step, not per micro-batch or recomputation.
  Outside of it a layer keeps nothing between two forwards, so no write to the weights can make it wrong.
- Dropout acts on the low-rank path only (`lora_path`, as in torchtune), which needs `W x` once. The path `peft`
  computes PEFT's original dropout.
- GPT-2's `Conv1D`, a linear layer with transposed weights, is supported as well.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.lora import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable
from torch.func import debug_unwrap
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

DropoutPath = Literal["lora_path", "peft"]

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Elements of the weights that are converted to float32 at a time while a norm is computed. These are 16 MB on a CPU,
and 256 MB on a GPU, where launches of smaller chunks would take longer than their work."""


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
    """The values that a forward takes from a layer's parameters.

    From `gamma` on, they have the type of the activations.
    """

    norm: torch.Tensor
    """[out], at least float32: `||W + s B A||`"""
    scaling: torch.Tensor
    """[1], at least float32: s"""
    gamma: torch.Tensor
    """[out]: m / norm"""
    excess: torch.Tensor
    """[out]: gamma - 1, rounded after the difference"""
    a: torch.Tensor
    """[r, in]"""
    up: torch.Tensor
    """[out, r]: s B"""

    @classmethod
    def of(cls, parts: Parts, scaling: float, square_norm: torch.Tensor) -> "Ready":
        """Returns the values of `parts`, not yet rounded to the type of the activations."""
        norm = factored_norm(parts.weight, square_norm, parts.a, parts.b, scaling)
        gamma = parts.magnitude / norm
        return cls(norm, torch.full_like(norm[:1], scaling), gamma, gamma - 1, parts.a, scaling * parts.b)

    def rounded(self, dtype: torch.dtype) -> "Ready":
        """Returns the values for activations of `dtype`."""
        gamma, excess, up = (value.to(dtype) for value in (self.gamma, self.excess, self.up))
        up = up.T.contiguous().T if _in_mkl(up) else up
        # We copy A, so that backward uses what forward used, even if A changes in between.
        return Ready(self.norm, self.scaling, gamma, excess, self.a.to(dtype, copy=True), up)


class _Product(torch.autograd.Function):
    """Computes `gamma * (W x + s B A x')`, with x' for x after dropout, and its gradients with a constant norm.

    The backward is written by hand, since each pass over the activations and each kernel launch on a GPU costs time.
    Autograd would also build a graph of the small tensors.
    It would add up the two parts of the gradient of x in two more passes.
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
        """Computes the product.

        Args:
            ctx: Autograd's context.
            x: Activations [..., in].
            magnitude: m [out].
            a: A [r, in].
            b: B [out, r].
            weight: W [out, in].
            ready: The values made from these parameters.
            probability: The probability of dropout.
            path: The dropout's path. With `peft`, `gamma - 1` scales `W x'` instead of `W x`.

        Returns:
            [n, out], a row for each of the n vectors in `x`.
        """
        rows, cast = x.reshape(-1, x.shape[-1]), weight.to(x.dtype)
        low, kept, scale = dropout(rows, probability, as_peft=path == "peft") if probability else (rows, None, 1.0)
        hidden = functional.linear(low, ready.a)
        unscaled = functional.linear(rows, cast).addmm_(hidden, ready.up.T)
        # `gamma t = t + (gamma - 1) t`. In bf16 gamma would lose digits that gamma - 1 keeps, so we compute the sum. It
        # also saves a conversion of the activations to float32 and back.
        base_too = kept is not None and path == "peft"
        apart = base_too or x.dtype.itemsize < 4
        out = unscaled
        if base_too:
            unscaled = functional.linear(low, cast).addmm_(hidden, ready.up.T)
        out = torch.addcmul(out, unscaled, ready.excess) if apart else unscaled * ready.gamma
        ctx.save_for_backward(low, hidden, unscaled, kept)
        # Gradient checkpointing calls a hook twice for each tensor that is saved for backward. Nothing changes these
        # tensors in between, so we do not save them that way. We keep the weights themselves, since a copy in the type
        # of `x` would stay in memory for each layer.
        ctx.weight, ctx.ready = weight, ready
        ctx.scale, ctx.base_too, ctx.apart, ctx.shape = scale, base_too, apart, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of the arguments of `forward`, from that of its output: `grad` [n, out]."""
        with without_autocast(grad.device):
            return _Product._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, hidden, unscaled, kept = ctx.saved_tensors
        weight, ready = ctx.weight.to(grad.dtype), ctx.ready
        of_magnitude = (grad * unscaled).sum(dim=0, dtype=ready.norm.dtype) / ready.norm
        scaled = torch.addcmul(grad, grad, ready.excess) if ctx.apart else grad * ready.gamma
        of_b = (hidden.T @ scaled).T if _in_mkl(grad) else scaled.T @ hidden
        of_b = of_b * ready.scaling
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
    """Applies dropout to `x`.

    On a CPU, drawing the mask takes longer than all else. We therefore draw 16 random bits for an element, not 32 to
    64. `probability` is then rounded to a multiple of 2^-16, and the scale follows.

    Args:
        x: Any tensor.
        probability: The probability that an element is dropped.
        as_peft: Makes the same draws as PEFT's dropout, also on a CPU.

    Returns:
        `x` after dropout, the mask of its kept elements (bool), and the factor that scales them.
    """
    if as_peft or x.device.type != "cpu" or probability > 1 - 2**-16:
        return *torch.native_dropout(x, probability, True), 1 / (1 - probability) if probability < 1 else 0.0
    dropped = round(probability * 2**16)
    bits = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), device=x.device).view(torch.int16)
    kept = (bits[: x.numel()] >= dropped - 2**15).view_as(x)
    scale = 2**16 / (2**16 - dropped)
    return _where_kept(x, kept, scale), kept, scale


def _where_kept(x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns `x * kept * scale`, computed by one kernel on a GPU. Both dropout and its gradient are this product."""
    return torch.ops.aten.native_dropout_backward(x, kept, scale)


class Prepared(nn.Module):
    """The values of one adapter in buffers that no checkpoint holds."""

    def __init__(self, parts: Parts, scaling: float, dtype: torch.dtype) -> None:
        super().__init__()
        square = square_norm(parts.weight)
        ready = Ready.of(parts, scaling, square).rounded(dtype)
        for name, value in (ready._asdict() | {"square_norm": square}).items():
            self.register_buffer(name, value, persistent=False)

    def ready(self) -> Ready:
        """Returns the buffers. The next `refresh` writes into them."""
        return Ready(*(self.get_buffer(name) for name in Ready._fields))

    def refresh(self, parts: Parts, scaling: float) -> None:
        """Computes the values again, in place. W counts as unchanged."""
        for buffer, value in zip(self.ready(), Ready.of(parts, scaling, self.get_buffer("square_norm")), strict=True):
            buffer.copy_(value)


class Adapters(nn.ModuleDict):
    """The prepared values of a layer, by adapter. Copies and pickles are empty, since nobody would refresh theirs."""

    def __reduce__(self) -> tuple[type["Adapters"], tuple[()]]:
        return Adapters, ()


class FactoredDoraLinear(PeftLoraLinear):
    """PEFT's DoRA linear layer with a faster forward. PEFT computes all but plain DoRA of one adapter.

    Under `torch.func`, `torch.jit.trace` and forward-mode AD, PEFT computes too, with its own dropout.
    """

    dropout_path: DropoutPath = "lora_path"

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        layer = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        # PEFT writes this into the shared config, so we do the same, and the saved config is the same.
        config.fan_in_fan_out = isinstance(layer, Conv1D)
        kwargs["is_target_conv_1d_layer"] = config.fan_in_fan_out
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.prepared = Adapters()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Computes the layer.

        Args:
            x: Activations [..., in].
            args: Passed to PEFT's forward, if PEFT computes.
            kwargs: Passed likewise.

        Returns:
            [..., out] in the type of the base layer's output.
        """
        adapter = self._plain_adapter(kwargs)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        parts, dtype = self.parts(adapter), _computed_in(x)
        if _transformed(x, *parts):
            return super().forward(x, *args, **kwargs)
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
        # OLMo changes the output in place. A custom function that returns a view forbids this, so we reshape outside of
        # it.
        out = rows.reshape(*x.shape[:-1], rows.shape[-1])
        return out if parts.bias is None else out + parts.bias.to(out.dtype)

    def parts(self, adapter: str) -> Parts:
        """Returns the layer's tensors from the places where PEFT keeps them."""
        base: Any = self.get_base_layer()
        a: Any = self.lora_A[adapter]
        b: Any = self.lora_B[adapter]
        magnitude: Any = self.lora_magnitude_vector[adapter]
        weight = base.weight.T if self.fan_in_fan_out else base.weight
        return Parts(weight, base.bias, a.weight, b.weight, magnitude.weight)

    def prepare(self, dtype: torch.dtype) -> None:
        """Prepares every plain adapter for activations of `dtype`; see `prepared`."""
        if self.merged:  # The base is not W now.
            return
        for adapter in self.lora_magnitude_vector:
            # Training may follow inference, so we never make inference tensors.
            with torch.inference_mode(False), _exactly(self.weight.device):
                self.prepared[adapter] = Prepared(self.parts(adapter), self.scaling[adapter], dtype)

    def refresh(self) -> None:
        """Computes the prepared values again, in place."""
        for adapter in self.prepared.keys() & self.lora_magnitude_vector.keys():
            kept: Any = self.prepared[adapter]
            with torch.inference_mode(False), _exactly(self.weight.device):
                kept.refresh(self.parts(adapter), self.scaling[adapter])

    def _ready(self, adapter: str, parts: Parts, dtype: torch.dtype) -> Ready:
        """Returns the values for a forward: the prepared ones, or those of the weights of this moment."""
        if adapter in self.prepared:
            kept: Any = self.prepared[adapter]
            ready: Ready = kept.ready()
            if ready.a.dtype == dtype:
                return ready
        with _exactly(parts.weight.device):
            return Ready.of(parts, self.scaling[adapter], square_norm(parts.weight)).rounded(dtype)

    def row_norm(self, adapter: str) -> torch.Tensor:
        """Returns `||W + s B A||` of each row, [out], at least float32."""
        weight, _, a, b, _ = self.parts(adapter)
        with _exactly(weight.device):
            return factored_norm(weight, square_norm(weight), a, b, self.scaling[adapter])

    def _plain_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """Returns the only active adapter if it is plain DoRA, or None if PEFT has to compute."""
        plain = not self.disable_adapters and not self.merged and len(self.active_adapters) == 1
        if not plain or kwargs.get("adapter_names") is not None:
            return None
        adapter = self.active_adapters[0]
        if adapter not in self.lora_magnitude_vector or self.lora_bias[adapter]:
            return None
        return adapter


@contextmanager
def prepared(model: nn.Module, dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """Prepares the factored layers of `model`, so that no forward within the block computes a norm.

    The block belongs to the owner of the weights, such as a training loop, which calls `refresh` after each of its
    optimizer's steps. Any other write within the block needs it too. Until then forwards use the earlier values, and no
    check finds this. A write to the base weights needs a new block. `refresh` changes the values in place, so
    the backward of an earlier forward must be over.

    Activations of another type than `dtype`, and adapters that are added within the block, are computed as outside of
    it. A block within another one of the same model changes nothing.

    Args:
        model: The model, or a single layer.
        dtype: The type of the activations. Under autocast this is autocast's type.

    Yields:
        `refresh`, which takes A, B, the magnitudes and the scaling as they are then.
    """
    layers = factored_layers(model)
    own = [layer for layer in layers if not layer.prepared]

    def refresh() -> None:
        for layer in layers:
            layer.refresh()

    try:
        for layer in own:
            layer.prepare(dtype)
        yield refresh
    finally:
        for layer in own:
            layer.prepared.clear()


def _transformed(*tensors: torch.Tensor | None) -> bool:
    """Returns whether `torch.func`, `torch.jit.trace` or forward-mode AD follows one of `tensors`.

    They do not know a backward that is written by hand.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or any(
        debug_unwrap(tensor, recurse=False) is not tensor or unpack_dual(tensor).tangent is not None
        for tensor in tensors
        if tensor is not None
    )


def _computed_in(x: torch.Tensor) -> torch.dtype:
    """Returns the type in which a product of `x` is computed: autocast's, if it is on. float64 stays."""
    device = x.device.type
    if x.dtype == torch.float64 or not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _has_autocast(device: str) -> bool:
    # torch.compile before torch 2.13 breaks the graph at this question. It compiles for devices that have autocast.
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)


def _in_mkl(tensor: torch.Tensor) -> bool:
    """Returns whether MKL multiplies `tensor`, as it does on a CPU in float32 and float64.

    There `(hidden.T @ scaled).T` takes a fourth to a thirteenth of the time of `scaled.T @ hidden`, and rounds less.
    `scaled @ up` takes half the time where the columns of `up` are contiguous.
    """
    return tensor.device.type == "cpu" and tensor.dtype.itemsize >= 4


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context that computes in the tensors' own types. A device without autocast (meta) needs none."""
    if not _has_autocast(device.type):
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


@contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    """A context without gradients and without autocast."""
    with torch.no_grad(), without_autocast(device):
        yield


def square_norm(weight: torch.Tensor) -> torch.Tensor:
    """Returns `||W||^2` of each row, [out], at least float32."""
    return torch.cat([chunk.square().sum(dim=1) for chunk in _chunks(weight)])


def factored_norm(
    weight: torch.Tensor, square_norm: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Computes the row norms of `W + s B A` without `B A` (factored norms, arXiv 2603.22276).

    Args:
        weight: W [out, in].
        square_norm: `||W||^2` [out].
        a: A [r, in].
        b: B [out, r].
        scaling: s.

    Returns:
        [out], at least float32.
    """
    a, b = a.to(square_norm.dtype), b.to(square_norm.dtype)
    cross = torch.cat([chunk @ a.T for chunk in _chunks(weight)])
    square = square_norm + 2 * scaling * (b * cross).sum(dim=1) + scaling**2 * ((b @ (a @ a.T)) * b).sum(dim=1)
    # Rounding may take a row that A and B cancel below zero, and a row of zeros would give 0/0. We clamp, so that such
    # rows scale to zeros.
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def _chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields groups of rows of `weight` in float32. float64 stays."""
    elements = CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS["cpu"])
    rows = max(1, elements // weight.shape[1])
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for start in range(0, weight.shape[0], rows):
        yield weight[start : start + rows].to(dtype)


def use_factored(config: LoraConfig) -> LoraConfig:
    """Makes PEFT build `FactoredDoraLinear` for linear layers and `Conv1D`, by its extension point for custom modules.

    The mapping is only in memory. PEFT therefore saves a plain DoRA adapter, which stock PEFT can open.
    """
    config._register_custom_module({nn.Linear: FactoredDoraLinear, Conv1D: FactoredDoraLinear})
    return config


def factored_layers(model: nn.Module) -> list[FactoredDoraLinear]:
    """Returns the layers of `model` whose DoRA is computed here and not in PEFT."""
    return [module for module in model.modules() if isinstance(module, FactoredDoraLinear)]


def start_at_the_base(model: nn.Module) -> None:
    """Sets new magnitudes to the row norms in float32, so that gamma is 1 and the untrained model equals the base.

    PEFT computes them in the type of the weights. With a bf16 base, every row would then start up to 0.4 % off.
    """
    for layer in factored_layers(model):
        for adapter in layer.lora_magnitude_vector:
            layer.parts(adapter).magnitude.data = layer.row_norm(adapter).clone()
