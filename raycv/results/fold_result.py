"""The result of a finished fold, which its file `result.json` holds."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycv.common.files import record_of
from raycv.common.locations import address_of
from raycv.errors import UserError
from raycv.model.checkpoint import MANIFEST
from raycv.results.run_folder import GOOD_COPY, RunFolder, read_record
from raycv.training.metrics import METRICS, collapse_reasons
from raycv.utils import FIRST_NUMERICS


@dataclass(frozen=True)
class FoldResult:
    """The result of a finished fold, as written to `result.json`. `fold` counts from 0, epochs from 1."""

    fold: int
    threshold: float
    best_epoch: int
    epochs: int
    metrics: dict[str, float]
    """the five metrics on the validation pairs at `threshold`, after the best epoch"""
    seconds: float
    """wall time of the training loop, model loading included"""
    train_pairs: int
    val_pairs: int
    val_matched: int
    history: list[dict[str, float]]
    """a dict per epoch: epoch, losses, the five metrics, threshold, learning_rate, micro_batch, seconds"""
    events: list[str]
    """events that a reader should know: out-of-memory, early stopping"""
    worker: dict[str, Any]
    """host, device, precision and parameters of the training"""
    sha256: dict[str, str] = field(default_factory=dict)
    """checksums of the fold's other files, by their path in its folder"""
    collapsed: list[str] | None = None
    """the reasons why the classifier counts as collapsed, empty if it does not; None if an earlier version recorded no
    reasons"""
    numerics: int = FIRST_NUMERICS
    """the number of the arithmetic that computed it (`raycv.utils.NUMERICS`)"""
    restarts: list[str] | None = None
    """the reason of each restart: a process that died, or a node that was left out; None if an earlier version did not
    record them"""

    def out_of_memory(self) -> int:
        """Returns how often training ran out of memory and continued with less."""
        return sum("out of memory" in event for event in self.events)

    def collapse(self) -> list[str]:
        """Returns why the classifier counts as collapsed: the recorded reasons, else those that the metrics show."""
        if self.collapsed is not None:
            return self.collapsed
        return collapse_reasons(self.metrics, self.val_matched, self.val_pairs)

    @classmethod
    def read(cls, path: Path) -> "FoldResult":
        """Reads a fold's result.

        Raises:
            UserError: The file is missing, damaged, or not a fold's result.
        """
        try:
            result = record_of(cls, read_record(path))
        except ValueError as error:
            raise _damaged(f"{path} is not a fold result of this version of raycv: {error}.") from error
        shares = {name: result.metrics.get(name, math.nan) for name in METRICS} | {"threshold": result.threshold}
        if wrong := [name for name, value in shares.items() if not 0 <= value <= 1]:
            what = f"{', '.join(wrong)} must lie in 0..1"
            raise _damaged(f"{path} is not a fold result of this version of raycv: {what}.")
        return result

    @classmethod
    def fault(cls, root: RunFolder, fold: int) -> str | None:
        """Names the fault in the files of a fold that has its result; None if they are whole."""
        try:
            cls.of(root, fold)
        except UserError as error:
            return error.what
        return None

    @classmethod
    def of(cls, folder: RunFolder, fold: int) -> "FoldResult":
        """Returns the result of a finished fold, after checking that its files are unchanged.

        Raises:
            UserError: One of the files is missing, damaged, or another fold's.
        """
        files = folder.fold(fold)
        result = cls.read(files.result)
        if result.fold != fold:
            raise _damaged(f"{files.result} is that of fold {result.fold}.")
        try:
            there = files.sums()
        except OSError as error:
            raise _damaged(f"{error.filename} cannot be read: {error.strerror}.") from error
        # A local copy of a run in an object storage has a checkpoint only if it was asked for.
        optional = f"{files.checkpoint.name}/" if address_of(folder.root) and not files.checkpoint.is_dir() else None
        # Results of earlier versions have no checksums, so we only check that two of the files exist.
        for name in result.sha256 or (files.predictions.name, f"{files.checkpoint.name}/{MANIFEST}"):
            if name not in there:
                if optional and name.startswith(optional):
                    continue
                raise _damaged(f"{files.root / name} is missing.")
            if there[name] != result.sha256.get(name, there[name]):
                raise _damaged(f"{files.root / name} is damaged: it does not have its checksum.")
        return result


def _damaged(what: str) -> UserError:
    return UserError(what, kind="run-damaged", remedies=[GOOD_COPY])
