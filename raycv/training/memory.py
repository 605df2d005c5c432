"""Fits training into a device's memory: the size of a micro-batch, and gradient checkpointing."""

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils.memory import release_memory
from transformers.modeling_layers import GradientCheckpointingLayer

from raycv.common.devices import is_out_of_memory
from raycv.errors import UserError

MARGIN = 0.85
"""The share of the memory that `auto` may fill without gradient checkpointing. A later batch may take a little more."""
REMEDIES = (
    "turn gradient checkpointing on, with resume= too: train.gradient_checkpointing=on",
    "shorten the prompts, in a new run: run.name=<new> prompt.max_length=256",
    "use a device with more memory, or, in a new run, a smaller model: run.name=<new> model.name=<smaller>",
)
BACKWARD_FACTOR = 1.5
"""The memory of a backward pass on a CPU, as a multiple of the saved activations, which it includes."""


class MicroBatch:
    """The working size of a micro-batch. It halves on out-of-memory, and never grows again (FR-007)."""

    def __init__(
        self,
        size: int,
        tell: Callable[[str], None],
        relieve: Callable[[], bool] = lambda: False,
        remedies: Sequence[str] = REMEDIES,
    ) -> None:
        """Starts at `size`.

        Args:
            size: The largest size, in rows.
            tell: Receives each event.
            relieve: Called before the size is halved. It may free memory in another way, and returns True if it did.
            remedies: The remedies if one row does not fit.
        """
        self.size = size
        self._tell = tell
        self._relieve = relieve
        self._remedies = remedies

    def run(self, work: Callable[[int], torch.Tensor], reset: Callable[[], None]) -> torch.Tensor:
        """Returns `work(size)`, and halves the size as often as memory demands.

        Args:
            work: Computes with a size.
            reset: Undoes the effects of a failed attempt.

        Raises:
            UserError: One row at a time does not fit.
        """
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                cause = str(error).splitlines()[0]
            # Within the except block, the traceback would keep the failed attempt's tensors alive, so we free memory
            # here.
            reset()
            release_memory()
            if self._relieve():
                continue
            if self.size == 1:
                raise UserError(
                    f"Out of memory with a micro-batch of 1: {cause}", kind="memory-full", remedies=self._remedies
                )
            self._tell(f"out of memory: micro-batch {self.size} -> {self.size // 2}")
            self.size //= 2


class Checkpointing:
    """Gradient checkpointing in the first layers of `model`: in all, in none, or in as few as the memory allows.

    With it, the backward pass computes activations again instead of keeping them. The gradients are the same.

    The memory is fullest where the backward pass begins. It frees the layers from the last to the first, so `auto`
    takes the first ones. In the last layer checkpointing frees nothing: it is computed again before another is freed.
    """

    def __init__(
        self, model: Any, asked: Literal["auto", "on", "off"], share: float, tell: Callable[[str], None]
    ) -> None:
        """Switches gradient checkpointing on, unless `off` is asked for or the model lacks it.

        Args:
            model: The classifier.
            asked: The setting.
            share: The part of the device's memory that belongs to this fold.
            tell: Receives each event.

        Raises:
            UserError: `on` is asked for, and the model lacks gradient checkpointing.
        """
        self._model = model
        self._asked = asked
        self._share = share
        self._tell = tell
        # A family without such layers has one switch for all. Layers without adapters, for images, see no text.
        self._layers = [
            layer
            for layer in model.modules()
            if isinstance(layer, GradientCheckpointingLayer)
            and any(value.requires_grad for value in layer.parameters())
        ]
        possible = getattr(model, "supports_gradient_checkpointing", False)
        if asked == "on" and not possible:
            raise UserError(
                "train.gradient_checkpointing=on: the base model does not know gradient checkpointing.",
                kind="base-unsuitable",
                remedies=["train.gradient_checkpointing=off"],
            )
        self.auto = asked == "auto" and possible
        """whether the memory decides"""
        self._most = max(1, len(self._layers) - self.auto)
        self.room = Room(0, 0)
        self.on = self.auto or asked == "on"
        """whether a pass of training may need it"""
        self._switched = 0
        self._switch(self._most if self.on else 0)

    def choose(
        self, device: torch.device, backward: Callable[[int], int], rows: int, heaviest: int, later_bytes: int
    ) -> str:
        """Measures the bytes of a position, and thereby the room for a pass.

        Args:
            device: The device that computes.
            backward: Runs forward and backward over that many of the longest rows, and leaves nothing behind. It
                returns their positions.
            rows: The rows to measure with. Fewer are taken if they do not fit.
            heaviest: The positions of the heaviest pass of training.
            later_bytes: The memory that the optimizer will still allocate, in bytes.

        Returns:
            The choice in words.
        """
        used = later_bytes + (torch.cuda.memory_allocated(device) if device.type == "cuda" else 0)
        first = self._most if self.on and not self.auto else 0
        bytes_of_a_position = self._bytes_of_a_position(first, device, backward, rows)
        limit = memory_limit(device, self._share)

        def room(bytes_of_a_position: float | None) -> int:
            return 0 if bytes_of_a_position is None else max(0, int((MARGIN * limit - used) / bytes_of_a_position))

        without = most = room(bytes_of_a_position)
        if self.auto and heaviest > without:
            most = max(without + 1, room(self._bytes_of_a_position(self._most, device, backward, rows)))
        self.room = Room(without, most)
        if self.auto:
            self.on = heaviest > without
        layers = self._needed(heaviest)
        self._switch(layers)
        need = (
            "more than there is"
            if bytes_of_a_position is None
            else f"{(bytes_of_a_position * heaviest + used) / 1e9:.1f} GB"
        )
        state = f"on in {layers} of {max(1, len(self._layers))} layers at most" if self.on else "off"
        return f"gradient checkpointing {state}: {'with' if first else 'without'} it {need} of {limit / 1e9:.1f} GB"

    def prepare(self, positions: int) -> None:
        """Switches it on in as many layers as a pass of `positions` needs."""
        self._switch(self._needed(positions))

    def fits(self, positions: int, *, recomputing: bool) -> bool:
        """Returns whether a pass fits. If it may not be `recomputing`, `auto` leaves gradient checkpointing off."""
        return positions <= (self.room.most if recomputing else self.room.without)

    def restore(self, on: bool, room: "Room | None") -> None:
        """Keeps the earlier choice in a resumed training, even if it would be another now.

        Args:
            on: Whether a pass may need it.
            room: The room of the earlier training; None from a version that switched it on in all layers or in none.
        """
        self.room = room or Room(0, 0)
        self.on = on if self.auto else self.on
        self._switch(self._most if self.on else 0)

    def relieve(self) -> bool:
        """For `auto`, switches it on in all layers after out-of-memory. Returns False if nothing changes."""
        if not self.auto or (self.on and not self.room.without):
            return False
        self.on, self.room = True, Room(0, self.room.most)
        self._tell("out of memory: gradient checkpointing on")
        return True

    def _needed(self, positions: int) -> int:
        """Returns in how many layers a pass needs it. The bytes of a position fall evenly with the layers.

        A room that is the same with it and without is that of a training which had it in all layers.
        """
        without, most = self.room
        if not self.on or (self.auto and positions <= without < most):
            return 0
        if not self.auto or positions >= most or without == most:
            return self._most
        return -(-self._most * most * (positions - without) // (positions * (most - without)))

    def _bytes_of_a_position(
        self, layers: int, device: torch.device, backward: Callable[[int], int], rows: int
    ) -> float | None:
        """Measures with checkpointing in `layers` layers. Returns None if one row does not fit."""
        self._switch(layers)
        while rows:
            try:
                with measured_peak(self._model, device) as measured:
                    positions = backward(rows)
                return measured() / positions
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            release_memory()
            rows //= 2
        return None

    def _switch(self, layers: int) -> None:
        """Switches it on in the first `layers` layers, and off in all others."""
        if layers == self._switched:
            return
        if layers:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in self._layers[layers:]:
                layer.gradient_checkpointing = False
        else:
            self._model.gradient_checkpointing_disable()
        self._switched = layers


class Room(NamedTuple):
    """The positions that fit into a pass."""

    without: int
    """without gradient checkpointing"""
    most: int
    """with it in all layers where it frees memory"""


@contextmanager
def measured_peak(model: torch.nn.Module, device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the bytes which the block needed. Call it after the block.

    On a GPU these are the peak above what was there before, on a CPU `BACKWARD_FACTOR` times the saved activations.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: int(BACKWARD_FACTOR * sum(kept.values()))


def memory_taken(device: torch.device) -> int:
    """Returns the most bytes that this process has taken: of the GPU as PyTorch reserves it, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_limit(device: torch.device, share: float) -> int:
    """Returns the bytes that this process may take.

    On a CPU this is its share of the least that the machine and its control groups have left.
    On a GPU this is its share of all memory, but at most what is free or reserved by the process.
    The process's own memory counts there, since the peak includes it. On a CPU only activations are measured.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(int(total * share), free + torch.cuda.memory_reserved(device))
    import psutil

    return int(min([psutil.virtual_memory().available, *left_to_containers(Path("/proc/self/cgroup"))]) * share)


CONTROL_GROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""The files of a control group, by the controllers in `/proc/self/cgroup` (version 2 names none).

The values are the folder, the file of the limit, the file of the use, and a key of `memory.stat`.
The key counts the part of the use (cached files) that the kernel takes back before it kills.
"""


def left_to_containers(own: Path, mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yields the bytes left to each control group of a process that has a limit (Docker, Slurm, systemd).

    `/proc/meminfo` shows the machine's memory, also within a container.

    Args:
        own: The process's `/proc/<pid>/cgroup`.
        mounted: The folder where control groups are mounted.
    """
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers not in CONTROL_GROUPS:
            continue
        folder, limit, used, cached = CONTROL_GROUPS[controllers]
        root = mounted / folder
        # The limits of the groups above count too, so we go up to the root. In a container the path may be one of the
        # host's.
        group = root / path.lstrip("/")
        for place in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            try:
                most, taken = int((place / limit).read_text()), int((place / used).read_text())
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                yield max(0, most - taken + int(stat[cached]))
            except (OSError, ValueError, KeyError):
                continue  # The group has no limit, does not exist, or cannot be read.
