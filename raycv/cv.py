"""The driver: prepares a run, gives each fold to Ray Tune as a trial, reduces the trials into the parent summary."""

import _thread
import contextlib
import logging
import os
import pickle
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

# Posts are sensitive: a tool that reads them does not talk to third parties. Set the variable yourself to differ.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's own table of trials would be printed over ours.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Ctrl-C is ours: Tune would swallow it and call the stopped trials finished.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Tune would ask for the cluster's size every 10 s, for messages that nobody sees, and wait for one that is gone.
os.environ.setdefault("TUNE_STATE_REFRESH_PERIOD", "1e9")
# Ray Train looks at its workers that often, and a report waits for the look: 2 s are felt in short epochs.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# A fold is half a dozen processes that mostly wait; that these are many for few cores is no news to the user.
# The death of a process is told by what becomes of its fold; Ray's own line may come when the run is over.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started on node|A worker died or was killed while"
)

import psutil
import ray
import ray.exceptions
from ray import tune
from ray._private import services
from ray.tune.progress_reporter import TrialProgressCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycv.board import ProgressBoard
from raycv.config import RunConfig
from raycv.errors import FaultsError, RunFailedError, UserError
from raycv.fold import (
    FOLD_KEY,
    TRIAL_DIED,
    FoldTask,
    Placement,
    SharedArrays,
    died_too_often,
    fold_trial,
    free_place,
    node_survey,
    places,
    train_worker,
)
from raycv.live import DONE, FAILED, STARTING, LiveView
from raycv.metrics import F1
from raycv.nodes import NodeNeeds, node_name
from raycv.paths import BUNDLED_SCHEME, RunFolder, absolute_folder, read_json, resume_command, unwritable
from raycv.records import FoldResult
from raycv.retry import cause_of
from raycv.survey import settled
from raycv.utils import STOP_SIGNALS, stop_like_ctrl_c

if TYPE_CHECKING:
    from raycv.base import BaseFiles
    from raycv.driver import Prepared

logger = logging.getLogger(__name__)

HEAD_NODE = "node:__internal_head__"
POLL_SECONDS = 0.25
STOPPED = "it was stopped before it ended"
GONE_SECONDS = 30.0
"""Without an answer, and the head of the cluster is gone. After 60 Ray ends the process."""
JOIN_REMEDIES = (
    "see that the cluster is up: ray status",
    "start one on this machine: ray start --head",
    "where it asks for a token, and this machine has it: RAY_AUTH_MODE=token",
    "unset RAY_ADDRESS, and a local Ray is started for the run",
)


@contextmanager
def ray_cluster(*, ray_logs: bool, dashboard: bool | None = None) -> Iterator[str | None]:
    """Attaches to the cluster of RAY_ADDRESS or of this machine, or starts one; yields the dashboard's address.

    `dashboard`: whether one that is started has a dashboard (nine processes); None is Ray's default: it has.
    """
    _provide_token()
    level = logging.INFO if ray_logs else logging.ERROR
    try:
        address = _cluster_to_join()
        with _interruptible():
            context = ray.init(address, log_to_driver=ray_logs, logging_level=level, include_dashboard=dashboard)
    except UserError:
        raise
    except (OSError, RuntimeError) as error:
        raise UserError(f"Ray cannot be started or joined: {error}", remedies=JOIN_REMEDIES) from error
    except Exception as error:
        # Ray has no type of its own for it.
        if "timed out" not in str(error) and not isinstance(error, ray.exceptions.RaySystemError):
            raise
        remedies = ["wait until the machine is less busy, and try again", JOIN_REMEDIES[1]]
        raise UserError(f"Ray did not start in time: {error}", remedies=remedies) from error
    logging.getLogger("ray").setLevel(level)
    if not ray_logs:
        # Tune would print the whole traceback of a failed trial; the fold's own error is shown, and error.json has all.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Ray's own handler of SIGTERM would end the process where it stands.
    stop_like_ctrl_c()
    try:
        yield context.dashboard_url or None
    finally:
        ray.shutdown()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and what else stops a run end the block, in which Ray starts, and what was started.

    Ray's start forks a dozen processes, and Python drops, with a traceback, what a signal raises within a fork or a
    `__del__`: there it is raised a moment later. What is dropped elsewhere is heeded at the end of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = False

    def interrupt(_: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        while frame is not None:
            if frame.f_code.co_filename == subprocess.__file__ or frame.f_code.co_name == "__del__":
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    numbers = (*STOP_SIGNALS, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
        if asked:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, SystemExit) as error:
        # For SIGTERM Ray sets handlers of its own on the way, which exit.
        _end_ray()
        raise KeyboardInterrupt from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_ray() -> None:
    """Ends a Ray that is not whole: it ends what it knows of, other processes would look for parents for a minute."""
    started = psutil.Process().children(recursive=True)
    ray.shutdown()
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _provide_token() -> None:
    """Ray keeps the token of a cluster below HOME; where nothing can be kept there, this run's processes share one."""
    if any(f"RAY_AUTH_{name}" in os.environ for name in ("MODE", "TOKEN", "TOKEN_PATH")):
        return
    folder = Path(os.environ.get("HOME", "")) / ".ray"
    if folder.is_absolute() and (folder / "auth_token").is_file():
        return
    try:
        if not folder.is_absolute():
            raise FileNotFoundError
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _cluster_to_join() -> str | None:
    """The address of RAY_ADDRESS, or of the cluster that was started on this machine; None if there is neither.

    Ray itself would look for one that is gone for a quarter of an hour.
    Raises: UserError if nothing listens at RAY_ADDRESS; ConnectionError if that is `auto` and there is no cluster.
    """
    address = services.get_ray_address_from_environment(None, None)  # type: ignore[arg-type]  # it takes None
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit() or "://" in host:
        return address
    asked = os.environ.get("RAY_ADDRESS")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        if asked:
            raise UserError(f"RAY_ADDRESS={asked}: nothing answers there ({error}).", remedies=JOIN_REMEDIES) from error
        # What `ray start` wrote down outlives a cluster that was killed, or whose machine was.
        logger.warning("the Ray cluster that was started here, at %s, is gone (%s): one is started", address, error)
        return "local"
    # Only of a cluster that it finds itself does Ray take it that it asks for the token below HOME.
    return address if asked else "auto"


def plan(config: RunConfig) -> Placement:
    """What a fold gets on the cluster as it is now.

    Raises: UserError if no node could ever hold a fold and the cluster does not grow (resources.autoscaling).
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    asked = config.resources
    at_most = config.cv.folds if config.cv.max_concurrent == "auto" else min(config.cv.max_concurrent, config.cv.folds)
    workers = asked.workers_per_fold
    has_gpus = asked.autoscaling or any(node.get("GPU", 0) for node in nodes)
    gpus = float(has_gpus * workers) if asked.gpus_per_fold == "auto" else asked.gpus_per_fold
    if asked.cpus_per_fold == "auto":
        cpus = workers * _even_share(nodes, gpus / workers, at_most * workers)
    else:
        cpus = asked.cpus_per_fold
    if asked.autoscaling:
        return Placement(gpus, cpus, workers, at_most)
    fit = places(nodes, gpus, cpus, workers)
    if fit == 0:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        shared = f" for {workers} workers" if workers > 1 else ""
        raise UserError(
            f"A fold asks for {cpus:g} CPUs and {gpus:g} GPUs{shared}, and no node has them (nodes: {have}).",
            remedies=[
                "lower resources.cpus_per_fold or resources.gpus_per_fold (fractions are fine)",
                "on a cluster that grows on demand: resources.autoscaling=true",
            ],
        )
    return Placement(gpus, cpus, workers, min(fit, at_most), alone=len(nodes) == 1)


def _even_share(nodes: list[dict[str, float]], gpus: float, at_most: int) -> float:
    """Whole cores for each of the workers that can run at once (`at_most`), at least 1; `gpus` is a worker's."""
    if gpus:
        shares = [
            node.get("CPU", 0) // min(node["GPU"] / gpus, at_most) for node in nodes if node.get("GPU", 0) >= gpus
        ]
        return max(1.0, min(shares, default=1.0))
    cores = [node.get("CPU", 0.0) for node in nodes]
    return max(1.0, min(sum(cores) // at_most, max(cores, default=1.0)))


def fold_task(config: RunConfig, folder: RunFolder, prepared: "Prepared", placement: Placement) -> FoldTask:
    """What trials and workers get. The arrays go through the object store once; weights never do."""
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
        rules=prepared.encoder.rules,
        criteria={criterion_id: criterion.symptom for criterion_id, criterion in dataset.criteria.items()},
        criteria_dir=absolute_folder(config.data.criteria_dir),
        criteria_hash=dataset.stats["criteria_hash"],
        placement=placement,
        needs=NodeNeeds.of(folder),
        board=progress_board(folder),
        worker=train_worker,
    )


def progress_board(folder: RunFolder) -> Any:
    """Starts the board of a run. Returns the actor's handle; the actor is started anew if its process dies."""
    board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ProgressBoard)
    # On this node: any other may be lost while the run goes on.
    return board.options(scheduling_strategy=_here()).remote(str(folder.ray / "board.json"))


def _here() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def check_nodes(folder: RunFolder, base: "BaseFiles") -> None:
    """Asks all other nodes whether they see the run's folder and a local base model, and have the driver's code.

    A node that joins later is asked when a worker starts there.
    Raises: FaultsError with all faults of all nodes.
    """
    here = ray.get_runtime_context().get_node_id()
    needs = NodeNeeds.of(folder)
    paths = [str(base.path)] if base.revision is None and not base.name.startswith(BUNDLED_SCHEME) else []
    ask = ray.remote(num_cpus=0)(node_survey())
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != here:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = node_name(node["NodeManagerAddress"], node["NodeManagerHostname"])
            asked[node["NodeID"]] = name, ask.options(scheduling_strategy=there).remote(*needs.question(paths))
    faults, remedies = [], []
    for name, answer in asked.values():
        try:
            found = ray.get(answer)
        except ray.exceptions.RayError as error:
            faults.append(f"{name} cannot be asked: {cause_of(error)}")
            remedies.append("see that the node is up, with the driver's versions of Python and Ray: ray status")
            continue
        differ, what_to_do = needs.compare(name, found)
        faults += differ
        remedies += what_to_do
    if faults:
        title = "The cluster's nodes do not have what the folds need"
        raise FaultsError(title, faults, remedies=list(dict.fromkeys(remedies)))


def run_folds(task: FoldTask, folds: list[int], placement: Placement, runs: tune.Callback, view: LiveView) -> None:
    """Runs `folds` as Tune trials, which leave their results in the run's folder.

    Raises: RunFailedError if a fold failed; the others are finished and kept all the same.
    """
    root = RunFolder(Path(task.root))
    states = _FoldStates(view, root, task.board, task.config.resources.retries)
    # Trial drivers only wait for their workers: with a CPU each they would starve them, so they take none.
    trainable = tune.with_resources(tune.with_parameters(fold_trial, task=task), {"CPU": 0, HEAD_NODE: 0.001})
    tuner = tune.Tuner(
        trainable,
        param_space={FOLD_KEY: tune.grid_search(folds)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=placement.concurrent,
            # A trial's process, once it has imported Ray Train and torch, serves the next fold too.
            reuse_actors=True,
            trial_name_creator=lambda trial: f"{FOLD_KEY}_{trial.config[FOLD_KEY]}",
            trial_dirname_creator=lambda trial: f"{FOLD_KEY}_{trial.config[FOLD_KEY]}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(root.ray),
            # First of all it is decided whether a fold is finished: MLflow is told the same.
            callbacks=[states, runs],
            # What a trial raises is the death of its process; a fold that fails says so in its files.
            failure_config=tune.FailureConfig(max_failures=task.config.resources.retries),
            verbose=0,
        ),
    )
    otherwise = STOPPED
    with _while_the_cluster_is_there(root), _followed(task.board, view):
        try:
            tuner.fit()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            # Tune's own files, which a full disk leaves half: what became of the folds is told by theirs.
            otherwise = str(unwritable("What Ray keeps of the run", root.root, error))
    failed = [fold for fold in folds if not states.finished(fold)]
    if failed:
        lines = [f"Run {task.run} failed: fold {', '.join(map(str, failed))} did not finish, so there is no report."]
        lines += _causes({fold: states.errors.get(fold, otherwise) for fold in failed})
        remedies = [
            *dict.fromkeys(states.remedies),
            f"mend the cause, then train the missing folds alone, with the same settings: {resume_command(root)}",
            f"what is finished is kept in {root.root}",
        ]
        raise RunFailedError("\n".join(lines), remedies=remedies)
    shutil.rmtree(root.ray, ignore_errors=True)


def _causes(errors: dict[int, str]) -> list[str]:
    """A line for each cause, with its folds."""
    folds_of: dict[str, list[int]] = {}
    for fold, error in errors.items():
        folds_of.setdefault(error, []).append(fold)
    return [f"fold {', '.join(map(str, folds))}: {error}" for error, folds in folds_of.items()]


class _FoldStates(TrialProgressCallback):
    """Tells the live view when trials start and end, and why they failed. In place of Tune's own, which prints."""

    def __init__(self, view: LiveView, root: RunFolder, board: Any, retries: int) -> None:
        super().__init__()
        self.view = view
        self.root = root
        self.board = board
        self.retries = retries
        self.errors: dict[int, str] = {}
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
        # A trial on another node writes one or the other; both may be seen late here.
        settled(lambda: None if result.is_file() or self._said(fold) else STOPPED)
        said = None if result.is_file() else self._said(fold)
        if said is not None:
            self._failed(fold, *said)
        elif not self.finished(fold):
            self._failed(fold, self.errors.get(fold, STOPPED))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process of the trial died, once too often."""
        fold = trial.config[FOLD_KEY]
        free_place(self.board, fold)
        if self.finished(fold):
            return
        if fold in self.errors:
            self._failed(fold, self.errors[fold])
            return
        error = trial.get_error()
        if error is None or isinstance(error, ray.exceptions.RayActorError):
            died = died_too_often(TRIAL_DIED, self.retries, ray.get(self.board.begun.remote(fold)))
            self._failed(fold, died.what, died.remedies)
        else:
            self._failed(fold, str(error).strip().splitlines()[-1])

    def _said(self, fold: int) -> tuple[str, Sequence[str]] | None:
        """Why the fold failed, and what to do, if its trial said so."""
        file = self.root.fold(fold).error
        if file.is_file():
            record = read_json(file)
            return f"{record['message']}\n  (traceback in fold_<k>/{file.name})", record["remedies"]
        # There was no room for the file, or its node does not see the run's folder.
        told: tuple[str, Sequence[str]] | None = ray.get(self.board.error.remote(fold))
        return told

    def finished(self, fold: int) -> bool:
        """Whether the fold is finished, whatever became of its trial: its files are here, and as the worker left them.

        A result whose files are not here is set aside, so that a resumed run trains the fold again.
        """
        files = self.root.fold(fold)
        if fold in self._finished or not files.result.is_file():
            return fold in self._finished
        fault = settled(lambda: _fault(self.root, fold))
        if fault is not None:
            self.errors[fold] = f"{fault} {_trained_at(files.result)}; the driver does not find what it wrote there."
            files.set_result_aside()
            return False
        self._finished.add(fold)
        shutil.rmtree(files.state, ignore_errors=True)
        self.view.update(fold, {"state": DONE})
        return True

    def _failed(self, fold: int, error: str, remedies: Sequence[str] = ()) -> None:
        """What to do comes at the run's end, once for all folds."""
        self.errors[fold] = error
        self.remedies += remedies
        self.view.update(fold, {"state": FAILED})
        self.view.tell(fold, error)


def _fault(root: RunFolder, fold: int) -> str | None:
    """What is wrong with the files of a fold that has its result."""
    try:
        FoldResult.of(root, fold)
    except UserError as error:
        return error.what
    return None


def _trained_at(result: Path) -> str:
    """Says where the fold of `result` was trained, as far as the file can tell."""
    try:
        worker = FoldResult.read(result).worker
        return f"The fold was trained at {node_name(worker['address'], worker['host'])}"
    except (UserError, KeyError):
        return "The fold was trained at a node that its result does not name"


@contextmanager
def _while_the_cluster_is_there(root: RunFolder) -> Iterator[None]:
    """Raises: RunFailedError in the main thread if the cluster's head (GCS) or this node (raylet) is gone.

    Ray would end the process where it stands: the head is waited for, since it may be restarted.
    """
    address = ray.get_runtime_context().gcs_address
    node = ray._private.worker.global_worker.node.raylet_socket_name  # type: ignore[union-attr]
    over, gone = threading.Event(), threading.Event()

    def watch() -> None:
        answered = time.monotonic()
        while not over.wait(GONE_SECONDS / 10):
            if _answers(address):
                answered = time.monotonic()
            if time.monotonic() - answered > GONE_SECONDS or not _answers(node):
                # What stops the run may have been sent to all its processes: then Ray is gone because of it.
                if over.wait(GONE_SECONDS / 10):
                    return
                gone.set()
                # A run in the background may have SIGINT ignored.
                _thread.interrupt_main(signal.SIGTERM)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        if not gone.is_set():
            raise
        _end_ray()
        raise RunFailedError(
            f"Run {root.root.name} failed: the Ray cluster at {address} is gone, or its process on this node.",
            remedies=[
                "where memory ran out the kernel ends a process (`dmesg` tells); a head node may be lost",
                f"the folds go on from their last states: {resume_command(root)}",
            ],
        ) from None
    finally:
        over.set()


def _answers(address: str) -> bool:
    """Whether something listens at `host:port`, or at a Unix socket."""
    host, _, port = address.rpartition(":")
    try:
        if not port.isdigit():
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(5)
                connection.connect(address)
        else:
            socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def _followed(board: Any, view: LiveView) -> Iterator[None]:
    """Carries what workers post on `board` to `view` while the block runs."""
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

    def follow() -> None:
        while not over.wait(POLL_SECONDS):
            # While the board is started anew.
            with contextlib.suppress(ray.exceptions.RayError):
                carry()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=10)
        with contextlib.suppress(ray.exceptions.RayError):
            carry()  # what came since the last look
