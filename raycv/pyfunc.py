"""MLflow loads the model of a run through this module: `mlflow.pyfunc.load_model` calls `_load_pyfunc`.

Logged models name this module, so it keeps its name and place.
"""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycv.errors import UserError
from raycv.results.run_folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from raycv.analysis.scorer import Scorer


class FoldModel:
    """The trained model of one fold, as MLflow asks it."""

    def __init__(self, scorer: "Scorer") -> None:
        self._scorer = scorer
        # MLflow's server answers each request in a thread of its own, and a model computes one at a time.
        self._alone = threading.Lock()

    def predict(self, frame: "pd.DataFrame") -> "pd.DataFrame":
        """Scores pairs, and returns a row for each: label, score, truncated.

        Args:
            frame: The columns `post` and `criterion`: an id, a symptom name, or a description in your own words.

        Raises:
            UserError: A text is missing or empty, or the run does not have a criterion. The message repeats no post.
        """
        missing = next((n for n, asked in enumerate(frame["criterion"], 1) if not isinstance(asked, str)), None)
        if missing is not None:
            remedies = ["give each post a criterion: an id, a symptom name, or your own words"]
            raise UserError(f"Pair {missing}: the criterion is missing.", kind="input-file", remedies=remedies)
        with self._alone:
            return self._scorer.predict(frame[["post", "criterion"]])[["label", "score", "truncated"]]


def _load_pyfunc(path: str, model_config: Mapping[str, str]) -> FoldModel:
    """Loads a checkpoint, and fetches its base model by the name that the checkpoint records.

    Args:
        path: The folder of the checkpoint.
        model_config: The keys of `raycv.tracking.model.SETTINGS`.

    Raises:
        UserError: The checkpoint is damaged, or its base model cannot be fetched.
    """
    from raycv.analysis.scorer import Scorer

    # MLflow's error about a missing column would repeat the posts. A variable that the user has set stays.
    os.environ.setdefault("MLFLOW_DISABLE_SCHEMA_DETAILS", "true")
    places: dict[str, Any] = {name: model_config[name] or None for name in ("base", "criteria_dir")}
    device, precision = model_config["device"], model_config["precision"]
    return FoldModel(Scorer(RunFolder(Path(path)), "best", device=device, precision=precision, **places))
