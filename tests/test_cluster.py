"""cluster.yaml passes Ray's own check, pins what the lock pins, and keeps clear of known traps."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_rays_own_schema_accepts_it(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_rays_schema_check_does_refuse(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match=r"Additional properties|not valid|unexpected"):
        validate_config(prepare_config({**cluster, "nonsense": 1}))


def test_ray_is_the_version_of_the_lock(cluster):
    locked = re.search(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
    assert f"ray:{locked}-py3" in cluster["docker"]["image"]


def test_every_node_installs_the_package_and_nothing_shadows_it(cluster):
    installs = " ".join(cluster["setup_commands"])
    assert "requirements.lock" in installs
    assert re.search(r"pip install .*--no-deps ~/raycv-src", installs)
    assert not any(path.rstrip("/").endswith("/raycv") for path in cluster["file_mounts"])


def test_dashboard_stays_on_the_head(cluster):
    assert any("--dashboard-host=127.0.0.1" in command for command in cluster["head_start_ray_commands"])


def test_a_gpu_worker_for_each_fold(cluster):
    assert cluster["available_node_types"]["gpu_worker"]["max_workers"] >= 5
    assert cluster["max_workers"] >= 5


def synced(cluster, *folders):
    """Runs rsync as Ray does, with the excludes of cluster.yaml."""
    excludes = [part for name in cluster["rsync_exclude"] for part in ("--exclude", name)]
    subprocess.run(["rsync", "-az", *excludes, *map(str, folders)], check=True)


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
@pytest.mark.parametrize("file", ["cluster.yaml", "docs/guides/clusters.md"])
def test_the_documented_command_fetches_the_runs(cluster, tmp_path, file):
    source, target = re.search(r"ray rsync-down cluster.yaml (\S+) (\S+)", (ROOT / file).read_text()).groups()
    (tmp_path / "shared/runs/first").mkdir(parents=True)
    (tmp_path / "shared/runs/first/report.json").write_text("{}")
    synced(cluster, f"{tmp_path}{source}", tmp_path / target)
    assert (tmp_path / target / "first/report.json").is_file()


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_runs_never_travel_to_the_cluster(cluster, tmp_path):
    for file in ("mine/runs/secret/report.json", "mine/mlflow.db", "mine/mlruns/1/x", "mine/raycv/run.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    synced(cluster, f"{tmp_path}/mine/", tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["raycv"]


def test_a_run_on_the_cluster_prints_lines(cluster):
    assert "-e TTY_INTERACTIVE=0" in cluster["docker"]["run_options"]
