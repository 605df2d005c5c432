"""The state of a file of scores: how far it is, the facts that it depends on, and whether a command may continue it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raycv.batch_inference.pairs import PairSource, ScoredChunk
from raycv.common.files import read_json, sha256_of, write_text
from raycv.data.dataset import criteria_hash
from raycv.errors import UserError
from raycv.inference.choose import Chosen
from raycv.model.base_files import comparable
from raycv.model.base_model import fetch_trained_base
from raycv.model.checkpoint import MANIFEST, read_info
from raycv.utils import FIRST_NUMERICS, NUMERICS

FORMAT = 2
"""The number of the state's format. Raise it by one when the format changes. Format 1 has no attention."""
FORMATS_READ = (1, FORMAT)
SUM = "sha256"
"""Key of the state's own checksum. An output that continues a damaged state would lack rows, or repeat some."""


@dataclass(frozen=True)
class Progress:
    """The part of the output that is safely on disk."""

    identity: dict[str, Any]
    """the facts that the scores depend on; only a run with the same facts may continue the output"""
    records: int = 0
    pairs: int = 0
    matched: int = 0
    truncated: int = 0
    bad: int = 0
    precision: str | None = None
    attention: str | None = None
    """None before the first chunk, and in states of earlier versions"""
    threshold: float | None = None
    part_bytes: int = 0
    errors_bytes: int = 0
    finished: bool = False
    """everything is scored; only the move into place is left"""
    numerics: int = FIRST_NUMERICS
    """the number of the arithmetic of the scores (`raycv.utils.NUMERICS`)"""


def sum_of_state(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()


def write_state(path: Path, progress: Progress) -> None:
    """Writes a state, whole or not at all. Raises: OSError; UserError if the disk is full."""
    values = {"format": FORMAT, **asdict(progress)}
    write_text(path, json.dumps({**values, SUM: sum_of_state(values)}, indent=2) + "\n", private=True)


def read_state(path: Path, restart: str) -> Progress:
    """Reads the state of this or an earlier version.

    Args:
        path: The file.
        restart: The step that starts the output again, for messages.

    Raises:
        UserError: It is damaged, or a later version wrote it.
    """
    remedies = [f"to start again, {restart}"]
    try:
        values = read_json(path, "output-differs")
    except UserError as error:
        raise UserError(error.what, kind=error.kinds, remedies=["name another output", *remedies]) from error
    if not isinstance(values, dict) or values.pop(SUM, None) != sum_of_state(values):
        raise UserError(f"{path} is damaged.", kind="output-differs", remedies=remedies)
    # States of earlier versions say no format.
    written = values.pop("format", FORMATS_READ[0])
    if written not in FORMATS_READ:
        what = f"{path} was written by another version of raycv: its format is {written}, and not {FORMAT}."
        raise UserError(what, kind="package-version", remedies=["continue with that version of raycv", *remedies])
    # Earlier versions counted each version of raycv as another arithmetic, so we drop that entry.
    values["identity"].pop("the version of raycv", None)
    return Progress(**values)


def is_same(found: Progress, ours: Progress) -> bool:
    """Whether both come from the same arithmetic and the same inputs."""
    return found.numerics == ours.numerics and not changed(found.identity, ours.identity)


def check_continues(found: Progress, ours: Progress, output: Path, restart: str) -> None:
    """Raises: UserError if the scores of `found` depend on anything else than those of this command would."""
    if found.numerics != NUMERICS:
        raise UserError(
            f"{output} was begun by another version of raycv, whose arithmetic has number {found.numerics}. "
            f"The arithmetic of this version has number {NUMERICS}, and its scores would differ.",
            kind="package-version",
            remedies=["continue with that version of raycv", f"to start again, {restart}", "name another output"],
        )
    if names := changed(found.identity, ours.identity):
        what = f"{output} was begun with other inputs and cannot be continued: {', '.join(names)} changed."
        remedies = ["run the command as it was", f"to start again, {restart}", "name another output"]
        raise UserError(what, kind="output-differs", remedies=remedies)


def check_computed(before: Progress, chunk: ScoredChunk, output: Path, restart: str) -> None:
    """Raises: UserError if `chunk` was computed in another precision or with another attention than `before`."""
    if before.precision not in (None, chunk.precision):
        what = f"The scores in {output} were computed in {before.precision}, these would be in {chunk.precision}."
        raise UserError(
            what, kind="output-differs", remedies=[f"infer.precision={before.precision}", "name another output"]
        )
    then = before.attention or chunk.earlier_attention
    if before.records and then != chunk.attention:
        raise UserError(
            f"The scores in {output} were computed with {then} attention, these would be with {chunk.attention}.",
            kind="output-differs",
            remedies=[
                "continue with the version of raycv and on the kind of device that began the file",
                f"to start again, {restart}",
                "name another output: output=<file>",
            ],
        )


# --- The facts that scores depend on ---------------------------------------------------------------------------------

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
