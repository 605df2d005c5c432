"""Ray Train as a fold uses it, through its public interface. Imported late, since it takes a second or two."""

import os
import pickle
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import remove_placement_group

from raycv.common.devices import CPU_FOR_RUNS, check_given_gpu
from raycv.orchestration.cluster import node_survey
from raycv.orchestration.fold_task import TRIAL_DIED, FoldTask
from raycv.resources.nodes import NodeError, NodeNeeds, node_name


def fold_trainer(
    task: FoldTask, fold: int, folder: Path, left_out: Iterable[str] = (), *, begun: bool = False
) -> TorchTrainer:
    """Makes the trainer of a fold. It tries once: `what_died` tells whether another attempt can help.

    `folder`: the files of Ray Train; it would resume from files that it finds there. `left_out`: nodes that get no
    worker. `begun`: whether an earlier attempt may have left training states.
    """
    given = task.placement
    if given.alone:
        # On a single machine nobody announces that a node will leave.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    others = ",".join(sorted(left_out))
    here = ray.get_runtime_context().get_node_id()
    worker, arguments = task.worker, {"task": task, "fold": fold, "begun": begun, "node": here}
    resources = {"CPU": given.cpus / given.workers, "GPU": given.gpus / given.workers, "memory": task.mark_of(fold)}
    return TorchTrainer(
        # No `train_loop_config`: Ray Train would unpickle it at a node before the node is checked.
        lambda: worker(arguments),  # type: ignore[arg-type]  # Ray's annotation forgets return values
        torch_config=_checked_torch(pickle.dumps(task.needs)),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # annotated with that of Train V1
            num_workers=given.workers,
            use_gpu=given.gpus > 0,
            accelerator_type=given.accelerator,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
            label_selector={"ray.io/node-id": f"!in({others})"} if others else None,
        ),
        run_config=RunConfig(
            name=f"{folder.parent.name}/{folder.name}",
            storage_path=str(folder.parent.parent),
            # Ray Train would count no attempt, and repeat errors of the training too.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
        ),
    )


def what_died(error: Exception) -> str | None:
    """Names the process that died, if that is why a trainer raised `error`; None if another error is the reason."""
    if isinstance(error, RayActorError):
        return TRIAL_DIED
    if _is_of_ray(getattr(error, "controller_failure", None)):
        return "a worker of the fold died as it started, or its node"
    # When one worker dies, others fail with broken connections: the death is the cause.
    ranks = [rank for rank, failure in getattr(error, "worker_failures", {}).items() if _is_of_ray(failure)]
    return f"worker {ranks[0]} of the fold died, or its node" if ranks else None


def _is_of_ray(error: Exception | None) -> bool:
    """Whether Ray itself raised `error`, and not code that it ran: then a process or node is gone.

    Ray Train's own types for that are not public.
    """
    return type(error).__module__.partition(".")[0] == "ray" and not isinstance(error, RayTaskError)


def unfit_node(error: Exception) -> NodeError | None:
    """The refusal of a node, if `error` is or carries one."""
    causes = [error, getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
    return next((cause for cause in causes if isinstance(cause, NodeError)), None)


def _checked_torch(needs: bytes) -> TorchConfig:
    """Ray's own, whose workers are checked before anything of raycv travels there.

    Ray Train sends it to the workers before that. So its classes travel by value, and name nothing of raycv.

    `needs`: pickled NodeNeeds.
    """

    class Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # a class that mypy does not know
        def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
            from raycv.orchestration.trainer import check_workers

            place = worker_group.execute_single(0, ray.util.get_current_placement_group)
            try:
                check_workers(worker_group, pickle.loads(needs))
                super().on_start(worker_group, backend_config)
            except BaseException:
                # Ray Train keeps the place of workers that fail here.
                remove_placement_group(place)
                raise

    class Checked(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    return Checked()


def check_workers(workers: Any, needs: NodeNeeds) -> None:
    """Asks the node of each worker for what the run needs, then tries the GPUs that the workers were given.

    `workers`: Ray Train's worker group.
    Raises: NodeError if a node lacks something; UserError if torch cannot use a GPU.
    """
    survey = node_survey()

    def asked(*question: Any) -> tuple[str, str, str, dict[str, Any]]:
        node = ray.get_runtime_context().get_node_id()
        return node, ray.util.get_node_ip_address(), socket.gethostname(), survey(*question)

    for node, address, host, found in workers.execute(asked, *needs.question()):
        needs.check(node, node_name(address, host), found)
    # Joining the workers over a GPU that torch cannot use fails too, but its error names neither node nor driver.
    if workers.get_resources_per_worker().get("GPU", 0):
        workers.execute(check_given_gpu, CPU_FOR_RUNS)
