"""The messages between a scorer and its clients, and the setup of a scorer. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from raycv.data.types import Criterion
from raycv.inference.choose import Chosen
from raycv.inference.questions import Answer

if TYPE_CHECKING:
    from raycv.config.schema import ServeConfig


@dataclass(frozen=True)
class Setup:
    """The setup of a replica. Every path in it is absolute."""

    config: "ServeConfig"
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


@dataclass(frozen=True)
class ServedModel:
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


@dataclass(frozen=True)
class Health:
    """The part of GET /health that a client needs."""

    instance: str
    model: ServedModel
    fingerprint: str | None = None
    """SHA-256 over all that decides its answers; None from earlier versions"""


@dataclass(frozen=True)
class ServedIdentity:
    """`model` of an answer."""

    run: str
    fold: int | str
    base: str
    finished: str | None = None
    """when the run finished, in UTC; None if that is not recorded"""


@dataclass(frozen=True)
class ServedAnswer:
    """An answer. `score` is the probability of matched, which was compared with `threshold`."""

    label: Literal["matched", "unmatched"]
    score: float
    threshold: float
    criterion_id: str | None
    model: ServedIdentity
    truncated: bool


@dataclass(frozen=True)
class Served:
    """The part of POST /score that a client needs. `criteria` has the symptom name of each of the run's, by its id."""

    answers: list[list[ServedAnswer]]
    criteria: dict[str, str | None]
    warnings: list[str]


@dataclass(frozen=True)
class Announcement:
    """The facts that a scorer writes into a file so that clients find it."""

    url: str
    token: str | None
    pid: int
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
