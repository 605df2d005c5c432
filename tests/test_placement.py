"""What a fold gets on a cluster, from the resources of its nodes alone."""

from pathlib import Path

import pytest
import yaml
from support.refusals import refuses

from raycv.config.command_line import compose
from raycv.config.schema import RunConfig
from raycv.config.validation import validate
from raycv.resources.placement import NodeType, awaited, busy, cluster_line, node_types, plan

NODES = [{"CPU": 0.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}]
"""A head without cores, as in cluster.yaml, and three workers."""


def config(*overrides):
    return validate(RunConfig, compose("run", list(overrides)))


@pytest.mark.parametrize(
    ("overrides", "gpus", "cpus", "concurrent"),
    [
        ((), 1, 4, 4),
        (("cv.folds=3",), 1, 4, 3),
        (("cv.max_concurrent=2",), 1, 8, 2),
        (("resources.gpus_per_fold=0.5",), 0.5, 2, 5),
        (("resources.gpus_per_fold=2",), 2, 8, 2),
        (("resources.gpus_per_fold=0",), 0, 4, 5),
        (("resources.gpus_per_fold=0", "resources.cpus_per_fold=8"), 0, 8, 2),
        (("resources.gpus_per_fold=0", "resources.cpus_per_fold=0.5"), 0, 0.5, 5),
        (("resources.gpus_per_fold=3", "resources.autoscaling=true"), 3, 1, 5),
    ],
)
def test_what_a_fold_gets_and_how_many_run_at_once(overrides, gpus, cpus, concurrent):
    placement = plan(config(*overrides), NODES)
    assert (placement.gpus, placement.cpus, placement.concurrent) == (gpus, cpus, concurrent)
    assert not placement.alone


@pytest.mark.parametrize(
    ("nodes", "overrides", "cpus", "concurrent"),
    [
        ([{"CPU": 64.0}, {"CPU": 2.0}], (), 12, 5),
        ([{"CPU": 64.0}, {"CPU": 2.0}], ("cv.max_concurrent=1",), 64, 1),
        ([{"CPU": 64.0}, {"CPU": 2.0}], ("resources.workers_per_fold=2",), 12, 5),
        ([{"CPU": 3.0}, {"CPU": 3.0}], (), 1, 5),
        ([{"CPU": 3.0}, {"CPU": 1.0}], (), 1, 4),
        ([{"CPU": 64.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}], (), 2, 3),
        ([{"CPU": 7.0}], ("cv.folds=3",), 2, 3),
        ([{"CPU": 2.0}], (), 1, 2),
    ],
)
def test_unequal_nodes_hold_as_many_folds_as_with_one_core_each(nodes, overrides, cpus, concurrent):
    placement = plan(config(*overrides), nodes)
    assert (placement.cpus, placement.concurrent) == (cpus, concurrent)


@pytest.mark.parametrize("overrides", [("resources.gpus_per_fold=3",), ("resources.cpus_per_fold=9",)])
def test_what_no_node_has_is_refused_although_the_cluster_as_a_whole_has_it(overrides):
    asked = "3 GPUs" if "gpus" in overrides[0] else "9 CPUs"
    with refuses("cluster-resources", asked, "(nodes: ", "8 CPUs, 2 GPUs", "resources.gpus_per_fold"):
        plan(config(*overrides), NODES)


def test_one_machine_is_known_as_that() -> None:
    assert plan(config(), [{"CPU": 2.0}]).alone


def test_later_nodes_hold_further_folds() -> None:
    """Each fold keeps the cores that were planned for it."""
    placement = plan(config(), [{"CPU": 2.0}])
    assert placement.at_once([{"CPU": 2.0}, {"CPU": 2.0}]) == 4
    assert placement.at_once([{"CPU": 64.0}]) == 5
    assert placement.at_once([{"CPU": 0.0}]) == 1
    assert plan(config("cv.max_concurrent=2"), [{"CPU": 2.0}]).at_once([{"CPU": 64.0}]) == 2


def test_the_memory_of_a_larger_node_that_joins_is_shared_by_all_folds_there() -> None:
    placement = plan(config(), [{"CPU": 2.0}])
    assert placement.workers_on({"CPU": 2.0}) == 2
    assert placement.workers_on({"CPU": 3.0}) == 3
    assert placement.workers_on({"CPU": 64.0}) == 5


# --- A cluster that grows --------------------------------------------------------------------------------------------

HEAD = [{"CPU": 0.0}]
GPU_WORKER = NodeType("gpu_worker", {"CPU": 8, "GPU": 1, "accelerator_type:L40S": 1}, 5)
CPU_WORKER = NodeType("cpu_worker", {"CPU": 4}, 2)


def grown(*overrides: str):
    return config("resources.autoscaling=true", *overrides)


def test_folds_are_planned_on_the_nodes_that_may_come() -> None:
    placement = plan(grown(), HEAD, [GPU_WORKER, CPU_WORKER])
    assert (placement.gpus, placement.cpus, placement.concurrent) == (1, 8, 5)
    placement = plan(grown(), HEAD, [CPU_WORKER])
    assert (placement.gpus, placement.cpus, placement.concurrent) == (0, 1, 5)


def test_a_cluster_that_cannot_grow_to_hold_a_fold_is_refused() -> None:
    with refuses("cluster-resources", "8 CPUs and 2 GPUs", "node types: 5 x gpu_worker: 8 CPUs, 1 GPUs)"):
        plan(grown("resources.gpus_per_fold=2", "resources.cpus_per_fold=8"), HEAD, [GPU_WORKER])
    with refuses("cluster-resources", "(nodes: 0 CPUs, 0 GPUs; node types: none)"):
        plan(grown(), HEAD, [])


def test_every_fold_gets_the_gpu_that_is_asked_for() -> None:
    nodes = [
        {"CPU": 8.0, "GPU": 4.0, "accelerator_type:A10G": 1.0},
        {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0},
    ]
    placement = plan(config("resources.accelerator_type=H100"), nodes)
    assert (placement.accelerator, placement.cpus, placement.concurrent) == ("H100", 4, 2)
    with refuses("cluster-resources", "1 GPUs (L40S)", "8 CPUs, 4 GPUs; 8 CPUs, 2 GPUs"):
        plan(config("resources.accelerator_type=L40S"), nodes)
    assert plan(config("resources.accelerator_type=L40S", "resources.gpus_per_fold=0"), nodes).accelerator is None


def test_what_the_folds_wait_for_is_said_in_words() -> None:
    placement = plan(grown("resources.accelerator_type=L40S"), HEAD, [GPU_WORKER, CPU_WORKER])
    assert awaited(placement, HEAD, [GPU_WORKER, CPU_WORKER], grows=True) == (
        "the folds wait for 1 GPU (L40S) and 8 CPU cores: no node has them (nodes: 0 CPUs, 0 GPUs); "
        "the autoscaler starts gpu_worker"
    )
    assert str(awaited(placement, HEAD, None, grows=True)).endswith(
        "the autoscaler starts one, if it has such a node type"
    )
    assert str(awaited(placement, HEAD, [], grows=False)).endswith("(nodes: 0 CPUs, 0 GPUs)")
    assert awaited(placement, [*HEAD, GPU_WORKER.resources], None, grows=True) is None


def test_what_a_fold_waits_for_on_nodes_that_others_use() -> None:
    placement = plan(config("cv.max_concurrent=4", "resources.cpus_per_fold=4"), NODES)
    waits = "waits for 1 GPU and 4 CPU cores: "
    assert busy(placement, NODES, {"CPU": 12}) == f"{waits}all 4 GPUs are in use"
    assert busy(placement, NODES, {"CPU": 3, "GPU": 1}) == f"{waits}3 of 20 CPU cores are free"
    assert busy(placement, NODES, {}) == f"{waits}all 4 GPUs are in use and all 20 CPU cores are in use"
    assert busy(placement, NODES, {"CPU": 4, "GPU": 2}) == f"{waits}no node that may take it has them free"


def test_what_the_cluster_has_and_may_grow_to() -> None:
    assert cluster_line(HEAD, []) == "1 node (0 CPUs, 0 GPUs)"
    assert cluster_line(HEAD, None).endswith("; may grow by nodes that raycv does not know")
    assert cluster_line(HEAD, [GPU_WORKER]).endswith("; may grow by up to 5 x gpu_worker: 8 CPUs, 1 GPUs")


def test_the_node_types_of_the_cluster_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    assert node_types(file) is None
    types = {"head": {"resources": {"CPU": 0}}, "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 9}}
    cluster = {"max_workers": 5, "head_node_type": "head", "available_node_types": types}
    file.write_text(yaml.safe_dump(cluster))
    assert node_types(file) == [NodeType("gpu", {"CPU": 8, "GPU": 1}, 5)]
    types["gpu"]["resources"] = {}
    file.write_text(yaml.safe_dump(cluster))
    assert node_types(file) is None
    file.write_text("a: [")
    assert node_types(file) is None


def test_hours_of_the_run_and_of_its_gpus() -> None:
    placement = plan(config("resources.gpus_per_fold=0.5"), [{"CPU": 8.0, "GPU": 1.0}])
    assert placement.concurrent == 2
    assert placement.estimate(5, 3600) == "about 3.0 hours, 2.5 GPU-hours"
    assert plan(config(), [{"CPU": 5.0}]).estimate(5, 5400) == "about 1.5 hours"
    priced = plan(config("resources.gpus_per_fold=0.5", "resources.gpu_hour_price=1.9"), [{"CPU": 8.0, "GPU": 1.0}])
    assert priced.estimate(5, 3600).endswith(", 2.5 GPU-hours, 4.75 at resources.gpu_hour_price=1.9")
