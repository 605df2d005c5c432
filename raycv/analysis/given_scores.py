"""Reads scores that raycv did not compute: a CSV of post_id, criterion_id and score for the pairs of a run."""

import math
from pathlib import Path

import numpy as np

from raycv.common.table_reader import Row, read_table
from raycv.errors import FaultsError, UserError, shown
from raycv.evaluation.study import Study
from raycv.row_faults import Faults, Kind, NumberedIds, is_rounded, listed

COLUMNS = ("post_id", "criterion_id", "score")
REMEDY = "write a CSV with the columns post_id, criterion_id and score (0 to 1), and a row for each pair of the run"


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
    if lacking := [name for name in COLUMNS if name not in table.columns]:
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
