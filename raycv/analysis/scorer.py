"""Scores new pairs with a trained model of a run, from and into data frames."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raycv.batch_inference.columns import CRITERION_COLUMNS, POST_COLUMNS
from raycv.common.locations import bundled
from raycv.common.table_reader import is_blank
from raycv.config.schema import InferenceConfig
from raycv.config.validation import validate
from raycv.errors import UserError
from raycv.inference.answerer import load_answerer
from raycv.inference.choose import Fold, choose
from raycv.inference.questions import Question
from raycv.results.run_folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)
COLUMNS = ("criterion_id", "label", "score", "truncated")
PAIRS = "give a data frame with the columns post and criterion, or a list of (post, criterion)"


class Scorer:
    """A trained fold, or the mean of all folds, that scores pairs of a post and a criterion."""

    def __init__(
        self,
        folder: RunFolder,
        fold: int | str,
        *,
        device: str,
        precision: str,
        criteria_dir: str | Path | None,
        base: str | Path | None,
    ) -> None:
        """Loads the model; the arguments are those of `Run.predictor`."""
        given: Any = fold
        if isinstance(fold, bool) or (not isinstance(fold, int) and fold not in ("best", "ensemble")):
            remedies = ["give a number, 'best' or 'ensemble'"]
            raise UserError(f"fold={fold} is not known.", kind="config-value", remedies=remedies)
        wanted: Fold = given
        values = yaml.safe_load(bundled("configs/infer/default.yaml").read_text(encoding="utf-8"))
        config = validate(InferenceConfig, values | {"device": device, "precision": precision})
        chosen = choose(str(folder.root), wanted, folder.root.parent, None)
        criteria = None if criteria_dir is None else str(criteria_dir)
        self._answerer = load_answerer(
            chosen, config, criteria, logger.warning, base=None if base is None else str(base)
        )
        self.run, self.fold = chosen.run, chosen.fold
        self.threshold = self._answerer.predictor.threshold

    def __repr__(self) -> str:
        return f"<raycv predictor: run {self.run}, fold {self.fold}, threshold {self.threshold}>"

    def predict(self, pairs: "pd.DataFrame | Iterable[tuple[str, str]]") -> "pd.DataFrame":
        """Returns label and score of each pair: criterion_id, label, score, truncated. It holds no text.

        Args:
            pairs: A data frame with a column `post` or `text` and a column `criterion` or `criterion_id`. Without
                such a column, each post is scored for each criterion of the run. Or pairs of a post and a criterion. A
                criterion is an id, a symptom name, or a description in your own words.

        Returns:
            The rows have the index of the data frame, else 0, 1, 2 and so on. For own words, `criterion_id` stays None.
            `truncated` marks a post that was shortened to fit the prompt.

        Raises:
            UserError: A column is missing, a text is empty, or the run does not have a criterion.
        """
        import pandas as pd

        if isinstance(pairs, pd.DataFrame):
            questions, index = _of_frame(pairs), list(pairs.index)
        else:
            questions = _of_pairs(list(pairs))
            index = list(range(len(questions)))
        answers = self._answerer.answer(questions) if questions else []
        rows = [{name: answer[name] for name in COLUMNS} for each in answers for answer in each]
        positions = [place for place, each in zip(index, answers, strict=True) for _ in each]
        return pd.DataFrame(rows, columns=list(COLUMNS), index=positions)


def _of_frame(frame: "pd.DataFrame") -> list[Question]:
    posts = [name for name in POST_COLUMNS if name in frame.columns]
    criteria = [name for name in CRITERION_COLUMNS if name in frame.columns]
    if len(posts) != 1 or len(criteria) > 1:
        what = f"The data frame has {', '.join([*posts, *criteria]) or 'neither post nor text'} as columns."
        remedies = ["keep one of post and text, and one of criterion and criterion_id or neither"]
        raise UserError(what, kind="input-file", remedies=remedies)
    asked = frame[criteria[0]] if criteria else [None] * len(frame)
    return [_question(number, *pair) for number, pair in enumerate(zip(frame[posts[0]], asked, strict=True), 1)]


def _of_pairs(pairs: Sequence[Any]) -> list[Question]:
    wrong = next((n for n, pair in enumerate(pairs, 1) if isinstance(pair, str) or len(pair) != 2), None)
    if wrong is not None:
        raise UserError(f"Pair {wrong} is not a post and a criterion.", kind="input-file", remedies=[PAIRS])
    return [_question(number, *pair) for number, pair in enumerate(pairs, 1)]


def _question(number: int, post: Any, criterion: Any) -> Question:
    # A missing cell of a data frame is NaN, which is not a text. We do not repeat a value: it may be a post.
    if not isinstance(post, str) or is_blank(post):
        what = f"Pair {number}: the post is not a text, or it is empty."
        raise UserError(what, kind="input-empty", remedies=[PAIRS])
    if criterion is not None and not isinstance(criterion, str):
        raise UserError(f"Pair {number}: the criterion is not a text.", kind="input-file", remedies=[PAIRS])
    return Question(post, criterion)
