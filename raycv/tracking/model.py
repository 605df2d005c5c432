"""The best fold as a model of MLflow, which `mlflow.pyfunc.load_model` and `mlflow models serve` open.

The model holds the fold's checkpoint. The base model is fetched by its name when the model is loaded.
"""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from raycv.common.files import sha256_of
from raycv.errors import UserError
from raycv.model.checkpoint import MANIFEST, read_info, versions
from raycv.results.run_folder import RunFolder
from raycv.tracking.run_store import RunStore

NAME = "model"
LOADER = "raycv.pyfunc"
"""The module that loads it, which MLflow imports by this name."""
SETTINGS = {"base": "", "criteria_dir": "", "device": "auto", "precision": "auto"}
"""Its `model_config`: arguments of `Run.predictor`. An empty text stands for the place that the checkpoint names."""
SUM_TAG = "raycv.checkpoint_sha256"
"""The SHA-256 of the checkpoint's `raycv.json`, which has those of its weights. It tells which model is logged."""
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "post"), ColSpec(DataType.string, "criterion")]),
    outputs=Schema(
        [ColSpec(DataType.string, "label"), ColSpec(DataType.double, "score"), ColSpec(DataType.boolean, "truncated")]
    ),
)


def log_best_fold(store: RunStore, parent_id: str, folder: RunFolder, report: Mapping[str, Any]) -> str | None:
    """Logs the best fold of a finished run as a model, except that of a control, whose answers mean nothing.

    Returns:
        Why the model is not in MLflow, without text of posts; None if it is there, or if the run is a control.
    """
    if report["control"]:
        return None
    try:
        log_model(store, parent_id, folder, report["best_fold"])
    except Exception as error:  # noqa: BLE001  (the run is complete, and has cost hours)
        return error.what if isinstance(error, UserError) else type(error).__name__
    return None


def log_model(store: RunStore, parent_id: str, folder: RunFolder, fold: int) -> str:
    """Logs the checkpoint of a fold as the model of its parent run, unless it is logged already.

    Returns:
        The id of the model.

    Raises:
        UserError: As Store does, or the checkpoint is damaged.
    """
    checkpoint = folder.fold(fold).checkpoint
    tags = model_tags(checkpoint)
    parent = store.run(parent_id)
    experiment_id = parent.info.experiment_id

    def find_or_make() -> LoggedModel:
        # A retry finds the model if the answer to the call that made it was lost.
        made = store.client.search_logged_models([experiment_id], f"tags.`{SUM_TAG}` = '{tags[SUM_TAG]}'")
        mine = [model for model in made if model.source_run_id == parent_id]
        return mine[0] if mine else store.client.create_logged_model(experiment_id, NAME, parent_id, tags)

    model = store.call("start a model", find_or_make)
    if model.status == LoggedModelStatus.READY:
        return str(model.model_id)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / NAME
        described = Model(run_id=parent_id, model_id=model.model_id)
        store.call("write the model", write_model, place, checkpoint, tags, described)
        store.call("log the model", store.client.log_model_artifacts, model.model_id, str(place))
    if parent.outputs is None or model.model_id not in {output.model_id for output in parent.outputs.model_outputs}:
        store.call("link the model", store.client.log_outputs, parent_id, [LoggedModelOutput(model.model_id, step=0)])
    # The status comes last, so that a model that is READY is whole.
    store.call("end the model", store.client.finalize_logged_model, model.model_id, LoggedModelStatus.READY)
    return str(model.model_id)


def model_tags(checkpoint: Path) -> dict[str, str]:
    """Returns what a checkpoint records about itself, as tags of its model.

    Raises:
        UserError: The checkpoint is damaged.
    """
    info = read_info(checkpoint)
    return {
        "raycv.run": info.run,
        "raycv.fold": str(info.fold),
        "raycv.threshold": str(info.threshold),
        "raycv.base_model": info.base_model,
        **({"raycv.base_revision": info.base_revision} if info.base_revision else {}),
        "raycv.criteria_hash": info.criteria_hash,
        "raycv.use": "research use, not for diagnosis",
        SUM_TAG: sha256_of(checkpoint / MANIFEST),
    }


def write_model(place: Path, checkpoint: Path, tags: Mapping[str, str], model: Model) -> None:
    """Writes the folder of a model. Loads no weights.

    Args:
        place: The folder to make.
        checkpoint: The checkpoint that the model holds.
        tags: The result of `model_tags`, which the model's description repeats.
        model: The description, with the ids of model and run.
    """
    # This import takes a second.
    from mlflow.pyfunc import save_model

    model.metadata = dict(tags)
    # The build of torch ("+cpu") is of this machine alone.
    needs = [f"{name}=={version.partition('+')[0]}" for name, version in versions().items() if version is not None]
    with warnings.catch_warnings():
        # An example of the input would be a post, and to check it MLflow would load the base once more.
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        save_model(
            place,
            loader_module=LOADER,
            data_path=str(checkpoint),
            mlflow_model=model,
            signature=SIGNATURE,
            pip_requirements=needs,
            model_config=SETTINGS,
        )
