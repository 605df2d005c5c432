"""What a DoRA layer keeps between forwards: nothing by default, and what its owner refreshes within `prepared`."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.dora_layers import One, Operators, lora, outputs_and_gradients, pair, same_as_pefts
from support.toy import Recorder, Toy, toy_base, train_config
from support.toy_training import TRAIN, VAL
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import raycv.model.dora as dora
from raycv.model.dora import factored_layers, prepared, use_factored
from raycv.training.loop import FoldTrainer
from raycv.training.steps import Steps

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def average_swap(model):
    """Swaps an exponential average of the weights in for validation, through `data`, as EMA hooks do."""
    averages = [parameter.detach() * 0.4 for parameter in trained(model)]
    for parameter, average in zip(trained(model), averages, strict=True):
        parameter.data.copy_(average)


def update_by_hand(model):
    for parameter in trained(model):
        parameter.data -= 0.5 * parameter.grad


def new_storage(model):
    for parameter in trained(model):
        parameter.data = parameter.data.clone() + 0.1


def through_numpy(model):
    for parameter in trained(model):
        parameter.detach().numpy()[...] *= 1.5


def from_a_vector(model):
    vector = nn.utils.parameters_to_vector(trained(model)).detach()
    nn.utils.vector_to_parameters(vector * 1.5, trained(model))


def of_the_base(model):
    model.base_model.model.proj.get_base_layer().weight.data.mul_(1.5)


def by_loading(model, *, assign):
    half = {name: value / 2 for name, value in model.state_dict().items() if "lora_" in name}
    model.load_state_dict(half, strict=False, assign=assign)


def by_an_optimizer(model, *, make):
    make(trained(model)).step()


def another_scale(model):
    model.base_model.model.proj.scale_layer(0.5)


def merged_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def of_another_type(model):
    model.bfloat16().double()


WRITES = {
    "an average of weights": average_swap,
    "an update by hand": update_by_hand,
    "new storage": new_storage,
    "numpy": through_numpy,
    "a vector of all": from_a_vector,
    "the base": of_the_base,
    "load_state_dict": partial(by_loading, assign=False),
    "load_state_dict, assigned": partial(by_loading, assign=True),
    "AdamW": partial(by_an_optimizer, make=partial(torch.optim.AdamW, lr=0.1)),
    "AdamW, fused": partial(by_an_optimizer, make=partial(torch.optim.AdamW, lr=0.1, fused=True)),
    "AdamW, foreach": partial(by_an_optimizer, make=partial(torch.optim.AdamW, lr=0.1, foreach=True)),
    "SGD": partial(by_an_optimizer, make=partial(torch.optim.SGD, lr=0.1)),
    "scale": another_scale,
    "merged and back": merged_and_back,
    "another type": of_another_type,
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_after_a_forward_changes_the_next_one_as_pefts(write):
    models = pair(16, 12)
    for model in models:
        before = model(X)
        before.square().sum().backward()
        WRITES[write](model)
        assert write == "merged and back" or not torch.allclose(model(X), before, rtol=1e-4)
        model.zero_grad()
    same_as_pefts(*models, X)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
def test_averages_of_weights_are_pefts(average):
    """SWA and EMA copy a model that has computed, write its average, and compute with it."""
    outputs = []
    for model in pair(16, 12):
        model(X)
        averaged = AveragedModel(model, multi_avg_fn=average)
        optimizer = torch.optim.AdamW(trained(model), lr=0.1)
        for _ in range(3):
            averaged(X)
            model(X).square().sum().backward()
            optimizer.step()
            averaged.update_parameters(model)
        outputs.append(averaged(X))
        assert not torch.allclose(outputs[-1], model(X), rtol=1e-4)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", ["olora", "pissa", "gaussian", True])
def test_an_adapter_added_after_a_forward_computes_as_pefts(start):
    """OLoRA and PiSSA also change the base, through `data`."""
    models = pair(16, 12, dtype=torch.float32)
    x = X.float()
    for model in models:
        model(x)
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(**(lora().to_dict() | {"init_lora_weights": start, "r": 3})))
    for adapter in ("default", "other", "default"):
        for model in models:
            model.set_adapter(adapter)
        torch.testing.assert_close(models[1](x), models[0](x))
    for model in models:
        model.delete_adapter("other")
    torch.testing.assert_close(models[1](x), models[0](x))


def parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss(model):
    return lambda values, x: functional_call(model, values, (x,)).square().sum()


def forward_mode(model, *, of_parameters):
    with forward_ad.dual_level():
        values = parameters(model)
        x = X
        if of_parameters:
            values = {name: forward_ad.make_dual(value, torch.ones_like(value)) for name, value in values.items()}
        else:
            x = forward_ad.make_dual(X, torch.ones_like(X))
        return forward_ad.unpack_dual(functional_call(model, values, (x,))).tangent


def traced_before_a_write(model):
    model = copy.deepcopy(model)
    compute = torch.jit.trace(model, X)
    average_swap(model)
    return compute(X + 1)


TRANSFORMS = {
    "grad of the parameters": lambda model: grad(loss(model))(parameters(model), X),
    "grad of the input": lambda model: grad(lambda x: model(x).square().sum())(X),
    "vmap": lambda model: vmap(model)(X[:, None]),
    "gradients of each sample": lambda model: vmap(grad(loss(model)), (None, 0))(parameters(model), X[:, None]),
    "jvp": lambda model: jvp(model, (X,), (X + 1,)),
    "jacrev": lambda model: jacrev(model)(X),
    "jacfwd": lambda model: jacfwd(model)(X),
    "hessian": lambda model: hessian(lambda x: model(x).square().sum())(X[0]),
    "forward mode of the input": partial(forward_mode, of_parameters=False),
    "forward mode of the parameters": partial(forward_mode, of_parameters=True),
    "trace": traced_before_a_write,
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_pefts(transform, within):
    theirs, ours = pair(16, 12)
    expected = TRANSFORMS[transform](theirs)
    ours(X)
    if within:
        with prepared(ours, torch.float64):
            computed = TRANSFORMS[transform](ours)
    else:
        computed = TRANSFORMS[transform](ours)
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-12)


def test_a_transform_that_follows_nothing_of_the_layer_is_refused_in_words():
    _, ours = pair(16, 12)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        vmap(lambda scale: scale * ours(X))(torch.ones(3))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        grad(lambda scale: (scale * ours(X)).sum())(torch.ones(()))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="earlier versions break the graph at the look at autocast")
@pytest.mark.parametrize("within", [False, True])
def test_a_layer_compiles_as_one_graph(within):
    _, ours = pair(16, 12, dropout=0.0)
    expected = outputs_and_gradients(ours, X)
    ours.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with prepared(ours, torch.float64 if within else torch.float32):
        y, gradients = outputs_and_gradients(ours, X)
        ours.zero_grad()
        compiled_y, _ = outputs_and_gradients(compiled, X)
    assert torch.equal(compiled_y, y)
    assert torch.equal(y, expected[0])
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[1][name])


@pytest.fixture
def norms(monkeypatch):
    """Grows with every norm that is computed."""
    calls = []
    real = dora.factored_norm
    monkeypatch.setattr(dora, "factored_norm", lambda *args: calls.append(1) or real(*args))
    return calls


@pytest.fixture
def base_norms(monkeypatch):
    """Grows with every norm of a base that is computed."""
    calls = []
    real = dora.square_norm
    monkeypatch.setattr(dora, "square_norm", lambda weight: calls.append(1) or real(weight))
    return calls


def test_within_a_block_the_norm_is_computed_once_per_step_and_that_of_the_base_once(norms, base_norms):
    _, ours = pair(16, 12, dropout=0.1)
    optimizer = torch.optim.AdamW(trained(ours), lr=0.1)
    with prepared(ours, torch.float64) as refresh:
        for step in range(1, 4):
            for _ in range(4):  # micro-batches
                ours(X).square().sum().backward()
            assert (len(norms), len(base_norms)) == (step, 1)
            optimizer.step()
            refresh()
            optimizer.zero_grad()
        ours.eval()(X)
        assert (len(norms), len(base_norms)) == (4, 1)
    ours(X)
    assert (len(norms), len(base_norms)) == (5, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_refreshed_values_are_those_of_a_layer_that_keeps_nothing_bit_for_bit_and_stay_in_place(dtype):
    _, ours = pair(16, 12, dtype=dtype)
    optimizer = torch.optim.AdamW(trained(ours), lr=0.1, fused=True)
    with prepared(ours, dtype) as refresh:
        places = {name: buffer.data_ptr() for name, buffer in ours.named_buffers()}
        assert len(places) == 7
        for _ in range(3):
            y, gradients = outputs_and_gradients(ours, X.to(dtype))
            expected, expected_gradients = outputs_and_gradients(copy.deepcopy(ours), X.to(dtype))
            assert torch.equal(y, expected)
            assert all(torch.equal(gradients[name], value) for name, value in expected_gradients.items())
            optimizer.step()
            refresh()
            ours.zero_grad()
        assert {name: buffer.data_ptr() for name, buffer in ours.named_buffers()} == places
    assert not list(ours.named_buffers())


def test_within_a_block_a_write_counts_from_refresh_on_and_a_new_block_sees_all():
    theirs, ours = pair(16, 12)
    with prepared(ours, torch.float64) as refresh:
        before = ours(X)
        for model in (theirs, ours):
            model.base_model.model.proj.lora_magnitude_vector["default"].weight.data.mul_(2)
        torch.testing.assert_close(ours(X), before)
        refresh()
        torch.testing.assert_close(ours(X), theirs(X), rtol=1e-12, atol=1e-12)
    of_the_base(theirs)
    of_the_base(ours)
    with prepared(ours, torch.float64):
        torch.testing.assert_close(ours(X), theirs(X), rtol=1e-12, atol=1e-12)


def test_a_block_ends_with_an_error_and_a_block_within_it_computes_nothing(norms):
    _, ours = pair(16, 12)

    def fail():
        with prepared(ours, torch.float64):
            with prepared(ours, torch.float64) as refresh:
                ours(X)
                assert len(norms) == 1
                refresh()
                assert len(norms) == 2
            ours(X)
            assert len(norms) == 2
            ours(X[:, :3])

    with pytest.raises(RuntimeError, match="shape"):
        fail()
    assert not list(ours.named_buffers())


def test_within_a_block_other_types_and_later_adapters_are_computed_as_outside():
    theirs, ours = pair(16, 12, dtype=torch.float32)
    with prepared(ours, torch.bfloat16) as refresh:
        torch.testing.assert_close(ours(X.float()), theirs(X.float()))
        for model in (theirs, ours):
            torch.manual_seed(1)
            model.add_adapter("other", lora())
            model.set_adapter("other")
        torch.testing.assert_close(ours(X.float()), theirs(X.float()))
        for model in (theirs, ours):
            model.delete_adapter("default")
        refresh()
        torch.testing.assert_close(ours(X.float()), theirs(X.float()))


def test_a_block_that_begins_while_the_adapter_is_merged_prepares_nothing():
    theirs, ours = pair(16, 12)
    ours.merge_adapter()
    with prepared(ours, torch.float64):
        ours.unmerge_adapter()
        torch.testing.assert_close(ours(X), theirs(X), rtol=1e-12, atol=1e-12)


def test_copies_pickles_and_checkpoints_hold_nothing_that_is_prepared(tmp_path):
    _, ours = pair(16, 12)
    names = ours.state_dict().keys()
    with prepared(ours, torch.float64):
        expected = ours(X)
        assert ours.state_dict().keys() == names
        again = copy.deepcopy(ours)
        torch.save(factored_layers(ours)[0], tmp_path / "layer.pt")
    for model in (again, torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert not list(model.buffers())
        torch.testing.assert_close(model(X), expected)


def test_training_may_follow_a_block_of_inference():
    theirs, ours = pair(16, 12)
    with torch.inference_mode():
        block = prepared(ours, torch.float64)
        refresh = block.__enter__()
        ours(X)
        refresh()
    same_as_pefts(theirs, ours, X)
    block.__exit__(None, None, None)


def test_within_a_block_a_layer_needs_no_more_operators_than_pefts_lora():
    """On a GPU each is a kernel to launch. Of a refresh there is none."""

    def operators(config):
        torch.manual_seed(0)
        model = get_peft_model(One(16, 12, False, torch.bfloat16), config).train()
        x = torch.randn(6, 16, dtype=torch.bfloat16, requires_grad=True)

        def micro_batch():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = model(x)
            y.sum().backward()

        with prepared(model, torch.bfloat16):
            micro_batch()  # the gradients are there now
            with Operators() as counted:
                micro_batch()
        return counted.count

    plain = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["proj"])
    assert 10 < operators(use_factored(lora(0.1))) <= operators(plain)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(toy_base(tmp_path_factory.mktemp("toy")))


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_training_computes_norms_after_its_updates_alone(toy, norms, monkeypatch, checkpointing):
    config = train_config(gradient_checkpointing=checkpointing, batch_size=2, epochs=2)
    model = toy.model(dropout=0.1)
    loop = FoldTrainer(model, toy.encoded, config, "fp32", Recorder())
    layers = len(factored_layers(model))
    assert len(norms) == 2 * layers, "one for the magnitudes at the start, and one for the check of packing"
    updates = []
    update = Steps._update
    monkeypatch.setattr(Steps, "_update", lambda self: updates.append(len(norms)) or update(self))
    loop.fit(TRAIN, VAL)
    steps = 2 * int(np.ceil(len(TRAIN) / 8))
    assert updates == [(3 + step) * layers for step in range(steps)]
    assert len(norms) == (3 + steps) * layers
    loop.scores(VAL)
    assert len(norms) == (4 + steps) * layers, "validation alone computes each norm once"
