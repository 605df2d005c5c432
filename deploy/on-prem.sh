# What raycv's commands need on each machine of deploy/on-prem.yaml.
export PATH=~/raycv-env/bin:$PATH
export RAY_AUTH_MODE=token
export RAYCV_RUN_DIR=/shared/runs
export HF_HOME=/shared/huggingface
# `ray submit` gives the run a terminal even if you keep its output: lines, no table that is drawn again and again.
export TTY_INTERACTIVE=0
