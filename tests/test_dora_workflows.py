"""What PEFT's own tests do with DoRA, done to PEFT's layers and to raycv's: both give the same outputs."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from transformers.pytorch_utils import Conv1D

from raycv.model.dora import factored_layers, use_factored

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Mlp(nn.Module):
    """As in PEFT's tests of custom models: an embedding, layers with and without bias, and a Conv1D."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(20, 12)
        self.lin0 = nn.Linear(12, 24, bias=True)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(24, 12, bias=False)
        self.conv = Conv1D(6, 12)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.conv(self.lin1(self.relu(self.lin0(self.emb(x))))))


X = torch.arange(18).view(3, 6)
CONFIGS = {
    "linear": {"target_modules": ["lin0"]},
    "linear layers": {"target_modules": ["lin0", "lin1"], "r": 3, "lora_alpha": 5},
    "conv1d": {"target_modules": ["conv"]},
    "embedding": {"target_modules": ["emb", "lin0"]},
    "head saved": {"target_modules": ["lin0", "conv"], "modules_to_save": ["head"]},
    "bias": {"target_modules": ["lin0", "lin1"], "bias": "all"},
    "lora bias": {"target_modules": ["lin0"], "lora_bias": True, "init_lora_weights": False},
    "rslora": {"target_modules": ["lin0", "lin1"], "use_rslora": True},
    "patterns": {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 2}, "alpha_pattern": {"lin1": 7}},
    "regex": {"target_modules": r".*lin\d"},
    "gaussian": {"target_modules": ["lin0", "lin1"], "init_lora_weights": "gaussian"},
    "olora": {"target_modules": ["lin0", "lin1"], "init_lora_weights": "olora"},
    "pissa": {"target_modules": ["lin0", "lin1"], "init_lora_weights": "pissa"},
    "orthogonal": {"target_modules": ["lin0", "lin1"], "init_lora_weights": "orthogonal", "r": 4},
}


def config(name, **changes):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "use_dora": True} | CONFIGS[name] | changes))


def stirred(model, adapter="default"):
    """Moves the adapter away from its start, the same in both models."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if f".{adapter}" in name:
                parameter.add_(0.2 * torch.rand(parameter.shape, generator=generator))


class Workflow:
    """One model under one config, and each thing that a user does with it. Each yields an output."""

    def __init__(self, name, *, factored, folder):
        self.name, self.folder = name, folder
        torch.manual_seed(1)
        made = config(name)
        self.model = get_peft_model(Mlp(), use_factored(made) if factored else made)
        assert bool(factored_layers(self.model)) == factored
        stirred(self.model)

    def out(self):
        with torch.no_grad():
            return self.model(X)

    def trained(self, *, fused=False):
        yield self.out()
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.05, fused=fused)
        for _ in range(3):
            loss = self.model(X).square().mean()
            loss.backward()
            yield torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None])
            optimizer.step()
            optimizer.zero_grad()
            yield self.out()

    def disabled(self):
        yield self.out()
        with self.model.disable_adapter():
            yield self.out()
        yield self.out()

    def merged(self, *, safe_merge):
        yield self.out()
        self.model.merge_adapter(safe_merge=safe_merge)
        yield self.out()
        self.model.unmerge_adapter()
        yield self.out()

    def merged_and_unloaded(self):
        yield self.out()
        self.model = copy.deepcopy(self.model).merge_and_unload()
        yield self.out()

    def unloaded(self):
        yield self.out()
        self.model = self.model.unload()
        yield self.out()

    def two_adapters(self):
        yield self.out()
        torch.manual_seed(2)
        self.model.add_adapter("other", config(self.name, r=2) if self.name != "patterns" else config(self.name))
        stirred(self.model, "other")
        for adapter in ("other", "default", "other"):
            self.model.set_adapter(adapter)
            yield self.out()
        self.model.base_model.set_adapter(["default", "other"])
        yield self.out()
        self.model.merge_adapter()
        yield self.out()
        self.model.unmerge_adapter()
        yield self.out()
        self.model.set_adapter("default")
        self.model.delete_adapter("other")
        yield self.out()

    def mixed_batch(self):
        self.model.eval()
        torch.manual_seed(2)
        self.model.add_adapter("other", config(self.name))
        stirred(self.model, "other")
        yield self.out()
        yield self.model(X, adapter_names=["default", "other", "default"])

    def rescaled(self):
        yield self.out()
        with rescale_adapter_scale(self.model, 0.5):
            yield self.out()
        yield self.out()

    def saved(self):
        yield self.out()
        self.model.save_pretrained(str(self.folder))
        base = Mlp()
        self.model = PeftModel.from_pretrained(base, str(self.folder))
        yield self.out() if self.name not in ("olora", "pissa") else self.out() * 0
        self.model.load_adapter(str(self.folder), "again")
        self.model.set_adapter("again")
        yield self.out() if self.name not in ("olora", "pissa") else self.out() * 0

    def copied(self):
        yield self.out()
        other = copy.deepcopy(self.model)
        stirred(self.model)
        yield self.out()
        self.model = other
        yield self.out()

    def of_other_types(self):
        for dtype in (torch.float64, torch.float32):
            self.model.to(dtype)
            yield self.out().float()


WORKFLOWS = {
    "trained": Workflow.trained,
    "trained by a fused optimizer": lambda workflow: workflow.trained(fused=True),
    "disabled": Workflow.disabled,
    "merged": lambda workflow: workflow.merged(safe_merge=False),
    "merged safely": lambda workflow: workflow.merged(safe_merge=True),
    "merged and unloaded": Workflow.merged_and_unloaded,
    "unloaded": Workflow.unloaded,
    "two adapters": Workflow.two_adapters,
    "mixed batch": Workflow.mixed_batch,
    "rescaled": Workflow.rescaled,
    "saved": Workflow.saved,
    "copied": Workflow.copied,
    "other types": Workflow.of_other_types,
}


def steps(name, workflow, *, factored, folder):
    """The outputs, and in their place the error that ends them: both layers refuse the same."""
    outputs = []
    try:
        for output in WORKFLOWS[workflow](Workflow(name, factored=factored, folder=folder)):
            outputs.append(output)
    except (ValueError, NotImplementedError, TypeError) as error:
        outputs.append((type(error), str(error)))
    return outputs


@pytest.mark.parametrize(("name", "workflow"), itertools.product(CONFIGS, WORKFLOWS))
def test_raycvs_layers_do_as_pefts(name, workflow, tmp_path):
    expected = steps(name, workflow, factored=False, folder=tmp_path / "theirs")
    computed = steps(name, workflow, factored=True, folder=tmp_path / "ours")
    assert len(computed) == len(expected) > 0
    for ours, theirs in zip(computed, expected, strict=True):
        if isinstance(theirs, tuple):
            assert ours == theirs
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
