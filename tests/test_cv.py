"""Placement on real Ray clusters of several nodes (one machine, logical resources), and a run that joins one."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raycv.cli import compose
from raycv.config import RunConfig, ServeConfig, validate
from raycv.errors import UserError

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def config(*overrides):
    return validate(RunConfig, compose("run", list(overrides)))


@pytest.fixture(scope="module")
def cluster():
    """A head without cores, as in cluster.yaml, and two nodes of 8 cores and 2 GPUs, and one of 4 cores."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for resources in ({"num_cpus": 8, "num_gpus": 2}, {"num_cpus": 8, "num_gpus": 2}, {"num_cpus": 4}):
        made.add_node(**resources, object_store_memory=100_000_000)
    made.wait_for_nodes()
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
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
def test_what_a_fold_gets_and_how_many_run_at_once(cluster, overrides, gpus, cpus, concurrent):
    from raycv.cv import plan

    placement = plan(config(*overrides))
    assert (placement.gpus, placement.cpus, placement.concurrent) == (gpus, cpus, concurrent)
    assert not placement.alone


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("resources.gpus_per_fold=3",), ("resources.cpus_per_fold=9",)])
def test_what_no_node_has_is_refused_although_the_cluster_as_a_whole_has_it(cluster, overrides):
    from raycv.cv import plan

    with pytest.raises(UserError, match=r"no node has them \(nodes: .*8 CPUs, 2 GPUs"):
        plan(config(*overrides))


@pytest.mark.slow
def test_nodes_that_do_not_see_the_run_folder_are_named(cluster, tmp_path):
    from raycv.base import fetch_base
    from raycv.cv import check_shared
    from raycv.paths import RunFolder

    folder = RunFolder(tmp_path)
    base = fetch_base("raycv://models/tiny_llama", None)
    with pytest.raises(UserError, match=r"does not see .*config.yaml(.|\n)*put run.dir"):
        check_shared(folder, base)
    folder.config.write_text("x")
    check_shared(folder, base)


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")


@pytest.mark.slow
@no_gpu
def test_a_replica_whose_gpu_torch_cannot_use_does_not_start(cluster):
    import ray

    from raycv.scorer import Scorer, Setup

    setup = Setup(validate(ServeConfig, compose("serve", [])), None, None, None, "instance")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"cannot use the GPU of {socket.gethostname()}"):
        ray.get(ray.remote(num_gpus=1)(lambda: Scorer(setup)).remote())


@pytest.mark.slow
@no_gpu
def test_a_worker_whose_gpu_torch_cannot_use_fails_at_once_and_names_its_node(tmp_path):
    """Ray counts a GPU there. Its own error, of the workers' joining, would name neither node nor driver."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        made.add_node(num_cpus=2, num_gpus=1, object_store_memory=100_000_000)
        made.wait_for_nodes()
        overrides = ["experiment=quickstart", "cv.folds=2", "train.epochs=1", "run.name=gpu", "resources.retries=2"]
        result = subprocess.run(
            [sys.executable, "-m", "raycv.run", *overrides],
            cwd=tmp_path,
            env={**os.environ, "RAY_ADDRESS": made.address},
            capture_output=True,
            text=True,
            timeout=500,
        )
    finally:
        made.shutdown()
    assert result.returncode == 1, result.stdout + result.stderr
    said = f"torch {torch.__version__}, a build for CPUs alone, cannot use the GPU of {socket.gethostname()} (driver of"
    assert f"fold 0, 1: {said}" in result.stderr
    assert "or compute on the CPU: resources.gpus_per_fold=0" in result.stderr
    # It comes again, so it is not tried again.
    assert "tried again" not in result.stdout
    for fold in range(2):
        assert said in json.loads((tmp_path / f"runs/gpu/fold_{fold}/error.json").read_text())["message"]


@pytest.mark.slow
def test_the_copied_script_joins_a_running_cluster_of_two_nodes(tmp_path):
    """What `ray submit cluster.yaml raycv/run.py` does on the head: one file, a running cluster, workers elsewhere."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        made.add_node(num_cpus=2, object_store_memory=100_000_000)
        made.wait_for_nodes()
        shutil.copy(ROOT / "raycv" / "run.py", tmp_path / "run.py")
        overrides = ["experiment=quickstart", "cv.folds=2", "train.epochs=1", "run.name=joined"]
        result = subprocess.run(
            [sys.executable, "run.py", *overrides],
            cwd=tmp_path,
            env={**os.environ, "RAY_ADDRESS": made.address},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        report = json.loads((tmp_path / "runs" / "joined" / "report.json").read_text())
        assert len(report["folds"]) == 2
        # The cluster was joined, not owned: it goes on.
        assert all(node.any_processes_alive() for node in made.list_all_nodes())
    finally:
        made.shutdown()
