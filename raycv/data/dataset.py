"""Loads the data set: tables to validated pairs, counts, hashes, and warnings about the data (FR-012).

All faults are reported at once, with their places and without text. The columns tell two layouts apart. One is the
specification's: posts, groundtruth and criteria. The other is the ReDSM5 release, whose sentence annotations
`parsing.py` turns into pairs.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from raycv.common.files import sha256_of
from raycv.common.table_reader import Missing
from raycv.data.discovery import ANNOTATIONS, CRITERIA, GROUNDTRUTH, POSTS, Sources, find_criteria, find_sources
from raycv.data.parsing import Labels, Texts, read_labels, read_texts
from raycv.data.types import Criterion, Dataset, Pair
from raycv.errors import counted
from raycv.row_faults import Faults, Kind, listed, named

EXPECTED_COUNTS = {"posts": 1484, "criteria": 9, "pairs": 13356}
"""Size of ReDSM5 (FR-012)."""
EXPECTED_IN_RELEASE = {"positives": 1292, "posts_without_positive": 392}
"""Further counts of the ReDSM5 release, which check the derivation of pairs."""


def load_dataset(
    posts_dir: Path, criteria_dir: Path, *, empty: Literal["drop", "refuse"] = "drop", missing: Missing = "empty"
) -> Dataset:
    """Reads and validates a data set.

    Posts, criteria and pairs are sorted by their ids as plain strings, so "A.10" comes before "A.2". The order of the
    rows in the files does not matter. Every character of a text is kept.

    Args:
        posts_dir: The folder with the posts and the labels.
        criteria_dir: The folder with the criteria, which may be the same.
        empty: Whether a post or criterion without text is dropped with its pairs and a warning, or is a fault (the
            specification's edge cases).
        missing: Whether a cell that holds only NaN, NULL or the like counts as an empty text, or as that text.

    Raises:
        FaultsError: The files have faults. The error names every fault of every file.
    """
    posts_dir, criteria_dir = Path(posts_dir), Path(criteria_dir)
    faults = Faults()
    sources = find_sources(posts_dir, criteria_dir, faults)
    posts = read_texts(sources.posts, POSTS, faults, missing)
    criteria = read_texts(sources.criteria, CRITERIA, faults, missing)
    labels = read_labels(sources, posts, criteria, faults)
    if empty == "refuse":
        _refuse_empty(posts, criteria, faults)
    pairs: list[Pair] = []
    if posts and criteria and labels:
        pairs = _pairs(posts, criteria, labels)
        _check_grid(posts, criteria, labels, faults)
        _check_classes(posts, criteria, labels, pairs, faults)
    faults.raise_any(f"The data in {posts_dir} with the criteria in {criteria_dir} cannot be used")
    assert posts is not None
    assert criteria is not None
    assert labels is not None
    return _dataset(posts, criteria, labels, pairs, sources)


def load_criteria(folder: Path, *, missing: Missing = "empty") -> dict[str, Criterion]:
    """The criteria in `folder` that hold text, by id, in the order of the ids; `missing` as in `load_dataset`.

    Raises:
        FaultsError: The file has faults. The error names every one.
    """
    faults = Faults()
    criteria = read_texts(find_criteria(Path(folder), faults), CRITERIA, faults, missing)
    if criteria is not None and criteria.whole and not criteria.kept():
        faults.add(Kind.NO_CRITERIA, criteria.path, "holds no criterion with text")
    faults.raise_any(f"The criteria in {folder} cannot be used")
    assert criteria is not None
    return {key: Criterion(key, criteria.texts[key], criteria.symptom_of(key)) for key in criteria.kept()}


# --- The grid --------------------------------------------------------------------------------------------------------


def _pairs(posts: Texts, criteria: Texts, labels: Labels) -> list[Pair]:
    """All labelled posts x criteria with text, sorted. In the release a pair that nobody annotated is unmatched."""
    grid = product(posts.kept(), criteria.kept())
    if labels.official:
        return [labels.pairs.get(pair) or Pair(*pair, label=0) for pair in grid]
    return [labels.pairs[pair] for pair in grid if pair in labels.pairs]


def _refuse_empty(posts: Texts | None, criteria: Texts | None, faults: Faults) -> None:
    for found, name in ((posts, "post"), (criteria, "criterion")):
        if found is not None:
            for key in found.blank():
                held = f": its cell holds {found.missing[key]}" if key in found.missing else ""
                faults.add(Kind.EMPTY, found.path, f"{name} {named(key)} has no text{held}", found.places[key])


def _check_grid(posts: Texts, criteria: Texts, labels: Labels, faults: Faults) -> None:
    """Reports posts and criteria that no label uses, and pairs without a label.

    The release labels every pair, so only a criterion that its annotations cannot name is a fault there.
    """
    if labels.official:
        for key in sorted(criteria.texts.keys() - criteria.codes.values()):
            detail = f"criterion_id {named(key)} is not one of A.1 to A.9, so the annotations cannot name it"
            faults.add(Kind.UNUSED_CRITERION, criteria.path, detail, criteria.places[key])
    elif labels.whole and not faults.has(Kind.ROUNDED):
        used_posts = _used({post_id for post_id, _ in labels.seen}, posts, Kind.UNUSED_POST, labels, faults)
        used_criteria = _used({key for _, key in labels.seen}, criteria, Kind.UNUSED_CRITERION, labels, faults)
        for post_id, criterion_id in product(used_posts, used_criteria):
            if (post_id, criterion_id) not in labels.seen:
                detail = f"post {named(post_id)} x criterion {named(criterion_id)} has no row"
                faults.add(Kind.NO_PAIR, labels.path, detail)


def _used(seen: set[str], file: Texts, kind: Kind, labels: Labels, faults: Faults) -> list[str]:
    """The ids with text that the labels use. An unused id is one fault, however many pairs it would have."""
    what = "post_id" if kind is Kind.UNUSED_POST else "criterion_id"
    for key in file.kept():
        if key not in seen:
            faults.add(kind, file.path, f"{what} {named(key)} has no row in {labels.path.name}", file.places[key])
    return [key for key in file.kept() if key in seen]


def _check_classes(posts: Texts, criteria: Texts, labels: Labels, pairs: list[Pair], faults: Faults) -> None:
    if not (posts.whole and criteria.whole and labels.whole) or faults.has(
        Kind.LABEL, Kind.NO_LABEL, Kind.FIELD_COUNT, Kind.ROUNDED
    ):
        return
    classes = {pair.label for pair in pairs}
    if not pairs:
        size = f"{len(posts.kept()):,} posts x {len(criteria.kept()):,} criteria hold text"
        faults.add(Kind.CLASSES, labels.path, f"no pair of post and criterion is left: {size}")
    elif len(classes) == 1:
        only = "yes (1)" if classes == {1} else "no (0)"
        faults.add(Kind.CLASSES, labels.path, f"all {len(pairs):,} pairs have the label {only}")


def _dataset(posts: Texts, criteria: Texts, labels: Labels, pairs: list[Pair], sources: Sources) -> Dataset:
    texts = {post_id: posts.texts[post_id] for post_id in posts.kept()}
    kept = {key: Criterion(key, criteria.texts[key], criteria.symptom_of(key)) for key in criteria.kept()}
    all_pairs = len(posts.texts) * len(criteria.texts) if labels.official else len(labels.pairs)
    files = {POSTS: posts.path, ANNOTATIONS if labels.official else GROUNDTRUTH: labels.path, CRITERIA: criteria.path}
    stats: dict[str, Any] = {
        "layout": "official" if labels.official else "specification",
        "files": {table: file_stats(path) for table, path in files.items()},
        **count(texts, kept, pairs),
        "dropped": {"posts": posts.blank(), "criteria": criteria.blank(), "pairs": all_pairs - len(pairs)},
        "missing": {
            POSTS: dict(Counter(posts.missing.values())),
            CRITERIA: dict(Counter(criteria.missing.values())),
        },
    }
    if labels.official:
        names = ("rows", "special_case", "aliased", "repeated", "contradictory")
        stats["annotations"] = {name: labels.counts[name] for name in names}
    claims = [name for path in (posts.path, labels.path) for name in (path.name, path.absolute().parent.name)]
    claimed = labels.official or any("redsm5" in name.casefold() for name in claims)
    return Dataset(
        texts, kept, pairs, stats, [*sources.warnings, *size_warning(stats, claimed), *warnings_about(stats)]
    )


def with_shuffled_labels(dataset: Dataset, seed: int) -> Dataset:
    """The control: labels permuted over all pairs tell a model nothing about the posts."""
    labels = [pair.label for pair in dataset.pairs]
    random.Random(seed).shuffle(labels)
    pairs = [replace(pair, label=label) for pair, label in zip(dataset.pairs, labels, strict=True)]
    warning = "data.shuffle_labels=true: the labels are permuted, so these scores are a control and not a result"
    stats = dataset.stats | count(dataset.posts, dataset.criteria, pairs)
    return replace(dataset, pairs=pairs, stats=stats, warnings=[*dataset.warnings, warning])


# --- Numbers and hashes ----------------------------------------------------------------------------------------------


def data_hash(posts: Mapping[str, str], pairs: Iterable[Pair]) -> str:
    """Hex sha256 of the training data: post texts, pairs and labels. Layout and order of the files do not change it."""
    digest = hashlib.sha256()
    for post_id, text in sorted(posts.items()):
        _update(digest, post_id, hashlib.sha256(text.encode("utf-8")).hexdigest())
    for pair in sorted(pairs, key=lambda pair: (pair.post_id, pair.criterion_id)):
        _update(digest, pair.post_id, pair.criterion_id, pair.label)
    return digest.hexdigest()


def criteria_hash(criteria: Mapping[str, Criterion]) -> str:
    """Hex sha256 of the criteria's ids and wording. The wording is model input, so inference compares this hash."""
    digest = hashlib.sha256()
    for criterion_id, criterion in sorted(criteria.items()):
        _update(digest, criterion_id, criterion.text)
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", *values: object) -> None:
    digest.update(json.dumps(values, ensure_ascii=True).encode("ascii") + b"\n")


def file_stats(path: Path) -> dict[str, Any]:
    """Name, size in bytes and hex sha256 of a file."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def count(posts: Mapping[str, str], criteria: Mapping[str, Criterion], pairs: list[Pair]) -> dict[str, Any]:
    """Counts, prevalence (positives / pairs), words per post (separated by white space) and hashes of a data set.

    The data set must have a pair.
    """
    positives = [pair for pair in pairs if pair.label == 1]
    per_criterion = Counter(pair.criterion_id for pair in positives)
    words = sorted(len(text.split()) for text in posts.values())
    middle = len(words) // 2
    return {
        "posts": len(posts),
        "criteria": len(criteria),
        "pairs": len(pairs),
        "expected": dict(EXPECTED_COUNTS),
        "positives": len(positives),
        "negatives": len(pairs) - len(positives),
        "positive_rate": len(positives) / len(pairs),
        "positives_per_criterion": {criterion_id: per_criterion[criterion_id] for criterion_id in sorted(criteria)},
        "posts_without_positive": len(posts.keys() - {pair.post_id for pair in positives}),
        "hard_negatives": sum(pair.explicit_negative for pair in pairs),
        "posts_with_repeated_text": len(posts) - len(set(posts.values())),
        "words_per_post": {
            "min": words[0],
            "mean": sum(words) / len(words),
            "median": (words[middle] + words[-middle - 1]) / 2,
            "max": words[-1],
        },
        "data_hash": data_hash(posts, pairs),
        "criteria_hash": criteria_hash(criteria),
    }


def warnings_about(stats: Mapping[str, Any]) -> list[str]:
    """Warnings about a usable data set: dropped texts, empty cells, repeated rows."""
    return [
        *_repeat_warning(stats),
        *_drop_warnings(stats["dropped"]),
        *_missing_warnings(stats["missing"]),
        *_annotation_warnings(stats.get("annotations", {})),
    ]


def size_warning(stats: Mapping[str, Any], claimed: bool) -> list[str]:
    """A warning about unexpected counts (FR-012) of data that are `claimed` to be ReDSM5, by their form or a name."""
    if not claimed:
        return []
    expected = EXPECTED_COUNTS | (EXPECTED_IN_RELEASE if stats["layout"] == "official" else {})
    if all(stats[name] == number for name, number in expected.items()):
        return []
    wanted = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in expected.items())
    return [
        f"This is not the whole of ReDSM5, which has {wanted}: here are {stats['posts']:,} posts,"
        f" {stats['criteria']:,} criteria, {stats['pairs']:,} pairs, {stats['positives']:,} positives"
        f" ({stats['positive_rate']:.2%}), {stats['posts_without_positive']:,} posts without positive."
    ]


def _repeat_warning(stats: Mapping[str, Any]) -> list[str]:
    if not stats["posts_with_repeated_text"]:
        return []
    return [
        f"{counted(stats['posts_with_repeated_text'], 'post')} with the text of another post: where the two fall into"
        " different folds, a validation post was seen in training, which flatters the scores."
    ]


def _drop_warnings(dropped: Mapping[str, Any]) -> list[str]:
    return [
        f"{len(dropped[table]):,} {one if len(dropped[table]) == 1 else table} without text dropped, with the pairs:"
        f" {listed(dropped[table])}."
        for table, one in (("posts", "post"), ("criteria", "criterion"))
        if dropped[table]
    ]


def _missing_warnings(missing: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [
        f"Cells of the {table} that hold only what software writes for nothing"
        f" ({', '.join(f'{number:,} x {spelling}' for spelling, number in sorted(spellings.items()))}) count as without"
        " text; data.missing=text keeps such cells as text."
        for table, spellings in missing.items()
        if spellings
    ]


def _annotation_warnings(annotations: Mapping[str, int]) -> list[str]:
    if not annotations.get("repeated"):
        return []
    return [
        f"{annotations['repeated']:,} annotation rows repeat the sentence and symptom of an earlier row,"
        f" {annotations['contradictory']:,} of them with another status: the larger status counts, once."
    ]
