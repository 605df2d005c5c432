"""The paths of the files in a run folder; reads its records, and spells the commands that take a run."""

import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raycv.common.files import read_json, sha256_of, write_text
from raycv.common.locations import place_of
from raycv.errors import UserError

GOOD_COPY = (
    "put a good copy in its place: MLflow may have it among the run's artifacts; finished folds stay as they are"
)
"""The remedy for a damaged record of a run."""
AFRESH = "start afresh under a new name, with the settings that you want: python -m raycv.run run.name=<new> ..."


class RunFolder:
    """The files of one run. With several nodes, they all see the folder under the same path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.splits = root / "splits.json"
        self.data_stats = root / "data_stats.json"
        self.environment = root / "environment.json"
        self.pairs = root / "pairs.csv"
        self.near_duplicates = root / "near_duplicates.csv"
        self.tracking = root / "tracking.json"
        self.report = root / "report.json"
        """Written last: its presence means that the run is complete. Its `finished` holds the time."""
        self.evaluation = root / "evaluation.json"
        """The statistics. It and the files below are made from the others, after the report, and can be made again."""
        self.page = root / "report.html"
        self.page_markdown = root / "report.md"
        self.model_card = root / "model_card.md"
        self.tables = root / "tables"
        self.figures = root / "figures"
        self.reproduction = root / "reproduction.json"
        """Whether this run came to the same as another, whose folds it trained again."""
        self.lock = root / ".lock"
        """Held by the process that runs it; removed when the run is complete."""
        self.share = root / ".share"
        """A nonce of the driver, by which a node knows that it sees this folder; removed when the run is complete."""
        self.ray = root / "ray"
        """Ray's own storage of this run; removed when the run is complete."""
        self.board = self.ray / "board.json"
        """Attempts at folds, and why they were restarted."""

    def fold(self, fold: int) -> "FoldFolder":
        """Returns the files of fold `fold` (0-based)."""
        return FoldFolder(self.root / f"fold_{fold}")

    def has_begun(self) -> bool:
        """Returns whether there is something to resume: MLflow has the run, or a fold has a folder."""
        return self.tracking.is_file() or next(self.root.glob("fold_*"), None) is not None

    def finished(self, folds: int) -> list[int]:
        """Returns the numbers of the finished folds among 0 to `folds` - 1."""
        return [fold for fold in range(folds) if self.fold(fold).result.is_file()]


def share_nonce(folder: RunFolder) -> str:
    """Returns the nonce in the run's folder. The driver writes it there once; nodes only read it."""
    if not folder.share.is_file():
        write_text(folder.share, secrets.token_hex(16))
    return folder.share.read_text(encoding="utf-8")


def read_record(path: Path, *texts: str, **kinds: Any) -> dict[str, Any]:
    """Reads a JSON object of the run folder and checks its keys.

    Args:
        path: The file.
        texts: Keys that must be there with a text as value.
        kinds: Further keys that must be there, each with the type of its value.

    Raises:
        UserError: The file is missing or damaged, or a key is missing or has a value of another type.
    """
    try:
        values = read_json(path)
    except UserError as error:
        raise UserError(error.what, kind="run-damaged", remedies=[GOOD_COPY]) from error
    if not isinstance(values, dict):
        fault = "it is not a JSON object"
    else:
        kinds = dict.fromkeys(texts, str) | kinds
        lacking = [key for key, kind in kinds.items() if key not in values or not isinstance(values[key], kind)]
        if not lacking:
            return values
        fault = f"it lacks {', '.join(lacking)}"
    raise UserError(f"{path} is damaged: {fault}.", kind="run-damaged", remedies=[GOOD_COPY])


def resume_command(folder: RunFolder, only: Sequence[int] | None = None) -> str:
    """Returns the command that resumes the run in `folder`; `only`: the folds to train then, None for all."""
    more = [] if only is None else [f"cv.only={list(only)}".replace(" ", "")]
    return _command("raycv.run", "resume", "run.dir", folder, more)


def aggregate_command(folder: RunFolder) -> str:
    """Returns the command that prints the summary of the run in `folder` again, and logs it to MLflow."""
    return _command("raycv.aggregate", "run", "dir", folder)


def report_command(folder: RunFolder) -> str:
    """Returns the command that makes the page of the run in `folder` again."""
    return _command("raycv.report", "run", "dir", folder)


def infer_command(folder: RunFolder) -> str:
    """Returns the command that asks the best fold of the run in `folder`, without the post."""
    return _command("raycv.infer", "run", "dir", folder)


def _command(module: str, name_key: str, place_key: str, folder: RunFolder, more: Sequence[str] = ()) -> str:
    elsewhere = [] if folder.root.parent == Path("runs").absolute() else [f"{place_key}={place_of(folder.root.parent)}"]
    return shlex.join(["python", "-m", module, f"{name_key}={folder.root.name}", *elsewhere, *more])


class FoldFolder:
    """The files of one fold."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.result = root / "result.json"
        """Written last of the fold's files: its presence means that the fold is finished."""
        self.predictions = root / "predictions.csv"
        self.epoch_scores = root / "epoch_scores.npy"
        """float64 [epochs, n_val]: the scores after each epoch, in the order of the predictions. Earlier versions wrote
        none, and a fold that resumed from their states has none."""
        self.checkpoint = root / "checkpoint"
        self.error = root / "error.json"
        """Why the fold failed, if it did."""
        self.log = root / "worker.log"
        """Output of the workers that train the fold; removed when the fold is finished."""
        self.state = root / "state"
        """The training states from which an interrupted fold resumes. They are gone when the fold is finished."""

    def sums(self) -> dict[str, str]:
        """Returns the SHA-256 of the scores and of each file of the checkpoint, by its path in the folder."""
        scores = [self.predictions, *([self.epoch_scores] if self.epoch_scores.is_file() else [])]
        return {file.name: sha256_of(file) for file in scores} | self.checkpoint_sums()

    def checkpoint_sums(self) -> dict[str, str]:
        """Returns the SHA-256 of each file of the checkpoint, by its path in the folder."""
        files = sorted(path for path in self.checkpoint.rglob("*") if path.is_file())
        return {file.relative_to(self.root).as_posix(): sha256_of(file) for file in files}

    def set_result_aside(self) -> None:
        """Renames the result of a fold whose files are not as it says, so that the fold counts as unfinished."""
        self.result.replace(self.result.with_suffix(".damaged.json"))
