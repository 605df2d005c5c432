"""The MLflow experiment that runs are logged to: found or made, and checked before a run."""

import logging
from functools import partial
from pathlib import Path

from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path

from raycv.config.schema import TrackingConfig
from raycv.errors import UserError, together
from raycv.tracking.store import Store
from raycv.tracking.store_checks import check_artifacts, check_new_artifacts, new_database, new_store_faults
from raycv.tracking.store_faults import not_mlflow

logger = logging.getLogger(__name__)


def open_experiment(store: Store, config: TrackingConfig) -> str:
    """The id of the experiment of `config` in `store`. Makes the experiment if it does not exist."""
    return store.call("open the experiment", store.alone, partial(_experiment, store, config))


def check_store(config: TrackingConfig) -> None:
    """Raises: UserError if the store of a new run cannot be used. Creates no store that does not exist yet."""
    if new_database(config) is None:
        check_experiment(Store(config.uri), config)
    elif faults := new_store_faults(config):
        raise together(faults)


def check_experiment(store: Store, config: TrackingConfig) -> Experiment | None:
    """The experiment of `config` in `store`; None if it does not exist yet. Writes nothing.

    Raises:
        UserError: The experiment was deleted, or its folder for artifacts cannot be written.
    """
    found = store.call("look for the experiment", store.client.get_experiment_by_name, config.experiment)
    if found is None:
        if store.database:
            check_new_artifacts(config)
    elif not found.experiment_id:
        # MLflow's client makes an experiment without an id of any other JSON.
        raise not_mlflow(store.shown_uri)
    elif found.lifecycle_stage != "active":
        raise UserError(
            f"The MLflow experiment {config.experiment!r} was deleted.",
            kind="tracking-store",
            remedies=[
                f"restore it: mlflow experiments restore -x {found.experiment_id}",
                "tracking.experiment=<other>",
            ],
        )
    elif (kept := _artifacts_of(store, found)) is not None:
        other = ["tracking.experiment=<another>, which takes its place from tracking.artifacts"]
        check_artifacts(kept, other, f"the experiment {config.experiment!r} keeps its artifacts there")
    return found


def _experiment(store: Store, config: TrackingConfig) -> str:
    asked = Path(config.artifacts).absolute()
    found = check_experiment(store, config)
    if found is None:
        # A server chooses its place for artifacts. For a database in a file, MLflow would take the working
        # directory, so we name the place.
        place = asked.as_uri() if store.database else None
        # MLflow's page asks for the kind of an experiment that lacks this tag, so we set it.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(store.client.create_experiment(config.experiment, artifact_location=place, tags=tags))
        except MlflowException as error:
            # Another client of the server may have made the experiment meanwhile, so we take that one.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return _experiment(store, config)
    if (kept := _artifacts_of(store, found)) not in (None, asked):
        logger.warning(
            "tracking.artifacts=%s is not used: the experiment %s keeps its artifacts in %s",
            *(config.artifacts, config.experiment, kept),
        )
    return str(found.experiment_id)


def _artifacts_of(store: Store, experiment: Experiment) -> Path | None:
    """The folder of the artifacts; None if a server, or another store, keeps them."""
    is_folder = store.database and str(experiment.artifact_location).startswith("file:")
    return Path(local_file_uri_to_path(experiment.artifact_location)) if is_folder else None
