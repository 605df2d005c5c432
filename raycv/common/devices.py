"""Chooses the device that computes, and checks that torch can use the GPU of the machine."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from raycv.errors import UserError

if TYPE_CHECKING:
    import torch

ROOT = Path("/")
"""The folder under which the files of the drivers are."""
HIDING = {
    "NVIDIA": ("CUDA_VISIBLE_DEVICES",),
    "AMD": ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
}
"""The variables that choose among the GPUs of each maker. One that is set to no GPU hides all of them."""
CPU_FOR_RUNS, CPU_FOR_INFERENCE = "resources.gpus_per_fold=0", "infer.device=cpu"
"""The arguments that choose the CPU."""
BUILDS = "https://pytorch.org/get-started/locally/"


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may open."""

    maker: str
    driver: str | None
    """Version of the driver; None if its files do not have it."""


def visible_gpu(root: Path | None = None, variables: Mapping[str, str] = os.environ) -> Gpu | None:
    """Finds the GPU that this process may use, without torch, which may be a build for CPUs only.

    The driver also shows its files to containers and scheduled jobs without a GPU. They cannot open the device, so the
    function tries that. An AMD GPU counts only if ROCm is installed, since many processors have a small GPU that
    nobody computes with.

    Args:
        root: The folder under which the files of the drivers are; None means those of this machine.
        variables: The environment variables. A user who hides all GPUs with one of them wants the CPU.

    Returns:
        The GPU; None if this process may open none, or if a variable hides all of them.
    """
    root = root or ROOT
    if any(os.access(device, os.R_OK | os.W_OK) for device in (root / "dev").glob("nvidia[0-9]*")):
        gpu = Gpu("NVIDIA", _found(root / "proc/driver/nvidia/version", r"Kernel Module.*?\s(\d+(?:\.\d+)+)"))
    elif os.access(root / "dev/kfd", os.R_OK | os.W_OK) and (root / "opt/rocm").is_dir():
        gpu = Gpu("AMD", _found(root / "sys/module/amdgpu/version", r"(\S+)"))
    elif os.access(root / "dev/dxg", os.R_OK | os.W_OK) and (root / "usr/lib/wsl/lib/libcuda.so.1").exists():
        # Windows' driver, which WSL shows by a device of its own.
        gpu = Gpu("NVIDIA", None)
    else:
        return None
    hidden = [variables[name] for name in HIDING[gpu.maker] if _chooses_none(variables.get(name, "0"))]
    return None if hidden or variables.get("NVIDIA_VISIBLE_DEVICES") in ("void", "none") else gpu


def _found(file: Path, pattern: str) -> str | None:
    try:
        found = re.search(pattern, file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def _chooses_none(value: str) -> bool:
    """Whether a variable chooses no GPU: it is empty, or begins with -1 or with a word like NoDevFiles."""
    return re.match(r"\s*(\d|GPU-|MIG-)", value) is None


def inference_device(asked: Literal["auto", "cpu"]) -> "torch.device":
    """The device that inference computes on in this process.

    Raises:
        UserError: The machine has a GPU that torch cannot use, and `asked` is not `cpu`.
    """
    import torch

    if asked == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        check_given_gpu(CPU_FOR_INFERENCE)
        return torch.device("cuda")
    check_own_gpu(CPU_FOR_INFERENCE)
    return torch.device("cpu")


def check_gpu_before_ray(cpu: str) -> None:
    """Checks the GPU of this machine before Ray starts on it, which takes seconds.

    The check runs if RAY_ADDRESS is empty, `local` or `auto`. On another cluster each worker checks its own GPU.

    Args:
        cpu: The `key=value` that chooses the CPU, for the remedy.

    Raises:
        UserError: This machine has a GPU that torch cannot use.
    """
    if os.environ.get("RAY_ADDRESS", "") in ("", "local", "auto"):
        check_own_gpu(cpu)


def check_own_gpu(cpu: str) -> None:
    """Checks that torch can use the GPU that this process may use, if there is one.

    Args:
        cpu: The `key=value` that chooses the CPU, for the remedy.

    Raises:
        UserError: torch cannot use the GPU.
    """
    gpu = visible_gpu()
    if gpu is None:
        return
    import torch

    # This process may be a driver, which keeps what it allocates on a GPU until it ends. Neither call allocates.
    if not torch.cuda.is_available():
        try:
            # is_available gives no reason, so we ask init, whose error has one.
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            raise _unusable(gpu, cpu, error) from error


def check_given_gpu(cpu: str) -> None:
    """Computes on the GPU that this process was given.

    torch may find a GPU and lack the kernels for it, which only a computation shows.

    Args:
        cpu: The `key=value` that chooses the CPU, for the remedy.

    Raises:
        UserError: torch cannot use the GPU.
    """
    import torch

    try:
        (torch.zeros(1, device="cuda") + 1).item()
    except (AssertionError, RuntimeError) as error:
        # torch can use a full GPU. The code that loads the model there reports the lack of memory.
        if not is_out_of_memory(error):
            raise _unusable(visible_gpu(), cpu, error) from error


def _unusable(gpu: Gpu | None, cpu: str, error: Exception) -> UserError:
    """The error for a GPU that torch cannot use, with its driver and torch's build; None: a GPU without files here."""
    import torch

    name, driver = (f"{gpu.maker} GPU", gpu.driver) if gpu else ("GPU", None)
    version = torch.version.cuda or torch.version.hip
    build = f"{'ROCm' if torch.version.hip else 'CUDA'} {version}" if version else "CPUs alone"
    facts = f"driver {driver or 'of an unknown version'}"
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        facts += f", CUDA_VISIBLE_DEVICES={chosen}"
    install = f"install a build of torch for that driver: {BUILDS}"
    reason = str(error).strip().partition("\n")[0]
    return UserError(
        f"torch {torch.__version__}, a build for {build}, cannot use the {name} of {socket.gethostname()} ({facts}): "
        f"{reason}",
        kind="gpu-unusable",
        remedies=[f"update the driver, or {install}" if version else install, f"or compute on the CPU: {cpu}"],
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` reports a lack of memory, so that smaller batches might help."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    texts = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    known = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return known or any(text in str(error) for text in texts)
