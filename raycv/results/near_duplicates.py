"""Decides which posts are near-duplicates: Jaccard similarity of their word 5-grams, and its least value."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix

LEAST = 0.5
"""The least similarity of near-duplicates."""
SHINGLE_WORDS = 5
CHUNK_CELLS = 2**22
"""Most cells of a sparse matrix that are made at once. A single post may need more."""


def near_duplicates(posts: Mapping[str, str]) -> list[tuple[str, str, float]]:
    """Finds all pairs of posts whose sets of word 5-grams have a Jaccard similarity of at least 0.5.

    Upper and lower case, punctuation and white space do not matter. A post of fewer than five words is one 5-gram. A
    post without words is like no other. The sets hold 31-bit hashes, so a similarity can be too high by a collision.

    Args:
        posts: The texts of posts by id.

    Returns:
        (post id, post id, similarity), in the order of `posts`.
    """
    ids = list(posts)
    if not ids:
        return []
    sets, sizes = _sets(posts)
    return [
        (ids[a], ids[b], similarity)
        for first, second in _candidates(sets, sizes)
        for a, b, similarity in _similar(sets, sizes, first, second)
    ]


def _sets(posts: Mapping[str, str]) -> tuple["csr_matrix", "np.ndarray"]:
    """Returns the 5-grams that more than one post has, and the number of all 5-grams of each post.

    Returns:
        int32 [posts, 5-grams] of 0 and 1, and int64 [posts]. The columns are in order: 5-grams of few posts first.
    """
    import numpy as np
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(
        analyzer=_shingles, n_features=2**31 - 1, alternate_sign=False, binary=True, norm=None, dtype=np.int32
    )
    hashed = hashing.transform(posts.values())
    hashes, users = np.unique(hashed.indices, return_counts=True)
    # A 5-gram that one post has joins no two posts, and most are such.
    shared, users = hashes[users > 1], users[users > 1]
    rank = np.empty(len(shared), dtype=np.int32)
    rank[np.argsort(users, kind="stable")] = np.arange(len(shared), dtype=np.int32)
    place = np.searchsorted(shared, hashed.indices)
    kept = np.append(shared, -1)[place] == hashed.indices
    ends = np.concatenate([[0], np.cumsum(kept)])[hashed.indptr]
    columns = rank[place[kept]]
    sets = csr_matrix((np.ones(len(columns), dtype=np.int32), columns, ends), shape=(len(posts), len(shared)))
    sets.sort_indices()
    return sets, np.diff(hashed.indptr).astype(np.int64)


def _candidates(sets: "csr_matrix", sizes: "np.ndarray") -> Iterator[tuple["np.ndarray", "np.ndarray"]]:
    """Yields the pairs of posts that can be similar enough, chunk by chunk: numbers of the first and of the second.

    This is prefix filtering (AllPairs, Bayardo et al. 2007) with more than one common 5-gram (Wang et al. 2012).
    Similar posts share at least `LEAST` of the 5-grams of either. So they share some among the rarest, and only the
    rarest of each post are compared. A phrase that many posts have costs little.
    """
    import numpy as np
    from scipy.sparse import csr_matrix

    lengths = np.diff(sets.indptr)
    least = np.ceil(LEAST * sizes).astype(np.int64)
    # One common 5-gram is frequent where posts share sentences; a tenth of the least is seldom, and costs little more.
    wanted = 1 + (least - 1) // 10
    # The 5-grams that only one post has are the rarest, but they are not in `sets`.
    prefix = np.clip(sizes - least + wanted - (sizes - lengths), 0, lengths)
    columns = sets.indices[np.arange(sets.nnz) - np.repeat(sets.indptr[:-1], lengths) < np.repeat(prefix, lengths)]
    ends = np.concatenate([[0], np.cumsum(prefix)])
    rarest = csr_matrix((np.ones(len(columns), dtype=np.int32), columns, ends), shape=sets.shape)
    users = np.bincount(columns, minlength=sets.shape[1])
    cells = np.concatenate([[0], np.cumsum(users[columns])])[ends]
    others = rarest.T.tocsr()
    for start, end in _chunks(np.diff(cells)):
        common = (rarest[start:end] @ others).tocoo()
        first, second = common.row + start, common.col
        chosen = (first < second) & (common.data >= np.minimum(wanted[first], wanted[second]))
        first, second = first[chosen], second[chosen]
        # So many 5-grams must be common, and no more can be.
        chosen = (1 + LEAST) * np.minimum(lengths[first], lengths[second]) >= LEAST * (sizes[first] + sizes[second])
        first, second = first[chosen], second[chosen]
        order = np.lexsort((second, first))
        yield first[order], second[order]


def _similar(
    sets: "csr_matrix", sizes: "np.ndarray", first: "np.ndarray", second: "np.ndarray"
) -> Iterator[tuple[int, int, float]]:
    """Yields those of the pairs that are similar enough, with their similarity."""
    import numpy as np

    lengths = np.diff(sets.indptr)
    for start, end in _chunks(lengths[first] + lengths[second]):
        one, other = first[start:end], second[start:end]
        common = np.asarray(sets[one].multiply(sets[other]).sum(axis=1)).ravel()
        similarity = common / (sizes[one] + sizes[other] - common)
        kept = np.flatnonzero(similarity >= LEAST)
        yield from zip(one[kept].tolist(), other[kept].tolist(), similarity[kept].tolist(), strict=True)


def _chunks(cells: "np.ndarray") -> Iterator[tuple[int, int]]:
    """Yields start and end of runs of rows that have at most `CHUNK_CELLS` of `cells` together, or are one row."""
    import numpy as np

    sums = np.concatenate([[0], np.cumsum(cells)])
    start = 0
    while start < len(cells):
        end = max(start + 1, int(np.searchsorted(sums, sums[start] + CHUNK_CELLS, side="right")) - 1)
        yield start, end
        start = end


def _shingles(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return (
        [" ".join(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))]
        if words
        else []
    )
