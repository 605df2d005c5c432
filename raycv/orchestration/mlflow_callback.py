"""Ray's MLflow callback: hands on what Tune reports. CrossValidationStore chooses what MLflow gets."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.air.integrations.mlflow import MLflowLoggerCallback

from raycv.common.locations import absolute_uri
from raycv.common.secrets import mask_secrets
from raycv.config.schema import TrackingConfig
from raycv.errors import UserError
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import RunFolder
from raycv.tracking.cross_validation import CrossValidationStore
from raycv.tracking.run_store import now_ms
from raycv.training.metrics import EPOCH_KEY, VAL_LOSS

logger = logging.getLogger(__name__)

AWAY_SECONDS = 10.0
"""Before a store that could not be reached is asked again for the sake of an epoch."""


class FoldRuns(MLflowLoggerCallback):
    """Ray's MLflow callback, logging a child run per fold of the parent.

    Ray's own logs every number that Tune passes on, one request each, under a generated name; this one logs what
    CrossValidationStore chooses. A store that fails on the way stops nothing: what is missing is logged from the run
    folder later.
    """

    def __init__(
        self, config: TrackingConfig, parent_id: str, folder: RunFolder, params: Mapping[str, Any], fold_key: str
    ) -> None:
        super().__init__(tracking_uri=absolute_uri(config.uri), experiment_name=config.experiment)
        self.tracking = config
        self.parent_id = parent_id
        self.folder = folder
        self.params = dict(params)
        self.fold_key = fold_key

    def setup(self, *args: Any, **kwargs: Any) -> None:
        super().setup(*args, **kwargs)
        self.store = CrossValidationStore(self.tracking.uri)
        self._logged: dict[Any, set[int]] = {}
        self._pending: dict[Any, list[tuple[dict[str, Any], int]]] = {}
        self._away_until = 0.0
        # One thread, so still one writer. Tune calls its callbacks inside its event loop. A slow store would keep Tune
        # from fetching results. A trial that ends meanwhile would then wait for ever on its one-slot queue.
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")

    def close(self) -> None:
        """Waits until all that was handed over is logged, or has failed."""
        if hasattr(self, "_writer"):
            self._writer.shutdown(wait=True)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into its own state; connections and threads stay behind.
        left_behind = ("store", "mlflow_util", "_writer", "_trial_runs", "_logged", "_pending", "_away_until")
        state = {key: value for key, value in self.__dict__.items() if key not in left_behind}
        # Tune writes this state to a file in the run folder, so it must not hold a password.
        tracking = self.tracking.model_copy(update={"uri": mask_secrets(self.tracking.uri)})
        return state | {"tracking": tracking, "tracking_uri": tracking.uri}

    def log_trial_start(self, trial: Any) -> None:
        self._try(self._start, trial, trial.config[self.fold_key])

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        if VAL_LOSS in result:
            # Its moment stays the same in every attempt: a database then keeps one of two that both arrive.
            self._try(self._epoch, trial, trial.config[self.fold_key], dict(result), now_ms())

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        self._try(self._finish, trial, trial.config[self.fold_key])

    def _start(self, trial: Any, fold: int) -> None:
        self._trial_runs[trial] = self.store.start_child(self.parent_id, fold, self.params)

    def _epoch(self, trial: Any, fold: int, result: dict[str, Any], moment: int) -> None:
        self._pending.setdefault(trial, []).append((result, moment))
        # A store that is away is not asked at every epoch: the attempts of many would hold up the run's end.
        if time.monotonic() >= self._away_until:
            self._catch_up(trial, fold)

    def _catch_up(self, trial: Any, fold: int) -> str:
        """Logs what the store has missed of the fold. Returns the id of its run."""
        if trial not in self._trial_runs:
            self._start(trial, fold)
        run_id, pending = self._trial_runs[trial], self._pending.get(trial, [])
        if trial not in self._logged:
            # A resumed fold may train its last epoch once more.
            self._logged[trial] = self.store.logged_epochs(run_id)
        while pending:
            result, moment = pending[0]
            if result[EPOCH_KEY] not in self._logged[trial]:
                try:
                    self.store.log_epoch(run_id, result, moment)
                except UserError:
                    # The store may have it, and only the answer is lost: it is asked before the next attempt.
                    del self._logged[trial]
                    raise
                # A fold that starts again after the death of a process may report it twice, too.
                self._logged[trial].add(result[EPOCH_KEY])
            pending.pop(0)
        return str(run_id)

    def _finish(self, trial: Any, fold: int) -> None:
        run_id = self._catch_up(trial, fold)
        folder = self.folder.fold(fold)
        # Not Tune's word: the trial of a fold that fails ends like any other, and one may die when all is done.
        failed = not folder.result.is_file()
        if not failed:
            self.store.log_fold(run_id, FoldResult.read(folder.result), folder, self.folder.config)
        self.store.finish(run_id, "FAILED" if failed else "FINISHED")

    def _try(self, log: Callable[..., None], *args: Any) -> None:
        def attempt() -> None:
            try:
                log(*args)
            except UserError as error:
                self._away_until = time.monotonic() + AWAY_SECONDS
                logger.warning("not logged for now, the run folder has it: %s", error.what)
            except Exception:
                # Nobody reads the future of this thread's work: a bug would pass in silence.
                logger.exception("logging a fold failed")
                raise

        self._writer.submit(attempt)
