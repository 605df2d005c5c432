"""The fingerprint of what decides an answer: a scorer and its client compute it, and compare the two."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from raycv.common.locations import resolve
from raycv.data.discovery import find_criteria
from raycv.model.base_model import fetch_trained_base, is_folder
from raycv.model.checkpoint import MANIFEST, SUMMED, read_info
from raycv.row_faults import Faults
from raycv.utils import NUMERICS


def fingerprint(
    stamps: Mapping[str, Sequence[int]], base: str, precision: str, device: str | None, finished: str | None
) -> str:
    """The SHA-256 of all that decides an answer and the text of it.

    Args:
        stamps: The stamps of the files that the answer depends on.
        base: Folder or hub id of the base model.
        precision: The precision of the computation: fp32, bf16 or int8.
        device: The kind of device that computes: cpu or cuda.
        finished: When the run was complete, if that is known. Each answer says it.
    """
    facts = [NUMERICS, stamps, base, precision, device, finished]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def stamps_of(files: Iterable[Path]) -> dict[str, list[int]]:
    """Path -> stamp of each file, which any copy over the file changes. Raises: OSError if a file cannot be read."""
    return {str(path): _stamp(path) for path in files}


def _stamp(path: Path) -> list[int]:
    """Time of change in ns, size in bytes, inode number."""
    status = path.stat()
    return [status.st_ctime_ns, status.st_size, status.st_ino]


def first_changed(stamps: Mapping[str, list[int]]) -> str | None:
    """The first file of `stamps` that has changed or cannot be read; None if there is no such file."""
    for file, stamp in stamps.items():
        try:
            same = _stamp(Path(file)) == stamp
        except (OSError, ValueError):
            same = False
        if not same:
            return file
    return None


def files_of(checkpoints: Sequence[Path], criteria_dir: str | None, base: str | None) -> list[Path]:
    """The files that answers depend on. A base model from the hub has a known commit, so its files never change.

    Raises:
        UserError: A checkpoint cannot be read, or the folder of the base model.
    """
    info = read_info(checkpoints[0])
    files = [folder / name for folder in checkpoints for name in (MANIFEST, *SUMMED)]
    # The load of the model refuses a checkpoint that lacks one of these, and explains it.
    files = [file for file in files if file.is_file()]
    # The criteria were found when they were read, so we ignore faults here. Other files of their folder may change
    # with every answer, so we stamp only the file of the criteria.
    criteria = find_criteria(Path(resolve(criteria_dir or info.criteria_dir)), Faults())
    files += [criteria] if criteria else []
    if is_folder(resolve(base or info.base_model)):
        found = fetch_trained_base(info.base_model, info.base_revision, base)
        files += [found.path / name for name in found.files]
    return files
