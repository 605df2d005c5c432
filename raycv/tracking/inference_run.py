"""An inference in an MLflow store: one finished run."""

from collections.abc import Mapping
from typing import Any

from raycv.tracking.run_store import RunStore


def log_inference(
    store: RunStore,
    experiment_id: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> str:
    """Logs a finished run: the model and facts of its answers, never a text (user story 3). Returns its id."""
    run_id = store.start("start a run", experiment_id, "infer", tags)
    store.log_params(run_id, params)
    store.log_metrics(run_id, metrics)
    store.finish(run_id, "FINISHED")
    return run_id
