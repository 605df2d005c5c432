"""Seeds (FR-009), random states, signals, and the description of the environment that every run records."""

import gc
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any, TextIO

from raycv import __version__
from raycv.errors import counted

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "raycv", "ray", "torch", "transformers", "peft", "accelerate", "scikit-learn", "mlflow", "hydra-core", "numpy",
    "pandas", "tokenizers", "safetensors", "huggingface_hub",
)  # fmt: skip
VERSIONS = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "scikit-learn")
"""Packages whose versions must be the same in all folds of a run, on every node and after a resume.

Weights, tokens, the order of pairs, folds and metrics come from them.
"""

NUMERICS = 1
"""The number of raycv's arithmetic. Whoever changes what training or inference computes raises it by one.

That is: the same inputs under the same versions of other packages would give other losses, weights or scores, beyond
the last digits. Runs and files of scores that another number began are not continued, since they would mix the two.
"""
FIRST_NUMERICS = 1
"""The number of what was recorded before there were numbers."""


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What stops a run: Ctrl-C, a scheduler at the end of the time, a terminal that is closed."""


def stop_like_ctrl_c() -> None:
    """All of STOP_SIGNALS end in KeyboardInterrupt from here on, but those that are ignored (nohup)."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)


def ignore_stops() -> None:
    """A second Ctrl-C would only break off what the first began: marking the runs and ending Ray's processes."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def utc_now() -> str:
    """The present moment for a record: ISO 8601, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def recorded_moment(value: object) -> str | None:
    """`value` if it is a moment of a record, as `utc_now` makes them; None for anything else."""
    return value if isinstance(value, str) and MOMENT.fullmatch(value) else None


SELDOM = 20_000
"""Objects that are made between two searches for garbage; Python's own is 700."""


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Garbage is seldom looked for: in imports of torch and the like, which make none, it takes a sixth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def discard(stream: TextIO | None) -> None:
    """Gives up a standard stream that cannot be written: what is in its buffer would be tried once more at the end."""
    with suppress(AttributeError, OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and torch (all devices), and pins the kernels."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    pin_kernels()


def pin_kernels() -> None:
    """Asks torch for the same kernels in every batch and on every GPU: in training, inference and benchmarks alike.

    Attention on a GPU is the memory-efficient kernel's. Flash takes no mask there, so it would compute the batches that
    happen to have no padding, and no others; cuDNN chooses its plan at run time. The price is small: at 512 tokens
    attention is a fiftieth of the products of a 7B, and padded and packed batches could not have used Flash at all.
    Math remains for what that kernel does not take. On a CPU Flash takes masks, and computes all batches.

    An operation without a deterministic kernel warns instead of stopping a run of hours. The backward of attention is
    one: PyTorch takes its deterministic form only where others would raise (warn_only=False). So a training on a GPU
    repeats itself to rounding, not to the bit (SC-003 asks for 0.5 % F1).
    """
    # cuBLAS reads it when its handle is made, so before the first product on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory with NaN finds bugs, not nondeterminism, and costs a pass over every tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # The same products on every GPU, whatever its defaults.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # Of all devices, whatever its name: without it a CPU computes attention four times as long.
    torch.backends.cuda.enable_flash_sdp(not torch.cuda.is_available())
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)


def random_state(device: "torch.device") -> dict[str, "torch.Tensor"]:
    """What dropout on `device` draws from next, by the kind of generator."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, "torch.Tensor"], device: "torch.device") -> None:
    """Puts back what `random_state` gave."""
    import torch

    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and the commit of the code, for `environment.json`. Imports nothing heavy."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": {name: package_version(name) for name in PACKAGES},
        "numerics": NUMERICS,
        "git": code_state(),
    }


def describe_device(device: Any) -> str:
    """The name of a torch device as a person knows it: `NVIDIA H200`, or `cpu (2 threads)`."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({counted(torch.get_num_threads(), 'thread')})"


def package_version(name: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    if name == "raycv":  # also from a checkout that nobody installed, beside installed dependencies
        return __version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            names = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def code_state() -> dict[str, Any] | None:
    """The commit of the checkout that raycv runs from, and whether it has changes; None outside a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        if os.path.realpath(_git_says(here, "rev-parse", "--show-toplevel")) != os.path.dirname(os.path.realpath(here)):
            return None  # installed somewhere inside another project's repository
        commit = _git_says(here, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git_says(here, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git_says(folder: str, *arguments: str) -> str:
    command = ["git", "-C", folder, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
