"""Computes the logits of rows of tokens, padded or packed, and checks that packing changes no logit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from types import MethodType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from raycv.common.devices import is_out_of_memory
from raycv.data.prompt_encoder import EncodedPairs
from raycv.model.attention import KERNEL, attention_of, attention_window, earlier_attention, far_apart, read_few
from raycv.model.dora import prepared
from raycv.training.packing import (
    FILL,
    Group,
    Lines,
    PackedRows,
    can_pack,
    common_prefix,
    groups_of,
    in_even_lines,
    in_lines,
    on_device,
    pack,
    packed_logits,
    steady_positions,
)
from raycv.training.workers import Workers

Layout = Literal["padded", "packed", "shared"]
"""How the rows of a batch are laid out.

- `padded`: a line for each row, as long as the longest of the batch.
- `packed`: rows one after another in lines.
- `shared`: packed, and a post is computed once for all its criteria in the batch.
"""


class Batch(NamedTuple):
    """Rows that are computed at once."""

    rows: np.ndarray
    """int [n], in the order of their logits"""
    lines: Lines | None = None
    """the same rows by line and group; None if padded"""

    @classmethod
    def packed(cls, lines: Lines) -> "Batch":
        """Returns the batch of `lines`."""
        return cls(np.concatenate([group.rows for line in lines for group in line]), lines)


Inputs = PackedRows | dict[str, torch.Tensor]
"""The tensors that the model reads for a batch."""


def in_order(rows: np.ndarray, done: Sequence[tuple[np.ndarray, torch.Tensor]]) -> torch.Tensor:
    """Returns the logits [n, 2] of `rows` [n] in their order.

    Args:
        rows: The rows in the wanted order.
        done: Rows and logits of each batch. All batches together hold the same rows in another order.
    """
    place = np.empty(len(rows), dtype=np.int64)
    place[np.argsort(rows, kind="stable")] = np.argsort(np.concatenate([batch for batch, _ in done]), kind="stable")
    joined = torch.cat([logits for _, logits in done])
    return joined[torch.from_numpy(place).to(joined.device)]


VARIANTS = 32
"""The most graphs that torch.compile may make for one kind of layer.

Training and evaluation differ, one line and several, one read position and several, and a first layer, whose input
needs no gradient. Lengths make no other graph.
"""


@contextmanager
def compiled_layers(model: torch.nn.Module, backend: str = "inductor", mode: str | None = None) -> Iterator[int]:
    """Lets torch.compile compute the decoder layers of `model` within the block, each as one graph.

    All layers of a kind share their graphs. Gradient checkpointing stays outside of them. Dropout draws what it draws
    without compilation, unless there is a `mode`.

    Args:
        model: The classifier. Its last layer must be of its final kind.
        backend: The backend of torch.compile.
        mode: The mode of torch.compile.

    Yields:
        The number of compiled layers.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" and mode is None else None
    kinds = {
        kind: torch.compile(kind.forward, backend=backend, fullgraph=True, dynamic=True, mode=mode, options=options)
        for kind in {type(layer) for layer in layers}
    }
    # PyTorch's annotations lack `patch`.
    config: Any = torch.compiler.config
    with config.patch(recompile_limit=VARIANTS):
        for layer in layers:
            layer.forward = MethodType(kinds[type(layer)], layer)
        try:
            yield len(layers)
        finally:
            for layer in layers:
                del layer.forward


class RowScorer:
    """Computes the logits of encoded rows with one model, on its device."""

    def __init__(
        self,
        model: Any,
        encoded: EncodedPairs,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.model = model
        self.encoded = encoded
        self.device = device
        self.autocast = autocast
        read_few(self.classifier)
        self.group_of_row = encoded.group_of_row()
        longest = np.zeros(self.group_of_row.max() + 1, dtype=np.int64)
        np.maximum.at(longest, self.group_of_row, encoded.lengths)
        self._longest_of_group = longest[self.group_of_row]

    def sorted(self, rows: np.ndarray, layout: Layout) -> np.ndarray:
        """Returns `rows` with the longest first, so that batches hold little padding.

        In the layout `shared`, the rows of a post are side by side.
        """
        if layout != "shared":
            return rows[np.argsort(-self.encoded.lengths[rows], kind="stable")]
        return rows[np.lexsort((rows, self.group_of_row[rows], -self._longest_of_group[rows]))]

    def part(self, rows: np.ndarray, workers: Workers, layout: Layout) -> np.ndarray:
        """Returns the positions in the sorted `rows` [n] that this worker computes.

        The workers take turns: for each row, or in the layout `shared` for each post.
        """
        if layout != "shared":
            return np.arange(workers.rank, len(rows), workers.size)
        groups = self.group_of_row[rows]
        place = np.cumsum(np.diff(groups, prepend=groups[:1]) != 0)
        return np.flatnonzero(place % workers.size == workers.rank)

    def batches(self, rows: np.ndarray, size: int, layout: Layout) -> Iterator[Batch]:
        """Yields the sorted `rows` in batches.

        A padded batch has `size` rows. Any other has at most the positions of `size` rows of the greatest length.
        A line holds several short rows, and a post with all its criteria is little longer than one row.
        A count of rows would therefore leave memory unused. It would also split posts, which computes them twice.
        """
        if not len(rows):  # A worker may have no part of a small step.
            return
        lengths = self.encoded.lengths
        if layout == "padded":
            yield from (Batch(rows[start : start + size]) for start in range(0, len(rows), size))
            return
        budget = size * int(lengths[rows].max())
        yield from map(Batch.packed, in_lines(self._groups(rows, budget, layout), budget, self._fill))

    def even_batches(self, rows: np.ndarray, number: int, layout: Layout) -> list[Batch]:
        """Returns the sorted `rows` in so many batches of about equal size, or in a few more."""
        if layout == "padded":
            return list(self.batches(rows, -(-len(rows) // number), layout))
        lengths = self.encoded.lengths[rows]
        groups = self._groups(rows, max(int(lengths.max()), -(-int(lengths.sum()) // number)), layout)
        return [Batch.packed(lines) for lines in in_even_lines(groups, number, self._fill)]

    def positions(self, batch: Batch) -> int:
        """Returns the positions that `batch` computes, padding included."""
        if batch.lines is None:
            return len(batch.rows) * int(self.encoded.lengths[batch.rows].max())
        return len(batch.lines) * max(sum(group.positions for group in line) for line in batch.lines)

    def _groups(self, rows: np.ndarray, budget: int, layout: Layout) -> list[Group]:
        """Returns the groups of `rows`, of at most `budget` positions each: those of a post, or single rows."""
        lengths = self.encoded.lengths
        if layout == "packed":
            return [Group(rows[[index]], int(length)) for index, length in enumerate(lengths[rows])]
        return list(groups_of(rows, self.group_of_row, lengths, self._prefix_of_group, budget))

    @property
    def _fill(self) -> float:
        return FILL.get(self.device.type, FILL["cpu"])

    @cached_property
    def _prefix_of_group(self) -> np.ndarray:
        """int64 [G]: the number of tokens that all rows of a group share."""
        order = np.argsort(self.group_of_row, kind="stable")
        prefixes = np.zeros(self.group_of_row.max() + 1, dtype=np.int64)
        for rows in np.split(order, np.flatnonzero(np.diff(self.group_of_row[order])) + 1):
            prefixes[self.group_of_row[rows[0]]] = common_prefix(self._tokens(rows))
        return prefixes

    def _tokens(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns the tokens of each of `rows`, without padding."""
        return [self.encoded.input_ids[row, : self.encoded.lengths[row]] for row in rows]

    @property
    def attention(self) -> str:
        """The attention that the model computes: sdpa or eager."""
        return attention_of(self.classifier)

    @property
    def earlier_attention(self) -> str:
        """The attention that versions which recorded none computed with this model."""
        return earlier_attention(self.classifier.config)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the activations: autocast's, or that of the weights."""
        with self.autocast():
            if torch.is_autocast_enabled(self.device.type):
                return torch.get_autocast_dtype(self.device.type)
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    def prepared(self) -> AbstractContextManager[Callable[[], None]]:
        """Returns a block in which DoRA's norms are computed once; see `raycv.model.dora.prepared`.

        Nobody may change the weights within it, or the function that it gives must follow.
        """
        return prepared(self.model, self.dtype)

    def inputs(self, batch: Batch) -> Inputs:
        """Returns what the model reads for `batch`, on the device."""
        if batch.lines is not None:
            tokens = [[self._tokens(group.rows) for group in line] for line in batch.lines]
            return pack(tokens, self.encoded.pad_id, self.device)
        # With padding on the right, columns that are padding for every row change nothing, so we leave them out.
        width = int(self.encoded.lengths[batch.rows].max())
        input_ids = self.encoded.input_ids[batch.rows, :width].astype(np.int64)
        mask = (np.arange(width) < self.encoded.lengths[batch.rows][:, None]).astype(np.int64)
        return {"input_ids": on_device(input_ids, self.device), "attention_mask": on_device(mask, self.device)}

    def logits(self, batch: Batch, inputs: Inputs | None = None) -> torch.Tensor:
        """Returns the float32 (or float64) logits [n, 2] of the rows of `batch`, in their order.

        Args:
            batch: The rows.
            inputs: The result of `inputs` for these rows; None to make them now.
        """
        inputs = self.inputs(batch) if inputs is None else inputs
        with self.autocast():
            if isinstance(inputs, PackedRows):
                logits = packed_logits(self.classifier, inputs)
            else:
                logits = self.model(**inputs).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    @torch.no_grad()
    def check_packing(self, longest_row: int | None = None) -> str | None:
        """Compares logits of a post to see whether packing is right for this model.

        A model that is not causal (BERT) reads the prompt's end when it computes its beginning.

        Args:
            longest_row: Tokens of the longest row that will be computed; None if it is among the encoded rows.

        Returns:
            None if packing is right, else the reason why not.
        """
        classifier = self.classifier
        name = type(classifier).__name__
        if not can_pack(classifier):
            return f"{name} has no causal backbone that takes a mask of its own"
        if attention_of(classifier) != KERNEL:
            # Other implementations would add a boolean mask to the scores, or ignore it, so we refuse them.
            return f"the {attention_of(classifier)} attention of {name} takes no mask of its own"
        longest_row = longest_row or int(self.encoded.lengths.max())
        window = attention_window(classifier.config)
        if window is not None and window < longest_row:
            return f"the attention of {name} sees {window} tokens, and prompts have {longest_row}"
        steady = steady_positions(classifier.config)
        if steady is not None and steady < longest_row:
            return (
                f"beyond {steady} tokens {name} embeds positions by the longest prompt, and prompts have {longest_row}"
            )
        # The longest post with two criteria shows the most, and two of its rows take little memory.
        several = np.bincount(self.group_of_row)[self.group_of_row] > 1
        longest = np.where(several | ~several.any(), self.encoded.lengths, -1).argmax()
        rows = np.flatnonzero(self.group_of_row == self.group_of_row[longest])[[0, -1]]
        # The line has two rows that share a prefix, and after them one that shares nothing.
        lines = [[Group(each, int(self.encoded.lengths[each].sum())) for each in (rows, rows[:1])]]
        training = self.model.training
        self.model.eval()
        with self.prepared():
            plain = torch.cat([self.logits(Batch(rows[[i]])) for i in (0, 1, 0)])
            try:
                packed = self.logits(Batch.packed(lines))
            except (RuntimeError, ValueError, TypeError) as error:
                if is_out_of_memory(error):
                    raise
                # Jamba and MiniMax fail here, since they have layers other than attention.
                said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                return f"{name} does not take a mask of its own: {said}"
            finally:
                self.model.train(training)
        worst = far_apart(plain, packed, self.dtype)
        if worst is None:
            return None
        return f"{name} is not causal: its logits differ by {worst:.2g} where prompts are packed"

    @property
    def classifier(self) -> Any:
        """The Hugging Face model inside PEFT's wrapper. The adapters are in its layers."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
