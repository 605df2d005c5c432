"""What happens when services and surroundings fail, each for real: memory, disk, MLflow, numbers, clock, folders.

The page `When something fails` of the docs names the test of each line.
"""

import contextlib
import glob
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from support.builders import tiny_llama, wordlevel_tokenizer
from support.commands import ROOT, background, raycv, statuses, users_environment, wait_until
from support.hub_base import NAME, REPO
from support.hub_server import HubServer
from support.mlflow_runs import config, finished_run, free_port, kill, serving
from support.refusals import refuses, said_refusal
from support.toy import FRAME, WORDS, Recorder, Toy, prompt_config, toy_base, toy_dataset, train_config

from raycv.common.files import read_json, write_json
from raycv.data.prompt_encoder import EncodedPairs
from raycv.data.splits import make_splits
from raycv.data.types import Pair
from raycv.errors import UserError
from raycv.orchestration.fold_worker import save_fold_checkpoint
from raycv.results.find_run import find_run, make_newest
from raycv.results.run_folder import FoldFolder, RunFolder
from raycv.tracking.cross_validation import EPOCH_METRICS, CrossValidationStore
from raycv.tracking.experiment import open_experiment
from raycv.training.loop import FoldTrainer
from raycv.training.metrics import METRICS
from raycv.training.state import StateFolder, TrainState
from raycv.training.steps import epoch_order

pytestmark = pytest.mark.timeout(900)

POISON = "poison"
SEED = 42


def write_task(folder, texts, labels, model_changes=lambda model: None):
    """A data set of one criterion and a tiny base in `folder`. Returns the overrides of a run of two folds on them."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"p{index:02}" for index in range(len(texts))]
    pd.DataFrame({"post_id": ids, "post": texts}).to_csv(folder / "posts.csv", index=False)
    pd.DataFrame({"post_id": ids, "criterion_id": "C0", "label": labels}).to_csv(
        folder / "groundtruth.csv", index=False
    )
    pd.DataFrame({"criterion_id": ["C0"], "criterion": [WORDS[0]]}).to_csv(folder / "criteria.csv", index=False)
    words = [*FRAME, *WORDS, POISON, *(f"{word}," for word in (*WORDS, POISON))]
    tokenizer = wordlevel_tokenizer(words)
    base = tiny_llama(folder / "base", tokenizer=tokenizer)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    model_changes(model, tokenizer)
    model.save_pretrained(base)
    return [
        *("experiment=quickstart", f"data.dir={folder}", f"data.criteria_dir={folder}", f"model.name={base}"),
        *("cv.folds=2", "prompt.max_length=48", "dora.r=4", "train.packing=false", f"train.seed={SEED}"),
        *("train.batch_size=4", "train.effective_batch_size=4", "train.gradient_checkpointing=off", "run.name=mine"),
    ]


def learnable(posts=24):
    """Texts and labels: a post is matched when it holds the criterion's word."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, size=4)) for _ in range(posts)]
    texts = [f"{text} {WORDS[0]}" if index % 3 == 0 else text for index, text in enumerate(texts)]
    return texts, [int(WORDS[0] in text.split()) for text in texts]


def unchanged(model, tokenizer):
    """The base as it is made."""


# --- Memory ----------------------------------------------------------------------------------------------------------


class Starving(Recorder):
    """Takes memory away from its own process after each optimizer step, as a neighbour on the device would."""

    def __init__(self, left):
        super().__init__()
        self.left = list(left)

    def on_step(self, *step):
        super().on_step(*step)
        if self.left:
            limit_memory(self.left.pop(0))


def limit_memory(more):
    """From now on this process gets `more` bytes beyond those that it has, and is refused the next.

    By the kernel, or on a GPU by torch's allocator.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        share = (torch.cuda.memory_reserved() + more) / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        return
    status = Path("/proc/self/status").read_text()
    data = 1024 * int(re.search(r"VmData:\s+(\d+) kB", status)[1])
    resource.setrlimit(resource.RLIMIT_DATA, (data + int(more), resource.RLIM_INFINITY))


def as_starved(folder):
    """Trains in a process whose memory shrinks; a JSON line says what came of it, and of one that has plenty."""
    torch.set_num_threads(1)
    words = [*FRAME, *WORDS, *(f"{word}," for word in WORDS)]
    # A GPU's memory is handed out in blocks of 20 MB: what is refused there must be more.
    size, tokens = (1024, 1000) if torch.cuda.is_available() else (128, 120)
    base = tiny_llama(folder / "base", hidden=size, tokenizer=wordlevel_tokenizer(words))
    from raycv.model.base_model import fetch_base

    dataset = toy_dataset(words=90)
    if torch.cuda.is_available():
        dataset = replace(dataset, posts={key: f"{text} " * 500 for key, text in dataset.posts.items()})
    toy = Toy(fetch_base(str(base), None), dataset, prompt_config(max_length=tokens))
    train, val = np.arange(40), np.arange(40, 48)

    def loop(model, listener):
        settings = train_config(epochs=1, patience=1, packing=False)
        return FoldTrainer(model, toy.encoded, settings, "fp32", listener)

    model = toy.model()
    expected = loop(model, Recorder()).fit(train, val)
    kept = activations_of(loop(toy.model(), Recorder()), train[:8])
    starved, listener = toy.model(), Starving([0.75 * kept, 0.38 * kept, 0.19 * kept])
    result = loop(starved, listener).fit(train, val)
    limit_memory(2**40)
    apart = max(
        float((one - other).detach().abs().max())
        for one, other in zip(model.parameters(), starved.parameters(), strict=True)
    )
    said = {"steps": listener.steps, "events": result.events, "apart": apart, "refused": ""}
    said["losses"] = [one.epochs[0].train_loss for one in (result, expected)]
    try:
        loop(toy.model(), Starving([0.02 * kept])).fit(train, val)
    except UserError as error:
        said["refused"] = str(error)
    limit_memory(2**40)
    # Adapters of a rank that makes AdamW's state, which comes in its first step, more than a malloc's leavings.
    large = loop(toy.model(r=64), Recorder())
    large._prepare(train)
    large._step(train[:8], training=True)
    if not torch.cuda.is_available():
        limit_memory(400_000)
    try:
        large._update()
    except UserError as error:
        said["optimizer"] = str(error)
    limit_memory(2**40)
    said["device"] = large.accelerator.device.type
    print(json.dumps(said))  # noqa: T201


def activations_of(loop, pairs):
    """Bytes that the graph of one step keeps; on a GPU those that a step takes."""
    from raycv.training.memory import BACKWARD_FACTOR, measured_peak

    loop._prepare(pairs)
    loop.model.train()
    device = loop.accelerator.device
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    with measured_peak(loop.model, device) as measured:
        loop._step(pairs, training=True)
    loop.optimizer.zero_grad(set_to_none=True)
    return measured() - before if device.type == "cuda" else measured() / BACKWARD_FACTOR


def starved(folder, **environment):
    """What `as_starved` says, as a process."""
    code = "import sys; from pathlib import Path; from test_faults_services import as_starved;"
    code += "as_starved(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        **{"cwd": Path(__file__).parent, "env": os.environ | environment, "capture_output": True, "text": True},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_steps(said):
    """Memory is refused in steps 2, 3 and 4: 8 -> 4 -> 2 -> 1, and one row does not fit either in the end."""
    assert said["events"] == [f"training: out of memory: micro-batch {a} -> {b}" for a, b in pairwise((8, 4, 2, 1))]
    # (epoch, step, steps, loss, micro-batch): each of the five effective batches once.
    assert [(step[1], step[4]) for step in said["steps"]] == [(1, 8), (2, 4), (3, 2), (4, 1), (5, 1)]
    remedies = ("  1. turn gradient checkpointing on, with resume= too", "  2. shorten the prompts, in a new run")
    said_refusal(said["refused"], "memory-full", "micro-batch of 1", *remedies)


@pytest.mark.core
@pytest.mark.slow
def test_memory_that_runs_out_step_by_step(tmp_path):
    """The kernel refuses it; each step is replayed over the same pairs."""
    # Each tensor is then the kernel's business, not a free place within the process.
    said = starved(tmp_path, CUDA_VISIBLE_DEVICES="", MALLOC_MMAP_THRESHOLD_="16384", MALLOC_ARENA_MAX="1")
    assert said["device"] == "cpu"
    check_steps(said)
    assert said["losses"][0] == pytest.approx(said["losses"][1], rel=1e-5)
    assert said["apart"] < 1e-4
    said_refusal(said["optimizer"], "memory-full", "optimizer's step", "  1. turn gradient checkpointing on")


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_memory_of_a_gpu_that_runs_out_step_by_step(tmp_path):
    said = starved(tmp_path)
    assert said["device"] == "cuda"
    check_steps(said)
    assert said["losses"][0] == pytest.approx(said["losses"][1], rel=1e-3)


# --- Disk ------------------------------------------------------------------------------------------------------------


class Mounted:
    """A file system of its own under `place`, in a mount namespace that lives as long as its holder."""

    def __init__(self, place, size="40m", then=""):
        place.mkdir()
        script = f'mount -t tmpfs -o size={size} tmpfs "$0" && {then or "true"} && echo ready && exec sleep 900'
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(place)]
        self.place = place
        self.holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if self.holder.stdout.readline() != "ready\n":
            self.close()
            pytest.skip(f"no file system can be mounted here: {self.holder.stderr.read().strip()}")
        # Where processes outside of the namespace see it.
        self.path = Path(f"/proc/{self.holder.pid}/root{place}")

    def prefix(self, cwd):
        """What goes before a command that is to run in the namespace."""
        enter = ["nsenter", f"--target={self.holder.pid}", "--user", "--mount", "--preserve-credentials"]
        return [*enter, "env", "-C", str(cwd)]

    def run(self, cwd, *command, **environment):
        return subprocess.run(
            [*self.prefix(cwd), sys.executable, *command],
            **{"env": users_environment(**environment), "capture_output": True, "text": True, "timeout": 500},
            stdin=subprocess.DEVNULL,
        )

    def close(self):
        self.holder.kill()
        self.holder.wait()


@pytest.fixture
def mounted(tmp_path):
    """Makes such file systems: `mounted(name, ...)` below the test's folder."""
    made = []

    def make(name, **options):
        made.append(Mounted(tmp_path / name, **options))
        return made[-1]

    if not all(map(glob.glob, ("/proc/self/ns/mnt", "/usr/bin/unshare", "/usr/bin/nsenter"))):
        pytest.skip("no mount namespaces here: unshare and nsenter of util-linux are missing")
    yield make
    for one in made:
        one.close()


def fill(folder, over):
    """Fills the disk of `folder`, and whatever becomes free on it, until `over` is set."""
    with (folder / "ballast").open("ab", buffering=0) as ballast:
        while not over.wait(0.02):
            with contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(1_000_000))


@contextlib.contextmanager
def full(folder):
    """The disk of `folder` is full while the block runs."""
    over = threading.Event()
    filler = threading.Thread(target=fill, args=(folder, over))
    filler.start()
    try:
        yield
    finally:
        over.set()
        filler.join()
        (folder / "ballast").unlink()


def as_writer(folder, base):
    """Writes each kind of file that a fold leaves twice, the disk being full the second time."""
    toy = Toy(toy_base(base))
    model = toy.model()
    files = FoldFolder(folder / "fold_0")
    states = StateFolder(files.state)
    states.take()
    tensors = {"a": torch.arange(100_000.0)}
    refused = {}

    def write(epoch):
        yield "state", lambda: states.save(TrainState(epoch, 0, {}, tensors))
        yield "checkpoint", lambda: save_fold_checkpoint(files, model, toy.tokenizer, toy.info(epoch=epoch))
        yield "report", lambda: write_json(folder / "report.json", {"epoch": epoch, "long": "x" * 50_000})

    for _, one in write(1):
        one()
    with full(folder):
        time.sleep(0.5)
        for name, one in write(2):
            try:
                one()
            except UserError as error:
                refused[name] = str(error)
    print(json.dumps(refused))  # noqa: T201


@pytest.mark.core
@pytest.mark.slow
def test_a_full_disk_keeps_what_was_good_and_is_named(tmp_path, mounted):
    """A training state, a checkpoint and a report on a file system without room."""
    disk = mounted("disk", size="8m")
    code = "import sys; from pathlib import Path; from test_faults_services import as_writer;"
    code += "as_writer(Path(sys.argv[1]), Path(sys.argv[2]))"
    done = disk.run(Path(__file__).parent, "-c", code, str(disk.place), str(tmp_path))
    assert done.returncode == 0, done.stderr
    refused = json.loads(done.stdout.splitlines()[-1])
    assert list(refused) == ["state", "checkpoint", "report"]
    for message in refused.values():
        full = f"the disk {disk.place} is full (0.0 of 8.4 MB are free on it)"
        said_refusal(message, "disk-full", full, f"make room on {disk.place}")
    assert "resume the run" in refused["state"]
    assert "resume the run" in refused["checkpoint"]
    fold = FoldFolder(disk.path / "fold_0")
    assert StateFolder(fold.state).newest(pytest.fail).epoch == 1
    assert read_json(fold.checkpoint / "raycv.json")["epoch"] == 1
    assert (fold.checkpoint / "adapter_model.safetensors").stat().st_size > 0
    assert read_json(disk.path / "report.json")["epoch"] == 1
    # Nothing half is left either.
    assert [path.name for path in fold.root.rglob(".*")] == []


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.core
@pytest.mark.ray
def test_a_run_whose_disk_becomes_full_says_so_and_goes_on_when_there_is_room(tmp_path, mounted):
    """The run folder, MLflow's database and its artifacts lie on it, as they do unless others are named."""
    disk = mounted("disk", size="60m")
    overrides = [*write_task(tmp_path / "task", *learnable(), unchanged), "train.epochs=30", "train.patience=30"]
    runs = RunFolder(disk.path / "runs" / "mine")
    with background(tmp_path, *overrides, prefix=disk.prefix(disk.place)) as process:
        wait_until(lambda: all(list(runs.fold(k).state.glob("0*")) for k in range(2)), process, tmp_path / "out")
        with full(disk.path):
            code = process.wait(timeout=200)
    said = (tmp_path / "out").read_text()
    assert code == 1, said
    assert f"the disk {disk.place} is full" in said
    assert f"make room on {disk.place}" in said
    assert "python -m raycv.run resume=mine\n" in said
    assert f"What MLflow keeps cannot be written to {disk.place}: the disk {disk.place} is full" in said
    assert "Traceback" not in said
    assert "[SQL" not in said
    kept = [StateFolder(runs.fold(k).state).newest(pytest.fail).epoch for k in range(2)]
    assert min(kept) >= 1
    resumed = disk.run(disk.place, "-m", "raycv.run", "resume=mine")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    for k in range(2):
        assert f"fold {k}: resumes after epoch {kept[k]}" in resumed.stdout
        assert [epoch["epoch"] for epoch in read_json(runs.fold(k).result)["history"]] == list(range(1, 31))
    # SQLite would take the path for the one outside of the namespace.
    shutil.copy(disk.path / "mlflow.db", tmp_path)
    assert set(statuses(tmp_path).values()) == {"FINISHED"}


def fetching(hub, monkeypatch, **environment):
    """A command that fetches NAME from `hub`, and what it adds to the environment."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    code = "from raycv.config.command_line import run_command; from raycv.config.schema import AggregateConfig;"
    code += "from raycv.model.base_model import fetch_base; import sys; sys.argv[1:] = [];"
    code += f"run_command('aggregate', AggregateConfig, lambda _: print(fetch_base('{NAME}', None).path))"
    return ["-c", code], {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", **environment}


@pytest.mark.long
def test_a_base_model_that_does_not_fit_on_the_disk(tmp_path, mounted, monkeypatch):
    """The real client of the hub; fetched when there is room."""
    disk = mounted("disk", size="6m")
    weights = np.random.default_rng(0).bytes(4_000_000)
    (disk.path / "ballast").write_bytes(bytes(3_000_000))
    with HubServer() as hub:
        hub.add(NAME, {**REPO, "model.safetensors": weights})
        command, environment = fetching(hub, monkeypatch, HF_HOME=str(disk.place))
        refused = disk.run(tmp_path, *command, **environment)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        parts = (f"{NAME} cannot be written to {disk.place}", f"the disk {disk.place} is full (", "HF_HOME")
        said_refusal(refused.stderr, "disk-full", *parts)
        (disk.path / "ballast").unlink()
        fetched = disk.run(tmp_path, *command, **environment)
        assert fetched.returncode == 0, fetched.stderr
        folder = Path(fetched.stdout.strip()).relative_to(disk.place)
        assert (disk.path / folder / "model.safetensors").read_bytes() == weights


# --- The model hub ---------------------------------------------------------------------------------------------------

TINY = ("experiment=quickstart", "cv.folds=2", "train.epochs=1", f"model.name={NAME}", "run.name=mine")


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_on_a_base_of_a_hub_that_answers_503_twice(tmp_path, monkeypatch):
    """To its end: the list of files, and then the weights, come at the third attempt; the folds ask for nothing."""
    work = tmp_path / "work"
    work.mkdir()
    with HubServer() as hub:
        commit = hub.add(NAME, ROOT / "models" / "tiny_llama")
        hub.fail("/api/models/", status=503, times=2)
        hub.fail("/cdn/", status=503, times=2)
        _, environment = fetching(hub, monkeypatch, HF_HOME=str(tmp_path / "home"))
        result = raycv("run", *TINY, cwd=work, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        assert [request.status for request in hub.requests if "/cdn/" in request.path] == [503, 503, 200]
    assert len(re.findall("attempt 2 of 3 failed", result.stderr)) == 2
    assert "Traceback" not in result.stderr
    run = RunFolder(work / "runs" / "mine")
    assert read_json(run.environment)["base_model"]["revision"] == commit
    assert len(read_json(run.report)["folds"]) == 2
    assert statuses(work) == {"mine": "FINISHED", "fold_0": "FINISHED", "fold_1": "FINISHED"}


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ({"status": 401, "code": "GatedRepo"}, [f"{NAME} is gated (HTTP 401)", "accept the license", "HF_TOKEN"]),
        ({"status": 404, "code": "RepoNotFound"}, [NAME, "(HTTP 404)", "check the spelling of model.name"]),
    ],
    ids=["gated", "unknown"],
)
def test_a_run_on_a_base_that_the_hub_refuses(tmp_path, monkeypatch, fault, parts):
    work = tmp_path / "work"
    work.mkdir()
    with HubServer() as hub:
        hub.add(NAME, ROOT / "models" / "tiny_llama")
        hub.fail("/api/models/", **fault)
        _, environment = fetching(hub, monkeypatch, HF_HOME=str(tmp_path / "home"))
        result = raycv("run", *TINY, cwd=work, **environment)
        assert len(hub.requests) == 1
    assert result.returncode == 2, result.stdout + result.stderr
    said_refusal(result.stderr, "hub-access", *parts)
    assert "Traceback" not in result.stderr
    assert not (work / "runs").exists()


# --- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.slow
def test_a_server_that_is_down_at_the_start_is_tried_three_times(tmp_path):
    overrides = write_task(tmp_path / "task", *learnable(), unchanged)
    result = raycv("run", *overrides, f"tracking.uri=http://127.0.0.1:{free_port()}", cwd=tmp_path)
    assert result.returncode == 2
    first, second = (
        float(re.search(rf"attempt {n} of 3 failed .*; the next one in ([\d.]+) s", result.stderr)[1]) for n in (1, 2)
    )
    assert 1 <= first <= 1.5
    assert 2 <= second <= 3
    assert "attempt 3 of 3 failed" in result.stderr
    assert "attempt 4" not in result.stderr
    said_refusal(result.stderr, "tracking-unreachable", "failed 3 times", "tracking.uri=sqlite:///mlflow.db")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def check_all_is_logged(url, run):
    """The server has all that the folder of `run` has, each point once."""
    client = MlflowClient(url)
    (parent, *rest) = client.search_runs(
        [client.get_experiment_by_name("raycv").experiment_id], "tags.`raycv.run` = 'mine'"
    )
    assert rest == []
    report = read_json(run.report)
    assert parent.info.status == "FINISHED"
    for key in METRICS:
        assert parent.data.metrics[f"metric_mean_{key}"] == pytest.approx(report["mean"][key])
    assert {"report.json", "config.yaml"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert sorted(child.info.run_name for child in children) == ["fold_0", "fold_1"]
    for child in children:
        result = read_json(run.fold(int(child.data.tags["raycv.fold"])).result)
        assert child.info.status == "FINISHED"
        assert child.data.params["dora.r"] == "4"
        assert child.data.params["fold"] == child.data.tags["raycv.fold"]
        for key in EPOCH_METRICS:
            points = client.get_metric_history(child.info.run_id, key)
            assert sorted((point.step, point.value) for point in points) == [
                (epoch["epoch"], pytest.approx(epoch[key])) for epoch in result["history"]
            ]
        assert child.data.metrics["best_f1"] == pytest.approx(result["metrics"]["f1"])
        artifacts = {file.path for file in client.list_artifacts(child.info.run_id, "checkpoint")}
        assert "checkpoint/adapter_model.safetensors" in artifacts


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.core
@pytest.mark.ray
def test_a_server_that_goes_away_and_comes_back(tmp_path):
    """Training goes on meanwhile; the epochs that were missed are logged while it still runs."""
    overrides = [*write_task(tmp_path / "task", *learnable(), unchanged), "train.epochs=60", "train.patience=60"]
    port, log, run = free_port(), tmp_path / "out", RunFolder(tmp_path / "runs" / "mine")
    url = f"http://127.0.0.1:{port}"

    def trained():
        return max(map(int, re.findall(r"epoch (\d+)/60", log.read_text())), default=0)

    def logged():
        client = MlflowClient(url)
        (experiment,) = [one for one in client.search_experiments() if one.name == "raycv"]
        runs = client.search_runs([experiment.experiment_id], "tags.`raycv.fold` LIKE '%'")
        steps = [len(client.get_metric_history(one.info.run_id, "val_loss")) for one in runs]
        return max(steps, default=0)

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path, port))
        process = stack.enter_context(background(tmp_path, *overrides, f"tracking.uri={url}"))
        wait_until(trained, process, log)
        kill(server)
        wait_until(lambda: "not logged for now, the run folder has it" in log.read_text(), process, log)
        before = trained()
        stack.enter_context(serving(tmp_path, port))
        assert process.poll() is None
        wait_until(lambda: logged() > before, process, log)
        assert process.wait(timeout=300) == 0, log.read_text()
        assert "Log it later" not in log.read_text()
        check_all_is_logged(url, run)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.ray
def test_two_runs_at_once_in_one_folder_and_a_server_that_stays_away(tmp_path):
    """Of two commands for one name, and a third that would resume it, one trains; MLflow gets it by the printed one."""
    overrides = [*write_task(tmp_path / "task", *learnable(), unchanged), "train.epochs=20", "train.patience=20"]
    port, run = free_port(), RunFolder(tmp_path / "runs" / "mine")
    url = f"http://127.0.0.1:{port}"
    overrides.append(f"tracking.uri={url}")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path, port))
        names = ("one", "other")
        both = {name: stack.enter_context(background(tmp_path, *overrides, out=name)) for name in names}
        while all(process.poll() is None for process in both.values()):
            time.sleep(0.1)
        (refused,) = [name for name in names if both[name].poll() is not None]
        (winner,) = set(names) - {refused}
        assert both[refused].returncode == 2, (tmp_path / refused).read_text()
        assert f"run.name=mine: {run.root} exists" in (tmp_path / refused).read_text()
        log = tmp_path / winner
        wait_until(lambda: ": epoch " in log.read_text(), both[winner], log)
        kill(server)
        # It stands still meanwhile, or it might be done before the third has started.
        both[winner].send_signal(signal.SIGSTOP)
        third = raycv("run", "resume=mine", cwd=tmp_path)
        both[winner].send_signal(signal.SIGCONT)
        assert third.returncode == 2, third.stdout
        said_refusal(third.stderr, "run-busy", "Run mine", run.lock)
        assert both[winner].wait(timeout=300) == 0, log.read_text()
    said = log.read_text()
    assert "Warning: the summary is not in MLflow" in said
    assert run.report.is_file()
    later = re.search(r"^Log it later: python -m raycv\.aggregate (.*)$", said, re.MULTILINE)[1]
    with serving(tmp_path, port):
        aggregated = raycv("aggregate", *later.split(), cwd=tmp_path)
        assert aggregated.returncode == 0, aggregated.stderr
        check_all_is_logged(url, run)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.parametrize("impatient", [False, True])
def test_a_server_that_hangs_keeps_neither_the_report_nor_the_end_of_the_run(tmp_path, impatient):
    """Nor does who is `impatient` lose anything by Ctrl-C once the report is there."""
    overrides = [*write_task(tmp_path / "task", *learnable(), unchanged), "train.epochs=20", "train.patience=20"]
    port, log, run = free_port(), tmp_path / "out", RunFolder(tmp_path / "runs" / "mine")
    url = f"http://127.0.0.1:{port}"
    with serving(tmp_path, port) as server:
        with background(tmp_path, *overrides, f"tracking.uri={url}", MLFLOW_HTTP_REQUEST_TIMEOUT="5") as process:
            wait_until(lambda: ": epoch " in log.read_text(), process, log)
            # It takes connections, and never answers.
            os.killpg(server.pid, signal.SIGSTOP)
            wait_until(run.report.is_file, process, log)
            if impatient:
                process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == (130 if impatient else 0), log.read_text()
        # As it began, and no more.
        assert log.read_text().count("resume=") == 1
        assert not run.lock.exists()
        os.killpg(server.pid, signal.SIGCONT)
        said = r"^Log it (later|into MLflow): python -m raycv\.aggregate (.*)$"
        later = re.search(said, log.read_text(), re.MULTILINE)[2]
        aggregated = raycv("aggregate", *later.split(), cwd=tmp_path)
        assert aggregated.returncode == 0, aggregated.stderr
        check_all_is_logged(url, run)


@pytest.mark.long
def test_parameters_that_a_lost_server_missed_are_logged_later(tmp_path):
    settings = config(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    store = CrossValidationStore(settings.uri)
    parent_id = store.start_parent(open_experiment(store, settings), "mine", {})
    run_id = store.start_child(parent_id, 0, {"a": 1})
    assert store.start_child(parent_id, 0, {"a": 1, "b": 2}) == run_id
    assert store.run(run_id).data.params == {"a": "1", "b": "2", "fold": "0"}


# --- Numbers ---------------------------------------------------------------------------------------------------------


def poisoned_task(folder):
    """A base whose embedding of one word is damaged, and a post with it that one fold alone ever looks at.

    That fold validates on it. The other could train on it, but draws its pairs by class, and happens not to draw this.
    Returns the overrides and the number of the fold.
    """
    texts, labels = learnable()
    pairs = [Pair(f"p{index:02}", "C0", label) for index, label in enumerate(labels)]
    (post, fold) = next(
        (index, other)
        for other, split in enumerate(make_splits(pairs, 2, SEED)[::-1])
        for index in set(split.train_indices.tolist()) - drawn(split.train_indices, np.array(labels))
    )
    texts[post] += f" {POISON}"

    def damage(model, tokenizer):
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(f"{POISON},")] = math.nan

    overrides = [*write_task(folder, texts, labels, damage), "train.imbalance=weighted_sampling", "train.epochs=1"]
    return overrides, fold


def drawn(train_pairs, labels):
    """The pairs of the first epoch under weighted sampling, by the seed alone."""
    nothing = np.zeros(len(labels), dtype=np.int32)
    encoded = EncodedPairs(nothing[:, None], nothing, np.arange(len(labels)), labels, nothing, pad_id=0)
    return set(epoch_order(train_config(imbalance="weighted_sampling", seed=SEED), encoded, train_pairs, 1).tolist())


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.ray
def test_a_loss_that_is_no_number_ends_its_fold_alone(tmp_path):
    overrides, fold = poisoned_task(tmp_path / "task")
    result = raycv("run", *overrides, cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    run = RunFolder(tmp_path / "runs" / "mine")
    parts = (f"fold {fold}: The validation loss is nan in epoch 1.", "run.name=<new> train.lr=")
    said_refusal(result.stderr, "run-failed, training-loss", *parts, "python -m raycv.run resume=mine")
    assert "Traceback" not in result.stderr
    assert "nan in epoch 1" in read_json(run.fold(fold).error)["message"]
    # The other one is finished, and kept.
    assert math.isfinite(read_json(run.fold(1 - fold).result)["history"][0]["val_loss"])
    assert not run.report.exists()
    assert statuses(tmp_path) == {"mine": "FAILED", f"fold_{fold}": "FAILED", f"fold_{1 - fold}": "FINISHED"}


def test_a_training_loss_that_is_no_number_says_its_step(tmp_path):
    """The embedding of one token is damaged: the step that meets it first is named."""
    toy, train = Toy(toy_base(tmp_path)), np.arange(30)
    model = toy.model()
    loop = FoldTrainer(model, toy.encoded, train_config(packing=False), "fp32", Recorder())
    order = epoch_order(loop.config, toy.encoded, train, 1)
    steps = [set(toy.encoded.input_ids[step].ravel().tolist()) for step in np.array_split(order, [8, 16, 24])]
    token = (steps[1] - steps[0]).pop()
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    with refuses("training-loss", "training loss is nan", "epoch 1, step 2 of 4"):
        loop.fit(train, np.arange(30, 48))


# --- Clock -----------------------------------------------------------------------------------------------------------


def test_latest_is_the_run_that_was_made_last_whatever_the_clock_said(tmp_path):
    for number, name in enumerate(("b", "a")):
        folder = finished_run(tmp_path / name)
        # The second one is made after the clock was set back by a day.
        then = time.time() - 86_400 * number
        os.utime(folder.config, (then, then))
        make_newest(folder)
    assert find_run(tmp_path, "latest").root.name == "a"


def test_a_copy_of_an_old_run_is_not_the_latest(tmp_path):
    """A plain copy has new file times, but it started when its run did. Runs of earlier versions have file times."""
    for number, name in enumerate(("old", "new")):
        folder = finished_run(tmp_path / name)
        write_json(folder.environment, {"started": 1000.0 + number})
    copy = RunFolder(shutil.copytree(tmp_path / "old", tmp_path / "a_copy"))
    assert copy.config.stat().st_mtime > 2000
    assert find_run(tmp_path, "latest").root.name == "new"
    write_json(copy.environment, {})
    assert find_run(tmp_path, "latest").root.name == "a_copy"
    make_newest(folder)
    assert find_run(tmp_path, "latest").root.name == "new"


def test_a_run_in_mlflow_never_ends_before_it_began(tmp_path):
    settings = config(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    store = CrossValidationStore(settings.uri)
    began = int(1000 * (time.time() + 3600))
    run = store.client.create_run(open_experiment(store, settings), start_time=began)
    store.finish(run.info.run_id, "FINISHED")
    assert store.run(run.info.run_id).info.end_time == began


@pytest.mark.long
def test_a_run_in_mlflow_that_has_ended_keeps_its_time(tmp_path):
    """Its summary may be logged again later."""
    settings = config(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    store = CrossValidationStore(settings.uri)
    run_id = store.client.create_run(open_experiment(store, settings), start_time=1).info.run_id
    store.client.set_terminated(run_id, "FINISHED", end_time=2)
    store.finish(run_id, "FINISHED")
    assert store.run(run_id).info.end_time == 2
    store.finish(run_id, "KILLED")
    assert store.run(run_id).info.end_time > 2


SET_BACK = r"""
// Python's wall clock goes back by two hours once the file CLOCK_SET_BACK exists. That of compiled libraries
// stays: they wait for moments of a clock that only the kernel could set. (libfaketime 0.9.10 breaks Python's sleep.)
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now), before = errno;
    Dl_info caller;
    if (!failed && clock == CLOCK_REALTIME && dladdr(__builtin_return_address(0), &caller)
        && strstr(caller.dli_fname, "python") && !strstr(caller.dli_fname, "site-packages")
        && access(getenv("CLOCK_SET_BACK"), F_OK) == 0)
        now->tv_sec -= 7200;
    errno = before;
    return failed;
}
"""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here for a clock that can be set")
def test_a_clock_that_is_set_back_during_a_run(tmp_path):
    """By two hours, for the Python of all processes of the run, while the folds train."""
    overrides = [*write_task(tmp_path / "task", *learnable(), unchanged), "train.epochs=12", "train.patience=12"]
    (tmp_path / "clock.c").write_text(SET_BACK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "clock.so", "clock.c", "-ldl"], cwd=tmp_path, check=True)
    clock, log = tmp_path / "set_back", tmp_path / "out"
    environment = {"LD_PRELOAD": str(tmp_path / "clock.so"), "CLOCK_SET_BACK": str(clock)}
    began = time.time()
    finished_run(tmp_path / "runs" / "earlier")
    with background(tmp_path, *overrides, **environment) as process:
        wait_until(lambda: ": epoch " in log.read_text(), process, log)
        clock.touch()
        assert process.wait(timeout=300) == 0, log.read_text()
    run = RunFolder(tmp_path / "runs" / "mine")
    for fold in read_json(run.report)["folds"]:
        assert 0 < fold["seconds"] < 600
        assert all(0 <= epoch["seconds"] < 600 for epoch in fold["history"])
    assert not re.search(r"\[-|\(-\d+ s\)", log.read_text())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("raycv").experiment_id])
    assert len(runs) == 3
    assert all(one.info.status == "FINISHED" and one.info.end_time >= one.info.start_time for one in runs)
    # The clock was set back indeed: points bear times from before the run began.
    points = [point.timestamp for one in runs for point in client.get_metric_history(one.info.run_id, "val_loss")]
    assert min(points) < 1000 * (began - 3600)
    assert max(one.info.start_time for one in runs) >= 1000 * began - 1
    assert find_run(tmp_path / "runs", "latest").root.name == "mine"


# --- Folders ---------------------------------------------------------------------------------------------------------


def elsewhere(folder):
    return [
        *(f"run.dir={folder / 'runs'}", f"tracking.uri=sqlite:///{folder}/mlflow.db"),
        f"tracking.artifacts={folder / 'mlruns'}",
    ]


@pytest.mark.core
@pytest.mark.slow
def test_a_read_only_working_directory_is_refused_with_what_to_set(tmp_path, mounted):
    overrides = write_task(tmp_path / "task", *learnable(), unchanged)
    cwd = mounted("cwd", then='mount -o remount,ro "$0"')
    places = elsewhere(tmp_path)
    remedies = ("run.dir=<folder>", "tracking.uri=sqlite:////folder/mlflow.db", "tracking.artifacts=<a folder")
    for given in range(3):
        result = cwd.run(cwd.place, "-m", "raycv.run", *overrides, *places[:given])
        assert result.returncode == 2, result.stdout + result.stderr
        assert "Read-only file system" in result.stderr
        # All at once.
        assert [remedy in result.stderr for remedy in remedies] == [key >= given for key in range(3)]
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_base_model_that_has_no_home(tmp_path, monkeypatch):
    """The hub's client keeps its cache below HOME."""
    with HubServer() as hub:
        hub.add(NAME, REPO)
        command, environment = fetching(hub, monkeypatch, HOME="/proc/nowhere")
        done = subprocess.run(
            [sys.executable, *command],
            **{"env": users_environment(**environment), "capture_output": True, "text": True, "cwd": tmp_path},
        )
    assert done.returncode == 2, done.stdout
    said_refusal(done.stderr, "disk-unwritable", f"{NAME} ", "/proc/nowhere/.cache/huggingface/hub", "set HF_HOME to")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.parametrize("home", ["read-only", "missing", "unset"])
def test_a_read_only_working_directory_no_home_and_a_collapsed_classifier(tmp_path, mounted, home):
    """All posts say the same, so no classifier can tell them apart; the run is complete, and marked."""
    texts, labels = learnable()
    overrides = [*write_task(tmp_path / "task", [texts[0]] * len(texts), labels, unchanged), "train.epochs=1"]
    cwd = mounted("cwd", then='mkdir "$0/home" && mount -o remount,ro "$0"')
    variable = {"read-only": [f"HOME={cwd.place}/home"], "missing": ["HOME=/proc/nowhere"], "unset": ["-u", "HOME"]}
    command = [*cwd.prefix(cwd.place), *variable[home], sys.executable, "-m", "raycv.run"]
    done = subprocess.run(
        [*command, *overrides, *elsewhere(tmp_path)],
        **{"env": users_environment(), "capture_output": True, "text": True, "timeout": 550},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_json(tmp_path / "runs" / "mine" / "report.json")
    assert [fold["metrics"]["roc_auc"] for fold in report["folds"]] == [0.5, 0.5]
    assert report["collapsed_folds"] == [0, 1]
    for fold, warning in enumerate(report["warnings"][-2:]):
        assert re.match(
            rf"fold {fold}: the classifier has collapsed: all \d+ pairs get the label matched; F1 ", warning
        )
        assert warning.endswith("; ".join(report["folds"][fold]["collapsed"]))
    assert all("the classifier has collapsed" in fold["events"][-1] for fold in report["folds"])
    assert re.search(r"fold [01]: Warning: the classifier has collapsed", done.stdout)
    for fold in (0, 1):
        assert re.search(rf"^! fold {fold}: the classifier has collapsed: all", done.stdout, re.MULTILINE)
        assert len(read_json(tmp_path / "runs" / "mine" / f"fold_{fold}" / "result.json")["collapsed"]) == 4
    assert re.search(r"^ *[01] (\* )?! ", done.stdout, re.MULTILINE)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("raycv").experiment_id])
    assert {one.info.run_name: one.data.tags.get("raycv.collapsed") for one in runs} == {
        "mine": "fold 0, 1", "fold_0": "true", "fold_1": "true"
    }  # fmt: skip
    (parent,) = [one for one in runs if one.info.run_name == "mine"]
    for fold in (0, 1):
        assert f"**Fold {fold}: the classifier has collapsed: all" in parent.data.tags["mlflow.note.content"]
    for one in runs:
        assert "pairs get the label matched; F1 " in one.data.tags["raycv.collapsed_reasons"]
