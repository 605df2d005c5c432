"""`sbatch deploy/slurm.sh` on two machines with a real Slurm, which are network namespaces: `make test-cluster`."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import ROOT
from support.machines import lacking, machines

from raycv.common.files import read_json
from raycv.results.run_folder import RunFolder

MISSING = next((tool for tool in ("slurmctld", "slurmd", "munged") if not Path(f"/usr/sbin/{tool}").exists()), None)
INSTALL = "apt-get install slurmctld slurmd slurm-client munge"
WHY = f"{MISSING} is not installed: {INSTALL}" if MISSING else lacking()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
]
CONF = """
ClusterName=raycv
SlurmctldHost=machine0
AuthInfo=socket=/tmp/ray/munge.socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=machine[0-1] CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def test_a_job_of_two_nodes_trains_on_both(tmp_path):
    slurm = tmp_path / "slurm"
    (slurm / "state").mkdir(parents=True)
    (slurm / "slurm.conf").write_text(CONF.format(folder=slurm))
    (slurm / "munge.key").write_bytes(os.urandom(128))
    (slurm / "munge.key").chmod(0o400)
    # Slurm has no GPUs here.
    script = (ROOT / "deploy" / "slurm.sh").read_text().replace("#SBATCH --gpus-per-task=1\n", "")
    (slurm / "slurm.sh").write_text(script.replace("--cpus-per-task=8", "--cpus-per-task=1"))
    environment = {
        "HOME": "/shared/home",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "SLURM_CONF": str(slurm / "slurm.conf"),
        "RAYCV_VENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
    }
    given = ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
    with machines(tmp_path, 2) as made:
        (tmp_path / "shared" / "home").mkdir()
        for machine in made:
            machine.boot()
            own = "/tmp/ray/munge"
            munge = ["--key-file", str(slurm / "munge.key"), "--socket", f"{own}.socket", "--seed-file", f"{own}.seed"]
            machine.run("munged", "--force", *munge, "--log-file", f"{own}.log", "--pid-file", f"{own}.pid")
        made[0].run(*given, "slurmctld")
        for index, machine in enumerate(made):
            machine.run(*given, "slurmd", "-N", f"machine{index}")
        overrides = ["experiment=quickstart", "cv.folds=2", "run.name=slurm", "run.dir=/shared/runs"]
        overrides += ["resources.cpus_per_fold=1", "tracking.uri=sqlite:////shared/mlflow.db"]
        words = ["sbatch", "--wait", "--chdir", str(ROOT), "--output", str(slurm / "out"), str(slurm / "slurm.sh")]
        try:
            made[0].run(*given, *words, *overrides)
        except subprocess.CalledProcessError as error:
            logs = [file.read_text() for file in (slurm / "out", slurm / "slurmctld.log") if file.exists()]
            pytest.fail("\n".join([error.stdout + error.stderr, *logs]))
        run = RunFolder(tmp_path / "shared" / "runs" / "slurm")
        said = (slurm / "out").read_text()
        assert run.report.is_file(), said
        trained = {read_json(run.fold(fold).result)["worker"]["address"] for fold in range(2)}
        assert trained == {machine.address for machine in made}, said
        assert re.search(r"\S+", (tmp_path / "shared" / "home" / ".ray" / "auth_token").read_text())
        # Ray stops with the job.
        deadline = time.monotonic() + 60
        while any(machine.runs("raylet") for machine in made):
            assert time.monotonic() < deadline
            time.sleep(1)
