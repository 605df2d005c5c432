"""Random-weight Llamas and their adapters, as raycv and as a user of plain PEFT would build them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raycv.model.attention import fuse_norms
from raycv.model.dora import start_at_the_base, use_factored

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The linear layers that get adapters, those of raycv's default config."""


@dataclass(frozen=True)
class Shape:
    """A Llama's size."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    vocab: int = 32

    def config(self, pad_id: int = 0) -> Any:
        """The transformers config of a two-class classifier (or a bare backbone) of this size."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_hidden_layers=self.layers,
            max_position_embeddings=4096,
            pad_token_id=pad_id,
            num_labels=2,
            use_cache=False,
            attn_implementation="sdpa",
        )


LLAMA_7B = Shape(hidden=4096, intermediate=11008, heads=32, layers=32, vocab=32000)


@dataclass(frozen=True)
class Adapter:
    """A way to adapt the projections; rank, scale and dropout are raycv's defaults."""

    title: str
    dora: bool = True
    factored: bool = False
    float32: bool = True
    """float32 adapters, whatever the base is"""
    autocast: bool = True
    """bf16 autocast around a bf16 base"""

    def on(self, model: nn.Module, *, dropout: float = 0.05, checkpointing: bool = True) -> Any:
        """`model` under this adapter, in training mode."""
        config = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=dropout, use_dora=self.dora, target_modules=PROJECTIONS,
            modules_to_save=["score"] if hasattr(model, "score") else None,
        )  # fmt: skip
        fuse_norms(model, fused=self.factored)
        if self.factored:
            use_factored(config)
        adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=self.float32)
        if self.factored:
            start_at_the_base(adapted)
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        return adapted.train()

    def context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """What the forward of `model` under this adapter runs in."""
        base = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
        if base.dtype != torch.bfloat16 or not self.autocast:
            return nullcontext()
        return torch.autocast(base.device.type, dtype=torch.bfloat16)


ADAPTERS = {
    "lora": Adapter("LoRA, PEFT", dora=False),
    "dora_peft": Adapter("DoRA, PEFT's default", autocast=False),
    "dora_peft_bf16": Adapter("DoRA, PEFT, bf16 adapters under autocast", float32=False),
    "dora_raycv": Adapter("DoRA, raycv", factored=True),
}


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, which by itself leaves out `addmm_`."""

    def addmm(_: Any, a: tuple[int, int], b: tuple[int, int], **_others: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm})


def base_weights(model: nn.Module) -> int:
    """N: weights of the linear layers that have an adapter."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    return sum(layer.base_layer.weight.numel() for layer in layers)


def classifier(shape: Shape, *, seed: int, pad_id: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama with a two-class head and random weights, on the current default device."""
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    with default_dtype(dtype):
        return LlamaForSequenceClassification(shape.config(pad_id))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Builds weights in `dtype` at once: made in float32 and cast they would need three times the memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class TokenCount:
    """Counts the positions that a model computes: what enters its embedding, padding included."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        self._hook = model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        self.tokens += inputs[0].numel()

    def removed(self) -> int:
        """The count, and none from here on."""
        self._hook.remove()
        return self.tokens

    def taken(self) -> int:
        """The count since the last call."""
        tokens, self.tokens = self.tokens, 0
        return tokens
