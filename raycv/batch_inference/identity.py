"""The facts that the scores of a file depend on: recorded when it begins, compared when it continues."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raycv.batch_inference.pairs import PairSource
from raycv.common.files import sha256_of
from raycv.data.dataset import criteria_hash
from raycv.inference.choose import Chosen
from raycv.model.base_files import comparable
from raycv.model.base_model import fetch_trained_base
from raycv.model.checkpoint import MANIFEST, read_info

IDENTITY_BYTES = 1_000_000
BASE, MISSING = "the base model", "missing"


def identity_of(source: PairSource, chosen: Chosen, base: str | None) -> dict[str, Any]:
    """The facts that the scores depend on, under names that a message can use. The engine is not among them.

    Nor are precision and attention: the first chunk tells them, and ScoreFile holds the others to them.

    Args:
        source: The file and what its rows are asked for.
        chosen: The checkpoints.
        base: Folder or hub id of the base model now; None for where training found it.

    Raises:
        UserError: The base model is not there.
    """
    asked = source.asked.text if source.asked else ""
    return {
        **identity_of_input(source),
        "the checkpoints": [_checkpoint_hash(folder) for folder in chosen.checkpoints],
        # All checkpoints of a run have the same base model.
        BASE: [_base_sums(folder, base) for folder in chosen.checkpoints[:1]],
        "the criteria": criteria_hash(source.criteria),
        "criterion": hashlib.sha256(asked.encode("utf-8")).hexdigest(),
        "the records of a chunk": source.chunk_records,
        MISSING: source.missing,
    }


def identity_of_input(source: PairSource) -> dict[str, Any]:
    """The facts that can change while the file is scored."""
    stat = source.path.stat()
    with source.path.open("rb") as file:
        head = hashlib.sha256(file.read(IDENTITY_BYTES)).hexdigest()
    return {
        "the size of the input": stat.st_size,
        "the time of the input": stat.st_mtime_ns,
        "the beginning of the input": head,
    }


def takes_missing_as_text(begun: Mapping[str, Any]) -> bool:
    """Whether the file with the identity `begun` is of an earlier version, which took NaN and the like as text."""
    return MISSING not in begun


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of what differs between the identity of a file that was begun and that of this command."""
    if takes_missing_as_text(then):
        # The file continues as it began, even if the command says otherwise.
        now = {name: value for name, value in now.items() if name != MISSING}
    names = [name for name in {**now, **then} if now.get(name) != then.get(name)]
    return [name for name in names if name != BASE or _other_base(then.get(BASE), now.get(BASE))]


def _other_base(then: Any, now: Any) -> bool:
    """Whether the base model is another, apart from files that earlier versions did not record."""
    if not (then and now):
        return True
    (then,), (now,) = then, now
    return {file: now[file] for file in comparable(now, then)} != dict(then)


def _checkpoint_hash(folder: Path) -> str:
    """A hash of the adapter, the head, the threshold and the prompt's rules."""
    digest = hashlib.sha256()
    for path in sorted([folder / MANIFEST, *folder.glob("adapter_model.*")]):
        digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def _base_sums(checkpoint: Path, given: str | None) -> dict[str, str]:
    """Checksums of the base model's files. Their place does not count, as it may hold another model next time."""
    info = read_info(checkpoint)
    return fetch_trained_base(info.base_model, info.base_revision, given).sums()
