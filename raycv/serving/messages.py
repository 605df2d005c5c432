"""Schemas of the messages between a scorer and its clients, and the setup of a scorer."""

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
    """The setup of a replica. Every path in it is absolute."""

    config: ServeConfig
    chosen: Chosen
    criteria_dir: str | None
    store: str | None
    """address of the MLflow store; None: nothing is logged"""
    instance: str
    """id of this start of the scorer; it shows a client that no other program answers on the port"""
    host: str = ""
    """the machine of the process that was started"""
    stamps: dict[str, list[int]] = field(default_factory=dict)
    """stamps of the files on that machine that answers depend on, taken before they were loaded"""
    own_threads: bool = False
    """whether it computes in as many threads as a process of raycv.infer, not in as many as Ray counts cores"""


class ServedModel(BaseModel):
    """A scorer's description of its model."""

    named: str
    """name of the run's folder"""
    run: str
    fold: int | str
    fold_asked: int | str
    base: str
    checkpoints: list[str]
    precision: str
    precision_of_auto: str
    """the precision that `infer.precision=auto` would choose in a process on the scorer's machine"""
    criteria_dir: str | None
    device: str | None = None
    """cpu or cuda; None from earlier versions"""
    parent_id: str | None = None
    """MLflow's id of the run"""
    fold_id: str | None = None
    """MLflow's id of the fold"""
    base_given: str | None = None
    """folder or hub id of the base model; None: where training found it"""
    finished: str | None = None
    """when the run was complete, if that is known"""


class Health(BaseModel):
    """The part of GET /health that a client needs."""

    instance: str
    model: ServedModel
    fingerprint: str | None = None
    """SHA-256 over all that decides its answers; None from earlier versions"""


class ServedIdentity(BaseModel):
    """`model` of an answer."""

    run: str
    fold: int | str
    base: str
    finished: Annotated[str | None, Field(description="when the run finished (UTC; null: not recorded)")] = None


class ServedAnswer(BaseModel):
    """An answer. `score` is the probability of matched, which was compared with `threshold`."""

    # The strict schema tells a scorer's answer from another program's.
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
    criteria: Annotated[dict[str, str | None], Field(description="the run's criteria: id -> symptom name")]
    warnings: list[str]


class Announcement(BaseModel):
    """The facts that a scorer writes into a file so that clients find it."""

    url: str
    token: str | None
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    host: str
    instance: str
    tracking_uri: str | None
    """address of its MLflow store, without a password; None: nothing is logged"""
    experiment: str


@dataclass(frozen=True)
class Reply:
    """The reply of a scorer."""

    answers: list[list[Answer]]
    """for each question its answers"""
    criteria: dict[str, Criterion]
    """the run's criteria, without their wording"""
