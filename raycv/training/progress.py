"""Decides which epoch of a fold is the best, which early stopping counts from; keeps the epochs in a state."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from raycv.model.adapters import trainable_by_name
from raycv.training.metrics import F1
from raycv.training.state import TrainState

WEIGHTS, BEST, OPTIMIZER, WORKERS = "weights.", "best.", "optimizer.", "workers."
"""Prefixes of the tensors in a training state."""
SCORES, EPOCH_SCORES = "best_scores", "epoch_scores"


@dataclass(frozen=True)
class EpochResult:
    """The result of one epoch of one fold. `epoch` counts from 1."""

    epoch: int
    train_loss: float
    """mean over the epoch's pairs, class weights included"""
    val_loss: float
    """mean over the validation pairs, class weights included"""
    threshold: float
    metrics: dict[str, float]
    """on the validation pairs at `threshold`"""
    learning_rate: float
    """the learning rate of the epoch's last step"""
    micro_batch: int
    seconds: float


@dataclass
class Best:
    """The best epoch so far."""

    result: EpochResult
    scores: np.ndarray
    """float64 [n_val]"""
    weights: dict[str, torch.Tensor]
    """the parameters that training changes, by name, on the CPU"""


@dataclass
class Progress:
    """The finished epochs, and the progress of the next one."""

    epochs: list[EpochResult] = field(default_factory=list)
    best: Best | None = None
    step: int = 0
    """finished optimizer steps of the current epoch"""
    loss: float = 0.0
    """the summed loss of those steps"""
    seconds: float = 0.0
    """the time of those steps"""
    learning_rate: float = 0.0
    """the learning rate of the last step"""
    scores: list[np.ndarray] | None = field(default_factory=list)
    """float64 [n_val] for each finished epoch; None if a state of an earlier version lacks them"""

    def add(self, result: EpochResult, scores: np.ndarray, model: torch.nn.Module) -> bool:
        """Adds a finished epoch, while `model` has its weights. Returns True if it is the best so far."""
        self.epochs.append(result)
        if self.scores is not None:
            self.scores.append(scores)
        self.step, self.loss, self.seconds = 0, 0.0, 0.0
        # Only a higher F1 is better, so the earliest of equal epochs stays.
        if self.best is not None and result.metrics[F1] <= self.best.result.metrics[F1]:
            return False
        self.best = Best(result, scores, weights_of(model))
        return True

    def since_best(self) -> int:
        """Returns the number of epochs since the best one."""
        return len(self.epochs) - self.best.result.epoch if self.best else 0

    def to_state(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> TrainState:
        """Returns a training state, with the `facts` and `tensors` of the loop's other parts."""
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
        if self.scores:
            best[EPOCH_SCORES] = torch.from_numpy(np.stack(self.scores))
        return TrainState(len(self.epochs), self.step, own | facts, best | tensors)

    @classmethod
    def from_state(cls, state: TrainState) -> "Progress":
        """Returns the progress that `to_state` put into `state`."""
        facts = state.facts
        epochs = [EpochResult(**values) for values in facts["epochs"]]
        best = None
        if facts["best_epoch"] is not None:
            scores = state.tensors[SCORES].numpy()
            best = Best(epochs[facts["best_epoch"] - 1], scores, _without(BEST, state.tensors))
        every: list[np.ndarray] | None = []
        if epochs:
            every = list(state.tensors[EPOCH_SCORES].numpy()) if EPOCH_SCORES in state.tensors else None
        return cls(epochs, best, state.step, facts["loss"], facts["seconds"], facts["learning_rate"], every)


def spent(state: TrainState) -> float:
    """Returns the seconds of training that `state` holds."""
    return float(sum(result["seconds"] for result in state.facts["epochs"]) + state.facts["seconds"])


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns a copy, on the CPU, of the parameters that training changes."""
    return {name: value.detach().to("cpu", copy=True) for name, value in trainable_by_name(model)}


@torch.no_grad()
def set_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Sets the parameters that `weights_of` returned."""
    for name, value in trainable_by_name(model):
        # The optimizer holds these tensors, so we copy in place.
        value.copy_(weights[name])


def training_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns the live parameters that training changes, and the optimizer's tensors of each."""
    named = dict(trainable_by_name(model))
    tensors = {f"{WEIGHTS}{name}": value.detach() for name, value in named.items()}
    for name, value in named.items():
        tensors |= {f"{OPTIMIZER}{name}:{key}": kept for key, kept in optimizer.state.get(value, {}).items()}
    return tensors


def set_training_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Sets the tensors that `training_tensors` returned."""
    set_weights(model, _without(WEIGHTS, tensors))
    kept = _without(OPTIMIZER, tensors)
    whole = optimizer.state_dict()
    whole["state"] = {
        # The tensors of a training state lie in one block of memory, so we clone them.
        index: {key.rpartition(":")[2]: kept[key].clone() for key in kept if key.rpartition(":")[0] == name}
        for index, (name, _) in enumerate(trainable_by_name(model))
    }
    optimizer.load_state_dict(whole)


def workers_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors [workers, ...] that hold a value for each worker, by name."""
    return _without(WORKERS, tensors)


def _prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
