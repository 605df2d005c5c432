"""The arrays that each statistic of this room is computed from. It reads no file: `results/study.py` does."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from raycv.errors import UserError


@dataclass(frozen=True)
class Study:
    """The out-of-fold predictions of one run, a row per (post, criterion) pair. None stands for "not recorded"."""

    run: str
    labels: np.ndarray
    """0 or 1, int8 [n]"""
    scores: np.ndarray
    """the probability of the label 1 by the model that did not train on the pair's post, float64 [n]"""
    fold: np.ndarray
    """the fold whose validation pairs the pair belongs to, from 0, int [n]"""
    post: np.ndarray
    """positions in `post_ids`, int [n]"""
    criterion: np.ndarray
    """positions in `criterion_ids`, int [n]"""
    post_ids: Sequence[str]
    criterion_ids: Sequence[str]
    history: Sequence[Sequence[Mapping[str, float]]] | None = None
    """for each fold a dict per epoch, as `FoldResult.history` has them; `f1` and `roc_auc` are read"""
    epoch_scores: Sequence[np.ndarray] | None = None
    """for each fold the scores after each epoch, float64 [epochs, n_fold], in the order of the fold's rows"""
    floor_scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    """out-of-fold scores of simple models by their name, float64 [n], such as `tfidf_logistic_regression`"""
    shortened: np.ndarray | None = None
    """whether the pair's post was shortened to fit the budget of tokens, bool [n]"""
    hard_negative: np.ndarray | None = None
    """whether an annotator looked at the pair and found no match, bool [n]"""
    near_duplicates: Sequence[tuple[str, str]] | None = None
    """ids of posts whose texts are nearly equal, two each"""
    events: Sequence[Sequence[str]] | None = None
    """for each fold its events, as `FoldResult.events` has them"""
    retries: Sequence[int] | None = None
    """for each fold how often it was restarted"""

    def __post_init__(self) -> None:
        """Checks that the arrays belong together.

        Raises:
            UserError: They do not, or a value is impossible. The message names every fault.
        """
        if faults := list(self._faults()):
            raise UserError(
                f"Run {self.run}: the predictions cannot be evaluated: {'; '.join(faults)}.",
                kind="run-damaged",
                remedies=["write the predictions again from the run folder or from the model that made them"],
            )

    def _faults(self) -> Iterator[str]:
        rows = len(self.labels)
        names = ("scores", "fold", "post", "criterion", "shortened", "hard_negative")
        columns = {name: getattr(self, name) for name in names} | dict(self.floor_scores)
        wrong = {name: len(one) for name, one in columns.items() if one is not None and len(one) != rows}
        if wrong or not rows:
            yield f"{rows} labels, but " + (", ".join(f"{n} {name}" for name, n in wrong.items()) or "pairs are needed")
            return
        if not np.isin(self.labels, (0, 1)).all():
            yield "a label is neither 0 nor 1"
        for name, scores in {"scores": self.scores, **self.floor_scores}.items():
            # A NaN fails both comparisons.
            if not ((scores >= 0) & (scores <= 1)).all():
                yield f"a value of {name} is not in 0..1"
        for name, index, ids in (
            ("post", self.post, self.post_ids), ("criterion", self.criterion, self.criterion_ids),
        ):  # fmt: skip
            if index.min() < 0 or index.max() >= len(ids):
                yield f"a {name} has no id: {len(ids)} ids for positions up to {index.max()}"
                return
            if len(set(ids)) != len(ids):
                yield f"a {name} id occurs twice"
        present = np.unique(self.fold)
        if len(present) < 2 or not np.array_equal(present, np.arange(len(present))):
            yield f"folds must be 0, 1, ... without a gap and at least two, not {present.tolist()}"
            return
        fold_of = np.full(len(self.post_ids), -1)
        fold_of[self.post] = self.fold
        if len(split := np.unique(self.post[fold_of[self.post] != self.fold])):
            yield f"post {self.post_ids[split[0]]} is in more than one fold"
        pair = self.post * len(self.criterion_ids) + self.criterion
        if len(np.unique(pair)) != rows:
            values, counts = np.unique(pair, return_counts=True)
            post, criterion = divmod(int(values[counts > 1][0]), len(self.criterion_ids))
            yield f"post {self.post_ids[post]} has two scores for criterion {self.criterion_ids[criterion]}"
        yield from self._faults_of_folds(len(present))

    def _faults_of_folds(self, folds: int) -> Iterator[str]:
        for name in ("history", "epoch_scores", "events", "retries"):
            value = getattr(self, name)
            if value is not None and len(value) != folds:
                yield f"{name} has {len(value)} folds, and the predictions have {folds}"
                return
        for fold, scores in enumerate(self.epoch_scores or ()):
            rows = int((self.fold == fold).sum())
            if scores.ndim != 2 or not len(scores) or scores.shape[1] != rows:
                yield f"epoch_scores of fold {fold} have the shape {scores.shape}, and the fold has {rows} pairs"
            elif not ((scores >= 0) & (scores <= 1)).all():
                yield f"epoch_scores of fold {fold} are not in 0..1"

    @property
    def folds(self) -> int:
        """The number of folds."""
        return int(self.fold.max()) + 1

    def in_order(self) -> "Study":
        """Returns the same study with rows by post id and criterion id, so that no number depends on their order."""
        posts = sorted({self.post_ids[index] for index in np.unique(self.post)})
        criteria = sorted({self.criterion_ids[index] for index in np.unique(self.criterion)}, key=natural)
        post = _positions(self.post_ids, posts)[self.post]
        criterion = _positions(self.criterion_ids, criteria)[self.criterion]
        order = np.lexsort((criterion, post))
        rows = {
            name: getattr(self, name)[order]
            for name in ("labels", "scores", "fold", "shortened", "hard_negative")
            if getattr(self, name) is not None
        }
        epochs = self.epoch_scores
        if epochs is not None:
            row_in_fold = np.empty(len(order), dtype=int)
            for fold in range(self.folds):
                row_in_fold[self.fold == fold] = np.arange(int((self.fold == fold).sum()))
            epochs = [scores[:, row_in_fold[order[self.fold[order] == fold]]] for fold, scores in enumerate(epochs)]
        floors = {name: self.floor_scores[name][order] for name in sorted(self.floor_scores)}
        return replace(
            self, **rows, post=post[order], criterion=criterion[order], post_ids=posts, criterion_ids=criteria,
            epoch_scores=epochs, floor_scores=floors,
        )  # fmt: skip

    def recorded(self) -> dict[str, bool]:
        """Returns which of the optional fields the run recorded."""
        optional = [one.name for one in fields(self) if one.default is None]
        return {name: getattr(self, name) is not None for name in optional} | {"floor_scores": bool(self.floor_scores)}


def natural(text: str) -> tuple[Any, ...]:
    """Returns a key that sorts A.2 before A.10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", text))


def _positions(before: Sequence[str], after: Sequence[str]) -> np.ndarray:
    position = {name: index for index, name in enumerate(after)}
    return np.array([position.get(name, -1) for name in before])
