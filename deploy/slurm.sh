#!/bin/bash
# A cross-validation on machines of a Slurm cluster: sbatch deploy/slurm.sh cv.folds=5 run.dir=/shared/runs
#
# Type it in the checkout, where `make install` made .venv, on storage that all nodes see. Set nodes, cores and GPUs.
#SBATCH --job-name=raycv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --time=24:00:00
set -euo pipefail
source "${RAYCV_VENV:-.venv}/bin/activate"

# Others on these machines cannot use the cluster without the token, which lies in the shared home.
export RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk '{print $1; exit}')
# Ray waits half a minute for the other nodes, which a busy file system exceeds.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
# One port for each job, beyond those that Ray takes (10001 to 19999): two jobs may share a machine.
port=$((20000 + SLURM_JOB_ID % 10000))

# Starts Ray on all nodes, the run on the first of them, and stops Ray when the run ends.
srun --kill-on-bad-exit=0 ray symmetric-run --address "$address:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" -- python -m raycv.run "$@"
