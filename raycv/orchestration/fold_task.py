"""The messages between driver, trials and workers: the task of a fold, and the board where they post."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycv.common.files import read_json, write_json
from raycv.config.schema import RunConfig
from raycv.data.prompt_template import PromptRules
from raycv.data.splits import Split
from raycv.data.types import Dataset, Pair
from raycv.errors import ErrorKind, UserError
from raycv.resources.nodes import NodeNeeds
from raycv.resources.placement import Placement
from raycv.results.run_folder import RunFolder
from raycv.results.storage import PublishedRun

if TYPE_CHECKING:
    import ray.train

    from raycv.data.prompt_encoder import EncodedPairs, PromptEncoder
    from raycv.model.base_files import BaseFiles

FOLD_KEY = "fold"
"""The one parameter of a trial."""
TRIAL_DIED = "the process that drives the fold died"
NODE_LEAVES = "Ray restarted the fold elsewhere, since its node was to leave"
RESTARTS = "restarts"
"""The key of the file of a ProgressBoard that a resumed run keeps."""


@dataclass(frozen=True)
class SharedArrays:
    """The arrays that all folds read. They live in the object store; workers map them instead of copying them."""

    encoded: "EncodedPairs"
    splits: list["Split"]
    pairs: list[Pair]
    texts: tuple[dict[str, str], dict[str, str]] | None
    """posts and criteria by id, if the user wants them in the predictions (privacy.log_text); otherwise None"""


@dataclass(frozen=True)
class FoldTask:
    """Everything that a trial needs besides its fold number. Travels to trials and workers, so it stays small."""

    config: RunConfig
    run: str
    root: str
    shared: "ray.ObjectRef"
    """to the SharedArrays"""
    base: "BaseFiles"
    base_sums: Mapping[str, str]
    """the checksum of each file of the base model, as the driver reads it"""
    rules: PromptRules
    criteria: dict[str, str | None]
    criteria_dir: str
    criteria_hash: str
    placement: Placement
    needs: NodeNeeds
    """files and versions that every node must share with the driver"""
    board: Any
    """handle of the ProgressBoard actor"""
    worker: Callable[[dict[str, Any]], dict[str, Any]]
    """train_worker, or what a benchmark puts in its place"""
    mark: int = 0
    """the least result of `mark_of`; 0 for no marks"""
    home: str = ""
    """the driver's node, as Ray's id"""
    resumed: bool = False
    """whether an earlier process of the run may have left training states"""

    @property
    def published(self) -> PublishedRun | None:
        """The run in its object storage, and this node's local copy; None for a run in a folder."""
        return PublishedRun(self.needs.published, RunFolder(Path(self.root))) if self.needs.published else None

    def mark_of(self, fold: int) -> int:
        """The bytes of memory that tell the placement group of the fold's workers from others; 0 for no mark.

        Ray Train names neither the group nor its maker, and Ray keeps the group of a dead process until the run ends.
        """
        return self.mark and self.mark + fold


class ProgressBoard:
    """An actor where workers post how far they are and the driver's live view reads it, never in training's way.

    `kept`: its file. It keeps attempts, restarts and left-out nodes for the next process if Ray restarts it.
    """

    def __init__(self, kept: str) -> None:
        self._posts: dict[int, dict[str, Any]] = {}
        self._epochs: dict[int, list[dict[str, float]]] = {}
        self._events: list[tuple[int, str]] = []
        self._errors: dict[int, tuple[str, ErrorKind, list[str]]] = {}
        self._kept = Path(kept)
        earlier: dict[str, dict[str, Any]] = read_json(self._kept) if self._kept.is_file() else {}
        self._attempts: dict[int, int] = {int(fold): count for fold, count in earlier.get("attempts", {}).items()}
        self._restarts: dict[int, list[str]] = {int(fold): whys for fold, whys in earlier.get(RESTARTS, {}).items()}
        self._left_out: dict[str, tuple[str, list[str]]] = earlier.get("left_out", {})
        self._training: set[int] = set()
        """folds whose workers have begun, and which were not restarted since"""

    def post(self, fold: int, post: dict[str, Any]) -> None:
        self._posts.setdefault(fold, {}).update(post)
        if "history" in post:
            self._epochs.setdefault(fold, []).append(post["history"])

    def epochs(self, fold: int) -> list[dict[str, float]]:
        """The metrics of the fold's epochs that were posted to this process."""
        return self._epochs.get(fold, [])

    def tell(self, fold: int, text: str) -> None:
        self._events.append((fold, text))

    def begin(self, fold: int) -> int:
        """Counts an attempt at a fold. Returns the number of attempts, which survives the death of a process."""
        self._attempts[fold] = self._attempts.get(fold, 0) + 1
        self._keep()
        return self._attempts[fold]

    def begun(self, fold: int) -> int:
        """How many attempts at a fold have begun."""
        return self._attempts.get(fold, 0)

    def train(self, fold: int) -> None:
        """Notes that the first worker of a fold begins. Ray Train restarts workers if a node is to leave."""
        if fold in self._training:
            self.restart(fold, NODE_LEAVES)
        self._training.add(fold)

    def restart(self, fold: int, why: str) -> None:
        """Keeps why a fold is trained again from its last state."""
        self._training.discard(fold)
        self._restarts.setdefault(fold, []).append(why)
        self._keep()

    def restarts(self, fold: int) -> list[str]:
        """The reasons of `restart` for the fold, those of earlier processes of the run included."""
        return self._restarts.get(fold, [])

    def fail(self, fold: int, message: str, kind: ErrorKind, remedies: list[str]) -> None:
        """Keeps why a fold failed, in case the trial cannot write a file."""
        self._errors[fold] = message, kind, remedies

    def error(self, fold: int) -> tuple[str, ErrorKind, list[str]] | None:
        """The arguments of the last `fail` for the fold, or None."""
        return self._errors.get(fold)

    def free(self, mark: int) -> None:
        """Removes the placement groups with `mark`: Ray keeps those of a dead process until the run ends."""
        import ray
        from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

        for place, group in placement_group_table().items():
            if group["state"] != "REMOVED" and group["bundles"][0].get("memory") == mark:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(place))))

    def leave_out(self, node: str, why: str, remedies: list[str]) -> None:
        """Keeps all later folds of the run away from `node` (its id in Ray)."""
        self._left_out[node] = why, remedies
        self._keep()

    def left_out(self) -> dict[str, tuple[str, list[str]]]:
        """The nodes that get no fold, each with the reason and what to do."""
        return self._left_out

    def read(self) -> tuple[dict[int, dict[str, Any]], list[tuple[int, str]]]:
        """The latest post of each fold, and the events since the last call."""
        events, self._events = self._events, []
        return self._posts, events

    def _keep(self) -> None:
        # If the disk is full, memory still has it.
        with contextlib.suppress(OSError, UserError):
            kept = {"attempts": self._attempts, RESTARTS: self._restarts, "left_out": self._left_out}
            write_json(self._kept, kept)


GAUGES = {
    "raycv_epoch": "epoch of the fold, from 1",
    "raycv_step": "optimizer steps of the epoch so far",
    "raycv_steps": "optimizer steps of an epoch",
    "raycv_loss": "training loss of the last step",
    "raycv_validation_f1": "F1 of the last epoch on the fold's validation pairs",
    "raycv_tokens_per_second": "tokens trained per second, all workers of the fold together",
    "raycv_gpu_memory_bytes": "memory of its GPU that the fold's first worker holds",
    "raycv_seconds_left": "seconds until the last epoch ends, if no epoch stops the fold early",
}
"""The gauges of a fold, which Ray exports as `ray_<name>` with the tags `run` and `fold`, and their descriptions."""


class FoldGauges:
    """The gauges of a fold, in the process of its first worker: its node exports them while the fold trains."""

    def __init__(self, run: str, fold: int, epochs: int, tokens_per_step: float) -> None:
        """`tokens_per_step`: the mean, over the fold's training pairs."""
        from ray.util.metrics import Gauge

        self.epochs = epochs
        self.tokens_per_step = tokens_per_step
        self._tags = {"run": run, "fold": str(fold)}
        self._gauges = {name: Gauge(name, text, tag_keys=tuple(self._tags)) for name, text in GAUGES.items()}
        self._last: tuple[int, int, float] | None = None
        self._epoch_seconds: float | None = None

    def step(self, epoch: int, step: int, steps: int, loss: float, gpu_memory: int | None) -> None:
        """Shows a step of an epoch, both from 1. `gpu_memory`: bytes, None on a CPU."""
        now = time.monotonic()
        self._set(epoch=epoch, step=step, steps=steps, loss=loss)
        if gpu_memory is not None:
            self._set(gpu_memory_bytes=gpu_memory)
        # Not across epochs: validation lies between them.
        if self._last is not None and self._last[0] == epoch and step > self._last[1]:
            pace = (now - self._last[2]) / (step - self._last[1])
            left = self.epochs - epoch + 1 - step / steps
            self._set(tokens_per_second=self.tokens_per_step / pace)
            self._set(seconds_left=left * (self._epoch_seconds or steps * pace))
        self._last = epoch, step, now

    def epoch(self, epoch: int, f1: float, seconds: float) -> None:
        """Shows the validation F1 of an epoch that took `seconds`, validation included."""
        self._epoch_seconds = seconds
        self._set(validation_f1=f1, seconds_left=(self.epochs - epoch) * seconds)

    def _set(self, **values: float) -> None:
        for name, value in values.items():
            self._gauges[f"raycv_{name}"].set(value, self._tags)


@dataclass(frozen=True)
class Prepared:
    """The input of all folds. The driver makes it once."""

    dataset: Dataset
    splits: list[Split]
    base: "BaseFiles"
    encoder: "PromptEncoder"
    encoded: "EncodedPairs"
    base_facts: dict[str, Any]
    encoding_facts: dict[str, Any]
    warnings: list[str]
