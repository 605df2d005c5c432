"""A finished run in Python: its numbers as data frames, its figures, its mistakes, and its trained models."""

from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raycv.analysis.figures import Plots
from raycv.analysis.mistakes import COLUMNS, TEXTS, mistakes_of, thresholds_of
from raycv.common.locations import resolve
from raycv.data.dataset import load_dataset, with_shuffled_labels
from raycv.data.types import Dataset
from raycv.errors import UserError
from raycv.evaluation.bootstrap import DRAWS, SEED
from raycv.evaluation.evaluate import evaluate
from raycv.evaluation.measures import LABEL_METRICS, METRICS
from raycv.evaluation.operating_points import CROSS_FOLD, RULES
from raycv.evaluation.study import Study
from raycv.results.find_run import existing_run, recorded_config
from raycv.results.run_folder import RunFolder, read_record, resume_command
from raycv.results.study import check_data, load_study
from raycv.training.metrics import METRICS as REPORTED
from raycv.training.metrics import THRESHOLD

if TYPE_CHECKING:
    import pandas as pd

    from raycv.analysis.scorer import Scorer


def open_run(run: str | Path, runs: Path) -> "Run":
    """Finds a run by its name, its folder, or as `latest` in the folder `runs`. Raises: UserError."""
    return Run(existing_run(runs, str(run)))


class Run:
    """One cross-validation. It reads its folder when a value is first asked for.

    Attributes:
        folder: The run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        """Takes a run folder. `raycv.load_run` finds one by name."""
        self.folder = folder
        self._evaluations: dict[tuple[int, int], dict[str, Any]] = {}

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.folder.root.name

    def __repr__(self) -> str:
        return f"<raycv run {self.name} in {self.folder.root.parent}>"

    def _repr_html_(self) -> str:
        """The run as a notebook shows it: mean and deviation of each metric over the folds."""
        try:
            report = self.report
        except UserError as error:
            return f"<p><b>raycv run {escape(self.name)}</b>: {escape(error.what)}</p>"
        cells = "".join(
            f"<tr><th>{escape(name)}</th><td>{report['mean'][name]:.3f}</td><td>{report['std'][name]:.3f}</td></tr>"
            for name in (*REPORTED, THRESHOLD)
        )
        control = "Control with permuted labels, not a result. " if report.get("control") else ""
        return (
            f"<p><b>raycv run {escape(self.name)}</b>: {control}{len(report['folds'])} folds, finished "
            f"{escape(str(report.get('finished')))}. Research use, not for diagnosis.</p><table><thead><tr><th></th>"
            f"<th>mean</th><th>std (ddof=1)</th></tr></thead><tbody>{cells}</tbody></table>"
        )

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of `report.json`.

        Raises:
            UserError: The run is not finished, or the file is damaged.
        """
        if not self.folder.report.is_file():
            raise UserError(
                f"Run {self.name} is not finished: it has no {self.folder.report.name}.",
                kind="run-failed",
                remedies=[f"finish it: {resume_command(self.folder)}"],
            )
        return read_record(self.folder.report, "run", folds=list, mean=dict, std=dict)

    @cached_property
    def study(self) -> Study:
        """The out-of-fold predictions as arrays. Raises: UserError if a fold is not finished, or a file is damaged."""
        return load_study(self.folder)

    @property
    def folds(self) -> "pd.DataFrame":
        """A row per fold: the five metrics at the fold's own threshold, its sizes, epochs and seconds."""
        import pandas as pd

        names = ("best_epoch", "epochs", "train_pairs", "val_pairs", "val_matched", "seconds")
        rows = [
            {
                "fold": fold["fold"],
                **fold["metrics"],
                THRESHOLD: fold[THRESHOLD],
                **{name: fold[name] for name in names},
            }
            for fold in self.report["folds"]
        ]
        return pd.DataFrame(rows).set_index("fold")

    def predictions(self, operating_point: str = CROSS_FOLD) -> "pd.DataFrame":
        """Returns the out-of-fold predictions: fold, post_id, criterion_id, label, score, predicted.

        Args:
            operating_point: The threshold behind `predicted`: `cross_fold` (tuned on the other folds),
                `tuned_in_fold` (on the fold itself, which flatters) or `fixed` (0.5).

        Raises:
            UserError: A fold is not finished, a file is damaged, or the operating point is unknown.
        """
        import pandas as pd

        if operating_point not in RULES:
            remedies = [f"choose one of {', '.join(RULES)}"]
            raise UserError(f"operating_point={operating_point} is not known.", kind="config-value", remedies=remedies)
        study = self.study
        return pd.DataFrame(
            {
                "fold": study.fold,
                "post_id": np.array(study.post_ids, dtype=object)[study.post],
                "criterion_id": np.array(study.criterion_ids, dtype=object)[study.criterion],
                "label": study.labels.astype(int),
                "score": study.scores,
                "predicted": (study.scores >= thresholds_of(study, operating_point)[study.fold]).astype(int),
            }
        )

    def evaluation(self, draws: int = DRAWS, seed: int = SEED) -> dict[str, Any]:
        """Returns all statistics of the run, in the shape that `raycv.evaluation.evaluate` describes.

        Args:
            draws: The number of bootstrap draws.
            seed: Their seed.
        """
        if (draws, seed) not in self._evaluations:
            self._evaluations[draws, seed] = evaluate(self.study, draws, seed)
        return self._evaluations[draws, seed]

    def metrics(self, by: str | None = None) -> "pd.DataFrame":
        """Returns the metrics at the threshold tuned on the other folds. An undefined value is NaN.

        Args:
            by: `criterion` or `fold` for a row each; None for a row per metric, with 95 % intervals.

        Returns:
            With None: the pooled value and its post bootstrap interval (`low`, `high`). Then the mean over the folds
            (`fold_mean`, `sd`) and its corrected t interval (`t_low`, `t_high`). Last the mean over the criteria.

        Raises:
            UserError: `by` is another word, or the predictions cannot be read.
        """
        import pandas as pd

        if by not in (None, "criterion", "fold"):
            remedies = ["by='criterion', by='fold', or leave it out"]
            raise UserError(f"by={by} is not known.", kind="config-value", remedies=remedies)
        found = self.evaluation()
        if by == "fold":
            rows = [
                {"fold": row["fold"], "pairs": row["pairs"], "matched": row["matched"], **row[CROSS_FOLD],
                 **row["scores"], THRESHOLD: row["threshold"][CROSS_FOLD]}
                for row in found["folds"]
            ]  # fmt: skip
        elif by == "criterion":
            rows = [
                {"criterion": row["criterion"], "pairs": row["pairs"], "matched": row["matched"],
                 **{name: row["metrics"][name]["value"] for name in METRICS},
                 "f1_low": row["metrics"]["f1"]["fixed"]["low"], "f1_high": row["metrics"]["f1"]["fixed"]["high"]}
                for row in found["criteria"]
            ]  # fmt: skip
        else:
            point = next(point for point in found["operating_points"] if point["name"] == CROSS_FOLD)
            rows = [
                _metric(name, point if name in LABEL_METRICS else found["score_metrics"]) for name in METRICS
            ]  # fmt: skip
        frame = pd.DataFrame(rows)
        frame = frame.set_index(frame.columns[0])
        return frame.astype({name: float for name in frame.columns if name not in ("pairs", "matched")})

    @property
    def plot(self) -> Plots:
        """The figures: `roc()`, `precision_recall()`, `threshold()`, `criteria()`, `calibration()`."""
        return Plots(self.evaluation())

    def mistakes(
        self,
        most: int = 50,
        text: bool = False,
        data_dir: str | Path | None = None,
        criteria_dir: str | Path | None = None,
    ) -> "pd.DataFrame":
        """Returns the most confident mistakes of each criterion, at the threshold tuned on the other folds.

        Args:
            most: Rows of each criterion, at most.
            text: Whether to join posts and criteria from the data set.
            data_dir: The folder of the posts; None for where training read them.
            criteria_dir: The folder of the criteria; None for where training read them.

        Raises:
            UserError: The predictions cannot be read, or the data set is not that of the run.
        """
        import pandas as pd

        columns = [*COLUMNS, *(TEXTS if text else ())]
        return pd.DataFrame(self.mistake_rows(most, text, data_dir, criteria_dir), columns=columns)

    def mistake_rows(
        self, most: int, text: bool, data_dir: str | Path | None, criteria_dir: str | Path | None
    ) -> list[dict[str, Any]]:
        """Returns the rows of `mistakes`, with None for what the run did not record."""
        return mistakes_of(self.study, most, self._dataset(data_dir, criteria_dir) if text else None)

    def _dataset(self, data_dir: str | Path | None, criteria_dir: str | Path | None) -> Dataset:
        config = recorded_config(self.folder)
        data = config.data
        if criteria_dir is None and data.criteria_dir == data.dir:
            # Criteria that lay beside the posts move along with them.
            criteria_dir = data_dir
        posts, criteria = data_dir or data.dir, criteria_dir or data.criteria_dir
        dataset = load_dataset(
            Path(resolve(str(posts))), Path(resolve(str(criteria))), empty=data.empty, missing=data.missing
        )
        if data.shuffle_labels:
            dataset = with_shuffled_labels(dataset, config.cv.seed)
        check_data(self.folder, dataset)
        return dataset

    def predictor(
        self,
        fold: "int | str" = "best",
        *,
        device: str = "auto",
        precision: str = "auto",
        criteria_dir: str | Path | None = None,
        base: str | Path | None = None,
    ) -> "Scorer":
        """Loads a trained model of the run, which takes seconds or, for a 7B, minutes.

        Args:
            fold: A number, `best` (by validation F1), or `ensemble` (the mean of all folds).
            device: `auto` or `cpu`.
            precision: `auto`, `fp32`, `bf16` or `int8`.
            criteria_dir: The folder of the criteria; None for where training read them.
            base: Folder or hub id of the base model now; None for where training found it.

        Raises:
            UserError: The fold is not finished, or its model cannot be loaded.
        """
        from raycv.analysis.scorer import Scorer

        return Scorer(self.folder, fold, device=device, precision=precision, criteria_dir=criteria_dir, base=base)


def _metric(name: str, averages: dict[str, Any]) -> dict[str, Any]:
    pooled, folds = averages["pooled"][name], averages["fold_mean"][name]
    ends = pooled.get("reselected") or pooled["fixed"] or {"low": None, "high": None}
    return {
        "metric": name,
        "pooled": pooled["value"],
        "low": ends["low"],
        "high": ends["high"],
        "fold_mean": folds["value"],
        "sd": folds["sd"],
        "t_low": folds["corrected_t"]["low"],
        "t_high": folds["corrected_t"]["high"],
        "criterion_macro": averages["criterion_macro"][name]["value"],
    }
