"""Llama's norm by one kernel beside transformers' own."""

import pytest
import torch
from support.builders import tiny_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from raycv.model.attention import FusedRMSNorm, fuse_norms
from raycv.model.base_model import fetch_base
from raycv.model.loading import load_classifier, load_tokenizer


def norm(dtype):
    torch.manual_seed(0)
    made = FusedRMSNorm(96).to(dtype)
    made.weight.data.normal_(1, 0.2)
    return made


def outcome(compute, hidden):
    hidden = hidden.clone().requires_grad_()
    out = compute(hidden)
    torch.manual_seed(1)
    (out * torch.randn(out.shape).to(out)).sum().backward()
    return out.detach().double(), hidden.grad.double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_fused_norm_is_transformers(dtype, tolerance):
    made = norm(dtype)
    hidden = torch.randn(3, 5, 96).to(dtype)
    exact = outcome(norm(torch.float64).fused, hidden.double())
    for one, other, right in zip(
        outcome(made.fused, hidden), outcome(lambda x: LlamaRMSNorm.forward(made, x), hidden), exact, strict=True
    ):
        assert (one - other).norm() <= tolerance * right.norm()
        assert (one - right).norm() <= (other - right).norm() * 1.05, "no further from the truth"


def test_under_autocast_the_type_of_the_activations_stays():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(torch.bfloat16).fused(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16


def test_a_loaded_llama_has_fused_norms_and_computes_transformers_on_a_cpu(tmp_path):
    files = fetch_base(str(tiny_llama(tmp_path)), None)
    model = load_classifier(files, load_tokenizer(files), torch.float32, seed=0)
    norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    assert norms
    assert {type(module) for module in norms} == {FusedRMSNorm}
    ids = torch.tensor([[3, 4, 5]])
    fused = model(input_ids=ids).logits
    fuse_norms(model, fused=False)
    assert {type(module) for module in norms} == {LlamaRMSNorm}
    assert torch.equal(model(input_ids=ids).logits, fused)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_one_kernel_computes_it():
    made = norm(torch.bfloat16).cuda()
    hidden = torch.randn(3, 5, 96, device="cuda").bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        out = made(hidden)
        torch.cuda.synchronize()
    assert len([event for event in seen.events() if "norm" in event.name.lower()]) == 1
    torch.testing.assert_close(out, LlamaRMSNorm.forward(made, hidden), rtol=2e-2, atol=2e-2)
