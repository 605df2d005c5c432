"""What travels between the driver, the trials and the workers: the task of a fold, and the board where they post."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycv.common.files import read_json, write_json
from raycv.config.schema import RunConfig
from raycv.data.splits import Split
from raycv.data.types import Dataset, Pair
from raycv.errors import UserError
from raycv.prompts.template import PromptRules
from raycv.resources.nodes import NodeNeeds
from raycv.resources.placement import Placement

if TYPE_CHECKING:
    import ray.train

    from raycv.model.base_files import BaseFiles
    from raycv.prompts.encoder import EncodedPairs, PromptEncoder

FOLD_KEY = "fold"
"""The one parameter of a trial."""


@dataclass(frozen=True)
class SharedArrays:
    """What all folds read. Lives in the object store; workers map its arrays instead of copying them."""

    encoded: "EncodedPairs"
    splits: list["Split"]
    pairs: list[Pair]
    texts: tuple[dict[str, str], dict[str, str]] | None
    """of posts and criteria, by id; only if they are to stand in the predictions (privacy.log_text)"""


@dataclass(frozen=True)
class FoldTask:
    """Everything that a trial needs besides its fold number. Travels to trials and workers, so it stays small."""

    config: RunConfig
    run: str
    root: str
    shared: "ray.ObjectRef"
    """of SharedArrays"""
    base: "BaseFiles"
    rules: PromptRules
    criteria: dict[str, str | None]
    criteria_dir: str
    criteria_hash: str
    placement: Placement
    needs: NodeNeeds
    """what every node must have as the driver has it"""
    board: Any
    """handle of the ProgressBoard actor"""
    worker: Callable[[dict[str, Any]], dict[str, Any]]
    """train_worker, or what a benchmark puts in its place"""


class ProgressBoard:
    """An actor where workers post how far they are and the driver's live view reads it, never in training's way.

    `kept`: the file of what outlives its process, which Ray starts anew if it dies: attempts, places, nodes.
    """

    def __init__(self, kept: str) -> None:
        self._posts: dict[int, dict[str, Any]] = {}
        self._events: list[tuple[int, str]] = []
        self._errors: dict[int, tuple[str, list[str]]] = {}
        self._kept = Path(kept)
        empty: dict[str, dict[str, Any]] = {"places": {}, "attempts": {}, "left_out": {}}
        earlier = read_json(self._kept) if self._kept.is_file() else empty
        self._places: dict[int, str] = {int(fold): place for fold, place in earlier["places"].items()}
        self._attempts: dict[int, int] = {int(fold): count for fold, count in earlier["attempts"].items()}
        self._left_out: dict[str, tuple[str, list[str]]] = earlier["left_out"]

    def post(self, fold: int, post: dict[str, Any]) -> None:
        self._posts.setdefault(fold, {}).update(post)

    def tell(self, fold: int, text: str) -> None:
        self._events.append((fold, text))

    def begin(self, fold: int) -> int:
        """Counts an attempt at a fold, which is beginning. Returns how many there are: they outlive their processes."""
        self._attempts[fold] = self._attempts.get(fold, 0) + 1
        self._keep()
        return self._attempts[fold]

    def begun(self, fold: int) -> int:
        """How many attempts at a fold have begun."""
        return self._attempts.get(fold, 0)

    def fail(self, fold: int, message: str, remedies: list[str]) -> None:
        """Why a fold failed, where there was no room to write it down."""
        self._errors[fold] = message, remedies

    def error(self, fold: int) -> tuple[str, list[str]] | None:
        """What `fail` was told."""
        return self._errors.get(fold)

    def hold(self, fold: int, place: str) -> None:
        """The placement group that the workers of a fold are in, by its id."""
        self._places[fold] = place
        self._keep()

    def held(self, fold: int) -> str | None:
        """The id of the placement group that a fold held last, and None from then on."""
        place = self._places.pop(fold, None)
        self._keep()
        return place

    def leave_out(self, node: str, why: str, remedies: list[str]) -> None:
        """No fold of the run is to be trained on `node` (its id in Ray) any more."""
        self._left_out[node] = why, remedies
        self._keep()

    def left_out(self) -> dict[str, tuple[str, list[str]]]:
        """The nodes that are left out, each with the reason and what to do."""
        return self._left_out

    def read(self) -> tuple[dict[int, dict[str, Any]], list[tuple[int, str]]]:
        """The latest post of each fold, and the events since the last call."""
        events, self._events = self._events, []
        return self._posts, events

    def _keep(self) -> None:
        # On a full disk it is in memory still.
        with contextlib.suppress(OSError, UserError):
            kept = {"places": self._places, "attempts": self._attempts, "left_out": self._left_out}
            write_json(self._kept, kept)


@dataclass(frozen=True)
class Prepared:
    """All that the folds need, made once in the driver."""

    dataset: Dataset
    splits: list[Split]
    base: "BaseFiles"
    encoder: "PromptEncoder"
    encoded: "EncodedPairs"
    base_facts: dict[str, Any]
    encoding_facts: dict[str, Any]
    warnings: list[str]
