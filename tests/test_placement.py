"""What a fold gets on a cluster, from the resources of its nodes alone."""

import pytest

from raycv.config.command_line import compose
from raycv.config.schema import RunConfig
from raycv.config.validation import validate
from raycv.errors import UserError
from raycv.resources.placement import plan

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
    with pytest.raises(UserError, match=r"no node has them \(nodes: .*8 CPUs, 2 GPUs") as caught:
        plan(config(*overrides), NODES)
    assert caught.value.kind == "cluster-resources"


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
