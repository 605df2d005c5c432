"""Questions and answers: matches what was asked with the criteria of a run, labels a score, forms JSON or text.

The command and a resident scorer share it. Imports nothing heavy, because a client of the scorer needs only this.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from raycv.common.table_reader import is_blank
from raycv.data.types import LABELS, Criterion, criterion_code, is_same
from raycv.errors import UserError, counted

SCORE_DECIMALS = 6
"""Decimals of an answer's score. Further ones of a model in float32 mean nothing."""

CHUNK_PAIRS = 2304
"""Pairs whose prompts are held and sorted at once: 256 posts with nine criteria. A file has as many in a chunk."""

CODE = re.compile(r"[a-z]{0,4}(?:[._-]?\d{1,3}){1,4}", re.IGNORECASE)
"""The pattern of ids: A.4, z.9, PHQ-9, A.1.2, 4."""
CODES = re.compile(rf"{CODE.pattern}(?:\s*,\s*{CODE.pattern})+", re.IGNORECASE)
"""The pattern of several ids. Each must be asked for on its own, so such a text is not a description."""
NAME = re.compile(r"[a-z]+(?:_[a-z]+)+", re.IGNORECASE)
"""The pattern of symptom names: SLEEP_ISSUES."""

Answer = dict[str, Any]
"""label, score, threshold, criterion_id, model {run, fold, base, finished}, truncated: plain JSON values, no text."""


@dataclass(frozen=True)
class Question:
    """A post and a criterion: free text, or an id or symptom name of the run's. None asks for each of the run's."""

    post: str
    criterion: str | None = None


@dataclass(frozen=True)
class ModelIdentity:
    """Which model answers."""

    run: str
    fold: int | Literal["ensemble"]
    base: str


@dataclass(frozen=True)
class Prediction:
    """The output of a model for one pair."""

    score: float
    """probability of `matched`"""
    truncated: bool
    """whether part of the post was left out to fit the prompt"""


class Predicts(Protocol):
    """An object that scores pairs: `raycv.inference.predictor.Predictor`."""

    identity: ModelIdentity
    threshold: float
    device: Any
    """the torch device that it computes on"""

    @property
    def computed_in(self) -> str:
        """fp32, bf16 or int8."""

    @property
    def precision_of_auto(self) -> str:
        """The precision that `auto` would choose here."""

    def predict(self, pairs: Sequence[tuple[str, str]]) -> list[Prediction]:
        """A prediction for each (post, criterion), in their order."""


class Answerer:
    """Turns questions into answers: finds the criteria they name, scores all pairs together, and labels them."""

    def __init__(self, predictor: Predicts, criteria: Mapping[str, Criterion], finished: str | None = None) -> None:
        """`finished`: when the predictor's run was complete, if that is known."""
        self.predictor = predictor
        self.criteria = criteria
        self.finished = finished

    def answer(self, questions: Sequence[Question]) -> list[list[Answer]]:
        """The answers to each question: one, or one for each criterion of the run if the question names none.

        Raises:
            UserError: A question cannot be answered. The message names its number if there are several.
        """
        asked = [
            (index, question.post, criterion)
            for index, (question, criteria) in enumerate(
                zip(questions, asked_for(questions, self.criteria), strict=True)
            )
            for criterion in criteria
        ]
        answers: list[list[Answer]] = [[] for _ in questions]
        predictions = self.predictor.predict([(post, criterion.text) for _, post, criterion in asked])
        for (index, _, criterion), prediction in zip(asked, predictions, strict=True):
            answers[index].append(self._answer(criterion, prediction))
        return answers

    def _answer(self, criterion: Criterion, prediction: Prediction) -> Answer:
        threshold = self.predictor.threshold
        return {
            "label": label_of(prediction.score, threshold),
            "score": rounded(prediction.score, threshold),
            "threshold": threshold,
            "criterion_id": criterion.criterion_id or None,
            "model": {**asdict(self.predictor.identity), "finished": self.finished},
            "truncated": prediction.truncated,
        }


def label_of(score: float, threshold: float) -> str:
    """The label of a score, for one pair as for a file of pairs. `score` must not be rounded."""
    return LABELS[int(score >= threshold)]


def rounded(score: float, threshold: float, decimals: int = SCORE_DECIMALS) -> float:
    """`score` rounded for an answer, but kept on the side of `threshold` that its label names."""
    near = round(score, decimals)
    if label_of(near, threshold) == label_of(score, threshold):
        return near
    step = 10.0**-decimals
    return round(near + (step if score >= threshold else -step), decimals)


def asked_for(questions: Sequence[Question], criteria: Mapping[str, Criterion]) -> list[list[Criterion]]:
    """The criteria that each question asks for: those of `criteria`, or the user's own.

    Raises:
        UserError: A text is empty, or a question names a criterion that the run does not have.
    """
    asked = []
    for number, question in enumerate(questions, start=1):
        try:
            asked.append(_asked_by(question, criteria))
        except UserError as error:
            if len(questions) == 1:
                raise
            raise UserError(f"Pair {number}: {error.what}", kind=error.kinds, remedies=error.remedies) from error
    return asked


def _asked_by(question: Question, criteria: Mapping[str, Criterion]) -> list[Criterion]:
    if is_blank(question.post):
        raise UserError("The post is empty.", kind="input-empty", remedies=["give the text of a post"])
    if question.criterion is None:
        return list(criteria.values())
    return [find_criterion(question.criterion, criteria)]


def is_own_words(criterion: str) -> bool:
    """Whether `criterion` looks like a description, not like an id or a symptom name."""
    name = criterion.strip()
    return not (criterion_code(name) or CODE.fullmatch(name) or CODES.fullmatch(name) or NAME.fullmatch(name))


def needs_criteria(criterion: str | None) -> bool:
    """Whether the run's criteria are needed to answer for `criterion`; None asks for each of them."""
    return criterion is None or not is_own_words(criterion)


def find_criterion(asked: str, criteria: Mapping[str, Criterion]) -> Criterion:
    """The criterion that `asked` names by id, symptom name or wording; else `asked` itself, without an id.

    Raises:
        UserError: `asked` is empty, or looks like an id or a symptom name that the run does not have.
    """
    if is_blank(asked):
        remedies = ["give a text, or an id like A.4", "leave criterion out to ask for each of the run's"]
        raise UserError("The criterion is empty.", kind="input-empty", remedies=remedies)
    name = asked.strip()
    for criterion in criteria.values():
        names = (criterion.criterion_id, criterion.symptom or "")
        if name in (*names, criterion.text) or asked == criterion.text or any(is_same(name, each) for each in names):
            return criterion
    for criterion in criteria.values():
        if name.casefold() in (criterion.criterion_id.casefold(), (criterion.symptom or "").casefold()):
            return criterion
    near = _near_name(name, criteria)
    if near or not is_own_words(asked):
        ids = [f"{key} ({criterion.symptom})" if criterion.symptom else key for key, criterion in criteria.items()]
        raise UserError(
            f"criterion={name}: the run has no such criterion.",
            kind="criterion-unknown",
            remedies=[
                *([f"did you mean {near}?"] if near else []),
                f"choose one of its ids or names: {', '.join(ids)}",
                "or describe it in your own words; leave criterion out to ask for each of them",
            ],
        )
    return Criterion("", asked)


def _near_name(name: str, criteria: Mapping[str, Criterion]) -> str | None:
    """The symptom name that a word in capitals means, if the word is its beginning or a misspelling."""
    if not re.fullmatch("[A-Z]{4,}", name):
        return None
    # The client of a scorer would pay for this import at each start, so we import it here.
    import difflib

    names = [criterion.symptom for criterion in criteria.values() if criterion.symptom]
    begun = [each for each in names if each.startswith(name)]
    return next(iter(begun or difflib.get_close_matches(name, names, n=1, cutoff=0.75)), None)


def as_json(answers: Sequence[Answer], *, single: bool) -> str:
    """The answers as JSON: one object for a single pair, else a list."""
    return json.dumps(answers[0] if single else list(answers), ensure_ascii=False) + "\n"


def as_text(answers: Sequence[Answer], criteria: Mapping[str, Criterion], *, single: bool) -> str:
    """The answers for people: two lines for a single pair, else a table; then the model that answered."""
    first = answers[0]
    name = {key: f" {criterion.symptom}" if criterion.symptom else "" for key, criterion in criteria.items()}
    threshold = shown_threshold(first["threshold"])
    if single:
        key = first["criterion_id"]
        lines = [
            f"{first['label']}  (probability {_shown_score(first, threshold)}, threshold {threshold})",
            f"criterion: {key}{name.get(key, '')}" if key else "criterion: as given",
        ]
    else:
        width = max(len(f"{answer['criterion_id']}{name.get(answer['criterion_id'], '')}") for answer in answers)
        lines = [f"{'criterion':<{width}}  probability  label"]
        for answer in answers:
            shown = f"{answer['criterion_id']}{name.get(answer['criterion_id'], '')}"
            lines.append(f"{shown:<{width}}  {_shown_score(answer, threshold):>11}  {answer['label']}")
        lines.append(f"matched: a probability of {threshold} or more")
    lines.append(model_line(first["model"]))
    cut = sum(answer["truncated"] for answer in answers)
    if cut:
        lines.append("the post was shortened to fit the prompt" + ("" if single else f" ({counted(cut, 'pair')})"))
    return "\n".join(lines) + "\n"


def model_line(model: Mapping[str, Any]) -> str:
    """A line for the model that answered: run, fold, finish time of the run, base."""
    fold = "the mean of its folds" if model["fold"] == "ensemble" else f"fold {model['fold']}"
    return f"model: run {model['run']}, {fold}, {shown_finish(model.get('finished'))}; {model['base']}"


def shown_finish(finished: str | None) -> str:
    """The finish time of a run, for people."""
    return f"finished {finished}" if finished else "finish time not recorded"


def shown_threshold(threshold: float) -> str:
    """`threshold` for people. A tuned one has two decimals; the mean of several has more."""
    return f"{threshold:.2f}" if round(threshold, 2) == threshold else f"{threshold:.{SCORE_DECIMALS}f}".rstrip("0")


def _shown_score(answer: Answer, threshold: str) -> str:
    """The score with three decimals, or more if only they show on which side of the printed `threshold` it is."""
    texts = [f"{answer['score']:.{decimals}f}" for decimals in range(3, SCORE_DECIMALS + 1)]
    return next((text for text in texts if label_of(float(text), float(threshold)) == answer["label"]), texts[-1])
