"""The files of a run folder and of its folds, by name; the commands to resume, aggregate and ask it."""

import secrets
import shlex
from pathlib import Path

from raycv.common.files import sha256_of, write_text


class RunFolder:
    """The files of one run. On several nodes it lies on storage that every node sees under the same path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.splits = root / "splits.json"
        self.data_stats = root / "data_stats.json"
        self.environment = root / "environment.json"
        self.tracking = root / "tracking.json"
        self.report = root / "report.json"
        """Written last of all: its presence means that the run is complete. Its `finished` says since when."""
        self.lock = root / ".lock"
        """Held by the process that runs it; gone when it is complete."""
        self.share = root / ".share"
        """A nonce of the driver, by which a node knows that it sees this folder; gone when the run is complete."""
        self.ray = root / "ray"
        """Ray's own storage of this run, gone when it is complete."""

    def fold(self, fold: int) -> "FoldFolder":
        """The files of fold `fold` (0-based)."""
        return FoldFolder(self.root / f"fold_{fold}")

    def has_begun(self) -> bool:
        """Whether there is something to go on with: MLflow has the run, or a fold has left something."""
        return self.tracking.is_file() or next(self.root.glob("fold_*"), None) is not None

    def finished(self, folds: int) -> list[int]:
        """Which of fold 0 to `folds` - 1 are finished."""
        return [fold for fold in range(folds) if self.fold(fold).result.is_file()]


def share_nonce(folder: RunFolder) -> str:
    """The nonce in the run's folder, which the driver writes there once. Nodes only read it."""
    if not folder.share.is_file():
        write_text(folder.share, secrets.token_hex(16))
    return folder.share.read_text(encoding="utf-8")


def resume_command(folder: RunFolder) -> str:
    """What to type to go on with the run in `folder`."""
    return _command("raycv.run", "resume", "run.dir", folder)


def aggregate_command(folder: RunFolder) -> str:
    """What to type for the summary of the run in `folder` once more, in MLflow too."""
    return _command("raycv.aggregate", "run", "dir", folder)


def infer_command(folder: RunFolder) -> str:
    """What to type to ask the best fold of the run in `folder`, but for the post."""
    return _command("raycv.infer", "run", "dir", folder)


def _command(module: str, name_key: str, place_key: str, folder: RunFolder) -> str:
    elsewhere = [] if folder.root.parent == Path("runs").absolute() else [f"{place_key}={folder.root.parent}"]
    return shlex.join(["python", "-m", module, f"{name_key}={folder.root.name}", *elsewhere])


class FoldFolder:
    """The files of one fold."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.result = root / "result.json"
        """Written last of the fold's files: its presence means that the fold is finished."""
        self.predictions = root / "predictions.csv"
        self.checkpoint = root / "checkpoint"
        self.error = root / "error.json"
        """Why the fold failed, if it did."""
        self.state = root / "state"
        """What training goes on from after an interruption; gone when the fold is finished."""

    def sums(self) -> dict[str, str]:
        """SHA-256 of the predictions and of each file of the checkpoint, by its path in the folder."""
        return {self.predictions.name: sha256_of(self.predictions), **self.checkpoint_sums()}

    def checkpoint_sums(self) -> dict[str, str]:
        """SHA-256 of each file of the checkpoint, by its path in the folder."""
        files = sorted(path for path in self.checkpoint.rglob("*") if path.is_file())
        return {file.relative_to(self.root).as_posix(): sha256_of(file) for file in files}

    def set_result_aside(self) -> None:
        """Makes the fold one that is not finished, since its files are not as its result says."""
        self.result.replace(self.result.with_suffix(".damaged.json"))
