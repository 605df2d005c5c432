"""Llama's norm by one kernel of PyTorch's on a GPU, where transformers' code launches eight, and more backward.

Each launch takes the processor longer than the norm of a micro-batch takes the GPU.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from raycv.dora import without_autocast


class FusedRMSNorm(LlamaRMSNorm):
    """The same norm. It rounds once, after the weights, and transformers' rounds before them too."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states`: [..., size]; on a CPU, or in another type than the weights', by transformers."""
        if not hidden_states.is_cuda or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return self.fused(hidden_states)

    def fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The one kernel; any device has it."""
        with without_autocast(hidden_states.device):
            return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def fuse_norms(model: nn.Module, *, fused: bool = True) -> None:
    """Makes the norms of a Llama FusedRMSNorms, or transformers' own again; those of other families stay."""
    there, wanted = (LlamaRMSNorm, FusedRMSNorm) if fused else (FusedRMSNorm, LlamaRMSNorm)
    for module in model.modules():
        if type(module) is there:
            module.__class__ = wanted
