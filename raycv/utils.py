"""Seeds (FR-009), random states, and the switches that make torch repeat itself."""

import os
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
