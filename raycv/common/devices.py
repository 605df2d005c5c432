"""Which device computes, and whether torch can use the GPU that is there."""

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
"""Where the files of the drivers are looked for."""
HIDING = {
    "NVIDIA": ("CUDA_VISIBLE_DEVICES",),
    "AMD": ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
}
"""The variables that choose among the GPUs of each maker, and hide them all if they begin with no GPU."""
CPU_FOR_RUNS, CPU_FOR_INFERENCE = "resources.gpus_per_fold=0", "infer.device=cpu"
"""What to type to ask for the CPU."""
BUILDS = "https://pytorch.org/get-started/locally/"


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may open."""

    maker: str
    driver: str | None
    """its version, if the driver says it"""


def visible_gpu(root: Path | None = None, variables: Mapping[str, str] = os.environ) -> Gpu | None:
    """The GPU of this machine; None if it has none for this process, or a variable hides them: the CPU is asked for.

    It is seen without torch, which may be built for CPUs alone. A container, or a job of a scheduler, that was given no
    GPU cannot open the machine's, although the driver shows itself there too. An AMD GPU counts where ROCm is
    installed, since many processors have a small one that nobody computes with.

    Args:
        root: Where the files of the drivers lie; None for those of this machine.
        variables: The environment variables.
    """
    root = root or ROOT
    if any(os.access(device, os.R_OK | os.W_OK) for device in (root / "dev").glob("nvidia[0-9]*")):
        gpu = Gpu("NVIDIA", _found(root / "proc/driver/nvidia/version", r"Kernel Module.*?\s(\d+(?:\.\d+)+)"))
    elif os.access(root / "dev/kfd", os.R_OK | os.W_OK) and (root / "opt/rocm").is_dir():
        gpu = Gpu("AMD", _found(root / "sys/module/amdgpu/version", r"(\S+)"))
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
    """Whether a variable chooses no GPU: it is empty, or begins with -1 or a word like NoDevFiles."""
    return re.match(r"\s*(\d|GPU-|MIG-)", value) is None


def inference_device(asked: Literal["auto", "cpu"]) -> "torch.device":
    """The device that inference computes on in this process.

    Raises: UserError if there is a GPU that torch cannot use and the CPU is not asked for.
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
    """The same check of the machine that starts a Ray of its own, in seconds; on a cluster each worker makes it.

    Args:
        cpu: The `key=value` that asks for the CPU.
    Raises: UserError if this machine has a GPU that torch cannot use.
    """
    if os.environ.get("RAY_ADDRESS", "") in ("", "local", "auto"):
        check_own_gpu(cpu)


def check_own_gpu(cpu: str) -> None:
    """Raises: UserError if this machine has a GPU for this process that torch cannot use; `cpu`: as above."""
    gpu = visible_gpu()
    if gpu is None:
        return
    import torch

    # Neither call makes anything on the GPU: a driver would keep its memory there as long as it lives.
    if not torch.cuda.is_available():
        try:
            # It tells why, where is_available only says no.
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            raise _unusable(gpu, cpu, error) from error


def check_given_gpu(cpu: str) -> None:
    """Computes on the GPU that this process was given; `cpu`: as above.

    torch may find a GPU and have no kernels for it, which only a computation shows.
    Raises: UserError if torch cannot use it.
    """
    import torch

    from raycv.common.devices import is_out_of_memory

    try:
        (torch.zeros(1, device="cuda") + 1).item()
    except (AssertionError, RuntimeError) as error:
        # A full GPU can be used: who loads the model there says what to do.
        if not is_out_of_memory(error):
            raise _unusable(visible_gpu(), cpu, error) from error


def _unusable(gpu: Gpu | None, cpu: str, error: Exception) -> UserError:
    """That torch cannot use `gpu` (None: one that shows no files here), with its driver and torch's build."""
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
        remedies=[f"update the driver, or {install}" if version else install, f"or compute on the CPU: {cpu}"],
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether less memory might help."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    texts = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    known = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return known or any(text in str(error) for text in texts)
