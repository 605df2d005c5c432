"""What a fold gets on a cluster, from the resources of its nodes alone."""

import pytest
from support.refusals import refuses

from raycv.config.command_line import compose
from raycv.config.schema import RunConfig
from raycv.config.validation import validate
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
        (("cv.max_concurrent=2",), 1, 4, 2),
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


@pytest.mark.parametrize("overrides", [("resources.gpus_per_fold=3",), ("resources.cpus_per_fold=9",)])
def test_what_no_node_has_is_refused_although_the_cluster_as_a_whole_has_it(overrides):
    asked = "3 GPUs" if "gpus" in overrides[0] else "9 CPUs"
    with refuses("cluster-resources", asked, "(nodes: ", "8 CPUs, 2 GPUs", "resources.gpus_per_fold"):
        plan(config(*overrides), NODES)


def test_one_machine_is_known_as_that() -> None:
    assert plan(config(), [{"CPU": 2.0}]).alone
