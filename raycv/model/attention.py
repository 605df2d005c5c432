"""Chooses attention, norm and last layer of the base model: faster code, checked against the model's own.

transformers passes a kernel only the arguments that it takes. Gemma 2 caps its attention scores, and sdpa drops the cap
silently.
The config therefore shows the known cases, and the logits of one prompt show the others.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm, rotate_half

from raycv.common.devices import is_out_of_memory
from raycv.common.retry import cause_of
from raycv.data.prompt_template import render
from raycv.model.dora import without_autocast

KERNEL, PLAIN = "sdpa", "eager"
"""transformers' names of PyTorch's kernel and of the model's own code."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""The allowed difference between two computations of the same logits, as a share of the largest logit. It is relative,
since the logits of a new head are small."""
ROUGH_TOLERANCE = 0.1
"""The same for 16-bit types. Rounding gives 0.03; another attention gives 0.3 or more."""
TOKENS, MOST_TOKENS = 24, 640
"""The prompt for the comparison has `TOKENS` tokens more than the attention's window. It has only `TOKENS` if there is
no window, or if it would exceed `MOST_TOKENS`."""
ROWS = 4
"""Prompts that are compared at once. The logits of a single one may all be near 0, where rounding looks large."""
QUERIES = 128
"""The most queries of a document that attention on a CPU computes at once. Fewer leave out more scores, and more calls
take longer."""
_CAP = re.compile(r"att(n|ention)\w*cap(ping)?$")


def choose_attention(config: Any) -> tuple[str, str | None]:
    """Chooses the attention for a transformers `config`, regardless of other installed packages.

    `raycv.utils.pin_kernels` pins the kernels. Families that lack PyTorch's kernel compute their own code.

    Returns:
        `KERNEL` or `PLAIN`, and the reason if the kernel would be wrong, else None.
    """
    if earlier_attention(config) == PLAIN:
        return PLAIN, None
    for name, value in _caps(config.to_dict()):
        return (
            PLAIN,
            f"attention is {PLAIN}: {name}={value:g} caps its scores, and PyTorch's kernel ({KERNEL}) does not",
        )
    return KERNEL, None


def earlier_attention(config: Any) -> str:
    """Returns the attention of earlier versions of raycv, which recorded none: the kernel's if the family has it."""
    from transformers import AutoModelForSequenceClassification

    classes: Any = AutoModelForSequenceClassification._model_mapping
    return KERNEL if type(config) in classes and classes[type(config)]._supports_sdpa else PLAIN


def _caps(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields name and value of each key that caps attention scores, also in parts of the config (text, encoder)."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _caps(value)
        elif _CAP.search(str(name)) and isinstance(value, int | float) and value:
            yield name, value


def mark_documents(mask: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Returns `mask` with a note of its documents, from which attention on a CPU leaves out what no query sees.

    A model that makes another mask of it loses the note, and attention computes all of that mask.

    Args:
        mask: The mask, bool [B, 1, L, L]. No query sees another document, or a later position.
        lengths: The positions of each document in all lines one after another. Their sum is B * L.
    """
    mask.documents = lengths  # type: ignore[attr-defined]
    return mask


def _by_document(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention with PyTorch's kernel, for each document of a marked mask on its own.

    PyTorch's kernel for CPUs computes all scores, also those that the mask hides. A few queries of a document see its
    keys up to the last of them, so the kernel gets no others. The scores that remain are the same.

    Args:
        module: The attention of a layer.
        query: [B, H, L, D].
        key: [B, K, L, D].
        value: [B, K, L, D].
        attention_mask: The mask, or None.
        dropout: The probability of dropout. If it is not 0, its draws stay those of transformers.
        kwargs: Passed to transformers.

    Returns:
        [B, L, H, D], and None for the weights.
    """
    documents = None if torch.compiler.is_compiling() else getattr(attention_mask, "documents", None)
    if documents is None or dropout:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, **kwargs)
    assert attention_mask is not None
    lines, length = len(query), query.shape[2]
    done, start = [], 0
    # A slice's gradient is as large as the whole, so we split once.
    split = (states.transpose(1, 2).flatten(0, 1).split(documents) for states in (query, key, value))
    for states in zip(*split, strict=True):
        queries, keys, values = (part.transpose(0, 1)[None] for part in states)
        line, first = divmod(start, length)
        size = -(-len(states[0]) // -(-len(states[0]) // QUERIES))
        end = 0
        for few in queries.split(size, dim=2):
            begin, end = end, end + few.shape[2]
            seen = attention_mask[line : line + 1, :, first + begin : first + end, first : first + end]
            mixed, _ = sdpa_attention_forward(module, few, keys[:, :, :end], values[:, :, :end], seen, **kwargs)
            done.append(mixed[0])
        start += end
    return torch.cat(done).unflatten(0, (lines, length)), None


ALL_ATTENTION_FUNCTIONS.register(KERNEL, _by_document)


def attention_of(model: Any) -> str:
    """Returns the attention that a transformers model computes: `KERNEL`, `PLAIN`, or another of their names."""
    return str(model.config._attn_implementation)


@torch.no_grad()
def with_right_attention(model: Any, tokenizer: Any, positions: int | None) -> tuple[Any, str | None]:
    """Replaces the attention's kernel by the plain code if the two give different logits.

    Args:
        model: A classifier in evaluation mode.
        tokenizer: The model's tokenizer.
        positions: The most tokens that the model takes; None for any number.

    Returns:
        `model`, or the same weights in the plain code if the logits differ. The second value is a warning that the
        logits differ or could not be compared, else None.
    """
    if attention_of(model) != KERNEL:
        return model, None
    name = type(model).__name__
    rows = _rows(model.config, tokenizer, positions)
    try:
        plain = in_plain_code(model)
        # `_logits` needs a mask for the padding, and `_logits_alone` needs none.
        for compute in (_logits, _logits_alone):
            expected, computed = (compute(each, rows, tokenizer.pad_token_id) for each in (plain, model))
            worst = far_apart(expected, computed, model.dtype)
            # If the plain code gives NaN or infinity, the weights are at fault and not the kernel.
            if worst is not None and bool(expected.isfinite().all()):
                return plain, (
                    f"Warning: attention is {PLAIN}, which is slower: with PyTorch's kernel ({KERNEL}) the logits of "
                    f"{name} differ by {worst:.2g} (the largest is {float(expected.abs().max()):.2g})"
                )
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        # Training will show whether the model works, so we only warn.
        return model, f"Warning: attention ({KERNEL}) of {name} was not compared with {PLAIN}: {cause_of(error)}"
    return model, None


def far_apart(expected: torch.Tensor, computed: torch.Tensor, dtype: torch.dtype) -> float | None:
    """Returns the largest difference between the logits if it exceeds rounding in `dtype`, else None."""
    worst = float((expected - computed).abs().max())
    # Comparisons with NaN are false, so this order makes NaN count as a difference.
    return None if worst <= TOLERANCE.get(dtype, ROUGH_TOLERANCE) * float(expected.abs().max()) else worst


def in_plain_code(model: Any) -> Any:
    """Returns a model with the tensors of `model` (not copies) that computes attention by the plain code.

    Many classes (BERT, RoBERTa, Falcon) fix their attention when they are built, so the model is built again.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config._attn_implementation = PLAIN
    with torch.device("meta"):
        plain = AutoModelForSequenceClassification.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    # Tables of positions and the like are not in the state dict, so we take them from `model`.
    for name, module in plain.named_modules():
        source = model.get_submodule(name)
        for own, others in ((module._buffers, source._buffers), (vars(module), vars(source))):
            own.update({key: others[key] for key, value in own.items() if _is_empty(value)})
    return plain.eval()


def _is_empty(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _rows(config: Any, tokenizer: Any, positions: int | None) -> list[torch.Tensor]:
    """Returns the token ids of a prompt and of its beginnings. The prompt is longer than a short attention window."""
    length = (attention_window(config) or 0) + TOKENS
    length = min(length if length <= MOST_TOKENS else TOKENS, positions or MOST_TOKENS)
    text = " ".join([render("I cannot sleep and nothing is fun any more.", "Trouble sleeping.")] * length)
    sizes = [max(1, length * part // ROWS) for part in range(ROWS, 0, -1)]
    with _as_it_was(tokenizer):
        return [torch.tensor(tokenizer(text, truncation=True, max_length=size)["input_ids"]) for size in sizes]


@contextmanager
def _as_it_was(tokenizer: Any) -> Iterator[None]:
    """Undoes the settings that a call leaves in a fast tokenizer. They would be saved with the checkpoint."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # A slow tokenizer keeps nothing.
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
    """Returns the float32 (or float64) logits [n, 2] of `rows`, padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def _logits_alone(model: Any, rows: list[torch.Tensor], pad_id: int) -> torch.Tensor:
    """Computes each row in a batch of its own. The caller compares all rows at once: the largest logit is the scale."""
    return torch.cat([_logits(model, [row], pad_id) for row in rows])


class FusedRMSNorm(LlamaRMSNorm):
    """Llama's norm in one kernel. It rounds once, after the weights; that of transformers also rounds before them."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Computes the norm; on a CPU, or if the types differ, with the code of transformers.

        Args:
            hidden_states: Hidden states [..., size].
        """
        if not hidden_states.is_cuda or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return self.fused(hidden_states)

    def fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Computes the norm with one kernel, which every device has."""
        with without_autocast(hidden_states.device):
            return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def fuse_norms(model: nn.Module, *, fused: bool = True) -> None:
    """Turns the norms of a Llama into `FusedRMSNorm`, or back. The norms of other families stay."""
    there, wanted = (LlamaRMSNorm, FusedRMSNorm) if fused else (FusedRMSNorm, LlamaRMSNorm)
    for module in model.modules():
        if type(module) is there:
            module.__class__ = wanted


class ReadingLayer(LlamaDecoderLayer):
    """Llama's last layer. A classifier reads few of its positions, and this layer computes no others.

    Keys and values need every position. Queries and all that follows them need those that are read.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Computes the layer with the code of transformers, or for some positions.

        Args:
            hidden_states: Hidden states [B, L, size].
            args: Passed to transformers.
            kwargs: `reads` are the positions to compute, int [B, M]; without it transformers computes. The others are
                those of transformers, with a mask bool [B, 1, L, L].

        Returns:
            Hidden states [B, M, size].
        """
        reads = kwargs.pop("reads", None)
        if reads is None:
            return super().forward(hidden_states, *args, **kwargs)
        attention: Any = self.self_attn
        place = torch.arange(len(reads), device=reads.device)[:, None], reads
        cos, sin = (part.expand(len(reads), -1, -1) for part in kwargs["position_embeddings"])
        normed = self.input_layernorm(hidden_states)

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(*projected.shape[:2], -1, attention.head_dim).transpose(1, 2)

        def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return states * cos[:, None] + rotate_half(states) * sin[:, None]

        query = rotated(heads(attention.q_proj(normed[place])), cos[place], sin[place])
        key = rotated(heads(attention.k_proj(normed)), cos, sin)
        mask = kwargs["attention_mask"][:, 0][place][:, None]
        mixed, _ = ALL_ATTENTION_FUNCTIONS[KERNEL](
            attention, query, key, heads(attention.v_proj(normed)), mask, scaling=attention.scaling
        )
        hidden = hidden_states[place] + attention.o_proj(mixed.flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def may_read(self) -> bool:
        """Returns whether the layer may compute some positions alone: on a CPU, with PyTorch's attention, no dropout.

        Dropout would draw other numbers for fewer positions. On a GPU this was never measured.
        """
        here = self.input_layernorm.weight.device.type == "cpu" and attention_of(self.self_attn) == KERNEL
        drawing = any(isinstance(part, nn.Dropout) and part.p and part.training for part in self.modules())
        return here and not drawing and not (self.training and self.self_attn.attention_dropout)


def read_few(classifier: Any) -> None:
    """Turns the last layer of a Llama into `ReadingLayer`. Other classifiers stay."""
    layers = getattr(getattr(classifier, "model", None), "layers", None)
    last = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
    if type(last) is LlamaDecoderLayer and type(last.self_attn) is LlamaAttention:
        last.__class__ = ReadingLayer


def attention_window(config: Any) -> int | None:
    """Returns how many tokens a query of the model sees, or None if it sees all before it.

    With a mask of raycv's own, a query would see all of them.
    """
    # In a model that also reads images, the text settings are in a part of the config.
    config = config.get_text_config()
    windows = [getattr(config, "attention_chunk_size", None)]
    if getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    return min((window for window in windows if window), default=None)
