"""Gradient checkpointing as memory allows: the same gradients either way, a choice that follows what was measured."""

import numpy as np
import pytest
import torch
from test_train import TRAIN, VAL, state
from torch import nn
from toy import Recorder, Toy, toy_base, train_config

from raycv.errors import UserError
from raycv.memory import is_out_of_memory
from raycv.train import FoldTrainer


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(toy_base(tmp_path_factory.mktemp("toy")))


def fitted(toy, asked, share=1.0, model=None, **changes):
    model, recorder = model or toy.model(dropout=0.2), Recorder()
    config = train_config(gradient_checkpointing=asked, epochs=1, share_prefix=False, **changes)
    loop = FoldTrainer(model, toy.encoded, config, "fp32", recorder, share)
    return loop, loop.fit(TRAIN, VAL), recorder, state(model)


def test_auto_on_and_off_train_the_same_to_the_last_bit(toy):
    """With dropout on: the trial of `auto` leaves neither gradients nor another random state behind."""
    _, expected, _, weights = fitted(toy, "off")
    for asked, share in (("on", 1.0), ("auto", 1.0), ("auto", 1e-9)):
        _, result, _, others = fitted(toy, asked, share)
        assert [epoch.train_loss for epoch in result.epochs] == [epoch.train_loss for epoch in expected.epochs]
        np.testing.assert_array_equal(result.val_scores, expected.val_scores)
        assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_auto_turns_it_off_where_activations_fit_and_keeps_it_where_not(toy):
    roomy, _, said, _ = fitted(toy, "auto")
    assert not roomy.checkpointing.on
    assert not roomy.model.is_gradient_checkpointing
    assert said.events[0].startswith("gradient checkpointing off: without it 0.0 GB of ")
    tight, _, said, _ = fitted(toy, "auto", 1e-9)
    assert tight.checkpointing.on
    assert tight.model.is_gradient_checkpointing
    assert said.events[0].startswith("gradient checkpointing on: without it ")


def test_what_is_measured_grows_with_the_batch_and_shrinks_with_checkpointing(toy):
    from raycv.memory import _measured

    def bytes_of(rows, checkpointing):
        model = toy.model()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        ids = torch.from_numpy(toy.encoded.input_ids[:rows].astype(np.int64))
        with _measured(model, torch.device("cpu")) as measured:
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        return measured()

    assert bytes_of(8, False) > 1.8 * bytes_of(4, False)
    assert bytes_of(8, True) < 0.5 * bytes_of(8, False)


class Tight(nn.Module):
    """A model that asks the real allocator for more than there is unless it checkpoints; `after`: passes that fit."""

    supports_gradient_checkpointing = True

    def __init__(self, inner, after):
        super().__init__()
        self.inner, self.after, self.passes = inner, after, 0
        self.gradient_checkpointing_enable = inner.gradient_checkpointing_enable
        self.gradient_checkpointing_disable = inner.gradient_checkpointing_disable

    def forward(self, input_ids, attention_mask):
        self.passes += self.training
        if self.training and self.passes > self.after and not self.inner.is_gradient_checkpointing:
            torch.empty(2**60)
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_out_of_memory_turns_checkpointing_on_before_it_halves_the_batch(toy, after):
    """At the trial itself, or in a later step, which is replayed whole."""
    _, expected, _, _ = fitted(toy, "on")
    loop, result, _, _ = fitted(toy, "auto", model=Tight(toy.model(dropout=0.2), after))
    assert loop.checkpointing.on
    assert result.epochs[0].micro_batch == 8
    assert result.events == (["out of memory: gradient checkpointing on"] if after else [])
    np.testing.assert_array_equal(result.val_scores, expected.val_scores)


def test_a_model_that_cannot_checkpoint(toy):
    model = toy.model()
    model.get_base_model().supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="does not know gradient checkpointing"):
        fitted(toy, "on", model=model)
    assert not fitted(toy, "auto", 1e-9, model=model)[0].checkpointing.on


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("anything"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_every_way_to_say_out_of_memory_is_known(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_warm_up_longer_than_the_training_is_told(toy):
    _, result, _, _ = fitted(toy, "off", warmup_steps=100)
    assert result.events == [
        "the warm-up of 100 steps takes all of the 4 steps of training, and the learning rate stays low: lower "
        "train.warmup_steps"
    ]
