"""A comparison of runs, or of scores in a CSV, with a baseline: the result, its table, its figure and its files."""

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raycv.analysis.run import Run, open_run
from raycv.analysis.spreadsheet import check_free, csv_text, write_output
from raycv.common.table_reader import Row, read_table
from raycv.errors import FaultsError, UserError, shown
from raycv.evaluation.bootstrap import DRAWS, SEED
from raycv.evaluation.comparison import compare
from raycv.evaluation.measures import METRICS
from raycv.evaluation.study import Study
from raycv.row_faults import Faults, Kind, NumberedIds, is_rounded, listed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = (
    "run", "baseline", "average", "criterion_id", "metric", "run_value", "baseline_value", "difference", "low", "high",
    "interval", "t_low", "t_high", "t_df", "p", "p_holm",
)  # fmt: skip
GIVEN = ("post_id", "criterion_id", "score")
REMEDY = "write a CSV with the columns post_id, criterion_id and score (0 to 1), and a row for each pair of the run"
"""The columns of scores that raycv did not compute."""
MARKS = {".json": '"operating_point"', ".csv": ",".join(COLUMNS), ".svg": "raycv comparison"}
"""The files of a comparison, and a text by which raycv knows an earlier one of them."""


def compare_all(
    runs: Sequence["Run | str | Path"],
    baseline: "Run | str | Path | None" = None,
    metric: str = "f1",
    folder: Path = Path("runs"),
    draws: int = DRAWS,
    seed: int = SEED,
) -> "Comparison":
    """Compares runs, and files of scores, with one of them.

    Args:
        runs: At least two: names or folders of runs, runs, or CSV files of post_id, criterion_id and score.
        baseline: One of them; None for the first.
        metric: The metric of the sentences, p-values and the tied set.
        folder: The folder that holds the runs.
        draws: The number of bootstrap draws.
        seed: Their seed.

    Raises:
        UserError: A run or a file cannot be read, or posts, labels or folds differ.
    """
    opened = {
        place: one if isinstance(one, Run) else open_run(one, folder)
        for place, one in enumerate(runs)
        if not _is_file(one)
    }
    files = [place for place in range(len(runs)) if place not in opened]
    if files and not opened:
        remedies = ["name a run too, from which labels and folds come: runs=[<run>,<file>]"]
        given = ", ".join(shown(one) for one in runs)
        raise UserError(f"Only files of scores are given: {given}.", kind="config-value", remedies=remedies)
    studies = {place: one.study for place, one in opened.items()}
    first = next(iter(opened.values()), None)
    if first is not None:
        studies |= {place: given_study(Path(str(runs[place])), first.study) for place in files}
    ordered = _with_own_names([studies[place] for place in range(len(runs))], runs)
    named = None
    if baseline is not None:
        place = next((place for place, one in enumerate(runs) if str(one) == str(baseline)), None)
        named = str(baseline) if place is None else ordered[place].run
    result = compare(ordered, named, draws, seed, metric)
    result["notes"] = [
        f"raycv did not make the scores in {studies[place].run}, and cannot check that they are out of fold. Labels "
        f"and folds are those of run {first.name}, and the threshold of each fold is tuned on the other folds."
        for place in files
        if first is not None
    ]
    return Comparison(result)


def _with_own_names(studies: list[Study], runs: Sequence["Run | str | Path"]) -> list[Study]:
    """Studies of equal names under the places that the user gave, since two folders of runs may share names."""
    names = [study.run for study in studies]
    places = [str(one.folder.root if isinstance(one, Run) else one) for one in runs]
    return [
        replace(study, run=place) if names.count(study.run) > 1 else study
        for study, place in zip(studies, places, strict=True)
    ]


def _is_file(run: "Run | str | Path") -> bool:
    return not isinstance(run, Run) and str(run).casefold().endswith(".csv")


class Comparison:
    """Runs compared with a baseline.

    Attributes:
        result: The content of `comparison.json`, in the shape that `raycv.evaluation.comparison` describes.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        """Takes a result of `raycv.evaluation.comparison.compare`."""
        self.result = result

    @property
    def sentences(self) -> list[str]:
        """A sentence for each run that is not the baseline."""
        return [row["sentence"] for row in self.result["comparisons"]]

    @property
    def not_better(self) -> list[str]:
        """The runs that are not shown to be better than the baseline."""
        return [row["run"] for row in self.result["comparisons"] if not row["better"]]

    def __repr__(self) -> str:
        return "\n".join([*self.sentences, *self.result["notes"]])

    def _repr_html_(self) -> str:
        """The comparison as a notebook shows it."""
        lines = "".join(f"<p>{escape(line)}</p>" for line in (*self.sentences, *self.result["notes"]))
        return lines + str(self.table().to_html(na_rep="undefined", float_format=lambda value: f"{value:.3f}"))

    def table(self) -> "pd.DataFrame":
        """Returns a row per run and pooled metric: both values, their difference, its intervals. Undefined is NaN."""
        import pandas as pd

        left_out = ("average", "criterion_id", "interval", "p", "p_holm")
        rows = [row for row in self.rows if row["average"] == "pooled"]
        frame = pd.DataFrame(rows, columns=[name for name in COLUMNS if name not in left_out])
        return frame.set_index(["run", "baseline", "metric"]).astype(float)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `comparison.csv`: pooled metrics, means over the folds and over the criteria, criteria."""
        return list(self._rows())

    def _rows(self) -> Iterator[dict[str, Any]]:
        values = {run["run"]: run["pooled"] for run in self.result["runs"]}
        metric = self.result["metric"]
        for found in self.result["comparisons"]:
            names = {"run": found["run"], "baseline": found["baseline"]}
            for name in METRICS:
                weak = found["fold_mean"][name]["corrected_t"]
                t = {"t_low": weak["low"], "t_high": weak["high"], "t_df": weak["df"]}
                yield {
                    **names, "average": "pooled", "metric": name,
                    "run_value": values[found["run"]][name]["value"],
                    "baseline_value": values[found["baseline"]][name]["value"],
                    **_difference(found["pooled"][name]), **t,
                    **({"p": found["p"], "p_holm": found["p_holm"]} if name == metric else {}),
                }  # fmt: skip
                yield {**names, "average": "fold_mean", "metric": name, **_difference(found["fold_mean"][name]), **t}
                macro = found["criterion_macro"][name]
                yield {**names, "average": "criterion_macro", "metric": name, **_difference(macro)}
            for one in found["criteria"]:
                yield {
                    **names, "average": "criterion", "criterion_id": one["criterion"], "metric": metric,
                    **_difference(one[metric]), "p": one["p"], "p_holm": one["p_holm"],
                }  # fmt: skip

    def plot(self) -> "Figure":
        """Returns the figure: values of all runs by metric, differences to the baseline, differences by criterion."""
        from raycv.analysis.figures import comparison_figure

        return comparison_figure(self.result)

    def save(self, output: str | Path) -> list[Path]:
        """Writes `<output>.json`, `<output>.csv` and `<output>.svg`, and returns their paths.

        Raises:
            UserError: A file exists that raycv did not write, or a file cannot be written.
        """
        paths = output_paths(output)
        figure = io.BytesIO()
        import matplotlib

        # With a fixed salt and without a date, equal results have equal bytes.
        with matplotlib.rc_context({"svg.hashsalt": "raycv comparison", "svg.fonttype": "none"}):
            self.plot().savefig(figure, format="svg", metadata={"Date": None, "Title": "raycv comparison"})
        text = json.dumps(self.result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        for path, content in zip(
            paths, (text.encode(), csv_text(COLUMNS, self.rows).encode(), figure.getvalue()), strict=True
        ):
            write_output(path, content)
        return paths


def output_paths(output: str | Path) -> list[Path]:
    """Returns the files of a comparison. Raises: UserError if one exists that raycv did not write."""
    paths = [Path(f"{output}{suffix}") for suffix in MARKS]
    for path in paths:
        check_free(path, MARKS[path.suffix])
    return paths


def _difference(found: dict[str, Any]) -> dict[str, Any]:
    name = "reselected" if found.get("reselected") else "fixed"
    ends = found[name]
    if ends is None:
        return {"difference": found["value"]}
    return {"difference": found["value"], "low": ends["low"], "high": ends["high"], "interval": name}


def given_study(path: Path, like: Study) -> Study:
    """Returns a study with the scores of a file, and with the labels and folds of a run.

    Args:
        path: The CSV. Other columns of it are ignored.
        like: The run. The file must hold exactly its pairs.

    Raises:
        UserError: The file cannot be read, or a row is faulty. A pair is missing, unknown, or there twice.
    """
    faults = Faults()
    table = read_table(path, faults)
    faults.raise_any(f"The scores in {path} cannot be used")
    if lacking := [name for name in GIVEN if name not in table.columns]:
        raise UserError(f"{path} has no column {', '.join(lacking)}.", kind="input-file", remedies=[REMEDY])
    wrong = [f"{row.place}: score must be a number from 0 to 1" for row in table.rows if _score(row) is None]
    scores: dict[tuple[str, str], float] = {}
    for row in table.rows:
        pair = (row.id("post_id"), row.id("criterion_id"))
        if pair in scores:
            wrong.append(f"{row.place}: a second score for post {shown(pair[0])}, criterion {shown(pair[1])}")
        scores[pair] = _score(row) or 0.0
    if wrong:
        raise FaultsError(f"The scores in {path} cannot be used", wrong, kind="input-file", remedies=[REMEDY], most=10)
    pairs = [
        (like.post_ids[post], like.criterion_ids[criterion])
        for post, criterion in zip(like.post, like.criterion, strict=True)
    ]
    for owner, ours, theirs in ((like.run, pairs, scores.keys()), (path, scores.keys(), set(pairs))):
        if only := sorted(pair for pair in ours if pair not in theirs):
            where = f"post {shown(only[0][0])}, criterion {shown(only[0][1])}"
            posts = {post for post, _ in theirs}
            # A program that took ids for numbers spells them in another way.
            spelt = [] if only[0][0] in posts else NumberedIds(posts).find(only[0][0])
            where += f", which the other has as {listed(spelt, 3)}" if spelt else ""
            what = f"{path} and run {like.run} cannot be compared: only {owner} has {where} ({len(only):,} such pairs)."
            kind = Kind.ROUNDED if any(map(is_rounded, spelt)) else Kind.SPELLING
            raise UserError(what, kind="data-id", remedies=kind.remedies if spelt else [REMEDY])
    return Study(
        str(path), like.labels, np.array([scores[pair] for pair in pairs]), like.fold, like.post, like.criterion,
        like.post_ids, like.criterion_ids,
    )  # fmt: skip


def _score(row: Row) -> float | None:
    try:
        score = float(row.values.get("score", ""))
    except ValueError:
        return None
    return score if not math.isnan(score) and 0 <= score <= 1 else None
