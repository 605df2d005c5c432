"""How many folds run at once, and the cores and GPUs of each. Pure functions of the nodes' resources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raycv.config.schema import RunConfig
from raycv.errors import UserError


@dataclass(frozen=True)
class Placement:
    """The resources of one fold, and how many folds run at once."""

    gpus: float
    """GPUs of the fold, which its workers share"""
    cpus: float
    workers: int
    concurrent: int
    """folds at once on the nodes that the plan was made for"""
    at_most: int
    """folds at once on a larger cluster"""
    alone: bool = False
    """whether the cluster is one machine and stays one machine"""

    def at_once(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many folds run at once on `nodes`; at least 1, which waits for a node."""
        return max(1, min(self.at_most, places(nodes, self.gpus, self.cpus, self.workers)))

    def workers_on(self, node: Mapping[str, float]) -> int:
        """The most workers that share the memory of `node`. It may be larger than those that the plan was made for."""
        fit = _workers_that_fit(node, self.gpus / self.workers, self.cpus / self.workers)
        return max(self.concurrent * self.workers, min(fit, self.at_most * self.workers))


def places(nodes: Sequence[Mapping[str, float]], gpus: float, cpus: float, workers: int) -> int:
    """How many folds fit on `nodes` (their resources) at once; `gpus` and `cpus` are a fold's."""
    return sum(_workers_that_fit(node, gpus / workers, cpus / workers) for node in nodes) // workers


def _workers_that_fit(node: Mapping[str, float], gpus: float, cpus: float) -> int:
    by_gpu = node.get("GPU", 0) / gpus if gpus else float("inf")
    return int(min(node.get("CPU", 0) / cpus, by_gpu) + 1e-9)


def plan(config: RunConfig, nodes: list[dict[str, float]]) -> Placement:
    """Plans the resources of a fold on the cluster as it is now.

    Args:
        config: The run's config, for its `resources` and `cv`.
        nodes: The resources of each node, as Ray names them.

    Raises:
        UserError: No node could ever hold a fold, and the cluster does not grow (`resources.autoscaling`).
    """
    asked = config.resources
    at_most = config.cv.folds if config.cv.max_concurrent == "auto" else min(config.cv.max_concurrent, config.cv.folds)
    workers = asked.workers_per_fold
    has_gpus = asked.autoscaling or any(node.get("GPU", 0) for node in nodes)
    gpus = float(has_gpus * workers) if asked.gpus_per_fold == "auto" else asked.gpus_per_fold
    if asked.cpus_per_fold == "auto":
        cpus = workers * _most_cores(nodes, gpus, workers, at_most)
    else:
        cpus = asked.cpus_per_fold
    if asked.autoscaling:
        return Placement(gpus, cpus, workers, at_most, at_most)
    fit = places(nodes, gpus, cpus, workers)
    if fit == 0:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        shared = f" for {workers} workers" if workers > 1 else ""
        raise UserError(
            f"A fold asks for {cpus:g} CPUs and {gpus:g} GPUs{shared}, and no node has them (nodes: {have}).",
            kind="cluster-resources",
            remedies=[
                "lower resources.cpus_per_fold or resources.gpus_per_fold (fractions are fine)",
                "on a cluster that grows on demand: resources.autoscaling=true",
            ],
        )
    return Placement(gpus, cpus, workers, min(fit, at_most), at_most, alone=len(nodes) == 1)


def _most_cores(nodes: Sequence[Mapping[str, float]], gpus: float, workers: int, at_most: int) -> float:
    """The most whole cores for each worker with which as many folds run at once as with one core; at least 1.

    `gpus` is a fold's. Nodes may be unequal: 64 and 2 cores hold five folds of 12 cores, but four of 13.
    """
    wanted = min(at_most, places(nodes, gpus, workers, workers))
    most = int(max((node.get("CPU", 0.0) for node in nodes), default=1.0))
    shares = range(most if wanted else 1, 1, -1)
    return next((float(share) for share in shares if places(nodes, gpus, workers * share, workers) >= wanted), 1.0)
