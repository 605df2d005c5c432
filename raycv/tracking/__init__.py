"""MLflow: the parent run, a child run per fold, a run per inference (FR-006). The only room that imports mlflow.

Comes in: results, configs and files of a run folder. Goes out: runs in an MLflow store.
Does not belong here: anything that a run cannot do without. The run folder is the truth, and MLflow has a copy.
"""

import os

# MLflow reads these when it is imported.
# Posts are sensitive: a tool that reads them does not talk to third parties. Set the variable yourself to differ.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# The retries are ours (retry.py): the client's own 7 would multiply them.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
# Its links and progress bars would run through the live view; the summary says where everything is.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
