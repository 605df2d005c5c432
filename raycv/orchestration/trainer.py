"""Ray Train as a fold uses it, without those of its processes that have nothing to do: each takes seconds to start.

The one place that knows Ray Train's insides. Imported in trials alone, since it takes a second or two.
"""

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.tune
from ray.exceptions import RayActorError
from ray.train import RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from raycv.common.devices import CPU_FOR_RUNS, check_given_gpu
from raycv.orchestration.cluster import node_survey
from raycv.resources.nodes import NodeError, node_name

if TYPE_CHECKING:
    from raycv.orchestration.fold_task import FoldTask


class Trainer(TorchTrainer):
    """Trains a fold in its workers; the controller runs in the trial's process, which would wait for it otherwise.

    It leaves out two processes of Ray Train. One hands out Ray Data sets, and a fold has none. The other frees what a
    dead trial held: the board's record is enough for that, and Ray's process fails where two Rays share a machine.
    On a single machine nobody announces that a node will leave, and nobody can add nodes.

    `folder`: the files of Ray Train; it would resume from files that it finds there. `left_out`: nodes that get no
    worker.
    """

    def __init__(self, task: "FoldTask", fold: int, folder: Path, left_out: Iterable[str] = ()) -> None:
        given = task.placement
        others = ",".join(sorted(left_out))
        super().__init__(
            task.worker,  # type: ignore[arg-type]  # Ray's annotation forgets return values
            train_loop_config={"task": task, "fold": fold},
            torch_config=_CheckedTorch(),
            scaling_config=ScalingConfig(  # type: ignore[call-arg]  # annotated with that of Train V1
                num_workers=given.workers,
                use_gpu=given.gpus > 0,
                resources_per_worker={"CPU": given.cpus / given.workers}
                | ({"GPU": given.gpus / given.workers} if given.gpus else {}),
                label_selector={"ray.io/node-id": f"!in({others})"} if others else None,
            ),
            run_config=RunConfig(
                name=folder.name,
                storage_path=str(folder.parent),
                callbacks=[_Reports()],  # type: ignore[list-item]  # annotated with the callback of Train V1
            ),
        )
        self._task = task
        self._fold = fold

    def _create_default_callbacks(self) -> list[Any]:
        left_out = ("DatasetsCallback", "PlacementGroupCleanerCallback")
        return [each for each in super()._create_default_callbacks() if type(each).__name__ not in left_out]  # type: ignore[misc]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if self._task.placement.alone:
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            parts["scaling_policy"] = _OneMachine(self.scaling_config)  # type: ignore[arg-type]
        parts["failure_policy"] = _NoStartAgain(parts["failure_policy"].failure_config)
        controller = TrainController(**parts)
        controller.worker_group_cls = _workers_of(self._task, self._fold)
        asyncio.run(controller.run())
        return controller.get_result()


def what_died(error: Exception) -> str | None:
    """Names the process that died, if that is why a Trainer raised `error`; None if another error is the reason."""
    if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupFailedError | RayActorError):
        return "a worker of the fold died as it started, or its node"
    failures = getattr(error, "worker_failures", {})
    for rank, failure in failures.items():
        # When one worker dies, others fail with broken connections: the death is the cause.
        if isinstance(failure, WorkerHealthCheckFailedError | RayActorError):
            return f"worker {rank} of the fold died, or its node"
    return None


def unfit_node(error: Exception) -> NodeError | None:
    """The refusal of a node, if `error` is or carries one."""
    failures = getattr(error, "worker_failures", {}).values()
    causes = [error, getattr(error, "controller_failure", None)]
    causes += [getattr(failure, "_base_exc", failure) for failure in failures]
    return next((cause for cause in causes if isinstance(cause, NodeError)), None)


class _CheckedTorch(TorchConfig):
    """Ray's own, whose workers first try the GPUs that they were given."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _CheckedBackend


class _CheckedBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:  # type: ignore[override]  # as Ray's
        # Joining the workers over a GPU that torch cannot use fails too, but its error names neither node nor driver.
        if worker_group.get_resources_per_worker().get("GPU", 0):
            worker_group.execute(check_given_gpu, CPU_FOR_RUNS)
        super().on_start(worker_group, backend_config)


class _Reports(UserCallback):
    """Hands the workers' reports to Tune, with no queue between."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        ray.tune.report(metrics[0])


class _NoStartAgain(DefaultFailurePolicy):
    """Raises when workers die as they start: Ray Train would start others for ever, in the place that the dead keep."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if isinstance(getattr(training_failed_error, "controller_failure", None), WorkerGroupStartupFailedError):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _OneMachine(FixedScalingPolicy):
    """Asks for no nodes."""

    def _nothing(self) -> None:
        pass

    _send_resource_request = _maybe_send_resource_request = _cancel_resource_request = _nothing


def _workers_of(task: "FoldTask", fold: int) -> type[WorkerGroup]:
    """Workers whose place the board knows, and whose nodes have what the run needs."""

    class Workers(WorkerGroup):
        def _create_placement_group(self, *given: Any) -> Any:
            made = super()._create_placement_group(*given)
            # Before any worker is in it: this process may die at any time.
            ray.get(task.board.hold.remote(fold, made.placement_group.id.hex()))
            return made

        def _create_workers(self, *given: Any, **more: Any) -> Any:
            workers = super()._create_workers(*given, **more)
            # Before anything of raycv travels there: the node may have another raycv, or none.
            asked: list[Any] = [worker.execute_async(node_survey(), *task.needs.question()) for worker in workers]
            for worker, found in zip(workers, ray.get(asked), strict=True):
                there = worker.metadata
                task.needs.check(there.node_id, node_name(there.node_ip, there.hostname), found)
            return workers

    return Workers
