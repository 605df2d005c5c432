"""Seeds (FR-009), random states, and what else makes numbers repeat: kernels, versions, number of the arithmetic."""

import os
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


VERSIONS = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "scikit-learn")
"""Packages whose versions must be the same in all folds of a run, on every node and after a resume.

Weights, tokens, the order of pairs, folds and metrics come from them.
"""

NUMERICS = 1
"""The number of raycv's arithmetic. Raise it by one with each change to what training or inference computes.

Such a change gives other losses, weights or scores, beyond the last digits, from the same inputs and versions. A run
or a file of scores that has another number is not continued, since the result would mix both.
"""
FIRST_NUMERICS = 1
"""The number for records that were written before these numbers existed."""


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and torch (all devices), and pins the kernels (FR-009)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    pin_kernels()


def pin_kernels() -> None:
    """Makes torch use the same kernels in every batch and on every GPU: in training, inference and benchmarks.

    The memory-efficient kernel computes attention on a GPU. Flash does not take a mask there, so it would compute only
    the batches that happen to have no padding. The kernel of cuDNN is off, since it chooses its plan at run time. The
    price is small: at 512 tokens attention is a fiftieth of the products of a 7B model. Padded and packed batches could
    not use Flash anyway. The math kernel computes what the memory-efficient one does not take. On a CPU Flash takes
    masks, so it computes all batches.

    An operation without a deterministic kernel warns, so that it does not stop a run of hours. The backward pass of
    attention is such an operation. PyTorch uses its deterministic form only with warn_only=False, under which other
    operations would raise. So training on a GPU repeats itself up to rounding, not bit for bit (SC-003 asks for 0.5 %
    F1).
    """
    # cuBLAS reads this variable when it makes its handle, so we set it before the first product on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    # The fill with NaN finds bugs, not nondeterminism, and costs a pass over every new tensor, so it is off.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # Defaults differ between GPUs, so we turn TF32 off to get the same products on each.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # This switch holds for the CPU too, despite its name. A CPU without Flash takes four times as long for attention.
    torch.backends.cuda.enable_flash_sdp(not torch.cuda.is_available())
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)


def random_state(device: "torch.device") -> dict[str, "torch.Tensor"]:
    """The states of the generators that dropout on `device` draws from, by kind of device."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, "torch.Tensor"], device: "torch.device") -> None:
    """Restores the states that `random_state` returned."""
    import torch

    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
