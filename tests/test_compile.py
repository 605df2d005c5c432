"""Decoder layers under torch.compile: one graph for all layers of a kind, the same losses, exact when it resumes."""

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


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(toy_base(tmp_path_factory.mktemp("toy"), partial(tiny_llama, layers=3)))


@pytest.fixture
def backend(monkeypatch):
    """Sets the backend, and counts from zero."""

    def use(name):
        monkeypatch.setattr(steps, "compile_layers", partial(steps.compile_layers, backend=name))
        torch.compiler.reset()
        counters.clear()

    return use


def trained(toy, compile_, model=None, state=None, listener=None, **changes):
    listener = listener or Recorder()
    changes = {"compile": compile_, "epochs": 1, "batch_size": 4} | changes
    loop = FoldTrainer(model or toy.model(), toy.encoded, train_config(**changes), "fp32", listener)
    return loop.fit(TRAIN, VAL, state), listener


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_layers_of_a_kind_share_their_graphs_and_compute_the_same(toy, backend, checkpointing):
    """Three layers, of two kinds: the last one reads. Their losses are those without compilation, bit for bit."""
    expected, plain = trained(toy, "auto", gradient_checkpointing=checkpointing)
    backend("aot_eager")
    result, listener = trained(toy, "on", gradient_checkpointing=checkpointing)
    assert [step[3] for step in listener.steps] == [step[3] for step in plain.steps]
    np.testing.assert_array_equal(result.val_scores, expected.val_scores)
    assert listener.events[0].startswith("compiled 3 layers in ")
    assert not counters["graph_break"]
    # Each kind of layer has graphs for training and evaluation, and for one line and several. The first layer's input
    # needs no gradient, which makes two more.
    assert 4 <= counters["stats"]["unique_graphs"] <= 12


def test_auto_compiles_nothing(toy, backend):
    backend("aot_eager")
    for asked in ("auto", "off"):
        _, listener = trained(toy, asked)
        assert not any(event.startswith("compiled") for event in listener.events)
    assert not counters["stats"]


def test_a_layer_that_breaks_the_graph_is_refused_in_words(toy, backend, monkeypatch):
    backend("eager")
    model = toy.model()
    norm = model.get_base_model().model.layers[0].input_layernorm
    monkeypatch.setattr(norm, "forward", lambda hidden: hidden * float(hidden.sum().item()))
    with refuses("base-unsuitable", "train.compile=on: ", "LlamaForSequenceClassification", "train.compile=off", "g++"):
        trained(toy, "on", model)


def test_a_model_without_decoder_layers_is_refused_in_words(toy):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    with refuses("base-unsuitable", "train.compile=on: ", "Bare", "train.compile=off"):
        trained(toy, "on", Bare(), packing=False)
