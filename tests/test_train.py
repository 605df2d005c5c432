"""The loop on a two-layer Llama: what is learned, effective batch, out-of-memory, early stopping, determinism."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.refusals import refuses
from support.toy import Recorder, Toy, prompt_config, toy_base, toy_dataset, train_config
from support.toy_training import TRAIN, VAL, Greedy, state
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from raycv.training import loop as train
from raycv.training.forward import Batch, RowScorer
from raycv.training.loop import FoldTrainer
from raycv.training.metrics import METRICS, binary_metrics, tune_threshold
from raycv.training.steps import cross_entropy, epoch_order


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(toy_base(tmp_path_factory.mktemp("toy")))


def trainer(toy, model=None, recorder=None, precision="fp32", **changes):
    model = model if model is not None else toy.model()
    changes = {"packing": False} | changes  # test_packing.py has the other way
    return FoldTrainer(model, toy.encoded, train_config(**changes), precision, recorder or Recorder())


def test_first_loss_is_near_ln_2_and_training_lowers_it(toy):
    recorder = Recorder()
    result = trainer(toy, recorder=recorder, epochs=6, patience=6).fit(TRAIN, VAL)
    assert abs(recorder.steps[0][3] - math.log(2)) < 0.1
    assert result.epochs[-1].train_loss < 0.8 * result.epochs[0].train_loss


def test_only_adapters_and_head_change(toy):
    model = toy.model()
    before = state(model)
    trainer(toy, model).fit(TRAIN, VAL)
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    for part in ("lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save"):
        assert any(part in name for name in changed), part
    assert all(value.abs().sum() > 0 for name, value in state(model).items() if "lora_B" in name)


@pytest.mark.parametrize("batch_size", [8, 4, 2, 1])
@pytest.mark.long
def test_effective_batch_does_not_depend_on_the_micro_batch(toy, batch_size):
    reference, model = toy.model().double(), toy.model().double()
    trainer(toy, reference, epochs=1).fit(TRAIN, VAL)
    trainer(toy, model, epochs=1, batch_size=batch_size).fit(TRAIN, VAL)
    for name, value in state(model).items():
        # The head computes in float32, so micro-batches differ by its rounding.
        torch.testing.assert_close(value, state(reference)[name], rtol=1e-4, atol=1e-6)


def test_a_short_last_step_counts_its_own_pairs(toy):
    """The step's gradient is that of the mean loss over its pairs, here 3 pairs in micro-batches of 2 and 1."""
    model = toy.model()
    pairs = np.array([3, 9, 20])
    rows = toy.encoded.input_ids[pairs].astype(np.int64)
    mask = torch.from_numpy((np.arange(rows.shape[1])[None] < toy.encoded.lengths[pairs][:, None]).astype(np.int64))
    model.train()
    logits = model(input_ids=torch.from_numpy(rows), attention_mask=mask).logits
    functional.cross_entropy(logits, torch.from_numpy(toy.encoded.labels[pairs])).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    loop = trainer(toy, model, batch_size=2)
    loss, _, _ = loop._step(pairs, training=True)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
    assert loss / 3 == pytest.approx(
        functional.cross_entropy(logits, torch.from_numpy(toy.encoded.labels[pairs])).item(), rel=1e-5
    )


@pytest.mark.parametrize(("limit", "after"), [(4, 0), (2, 0), (1, 0), (2, 3), (1, 2)])
@pytest.mark.long
def test_out_of_memory_halves_and_replays_the_step(toy, limit, after):
    """With dropout on: the replayed step draws what a run that began with the small batch would draw."""
    reference = toy.model(dropout=0.2)
    expected = trainer(toy, reference, epochs=1, batch_size=limit).fit(TRAIN, VAL) if after == 0 else None
    recorder, greedy = Recorder(), Greedy(toy.model(dropout=0.2), limit, after)
    result = trainer(toy, greedy, recorder, epochs=1).fit(TRAIN, VAL)
    sizes = [8 // 2**i for i in range(4) if 8 // 2**i >= limit]
    assert recorder.events == [f"training: out of memory: micro-batch {a} -> {b}" for a, b in pairwise(sizes)]
    assert result.events == recorder.events
    assert result.epochs[0].micro_batch == limit
    if expected is not None:
        assert [epoch.train_loss for epoch in result.epochs] == [epoch.train_loss for epoch in expected.epochs]
        np.testing.assert_array_equal(result.val_scores, expected.val_scores)


@pytest.mark.long
def test_out_of_memory_in_the_middle_of_a_step_loses_and_doubles_nothing(toy):
    """Memory runs out at the second micro-batch of the second step: the updates are those of an undisturbed run."""
    plain = toy.model()
    trainer(toy, plain, epochs=1, batch_size=4).fit(TRAIN, VAL)
    greedy = Greedy(toy.model(), limit=2, after=3)
    trainer(toy, greedy, epochs=1, batch_size=4).fit(TRAIN, VAL)
    for name, value in state(plain).items():
        torch.testing.assert_close(state(greedy.inner)[name], value, rtol=1e-4, atol=1e-6)


def test_a_replayed_step_draws_again_what_it_drew(toy):
    """Dropout has drawn for a micro-batch when memory runs out in the second: the replay begins where the step did."""
    small, greedy = toy.model(dropout=0.2), Greedy(toy.model(dropout=0.2), limit=2, after=1)
    results = []
    for model, size in ((small, 2), (greedy, 4)):
        torch.manual_seed(7)
        results.append(trainer(toy, model, epochs=1, batch_size=size).fit(TRAIN, VAL))
    assert greedy.seen[:2] == [4, 2]
    assert [epoch.train_loss for epoch in results[0].epochs] == [epoch.train_loss for epoch in results[1].epochs]
    np.testing.assert_array_equal(results[0].val_scores, results[1].val_scores)
    assert all(torch.equal(value, state(greedy.inner)[name]) for name, value in state(small).items())


def test_out_of_memory_at_one_says_what_to_do(toy):
    with refuses("memory-full", "micro-batch of 1", "train.gradient_checkpointing=on"):
        trainer(toy, Greedy(toy.model(), limit=0)).fit(TRAIN, VAL)


def test_other_errors_are_not_taken_for_out_of_memory(toy):
    class Broken(nn.Module):
        def forward(self, **_):
            raise RuntimeError("something else")

    broken = Broken()
    broken.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match="something else"):
        trainer(toy, broken).fit(TRAIN, VAL)


def test_best_epoch_is_the_earliest_of_equals_and_patience_stops(toy):
    recorder = Recorder()
    result = trainer(toy, recorder=recorder, epochs=9, patience=3, lr=1e-12).fit(TRAIN, VAL)
    assert len(result.epochs) == 4
    assert result.best.epoch == 1
    assert [is_best for _, _, is_best in recorder.epochs] == [True, False, False, False]
    assert "stopped early after epoch 4" in result.events[-1]


def test_metrics_are_those_of_the_scores(toy):
    recorder = Recorder()
    result = trainer(toy, recorder=recorder, epochs=3, patience=3).fit(TRAIN, VAL)
    labels = toy.encoded.labels[VAL]
    best = max(result.epochs, key=lambda epoch: epoch.metrics["f1"])
    assert best.epoch == result.best.epoch
    assert result.best.threshold == tune_threshold(labels, result.val_scores)
    assert result.best.metrics == binary_metrics(labels, result.val_scores, result.best.threshold)
    assert set(result.best.metrics) == set(METRICS)


def test_same_seed_same_numbers_other_seed_others(toy):
    def run(seed):
        return trainer(toy, toy.model(seed=seed, dropout=0.1), seed=seed).fit(TRAIN, VAL)

    first, again, other = run(1), run(1), run(2)
    assert [epoch.train_loss for epoch in first.epochs] == [epoch.train_loss for epoch in again.epochs]
    np.testing.assert_array_equal(first.val_scores, again.val_scores)
    assert not np.array_equal(first.val_scores, other.val_scores)


def test_scores_do_not_depend_on_padding_or_batch(toy):
    model = toy.model()
    one = trainer(toy, model, eval_batch_size=1).scores(VAL)[0]
    many = trainer(toy, model, eval_batch_size=16).scores(VAL)[0]
    np.testing.assert_allclose(one, many, atol=1e-6)
    full = toy.encoded.input_ids[VAL].astype(np.int64)
    mask = (np.arange(full.shape[1])[None] < toy.encoded.lengths[VAL][:, None]).astype(np.int64)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(full), attention_mask=torch.from_numpy(mask)).logits
    np.testing.assert_allclose(torch.softmax(logits, -1)[:, 1].numpy(), one, atol=1e-6)


def test_class_weights_come_from_the_training_fold(toy):
    loop = trainer(toy, imbalance="weighted_loss", epochs=1)
    loop.fit(TRAIN, VAL)
    counts = np.bincount(toy.encoded.labels[TRAIN])
    np.testing.assert_allclose(loop.class_weights.numpy(), len(TRAIN) / (2 * counts), rtol=1e-6)


@pytest.mark.parametrize("batching", ["shuffled", "post_grouped"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_and_its_gradient_are_those_of_weighted_cross_entropy(toy, packed, batching):
    """The default: each pair counts by its class's weight, and the step is divided by its pairs, not by the weights."""
    model = toy.model().double()
    loop = trainer(toy, model, imbalance="weighted_loss", batching=batching, packing=packed, batch_size=4)
    assert (loop.layout[True] != "padded") == packed
    loop._prepare(TRAIN)
    weights = torch.tensor([0.5, 3.0])
    loop.class_weights = weights
    pairs = TRAIN[:11]
    labels = torch.from_numpy(toy.encoded.labels[pairs])
    assert set(labels.tolist()) == {0, 1}
    model.train()
    logits = loop.scorer.logits(Batch(pairs))
    expected = functional.cross_entropy(logits, labels, weight=weights.to(logits.dtype), reduction="sum")
    (expected / len(pairs)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss, _, _ = loop._step(pairs, training=True)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_weighted_sampling_balances_the_classes_and_is_a_function_of_the_epoch(toy):
    loop = trainer(toy, imbalance="weighted_sampling")
    orders = [epoch_order(loop.config, toy.encoded, TRAIN, epoch) for epoch in range(1, 60)]
    share = np.mean([toy.encoded.labels[order].mean() for order in orders])
    assert abs(share - 0.5) < 0.05
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[6], epoch_order(loop.config, toy.encoded, TRAIN, 7))
    loop.fit(TRAIN, VAL)  # a pair drawn twice in one step is no obstacle
    assert loop.class_weights.tolist() == [1, 1]


def test_without_sampling_each_epoch_sees_every_pair_once(toy):
    assert sorted(epoch_order(train_config(), toy.encoded, TRAIN, 3)) == TRAIN.tolist()


def test_gradient_checkpointing_changes_no_gradient(toy):
    gradients = []
    for checkpointing in (False, True):
        model = toy.model()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer(toy, model)._step(TRAIN[:8], training=True)
        model.train()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_bf16_autocast_keeps_head_adapters_and_logits_in_float32(toy):
    model = toy.model(dtype="bfloat16")
    loop = trainer(toy, model, precision="bf16", epochs=1)
    _, _, logits = loop._step(TRAIN[:4], training=True)
    assert logits.dtype == torch.float32
    # On the grid of bf16 the last 16 bits of each logit would be zero.
    assert (logits.view(torch.int32) & 0xFFFF).any()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "embed_tokens" in n} == {torch.bfloat16}
    loop.model.zero_grad()
    assert loop.fit(TRAIN, VAL).epochs[0].train_loss > 0


class Waits(TorchDispatchMode):
    """Counts the values that the host reads from tensors. On a GPU it waits for each."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("batching", ["shuffled", "post_grouped"])
def test_the_host_reads_no_value_before_the_update(toy, monkeypatch, batching):
    """For padded batches transformers reads one, to see whether a mask is needed."""
    model = toy.model(dropout=0.1)
    loop = trainer(toy, model, packing=True, batching=batching, epochs=1, gradient_checkpointing="on")
    counts = []
    update = torch.optim.AdamW.step
    with Waits() as waits:
        # AdamW reads its own step, which is on the CPU everywhere.
        monkeypatch.setattr(
            torch.optim.AdamW,
            "step",
            lambda self: (counts.append(waits.count), update(self), setattr(waits, "count", 0)),
        )
        loop._prepare(TRAIN)
        for pairs in (TRAIN[:8], TRAIN[8:16]):
            list(loop._pass([pairs], training=True))
            assert waits.count == 1, "the loss, after the update"
            waits.count = 0
    assert counts == [0, 0]


@pytest.mark.parametrize("training", [True, False])
def test_the_next_step_is_packed_before_the_host_waits_for_the_loss(toy, monkeypatch, training):
    """A device computes meanwhile. Each step is packed once."""
    loop = trainer(toy, packing=True, batch_size=4)
    loop._prepare(TRAIN)
    steps, order = [TRAIN[:8], TRAIN[8:16], TRAIN[16:21]], []
    inputs, step = RowScorer.inputs, loop._step

    def packing(self, batch):
        order.append(("packed", waits.count, set(batch.rows.tolist())))
        return inputs(self, batch)

    def computing(pairs, *args):
        order.append(("computed", waits.count, set(pairs.tolist())))
        return step(pairs, *args)

    monkeypatch.setattr(RowScorer, "inputs", packing)
    monkeypatch.setattr(loop, "_step", computing)
    monkeypatch.setattr(loop, "_update", lambda: 0.0)  # AdamW reads its own step
    with Waits() as waits:
        losses = [loss for loss, _, _ in loop._pass(steps, training=training)]
    assert len(losses) == 3
    computed = [index for index, (kind, _, _) in enumerate(order) if kind == "computed"]
    for number, pairs in enumerate(steps):
        places = [
            index for index, (kind, _, rows) in enumerate(order) if kind == "packed" and rows <= set(pairs.tolist())
        ]
        assert set().union(*(order[index][2] for index in places)) == set(pairs.tolist())
        assert sum(len(order[index][2]) for index in places) == len(pairs)
        if number:
            assert computed[number - 1] < min(places) < max(places) < computed[number]
            assert {order[index][1] for index in places} == {number - 1}, "the losses that were read before"


def test_a_loss_that_is_no_number_in_the_middle_is_never_saved(toy):
    """The second step's loss is infinite: the first is heard of, and the second leaves no state."""

    class Keeping(Recorder):
        states = ()

        def on_state(self, state):
            self.states += (state,)

    recorder, seen = Keeping(), []

    class Infinite(Greedy):
        def forward(self, input_ids, attention_mask):
            seen.append(1)
            out = super().forward(input_ids, attention_mask)
            if len(seen) == 2:
                out.logits = out.logits * torch.inf
            return out

    loop = trainer(toy, Infinite(toy.model(), limit=99), recorder, checkpoint_minutes=1e-9)
    with refuses("training-loss", "training loss is ", "step 2 of ", "train.lr"):
        loop.fit(TRAIN, VAL)
    assert len(recorder.steps) == len(recorder.states) == 1


def test_a_loss_that_is_no_number_stops_with_a_remedy(toy):
    model = toy.model()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "modules_to_save" in n).fill_(float("nan"))
    with refuses("training-loss", "training loss is nan", "epoch 1, step 1 of 4", "run.name=<new> train.lr=0.0025"):
        trainer(toy, model).fit(TRAIN, VAL)


def test_sliding_takes_the_maximum_and_counts_a_pair_once(tmp_path):
    sliding = Toy(toy_base(tmp_path), toy_dataset(words=30), prompt_config(max_length=24, long_post="sliding"))
    windows = np.bincount(sliding.encoded.pair_of_row)
    assert windows.max() > 1
    loop = trainer(sliding, sliding.model(), epochs=1)
    loop.model.eval()
    labels = sliding.encoded.labels
    scores, loss = loop.scores(VAL)
    expected = 0.0
    for pair, score in zip(VAL, scores, strict=True):
        rows = np.flatnonzero(sliding.encoded.pair_of_row == pair)
        with torch.no_grad():
            logits = loop.scorer.logits(Batch(rows))
        assert score == pytest.approx(float(torch.softmax(logits, -1)[:, 1].max()), abs=1e-6)
        # A mean over the windows of a pair, then a mean over pairs.
        expected += float(functional.cross_entropy(logits, torch.full((len(rows),), int(labels[pair]))))
    assert loss == pytest.approx(expected / len(VAL), rel=1e-5)
    assert len(loop.fit(TRAIN, VAL).val_scores) == len(VAL)


def test_rows_of_a_step_are_sorted_and_nothing_of_the_padding_is_computed(toy):
    widths = []

    class Watching(Greedy):
        def forward(self, input_ids, attention_mask):
            widths.append((tuple(input_ids.shape), int(attention_mask.sum(1).max()), int(attention_mask.sum(1).min())))
            return super().forward(input_ids, attention_mask)

    loop = trainer(toy, Watching(toy.model(), limit=99), batch_size=2)
    pairs = np.array([29, 3, 17, 8, 0, 21, 12, 5])
    _, rows, logits = loop._step(pairs, training=True)
    assert [shape[1] for shape, _, _ in widths] == [longest for _, longest, _ in widths]
    assert [longest for _, longest, _ in widths] == sorted((w[1] for w in widths), reverse=True)
    assert all(a[2] >= b[1] for a, b in pairwise(widths))
    assert sorted(rows) == sorted(pairs)
    assert logits.shape == (8, 2)


def test_validation_is_sorted_over_the_whole_fold(toy, monkeypatch):
    """And not within each look at the loss, 256 pairs apart: memory runs out at its start, if it does."""
    monkeypatch.setattr(train, "EVAL_STEP_PAIRS", 4)
    widths = []

    class Watching(Greedy):
        def forward(self, input_ids, attention_mask):
            widths.append(input_ids.shape[1])
            return super().forward(input_ids, attention_mask)

    trainer(toy, Watching(toy.model(), limit=99), eval_batch_size=2).scores(VAL)
    assert len(widths) == len(VAL) / 2
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]


ARITHMETIC = {
    "padded": {"packing": False, "warmup_steps": 3, "schedule": "linear", "imbalance": "weighted_loss"},
    "packed": {"weight_decay": 0.1, "schedule": "cosine", "imbalance": "weighted_sampling"},
    "shared": {"batching": "post_grouped", "max_grad_norm": None},
    "long posts": {},
}
NUMBERS = {
    "padded": [
        0.6679329, 0.6649041, 0.7442821, 0.7206192, 0.5679578, 0.7587101, 0.8340628, 0.6039402,
        0.48, 0.4924559, 0.4894489, 0.4885144,
    ],
    "packed": [
        0.6948109, 0.6946656, 0.6999851, 0.6930726, 0.6912278, 0.6959949, 0.6941262, 0.6922843,
        0.50, 0.5076907, 0.5042079, 0.5031159,
    ],
    "shared": [
        0.6959299, 0.6983026, 0.6783457, 0.6741242, 0.6547902, 0.6147377, 0.7034500, 0.6459858,
        0.39, 0.4048202, 0.4017563, 0.4013501,
    ],
    "long posts": [
        0.6853120, 0.6945581, 0.6813141, 0.7118728, 0.7182380, 0.6957120, 0.6247229, 0.6994591,
        0.50, 0.5404548, 0.5366424, 0.5355913,
    ],
}  # fmt: skip
"""By case: the loss of each of 8 steps, then the threshold and the first 3 validation scores."""


@pytest.mark.parametrize("case", ARITHMETIC)
def test_the_arithmetic_is_that_of_its_number(toy, tmp_path, case):
    """On one thread or two, and with the kernels of three generations of processors, these differ by 1e-7."""
    if case == "long posts":
        toy = Toy(toy_base(tmp_path), toy_dataset(words=24), prompt_config(max_length=26))
    recorder = Recorder()
    changes = {"packing": True, "lr": 1e-3} | ARITHMETIC[case]
    result = trainer(toy, toy.model(dropout=0.2), recorder, **changes).fit(TRAIN, VAL)
    numbers = [step[3] for step in recorder.steps] + [result.best.threshold, *result.val_scores[:3]]
    message = (
        f"training now gives {np.round(numbers, 7).tolist()}. If raycv's own code changed what is computed, raise "
        "NUMERICS in raycv/utils.py, and put these numbers here. Another torch may change them too."
    )
    np.testing.assert_allclose(numbers, NUMBERS[case], atol=1e-5, err_msg=message)


def test_cross_entropy_is_torchs():
    logits = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (50,))
    ours = cross_entropy(logits, labels)
    torch.testing.assert_close(ours, functional.cross_entropy(logits, labels, reduction="none"))
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    (expected,) = torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), logits)
    torch.testing.assert_close(gradient, expected)
