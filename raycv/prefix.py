"""Prompts that share a prefix, computed once: a post's nine pairs in one row `[prefix | suffix 1 | ... | suffix 9]`.

A causal model's states over a common prefix are the same for every continuation. A suffix attends to the prefix and to
itself, and its positions restart at the prefix's end, so the logits are those of the plain rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PREFIX, PADDING = 0, -1
"""Segment numbers; suffixes count from 1."""

FILL = 0.9
"""A batch of groups computes at most the rest as padding: a step of training holds few posts, of unlike lengths."""


@dataclass(frozen=True)
class PackedRows:
    """B groups of rows in one batch; R rows in all."""

    input_ids: torch.Tensor
    """int64 [B, L]"""
    position_ids: torch.Tensor
    """int64 [B, L]"""
    mask: torch.Tensor
    """bool [B, 1, L, L]: True where a query (third dimension) attends to a key (fourth)"""
    ends: torch.Tensor
    """int64 [R, 2]: batch index and position at which each row's logits are read, in the order the rows came in"""


def pack(groups: Sequence[Sequence[np.ndarray]], pad_id: int, device: torch.device) -> PackedRows:
    """Packs `groups` of token sequences (each int [n], without padding); a group shares its longest common prefix.

    Every suffix keeps at least one token, since a row's logits are read at its own last token. As in Hugging Face's
    heads that is the last other than `pad_id`, which a text too may hold: a tokenizer may pad with <unk> or </s>.
    """
    packed = [_pack_group(group, pad_id) for group in groups]
    width = max(len(ids) for ids, _, _, _ in packed)
    shape = (len(packed), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    segments = np.full(shape, PADDING, dtype=np.int64)
    ends = []
    for index, (ids, position, segment, last) in enumerate(packed):
        input_ids[index, : len(ids)] = ids
        positions[index, : len(ids)] = position
        segments[index, : len(ids)] = segment
        ends += [(index, end) for end in last]
    return PackedRows(
        input_ids=torch.from_numpy(input_ids).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        mask=_mask(torch.from_numpy(segments).to(device)),
        ends=torch.tensor(ends, device=device),
    )


def _pack_group(rows: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, positions, segments [n] of one group, and the index of each row's last token other than `pad_id`."""
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
    """Length of the longest common prefix of `rows` that leaves each at least one token of its own."""
    most = min(len(row) for row in rows) - 1
    if len(rows) == 1:
        return most
    heads = np.stack([row[:most] for row in rows])
    differs = (heads != heads[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else most


def _mask(segments: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, L, L] from segment numbers [B, L]."""
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    attends = causal & ((key == PREFIX) | (key == query))
    # A query that attends to nothing would be NaN: padding attends to itself.
    attends |= torch.eye(length, dtype=torch.bool, device=segments.device)
    return attends[:, None]


def grouped(
    rows: np.ndarray, group_of_row: np.ndarray, lengths: np.ndarray, prefix_of_group: np.ndarray, budget: int
) -> Iterator[list[np.ndarray]]:
    """`rows` (those of a group adjacent) in batches of whole groups of like size, at most `budget` positions each.

    Args:
        rows: indices [n] into `group_of_row` and `lengths`.
        lengths: tokens of each row [R].
        prefix_of_group: tokens that the rows of each group share [G].
        budget: at least the longest row; a group that takes more is split, each part computing the prefix again.

    Yields, per batch, the rows of each group.
    """
    borders = np.flatnonzero(np.diff(group_of_row[rows])) + 1
    batch: list[np.ndarray] = []
    used = width = 0
    for group in np.split(rows, borders):
        prefix = int(prefix_of_group[group_of_row[group[0]]])
        for part, positions in _parts(group, prefix, lengths[group] - prefix, budget):
            # A batch is as wide as its widest group.
            width = max(width, positions)
            computed = (len(batch) + 1) * width
            if batch and (computed > budget or used + positions < FILL * computed):
                yield batch
                batch, used, width = [], 0, positions
            batch.append(part)
            used += positions
    if batch:
        yield batch


def _parts(group: np.ndarray, prefix: int, own: np.ndarray, budget: int) -> Iterator[tuple[np.ndarray, int]]:
    """`group` in as few parts as take at most `budget` positions each, and the positions of each part."""
    start, positions = 0, prefix
    for index, size in enumerate(own.tolist()):
        if index > start and positions + size > budget:
            yield group[start:index], positions
            start, positions = index, prefix
        positions += size
    yield group[start:], positions


def packed_logits(classifier: Any, packed: PackedRows) -> torch.Tensor:
    """Logits [R, 2] of the packed rows. `classifier`: a Hugging Face causal model, backbone `model` and head `score`.

    The stock forward pools one position per batch row, so the backbone is called and its states are gathered here.
    """
    states = classifier.model(
        input_ids=packed.input_ids,
        attention_mask=packed.mask,
        position_ids=packed.position_ids,
        use_cache=False,
    ).last_hidden_state
    return classifier.score(states[packed.ends[:, 0], packed.ends[:, 1]])


def can_pack(classifier: Any) -> bool:
    """Whether `classifier` has the shape that `packed_logits` needs; that it is causal must be seen from its logits."""
    shaped = hasattr(classifier, "model") and hasattr(classifier, "score")
    # Other implementations would add a boolean mask to the scores, or ignore it.
    return shaped and getattr(classifier.config, "_attn_implementation", None) == "sdpa"


def attention_window(config: Any) -> int | None:
    """Tokens that a query of the model sees, if not all before it: a mask of our own would make it see them all."""
    windows = [getattr(config, "attention_chunk_size", None)]
    if getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    return min((window for window in windows if window), default=None)


def steady_positions(config: Any) -> int | None:
    """Tokens up to which a token's rotary embedding is its own; beyond, it depends on the longest prompt of the batch.

    None: it always is.
    """
    rope = getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("dynamic", "longrope"):
        return None
    trained = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return trained or config.max_position_embeddings
