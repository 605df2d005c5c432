"""Seeds (FR-009), random states, and the description of the environment that every run records."""

import os
import platform
import random
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

from raycv.errors import counted

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "raycv", "ray", "torch", "transformers", "peft", "accelerate", "scikit-learn", "mlflow", "hydra-core", "numpy",
    "pandas", "tokenizers", "safetensors", "huggingface_hub",
)  # fmt: skip


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and torch (all devices), and asks torch for deterministic algorithms.

    An operation without one warns instead of stopping a run of hours (SC-003 asks for 0.5 % F1, not for equal bits).
    """
    # cuBLAS reads it when its handle is made, so before the first product on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory with NaN finds bugs, not nondeterminism, and costs a pass over every tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # The same products on every GPU, whatever its defaults.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # Attention by PyTorch's own kernels: cuDNN's choose their plan at run time.
    torch.backends.cuda.enable_cudnn_sdp(False)


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
