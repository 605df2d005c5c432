"""A layer of PEFT and raycv's own, with the same weights."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from raycv.model.dora import factored_layers, use_factored


class One(nn.Module):
    """A model of one linear layer; `conv1d`: with its weights transposed, as GPT-2 has them."""

    def __init__(self, inp, out, bias, dtype=torch.float64, conv1d=False):
        super().__init__()
        self.proj = Conv1D(out, inp).to(dtype) if conv1d else nn.Linear(inp, out, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.proj(x)


def lora(dropout=0.0, r=4, targets=("proj",)):
    return LoraConfig(use_dora=True, r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=list(targets))


def pair(inp, out, bias=True, dropout=0.0, dtype=torch.float64, path="lora_path", conv1d=False):
    """PEFT's layer and ours with the same weights, A, B and magnitudes all away from their start."""
    torch.manual_seed(0)
    plain = One(inp, out, bias, dtype, conv1d)
    theirs = get_peft_model(copy.deepcopy(plain), lora(dropout), autocast_adapter_dtype=dtype != torch.bfloat16)
    ours = get_peft_model(plain, use_factored(lora(dropout)), autocast_adapter_dtype=dtype != torch.bfloat16)
    if dtype == torch.float64:
        theirs, ours = theirs.double(), ours.double()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.rand_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    (layer,) = factored_layers(ours)
    layer.dropout_path = path
    assert not any(type(module) is PeftLoraLinear for module in ours.modules())
    return theirs, ours


def outputs_and_gradients(model, x, seed=3):
    x = x.clone().requires_grad_(True)
    torch.manual_seed(seed)
    y = model(x)
    torch.manual_seed(5)
    (y * torch.randn_like(y)).sum().backward()
    return y, {"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def same_as_pefts(theirs, ours, x):
    y, gradients = outputs_and_gradients(ours, x)
    expected, expected_gradients = outputs_and_gradients(theirs, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    assert any("magnitude" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-12, atol=1e-12)
    ours.zero_grad()
    theirs.zero_grad()


class Operators(TorchDispatchMode):
    """Counts what is computed: on a GPU a kernel's launch each, and small batches wait for those."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **kwargs or {})
