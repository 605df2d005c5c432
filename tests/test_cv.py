"""Placement on real Ray clusters of several nodes (one machine, logical resources), and runs that join one."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.builders import no_gpu
from support.commands import ROOT, background, raycv, wait_until
from support.object_storage import RUNS, storage  # noqa: F401
from support.refusals import refuses, said_refusal

from raycv.common.files import read_json
from raycv.common.locations import WORK, ray_folder, runs_folder
from raycv.config.command_line import compose
from raycv.config.schema import ServeConfig
from raycv.config.validation import validate
from raycv.model.base_model import fetch_base
from raycv.results.find_run import existing_run
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
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
@no_gpu
def test_a_replica_whose_gpu_torch_cannot_use_does_not_start(cluster):
    import ray

    from raycv.orchestration.ray_serve import Scorer
    from raycv.serving.messages import Setup

    setup = Setup(validate(ServeConfig, compose("serve", [])), None, None, None, "instance")  # type: ignore[arg-type]
    with refuses("gpu-unusable", f"GPU of {socket.gethostname()}"):
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
    found = f"torch {torch.__version__}, a build for CPUs alone, cannot use the GPU of {socket.gethostname()}"
    said_refusal(result.stderr, "run-failed, gpu-unusable", f"fold 0, 1: {found}", "resources.gpus_per_fold=0")
    # It comes again, so it is not tried again.
    assert "tried again" not in result.stdout
    for fold in range(2):
        assert found in json.loads((tmp_path / f"runs/gpu/fold_{fold}/error.json").read_text())["message"]


@pytest.mark.core
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


class Machine:
    """A node with an address and a mount namespace of its own, as on another machine: it may see other folders."""

    def __init__(self, head, address, hidden=None, replaced=None, **environment):
        """`hidden`: a folder that is empty there. `replaced`: a folder, and the one that is seen in its place."""
        # Ray's own files, too: nodes that start at once would take each other's sockets.
        apart = [f'mount -t tmpfs tmpfs "{folder}" && ' for folder in (ray_folder(), hidden) if folder]
        if replaced:
            apart.append('mount --bind "{1}" "{0}" && '.format(*replaced))
        script = (
            f'{"".join(apart)}exec "$0" -m ray.scripts.scripts start --address={head} --node-ip-address={address} "$@"'
        )
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, sys.executable]
        self.address = address
        self.name = f"node {address} ("
        self.process = subprocess.Popen(
            [*command, "--num-cpus=1", "--object-store-memory=100000000", "--block"],
            **{"env": os.environ | environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL},
        )

    def wait(self, cluster):
        """Until it has joined."""
        deadline = time.monotonic() + 120
        while self.address not in {node["NodeManagerAddress"] for node in cluster.global_state.node_table()}:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def hide(self, folder):
        """Mounts an empty file system over `folder`, as this node alone sees it."""
        enter = ["nsenter", f"--target={self.process.pid}", "--user", "--mount", "--preserve-credentials"]
        subprocess.run([*enter, "mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)

    def sees(self, folder):
        """The names in `folder` there."""
        return sorted(path.name for path in Path(f"/proc/{self.process.pid}/root{folder}").iterdir())

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=60)


@pytest.fixture
def machines():
    """A head without cores. Yields the cluster, and what starts further machines."""
    from ray.cluster_utils import Cluster

    try:
        subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespaces here: {error}")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    with contextlib.ExitStack() as started:
        started.callback(made.shutdown)

        def start(address, **options):
            machine = Machine(made.address, address, **options)
            started.callback(machine.close)
            return machine

        yield made, start


TINY = (
    "experiment=quickstart",
    "resources.gpus_per_fold=0",
    "cv.folds=2",
    "cv.max_concurrent=1",
    "resources.cpus_per_fold=1",
    "train.epochs=1",
)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.core
def test_nodes_that_join_later_and_lack_the_share_or_differ_train_nothing(tmp_path, machines):
    """They come when the folds wait for a node; then a good one comes. At the next run's start all four are asked."""
    made, start = machines
    cluster = {"RAY_ADDRESS": made.address, "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
    shutil.copytree(ROOT / "raycv", tmp_path / "other" / "raycv", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / "raycv" / "utils.py").open("a") as file:
        file.write("# one line more\n")
    base, stale = tmp_path / "base", tmp_path / "stale"
    for copy in (base, stale):
        shutil.copytree(ROOT / "models" / "tiny_llama", copy)
    with (stale / "config.json").open("a") as file:
        file.write("\n")
    out, runs = tmp_path / "out", tmp_path / "runs"
    run = RunFolder(runs / "grown")
    asked = (f"model.name={base}", "resources.autoscaling=true", "resources.retries=3", "run.name=grown")
    with background(tmp_path, *TINY, *asked, **cluster) as process:
        wait_until(run.tracking.is_file, process, out)
        without = start("127.0.0.2", hidden=runs)
        other = start("127.0.0.3", PYTHONPATH=f"{tmp_path / 'other'}:{os.environ.get('PYTHONPATH', '')}")
        third = start("127.0.0.5", replaced=(base, stale))
        wait_until(lambda: out.read_text().count("is left out from now on") == 3, process, out, 300)
        start("127.0.0.4")
        assert process.wait(timeout=300) == 0, out.read_text()
    said = " ".join(out.read_text().split())
    assert f"{without.name}" in said
    assert f"does not see the run's folder {run.root} (No such file or directory)" in said
    assert f"{other.name}" in said
    assert "raycv's source: driver " in said
    assert f"{third.name}" in said
    assert f"has another base model at {base} than the driver; these files differ: config.json." in said
    assert without.sees(runs) == []
    assert {fold["worker"]["address"] for fold in read_json(run.report)["folds"]} == {"127.0.0.4"}
    assert all((run.fold(fold).checkpoint / "adapter_model.safetensors").is_file() for fold in range(2))
    assert not run.share.exists()

    refused = raycv("run", *TINY, "run.name=next", cwd=tmp_path, **cluster)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    parts = ("2 faults", without.name, f"the run's folder {runs / 'next'}", f", {other.name}", "put run.dir")
    said_refusal(refused.stderr, "cluster-node", *parts, "pip install -r requirements.lock")
    # Tokenising takes minutes, so the refusal comes before.
    assert "Prompts:" in out.read_text()
    assert "Prompts:" not in refused.stdout
    assert not (runs / "next").exists()


@pytest.mark.slow
@pytest.mark.faults
def test_a_share_that_is_unmounted_amid_training_fails_the_fold_and_leaves_nothing_there(tmp_path, machines):
    """There is no other node: the other fold does not wait for one."""
    made, start = machines
    only = start("127.0.0.2")
    only.wait(made)
    cluster = {"RAY_ADDRESS": made.address, "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
    run, out = RunFolder(tmp_path / "runs" / "cut"), tmp_path / "out"
    states = "train.checkpoint_minutes=0.01"
    with background(tmp_path, *TINY, states, "run.name=cut", **cluster) as process:
        wait_until(lambda: list(run.fold(0).state.glob("0*")), process, out, 200)
        only.hide(run.root)
        assert process.wait(timeout=300) == 1, out.read_text()
    said = " ".join(out.read_text().split())
    assert f"{only.name}" in said
    assert f"does not see the run's folder {run.root}" in said
    assert "resume=cut" in said
    assert "fold 0, 1: No node is left that can take the fold" in said
    assert only.sees(run.root) == []
    assert not run.report.exists()
    assert run.finished(2) == []
    assert list(run.fold(0).state.glob("0*")), "what to resume from is kept"


@pytest.mark.slow
@pytest.mark.faults
def test_machines_without_shared_storage_train_through_a_bucket(tmp_path, storage, machines):
    """The machine that trains is lost. Another resumes from the published state, and the driver fetches its folds."""
    made, start = machines
    cache = tmp_path / "cache"
    cache.mkdir()
    first = start("127.0.0.2", hidden=cache)
    first.wait(made)
    cluster = {"RAY_ADDRESS": made.address, "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
    out, states = tmp_path / "out", "train.checkpoint_minutes=0.01"
    work = runs_folder(RUNS, WORK)
    with background(tmp_path, *TINY, states, "train.epochs=2", f"run.dir={RUNS}", "run.name=far", **cluster) as process:
        wait_until(lambda: any("fold_0/state/00" in name for name in storage.names("far")), process, out, 200)
        assert first.sees(work / "far") != []
        assert not (work / "far" / "fold_0" / "state").exists(), "the driver shares no folder with it"
        second = start("127.0.0.4", hidden=cache)
        second.wait(made)
        first.close()
        assert process.wait(timeout=400) == 0, out.read_text()
    said = " ".join(out.read_text().split())
    assert "resumes after epoch" in said
    folder = existing_run(runs_folder(RUNS), "far")
    assert {fold["worker"]["address"] for fold in read_json(folder.report)["folds"]} == {"127.0.0.4"}
    # The checksums are those that the worker took, and the copy here is the driver's.
    assert [FoldResult.of(folder, fold).fold for fold in range(2)] == [0, 1]
    assert (folder.fold(0).checkpoint / "adapter_model.safetensors").is_file()
    assert second.sees(work / "far") == [".share"], "its disk is free again"
    assert not any("/state/" in name for name in storage.names("far"))


SEEN_SOON = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
"""Ray notices a node that dies within a second or two."""


@pytest.mark.slow
@pytest.mark.faults
def test_a_node_that_is_lost_as_it_is_asked_is_skipped(tmp_path, caplog):
    import ray
    from ray.cluster_utils import Cluster

    from raycv.orchestration.cluster import check_nodes, node_resources

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": SEEN_SOON})
    try:
        made.add_node(num_cpus=1, object_store_memory=100_000_000)
        lost = made.add_node(num_cpus=2, object_store_memory=100_000_000)
        made.wait_for_nodes()
        ray.init(address=made.address, log_to_driver=False)
        made.remove_node(lost, allow_graceful=False)
        assert sorted(node.get("CPU", 0) for node in node_resources()) == [0, 1, 2], "Ray knows nothing of it yet"
        check_nodes(RunFolder(tmp_path), fetch_base(str(ROOT / "models" / "tiny_llama"), None))
        # Those that are left are planned for.
        assert sorted(node.get("CPU", 0) for node in node_resources()) == [0, 1]
    finally:
        ray.shutdown()
        made.shutdown()
    assert re.search(r"node \S+ \(\S+\) is lost, and is skipped", caplog.text)


@pytest.mark.slow
def test_a_run_says_what_it_waits_for_and_ends_when_nothing_comes(tmp_path):
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster = {"RAY_ADDRESS": made.address, "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
        asked = ("resources.autoscaling=true", "resources.gpus_per_fold=auto", "resources.wait_minutes=0.05")
        ended = raycv("run", *TINY, *asked, "run.name=waits", cwd=tmp_path, **cluster, HOME=str(tmp_path))
    finally:
        made.shutdown()
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "Cluster: 1 node (0 CPUs, 0 GPUs); may grow by nodes that raycv does not know" in ended.stdout
    waits = "the folds wait for 1 GPU and 1 CPU core: no node has them (nodes: 0 CPUs, 0 GPUs)"
    assert f"{waits}; the autoscaler starts one" in ended.stdout
    assert f"Run waits failed: {waits}" in ended.stderr
    assert "resume=waits" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


@pytest.mark.slow
def test_a_run_says_what_its_folds_wait_for_while_others_use_the_nodes(tmp_path):
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.placement_group import placement_group, remove_placement_group

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        ray.init(address=made.address, log_to_driver=False)
        others = placement_group([{"CPU": 1}])
        ray.get(others.ready())
        cluster = {"RAY_ADDRESS": made.address, "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
        out = tmp_path / "out"
        overrides = ("experiment=quickstart", "resources.gpus_per_fold=0", "cv.folds=2", "cv.only=[0]")
        with background(tmp_path, *overrides, "run.name=busy", **cluster) as process:
            waits = "fold 0: waits for 1 CPU core: the only CPU core is in use"
            wait_until(lambda: waits in out.read_text(), process, out, 200)
            remove_placement_group(others)
            assert process.wait(timeout=300) == 0, out.read_text()
    finally:
        ray.shutdown()
        made.shutdown()
    assert out.read_text().count("waits for") == 1


@pytest.mark.slow
def test_a_later_node_trains_a_further_fold_at_once(tmp_path):
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        made.add_node(num_cpus=1, object_store_memory=100_000_000)
        made.wait_for_nodes()
        cluster = {"RAY_ADDRESS": made.address, "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
        out = tmp_path / "out"
        epochs = ("train.epochs=50", "train.patience=50")
        overrides = ("experiment=quickstart", "resources.gpus_per_fold=0", "cv.folds=2", *epochs)
        with background(tmp_path, *overrides, "run.name=grown", **cluster) as process:
            wait_until(lambda: "fold 0: epoch 1" in out.read_text(), process, out, 200)
            assert "Up to 1 fold at once" in out.read_text()
            assert "fold 1: starting" not in out.read_text()
            made.add_node(num_cpus=1, object_store_memory=100_000_000)
            wait_until(lambda: "fold 1: starting" in out.read_text(), process, out, 200)
            assert "the cluster changed: up to 2 folds at once from now on" in out.read_text()
            assert "fold 0: done" not in out.read_text()
    finally:
        made.shutdown()
