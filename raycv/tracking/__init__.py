"""MLflow: the parent run, a child run per fold, a run per inference (FR-006). The only room that imports mlflow.

Comes in: results, configs and files of a run folder. Goes out: runs in an MLflow store.
Does not belong here: anything that a run depends on. The run folder is the truth, and MLflow has a copy.
"""

import os

# MLflow reads these variables when it is imported, so we set them first. A variable that the user has set stays.
# Posts are sensitive, so a tool that reads them must not send telemetry to third parties.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# raycv/common/retry.py retries each call, so the client's own 7 retries would multiply ours.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
# MLflow's links and progress bars would run through the live view. The summary names all places instead.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
