"""The resident scorer as users have it: `python -m raycv.serve` in a process of its own, asked over HTTP."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.builders import no_gpu
from support.commands import heed_sigint, processes_with
from support.refusals import refuses
from support.toy import Toy, toy_base
from support.trained_runs import CANARY, FINISHED, SERVER, save_toy

from raycv.common.secrets import mask_secrets
from raycv.config.command_line import compose
from raycv.config.schema import ServeConfig, ServerConfig
from raycv.config.validation import validate
from raycv.inference.choose import Chosen
from raycv.serve import run_server
from raycv.serving.connection import Connection
from raycv.serving.discovery import PATTERN, is_loopback
from raycv.serving.fingerprint import files_of
from raycv.serving.settings import listening, on_one_device

TOKEN = "a-token-of-the-tests"
START_SECONDS = 300


def environment(home: Path) -> dict[str, str]:
    """A user's: Ray's session in a folder that the test can read through."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY")}
    return {**kept, "RAY_TMPDIR": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Served:
    """A running scorer and where its things are."""

    def __init__(self, home: Path, *overrides: str, token: str | None = None) -> None:
        self.home, self.runs, self.token = home, home / "runs", token
        self.runs.mkdir()
        self.checkpoint = save_toy(home)
        self.environment = environment(home) | ({"RAYCV_TOKEN": token} if token else {})
        self.log = home / "serve.log"
        self.store = f"sqlite:///{home}/mlflow.db"
        given = [f"run={self.checkpoint}", f"dir={self.runs}", f"tracking.uri={self.store}", "serve.port=0"]
        command = [sys.executable, "-m", "raycv.serve", *given, *overrides]
        with self.log.open("w") as log:
            # A session of its own: what is left of it can be counted.
            self.process = subprocess.Popen(
                command, cwd=home, env=self.environment, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=heed_sigint,
            )  # fmt: skip
        self.url = self._wait()

    def _wait(self) -> str:
        ends = time.monotonic() + START_SECONDS
        while time.monotonic() < ends and self.process.poll() is None:
            if found := re.search(r"listening on (\S+)", self.log.read_text()):
                return found[1]
            time.sleep(0.2)
        if self.process.poll() is None:
            self.process.terminate()
        raise AssertionError(self.log.read_text())

    def send(self, path, body=None, *, token=None):
        with Connection(self.url, token or self.token) as connection:
            return connection.send("POST" if body is not None else "GET", path, body)

    def infer(self, *overrides):
        given = [f"run={self.checkpoint}", f"dir={self.runs}", "output=json", *overrides]
        command = [sys.executable, "-X", "importtime", "-m", "raycv.infer", *given]
        return subprocess.run(command, cwd=self.home, env=self.environment, capture_output=True, timeout=300)

    def stop(self, number=signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(120)

    def left(self) -> list[str]:
        """Commands of processes that have the scorer's Ray folder in their environment."""
        return processes_with(f"RAY_TMPDIR={self.home}")


@pytest.fixture(scope="module")
def homes():
    """Makes folders for scorers. Sockets of Ray lie below them, and the paths of sockets may not be long."""
    with tempfile.TemporaryDirectory(prefix="s", ignore_cleanup_errors=True) as folder:
        yield lambda: Path(tempfile.mkdtemp(dir=folder, prefix=""))


@pytest.fixture(scope="module")
def served(homes):
    home = homes()
    scorer = Served(home, "serve.max_queued=4", "serve.max_pairs=8", "serve.max_post_characters=1000")
    yield scorer
    if scorer.process.poll() is None:
        scorer.stop()


pytestmark_ray = [pytest.mark.slow, pytest.mark.core, pytest.mark.ray]


def ray_test(function):
    for mark in pytestmark_ray:
        function = mark(function)
    return function


@ray_test
def test_one_pair_many_pairs_and_every_criterion(served):
    status, one = served.send("/score", {"post": "w0 w1", "criterion": "C0"})
    assert status == 200
    ((answer,),) = one["answers"]
    assert set(answer) == {"label", "score", "threshold", "criterion_id", "model", "truncated"}
    assert answer["label"] == ("matched" if answer["score"] >= 0.5 else "unmatched")
    assert answer["model"] == {"run": "toy", "fold": 0, "base": one["model"]["base"], "finished": FINISHED}
    pairs = [{"post": "w0 w1", "criterion": "C0"}, {"post": "w2"}, {"post": "w3", "criterion": "in my words"}]
    status, many = served.send("/score", {"pairs": pairs})
    assert status == 200
    assert [len(each) for each in many["answers"]] == [1, 3, 1]
    assert many["answers"][0] == one["answers"][0]
    assert many["answers"][2][0]["criterion_id"] is None
    health = served.send("/health")[1]
    assert health["model"]["checkpoints"] == [str(served.checkpoint)]
    assert (health["model"]["named"], health["model"]["fold"], health["model"]["finished"]) == ("toy", 0, FINISHED)
    assert f"run toy, fold 0, finished {FINISHED}, " in served.log.read_text()
    assert health["requests"] >= 2


@ray_test
def test_requests_that_arrive_together_are_computed_together_and_each_gets_its_own(served):
    alone = {name: served.send("/score", {"post": name, "criterion": "C1"})[1]["answers"] for name in ("w1", "w2")}
    before, got = served.send("/health")[1], {}

    def client(number):
        post = f"w{number % 2 + 1}"
        # Each fourth is wrong, which is to be nobody else's trouble.
        criterion = "Z.99" if number == 3 else "C1"
        while True:
            status, answer = served.send("/score", {"post": post, "criterion": criterion})
            if status != 503:
                break
        got[number] = (status, answer)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert got.pop(3)[0] == 400
    for number, (status, answer) in got.items():
        assert (status, answer["answers"]) == (200, alone[f"w{number % 2 + 1}"])
    after = served.send("/health")[1]
    assert after["batches"] - before["batches"] < after["requests"] - before["requests"]


@ray_test
def test_infer_prints_the_same_bytes_with_and_without_it_and_loads_nothing_heavy(served):
    found = served.infer("post=w0 w4 w1")
    alone = served.infer("post=w0 w4 w1", "server=none", "tracking.uri=none")
    assert (found.returncode, alone.returncode) == (0, 0), found.stderr[-3000:] + alone.stderr[-3000:]
    assert found.stdout == alone.stdout
    assert {answer["model"]["finished"] for answer in json.loads(found.stdout)} == {FINISHED}
    loaded = {line.rpartition(b"|")[2].strip() for line in found.stderr.splitlines()}
    assert b"raycv.serving.client" in loaded
    assert not loaded & {b"torch", b"transformers", b"ray", b"mlflow", b"pandas", b"sklearn"}
    assert not [line for line in found.stderr.splitlines() if not line.startswith(b"import time:")]
    named = served.infer("post=w0 w4 w1", f"server={served.url}")
    assert named.stdout == found.stdout


@ray_test
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"post": "w0", "criterion": "Z.99"}, 400),
        ({"post": "  "}, 400),
        ({"pairs": []}, 422),
        ({}, 422),
        ({"post": 5}, 422),
        ({"post": [CANARY]}, 422),
        ({"post": CANARY, CANARY: CANARY}, 422),
        ({"pairs": [{"post": CANARY, "criterion": {CANARY: 1}}]}, 422),
        ({"post": f"{CANARY} \ud800"}, 422),
        ({"post": CANARY * 100}, 422),
        ({"pairs": [{"post": CANARY}] * 3}, 413),
        ({"pairs": [{"post": CANARY}] * 9}, 422),
        ({"post": CANARY * 700_000}, 413),
    ],
)
def test_a_bad_body_is_refused_without_its_text(served, body, status):
    got, answer = served.send("/score", body)
    assert got == status
    assert set(answer) == {"error", "kind", "remedies"}
    assert CANARY not in json.dumps(answer)


@ray_test
def test_its_page_and_what_is_not_there(served):
    status, schema = served.send("/openapi.json")
    assert status == 200
    assert {"/score", "/health"} <= set(schema["paths"])
    assert served.send("/../../etc/passwd")[0] == 404


@ray_test
def test_overload_is_told_503_and_passes(served):
    statuses = []

    def client():
        for _ in range(5):
            statuses.append(served.send("/score", {"post": "w0 w1 w2", "criterion": "C0"})[0])

    threads = [threading.Thread(target=client) for _ in range(32)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert set(statuses) == {200, 503}
    assert served.send("/score", {"post": "w0"})[0] == 200


@ray_test
def test_text_reaches_no_file_and_stopping_leaves_nothing(served):
    """Last, since it stops the scorer."""
    body = {"post": f"w0 {CANARY}", "criterion": f"is it {CANARY}", "log": True}
    assert served.send("/score", body)[0] == 200
    (file,) = served.runs.glob(PATTERN)
    assert file.stat().st_mode & 0o777 == 0o600
    assert served.stop() == 0
    assert list(served.runs.glob(PATTERN)) == []
    ends = time.monotonic() + 30
    while served.left() and time.monotonic() < ends:
        time.sleep(0.5)
    assert served.left() == []
    holding = [path for path in served.home.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert holding == []
    assert list(served.home.glob("session*/logs/*")) or list(served.home.glob("*/session*/logs/*"))
    from mlflow import MlflowClient

    store = MlflowClient(tracking_uri=served.store)
    experiment = store.get_experiment_by_name("raycv-inference")
    runs = store.search_runs([experiment.experiment_id])
    assert "criterion.sha256" in runs[0].data.params
    assert runs[0].data.metrics["pairs"] == 1


@pytest.fixture(scope="module")
def in_bf16(homes):
    """Where each pair moves the scores of those beside it; with criteria that have symptom names."""
    home = homes()
    criteria = home / "named"
    criteria.mkdir()
    (criteria / "criteria.csv").write_text("criterion_id,criterion,symptom\nA.1,w0,\nA.4,w1 w5,SLEEP_ISSUES\n")
    scorer = Served(home, "infer.precision=bf16", f"criteria_dir={criteria}")
    yield scorer
    scorer.stop()


@ray_test
def test_clients_at_once_print_the_bytes_of_a_process(in_bf16):
    post, given = "w0 w4 w1 w2 w3 w0 w5", ["infer.precision=bf16", f"criteria_dir={in_bf16.home / 'named'}"]
    questions = [["criterion=A.1"], ["criterion=my own words", "output=text"], ["output=text"]]
    ended, others = threading.Event(), []

    def another():
        while not ended.is_set():
            others.append(in_bf16.send("/score", {"post": post, "criterion": "w2 w3"})[0])

    threads = [threading.Thread(target=another) for _ in range(3)]
    [thread.start() for thread in threads]
    try:
        with ThreadPoolExecutor(len(questions)) as pool:
            found = list(pool.map(lambda question: in_bf16.infer(f"post={post}", *given, *question), questions))
    finally:
        ended.set()
        [thread.join() for thread in threads]
    assert len(others) > 10
    for question, client in zip(questions, found, strict=True):
        process = in_bf16.infer(f"post={post}", *given, *question, "server=none", "tracking.uri=none")
        assert (client.returncode, process.returncode) == (0, 0), client.stderr[-3000:] + process.stderr[-3000:]
        assert client.stdout == process.stdout
        for done in (client, process):
            assert b"WARNING: the criteria in " in done.stderr
        assert b"raycv.inference.predictor" not in client.stderr
    assert b"A.4 SLEEP_ISSUES " in found[2].stdout


@ray_test
def test_two_replicas_answer_as_one_a_token_is_asked_for_and_sigterm_stops_it(homes):
    # Of three at most, so that Ray Serve decides how many there are.
    scorer = Served(homes(), "serve.replicas=2", "serve.max_replicas=3", token=TOKEN)
    body, pids, answers = {"post": "w0 w1", "criterion": "C0", "log": True}, set(), []
    try:
        while len(answers) < 8 or (len(pids) < 2 and len(answers) < 200):
            status, health = scorer.send("/health")
            assert (status, health["status"]) == (200, "ok")
            pids.add(health["pid"])
            answers.append(scorer.send("/score", body))
        assert len(pids) == 2
        alone = scorer.infer("post=w0 w1", "criterion=C0", "server=none", "tracking.uri=none")
        assert [answer["answers"] for _, answer in answers] == [[[json.loads(alone.stdout)]]] * len(answers)
        assert [answer["warnings"] for _, answer in answers] == [[]] * len(answers)
        with Connection(scorer.url, "a-wrong-token-it-is") as connection:
            assert connection.send("GET", "/health")[0] == 401
            assert connection.send("POST", "/score", {"post": "w0"})[0] == 401
            assert connection.send("GET", "/openapi.json")[0] == 200
        assert TOKEN not in scorer.log.read_text()
    finally:
        assert scorer.stop(signal.SIGTERM) == 0
    from mlflow import MlflowClient

    store = MlflowClient(tracking_uri=scorer.store)
    experiment = store.get_experiment_by_name("raycv-inference")
    assert len(store.search_runs([experiment.experiment_id])) == len(answers)


@pytest.mark.parametrize(
    ("given", "replicas"),
    [
        ({}, 1),
        ({"replicas": 2, "max_replicas": 2}, 2),
        ({"max_replicas": 3}, (1, 3, 2)),
        ({"max_replicas": 3, "max_queued": 1}, (1, 3, 1)),
        ({"replicas": 2, "max_replicas": 4, "max_queued": 256}, (2, 4, 64)),
    ],
)
def test_replicas_are_added_before_those_there_are_refuse(given, replicas):
    from ray.serve.schema import LoggingConfig

    from raycv.orchestration.ray_serve import build_application
    from raycv.serving.messages import Setup

    values = compose("serve", []) | {"serve": SERVER | given}
    setup = Setup(validate(ServeConfig, values), Chosen("toy", 0, (), None, 0), None, None, "instance")
    deployment = build_application(setup, 1.0, 0.5, LoggingConfig())._bound_deployment
    scale = deployment._deployment_config.autoscaling_config
    if scale is not None:
        assert scale.target_ongoing_requests < max(2, setup.config.serve.max_queued)
        assert (scale.min_replicas, scale.max_replicas, scale.target_ongoing_requests) == replicas
    else:
        assert deployment.num_replicas == replicas
    assert (deployment.ray_actor_options["num_cpus"], deployment.ray_actor_options["num_gpus"]) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("given", "nodes", "resources"),
    [
        ({}, [{"CPU": 8.0}, {"CPU": 2.0}], (8, 0)),
        ({"max_replicas": 3}, [{"CPU": 8.0}], (2, 0)),
        ({"max_replicas": 3}, [{"CPU": 2.0}], (1, 0)),
        ({"cpus_per_replica": 0.5}, [{"CPU": 2.0}], (0.5, 0)),
        # The cores are those of the node with the GPU.
        ({}, [{"CPU": 64.0}, {"CPU": 4.0, "GPU": 1.0}], (4, 1)),
        ({"gpus_per_replica": 0.0}, [{"CPU": 64.0}, {"CPU": 4.0, "GPU": 1.0}], (64, 0)),
        ({"gpus_per_replica": 0.5}, [{"CPU": 4.0, "GPU": 1.0}], (4, 0.5)),
    ],
)
def test_what_a_replica_gets(given, nodes, resources):
    from raycv.orchestration.ray_serve import replica_resources

    assert replica_resources(ServerConfig(**SERVER | given), nodes) == resources


@pytest.mark.parametrize(("waiting", "seconds"), [(0, 0), (1, 0), (2, 0.02), (7, 0.02), (8, 0.04), (64, 0.04)])
def test_how_long_a_batch_waits_for_more(waiting, seconds):
    from raycv.orchestration.ray_serve import batch_wait_seconds

    assert batch_wait_seconds(waiting, 20.0) == pytest.approx(seconds)


@pytest.mark.parametrize("given", [{"cpus_per_replica": 9.0}, {"gpus_per_replica": 2.0}])
def test_a_replica_that_no_node_can_hold_is_refused(given):
    from raycv.orchestration.ray_serve import replica_resources

    asked = "9 CPUs" if "cpus_per_replica" in given else "2 GPUs"
    with refuses("cluster-resources", asked, "(8 CPUs, 1 GPUs", "serve.gpus_per_replica"):
        replica_resources(ServerConfig(**SERVER | given), [{"CPU": 8.0, "GPU": 1.0}])


@no_gpu
def test_a_gpu_that_torch_cannot_use_is_refused_before_ray_starts(tmp_path, unusable_gpu):
    import ray

    given = [f"run={save_toy(tmp_path)}", f"dir={tmp_path}", "serve.port=0", "tracking.uri=none"]
    with refuses("gpu-unusable", "NVIDIA GPU of", "infer.device=cpu"):
        run_server(validate(ServeConfig, compose("serve", given)))
    assert not ray.is_initialized()


@pytest.mark.parametrize("asked", [["infer.device=cpu"], ["serve.gpus_per_replica=0"]])
def test_a_scorer_on_the_cpu_gets_no_gpu_and_one_without_a_gpu_computes_on_the_cpu(asked):
    config = on_one_device(validate(ServeConfig, compose("serve", asked)))
    assert (config.infer.device, config.serve.gpus_per_replica) == ("cpu", 0)


def test_answers_depend_on_checkpoint_criteria_and_base(tmp_path):
    toy = Toy(toy_base(tmp_path))
    checkpoint = toy.save_with_criteria(tmp_path, toy.model())
    # What lies beside the criteria may change with every answer.
    for beside in ("mlflow.db", "serve.log", "posts.csv"):
        (tmp_path / "criteria" / beside).write_text("post_id,post\n1,I sleep well\n")
    files = {path.relative_to(tmp_path).as_posix() for path in files_of([checkpoint], None, None)}
    base = toy.base.path.relative_to(tmp_path).as_posix()
    weights = {"checkpoint/adapter_model.safetensors", "checkpoint/adapter_config.json"}
    wanted = {"checkpoint/raycv.json", "criteria/criteria.csv", *weights}
    assert wanted | {f"{base}/{name}" for name in toy.base.files} == files
    assert f"{base}/model.safetensors" in files
    # The load of the model explains what is missing, so no stamp of it is asked for.
    (checkpoint / "adapter_config.json").unlink()
    assert checkpoint / "adapter_config.json" not in files_of([checkpoint], None, None)


def test_where_it_may_listen(monkeypatch):
    settled = listening(ServerConfig(**SERVER), None)
    assert settled.port > 0
    for host in ("0.0.0.0", "::", "192.0.2.1", "my-host"):
        with refuses("config-value", f"serve.host={host}: ", "RAYCV_TOKEN", "serve.host=127.0.0.1") as caught:
            listening(ServerConfig(**SERVER | {"host": host}), None)
        # What is printed has its passwords masked; a command to type must not look like one.
        assert mask_secrets(str(caught.value)) == str(caught.value)
    with refuses("config-value", "RAYCV_TOKEN", "16 or more"):
        listening(ServerConfig(**SERVER), "short")
    assert listening(ServerConfig(**SERVER | {"host": "0.0.0.0"}), TOKEN).token == TOKEN
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with refuses("config-value", f"serve.port={port}: ", "in use", "serve.port=0"):
            listening(ServerConfig(**SERVER | {"port": port}), None)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "example.org")] == [True, True, True, False]
