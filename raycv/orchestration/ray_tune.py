"""Ray Tune: each fold is a trial; tells whether a trial's fold is finished, or why it failed."""

import contextlib
import pickle
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.exceptions
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search import BasicVariantGenerator
from ray.tune.trainable import wrap_function
from ray.util.placement_group import placement_group_table

from raycv.common.files import read_json, unwritable
from raycv.common.locations import absolute_folder
from raycv.config.schema import RunConfig
from raycv.errors import ErrorKind, RunFailedError, UserError, counted, known_kind, last_line
from raycv.orchestration.cluster import explained_loss, node_resources, this_node, watched_cluster
from raycv.orchestration.fold_task import FOLD_KEY, TRIAL_DIED, FoldTask, ProgressBoard, SharedArrays
from raycv.orchestration.fold_worker import train_worker
from raycv.orchestration.ray_train import died_too_often, fold_trial, free_place
from raycv.rendering.terminal import DONE, FAILED, STARTING, LiveView
from raycv.resources.nodes import NodeNeeds, node_name
from raycv.resources.placement import CLUSTER_FILE, Placement, awaited, busy, node_types
from raycv.resources.survey import settled
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import RunFolder, resume_command
from raycv.results.storage import checkpoint_part, fold_part
from raycv.training.metrics import F1

if TYPE_CHECKING:
    from raycv.orchestration.fold_task import Prepared

HEAD_NODE = "node:__internal_head__"
POLL_SECONDS = 0.25
LOOK_SECONDS = 5.0
"""Between two looks for nodes that joined or were lost."""
MARKS = 2**24
"""So many numbers of bytes mark the folds of a run: two runs of a cluster seldom have the same."""
STOPPED = "it was stopped before it ended"


def fold_task(
    config: RunConfig, folder: RunFolder, prepared: "Prepared", placement: Placement, *, resumed: bool = False
) -> FoldTask:
    """Makes the task of trials and workers. The arrays go through the object store once; weights never do."""
    dataset = prepared.dataset
    texts = (dataset.posts, {key: criterion.text for key, criterion in dataset.criteria.items()})
    return FoldTask(
        # Trials and workers write logs and state of their own, and none of them talks to the tracking store.
        config=config.without_secrets(),
        run=folder.root.name,
        root=str(folder.root),
        shared=ray.put(
            SharedArrays(prepared.encoded, prepared.splits, dataset.pairs, texts if config.privacy.log_text else None)
        ),
        base=prepared.base,
        base_sums=prepared.base_facts["sha256"],
        rules=prepared.encoder.rules,
        criteria={criterion_id: criterion.symptom for criterion_id, criterion in dataset.criteria.items()},
        criteria_dir=absolute_folder(config.data.criteria_dir),
        criteria_hash=dataset.stats["criteria_hash"],
        placement=placement,
        needs=NodeNeeds.of(folder),
        board=progress_board(folder),
        worker=train_worker,
        # Node types of a cluster that grows may name no memory, and would then never be started. Ray Train's own
        # process frees places there.
        mark=0 if config.resources.autoscaling else 1 + secrets.randbelow(MARKS),
        home=ray.get_runtime_context().get_node_id(),
        resumed=resumed,
    )


def progress_board(folder: RunFolder) -> Any:
    """Starts the board of a run. Returns the actor's handle; Ray restarts the actor if its process dies."""
    board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ProgressBoard)
    # On this node: the run may lose any other and continue.
    named = board.options(name=f"{folder.root.name}/board", scheduling_strategy=this_node())
    return named.remote(str(folder.board))


def _trainable(trial: Callable[..., None], task: FoldTask) -> type[tune.Trainable]:
    """The function `trial` as a class, whose actors Ray's dashboard names `<run>/fold_<k>`."""

    # Trial drivers only wait for their workers: with a CPU each they would starve them, so they take none.
    function = tune.with_resources(tune.with_parameters(trial, task=task), {"CPU": 0, HEAD_NODE: 0.001})

    class FoldTrial(wrap_function(function)):  # type: ignore[misc]  # made by a call
        def __repr__(self) -> str:
            # Ray asks once. An actor that serves several folds is named for none of them.
            return f"{task.run}/{'folds' if task.placement.alone else self.trial_name}"

    return FoldTrial


def run_folds(
    task: FoldTask,
    folds: list[int],
    placement: Placement,
    runs: tune.Callback,
    view: LiveView,
    trial: Callable[..., None] = fold_trial,
) -> None:
    """Runs `folds` as Tune trials, which leave their results in the run's folder.

    `trial`: the function of a trial, or what a benchmark puts in its place.

    Raises: RunFailedError if a fold failed; the others are finished and kept all the same.
    """
    root = RunFolder(Path(task.root))
    states = FoldStates(view, root, task)
    nodes = NodeWatch(task, placement, view)
    tuner = tune.Tuner(
        _trainable(trial, task),
        param_space={FOLD_KEY: tune.grid_search(folds)},
        tune_config=tune.TuneConfig(
            search_alg=nodes.to_start,
            # On one machine a trial's process, once it has imported Ray Train and torch, serves the next fold too. On a
            # cluster each fold has its own, with its name.
            reuse_actors=placement.alone,
            trial_name_creator=lambda trial: f"{FOLD_KEY}_{trial.config[FOLD_KEY]}",
            trial_dirname_creator=lambda trial: f"{FOLD_KEY}_{trial.config[FOLD_KEY]}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(root.ray),
            # In this order: `states` decides whether a fold is finished, then `runs` logs the same to MLflow.
            callbacks=[states, runs, nodes],
            # A trial raises only if its process dies. A fold that fails writes its error to a file.
            failure_config=tune.FailureConfig(max_failures=task.config.resources.retries),
            verbose=0,
        ),
    )
    otherwise = STOPPED
    with explained_loss(root), watched_cluster(root), _followed(task.board, view, nodes):
        try:
            tuner.fit()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            # A full disk leaves Tune's own files half written. The folds' files tell what became of the folds.
            full = unwritable("What Ray keeps of the run", root.root, error)
            otherwise = full.what
            states.kinds += full.kinds
            states.remedies += full.remedies
    failed = [fold for fold in folds if not states.finished(fold)]
    if failed:
        lines = [f"Run {task.run} failed: fold {', '.join(map(str, failed))} did not finish, so there is no report."]
        lines += _causes({fold: states.errors.get(fold, otherwise) for fold in failed})
        resume = resume_command(root, task.config.cv.only)
        remedies = [
            *dict.fromkeys(states.remedies),
            f"fix the cause, then train the missing folds alone, with the same settings: {resume}",
            f"what is finished is kept in {root.root}",
        ]
        raise RunFailedError("\n".join(lines), kind=("run-failed", *states.kinds), remedies=remedies)
    shutil.rmtree(root.ray, ignore_errors=True)


def _causes(errors: dict[int, str]) -> list[str]:
    """A line for each cause, with its folds."""
    folds_of: dict[str, list[int]] = {}
    for fold, error in errors.items():
        folds_of.setdefault(error, []).append(fold)
    return [f"fold {', '.join(map(str, folds))}: {error}" for error, folds in folds_of.items()]


class NodeWatch(tune.Callback):
    """Starts as many folds at once as the nodes hold now, and tells what the folds wait for, up to a time limit."""

    def __init__(self, task: FoldTask, placement: Placement, view: LiveView) -> None:
        self.task = task
        self.placement = placement
        self.view = view
        self.to_start = BasicVariantGenerator(max_concurrent=placement.concurrent)
        """Tune's own list of trials"""
        self.types = node_types(CLUSTER_FILE.expanduser())
        self._waits_since: float | None = None
        self._unplaced: set[int] = set()
        """folds that had no place at the last look"""
        self._told_busy: set[int] = set()
        self._refusal: RunFailedError | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks; a terminal cannot be

    def look(self) -> None:
        """Looks at the nodes. A thread calls it again and again: a cluster that is gone would let it wait."""
        now = time.monotonic()
        asked = self.task.config.resources
        nodes = node_resources(ray.get(self.task.board.left_out.remote()))
        waits = awaited(self.placement, nodes, self.types, asked.autoscaling)
        if waits is None:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
            self.view.tell(None, f"{waits}. raycv waits {asked.wait_minutes:g} minutes at most")
        elif now - self._waits_since > asked.wait_minutes * 60:
            self._refusal = RunFailedError(
                f"Run {self.task.run} failed: {waits}. raycv waited {asked.wait_minutes:g} minutes.",
                kind="cluster-resources",
                remedies=[
                    "see what the cluster does: ray status",
                    "ask for less: resources.gpus_per_fold=0, resources.cpus_per_fold=1",
                    f"wait for longer, in minutes: {resume_command(RunFolder(Path(self.task.root)))} "
                    "resources.wait_minutes=600",
                ],
            )
        if waits is None:
            self._tell_busy(nodes)
        if not asked.autoscaling and (at_once := self.placement.at_once(nodes)) != self.to_start.max_concurrent:
            self.view.tell(None, f"the cluster changed: up to {counted(at_once, 'fold')} at once from now on")
            self.to_start.max_concurrent = at_once

    def _tell_busy(self, nodes: list[dict[str, float]]) -> None:
        """Tells what each fold waits for that has had no place for two looks, although a node could hold it."""
        marks = {self.task.mark_of(fold): fold for fold in range(self.task.config.cv.folds) if self.task.mark}
        groups = [group for group in placement_group_table().values() if group["state"] == "PENDING"]
        unplaced = {marks[mark] for group in groups if (mark := group["bundles"][0].get("memory")) in marks}
        for fold in sorted(unplaced & self._unplaced - self._told_busy):
            self.view.tell(fold, busy(self.placement, nodes, ray.available_resources()))
        self._told_busy = unplaced & (self._told_busy | self._unplaced)
        self._unplaced = unplaced

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._refusal is not None:
            raise self._refusal


class FoldStates(TrialProgressCallback):
    """Tells the live view when trials start and end, and why they failed. In place of Tune's own, which prints."""

    def __init__(self, view: LiveView, root: RunFolder, task: FoldTask) -> None:
        super().__init__()
        self.view = view
        self.root = root
        self.task = task
        self.errors: dict[int, str] = {}
        self.kinds: list[ErrorKind] = []
        self.remedies: list[str] = []
        self._finished: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks; a terminal cannot be

    def on_trial_result(self, *_: Any, **__: Any) -> None:
        pass  # The board has it.

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.view.update(trial.config[FOLD_KEY], {"state": STARTING})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        fold = trial.config[FOLD_KEY]
        result = self.root.fold(fold).result
        self._bring(fold)
        # A trial on another node writes a result or an error. The driver may see either late.
        settled(lambda: None if result.is_file() or self._said(fold) else STOPPED)
        said = None if result.is_file() else self._said(fold)
        if said is not None:
            self._failed(fold, *said)
        elif not self.finished(fold):
            self._failed(fold, self.errors.get(fold, STOPPED))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process of the trial died, once too often."""
        fold = trial.config[FOLD_KEY]
        free_place(self.task, fold)
        self._bring(fold)
        if self.finished(fold):
            return
        if fold in self.errors:
            self._failed(fold, self.errors[fold])
            return
        error = trial.get_error()
        if error is None or isinstance(error, ray.exceptions.RayActorError):
            attempts = ray.get(self.task.board.begun.remote(fold))
            died = died_too_often(TRIAL_DIED, self.task.config.resources.retries, attempts)
            self._failed(fold, died.what, died.kind, died.remedies)
        else:
            self._failed(fold, last_line(error))

    def _bring(self, fold: int) -> None:
        """Fetches a fold whose trial ran on another node than the driver, if the run is in an object storage."""
        published = self.task.published
        if published is not None and not self.root.fold(fold).result.is_file() and self._said(fold) is None:
            with contextlib.suppress(UserError):
                published.fetch(checkpoint_part(fold))
                published.fetch(fold_part(fold))

    def _said(self, fold: int) -> tuple[str, ErrorKind, Sequence[str]] | None:
        """Why the fold failed, of what kind that is, and what to do, if its trial wrote or posted it."""
        file = self.root.fold(fold).error
        if file.is_file():
            record = read_json(file)
            log = self.root.fold(fold).log
            output = f", output of the workers in fold_<k>/{log.name}" if log.is_file() else ""
            message = f"{record['message']}\n  (traceback in fold_<k>/{file.name}{output})"
            return message, known_kind(record.get("kind"), "run-failed"), record["remedies"]
        # The disk was full, or the trial's node does not see the run's folder.
        told: tuple[str, ErrorKind, Sequence[str]] | None = ray.get(self.task.board.error.remote(fold))
        return told

    def finished(self, fold: int) -> bool:
        """Whether the fold is finished, even if its trial failed: the driver finds the files that the worker wrote.

        It sets a result without its files aside, so that a resumed run trains the fold again.
        """
        files = self.root.fold(fold)
        if fold in self._finished or not files.result.is_file():
            return fold in self._finished
        fault = settled(lambda: FoldResult.fault(self.root, fold))
        if fault is not None:
            self.errors[fold] = f"{fault} {_trained_at(files.result)}; the driver does not find what it wrote there."
            files.set_result_aside()
            return False
        self._finished.add(fold)
        shutil.rmtree(files.state, ignore_errors=True)
        self.view.update(fold, {"state": DONE})
        return True

    def _failed(self, fold: int, error: str, kind: ErrorKind = "run-failed", remedies: Sequence[str] = ()) -> None:
        """Shows the error now. The remedies come at the run's end, once for all folds."""
        self.errors[fold] = error
        self.kinds.append(kind)
        self.remedies += remedies
        self.view.update(fold, {"state": FAILED})
        self.view.tell(fold, error)


def _trained_at(result: Path) -> str:
    """Says where the fold of `result` was trained, as far as the file can tell."""
    try:
        worker = FoldResult.read(result).worker
        return f"The fold was trained at {node_name(worker['address'], worker['host'])}"
    except (UserError, KeyError):
        return "The fold was trained at a node that its result does not name"


@contextmanager
def _followed(board: Any, view: LiveView, nodes: NodeWatch) -> Iterator[None]:
    """Carries the workers' posts from `board` to `view` while the block runs, and watches the nodes."""
    over = threading.Event()
    best: dict[int, float] = {}

    def carry() -> None:
        posts, events = ray.get(board.read.remote())
        for fold, post in posts.items():
            if "history" in post:
                best[fold] = max(best.get(fold, post.get("earlier_f1", 0.0)), post["history"][F1])
                post = {**post, "best_f1": best[fold]}
            view.update(fold, post)
        for fold, text in events:
            view.tell(fold, text)
        view.wait()

    def repeat(work: Callable[[], None], seconds: float) -> None:
        while not over.wait(seconds):
            # Ray may be restarting the board.
            with contextlib.suppress(ray.exceptions.RayError):
                work()

    following = threading.Thread(target=repeat, args=(carry, POLL_SECONDS), daemon=True)
    looking = threading.Thread(target=repeat, args=(nodes.look, LOOK_SECONDS), daemon=True)
    following.start()
    looking.start()
    interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        over.set()
        # A look or a post takes a moment, or for ever if the cluster is gone. A signal that stops the run may have
        # ended the cluster too, and cannot wait for that.
        looking.join(timeout=1)
        following.join(timeout=1 if interrupted else 10)
        if not interrupted:
            with contextlib.suppress(ray.exceptions.RayError):
                carry()  # the last posts
