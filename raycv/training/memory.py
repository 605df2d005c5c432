"""What fits into a device's memory: the size of a micro-batch, and whether activations need be computed twice."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils.memory import release_memory

from raycv.common.devices import is_out_of_memory
from raycv.errors import UserError

MARGIN = 0.85
"""Share of the memory that `auto` would fill without checkpointing: a later batch may take a little more."""
REMEDIES = (
    "turn gradient checkpointing on, with resume= too: train.gradient_checkpointing=on",
    "shorten the prompts, in a new run: run.name=<new> prompt.max_length=256",
    "use a device with more memory, or, in a new run, a smaller model: run.name=<new> model.name=<smaller>",
)
BACKWARD_FACTOR = 1.5
"""On a CPU: what a backward pass needs beside the saved activations, as a factor of them."""


class MicroBatch:
    """The working size of a micro-batch. Halves on out-of-memory, and never grows again (FR-007)."""

    def __init__(
        self,
        size: int,
        tell: Callable[[str], None],
        relieve: Callable[[], bool] = lambda: False,
        remedies: Sequence[str] = REMEDIES,
    ) -> None:
        """`relieve` may free memory in another way, and says whether it did: it is asked before the size is halved.

        `remedies`: what a user can do where one row does not fit.
        """
        self.size = size
        self._tell = tell
        self._relieve = relieve
        self._remedies = remedies

    def run(self, work: Callable[[int], torch.Tensor], reset: Callable[[], None]) -> torch.Tensor:
        """`work(size)`, with half the size as often as memory demands; `reset` undoes what a broken attempt left.

        Raises: UserError if one row at a time does not fit.
        """
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                cause = str(error).splitlines()[0]
            # Outside the except block, where the traceback no longer keeps the broken attempt's tensors alive.
            reset()
            release_memory()
            if self._relieve():
                continue
            if self.size == 1:
                raise UserError(f"Out of memory with a micro-batch of 1: {cause}", remedies=self._remedies)
            self._tell(f"out of memory: micro-batch {self.size} -> {self.size // 2}")
            self.size //= 2


class Checkpointing:
    """Gradient checkpointing of `model`: on, off, or chosen by what a backward pass without it takes.

    Activations are computed again in the backward pass instead of being kept. The gradients are the same.
    """

    def __init__(
        self, model: Any, asked: Literal["auto", "on", "off"], share: float, tell: Callable[[str], None]
    ) -> None:
        """`share`: the part of the device's memory that is this fold's."""
        self._model = model
        self._asked = asked
        self._share = share
        self._tell = tell
        self.on = False
        possible = getattr(model, "supports_gradient_checkpointing", False)
        if asked == "on" and not possible:
            raise UserError(
                "train.gradient_checkpointing=on: the base model does not know gradient checkpointing.",
                remedies=["train.gradient_checkpointing=off"],
            )
        self._switch(asked != "off" and possible)

    def choose(self, device: torch.device, backward: Callable[[], None], later_bytes: int) -> str | None:
        """For `auto`: off if `backward`, the heaviest of the training, fits without. Returns what was found, in words.

        `backward` runs forward and backward over one micro-batch and leaves nothing behind; `later_bytes` is what the
        optimizer will still allocate.
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
        limit = _memory(device, self._share)
        fits = need is not None and need <= MARGIN * limit
        self._switch(not fits)
        said = "more than there is" if need is None else f"{need / 1e9:.1f} GB"
        return f"gradient checkpointing {'off' if fits else 'on'}: without it {said} of {limit / 1e9:.1f} GB"

    def restore(self, on: bool) -> None:
        """For training that goes on: what `auto` chose stays, whatever it would choose now."""
        if self._asked == "auto":
            self._switch(on)

    def relieve(self) -> bool:
        """For `auto`, when memory ran out all the same: turns it on; False if it is on already."""
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
    """Yields what tells, after the block, the bytes that it needed: a GPU's peak, or the activations kept on a CPU."""
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


def _memory(device: torch.device, share: float) -> int:
    """Bytes that this process may take: its share of what is free of the machine, or of a GPU as far as that is free.

    On a GPU what the process has already counts in, since it is measured too; on a CPU only activations are.
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
"""By the controllers named in /proc/self/cgroup, which version 2 leaves out: the folder, the files of a group's limit
and use, and what of that use (files in the cache) the kernel takes back before it kills."""


def left_to_containers(own: Path, mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes left to each control group with a limit that a process is in: of Docker, Slurm, systemd.

    `own`: its /proc/<pid>/cgroup. What /proc/meminfo says is the machine's, in a container too.
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
        # Up to the root: the limits above count too, and in a container the path may be one of the host's.
        group = root / path.lstrip("/")
        for place in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            try:
                most, taken = int((place / limit).read_text()), int((place / used).read_text())
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                yield max(0, most - taken + int(stat[cached]))
            except (OSError, ValueError, KeyError):
                continue  # no limit, not there, or not to be read
