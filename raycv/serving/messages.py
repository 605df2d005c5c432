"""What a scorer and its clients exchange, as schemas, and what a scorer is made of."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from raycv.config.schema import ServeConfig
from raycv.config.values import Fraction
from raycv.data.types import Criterion
from raycv.inference.choose import Chosen
from raycv.inference.questions import Answer


@dataclass(frozen=True)
class Setup:
    """What a replica is made of. Every path in it is absolute."""

    config: ServeConfig
    chosen: Chosen
    criteria_dir: str | None
    store: str | None
    """MLflow address; None: nothing is logged"""
    instance: str
    """names this start of the scorer: who finds its file knows by it that nobody else answers on its port"""
    host: str = ""
    """the machine of the process that was started"""
    stamps: dict[str, list[int]] = field(default_factory=dict)
    """of the files on it that answers come from, before they were loaded"""
    own_threads: bool = False
    """it computes in as many threads as a process of raycv.infer would, not in as many as Ray counts cores"""


class ServedModel(BaseModel):
    """What a scorer says of its model."""

    named: str
    """the run, as its folder is named"""
    run: str
    fold: int | str
    fold_asked: int | str
    base: str
    checkpoints: list[str]
    precision: str
    precision_of_auto: str
    """what `infer.precision=auto` would be in a process on the scorer's machine"""
    criteria_dir: str | None
    device: str | None = None
    """cpu or cuda; earlier versions did not say"""
    parent_id: str | None = None
    """of the run in MLflow"""
    fold_id: str | None = None
    """and of the fold"""
    base_given: str | None = None
    """where the base model lies, if not where training found it"""
    finished: str | None = None
    """when the run was complete, if that is known"""


class Health(BaseModel):
    """The part of GET /health that a client needs."""

    instance: str
    model: ServedModel


class ServedIdentity(BaseModel):
    """`model` of an answer."""

    run: str
    fold: int | str
    base: str
    finished: str | None = None


class ServedAnswer(BaseModel):
    """An answer, to tell a scorer's from another program's."""

    model_config = ConfigDict(extra="forbid", strict=True)
    label: Literal["matched", "unmatched"]
    score: Fraction
    threshold: Fraction
    criterion_id: str | None
    model: ServedIdentity
    truncated: bool


class Served(BaseModel):
    """The part of POST /score that a client needs."""

    model_config = ConfigDict(strict=True)
    answers: list[Annotated[list[ServedAnswer], Field(min_length=1)]]
    criteria: dict[str, str | None]
    warnings: list[str]


class Announcement(BaseModel):
    """What a scorer writes down for clients to find it by."""

    url: str
    token: str | None
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    host: str
    instance: str
    stamps: dict[str, list[int]]
    """of the files that it answers from, before they were loaded"""
    tracking_uri: str | None
    """where it logs, without a password; None: nowhere"""
    experiment: str
    model: ServedModel


@dataclass(frozen=True)
class Reply:
    """What a scorer answered."""

    answers: list[list[Answer]]
    """of each question"""
    criteria: dict[str, Criterion]
    """the run's, without their wording"""
