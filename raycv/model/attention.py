"""Attention and norm of the base model: PyTorch's kernels, checked against the model's own code.

transformers passes a kernel only what it takes. Gemma 2 caps its attention scores, and sdpa drops the cap silently. So
the config shows the known cases, and one prompt's logits show the others.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from raycv.common.devices import is_out_of_memory
from raycv.common.retry import cause_of
from raycv.model.dora import without_autocast
from raycv.prompts.template import render

KERNEL, PLAIN = "sdpa", "eager"
"""transformers' names of PyTorch's kernel and of the model's own code."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far two ways to compute the same logits may differ, as a share of the largest: a fresh head's are small."""
ROUGH_TOLERANCE = 0.1
"""The same for 16-bit types: rounding gives 0.03, another attention 0.3 or more."""
TOKENS, MOST_TOKENS = 24, 640
"""Length of the prompt that is compared, and the most that it may take to be longer than a window of attention."""
ROWS = 4
"""Prompts that are compared at once: the logits of a single one may all be near 0, where rounding looks large."""
_CAP = re.compile(r"att(n|ention)\w*cap(ping)?$")


def choose_attention(config: Any) -> tuple[str, str | None]:
    """The attention for a transformers `config`, whatever is installed beside, and why if the kernel would be wrong.

    Kernels are pinned in one place (raycv.utils.pin_kernels). Families without PyTorch's kernel compute their own code.
    """
    from transformers import AutoModelForSequenceClassification

    classes: Any = AutoModelForSequenceClassification._model_mapping
    if type(config) not in classes or not classes[type(config)]._supports_sdpa:
        return PLAIN, None
    for name, value in _caps(config.to_dict()):
        return (
            PLAIN,
            f"attention is {PLAIN}: {name}={value:g} caps its scores, and PyTorch's kernel ({KERNEL}) does not",
        )
    return KERNEL, None


def _caps(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of each key that caps attention scores, in parts of the config (text, encoder) too."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _caps(value)
        elif _CAP.search(str(name)) and isinstance(value, int | float) and value:
            yield name, value


def attention_of(model: Any) -> str:
    """The attention that a transformers model computes: KERNEL, PLAIN, or another of transformers' names."""
    return str(model.config._attn_implementation)


def earlier_attention(model: Any) -> str:
    """The attention that versions which recorded none computed: the kernel's wherever the family has it."""
    return KERNEL if model._supports_sdpa else PLAIN


@torch.no_grad()
def with_right_attention(model: Any, tokenizer: Any, positions: int | None) -> tuple[Any, str | None]:
    """`model` if its kernel gives the logits of the plain code, else the same weights in the plain code, and why.

    Args:
        model: a classifier in evaluation mode.
        tokenizer: the model's.
        positions: the most tokens that the model takes; None: any number.
    """
    if attention_of(model) != KERNEL:
        return model, None
    name = type(model).__name__
    rows = _rows(model.config, tokenizer, positions)
    try:
        plain = in_plain_code(model)
        for batch in (rows, rows[:1]):  # with a mask for the padding, and without one
            expected, computed = (_logits(each, batch, tokenizer.pad_token_id) for each in (plain, model))
            worst = far_apart(expected, computed, model.dtype)
            # Where the plain code gives NaN or infinity, the weights are at fault.
            if worst is not None and bool(expected.isfinite().all()):
                return plain, (
                    f"Warning: attention is {PLAIN}, which is slower: with PyTorch's kernel ({KERNEL}) the logits of "
                    f"{name} differ by {worst:.2g} (the largest is {float(expected.abs().max()):.2g})"
                )
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        # Whether it trains is seen when it trains.
        return model, f"Warning: attention ({KERNEL}) of {name} was not compared with {PLAIN}: {cause_of(error)}"
    return model, None


def far_apart(expected: torch.Tensor, computed: torch.Tensor, dtype: torch.dtype) -> float | None:
    """How far `computed` logits are off the `expected` ones, if that is more than rounding in `dtype`; else None."""
    worst = float((expected - computed).abs().max())
    # Written so that a NaN fails too.
    return None if worst <= TOLERANCE.get(dtype, ROUGH_TOLERANCE) * float(expected.abs().max()) else worst


def in_plain_code(model: Any) -> Any:
    """A model with the tensors of `model` (no copy) that computes attention by the plain code.

    Many classes (BERT, RoBERTa, Falcon) fix their attention when they are built, so the model is built again.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config._attn_implementation = PLAIN
    with torch.device("meta"):
        plain = AutoModelForSequenceClassification.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    # Neither in the state nor saved: tables of positions and the like.
    for name, module in plain.named_modules():
        source = model.get_submodule(name)
        for own, others in ((module._buffers, source._buffers), (vars(module), vars(source))):
            own.update({key: others[key] for key, value in own.items() if _is_empty(value)})
    return plain.eval()


def _is_empty(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _rows(config: Any, tokenizer: Any, positions: int | None) -> list[torch.Tensor]:
    """The token ids of a prompt and of its beginnings; the whole is longer than a short window of the attention."""
    length = (attention_window(config) or 0) + TOKENS
    length = min(length if length <= MOST_TOKENS else TOKENS, positions or MOST_TOKENS)
    text = " ".join([render("I cannot sleep and nothing is fun any more.", "Trouble sleeping.")] * length)
    sizes = [max(1, length * part // ROWS) for part in range(ROWS, 0, -1)]
    with _as_it_was(tokenizer):
        return [torch.tensor(tokenizer(text, truncation=True, max_length=size)["input_ids"]) for size in sizes]


@contextmanager
def _as_it_was(tokenizer: Any) -> Iterator[None]:
    """Undoes what a call leaves in a fast tokenizer, which would be saved with the checkpoint."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer keeps nothing
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    yield
    backend.no_truncation()
    backend.no_padding()
    if truncation is not None:
        backend.enable_truncation(**truncation)
    if padding is not None:
        backend.enable_padding(**padding)


def _logits(model: Any, rows: list[torch.Tensor], pad_id: int) -> torch.Tensor:
    """float32 (or float64) logits [n, 2] of `rows`, padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return logits if logits.dtype == torch.float64 else logits.float()


class FusedRMSNorm(LlamaRMSNorm):
    """The same norm. It rounds once, after the weights, and transformers' rounds before them too."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states`: [..., size]; on a CPU, or in another type than the weights', by transformers."""
        if not hidden_states.is_cuda or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return self.fused(hidden_states)

    def fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The one kernel; any device has it."""
        with without_autocast(hidden_states.device):
            return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def fuse_norms(model: nn.Module, *, fused: bool = True) -> None:
    """Makes the norms of a Llama FusedRMSNorms, or transformers' own again; those of other families stay."""
    there, wanted = (LlamaRMSNorm, FusedRMSNorm) if fused else (FusedRMSNorm, LlamaRMSNorm)
    for module in model.modules():
        if type(module) is there:
            module.__class__ = wanted


def attention_window(config: Any) -> int | None:
    """Tokens that a query of the model sees, if not all before it: a mask of our own would make it see them all."""
    config = config.get_text_config()  # of a model for images too
    windows = [getattr(config, "attention_chunk_size", None)]
    if getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    return min((window for window in windows if window), default=None)
