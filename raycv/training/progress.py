"""The epochs of a fold so far and its best one; to and from a training state."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from raycv.model.adapters import trainable_by_name
from raycv.training.metrics import F1
from raycv.training.state import TrainState

WEIGHTS, BEST, OPTIMIZER, WORKERS = "weights.", "best.", "optimizer.", "workers."
"""Prefixes of a state's tensors."""
SCORES = "best_scores"


@dataclass(frozen=True)
class EpochResult:
    """What one epoch of one fold came to. `epoch` counts from 1."""

    epoch: int
    train_loss: float
    """mean over the epoch's pairs, class weights included"""
    val_loss: float
    """mean over the validation pairs, class weights included"""
    threshold: float
    metrics: dict[str, float]
    """on the validation pairs at `threshold`"""
    learning_rate: float
    """of the epoch's last step"""
    micro_batch: int
    seconds: float


@dataclass
class Best:
    """The best epoch so far."""

    result: EpochResult
    scores: np.ndarray
    """float64 [n_val]"""
    weights: dict[str, torch.Tensor]
    """what training changes, by name, on the CPU"""


@dataclass
class Progress:
    """The epochs that are done, and how far the next one is."""

    epochs: list[EpochResult] = field(default_factory=list)
    best: Best | None = None
    step: int = 0
    """optimizer steps that are done of the epoch under way"""
    loss: float = 0.0
    """their summed loss"""
    seconds: float = 0.0
    """what they took"""
    learning_rate: float = 0.0
    """of the last step"""

    def add(self, result: EpochResult, scores: np.ndarray, model: torch.nn.Module) -> bool:
        """An epoch is over, `model` still as it left it. Returns whether it is the best so far."""
        self.epochs.append(result)
        self.step, self.loss, self.seconds = 0, 0.0, 0.0
        # Strictly better: of equal epochs the earliest stays.
        if self.best is not None and result.metrics[F1] <= self.best.result.metrics[F1]:
            return False
        self.best = Best(result, scores, weights_of(model))
        return True

    def since_best(self) -> int:
        """Epochs since the best one."""
        return len(self.epochs) - self.best.result.epoch if self.best else 0

    def to_state(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> TrainState:
        """As a state, with the `facts` and `tensors` of the loop's other parts."""
        own = {
            "epochs": [asdict(result) for result in self.epochs],
            "best_epoch": self.best.result.epoch if self.best else None,
            "loss": self.loss,
            "seconds": self.seconds,
            "learning_rate": self.learning_rate,
        }
        best = {}
        if self.best:
            best = _prefixed(BEST, self.best.weights) | {SCORES: torch.from_numpy(self.best.scores)}
        return TrainState(len(self.epochs), self.step, own | facts, best | tensors)

    @classmethod
    def from_state(cls, state: TrainState) -> "Progress":
        """What `to_state` put into `state`."""
        facts = state.facts
        epochs = [EpochResult(**values) for values in facts["epochs"]]
        best = None
        if facts["best_epoch"] is not None:
            scores = state.tensors[SCORES].numpy()
            best = Best(epochs[facts["best_epoch"] - 1], scores, _without(BEST, state.tensors))
        return cls(epochs, best, state.step, facts["loss"], facts["seconds"], facts["learning_rate"])


def spent(state: TrainState) -> float:
    """Seconds of training that `state` holds."""
    return float(sum(result["seconds"] for result in state.facts["epochs"]) + state.facts["seconds"])


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy on the CPU of what training changes in `model`."""
    return {name: value.detach().to("cpu", copy=True) for name, value in trainable_by_name(model)}


@torch.no_grad()
def set_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Puts back what `weights_of` took."""
    for name, value in trainable_by_name(model):
        # In place: the optimizer holds these tensors, and DoRA's norms are renewed by their version.
        value.copy_(weights[name])


def training_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The live weights that training changes, and what the optimizer keeps of each."""
    named = dict(trainable_by_name(model))
    tensors = {f"{WEIGHTS}{name}": value.detach() for name, value in named.items()}
    for name, value in named.items():
        tensors |= {f"{OPTIMIZER}{name}:{key}": kept for key, kept in optimizer.state.get(value, {}).items()}
    return tensors


def set_training_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Puts back what `training_tensors` gave."""
    set_weights(model, _without(WEIGHTS, tensors))
    kept = _without(OPTIMIZER, tensors)
    whole = optimizer.state_dict()
    whole["state"] = {
        # A copy of its own: those of the state lie in one block of memory.
        index: {key.rpartition(":")[2]: kept[key].clone() for key in kept if key.rpartition(":")[0] == name}
        for index, (name, _) in enumerate(trainable_by_name(model))
    }
    optimizer.load_state_dict(whole)


def workers_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors [workers, ...] of what each worker has for itself, by name."""
    return _without(WORKERS, tensors)


def _prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
