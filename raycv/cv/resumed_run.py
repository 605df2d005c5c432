"""A run that resumes: compared with what it recorded, then opened again where it stopped."""

import contextlib
import shutil
from collections.abc import Collection
from typing import TYPE_CHECKING

from rich.console import Console

from raycv.common.environment import describe_environment
from raycv.common.files import read_json, write_json
from raycv.common.locations import place_of
from raycv.config.schema import RunConfig
from raycv.cv.new_run import check_runs_folder
from raycv.cv.open_run import OpenRun
from raycv.cv.preparation import Base
from raycv.cv.resume import Earlier, earlier_run, sole_process
from raycv.data.splits import Split
from raycv.data.types import Dataset
from raycv.errors import UserError, counted
from raycv.orchestration.fold_task import RESTARTS, Prepared
from raycv.rendering.terminal import say
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import RunFolder, read_record
from raycv.results.storage import retire
from raycv.tracking.lookup import tracked_run

if TYPE_CHECKING:
    from raycv.tracking.cross_validation import CrossValidationStore


class ResumedRun:
    """The run that `config.resume` names. It keeps other processes out of its folder until `held` ends."""

    wants_all_folds = True

    def __init__(self, config: RunConfig, typed: Collection[str], console: Console, held: contextlib.ExitStack) -> None:
        """`typed`: keys that the command line sets. Raises: UserError if there is no such run, or it is finished."""
        self._earlier = earlier_run(config, typed)
        self._typed = typed
        self._console = console
        self.config = self._earlier.config
        held.callback(retire, self._earlier.folder)
        held.enter_context(sole_process(self._earlier.folder))
        root = self._earlier.folder.root
        say(console, f"Resuming run {root.name} in {place_of(root.parent)}")

    def check_data(self, dataset: Dataset, splits: list[Split]) -> None:
        """Raises: UserError if data, splits, config or versions differ from what the run recorded."""
        self._earlier.check(dataset, splits)
        for warning in self._earlier.warnings():
            say(self._console, f"Warning: {warning}", "yellow")
        check_runs_folder(self.config)

    def check_base(self, base: Base) -> None:
        """Raises: UserError if the base model is another, a state cannot be continued, or MLflow lacks the run."""
        self._earlier.check_base(base.facts)
        self._earlier.check_attention(base.config)
        self._earlier.check_states()
        self._store, self._parent_id = earlier_store(self._earlier, self._typed)

    def check_nodes(self, base: Base) -> None:
        """Raises: UserError if a node does not see the run's folder, or has other code than the driver."""
        from raycv.orchestration.cluster import check_nodes

        check_nodes(self._earlier.folder, base.files)

    def open(self, prepared: Prepared) -> OpenRun:
        """Opens the run where it stopped. Raises: UserError if prompts differ from the record."""
        self._earlier.check_prompts(prepared.encoding_facts)
        return OpenRun(
            self.config,
            self._earlier.folder,
            self._store,
            self._parent_id,
            self._console,
            make_ready=self._make_ready,
        )

    def _make_ready(self) -> None:
        """Marks the run as under way, records where, and removes what its earlier processes left half done."""
        folder, folds = self._earlier.folder, self.config.cv.folds
        for fold in folder.finished(folds):
            try:
                FoldResult.of(folder, fold)
            except UserError as error:
                say(self._console, f"Warning: fold {fold} is trained again: {error.what}", "yellow")
                folder.fold(fold).set_result_aside()
        finished = folder.finished(folds)
        kept = f"{counted(len(finished), 'finished fold')} of {folds} kept as they are"
        say(self._console, f"Resuming run {folder.root.name}: {kept}")
        for fold in range(folds):
            files = folder.fold(fold)
            files.error.unlink(missing_ok=True)
            if fold in finished:
                shutil.rmtree(files.state, ignore_errors=True)
            for half in files.root.glob(".*"):
                shutil.rmtree(half) if half.is_dir() else half.unlink()
        clear_ray(folder, finished=len(finished) == folds)
        environment = read_record(folder.environment)
        resumed = [*environment.get("resumed", []), describe_environment()]
        write_json(folder.environment, environment | {"resumed": resumed})
        self._store.reopen(self._parent_id)


def clear_ray(folder: RunFolder, *, finished: bool) -> None:
    """Removes Ray's own files of earlier processes, but for the reasons of restarts if a fold is not `finished`."""
    board = {}
    with contextlib.suppress(UserError):
        board = read_json(folder.board)
    # Ray Train would resume from its own files under the same name; training resumes from ours.
    shutil.rmtree(folder.ray, ignore_errors=True)
    if board.get(RESTARTS) and not finished:
        # The results of folds name all their restarts. Attempts and nodes count from zero.
        folder.ray.mkdir()
        write_json(folder.board, {RESTARTS: board[RESTARTS]})


def earlier_store(earlier: Earlier, typed: Collection[str]) -> tuple["CrossValidationStore", str]:
    """The MLflow store of an earlier run, and the id of its parent there."""
    return tracked_run(earlier.folder, earlier.config.tracking.uri, "tracking.uri", given="tracking.uri" in typed)
