"""Decides which posts are near-duplicates: Jaccard similarity of their word 5-grams, and its least value."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LEAST = 0.5
"""The least similarity of near-duplicates."""
SHINGLE_WORDS = 5
CHUNK_CELLS = 2**22
"""Most similarities that are in memory at once."""


def near_duplicates(posts: Mapping[str, str]) -> list[tuple[str, str, float]]:
    """Finds all pairs of posts whose sets of word 5-grams have a Jaccard similarity of at least 0.5.

    Upper and lower case, punctuation and white space do not matter. A post of fewer than five words is one 5-gram. A
    post without words is like no other. The sets hold 31-bit hashes, so a similarity can be too high by a collision.

    Args:
        posts: The texts of posts by id.

    Returns:
        (post id, post id, similarity), in the order of `posts`.
    """
    import numpy as np

    ids = list(posts)
    return [
        (ids[a], ids[b], float(similarity))
        for first, second, similarities in _similar(posts)
        for a, b, similarity in zip(first.tolist(), second.tolist(), np.asarray(similarities), strict=True)
    ]


def _similar(posts: Mapping[str, str]) -> Iterator[tuple["np.ndarray", "np.ndarray", "np.ndarray"]]:
    """Numbers of the first and second post, and similarity, chunk by chunk."""
    import numpy as np
    from sklearn.feature_extraction.text import HashingVectorizer

    if not posts:
        return
    hashing = HashingVectorizer(
        analyzer=_shingles, n_features=2**31 - 1, alternate_sign=False, binary=True, norm=None, dtype=np.int32
    )
    sets = hashing.transform(posts.values())
    sizes = np.diff(sets.indptr)
    # A 5-gram that one post has joins no two posts. Most are such, and without them the product is small.
    hashes, sets.indices, users = np.unique(sets.indices, return_inverse=True, return_counts=True)
    sets.resize(len(posts), len(hashes))
    sets = sets[:, users > 1]
    others = sets.T.tocsr()
    chunk = max(1, CHUNK_CELLS // len(posts))
    for start in range(0, len(posts), chunk):
        common = (sets[start : start + chunk] @ others).tocoo()
        first, second = common.row + start, common.col
        similarity = common.data / (sizes[first] + sizes[second] - common.data)
        kept = np.flatnonzero((first < second) & (similarity >= LEAST))
        kept = kept[np.lexsort((second[kept], first[kept]))]
        yield first[kept], second[kept], similarity[kept]


def _shingles(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return (
        [" ".join(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))]
        if words
        else []
    )
