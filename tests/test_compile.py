"""Decoder layers under torch.compile: one graph for all layers of a kind, the same losses, exact when it resumes."""

import copy
import os
from functools import partial

import numpy as np
import pytest
import torch
from support.builders import tiny_llama
from support.refusals import refuses
from support.toy import Recorder, Toy, toy_base, train_config
from support.toy_training import TRAIN, VAL
from torch import nn
from torch._dynamo.utils import counters

from raycv.training import steps
from raycv.training.loop import FoldTrainer

GRAPHS = 16
"""A line and several make 2 graphs of each layer: in training, in validation, and of the first layer in training. The
last layer has 2 in training, 2 in validation, for one read position and for several each."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(toy_base(tmp_path_factory.mktemp("toy"), partial(tiny_llama, layers=6)))


@pytest.fixture
def backend(monkeypatch):
    """Sets the backend, and counts from zero."""

    def use(name):
        monkeypatch.setattr(steps, "compiled_layers", partial(steps.compiled_layers, backend=name))
        torch.compiler.reset()
        counters.clear()

    yield use
    torch.compiler.reset()


class Keeper(Recorder):
    """Keeps the first training state too."""

    def __init__(self):
        super().__init__()
        self.state = None

    def on_state(self, state):
        self.state = self.state or copy.deepcopy(state)


def trained(toy, compile_, model=None, state=None, **changes):
    listener = Keeper()
    changes = {"compile": compile_, "epochs": 1, "batch_size": 4} | changes
    loop = FoldTrainer(model or toy.model(), toy.encoded, train_config(**changes), "fp32", listener)
    return loop.fit(TRAIN, VAL, state), listener


def losses(listener):
    return [step[3] for step in listener.steps]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": "on", "batching": "post_grouped"},
        {"gradient_checkpointing": "auto", "batch_size": "auto"},
        {"packing": False},
    ],
    ids=["checkpointed", "auto", "padded"],
)
def test_layers_of_a_kind_share_their_graphs_and_compute_the_same(toy, backend, changes):
    """Without compilation, attention is computed by document, so the losses are equal up to rounding."""
    expected, plain = trained(toy, "auto", **changes)
    backend("aot_eager")
    result, listener = trained(toy, "on", **changes)
    np.testing.assert_allclose(losses(listener), losses(plain), rtol=2e-5)
    np.testing.assert_allclose(result.val_scores, expected.val_scores, rtol=2e-4)
    assert listener.events[0].startswith("compiled 6 layers in ")
    assert not counters["graph_break"]
    assert 4 <= counters["stats"]["unique_graphs"] <= GRAPHS


def test_auto_compiles_nothing(toy, backend):
    backend("aot_eager")
    for asked in ("auto", "off"):
        _, listener = trained(toy, asked)
        assert not any(event.startswith("compiled") for event in listener.events)
    assert not counters["stats"]


@pytest.mark.slow
def test_a_compiled_fold_repeats_itself_and_resumes_to_the_last_bit(toy, backend, monkeypatch, tmp_path):
    """Dropout draws the same numbers as without compilation, so even these losses are equal up to rounding."""
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = partial(toy.model, dropout=0.1)
    _, plain = trained(toy, "off", model(), epochs=2)
    backend("inductor")
    first, listener = trained(toy, "on", model(), epochs=2)
    np.testing.assert_allclose(losses(listener), losses(plain), rtol=2e-4)
    again, twice = trained(toy, "on", model(), epochs=2)
    assert losses(twice) == losses(listener)
    np.testing.assert_array_equal(again.val_scores, first.val_scores)
    backend("inductor")  # as in another process
    resumed, rest = trained(toy, "on", model(), listener.state, epochs=2)
    assert losses(rest) == losses(listener)[-len(rest.steps) :]
    assert len(rest.steps) == len(listener.steps) // 2
    np.testing.assert_array_equal(resumed.val_scores, first.val_scores)


@pytest.mark.long
def test_a_layer_that_breaks_the_graph_is_refused_in_words(toy, backend):
    backend("eager")
    model = toy.model()
    norm = model.get_base_model().model.layers[0].input_layernorm
    norm.forward = lambda hidden: hidden if hidden.sum() > 0 else -hidden
    with refuses("base-unsuitable", "train.compile=on: ", "LlamaForSequenceClassification", "train.compile=off"):
        trained(toy, "on", model)
    assert not any("forward" in vars(layer) for layer in model.get_base_model().model.layers), (
        "the layers are as before"
    )


@pytest.mark.slow
def test_a_missing_compiler_is_refused_in_words(toy, backend, monkeypatch, tmp_path):
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    backend("inductor")
    with refuses("base-unsuitable", "train.compile=on: ", "compiler", "install g++", "train.compile=off"):
        trained(toy, "on")


def test_a_model_without_decoder_layers_is_refused_in_words(toy):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    with refuses("base-unsuitable", "train.compile=on: ", "Bare", "train.compile=off"):
        trained(toy, "on", Bare(), packing=False)
