"""The most confident mistakes of a run, by criterion: which pairs to read first."""

from typing import Any

import numpy as np

from raycv.data.types import LABELS, Dataset
from raycv.evaluation.measures import THRESHOLDS, ThresholdCounts
from raycv.evaluation.operating_points import CROSS_FOLD, RULES, steps_by
from raycv.evaluation.study import Study, natural

COLUMNS = (
    "criterion_id", "rank", "post_id", "fold", "label", "predicted", "score", "threshold", "confidence", "shortened",
    "hard_negative",
)  # fmt: skip
TEXTS = ("post", "criterion")


def thresholds_of(study: Study, rule: str = CROSS_FOLD) -> np.ndarray:
    """Returns the threshold of each fold under a rule of `RULES`, float64 [folds]."""
    assert rule in RULES
    counts = ThresholdCounts(study.labels, study.scores, study.fold, study.folds, study.fold * 0, 1)
    return THRESHOLDS[steps_by(rule, counts(np.ones((1, 1))))[:, 0]]


def mistakes_of(study: Study, most: int, dataset: Dataset | None = None) -> list[dict[str, Any]]:
    """Returns the most confident mistakes of each criterion, a row each, in the columns of `COLUMNS`.

    A mistake is a pair that gets the wrong label at the threshold tuned on the other folds. `confidence` is the
    probability that the model gave to the wrong label.

    Args:
        study: The run.
        most: Rows of each criterion, at most.
        dataset: The data set of the run. If given, each row has the columns of `TEXTS` too.
    """
    thresholds = thresholds_of(study)[study.fold]
    called = study.scores >= thresholds
    confidence = np.abs(study.scores - study.labels)
    rows: list[dict[str, Any]] = []
    wrong = np.flatnonzero(called != (study.labels == 1))
    for criterion in _in_order(study):
        own = [int(row) for row in wrong if study.criterion[row] == criterion]
        own.sort(key=lambda row: (-float(confidence[row]), study.post_ids[int(study.post[row])]))
        for rank, row in enumerate(own[:most], start=1):
            post_id, criterion_id = study.post_ids[study.post[row]], study.criterion_ids[criterion]
            found = {
                "criterion_id": criterion_id,
                "rank": rank,
                "post_id": post_id,
                "fold": int(study.fold[row]),
                "label": LABELS[int(study.labels[row])],
                "predicted": LABELS[int(called[row])],
                "score": float(study.scores[row]),
                "threshold": float(thresholds[row]),
                "confidence": float(confidence[row]),
                "shortened": None if study.shortened is None else int(study.shortened[row]),
                "hard_negative": None if study.hard_negative is None else int(study.hard_negative[row]),
            }
            texts = dataset and {
                "post": dataset.posts[post_id],
                "criterion": dataset.criteria[criterion_id].text,
            }
            rows.append(found | (texts or {}))
    return rows


def counts_of(study: Study) -> list[dict[str, Any]]:
    """Returns for each criterion its pairs, its mistakes, and which of them are false positives and negatives."""
    called = study.scores >= thresholds_of(study)[study.fold]
    rows = []
    for criterion in _in_order(study):
        own = study.criterion == criterion
        false = own & called & (study.labels == 0), own & ~called & (study.labels == 1)
        rows.append(
            {
                "criterion_id": study.criterion_ids[criterion],
                "pairs": int(own.sum()),
                "mistakes": int(false[0].sum() + false[1].sum()),
                "false_positives": int(false[0].sum()),
                "false_negatives": int(false[1].sum()),
            }
        )
    return rows


def _in_order(study: Study) -> list[int]:
    """The positions of the criteria, with A.2 before A.10."""
    return sorted(range(len(study.criterion_ids)), key=lambda one: natural(study.criterion_ids[one]))
