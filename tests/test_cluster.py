"""The files by which raycv comes to a cluster pass the schemas of their readers, and keep clear of known traps."""

import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from raycv.config.command_line import compose
from raycv.config.schema import RunConfig
from raycv.config.validation import validate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.mark.parametrize("file", ["cluster.yaml", "deploy/on-prem.yaml"])
def test_rays_own_schema_accepts_it(file):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load((ROOT / file).read_text()))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.slow
def test_amazons_api_starts_its_nodes(cluster, tmp_path, monkeypatch):
    """Ray's provider for AWS, against moto: keys, roles, a security group, a head, and a spot machine with a GPU."""
    moto = pytest.importorskip("moto", reason="moto is not installed")
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    for name, value in (("HOME", str(tmp_path)), ("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x")):
        monkeypatch.setenv(name, value)
    with moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        ready = AWSNodeProvider.fillout_available_node_types_resources(bootstrap_aws(prepare_config(cluster)))
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        for name, kind in ready["available_node_types"].items():
            tags = {"ray-node-type": name, "ray-node-name": name, "ray-launch-config": "", "ray-user-node-type": name}
            provider.create_node(kind["node_config"], tags, 1)
        region = boto3.client("ec2", cluster["provider"]["region"])
        made = [one for group in region.describe_instances()["Reservations"] for one in group["Instances"]]
        disks = region.describe_volumes()["Volumes"]
    found = {one["InstanceType"]: one.get("InstanceLifecycle") for one in made}
    assert found == {"m6i.2xlarge": None, "g6e.2xlarge": "spot"}
    assert disks[0]["Encrypted"]
    assert ready["available_node_types"]["head"]["resources"]["CPU"] == 0


def test_rays_schema_check_does_refuse(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match=r"Additional properties|not valid|unexpected"):
        validate_config(prepare_config({**cluster, "nonsense": 1}))


def test_ray_is_the_version_of_the_lock(cluster):
    locked = re.search(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
    assert f"ray:{locked}-py3" in cluster["docker"]["image"]


def test_the_cluster_asks_for_a_token_that_travels_by_ssh(cluster):
    assert "-e RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    prem = yaml.safe_load((ROOT / "deploy/on-prem.yaml").read_text())
    assert "export RAY_AUTH_MODE=token" in (ROOT / "deploy/on-prem.sh").read_text()
    for file in (cluster, prem):
        assert "~/.ray/auth_token" in file["file_mounts"].values()


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
@pytest.mark.parametrize(
    "file", ["cluster.yaml", "deploy/on-prem.yaml", "docs/guides/on-aws.md", "docs/guides/on-prem.md"]
)
def test_the_documented_command_fetches_the_runs(cluster, tmp_path, file):
    source, target = re.search(r"ray rsync-down \S+\.yaml (\S+) (\S+)", (ROOT / file).read_text()).groups()
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


# --- KubeRay ---------------------------------------------------------------------------------------------------------

TEXT, COUNT, YES = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}


def fields(required=(), **properties):
    """The schema of an object with these fields alone."""
    kind = {"type": "object", "properties": properties, "required": list(required)}
    return kind | {"additionalProperties": False}


TEXTS = {"type": "object", "additionalProperties": TEXT}
AMOUNTS = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
ENV = {"type": "array", "items": fields(["name"], name=TEXT, value=TEXT)}
MOUNTS = {"type": "array", "items": fields(["name", "mountPath"], name=TEXT, mountPath=TEXT)}
CONTAINER = fields(
    ["name"],
    name=TEXT, image=TEXT, env=ENV, volumeMounts=MOUNTS, resources=fields(limits=AMOUNTS, requests=AMOUNTS),
)  # fmt: skip
VOLUME = fields(["name"], name=TEXT, persistentVolumeClaim=fields(["claimName"], claimName=TEXT))
POD = fields(
    spec=fields(
        ["containers"],
        containers={"type": "array", "items": CONTAINER},
        volumes={"type": "array", "items": VOLUME},
    )
)
WORKERS = fields(
    ["groupName", "maxReplicas", "minReplicas", "template"],
    groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=TEXTS, template=POD,
)  # fmt: skip
RAY_CLUSTER = fields(
    ["headGroupSpec"],
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=YES,
    autoscalerOptions=fields(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT),
    headGroupSpec=fields(["template"], rayStartParams=TEXTS, template=POD),
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
RAY_JOB = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(["name"], name=TEXT),
    spec=fields(
        entrypoint=TEXT, shutdownAfterJobFinishes=YES, ttlSecondsAfterFinished=COUNT, backoffLimit=COUNT,
        rayClusterSpec=RAY_CLUSTER,
    ),
)  # fmt: skip
"""The fields of KubeRay's RayJob that the file uses, named and typed as in the CRD of KubeRay 1.6 and 1.7 (Apache-2.0).

The CRD itself has 25,000 lines. The file was checked with the whole of it, unknown fields refused.
"""


@pytest.fixture
def ray_job():
    return yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())


def test_kuberay_accepts_the_job(ray_job):
    jsonschema.validate(ray_job, RAY_JOB)
    ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 5
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(ray_job, RAY_JOB)


def test_the_job_runs_the_ray_of_the_lock_and_raycv_accepts_its_command(ray_job):
    locked = re.search(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
    assert ray_job["spec"]["rayClusterSpec"]["rayVersion"] == locked
    words = ray_job["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "raycv.run"]
    validate(RunConfig, compose("run", words[3:]))


def test_the_image_holds_the_lock_and_no_data_of_yours():
    steps = (ROOT / "deploy/Containerfile").read_text()
    assert "pip install --no-cache-dir -r requirements.lock" in steps
    left_out = (ROOT / ".containerignore").read_text().splitlines()
    assert left_out[1] == "*"
    assert [line for line in left_out[1:] if "data" in line] == ["!data", "data/*", "!data/sample", "!data/dsm5"]


@pytest.mark.parametrize("file", ["slurm.sh", "on-prem.sh"])
def test_the_shell_reads_the_scripts(file):
    subprocess.run(["bash", "-n", str(ROOT / "deploy" / file)], check=True)
