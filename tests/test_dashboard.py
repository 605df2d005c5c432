"""What Ray's dashboard and its metrics endpoint show of a run, read while it trains on a cluster."""

import json
import os
import re
import urllib.request

import pytest
from support.interrupted_runs import started, wait_for
from support.mlflow_runs import free_port
from support.pages import undocumented

from raycv import __version__
from raycv.orchestration.fold_task import GAUGES

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def read(address):
    with urllib.request.urlopen(f"http://{address}", timeout=120) as answer:
        return answer.read().decode()


def test_folds_have_names_states_and_gauges(tmp_path):
    from ray.cluster_utils import Cluster

    port = free_port()
    node = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": free_port(), "metrics_export_port": port}
    made = Cluster(initialize_head=True, head_node_args=node)
    shown = {}

    def seen():
        """Looks until all gauges of a fold but a GPU's are there: the first epoch has ended by then."""
        exported = read(f"127.0.0.1:{port}/metrics")
        tag = r'ray_(raycv_\w+)\{(?=[^}]*fold="0")(?=[^}]*run="mine")[^}]*\} (\S+)'
        shown["gauges"] = {name: float(value) for name, value in re.findall(tag, exported)}
        return shown["gauges"].keys() >= GAUGES.keys() - {"raycv_gpu_memory_bytes"}

    try:
        # With autoscaling a cluster counts as several machines, so each fold has a trial of its own.
        more = ("train.epochs=60", "train.patience=60", "resources.autoscaling=true", "resources.gpus_per_fold=0")
        cluster = {"RAY_ADDRESS": made.address, "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
        with started(tmp_path, *more, **cluster) as process:
            wait_for(process, tmp_path, seen)
            actors = json.loads(read(f"{made.webui_url}/api/v0/actors?detail=1"))["data"]["result"]["result"]
            runs = json.loads(read(f"{made.webui_url}/api/train/v2/runs/v1"))["train_runs"]
            jobs = json.loads(read(f"{made.webui_url}/api/jobs/"))
    finally:
        made.shutdown()
    gauges = shown["gauges"]
    assert (gauges["raycv_epoch"], gauges["raycv_loss"] > 0) == (gauges["raycv_epoch"] // 1, True)
    assert 1 <= gauges["raycv_step"] <= gauges["raycv_steps"]
    assert 0 <= gauges["raycv_validation_f1"] <= 1
    assert gauges["raycv_tokens_per_second"] > 100
    assert gauges["raycv_seconds_left"] > 0
    alive = {actor["name"] or actor["repr_name"] for actor in actors if actor["state"] == "ALIVE"}
    assert {"mine/fold_0", "mine/board"} <= alive
    assert {run["name"]: run["status"] for run in runs} == {"mine/fold_0": "RUNNING"}
    told = next(job["metadata"] for job in jobs if job["metadata"].get("raycv"))
    assert (told["raycv"], told["run"], told["folds"]) == (__version__, "mine", "2")


def test_the_page_lists_every_gauge():
    assert undocumented({f"ray_{name}" for name in GAUGES}, "guides/dashboard.md") == set()
