"""Fits training into a device's memory: the size of a micro-batch, and gradient checkpointing."""

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils.memory import release_memory

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
    """Gradient checkpointing of `model`: on, off, or chosen by the memory of a backward pass without it.

    With it, the backward pass computes activations again instead of keeping them. The gradients are the same.
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
        self.on = False
        possible = getattr(model, "supports_gradient_checkpointing", False)
        if asked == "on" and not possible:
            raise UserError(
                "train.gradient_checkpointing=on: the base model does not know gradient checkpointing.",
                kind="base-unsuitable",
                remedies=["train.gradient_checkpointing=off"],
            )
        self._switch(asked != "off" and possible)

    def choose(self, device: torch.device, backward: Callable[[], None], later_bytes: int) -> str | None:
        """For `auto`, switches gradient checkpointing off if the training's heaviest backward pass fits without it.

        Args:
            device: The device that computes.
            backward: Runs forward and backward over the heaviest micro-batch, and leaves nothing behind.
            later_bytes: The memory that the optimizer will still allocate, in bytes.

        Returns:
            The choice in words, or None if there was nothing to choose.
        """
        if self._asked != "auto" or not self.on:
            return None
        self._switch(False)
        try:
            with measured_peak(self._model, device) as measured:
                backward()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            need = None
        else:
            need = measured() + later_bytes
        release_memory()
        limit = memory_limit(device, self._share)
        fits = need is not None and need <= MARGIN * limit
        self._switch(not fits)
        said = "more than there is" if need is None else f"{need / 1e9:.1f} GB"
        return f"gradient checkpointing {'off' if fits else 'on'}: without it {said} of {limit / 1e9:.1f} GB"

    def restore(self, on: bool) -> None:
        """Keeps the earlier choice of `auto` in a resumed training, even if `auto` would choose otherwise now."""
        if self._asked == "auto":
            self._switch(on)

    def relieve(self) -> bool:
        """For `auto`, switches gradient checkpointing on after out-of-memory. Returns False if nothing changes."""
        if self._asked != "auto" or self.on or not getattr(self._model, "supports_gradient_checkpointing", False):
            return False
        self._switch(True)
        self._tell("out of memory: gradient checkpointing on")
        return True

    def _switch(self, on: bool) -> None:
        if on:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.on:
            self._model.gradient_checkpointing_disable()
        self.on = on


@contextmanager
def measured_peak(model: torch.nn.Module, device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the bytes which the block needed. Call it after the block.

    On a GPU these are the peak, on a CPU `BACKWARD_FACTOR` times the saved activations.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
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
