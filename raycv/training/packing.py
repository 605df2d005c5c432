"""Packs prompts one after another in lines, without padding. A post's prompts compute their common beginning once."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from raycv.model.attention import ReadingLayer, mark_documents

FILL = {"cpu": 0.9, "cuda": 0.0}
"""The least share of a batch's positions that hold tokens, by type of device. On a GPU one more batch costs more than
padding. The host takes as long to launch a small batch as a large one (`benchmarks.gpu`)."""
WIDEST = 1024
"""Positions above which a group is split, but two of the longest rows may stay together. Attention over a line, and its
mask, grow with the square of the line."""


class Group(NamedTuple):
    """Rows that share a prefix: those of one post, or a single one."""

    rows: np.ndarray
    """int [n]"""
    positions: int
    """tokens that are computed, at most"""


Lines = list[list[Group]]
"""The groups of each line of a batch."""


@dataclass(frozen=True)
class PackedRows:
    """B lines of groups of rows in one batch, with R rows in all."""

    input_ids: torch.Tensor
    """int64 [B, L]"""
    position_ids: torch.Tensor
    """int64 [B, L]"""
    segments: torch.Tensor
    """int64 [B, L]: the number of each position's segment"""
    prefixes: torch.Tensor
    """int64 [B, L]: the number of the prefix that each position sees"""
    documents: list[int]
    """the positions of each group in all lines one after another; padding is one more"""
    ends: torch.Tensor
    """int64 [R, 2]: batch index and position of each row's logits, in the order in which the rows came"""
    most_ends: int
    """the most rows of a line"""

    def mask(self) -> torch.Tensor:
        """Returns the mask, bool [B, 1, L, L]: True where a query (third dimension) attends to a key (fourth)."""
        length = self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        key = self.segments[:, None, :]
        mask = (causal & ((key == self.segments[:, :, None]) | (key == self.prefixes[:, :, None])))[:, None]
        return mark_documents(mask, self.documents) if mask.device.type == "cpu" else mask


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns `values` on `device`. A GPU fetches them while it computes, and the host does not wait."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pack(lines: Sequence[Sequence[Sequence[np.ndarray]]], pad_id: int, device: torch.device) -> PackedRows:
    """Packs lines of groups of rows. The rows of a group share their longest common prefix.

    Every suffix keeps at least one token, since a row's logits are read at its own last token.
    As in Hugging Face's heads, this is the last token other than `pad_id`.
    A text may hold `pad_id` as well, since a tokenizer may pad with `<unk>` or `</s>`.

    Args:
        lines: Token sequences (each int [n], no padding) by line and group.
        pad_id: The id of the pad token.
        device: The device that gets the tensors.
    """
    packed = [[_pack_group(group, pad_id) for group in line] for line in lines]
    width = max(sum(len(ids) for ids, _, _, _ in line) for line in packed)
    shape = (len(packed), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    # These hold the number of each position's segment, and of the prefix that it sees. A query that attends to nothing
    # would give NaN, so padding is a segment of its own.
    segments, prefixes = np.zeros((2, *shape), dtype=np.int64)
    ends, documents = [], []
    for index, line in enumerate(packed):
        start = segment = 0
        documents += [len(ids) for ids, _, _, _ in line]
        for ids, position, own_segments, last in line:
            place = index, slice(start, start + len(ids))
            input_ids[place] = ids
            positions[place] = position
            prefixes[place] = segment + 1
            segments[place] = segment + 1 + own_segments
            ends += [(index, start + end) for end in last]
            start += len(ids)
            segment += 1 + len(last)
        documents += [width - start] if start < width else []
    return PackedRows(
        input_ids=on_device(input_ids, device),
        position_ids=on_device(positions, device),
        segments=on_device(segments, device),
        prefixes=on_device(prefixes, device),
        documents=documents,
        ends=on_device(np.array(ends), device),
        most_ends=max(sum(len(last) for _, _, _, last in line) for line in packed),
    )


def _pack_group(rows: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Packs one group. The prefix is segment 0, and suffixes count from 1.

    Returns:
        Token ids, positions and segments [n], and the index of each row's last token other than `pad_id`.
    """
    shared = common_prefix(rows)
    suffixes = [row[shared:] for row in rows]
    sizes = [len(suffix) for suffix in suffixes]
    ids = np.concatenate([rows[0][:shared], *suffixes])
    positions = np.concatenate([np.arange(shared), *(np.arange(shared, shared + size) for size in sizes)])
    segments = np.repeat(np.arange(len(rows) + 1), [shared, *sizes])
    last = np.array([np.flatnonzero(row != pad_id).max(initial=0) for row in rows])
    starts = shared + np.cumsum(sizes) - sizes
    return ids, positions, segments, np.where(last < shared, last, starts + last - shared)


def common_prefix(rows: Sequence[np.ndarray]) -> int:
    """Returns the length of the longest common prefix of `rows` that leaves each row at least one token."""
    most = min(len(row) for row in rows) - 1
    if len(rows) == 1:
        return most
    heads = np.stack([row[:most] for row in rows])
    differs = (heads != heads[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else most


def groups_of(
    rows: np.ndarray, group_of_row: np.ndarray, lengths: np.ndarray, prefix_of_group: np.ndarray, budget: int
) -> Iterator[Group]:
    """Yields the groups of `rows`, of at most `budget` positions each.

    Args:
        rows: Indices [n] into `group_of_row` and `lengths`. The rows of a group are adjacent.
        group_of_row: The group of each row [R].
        lengths: The tokens of each row [R].
        prefix_of_group: The number of tokens that the rows of each group share [G].
        budget: At least the length of the longest row. A group that takes more, or passes `WIDEST`, is split. Each part
            computes the prefix again.
    """
    budget = min(budget, max(WIDEST, 2 * int(lengths[rows].max())))
    borders = np.flatnonzero(np.diff(group_of_row[rows])) + 1
    for group in np.split(rows, borders):
        prefix = int(prefix_of_group[group_of_row[group[0]]])
        start, positions = 0, prefix
        for index, size in enumerate((lengths[group] - prefix).tolist()):
            if index > start and positions + size > budget:
                yield Group(group[start:index], positions)
                start, positions = index, prefix
            positions += size
        yield Group(group[start:], positions)


def in_lines(groups: Sequence[Group], budget: int, fill: float) -> Iterator[Lines]:
    """Yields `groups` in batches of filled lines, of at most `budget` positions each.

    It is a best fit with the largest first. A batch has lines of the size of the largest group that is left, as many as
    `budget` allows. Each group after it enters the line where the least room remains. If less than `fill` of the
    positions would be used, the emptiest lines are left to the next batch.

    Args:
        groups: The groups of rows.
        budget: At least the positions of the largest group.
        fill: The least share of the positions that hold tokens.
    """
    # We take groups from the end, so the order is ascending, and among equal ones the first is last.
    left = sorted((group.positions, -index) for index, group in enumerate(groups))
    while left:
        width = left[-1][0]
        # The room that is left in each line, ascending as well.
        rooms = [(width, line) for line in range(budget // width)]
        lines: list[list[tuple[int, int]]] = [[] for _ in rooms]
        while fitting := bisect_right(left, (rooms[-1][0], 0)):
            group = left.pop(fitting - 1)
            room, line = rooms.pop(bisect_left(rooms, (group[0], 0)))
            insort(rooms, (room - group[0], line))
            lines[line].append(group)
        used = [(room, line) for room, line in rooms if lines[line]]
        while sum(width - room for room, _ in used) < fill * width * len(used):
            for group in lines[used.pop()[1]]:
                insort(left, group)
        yield [[groups[-index] for _, index in lines[line]] for _, line in used]


def in_even_lines(groups: Sequence[Group], batches: int, fill: float) -> list[Lines]:
    """Returns `groups` in so many batches of filled lines, each as small as that allows; see `in_lines`.

    There may be more batches where `fill` demands it.
    """
    width = max(group.positions for group in groups)
    lines = -(-sum(group.positions for group in groups) // (width * batches))
    while len(made := list(in_lines(groups, lines * width, fill))) > batches and lines < len(groups):
        lines += 1
    return made


def packed_logits(classifier: Any, packed: PackedRows) -> torch.Tensor:
    """Returns the logits [R, 2] of the packed rows.

    The stock forward pools one position per batch row. We therefore call the backbone, and gather its states here.

    Args:
        classifier: A causal Hugging Face model with the backbone `model` and the head `score`.
        packed: The packed rows.
    """
    lines, ends = packed.ends.T.contiguous()
    reads = {}
    last = classifier.model.layers[-1] if hasattr(classifier.model, "layers") else None
    if isinstance(last, ReadingLayer) and last.may_read():
        # A line with fewer rows than another computes its first position for the rest, which nothing reads.
        number = torch.arange(len(ends), device=ends.device) - torch.searchsorted(lines, lines)
        reads["reads"] = ends.new_zeros(len(packed.input_ids), packed.most_ends)
        reads["reads"][lines, number] = ends
        ends = number
    states = classifier.model(
        input_ids=packed.input_ids,
        attention_mask=packed.mask(),
        position_ids=packed.position_ids,
        use_cache=False,
        **reads,
    ).last_hidden_state
    return classifier.score(states[lines, ends])


def can_pack(classifier: Any) -> bool:
    """Returns whether `classifier` has the parts that `packed_logits` needs. Only its logits show if it is causal."""
    return hasattr(classifier, "model") and hasattr(classifier, "score")


def steady_positions(config: Any) -> int | None:
    """Returns the number of tokens up to which a token's rotary embedding is its own; None if it always is.

    Beyond it, the embedding depends on the longest prompt of the batch.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("dynamic", "longrope"):
        return None
    trained = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return trained or config.max_position_embeddings
