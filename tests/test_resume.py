"""Training that is interrupted and goes on: the same to the last bit, from states that are whole or passed over."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from support.builders import tiny_llama
from support.commands import ROOT, raycv, statuses
from support.hub_base import NAME, hub  # noqa: F401
from support.interrupted_runs import (
    RUN,
    SMALL,
    amid_an_epoch,
    assert_like_unbroken,
    resume,
    started,
    wait_for,
    without_seconds,
)
from support.refusals import refuses, said_refusal
from support.toy import Recorder, Toy, toy_base, train_config
from support.toy_training import TRAIN, VAL, Greedy, Tight

from raycv.common.environment import code_state, package_version
from raycv.common.files import array_bytes, read_json, sha256_of, write_json
from raycv.config.command_line import compose
from raycv.config.schema import RunConfig
from raycv.config.validation import validate
from raycv.cv.pipeline import cross_validate
from raycv.cv.preparation import load_data, prepare_base
from raycv.cv.resume import earlier_run, sole_process
from raycv.cv.resumed_run import earlier_store
from raycv.errors import FaultsError, RunFailedError, UserError, counted
from raycv.model.base_files import checksum as base_sha256
from raycv.model.base_model import fetch_base
from raycv.model.loading import load_config, load_tokenizer
from raycv.results.find_run import recorded_config
from raycv.results.run_folder import RunFolder, resume_command
from raycv.training import memory
from raycv.training.loop import FoldTrainer
from raycv.training.metrics import METRICS
from raycv.training.state import FACTS, MANIFEST, TENSORS, WRITER, StateFolder, TrainState
from raycv.utils import NUMERICS

STEPS = 4
"""Optimizer steps of an epoch: 30 pairs in steps of 8."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(toy_base(tmp_path_factory.mktemp("toy")))


def taken(folder):
    states = StateFolder(folder)
    states.take()
    return states


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """The power goes."""


class Saver(Recorder):
    """Saves states to a folder, as a fold's worker does; stops in step `stop` of all, before it is saved."""

    def __init__(self, folder=None, stop=None):
        super().__init__()
        self.folder, self.stop, self.count = folder and taken(folder), stop, 0
        self.last = None

    def on_step(self, *step):
        super().on_step(*step)
        self.count += 1
        if self.count == self.stop:
            raise Stopped

    def on_state(self, state):
        self.last = (state.epoch, state.step, {name: tensor.clone() for name, tensor in state.tensors.items()})
        if self.folder:
            self.folder.save(state)


CASES = {
    "warm-up and weighted loss": {"warmup_steps": 3, "schedule": "linear", "imbalance": "weighted_loss"},
    "weighted sampling": {"imbalance": "weighted_sampling", "schedule": "cosine"},
    "post-grouped and shared": {"batching": "post_grouped", "packing": True, "gradient_checkpointing": "on"},
    "early stopping": {"epochs": 4, "patience": 1, "lr": 1e-12},
    "out of memory": {},
    "checkpointing by need": {"gradient_checkpointing": "auto"},
}


def fit(toy, case, listener, state=None, rank=0, **changes):
    """A training of `case` from a fresh model, or on from `state`. Returns the result and all that it left."""
    model = toy.model(dropout=0.2)
    if rank:
        torch.manual_seed(rank)
    if case == "out of memory":
        # Memory runs out in the third step of all, at either size above 2; validation is not touched.
        model = Greedy(model, limit=2, after=2 if state is None else 0)
    if case == "checkpointing by need":
        model = Tight(model, after=3 if state is None else 0)
    config = train_config(**({"packing": False, "checkpoint_minutes": 1e-9} | CASES[case] | changes))
    trainer = FoldTrainer(model, toy.encoded, config, "fp32", listener)
    result = trainer.fit(TRAIN, VAL, state)
    return result, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    """Whether two trainings came to the same, to the last bit; only their seconds may differ."""
    (result, weights), (expected, expected_weights) = one, other
    assert [replace(epoch, seconds=0) for epoch in result.epochs] == [replace(e, seconds=0) for e in expected.epochs]
    assert replace(result.best, seconds=0) == replace(expected.best, seconds=0)
    assert result.events == expected.events
    np.testing.assert_array_equal(result.val_scores, expected.val_scores)
    assert (result.epoch_scores is None) == (expected.epoch_scores is None)
    if expected.epoch_scores is not None:
        assert array_bytes(result.epoch_scores) == array_bytes(expected.epoch_scores)
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def same_state(one, other):
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    assert [name for name in one[2] if not torch.equal(one[2][name], other[2][name])] == []


def interrupted(toy, case, folder, stop, **changes):
    """Trains until step `stop`, then goes on from the disk in a fresh trainer. Returns its fit, saver and state."""
    with pytest.raises(Stopped):
        fit(toy, case, Saver(folder, stop), **changes)
    warnings = []
    state = StateFolder(folder).newest(warnings.append)
    assert warnings == []
    # The generator is anywhere when a process starts anew.
    torch.manual_seed(12345)
    saver = Saver(folder)
    return fit(toy, case, saver, state, **changes), saver, state


@pytest.mark.parametrize("case", CASES)
@pytest.mark.long
def test_a_training_that_goes_on_is_the_unbroken_one(toy, tmp_path, monkeypatch, case):
    """Stopped in the first epoch, in its last step, and in the second; saving itself changes nothing either."""
    # A state records the room, and the memory that a machine has left varies.
    monkeypatch.setattr(memory, "memory_limit", lambda device, share: 10**9)
    unbroken = Saver()
    expected = fit(toy, case, unbroken)
    same(fit(toy, case, Saver(), checkpoint_minutes=None), expected)
    for stop in (3, STEPS, STEPS + 2):
        resumed, saver, state = interrupted(toy, case, tmp_path / str(stop), stop)
        assert (state.epoch, state.step) == divmod(stop - 1, STEPS)
        assert saver.steps[0][:2] == (state.epoch + 1, state.step + 1)
        same(resumed, expected)
        same_state(saver.last, unbroken.last)
        assert resumed[0].epochs[0].seconds > 0


@pytest.mark.long
def test_a_training_that_stops_at_every_step_is_the_unbroken_one(toy, tmp_path):
    """Ten processes, each of which dies in its second step."""
    case = "warm-up and weighted loss"
    expected = fit(toy, case, Saver())
    for _ in range(20):
        try:
            resumed = fit(toy, case, Saver(tmp_path, stop=2), StateFolder(tmp_path).newest(pytest.fail))
        except Stopped:
            continue
        break
    same(resumed, expected)


@pytest.mark.parametrize("stop", [2, STEPS + 1])
def test_without_minutes_it_goes_on_from_the_last_epoch(toy, tmp_path, stop):
    case = "weighted sampling"
    expected = fit(toy, case, Saver())
    resumed, saver, state = interrupted(toy, case, tmp_path, stop, checkpoint_minutes=None)
    assert state is None if stop < STEPS else (state.epoch, state.step) == (1, 0)
    assert saver.steps[0][:2] == (1 if stop < STEPS else 2, 1)
    same(resumed, expected)


def test_what_stopped_early_stops_again_and_is_told_once(toy, tmp_path):
    """The process died after the last epoch was saved, before the fold was finished."""
    expected = fit(toy, "early stopping", Saver(tmp_path))
    again = Saver()
    resumed = fit(toy, "early stopping", again, StateFolder(tmp_path).newest(pytest.fail))
    assert (again.steps, again.epochs) == ([], [])
    assert len(resumed[0].events) == 1
    same(resumed, expected)


def test_the_model_is_left_with_the_best_epoch(toy):
    """Two epochs that are worse do not change it."""
    first, weights = fit(toy, "early stopping", Saver(), epochs=1)
    last, kept = fit(toy, "early stopping", Saver(), patience=2)
    assert (len(last.epochs), last.best.epoch) == (3, 1)
    assert all(torch.equal(weights[name], kept[name]) for name in weights)
    np.testing.assert_array_equal(first.val_scores, last.val_scores)


def half_a_fold(toy, folder, **changes):
    """The state of a training that stopped in its second epoch, and what the unbroken one comes to."""
    case = "warm-up and weighted loss"
    expected = fit(toy, case, Saver(), **changes)
    with pytest.raises(Stopped):
        fit(toy, case, Saver(folder, stop=STEPS + 2), **changes)
    return case, StateFolder(folder).newest(pytest.fail), expected


def test_checkpointing_that_is_asked_for_as_it_goes_on_is_done_and_changes_no_bit(toy, tmp_path):
    """The remedy of a fold that ran out of memory."""
    case, state, expected = half_a_fold(toy, tmp_path)
    saver = Saver()
    same(fit(toy, case, saver, state, gradient_checkpointing="on"), expected)
    # (training batch, validation batch, checkpointing) of the one worker.
    assert saver.last[2]["workers.sizes"].tolist() == [[8, 4, 1]]
    same(fit(toy, case, saver, state, gradient_checkpointing="off"), expected)
    assert saver.last[2]["workers.sizes"].tolist() == [[8, 4, 0]]


@pytest.mark.parametrize("packing", [False, True])
def test_the_largest_passes_that_fitted_are_taken_again_where_others_fit(toy, tmp_path, monkeypatch, packing):
    """Dropout draws by passes: those of a machine with more memory would be another training."""
    small = {"batch_size": "auto", "gradient_checkpointing": "auto", "effective_batch_size": 8, "packing": packing}

    def memory_of(bytes_):
        monkeypatch.setattr(memory, "memory_limit", lambda device, share: bytes_)

    memory_of(700_000)
    expected = fit(toy, "weighted sampling", Saver(), **small)
    memory_of(10**12)
    whole = fit(toy, "weighted sampling", Saver(), **small)
    assert not np.array_equal(expected[0].val_scores, whole[0].val_scores)
    memory_of(700_000)
    with pytest.raises(Stopped):
        fit(toy, "weighted sampling", Saver(tmp_path, STEPS + 2), **small)
    kept = StateFolder(tmp_path).newest(pytest.fail)
    memory_of(10**12)
    saver = Saver()
    same(fit(toy, "weighted sampling", saver, kept, **small), expected)
    assert torch.equal(saver.last[2]["workers.room"], kept.tensors["workers.room"])
    same(fit(toy, "weighted sampling", Saver(), kept, **(small | {"gradient_checkpointing": "on"})), expected)


@pytest.mark.parametrize("on", [0, 1])
def test_a_state_of_an_earlier_version_has_no_room_and_keeps_its_choice(toy, tmp_path, on):
    case, state, expected = half_a_fold(toy, tmp_path, gradient_checkpointing="auto")
    tensors = {name: one for name, one in state.tensors.items() if name != "workers.room"}
    tensors["workers.sizes"] = torch.tensor([[8, 4, on]])
    saver = Saver()
    same(fit(toy, case, saver, replace(state, tensors=tensors), gradient_checkpointing="auto"), expected)
    assert saver.last[2]["workers.sizes"].tolist() == [[8, 4, on]]
    assert saver.last[2]["workers.room"].tolist() == [[0, 0]]


@pytest.mark.long
def test_the_scores_of_every_epoch_are_kept_unless_an_earlier_version_did_not_save_them(toy, tmp_path):
    case, state, expected = half_a_fold(toy, tmp_path)
    saver = Saver()
    resumed = fit(toy, case, saver, state)
    every = resumed[0].epoch_scores
    assert (every.dtype, every.shape) == (np.float64, (2, len(VAL)))
    np.testing.assert_array_equal(every[resumed[0].best.epoch - 1], resumed[0].val_scores)
    np.testing.assert_array_equal(every[1], saver.epochs[0][1])
    assert not np.array_equal(*every)
    earlier = replace(state, tensors={name: one for name, one in state.tensors.items() if name != "epoch_scores"})
    resumed = fit(toy, case, Saver(tmp_path), earlier)
    assert resumed[0].epoch_scores is None
    same((replace(resumed[0], epoch_scores=every), resumed[1]), expected)
    # Its own states lack them too, so a later process makes up nothing.
    assert fit(toy, case, Saver(), StateFolder(tmp_path).newest(pytest.fail))[0].epoch_scores is None


def test_another_precision_is_refused(toy, tmp_path):
    """A fold that began on a GPU in bf16 does not go on in fp32."""
    case, state, _ = half_a_fold(toy, tmp_path)
    with refuses("resume-differs", "in bf16", "in fp32"):
        fit(toy, case, Saver(), replace(state, facts=state.facts | {"precision": "bf16"}))


def test_another_attention_is_refused(toy, tmp_path):
    """A fold that began where the kernel was right, or before its attention was recorded, mixes no two functions."""
    case, state, expected = half_a_fold(toy, tmp_path)
    assert state.facts["attention"] == "sdpa"
    with refuses("resume-differs", "trained with eager attention", "with sdpa"):
        fit(toy, case, Saver(), replace(state, facts=state.facts | {"attention": "eager"}))
    earlier = replace(state, facts={name: fact for name, fact in state.facts.items() if name != "attention"})
    same(fit(toy, case, Saver(), earlier), expected)
    plain = FoldTrainer(toy.model(), toy.encoded, train_config(packing=False), "fp32", Saver())
    plain.model.get_base_model().set_attn_implementation("eager")
    with refuses("resume-differs", "trained with sdpa attention", "with eager"):
        plain.fit(TRAIN, VAL, earlier)


def test_another_number_of_threads_is_told(toy, tmp_path):
    case, state, expected = half_a_fold(toy, tmp_path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        result, _ = fit(toy, case, Saver(), state)
    finally:
        torch.set_num_threads(before)
    now, then = (f"cpu ({counted(number, 'thread')})" for number in (before + 1, before))
    warning = f"Warning: resumes with {now}, and had {then}: numbers may differ in their last bits"
    assert result.events == [*expected[0].events, warning]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_a_training_goes_on_with_its_own_random_state(toy, tmp_path):
    """As near as its kernels repeat themselves; another draw of dropout would be far off."""
    case, state, (expected, _) = half_a_fold(toy, tmp_path)
    assert "workers.cuda" in state.tensors
    torch.cuda.manual_seed(12345)
    result, _ = fit(toy, case, Saver(), state)
    losses = [[epoch.train_loss for epoch in one.epochs] for one in (result, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    np.testing.assert_allclose(result.val_scores, expected.val_scores, atol=1e-5)


def as_worker(rank, folder):
    """One of two workers that stop in the second epoch and go on: each finds its own random state again."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    toy, case = Toy(toy_base(folder / str(rank))), "warm-up and weighted loss"
    expected = fit(toy, case, Saver(), rank=rank)
    with pytest.raises(Stopped):
        fit(toy, case, Saver(None if rank else folder / "state", stop=STEPS + 3), rank=rank)
    torch.distributed.barrier()
    state = StateFolder(folder / "state").newest(pytest.fail)
    assert (state.epoch, state.step) == (1, 2)
    mine, others = state.tensors["workers.cpu"]
    assert not torch.equal(mine, others)
    torch.manual_seed(12345)
    same(fit(toy, case, Saver(), state), expected)
    torch.distributed.destroy_process_group()


@pytest.mark.core
@pytest.mark.slow
def test_two_workers_go_on_each_with_its_own_random_state(tmp_path):
    code = "import sys; from pathlib import Path; from test_resume import as_worker;"
    code += "as_worker(int(sys.argv[1]), Path(sys.argv[2]))"
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], cwd=Path(__file__).parent)
        for rank in range(2)
    ]
    assert [worker.wait(timeout=400) for worker in workers] == [0, 0]


def state_of(epoch, step=0):
    tensors = {"a": torch.arange(6, dtype=torch.float32).view(2, 3) + epoch, "random": torch.arange(9).byte()}
    return TrainState(epoch, step, {"loss": 0.1 + 0.2, "epochs": []}, tensors)


def damage(folder, kind):
    file = folder / {"facts": FACTS, "manifest": MANIFEST}.get(kind, TENSORS)
    content = bytearray(file.read_bytes())
    if kind == "flipped":
        content[-3] ^= 1
    if kind == "facts":
        content[len(content) // 2] ^= 8
    if kind == "truncated":
        del content[len(content) // 2 :]
    file.unlink()
    if kind not in ("missing", "manifest"):
        file.write_bytes(content)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing", "facts", "manifest"])
def test_a_damaged_state_is_passed_over_with_a_warning(tmp_path, kind):
    store = taken(tmp_path)
    store.save(state_of(1))
    store.save(state_of(1, 7))
    damage(tmp_path / "000001-000000007", kind)
    warnings = []
    store = taken(tmp_path)
    found = store.newest(warnings.append)
    assert str(found) == "epoch 1"
    assert torch.equal(found.tensors["a"], state_of(1).tensors["a"])
    assert found.facts == state_of(1).facts
    assert len(warnings) == 1
    assert "000001-000000007 is damaged and passed over" in warnings[0]
    # Written again, it takes the damaged one's place; the good one is kept.
    store.save(state_of(1, 7))
    assert str(StateFolder(tmp_path).newest(pytest.fail)) == "epoch 1 and step 7 of the next"
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["000001-000000000", "000001-000000007"]


def test_nothing_whole_is_nothing(tmp_path):
    warnings = []
    assert StateFolder(tmp_path / "nowhere").newest(warnings.append) is None
    taken(tmp_path).save(state_of(1))
    damage(tmp_path / "000001-000000000", "manifest")
    assert StateFolder(tmp_path).newest(warnings.append) is None
    assert len(warnings) == 1


def test_the_newest_two_are_kept_and_what_a_killed_process_left_goes(tmp_path):
    (tmp_path / ".new-killed" / "state").mkdir(parents=True)
    store = taken(tmp_path)
    for epoch in range(1, 4):
        store.save(state_of(epoch))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002-000000000", "000003-000000000", WRITER]


def test_a_process_that_lives_on_when_another_has_gone_on_writes_no_more(tmp_path):
    """As the worker of a node that the cluster has lost but that runs, or of a cluster that is gone."""
    old, new = taken(tmp_path), taken(tmp_path)
    new.save(state_of(1))
    for late in (old.check_writer, lambda: old.save(state_of(2))):
        with refuses("run-busy", tmp_path, error=RunFailedError):
            late()
    assert str(StateFolder(tmp_path).newest(pytest.fail)) == "epoch 1"
    new.save(state_of(2))
    shutil.rmtree(tmp_path)
    with refuses("run-busy", tmp_path, error=RunFailedError):
        old.save(state_of(3))
    assert not tmp_path.exists()


def save_on_and_on(folder, said):
    """Saves states of some megabytes, one after another, and writes the number of each that is there to `said`."""
    store = taken(folder)
    for epoch in range(1, 10_000):
        store.save(replace(state_of(epoch), tensors={"a": torch.full((500_000,), float(epoch))}))
        os.write(said, epoch.to_bytes(4, "big"))


def killed_while_it_saves(folder, after):
    """The number of the last state that a process had saved when it was killed, `after` seconds behind its second."""
    hears, said = os.pipe()
    process = os.fork()
    if not process:
        try:
            save_on_and_on(folder, said)
        finally:
            os._exit(1)
    os.close(said)
    with os.fdopen(hears, "rb") as heard:
        heard.read(8)
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return int.from_bytes(heard.read()[-4:], "big") or 2


@pytest.mark.long
def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_state(tmp_path):
    """At twenty moments of a save, each a real SIGKILL."""
    halves = 0
    for number in range(20):
        folder = tmp_path / str(number)
        saved = killed_while_it_saves(folder, number / 1000)
        halves += any(path.name.startswith(".new-") for path in folder.iterdir())
        found = StateFolder(folder).newest(pytest.fail)
        assert found.epoch in (saved, saved + 1)
        assert torch.equal(found.tensors["a"], torch.full((500_000,), float(found.epoch)))
        # And the one before it.
        assert len(list(folder.glob("0*"))) >= 2
        shutil.rmtree(folder)
    assert halves > 3


def test_state_files_are_the_users_alone_and_hold_no_pickle(toy, tmp_path):
    old = os.umask(0)
    try:
        fit(toy, "weighted sampling", Saver(tmp_path), epochs=1)
    finally:
        os.umask(old)
    (folder,) = [path for path in tmp_path.iterdir() if path.name == "000001-000000000"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in folder.iterdir()) == sorted((TENSORS, FACTS, MANIFEST))
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for name in (FACTS, MANIFEST):
        json.loads((folder / name).read_text())
    # A safetensors file is a length, a JSON header and numbers: no zip, no pickle opcodes to run.
    content = (folder / TENSORS).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert all(set(entry) <= {"dtype", "shape", "data_offsets"} for entry in header.values())


def test_a_full_disk_is_told_and_leaves_the_earlier_state(tmp_path):
    """A real one is in the fault matrix; here the folder is a file's."""
    (tmp_path / "file").write_text("")
    with refuses("disk-unwritable", tmp_path / "file", "resume the run"):
        StateFolder(tmp_path / "file" / "state").take()


# --- A run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A folder with run `mine` as a killed process leaves it, but for its MLflow run; made without Ray."""
    from raycv.cv.new_run import write_inputs
    from raycv.orchestration.fold_task import Prepared

    folder = tmp_path_factory.mktemp("unfinished")
    shutil.copytree(ROOT / "data/sample", folder / "data")
    places = [f"data.dir={folder / 'data'}", f"data.criteria_dir={folder / 'data'}"]
    config = validate(
        RunConfig,
        compose(
            "run", [*SMALL, "train.gradient_checkpointing=off", *places, f"run.dir={folder / 'runs'}", "run.name=mine"]
        ),
    )
    dataset, splits = load_data(config)
    run = RunFolder(folder / "runs" / "mine")
    prepared = Prepared(dataset, splits, None, None, None, prepare_base(config).facts, {}, [])  # type: ignore[arg-type]
    run.root.mkdir(parents=True)
    write_inputs(run, config, prepared)
    write_json(run.tracking, {"uri": "sqlite:///nowhere.db", "experiment_id": "1", "parent_run_id": "x"})
    return run


@pytest.fixture
def left(unfinished, tmp_path):
    """A copy of it, whose data may be changed."""
    shutil.copytree(unfinished.root.parent.parent, tmp_path, dirs_exist_ok=True)
    run = RunFolder(tmp_path / "runs" / "mine")
    moved = run.config.read_text().replace(str(unfinished.root.parent.parent), str(tmp_path))
    run.config.write_text(moved)
    changed(run.environment, config_sha256=sha256_of(run.config))
    return run


def changed(file, **values):
    write_json(file, read_json(file) | values)


def refused(run, *overrides, **environment):
    result = raycv("run", *overrides, cwd=run.root.parent.parent, **environment)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.long
def test_another_config_is_refused_with_the_difference(left):
    said = refused(left, "resume=latest", *SMALL, "train.lr=2e-4", "model=mentallama")
    # The default itself, since it was typed; and what a group sets.
    said_refusal(
        said,
        "resume-differs",
        "train.lr: the run has 0.002, the command line 0.0002",
        "model.name: the run has raycv://models/tiny_llama, the command line klyang/MentaLLaMA-chat-7B",
        "2 faults",
        "python -m raycv.run resume=mine",
        "python -m raycv.run run.name=<new>",
    )


@pytest.mark.long
def test_the_same_config_and_where_it_runs_are_no_difference(left):
    """Refused only for the store that this run never had."""
    same = [*SMALL, "resume=mine", "run.name=mine", "train.gradient_checkpointing=off"]
    said = refused(left, *same, "cv.max_concurrent=1", "resources.ray_logs=true")
    said_refusal(said, "tracking-store", "nowhere.db")


def test_a_run_of_before_the_key_keeps_nan_as_text(left):
    """An earlier version trained on such posts: without them the run would be refused, for it would be another."""
    data = left.root.parent.parent / "data"
    post_id = next(csv.reader((data / "posts.csv").read_text().splitlines()[1:]))[0]
    lines = (data / "posts.csv").read_text().splitlines(keepends=True)
    rows = list(csv.reader(lines))
    rows[1][rows[0].index("post")] = "NaN"
    with (data / "posts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert left.config.read_text().count("  missing: empty\n") == 1
    left.config.write_text(left.config.read_text().replace("  missing: empty\n", ""))
    given = validate(RunConfig, compose("run", ["resume=mine", f"run.dir={left.root.parent}"]))
    earlier = earlier_run(given, ())
    assert earlier.config.data.missing == "text"
    assert load_data(earlier.config)[0].posts[post_id] == "NaN"
    assert recorded_config(left).data.missing == "text"
    (fault,) = earlier_run(given, ["data.missing"]).faults
    assert fault == "data.missing: the run has text, the command line empty"


@pytest.mark.parametrize("table", ["posts.csv", "groundtruth.csv", "criteria.csv"])
@pytest.mark.long
def test_other_data_is_refused_with_the_difference(left, table):
    file = left.root.parent.parent / "data" / table
    lines = file.read_text().splitlines()
    if table == "groundtruth.csv":
        last = lines[-1].rsplit(",", 1)
        lines[-1] = ",".join([last[0], {"yes": "no", "no": "yes", "0": "1", "1": "0"}[last[1]]])
    else:
        first, last = (line.split(",") for line in (lines[0], lines[-1]))
        # No comma and no quote in this line's text.
        last[first.index("post" if table == "posts.csv" else "criterion")] += " more"
        lines[-1] = ",".join(last)
    file.write_text("\n".join(lines) + "\n")
    said = refused(left, "resume=mine")
    what = "hash of the criteria" if table == "criteria.csv" else "hash of posts and labels"
    said_refusal(said, "resume-differs", f"data, {what}: ")
    assert re.search(rf"data, {what}: \w+\S* then, \w+\S* now", said), said
    assert "more" not in said.split("What to do")[0]


@pytest.mark.long
def test_other_splits_and_versions_are_refused_with_the_difference(left):
    splits = read_json(left.splits)
    one, other = splits["folds"]
    one["val_indices"][0], other["val_indices"][0] = other["val_indices"][0], one["val_indices"][0]
    write_json(left.splits, splits)
    environment = read_json(left.environment)
    torch_now = environment["packages"]["torch"]
    environment["packages"] |= {"torch": "2.6.0", "peft": "0.0.9", "mlflow": "3.0"}
    write_json(left.environment, environment)
    said = refused(left, "resume=latest")
    faults = ("splits: 2 folds of 2", "splits.json", f"torch: 2.6.0 then, {torch_now} now", "peft: 0.0.9 then, ")
    said_refusal(said, "resume-differs", "3 faults", *faults)


def test_an_edited_config_is_refused(left):
    """The file is valid, and not what the run was trained with."""
    recorded = sha256_of(left.config)
    left.config.write_text(left.config.read_text().replace("epochs: 3", "epochs: 77"))
    earlier = earlier_run(validate(RunConfig, compose("run", ["resume=mine", f"run.dir={left.root.parent}"])), ())
    with refuses("resume-differs", "1 fault", "config.yaml", f"sha256: {recorded[:28]}", "MLflow's parent run"):
        earlier.check(*load_data(earlier.config))


def test_a_hub_model_with_a_new_commit_goes_on_from_the_one_that_it_had(left, hub):
    base = read_json(left.environment)["base_model"]
    files = {name: (ROOT / "models/tiny_llama" / name).read_bytes() for name in base["files"]}
    then, now = hub.add(NAME, files), hub.add(NAME, {**files, "README.md": b"new"})
    left.config.write_text(left.config.read_text().replace("raycv://models/tiny_llama", NAME))
    changed(left.environment, base_model=base | {"revision": then}, config_sha256=sha256_of(left.config))

    def asked_for(*typed):
        values = compose("run", ["resume=mine", f"run.dir={left.root.parent}", *typed])
        return earlier_run(validate(RunConfig, values), {word.partition("=")[0] for word in typed})

    for typed in ([], [f"model.revision={then}"], ["model.revision=null"]):
        earlier = asked_for(*typed)
        assert (earlier.faults, earlier.config.model.revision) == ((), then)
    earlier.check_base(prepare_base(earlier.config).facts)
    assert hub.count(now) == 0
    assert asked_for(f"model.revision={now}").faults == (f"model.revision: the run has {then}, the command line {now}",)


def go_on(run, *words):
    """What `resume=` of `run` with these words on the command line would go on with."""
    typed = {word.partition("=")[0] for word in words}
    return earlier_run(
        validate(RunConfig, compose("run", ["resume=mine", f"run.dir={run.root.parent}", *words])), typed
    )


def test_every_package_that_numbers_come_from_must_be_the_same(left):
    environment = read_json(left.environment)
    environment["packages"] = dict.fromkeys(environment["packages"], "0.0.1")
    write_json(left.environment, environment)
    earlier = go_on(left)
    with pytest.raises(FaultsError) as caught:
        earlier.check(*load_data(earlier.config))
    assert sorted(fault.partition(":")[0] for fault in caught.value.faults) == [
        "accelerate", "numpy", "peft", "scikit-learn", "tokenizers", "torch", "transformers"
    ]  # fmt: skip


def result_of(fold, **changes):
    """`result.json` of a finished fold, as the first version of raycv wrote it."""
    metrics = dict.fromkeys(METRICS, 0.5)
    values = {"fold": fold, "threshold": 0.5, "best_epoch": 1, "epochs": 1, "metrics": metrics, "seconds": 1.0}
    values |= {"train_pairs": 1, "val_pairs": 1, "val_matched": 1, "history": [], "events": [], "worker": {}}
    return values | {"sha256": {}} | changes


def faults_of(run):
    """What a run that is resumed is refused for."""
    earlier = go_on(run)
    try:
        earlier.check(*load_data(earlier.config))
    except FaultsError as error:
        return error.faults
    return []


def test_another_version_of_raycv_alone_is_no_difference(left):
    """Nor is a run of the first version, whose records name no number of the arithmetic."""
    environment = read_json(left.environment)
    del environment["numerics"]
    environment["packages"]["raycv"] = "0.0.9"
    write_json(left.environment, environment)
    write_json(left.fold(0).result, result_of(0))
    assert faults_of(left) == []
    (warning,) = (line for line in go_on(left).warnings() if line.startswith("raycv's version"))
    assert warning.startswith(f"raycv's version: 0.0.9 then, {package_version('raycv')} now")


@pytest.mark.parametrize("where", ["the run", "a finished fold"])
def test_another_arithmetic_is_refused_even_where_no_fold_has_a_state(left, where):
    if where == "the run":
        changed(left.environment, numerics=NUMERICS + 1)
        write_json(left.fold(0).result, result_of(0, numerics=NUMERICS + 1))
    else:
        write_json(left.fold(0).result, result_of(0, numerics=NUMERICS + 1))
    (fault,) = faults_of(left)
    then = NUMERICS + 1 if where == "the run" else f"{NUMERICS} and {NUMERICS + 1}"
    assert fault.startswith(f"the number of raycv's arithmetic: {then} then, {NUMERICS} now; the run began with raycv ")


def test_a_number_that_is_raised_refuses_the_runs_of_the_first_version(left, monkeypatch):
    environment = read_json(left.environment)
    del environment["numerics"]
    write_json(left.environment, environment)
    monkeypatch.setattr("raycv.cv.resume.NUMERICS", 2)
    (fault,) = faults_of(left)
    assert fault.startswith("the number of raycv's arithmetic: 1 then, 2 now; the run began with raycv 0.1.0, commit ")


@pytest.mark.parametrize(("key", "name"), [("format", "format"), ("numerics", "number of the arithmetic")])
def test_a_state_of_another_version_is_refused_in_words_and_not_passed_over(left, key, name):
    """The fold would start again from nothing, or mix two arithmetics; the driver sees it before Ray starts."""
    states = taken(left.fold(1).state)
    states.save(state_of(1))
    states.save(state_of(2))
    manifest = left.fold(1).state / "000002-000000000" / MANIFEST
    now = read_json(manifest)[key]
    changed(manifest, **{key: now + 1})
    parts = (
        manifest.parent,
        f"its {name} is {now + 1}",
        f"has {now}",
        "the raycv that began the run",
        "run.name=<new>",
    )
    for look in (lambda: StateFolder(left.fold(1).state).newest(pytest.fail), go_on(left).check_states):
        with refuses("package-version", *parts):
            look()


@pytest.mark.long
def test_the_command_refuses_a_state_of_another_version_before_ray_starts(left):
    taken(left.fold(1).state).save(state_of(1))
    changed(left.fold(1).state / "000001-000000000" / MANIFEST, format=2)
    said = refused(left, "resume=mine")
    said_refusal(said, "package-version", "000001-000000000", "its format is 2", "has 1")
    # What it would be refused for otherwise.
    assert "nowhere.db" not in said


def test_a_state_of_the_first_version_is_read(left):
    states = taken(left.fold(1).state)
    states.save(state_of(1))
    manifest = left.fold(1).state / "000001-000000000" / MANIFEST
    first = read_json(manifest)
    del first["numerics"]
    write_json(manifest, first)
    go_on(left).check_states()
    assert str(StateFolder(left.fold(1).state).newest(pytest.fail)) == "epoch 1"


@pytest.mark.parametrize("changed", ["model.safetensors", "tokenizer.json"])
@pytest.mark.long
def test_another_base_of_the_same_size_is_refused(left, tmp_path, changed):
    """One bit of its weights, or of its tokenizer's files, in the middle."""
    folder = tiny_llama(tmp_path / "base")
    whole = fetch_base(str(folder), None)
    tokenizer, config = load_tokenizer(whole), load_config(whole)

    def facts():
        return fetch_base(str(folder), None).describe(tokenizer, config)

    write_json(left.environment, read_json(left.environment) | {"base_model": facts()})
    go_on(left).check_base(facts())
    content = bytearray((folder / changed).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / changed).write_bytes(content)
    with pytest.raises(FaultsError) as caught:
        go_on(left).check_base(facts())
    (fault,) = caught.value.faults
    assert re.fullmatch(rf"base model, {changed}: {len(content)} bytes, .* then, {len(content)} bytes, .* now", fault)
    (folder / "generation_config.json").unlink()
    with refuses("resume-differs", "base model, generation_config.json: ", "null now", error=FaultsError):
        go_on(left).check_base(facts())


@pytest.mark.long
def test_a_rare_vocabulary_that_an_earlier_version_did_not_record_is_no_other_base(left, tmp_path):
    folder = tiny_llama(tmp_path / "base")

    def facts():
        whole = fetch_base(str(folder), None)
        return whole.describe(load_tokenizer(whole), load_config(whole))

    def recorded(of_base):
        write_json(left.environment, read_json(left.environment) | {"base_model": of_base})

    recorded(facts())
    (folder / "bpe.codes").write_text("of PhoBERT")
    go_on(left).check_base(facts())
    recorded(facts())
    (folder / "bpe.codes").write_text("of another")
    with refuses("resume-differs", "base model, bpe.codes: ", "bytes", error=FaultsError):
        go_on(left).check_base(facts())
    # Any other new file may change the tokens.
    (folder / "bpe.codes").write_text("of PhoBERT")
    (folder / "added_tokens.json").write_text("{}")
    with refuses("resume-differs", "base model, added_tokens.json: null then", error=FaultsError):
        go_on(left).check_base(facts())


def test_weights_that_are_large_are_summed_by_samples_of_all_of_it(tmp_path, monkeypatch):
    """Every matrix of a large model is in a sample; this one's is in the last block."""
    monkeypatch.setattr("raycv.model.base_files.WHOLE_BYTES", 10**6)
    file = tmp_path / "model.safetensors"
    sums = set()
    for place in (None, 0, 2**21 + 4095, 5 * 2**20 - 1):
        content = bytearray(5 * 2**20)
        if place is not None:
            content[place] = 1
        file.write_bytes(content)
        sums.add(base_sha256(file))
    assert len(sums) == 4


@pytest.mark.core
@pytest.mark.slow
def test_the_command_refuses_another_base(left):
    """Of which the recorded run had no weights."""
    base = read_json(left.environment)["base_model"]
    del base["files"]["model.safetensors"]
    changed(left.environment, base_model=base)
    said = refused(left, "resume=mine", "tracking.uri=sqlite:///mlflow.db")
    assert re.search(r"base model, model.safetensors: null then, \d+ bytes, SHA-256 ", said)


def remedies_of_training(toy):
    """What folds say that ran out of memory, or whose loss is no number."""
    broken = toy.model()
    with torch.no_grad():
        next(p for name, p in broken.named_parameters() if "modules_to_save" in name).fill_(float("nan"))
    for model, precision in ((Greedy(toy.model(), limit=0), "fp32"), (broken, "bf16")):
        # One a process in production.
        AcceleratorState._reset_state(reset_partial_state=True)
        loop = FoldTrainer(model, toy.encoded, train_config(packing=False), precision, Recorder())
        with pytest.raises(UserError) as caught:
            loop.fit(TRAIN, VAL)
        yield from caught.value.remedies


@pytest.mark.long
def test_what_a_failed_fold_advises_is_taken_where_it_says(toy, left):
    """With `resume=`, or as a new run, which `resume=` would refuse."""
    goes_on, anew = [], []
    for remedy in remedies_of_training(toy):
        words = [word.replace("=<new>", "=another").replace("=<smaller>", "=org/small") for word in remedy.split()]
        words = [word for word in words if re.fullmatch(r"[a-z_]+\.[a-z_]+=\S+", word)]
        settings = [word for word in words if not word.startswith("run.name=")]
        assert settings, remedy
        if len(settings) == len(words):
            assert "resume= too" in remedy
            goes_on += settings
            assert go_on(left, *settings).faults == ()
        else:
            assert "in a new run" in remedy
            anew += settings
            assert len(go_on(left, *settings).faults) == 1
            assert validate(RunConfig, compose("run", [*SMALL, *words])).run.name == "another"
    assert goes_on == ["train.gradient_checkpointing=on"]
    assert [setting.partition("=")[0] for setting in anew] == [
        "prompt.max_length", "model.name", "train.lr", "train.precision", "train.warmup_steps"
    ]  # fmt: skip


def test_another_commit_alone_is_a_warning(left):
    environment = read_json(left.environment)
    warned = []
    for commit in ("0123456789abcdef", None):
        environment["git"] = commit and {"commit": commit, "dirty": True}
        write_json(left.environment, environment)
        config = validate(RunConfig, compose("run", ["resume=mine", f"run.dir={left.root.parent}"]))
        warned += earlier_run(config, ()).warnings()
    here = code_state()
    now = here["commit"][:12] + (" with changes" if here["dirty"] else "") if here else "unknown"
    assert f"the code's git commit: 0123456789ab with changes then, {now} now" in warned[0]
    assert len(warned) == (2 if here else 1)


@pytest.mark.long
def test_what_cannot_go_on_is_said(left):
    def check(which, kind, *parts):
        values = compose("run", [f"resume={which}", f"run.dir={left.root.parent}"])
        with refuses(kind, *parts):
            earlier_run(validate(RunConfig, values), ())

    check("other", "run-missing", "resume=other: ", f"{left.root.parent} holds")
    for fold in range(2):
        write_json(left.fold(fold).result, {})
    write_json(left.report, {})
    check("mine", "run-exists", "resume=mine: ", left.report, "raycv.aggregate run=mine")
    check(
        "latest",
        "run-missing",
        "resume=latest: ",
        f"{left.root.parent} holds no unfinished run (1 run",
        "run.dir=<folder>",
    )
    left.report.unlink()
    record = left.tracking.read_text()
    left.tracking.unlink()
    for which in ("mine", "latest"):
        check(which, "run-damaged", left.tracking, "No such file", "tracking.uri=")
    left.tracking.write_text(record)
    left.config.write_text("cv: [")
    check("mine", "run-damaged", f"{left.config} is damaged", "put a good copy in its place")
    left.config.unlink()
    check("mine", "run-damaged", f"resume=mine: {left.config} is missing")
    left.config.write_text("")
    left.tracking.unlink()
    for fold in range(2):
        shutil.rmtree(left.fold(fold).root)
    check("mine", "run-missing", "resume=mine: ", f"rm -r {left.root}", "run.name=<new>")


def test_cv_only_holds_for_one_command(left):
    """The run began with fold 0 alone; what resumes it trains all that is missing, or what is asked for then."""
    left.config.write_text(left.config.read_text().replace("only: null", "only:\n  - 0"))
    assert recorded_config(left).cv.only == [0]
    assert go_on(left).config.cv.only is None
    asked = go_on(left, "cv.only=[1]")
    assert (asked.config.cv.only, asked.faults) == ([1], ())
    with refuses("config-value", "cv.only=[1, 2]: the run has no fold 2.", "from 0 to 1"):
        go_on(left, "cv.only=[1,2]")
    assert shlex.split(resume_command(left, [0, 1]))[-1] == "cv.only=[0,1]"


def test_a_new_run_without_the_fold_that_cv_only_names_is_refused_before_anything_else(tmp_path, capsys):
    config = validate(RunConfig, compose("run", [*SMALL, "cv.only=[0,5]", f"run.dir={tmp_path / 'runs'}"]))
    with refuses("config-value", "cv.only=[0, 5]: the run has no fold 5."):
        cross_validate(config)
    assert (list(tmp_path.iterdir()), capsys.readouterr()) == ([], ("", ""))


def test_a_run_that_another_process_has_is_refused_before_anything_else(left, capsys):
    config = validate(RunConfig, compose("run", ["resume=mine", f"run.dir={left.root.parent}"]))
    with FileLock(left.lock), refuses("run-busy", "Run mine", left.lock, "python -m raycv.run resume=mine"):
        cross_validate(config)
    assert capsys.readouterr() == ("", "")


@pytest.mark.long
def test_the_store_that_is_given_anew_is_the_runs_from_then_on(left, tmp_path):
    """A copy of its database, or, where nothing says which run it is there, one that gets it from the folder."""
    stores = [f"sqlite:///{tmp_path / name}.db" for name in ("first", "second")]
    artifacts = f"tracking.artifacts={tmp_path / 'artifacts'}"
    left.tracking.unlink()
    left.fold(0).root.mkdir()
    for uri in stores:
        store, parent_id = earlier_store(go_on(left, f"tracking.uri={uri}", artifacts), {"tracking.uri"})
        assert store.run(parent_id).info.run_name == "mine"
        assert read_json(left.tracking)["uri"] == uri
        assert read_json(left.tracking)["parent_run_id"] == parent_id
        shutil.copy(tmp_path / "first.db", tmp_path / "second.db")
    assert earlier_store(go_on(left), ())[1] == parent_id


OF_NO_KIND = '{"packages": [], "base_model": 5, "git": "x", "uri": 1, "folds": 2, "rows": [1]}'


@pytest.mark.parametrize("content", ["{}", "[]", "", "[" * 100_000, OF_NO_KIND])
@pytest.mark.parametrize("name", ["tracking.json", "environment.json", "splits.json", "data_stats.json"])
@pytest.mark.long
def test_a_damaged_file_of_the_run_is_named(left, name, content):
    base = read_json(left.environment)["base_model"]
    (left.root / name).write_text(content)

    def go_on():
        earlier = earlier_run(validate(RunConfig, compose("run", ["resume=mine", f"run.dir={left.root.parent}"])), ())
        earlier.check(*load_data(earlier.config))
        earlier.check_base(base)
        earlier.warnings()

    with pytest.raises(UserError) as caught:
        go_on()
    assert "put" in str(caught.value)
    assert name in str(caught.value) or "data, posts: null then" in str(caught.value)


def test_a_run_that_another_process_has_ended_does_not_go_on(left):
    """Two resume it; the second holds the lock when the first is done."""
    write_json(left.report, {})
    with refuses("run-exists", left.report, f"raycv.aggregate run={left.root.name}"), sole_process(left):
        raise AssertionError("it went on")
    left.report.unlink()
    with sole_process(left):
        pass


def test_the_command_is_quoted_for_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resume_command(RunFolder(tmp_path / "runs" / "mine")) == "python -m raycv.run resume=mine"
    elsewhere = tmp_path / "my runs"
    assert shlex.split(resume_command(RunFolder(elsewhere / "it's"))) == [
        *("python", "-m", "raycv.run", "resume=it's", f"run.dir={elsewhere}")
    ]


def send_amid_the_second_fold(folder, sent):
    """Runs until fold 1 is in the middle of an epoch, sends `sent` to all processes, and waits until all are gone."""
    with started(folder) as process:
        wait_for(process, folder, lambda: amid_an_epoch(RunFolder(folder / "runs" / "mine").fold(1)))
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, sent)
        code = process.wait(timeout=300)
    psutil.wait_procs(family, timeout=60)
    return code


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_run_that_was_killed_and_resumed_is_the_unbroken_one(tmp_path, whole):
    """SIGKILL when a fold is finished and the other in the middle of an epoch; then the report alone is missing."""
    send_amid_the_second_fold(tmp_path, signal.SIGKILL)
    report = RunFolder(tmp_path / "runs" / "mine").report
    assert not report.exists()
    said = resume(tmp_path, "resume=latest")
    # Most often within one; a worker that outlives the killed driver by a second may have ended its epoch.
    assert re.search(r"fold 1: resumes after epoch [12]( and step \d+ of the next)?\n", said)
    assert_like_unbroken(tmp_path, whole)
    report.unlink()
    RunFolder(tmp_path / "runs" / "mine").pairs.unlink()
    resume(tmp_path, "resume=mine")
    assert_like_unbroken(tmp_path, whole)
    # A finished fold that was damaged since is no finished one.
    report.unlink()
    files, whole_files = (RunFolder(folder / "runs" / "mine").fold(0) for folder in (tmp_path, whole))
    weights = files.checkpoint / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "fold 0 is trained again: " in resume(tmp_path, "resume=mine", kept=[1])
    assert (files.root / "result.damaged.json").is_file()
    assert without_seconds(read_json(files.result)) == without_seconds(read_json(whole_files.result))
    assert weights.read_bytes() == (whole_files.checkpoint / "adapter_model.safetensors").read_bytes()
    environment = read_json(RunFolder(tmp_path / "runs" / "mine").environment)
    assert [each["packages"] for each in environment["resumed"]] == [environment["packages"]] * 3


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_folds_that_are_trained_one_after_another_make_the_unbroken_run(tmp_path, whole):
    run = RunFolder(tmp_path / "runs" / "mine")
    first = raycv("run", *RUN, "cv.only=[1]", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    said = " ".join(first.stdout.split())
    assert "mine: 1 of 2 folds, not the result of a 2-fold cross-validation" in said
    assert "Fold 0 is missing, so raycv averages nothing." in said
    assert (
        "The run has no report, since it lacks fold 0. Train the missing folds: python -m raycv.run resume=mine" in said
    )
    assert (run.finished(2), run.fold(0).root.exists(), run.report.exists(), run.page.exists()) == ([1], *[False] * 3)
    assert statuses(tmp_path) == {"mine": "KILLED", "fold_1": "FINISHED"}
    for command in ("aggregate", "report"):
        refused = raycv(command, "run=mine", cwd=tmp_path)
        assert (refused.returncode, "python -m raycv.run resume=mine" in refused.stderr) != (0, False), refused.stderr
    resume(tmp_path, "resume=latest")
    assert_like_unbroken(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_after_ctrl_c_the_printed_command_goes_on_even_from_the_state_before_a_damaged_one(tmp_path, whole):
    assert send_amid_the_second_fold(tmp_path, signal.SIGINT) == 130
    said = (tmp_path / "out").read_text()
    assert "Interrupted: 1 of 2 folds are finished" in said
    assert set(statuses(tmp_path).items()) == {("mine", "KILLED"), ("fold_0", "FINISHED"), ("fold_1", "KILLED")}
    printed = re.search("Resume it: python -m raycv.run (.*)", said)[1]
    newest = max(RunFolder(tmp_path / "runs" / "mine").fold(1).state.glob("0*"))
    damage(newest, "flipped")
    said = resume(tmp_path, *shlex.split(printed))
    assert f"fold 1: the training state {newest.name} is damaged and passed over" in said
    assert "fold 1: resumes after epoch" in said
    assert_like_unbroken(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_fold_that_failed_is_trained_alone_when_the_cause_is_mended(tmp_path, whole):
    """Its states cannot be written, since a file lies in their place."""
    run = RunFolder(tmp_path / "runs" / "mine")
    in_the_way = run.fold(1).state
    with started(tmp_path) as process:
        wait_for(process, tmp_path, run.fold(0).root.exists)
        in_the_way.parent.mkdir()
        in_the_way.write_text("")
        assert process.wait(timeout=900) == 1
    said = (tmp_path / "out").read_text()
    assert f"fold 1: The training state cannot be written to {in_the_way}" in said
    assert "then train the missing folds alone, with the same settings: python -m raycv.run resume=mine\n" in said
    assert not run.report.exists()
    assert set(statuses(tmp_path).items()) == {("mine", "FAILED"), ("fold_0", "FINISHED"), ("fold_1", "FAILED")}
    in_the_way.unlink()
    said = resume(tmp_path, "resume=latest")
    assert "fold 0: epoch" not in said
    assert_like_unbroken(tmp_path, whole)


def test_prompts_that_an_earlier_version_read_as_special_tokens_are_refused(left):
    """Its finished folds trained on others. Posts that spell none have the prompts that they had."""
    key = "posts_spelling_special_tokens"
    stats = read_json(left.data_stats)
    write_json(left.data_stats, stats | {"encoding": {key: 2}})
    go_on(left).check_prompts({key: 2})
    write_json(left.data_stats, stats | {"encoding": {}})
    go_on(left).check_prompts({key: 0})
    with refuses("resume-differs", "Run mine ", "2 posts with special tokens", error=FaultsError):
        go_on(left).check_prompts({key: 2})


def test_finished_folds_of_a_kernel_that_dropped_the_cap_are_not_mixed_with_others(left):
    """An earlier version trained them, and recorded no attention."""
    from transformers import Gemma2Config, LlamaConfig

    capped, plain = Gemma2Config(attn_logit_softcapping=50.0), LlamaConfig()
    go_on(left).check_attention(capped)
    write_json(left.fold(0).result, result_of(0))
    with refuses("resume-differs", "attention of fold 0: sdpa then, eager now", error=FaultsError):
        go_on(left).check_attention(capped)
    go_on(left).check_attention(plain)
    write_json(left.fold(0).result, result_of(0, worker={"attention": "eager"}))
    go_on(left).check_attention(capped)
