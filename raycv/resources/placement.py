"""How many folds run at once, and the cores and GPUs of each. Pure functions of the nodes' resources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from raycv.config.schema import RunConfig
from raycv.errors import UserError, counted

ACCELERATOR = "accelerator_type:"
"""The beginning of the resource by which Ray names a node's GPU."""
CLUSTER_FILE = Path("~/ray_bootstrap_config.yaml")
"""The cluster file as `ray up` leaves it on the head."""


@dataclass(frozen=True)
class NodeType:
    """A kind of node that the autoscaler may start."""

    name: str
    resources: Mapping[str, float]
    most: int
    """nodes of this kind at most"""


def node_types(file: Path) -> list[NodeType] | None:
    """The kinds of node of a cluster file, without the head's; None without a file, or if it lacks their resources."""
    try:
        cluster = yaml.safe_load(file.read_text(encoding="utf-8"))
        most = cluster["max_workers"]
        found = [
            NodeType(name, kind["resources"], min(most, kind.get("max_workers", most)))
            for name, kind in cluster["available_node_types"].items()
            if name != cluster["head_node_type"]
        ]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None
    return found if all(kind.resources for kind in found) else None


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
    accelerator: str | None = None
    """the GPU that each fold gets, as Ray names it; None for any"""
    gpu_hour_price: float | None = None
    """the price of an hour of one GPU, in any currency; None if it is not known"""

    def places(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many folds `nodes` hold at once."""
        return places(with_accelerator(nodes, self.accelerator), self.gpus, self.cpus, self.workers)

    def at_once(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many folds run at once on `nodes`; at least 1, which waits for a node."""
        return max(1, min(self.at_most, self.places(nodes)))

    def estimate(self, folds: int, fold_seconds: float) -> str:
        """Tells how long `folds` take if each takes `fold_seconds`, how many hours of GPUs that is, and their price."""
        waves = -(-folds // self.concurrent)
        gpu_hours = folds * fold_seconds * self.gpus / 3600
        gpus = f", {gpu_hours:.1f} GPU-hours" if self.gpus else ""
        if self.gpus and self.gpu_hour_price is not None:
            gpus += f", {gpu_hours * self.gpu_hour_price:.2f} at resources.gpu_hour_price={self.gpu_hour_price:g}"
        seconds = waves * fold_seconds
        hours = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else counted(max(1, round(seconds / 60)), "minute")
        return f"about {hours}{gpus}"

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


def with_accelerator(nodes: Sequence[Mapping[str, float]], accelerator: str | None) -> list[Mapping[str, float]]:
    """Those of `nodes` that have the GPU `accelerator`; all of them for None."""
    return [node for node in nodes if accelerator is None or ACCELERATOR + accelerator in node]


def accelerators(nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """The kinds of GPU of `nodes`, as Ray names them."""
    names = {name for node in nodes if node.get("GPU", 0) for name in node if name.startswith(ACCELERATOR)}
    return sorted(name.removeprefix(ACCELERATOR) for name in names)


def plan(config: RunConfig, nodes: Sequence[Mapping[str, float]], types: Sequence[NodeType] | None = None) -> Placement:
    """Plans the resources of a fold on the cluster as it is now, and as it may grow.

    Args:
        config: The run's config, for its `resources` and `cv`.
        nodes: The resources of each node, as Ray names them.
        types: The kinds of node that may come with `resources.autoscaling`; None if they are not known.

    Raises:
        UserError: No node could ever hold a fold.
    """
    asked = config.resources
    at_most = config.cv.folds if config.cv.max_concurrent == "auto" else min(config.cv.max_concurrent, config.cv.folds)
    workers = asked.workers_per_fold
    unknown = asked.autoscaling and types is None
    later = [kind for kind in types or [] if asked.autoscaling for _ in range(min(kind.most, at_most * workers))]
    could = [*nodes, *(kind.resources for kind in later)]
    has_gpus = unknown or any(node.get("GPU", 0) for node in could)
    gpus = float(has_gpus * workers) if asked.gpus_per_fold == "auto" else asked.gpus_per_fold
    accelerator = asked.accelerator_type if gpus else None
    could = with_accelerator(could, accelerator)
    if asked.cpus_per_fold == "auto":
        cpus = workers * _most_cores(could, gpus, workers, at_most)
    else:
        cpus = asked.cpus_per_fold
    fit = at_most if unknown else places(could, gpus, cpus, workers)
    placement = Placement(
        gpus,
        cpus,
        workers,
        min(fit, at_most),
        at_most,
        alone=len(nodes) == 1 and not asked.autoscaling,
        accelerator=accelerator,
        gpu_hour_price=asked.gpu_hour_price,
    )
    if fit == 0:
        grows = f"; node types: {_types(later)}" if asked.autoscaling else ""
        shared = f" for {workers} workers" if workers > 1 else ""
        kind = f" ({accelerator})" if accelerator else ""
        raise UserError(
            f"A fold asks for {cpus:g} CPUs and {gpus:g} GPUs{kind}{shared}, and no node has them "
            f"(nodes: {_shown(nodes)}{grows}).",
            kind="cluster-resources",
            remedies=[
                "lower resources.cpus_per_fold or resources.gpus_per_fold (fractions are fine)",
                "give the cluster file a node type that has them"
                if asked.autoscaling
                else "on a cluster that grows on demand: resources.autoscaling=true",
            ],
        )
    return placement


def cluster_line(nodes: Sequence[Mapping[str, float]], types: Sequence[NodeType] | None) -> str:
    """Describes the nodes of the cluster, and those that it may grow by (None: not known)."""
    grows = "by nodes that raycv does not know" if types is None else f"by up to {_types(types)}"
    return f"{counted(len(nodes), 'node')} ({_shown(nodes)})" + ("" if types == [] else f"; may grow {grows}")


def awaited(
    placement: Placement, nodes: Sequence[Mapping[str, float]], types: Sequence[NodeType] | None, grows: bool
) -> str | None:
    """Names what the folds wait for; None if `nodes` hold a fold."""
    if placement.places(nodes):
        return None
    fitting = [kind.name for kind in types or [] if placement.places([kind.resources] * placement.workers)]
    comes = f"; the autoscaler starts {' or '.join(fitting) or 'one, if it has such a node type'}" if grows else ""
    return f"the folds wait for {_needs(placement)}: no node has them (nodes: {_shown(nodes)}){comes}"


def busy(placement: Placement, nodes: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> str:
    """Names what a fold waits for that `nodes` could hold, of which only the resources `free` are not in use."""
    used = []
    for resource, needed, unit in (("GPU", placement.gpus, "GPU"), ("CPU", placement.cpus, "CPU core")):
        has, left = sum(node.get(resource, 0) for node in nodes), free.get(resource, 0)
        if needed > left:
            whole = f"all {has:g} {unit}s are in use" if has != 1 else f"the only {unit} is in use"
            used.append(f"{left:g} of {has:g} {unit}s are free" if left else whole)
    # Enough may be free, but in parts, or on nodes that are left out.
    return f"waits for {_needs(placement)}: {' and '.join(used) or 'no node that may take it has them free'}"


def _needs(placement: Placement) -> str:
    gpus = f"{counted(placement.gpus, 'GPU')}{f' ({placement.accelerator})' if placement.accelerator else ''} and "
    return f"{gpus if placement.gpus else ''}{counted(placement.cpus, 'CPU core')}"


def _shown(nodes: Sequence[Mapping[str, float]]) -> str:
    return "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)


def _types(types: Sequence[NodeType]) -> str:
    texts = [f"{kind.most} x {kind.name}: {_shown([kind.resources])}" for kind in types]
    return "; ".join(dict.fromkeys(texts)) or "none"


def _most_cores(nodes: Sequence[Mapping[str, float]], gpus: float, workers: int, at_most: int) -> float:
    """The most whole cores for each worker with which as many folds run at once as with one core; at least 1.

    `gpus` is a fold's. Nodes may be unequal: 64 and 2 cores hold five folds of 12 cores, but four of 13.
    """
    wanted = min(at_most, places(nodes, gpus, workers, workers))
    most = int(max((node.get("CPU", 0.0) for node in nodes), default=1.0))
    shares = range(most if wanted else 1, 1, -1)
    return next((float(share) for share in shares if places(nodes, gpus, workers * share, workers) >= wanted), 1.0)
