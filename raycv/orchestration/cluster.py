"""Joins or starts Ray, watches that it stays, and puts a question to every node."""

import _thread
import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
import ray.exceptions
import ray.train
import ray.tune
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycv.common.locations import BUNDLED_SCHEME, check_ray_folder, ray_folder
from raycv.common.retry import cause_of
from raycv.config.process import STOP_SIGNALS, stop_like_ctrl_c
from raycv.errors import FaultsError, RunFailedError, UserError, last_line
from raycv.orchestration.fold_task import FoldTask
from raycv.resources import survey
from raycv.resources.nodes import NodeNeeds, Share, node_name
from raycv.resources.publisher import make_local_copy
from raycv.results.run_folder import RunFolder, resume_command
from raycv.results.storage import Bucket

if TYPE_CHECKING:
    from raycv.model.base_files import BaseFiles

logger = logging.getLogger(__name__)

GONE_SECONDS = 30.0
"""A head of the cluster that does not answer for so long is gone. After 60 seconds Ray ends the process."""
LOST = "ActorDiedError|ActorUnavailableError|RaySystemError|RpcError|NodeDiedError"
"""Errors of Ray whose cause is a process or node that is gone."""
ANSWER_SECONDS = 120.0
"""All nodes answer within so long; a storage that hangs would be waited for without end."""
JOIN_REMEDIES = (
    "see that the cluster is up: ray status",
    "start one on this machine: ray start --head",
    "where it asks for a token, and this machine has it: RAY_AUTH_MODE=token",
    "unset RAY_ADDRESS, and a local Ray is started for the run",
)


def node_survey() -> Callable[..., dict[str, Any]]:
    """`survey`, made ready to travel by value: a node may have another raycv, or none."""
    ray.cloudpickle.register_pickle_by_value(survey)
    return survey.survey


def share_of(task: FoldTask) -> Share:
    """The run's folder as this process sees it, to check that it is the driver's.

    With an object storage it is this node's own copy, which this function makes.
    Raises: OSError if it cannot make it.
    """
    if task.needs.published:
        make_local_copy(Path(task.needs.share), task.needs.nonce)
    return task.needs.share_at(ray.get_runtime_context().get_node_id(), own_node_name())


def own_node_name() -> str:
    """Names this process's node as messages name it: address and host name."""
    return node_name(ray.util.get_node_ip_address(), socket.gethostname())


def node_resources(left_out: Collection[str] = ()) -> list[dict[str, float]]:
    """The resources of each node that is alive, as Ray names them, without the nodes `left_out` (their ids)."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in left_out]


def own_resources() -> dict[str, float]:
    """The resources of this process's node."""
    here = ray.get_runtime_context().get_node_id()
    return next((node["Resources"] for node in ray.nodes() if node["NodeID"] == here), {})


@contextmanager
def ray_cluster(
    *, ray_logs: bool, dashboard: bool | None = None, metadata: dict[str, str] | None = None
) -> Iterator[str | None]:
    """Attaches to the cluster of RAY_ADDRESS or of this machine, or starts one; yields the dashboard's address.

    Args:
        ray_logs: Whether to show Ray's own log lines.
        dashboard: Whether a Ray that is started has a dashboard (nine processes); None is Ray's default: it has.
        metadata: Facts about this process for the dashboard's list of jobs.
    """
    check_ray_folder()
    _provide_token()
    level = logging.INFO if ray_logs else logging.ERROR
    try:
        address = _cluster_to_join()
        with interruptible():
            context = ray.init(
                address,
                log_to_driver=ray_logs,
                logging_level=level,
                include_dashboard=dashboard,
                job_config=JobConfig(metadata=metadata),
            )
    except UserError:
        raise
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Ray cannot be started or joined: {error}", kind="cluster-unreachable", remedies=JOIN_REMEDIES
        ) from error
    except Exception as error:
        # Ray has no type of its own for it.
        if "timed out" not in str(error) and not isinstance(error, ray.exceptions.RaySystemError):
            raise
        remedies = ["wait until the machine is less busy, and try again", JOIN_REMEDIES[1]]
        raise UserError(f"Ray did not start in time: {error}", kind="cluster-unreachable", remedies=remedies) from error
    logging.getLogger("ray").setLevel(level)
    if not ray_logs:
        # Tune would print the whole traceback of a failed trial. raycv prints the fold's error; error.json has all.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Ray's own handler of SIGTERM would end the process where it stands.
    stop_like_ctrl_c()
    try:
        yield context.dashboard_url or None
    finally:
        ray.shutdown()


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C, or another signal that stops a run, ends the block, in which Ray starts, and Ray's new processes.

    Ray's start forks a dozen processes. Python drops an exception that a signal raises within a fork or a `__del__`.
    There the signal is repeated a moment later. If it is dropped elsewhere, the end of the block raises it.
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


def joins_cluster() -> bool:
    """Whether `ray_cluster` will look for a cluster that is there already, instead of starting a Ray of its own."""
    asked = os.environ.get("RAY_ADDRESS")
    return bool(_started_here()) if asked in (None, "", "auto") else asked != "local"


def _cluster_to_join() -> str | None:
    """The address of RAY_ADDRESS, or of the cluster that was started on this machine; None if there is neither.

    Ray itself would look for one that is gone for a quarter of an hour.
    Raises: UserError if nothing listens at RAY_ADDRESS.
    """
    asked = os.environ.get("RAY_ADDRESS")
    address = _started_here() if asked in (None, "", "auto") else asked
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit() or "://" in host:
        return asked or address
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        if asked:
            raise UserError(
                f"RAY_ADDRESS={asked}: nothing answers there ({error}).",
                kind="cluster-unreachable",
                remedies=JOIN_REMEDIES,
            ) from error
        # `ray start` leaves an address file. It stays when the cluster or its machine is killed.
        logger.warning("the Ray cluster that was started here, at %s, is gone (%s): one is started", address, error)
        return "local"
    # Ray uses the token below HOME only for a cluster that it finds itself.
    return asked or "auto"


def _started_here() -> str | None:
    """The address that `ray start` left on this machine; None without one."""
    try:
        return (ray_folder() / "ray_current_cluster").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def this_node() -> NodeAffinitySchedulingStrategy:
    """Places an actor or task on the node of this process."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def check_nodes(folder: RunFolder, base: "BaseFiles") -> None:
    """Asks all other nodes whether they see the run's folder and a local base model, and have the driver's code.

    A node that is lost meanwhile is skipped. A node that joins later is asked when a worker starts there.
    Raises: FaultsError with all faults of all nodes.
    """
    here = ray.get_runtime_context().get_node_id()
    needs = NodeNeeds.of(folder)
    address = needs.published
    paths = [str(base.path)] if base.revision is None and not base.name.startswith(BUNDLED_SCHEME) else []
    ask = ray.remote(num_cpus=0)(node_survey())
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != here:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = node_name(node["NodeManagerAddress"], node["NodeManagerHostname"])
            asked[node["NodeID"]] = name, ask.options(scheduling_strategy=there).remote(*needs.question(paths))
    faults: list[str] = []
    remedies: list[str] = []
    if address:
        # The processes of this node may have another environment than the driver.
        faults, remedies = _storage_faults(here, own_node_name(), address)
    deadline = time.monotonic() + ANSWER_SECONDS
    for node, (name, answer) in asked.items():
        try:
            found = ray.get(answer, timeout=max(deadline - time.monotonic(), 0))
        except ray.exceptions.RayError as error:
            if _is_lost(node, error):
                logger.warning("%s is lost, and is skipped", name)
                continue
            faults.append(f"{name} cannot be asked: {cause_of(error)}")
            remedies.append("see that the node is up, with the driver's versions of Python and Ray: ray status")
            continue
        differ, what_to_do = needs.compare(name, found)
        if address and not differ:
            # The node has the driver's raycv, so it can be asked to reach the storage.
            differ, what_to_do = _storage_faults(node, name, address)
        faults += differ
        remedies += what_to_do
    if faults:
        title = "The cluster's nodes do not have what the folds need"
        raise FaultsError(title, faults, kind="cluster-node", remedies=list(dict.fromkeys(remedies)))


def _storage_faults(node: str, name: str, address: str) -> tuple[list[str], list[str]]:
    """Why the node cannot use the object storage, and what to do."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    asked = ray.remote(num_cpus=0)(_check_storage).options(scheduling_strategy=there).remote(address)
    try:
        ray.get(asked, timeout=ANSWER_SECONDS)
    except UserError as error:
        return [f"{name}: {error.what}"], [*error.remedies, "give every node the credentials: a role, or AWS_... there"]
    except ray.exceptions.RayError as error:
        return [f"{name} cannot be asked: {cause_of(error)}"], ["see that the node is up: ray status"]
    return [], []


def _check_storage(address: str) -> None:
    Bucket(address).check()


def _is_lost(node: str, error: ray.exceptions.RayError) -> bool:
    """Whether `node` (its id) is gone, so that it could not answer. Ray may find that out after the `error`."""
    # Code that raised on the node, or still runs there, needs a node that is up.
    wait = 0.0 if isinstance(error, ray.exceptions.RayTaskError | ray.exceptions.GetTimeoutError) else GONE_SECONDS
    deadline = time.monotonic() + wait
    while is_up := any(each["NodeID"] == node and each["Alive"] for each in ray.nodes()):
        if time.monotonic() >= deadline:
            break
        time.sleep(0.5)
    return not is_up


@contextmanager
def watched_cluster(root: RunFolder) -> Iterator[None]:
    """Raises: RunFailedError in the main thread if the cluster's head (GCS) or this node (raylet) is gone.

    Ray would end the process where it stands: the head is waited for, since it may be restarted.
    """
    address = ray.get_runtime_context().gcs_address
    here = ray.get_runtime_context().get_node_id()
    node = next(node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == here)
    over, gone = threading.Event(), threading.Event()

    def watch() -> None:
        answered = time.monotonic()
        while not over.wait(GONE_SECONDS / 10):
            if _answers(address):
                answered = time.monotonic()
            if time.monotonic() - answered > GONE_SECONDS or not _answers(node):
                # A signal that stops the run may have reached all its processes, and ended Ray too.
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
        raise _is_gone(root, f"the Ray cluster at {address} is gone, or its process on this node") from None
    finally:
        over.set()


@contextmanager
def explained_loss(root: RunFolder) -> Iterator[None]:
    """Raises: RunFailedError if the block fails since processes of Ray are gone, before `watched_cluster` notices."""
    try:
        yield
    except (ray.exceptions.RayError, ray.tune.TuneError) as error:
        # Tune keeps the traceback of an error in its callbacks as a text.
        if isinstance(error, ray.exceptions.RayTaskError) or not re.search(LOST, f"{type(error).__name__} {error}"):
            raise
        raise _is_gone(root, f"processes of the Ray cluster are gone ({last_line(error)})") from error


def _is_gone(root: RunFolder, why: str) -> RunFailedError:
    return RunFailedError(
        f"Run {root.root.name} failed: {why}.",
        kind="cluster-unreachable",
        remedies=[
            "where memory ran out the kernel ends a process (`dmesg` tells); a head node may be lost",
            f"the folds resume from their last states: {resume_command(root)}",
        ],
    )


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
