"""Gradient checkpointing as memory allows: the same gradients either way, a choice that follows what was measured."""

import contextlib
from functools import partial

import numpy as np
import pytest
import torch
from support.builders import tiny_llama
from support.refusals import refuses
from support.toy import Recorder, Toy, toy_base, toy_dataset, train_config
from support.toy_training import TRAIN, VAL, Tight, state

from raycv.common.devices import is_out_of_memory
from raycv.model.adapters import trainable
from raycv.training import memory, packing
from raycv.training.loop import FoldTrainer
from raycv.training.memory import left_to_containers
from raycv.training.steps import Steps


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(toy_base(tmp_path_factory.mktemp("toy")))


def fitted(toy, asked, share=1.0, model=None, **changes):
    model, recorder = model or toy.model(dropout=0.2), Recorder()
    config = train_config(gradient_checkpointing=asked, epochs=1, packing=False, **changes)
    loop = FoldTrainer(model, toy.encoded, config, "fp32", recorder, share)
    return loop, loop.fit(TRAIN, VAL), recorder, state(model)


@pytest.mark.long
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
    assert said.events[0].startswith("gradient checkpointing on in 1 of 2 layers at most: without it ")


@pytest.mark.parametrize(("factor", "on"), [(1.01, False), (0.99, True)])
def test_auto_compares_what_was_measured_with_what_there_is_less_a_margin(toy, monkeypatch, factor, on):
    """Just more than is needed, and just less: any other measure, sum or margin would choose otherwise."""
    measured, real = [], memory.measured_peak

    @contextlib.contextmanager
    def watched(model, device):
        with real(model, device) as told:
            yield lambda: measured.append(told()) or measured[-1]

    monkeypatch.setattr(memory, "measured_peak", watched)
    model = toy.model(dropout=0.2)
    later = 12 * sum(parameter.numel() for parameter in trainable(model))  # float32: two moments and the gradient

    def there_is(device, share):
        assert device.type == "cpu"
        assert share == 0.25
        return int(factor * (measured[0] + later) / 0.85)

    monkeypatch.setattr(memory, "memory_limit", there_is)
    loop, _, said, _ = fitted(toy, "auto", share=0.25, model=model)
    assert len(measured) == 1 + on, "with checkpointing only where it does not fit without"
    assert measured[0] > 8 * toy.encoded.lengths.max() * 32 * 4  # a layer's activations of 8 rows, at the least
    assert loop.checkpointing.on == on
    assert said.events[0].startswith(f"gradient checkpointing {'on in 1 of 2 layers at most' if on else 'off'}: ")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return Toy(toy_base(tmp_path_factory.mktemp("deep"), partial(tiny_llama, layers=6)), toy_dataset(words=24))


def planned(toy, model=None, room=None, **changes):
    """A training whose passes have `room`: positions without checkpointing, and with it."""
    config = train_config(**({"gradient_checkpointing": "auto"} | changes))
    loop = FoldTrainer(model or toy.model(), toy.encoded, config, "fp32", Recorder())
    loop._prepare(TRAIN)
    if room is not None:
        loop.checkpointing.room = memory.Room(*room)
    return loop


def checkpointed(loop):
    """Which layers are checkpointed."""
    return [layer.gradient_checkpointing for layer in loop.model.get_base_model().model.layers]


@pytest.mark.parametrize("layers", range(6))
def test_auto_takes_as_few_layers_as_the_memory_demands_the_first_ones(deep, monkeypatch, layers):
    """The memory lies between what a pass needs with one layer fewer, and with these. All but the last free some."""
    loop = planned(deep)
    heaviest = loop._heaviest(TRAIN, 8)
    later = 12 * sum(parameter.numel() for parameter in trainable(loop.model))

    def needed(count):
        for index, layer in enumerate(loop.model.get_base_model().model.layers):
            layer.gradient_checkpointing = index < count
        loop.model.train()
        with memory.measured_peak(loop.model, torch.device("cpu")) as measured:
            loop.scorer.logits(heaviest).sum().backward()
        loop.model.zero_grad()
        return measured()

    fewer, these = needed(max(0, layers - 1)) if layers else 1.5 * needed(0), needed(layers)
    assert these < fewer
    monkeypatch.setattr(memory, "memory_limit", lambda device, share: int(((fewer + these) / 2 + later) / 0.85))
    loop = planned(deep)
    said = loop._choose_checkpointing(TRAIN)
    loop.checkpointing.prepare(loop.scorer.positions(heaviest))
    assert checkpointed(loop) == [True] * layers + [False] * (6 - layers)
    assert said.startswith(f"gradient checkpointing {f'on in {layers} of 6 layers at most' if layers else 'off'}: ")
    loop.checkpointing.prepare(1)
    assert not any(checkpointed(loop)), "a light pass needs none"


LAYOUTS = {
    "padded": {"packing": False},
    "packed": {"packing": True},
    "shared": {"packing": True, "batching": "post_grouped"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_largest_passes_fit_and_checkpoint_only_where_three_do_not(deep, monkeypatch, layout):
    monkeypatch.setitem(packing.FILL, "cpu", packing.FILL["cuda"])
    loop = planned(deep, batch_size="auto", effective_batch_size=30, **LAYOUTS[layout])
    assert loop.layout[True] == layout
    rows = loop.scorer.sorted(TRAIN, layout)
    whole = loop.scorer.positions(loop.scorer.even_batches(rows, 1, layout)[0])
    seen = []
    for without, most in (
        (whole, whole + 1),
        (whole - 1, whole),
        (0.4 * whole, whole),
        (0.25 * whole, whole),
        (0, 99),
    ):
        loop.checkpointing.room = memory.Room(int(without), int(most))
        batches = loop._batches(rows, 30, training=True)
        assert sorted(np.concatenate([batch.rows for batch in batches])) == TRAIN.tolist()
        sizes = [loop.scorer.positions(batch) for batch in batches]
        loop.checkpointing.prepare(max(sizes))
        seen.append((len(batches), sum(checkpointed(loop))))
        assert max(sizes) <= (without if seen[-1][1] == 0 else most)
    (one, none), (two, still_none), (three, none_yet), (as_many, few), (many, all_that_help) = seen
    assert (one, none, still_none, none_yet, all_that_help) == (1, 0, 0, 0, 5)
    assert 1 < two <= three <= as_many <= 4
    assert 0 < few < 5
    assert many > 4
    assert len(loop._batches(rows, 8, training=False)) > 1, "validation has its own batches"
    assert loop._batches(rows[:0], 30, training=True) == [], "a worker may have no part of a small step"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.float64, 1e-5)])
def test_gradients_are_the_same_for_any_layers_and_any_passes(deep, layout, dtype, close):
    """The norms of the model compute in float32 in any case, so other passes round otherwise."""
    pairs = TRAIN[:12]

    def gradients(batch_size, room=None, dropout=0.0, asked="auto"):
        torch.manual_seed(3)
        model = deep.model(dropout=dropout).to(dtype)
        changes = LAYOUTS[layout] | {"effective_batch_size": 12, "batch_size": batch_size}
        loop = planned(deep, model, room, gradient_checkpointing=asked, **changes)
        loop.model.train()
        loop._step(pairs, training=True)
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    whole = gradients(12, asked="off")
    for batch_size, room in ((1, None), (3, None), ("auto", (10**6, 10**6)), ("auto", (150, 200)), ("auto", (20, 90))):
        for name, gradient in gradients(batch_size, room).items():
            torch.testing.assert_close(gradient, whole[name], rtol=close, atol=close * 1e-2)
    # In the same passes recomputation changes no bit, although dropout draws.
    expected = gradients(4, dropout=0.2, asked="off")
    for room in ((0, 0), (100, 150), (100, 200), (150, 400), (10**6, 10**6)):
        for name, gradient in gradients(4, room, dropout=0.2).items():
            assert torch.equal(gradient, expected[name]), (room, name)


def test_the_largest_passes_are_measured_with_few_rows_and_told(deep, monkeypatch):
    tried = []
    real = Steps._heaviest
    monkeypatch.setattr(Steps, "_heaviest", lambda self, pairs, size: tried.append(size) or real(self, pairs, size))
    monkeypatch.setattr(memory, "memory_limit", lambda device, share: 8_000_000)
    loop = planned(deep, batch_size="auto", effective_batch_size=30, packing=True)
    said = loop._choose_checkpointing(TRAIN)
    assert tried == [30, 8, 8]
    without, most = loop.checkpointing.room
    assert 0 < without < most
    assert said.endswith(f"a pass has up to {without} positions without it, and {most} with it")
    assert planned(deep, batch_size=8)._choose_checkpointing(TRAIN).endswith(" of 0.0 GB")


@pytest.mark.parametrize(("asked", "fits"), [("on", (True, True)), ("off", (False, False)), ("auto", (False, True))])
def test_what_is_asked_for_decides_the_room_of_a_pass(deep, monkeypatch, asked, fits):
    monkeypatch.setattr(memory, "memory_limit", lambda device, share: 4_000_000)
    loop = planned(deep, batch_size="auto", gradient_checkpointing=asked)
    loop._choose_checkpointing(TRAIN)
    both = planned(deep, batch_size="auto")
    both._choose_checkpointing(TRAIN)
    between = sum(both.checkpointing.room) // 2
    assert tuple(loop.checkpointing.fits(between, recomputing=each) for each in (False, True)) == fits
    loop.checkpointing.prepare(between)
    assert sum(checkpointed(loop)) == {"on": 6, "off": 0}.get(asked, sum(checkpointed(loop)))


def test_out_of_memory_makes_the_largest_passes_smaller_before_it_checkpoints(toy):
    loop, result, _, _ = fitted(toy, "auto", model=Tight(toy.model(), 99, rows=2), batch_size="auto")
    assert result.events == [
        "training: out of memory: micro-batch 8 -> 4",
        "training: out of memory: micro-batch 4 -> 2",
    ]
    assert not loop.checkpointing.on
    loop, result, _, _ = fitted(toy, "auto", model=Tight(toy.model(), 2), batch_size="auto")
    assert result.events[1:] == [
        "training: out of memory: micro-batch 4 -> 2",
        "out of memory: gradient checkpointing on",
    ]
    assert loop.checkpointing.on
    assert result.epochs[0].micro_batch == 2


def test_memory_is_that_of_the_container(tmp_path):
    """Version 2, with limits on two levels; what is cached of files counts as free."""
    own, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    own.write_text("0::/jobs/7\n")
    group(mounted, 1000, 100, 0, V2)  # the root of a machine has none of these files, that of a container has
    group(mounted / "jobs", 500, 450, 30, V2)
    group(mounted / "jobs/7", "max", 440, 30, V2)
    assert list(left_to_containers(own, mounted)) == [80, 900]


def test_memory_is_that_of_a_container_of_version_1(tmp_path):
    """The path is the host's: what is mounted in the container is its group."""
    own, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    own.write_text("9:cpu:/docker/ab\n4:memory:/docker/ab\n0::/\n")
    group(mounted / "memory", 500, 600, 50, V1)
    group(mounted / "cpu", 1, 1, 0, V1)
    assert list(left_to_containers(own, mounted)) == [0]
    assert list(left_to_containers(tmp_path / "none", mounted)) == []


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def group(folder, limit, used, cached, names):
    """Writes the files of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 5\n{names[2]} {cached}\n")


def test_a_limit_below_what_the_machine_has_free_is_what_there_is(monkeypatch):
    monkeypatch.setattr(memory, "left_to_containers", lambda own: iter([2000, 1000]))
    assert memory.memory_limit(torch.device("cpu"), 0.5) == 500
    monkeypatch.setattr(memory, "left_to_containers", lambda own: iter([2**62]))
    assert 0 < memory.memory_limit(torch.device("cpu"), 1.0) < 2**50


def test_of_a_gpu_there_is_no_more_than_others_leave(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    assert memory.memory_limit(torch.device("cuda"), 1.0) == 400
    assert memory.memory_limit(torch.device("cuda"), 0.25) == 250


def test_what_is_measured_grows_with_the_batch_and_shrinks_with_checkpointing(toy):
    def bytes_of(rows, checkpointing):
        model = toy.model()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        ids = torch.from_numpy(toy.encoded.input_ids[:rows].astype(np.int64))
        with memory.measured_peak(model, torch.device("cpu")) as measured:
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        return measured()

    assert bytes_of(8, False) > 1.8 * bytes_of(4, False)
    assert bytes_of(8, True) < 0.5 * bytes_of(8, False)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.long
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
    with refuses("base-unsuitable", "train.gradient_checkpointing=on: ", "train.gradient_checkpointing=off"):
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
