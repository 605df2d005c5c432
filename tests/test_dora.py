"""The factored DoRA layer against PEFT's: outputs, gradients, checkpoints both ways, and what it never computes."""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from support.builders import tiny_bert, tiny_llama
from support.dora_layers import One, lora, outputs_and_gradients, pair, same_as_pefts
from support.toy import LLAMA_MODULES
from torch.utils._python_dispatch import TorchDispatchMode

import raycv.model.dora as dora
from benchmarks.models import flop_counter
from raycv.model.base_model import fetch_base
from raycv.model.dora import factored_layers, factored_norm, prepared, start_at_the_base, use_factored
from raycv.model.loading import load_classifier, load_tokenizer

SHAPES = [(8, 8), (24, 8), (8, 24), (7, 33), (1, 5), (40, 1)]
CONV1D = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


@CONV1D
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d"])
@pytest.mark.parametrize(("out", "inp"), SHAPES)
def test_outputs_and_all_gradients_are_pefts_in_float64(out, inp, kind):
    theirs, ours = pair(inp, out, kind == "bias", conv1d=kind == "conv1d")
    same_as_pefts(theirs, ours, torch.randn(3, 5, inp, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 3, 4, 16)])
def test_inputs_of_any_shape(shape):
    theirs, ours = pair(16, 12)
    x = torch.randn(*shape, dtype=torch.float64)
    y = ours(x)
    assert y.shape == (*shape[:-1], 12)
    torch.testing.assert_close(y, theirs(x).reshape(y.shape), rtol=1e-12, atol=1e-12)
    _, ours_gradients = outputs_and_gradients(ours, x)
    _, theirs_gradients = outputs_and_gradients(theirs, x[None])
    for name, gradient in ours_gradients.items():
        torch.testing.assert_close(gradient, theirs_gradients[name].reshape(gradient.shape), rtol=1e-12, atol=1e-12)


def test_an_output_may_be_changed_in_place():
    """As OLMo clamps its queries, keys and values."""
    _, ours = pair(16, 12, bias=False)
    y = ours(torch.randn(2, 16, dtype=torch.float64)).clamp_(-1, 1)
    y.sum().backward()


@CONV1D
@pytest.mark.parametrize("conv1d", [False, True])
def test_pefts_dropout_semantics_under_one_random_state(conv1d):
    theirs, ours = pair(16, 12, dropout=0.4, path="peft", conv1d=conv1d)
    x = torch.randn(6, 16, dtype=torch.float64)
    for training in (True, False):
        same_as_pefts(theirs.train(training), ours.train(training), x)


@CONV1D
@pytest.mark.parametrize("conv1d", [False, True])
def test_dropout_on_the_lora_path_is_torchtunes_formula_and_unbiased(conv1d):
    _, ours = pair(16, 12, dropout=0.4, conv1d=conv1d)
    (layer,) = factored_layers(ours)
    x = torch.randn(6, 16, dtype=torch.float64)
    torch.manual_seed(9)
    y = ours.train()(x)
    torch.manual_seed(9)
    dropped, _, _ = dora.dropout(x, 0.4, as_peft=False)
    base = layer.get_base_layer()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = base.weight.T if conv1d else base.weight
    gamma = layer.lora_magnitude_vector["default"].weight / (weight + 2 * b @ a).norm(dim=1)
    torch.testing.assert_close(y, gamma * (x @ weight.T + 2 * dropped @ a.T @ b.T) + base.bias)
    mean = torch.stack([ours(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, ours.eval()(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("probability", [1e-6, 0.05, 0.4, 0.999999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_each_element_by_itself_with_its_mean(probability, dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=dtype)
    y, kept, scale = dora.dropout(x, probability, as_peft=False)
    assert y.dtype == dtype
    assert torch.equal(y != 0, kept)
    assert torch.equal(y[kept], torch.full_like(y[kept], scale))
    assert 1 / scale == pytest.approx(1 - probability, abs=2**-16)
    share = kept.double().flatten()
    assert float(share.mean()) == pytest.approx(1 / scale, abs=2e-3)
    for step in range(1, 9):  # four elements come of one draw
        assert float((share[step:] * share[:-step]).mean()) == pytest.approx(1 / scale**2, abs=2e-3)


def test_dropout_alone_may_be_switched_off():
    _, ours = pair(16, 12, dropout=0.4)
    x = torch.randn(6, 16, dtype=torch.float64)
    expected = ours.eval()(x)
    ours.train()
    assert not torch.equal(ours(x), expected)
    factored_layers(ours)[0].lora_dropout.eval()
    assert torch.equal(ours(x), expected)


def test_draws_are_made_where_the_activations_are():
    with torch.device("meta"):
        y, kept, _ = dora.dropout(torch.ones(6, 16, device="cpu"), 0.4, as_peft=False)
    assert (y.device.type, kept.device.type) == ("cpu", "cpu")


def test_dropout_of_all_leaves_nothing():
    y, kept, _ = dora.dropout(torch.ones(300, 300), 1.0, as_peft=False)
    assert not y.any()
    assert not kept.any()


def test_gradients_are_those_of_the_forward_whatever_happens_to_the_adapter_in_between():
    """And whether backward is called under autocast or not."""
    _, ours = pair(16, 12, dropout=0.3, dtype=torch.float32)
    x = torch.randn(6, 16)
    expected = outputs_and_gradients(ours, x)[1]
    ours.zero_grad()
    again = x.clone().requires_grad_(True)
    torch.manual_seed(3)
    y = ours(again)
    (layer,) = factored_layers(ours)
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(2)
        layer.lora_B["default"].weight.mul_(2)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y * torch.randn_like(y)).sum().backward()
    for name, gradient in (
        {"x": again.grad} | {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    ).items():
        assert torch.equal(gradient, expected[name]), name


def test_no_gradient_of_a_gradient():
    _, ours = pair(16, 12)
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_in_bf16_a_gamma_near_one_is_not_lost():
    """bf16 has no number between 1 and 1.0078."""
    _, ours = pair(256, 512, bias=False, dtype=torch.bfloat16)
    (layer,) = factored_layers(ours)
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    start_at_the_base(ours)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.003)
    x = torch.randn(64, 256).bfloat16()
    with torch.no_grad():
        base, y = layer.get_base_layer()(x).double(), ours(x).double()
    factor = float((y * base).sum() / base.square().sum())
    assert factor == pytest.approx(1.003, abs=5e-4)


def test_under_autocast_no_copy_of_a_float32_base_is_kept():
    _, ours = pair(48, 32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(torch.randn(3, 48, requires_grad=True))
    kept = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape == (32, 48)]
    assert [each.dtype for each in kept if each.dtype == torch.bfloat16] == []
    y.sum().backward()


def test_dropout_as_pefts_is_pytorchs():
    x = torch.randn(37, 11)
    torch.manual_seed(1)
    expected = torch.dropout(x, 0.3, True)
    torch.manual_seed(1)
    y, kept, scale = dora.dropout(x, 0.3, as_peft=True)
    assert torch.equal(y, expected)
    torch.testing.assert_close(y, x * kept * scale)


def test_what_checkpointing_handles_is_activations_alone():
    """A hook in Python is called for each saved tensor, when it is saved, made again and read."""
    _, ours = pair(16, 12, dropout=0.1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda it: it):
        y = ours(torch.randn(6, 16, dtype=torch.float64, requires_grad=True))
    assert saved == [(6, 16), (6, 4), (6, 12), (6, 16)]
    y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factored_norm_is_closer_to_float64_than_the_dense_one(dtype):
    torch.manual_seed(1)
    weight = (torch.randn(96, 160) * 0.02).to(dtype)
    a, b = torch.randn(8, 160) * 0.05, torch.randn(96, 8) * 0.05
    exact = (weight.double() + 2 * b.double() @ a.double()).norm(dim=1)
    ours = factored_norm(weight, weight.float().square().sum(1), a, b, 2.0).double()
    dense = (weight + (2 * b @ a).to(dtype)).norm(dim=1).double()
    assert ((ours - exact) / exact).abs().max() < 1e-6
    assert ((ours - exact) / exact).abs().max() <= ((dense - exact) / exact).abs().max() + 1e-7


def test_a_row_that_cancels_is_no_nan():
    weight, a = torch.randn(4, 6), torch.zeros(1, 6)
    a[0] = weight[2]
    b = torch.zeros(4, 1)
    b[2] = -1
    norm = factored_norm(weight, weight.square().sum(1), a, b, 1.0)
    assert torch.isfinite(norm).all()
    assert norm[2] < 1e-2


def test_training_may_follow_inference():
    theirs, ours = pair(16, 12)
    x = torch.randn(2, 16, dtype=torch.float64)
    with torch.inference_mode():
        ours(x)
    assert outputs_and_gradients(ours, x)[1].keys() == outputs_and_gradients(theirs, x)[1].keys()


def test_a_model_made_for_inference_alone():
    plain = One(16, 12, True)
    x = torch.randn(2, 16, dtype=torch.float64)
    with torch.inference_mode():
        ours = get_peft_model(copy.deepcopy(plain), use_factored(lora())).double()
        (layer,) = factored_layers(ours)
        for _ in range(2):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight.normal_()
            direction = plain.proj.weight + 2 * b @ a
            gamma = layer.lora_magnitude_vector["default"].weight / direction.norm(dim=1)
            torch.testing.assert_close(ours(x), gamma * (x @ direction.T) + plain.proj.bias)


class Results(TorchDispatchMode):
    """Calls `look` with every tensor that an operation gives."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.look(tensor)
        return made


@CONV1D
@pytest.mark.parametrize("conv1d", [False, True])
def test_nothing_of_the_size_of_the_weights_is_made(monkeypatch, conv1d):
    """Neither a dense B A nor a copy of W or of its gradient: with W in several parts, none is as large as it."""
    monkeypatch.setitem(dora.CHUNK_ELEMENTS, "cpu", 4 * 48)
    _, ours = pair(48, 32, dtype=torch.float32, conv1d=conv1d)
    weight = factored_layers(ours)[0].get_base_layer().weight
    made = []

    def look(tensor):
        if tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            made.append(tuple(tensor.shape))

    x = torch.randn(3, 48, requires_grad=True)
    with Results(look):
        ours(x).sum().backward()
    assert (4, 48) in made
    assert (32, 4) in made
    assert max(torch.Size(shape).numel() for shape in made) < 32 * 48 / 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_llama_matches_peft_with_and_without_checkpointing(tmp_path, checkpointing):
    files = fetch_base(str(tiny_llama(tmp_path)), None)
    tokenizer = load_tokenizer(files)
    results = []
    for config in (lora(0.0, targets=LLAMA_MODULES), use_factored(lora(0.0, targets=LLAMA_MODULES))):
        config.task_type = TaskType.SEQ_CLS
        torch.manual_seed(0)
        model = get_peft_model(load_classifier(files, tokenizer, torch.float64, seed=1), config).double()
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        logits = model(input_ids=torch.arange(3, 23)[None].repeat(2, 1)).logits
        logits.square().sum().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-10, atol=1e-12)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-9, atol=1e-12)


def test_under_bf16_autocast_activations_stay_bf16():
    theirs, ours = pair(64, 48, dtype=torch.float32)
    x = torch.randn(10, 64)
    exact = ours(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(x)
        expected = theirs(x)
    assert y.dtype == torch.bfloat16 == expected.dtype
    wide = []

    def look(tensor):
        if tensor.dtype != torch.bfloat16 and tensor.numel() >= 10 * 48:
            wide.append(tuple(tensor.shape))

    narrow = x.bfloat16().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16), Results(look):
        ours(narrow).sum().backward()
    # A float32 weight is cast; of the activations and their gradients nothing is float32 on the way.
    assert set(wide) <= {(64, 48), (48, 64)}, wide
    ours_off = (y.float() - exact).abs().mean()
    theirs_off = (expected.float() - exact).abs().mean()
    assert ours_off < 1.5 * theirs_off


def test_a_bf16_base_with_float32_adapters_works_without_autocast():
    torch.manual_seed(0)
    ours = get_peft_model(One(32, 16, True, torch.bfloat16), use_factored(lora()))
    (layer,) = factored_layers(ours)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    ours(x).float().sum().backward()
    assert layer.row_norm("default").dtype == torch.float32
    assert layer.lora_magnitude_vector["default"].weight.grad is not None


def test_the_untrained_model_is_the_base_even_in_bf16():
    torch.manual_seed(0)
    plain = One(64, 64, False, torch.bfloat16)
    plain.proj.weight.data[2] = 0  # as a pruned one: 0/0 would be NaN
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    expected = plain(x)
    ours = get_peft_model(plain, use_factored(lora()))
    start_at_the_base(ours)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)


def test_checkpoints_are_plain_peft_both_ways(tmp_path):
    theirs, ours = pair(16, 12)
    x = torch.randn(3, 16, dtype=torch.float64)
    base = copy.deepcopy(theirs).unload()
    ours.save_pretrained(str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {path.name for path in (tmp_path / "theirs").iterdir()}
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").double()
    assert not factored_layers(stock)
    torch.testing.assert_close(stock(x), ours(x), rtol=1e-6, atol=1e-7)
    config = use_factored(LoraConfig.from_pretrained(str(tmp_path / "theirs")))
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", config=config).double()
    assert factored_layers(back)
    torch.testing.assert_close(back(x), theirs(x), rtol=1e-6, atol=1e-7)


def test_merging_and_disabling_are_pefts():
    theirs, ours = pair(16, 12)
    x = torch.randn(3, 16, dtype=torch.float64)
    before = ours(x)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(x), ours.get_base_model().proj.base_layer(x))
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), before)
    ours.unmerge_adapter()
    for model in (theirs, ours):
        torch.manual_seed(4)
        model.add_adapter("other", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if "other" in name:
                parameter.data = parameter.data + torch.rand_like(parameter)
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.allclose(ours(x), before)
    for model in (theirs, ours):
        model.base_model.set_adapter("default")
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(x), before)
    torch.testing.assert_close(merged(x), theirs(x))


def test_bert_layers_with_bias(tmp_path):
    files = fetch_base(str(tiny_bert(tmp_path)), None)
    config = use_factored(lora(targets=["query", "value", "dense"]))
    model = get_peft_model(load_classifier(files, load_tokenizer(files), torch.float32, seed=1), config)
    assert len(factored_layers(model)) > 4
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize(
    ("factored", "path", "expected"), [(True, "lora_path", 4), (True, "peft", 8), (False, "peft", 8)]
)
def test_floating_point_operations_on_base_weights(factored, path, expected):
    """Forward 2N and the gradient of the input 2N; dropout on the base path doubles both, PEFT adds dense B A too."""
    inp = out = 512
    tokens = 4096
    torch.manual_seed(0)
    config = lora(0.1, r=1)
    model = get_peft_model(One(inp, out, False, torch.float32), use_factored(config) if factored else config).train()
    for layer in factored_layers(model):
        layer.dropout_path = path
    x = torch.randn(tokens, inp, requires_grad=True)
    with prepared(model, torch.float32), flop_counter() as counter:
        model(x).sum().backward()
    per_weight = counter.get_total_flops() / (tokens * inp * out)
    assert expected <= per_weight < expected * 1.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_in_bf16_outputs_and_gradients_are_as_near_to_float64_as_pefts():
    theirs, ours = pair(256, 192, bias=False, dtype=torch.bfloat16)
    x = torch.randn(40, 256).bfloat16()
    y, gradients = outputs_and_gradients(copy.deepcopy(theirs).double(), x.double())
    exact = {"y": y, **gradients}

    def errors(model):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y, gradients = outputs_and_gradients(model.cuda(), x.cuda())
        found = {"y": y, **gradients}
        return {name: float((found[name].cpu().double() - exact[name]).norm() / exact[name].norm()) for name in exact}

    pefts = errors(theirs)
    for name, error in errors(ours).items():
        assert error < max(1.5 * pefts[name], 0.01), name
