"""A replica without a cluster: real model, Ray Serve's real batching, API and MLflow writer. With one: test_serve."""

import asyncio
import json
import socket
import sqlite3
import time
from contextlib import closing
from dataclasses import replace

import pytest
import ray.serve.context
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import ReplicaRank
from support.http_calls import call
from support.toy import positions
from support.trained_runs import CANARY, SERVER, save_toy

from raycv.config.command_line import compose
from raycv.config.schema import InferConfig, ServeConfig
from raycv.config.validation import validate
from raycv.data.types import Criterion
from raycv.errors import UserError
from raycv.inference import log as inference_log
from raycv.inference.answerer import load_answerer
from raycv.inference.choose import choose
from raycv.inference.log import InferenceWriter, record_answers
from raycv.inference.questions import Question, as_json, as_text
from raycv.orchestration.ray_serve import Scorer
from raycv.serving.fingerprint import stamps_of
from raycv.serving.http_api import Overloaded, TooManyPairsError, build_api
from raycv.serving.messages import Setup

ANSWER = {"label": "matched", "score": 1.0, "threshold": 0.5, "criterion_id": None, "model": {"run": "r"}}


@pytest.fixture(scope="module")
def replica(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replica")
    values = compose("serve", []) | {"run": str(save_toy(folder)), "serve": SERVER | {"max_queued": 6}}
    config = validate(ServeConfig, values)
    chosen = choose(config.run, "best", folder, None)
    scorer = Scorer(Setup(config, chosen, None, f"sqlite:///{folder}/mlflow.db", "instance"))
    # What Ray Serve's queue asks of the replica that it runs in; it belongs to the loop that first used it.
    patch = pytest.MonkeyPatch()
    patch.setattr(ray.serve.context, "_INTERNAL_REPLICA_CONTEXT", None)
    ray.serve.context._set_internal_replica_context(
        replica_id=ReplicaID("one", DeploymentID("scorer")),
        servable_object=scorer,
        _deployment_config=DeploymentConfig(max_ongoing_requests=100),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )
    loop = asyncio.new_event_loop()
    yield scorer, chosen, folder, loop
    scorer._writer.close(30)
    loop.close()
    patch.undo()


def ask(scorer, loop, *requests, log=False, alone=()):
    """What becomes of requests that arrive together; those numbered in `alone` ask to be computed by themselves."""

    async def all_of_them():
        asked = (scorer.score(each, log, number in alone) for number, each in enumerate(requests))
        return await asyncio.gather(*asked, return_exceptions=True)

    return loop.run_until_complete(all_of_them())


def test_requests_together_are_one_batch_and_get_what_they_get_alone(replica):
    scorer, chosen, _, loop = replica
    alone = load_answerer(chosen, scorer._setup.config.infer, None, lambda text: None)
    asked = [[Question("w0 w1 w4", "C0")], [Question("w2"), Question("w0 w1 w4", "my words")], [Question("w3", "C2")]]
    before = dict(scorer.health())
    got = ask(scorer, loop, *asked)
    assert [each["answers"] for each in got] == [alone.answer(questions) for questions in asked]
    after = scorer.health()
    assert after["batches"] - before["batches"] < after["requests"] - before["requests"] == 3
    assert after["pairs"] - before["pairs"] == 6
    assert got[0]["criteria"] == {"C0": None, "C1": None, "C2": None}


def test_what_is_computed_alone_has_the_bytes_of_a_process_whatever_is_asked_beside_it(replica, tmp_path):
    """In bf16, where each pair moves the others' scores; with criteria that are not quite those of training."""
    _, chosen, _, loop = replica
    (tmp_path / "criteria.csv").write_text("criterion_id,criterion\nA.1,w0\nA.4,w1 w5\n")
    values = compose("serve", []) | {"run": str(chosen.checkpoints[0]), "serve": SERVER | {"max_queued": 100}}
    config = validate(ServeConfig, values | {"infer": {"precision": "bf16", "batch_size": 16}})
    tracked = replace(chosen, parent_id="p", fold_id="f")
    scorer = Scorer(Setup(config, tracked, str(tmp_path), None, "instance"))
    assert {"parent_id": "p", "fold_id": "f", "fold_asked": 0}.items() <= scorer.health()["model"].items()
    post = "w0 w4 w1 w2 w3 w0 w5"
    asked = [[Question(post, words)] for words in ("A.1", "A.4", "my own words", "w2 w3", "w4 w9 w8", None)]
    process = load_answerer(chosen, config.infer, str(tmp_path), lambda text: None)
    expected = [process.answer(questions) for questions in asked]
    for _ in range(3):
        got = ask(scorer, loop, *asked, *asked, *asked, alone=range(6, 12))
        together, alone = ([each["answers"] for each in part] for part in (got[:6], got[6:12]))
        assert alone == expected
        for (found,), (answers,) in zip(alone, expected, strict=True):
            assert as_json(found, single=False) == as_json(answers, single=False)
            assert as_text(found, symptoms(got), single=len(found) == 1) == as_text(
                answers, process.criteria, single=len(found) == 1
            )
        assert together != expected
        assert "not worded as those that the model was trained with" in got[0]["warnings"][0]


def test_whoever_names_the_scorer_is_warned_of_files_that_changed(replica, monkeypatch, tmp_path):
    scorer, _, _, loop = replica
    file = tmp_path / "criteria.csv"
    file.write_text("before")
    stamped = replace(scorer._setup, host=socket.gethostname(), stamps=stamps_of([file]))
    monkeypatch.setattr(scorer, "_setup", stamped)
    (got,) = ask(scorer, loop, [Question("w0", "C0")])
    assert got["warnings"] == []
    file.write_text("changed")
    (got,) = ask(scorer, loop, [Question("w0", "C0")])
    assert got["warnings"] == [f"{file} changed since the scorer started: start it again"]
    monkeypatch.setattr(scorer, "_setup", replace(stamped, host="another-machine"))
    (got,) = ask(scorer, loop, [Question("w0", "C0")])
    assert got["warnings"] == [], "whose files are others"


def symptoms(got):
    """The criteria as a client has them."""
    return {key: Criterion(key, "", symptom) for key, symptom in got[0]["criteria"].items()}


def test_requests_with_one_post_compute_it_once(replica):
    scorer, *_ = replica
    model = scorer._answerer.predictor.model
    with positions(model) as computed:
        scorer._answer([[Question("w0 w1 w4 w5", f"C{index}")] for index in range(2)])
        scorer._answer([[Question("w0 w1 w4 w5")]])
    prefix, suffix = 1 + 4 + 1, 1 + 11  # post: the post, criterion: | the criterion, the question
    assert computed == [prefix + 2 * suffix, prefix + 3 * suffix]


def test_ones_fault_is_not_the_others(replica):
    scorer, *_, loop = replica
    too_long = Question("w0", "w1 " * 60)
    unknown, many = Question("w0", "Z.99"), [Question("w0")] * 3
    good, long, wrong, more = ask(scorer, loop, [Question("w0", "C0")], [too_long], [unknown], many)
    assert good["answers"][0][0]["criterion_id"] == "C0"
    assert isinstance(long, UserError)
    assert "no room for a post" in long.what
    assert isinstance(wrong, UserError)
    assert isinstance(more, TooManyPairsError)


def test_more_than_may_wait_are_refused_and_it_goes_on(replica):
    scorer, *_, loop = replica
    got = ask(scorer, loop, *[[Question("w0", "C0")]] * 10)
    assert sum(isinstance(each, Overloaded) for each in got) == 4
    assert sum(isinstance(each, dict) for each in got) == 6
    assert scorer.health()["waiting"] == 0


def test_over_http_and_into_mlflow_without_the_text(replica, capfd):
    scorer, _, folder, loop = replica
    app = build_api(scorer, scorer._limits)
    body = {"post": f"w0 {CANARY}", "criterion": f"{CANARY} it is"}
    status, answer = call(app, "POST", "/score", {**body, "log": True}, run=loop.run_until_complete)
    assert status == 200
    assert answer["warnings"] == []
    scorer._writer.close(60)
    with sqlite3.connect(folder / "mlflow.db") as store:
        logged = dict(store.execute("select key, value from params").fetchall())
        assert store.execute("select count(*) from runs").fetchone() == (1,)
    assert logged["post.characters"] == str(len(body["post"]))
    assert {"post.sha256", "criterion.sha256", "model.run", "threshold", "versions.torch"} <= set(logged)
    assert not [path for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert CANARY not in "".join(capfd.readouterr()) + json.dumps(answer)


def test_a_store_out_of_reach_is_told_and_harms_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    writer = InferenceWriter(f"sqlite:///{tmp_path}/file/mlflow.db", "x")
    assert writer.opened.wait(120)
    writer.put(record_answers([], [Question(CANARY, CANARY)], [[ANSWER]], "fp32", {}))
    writer.close(60)
    (warning,) = writer.warnings()
    assert "not in MLflow" in warning
    assert CANARY not in warning


@pytest.mark.long
def test_the_writer_rests_while_requests_come_and_loses_nothing_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(
        inference_log, "REST", 1e6
    )  # no write takes so little that it would rest for less than the test
    writer = InferenceWriter(f"sqlite:///{tmp_path}/mlflow.db", "x", busy=lambda: True)
    assert writer.opened.wait(120)

    def in_store():
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
            return store.execute("select count(*) from runs where status = 'FINISHED'").fetchone()[0]

    for post in ("one", "two", "three"):
        writer.put(record_answers([], [Question(post, post)], [[ANSWER]], "fp32", {}))
    ends = time.monotonic() + 60
    while in_store() == 0 and time.monotonic() < ends:
        time.sleep(0.1)
    time.sleep(1.0)
    assert in_store() == 1
    writer.close(60)
    assert in_store() == 3
    assert writer.warnings() == []


@pytest.mark.long
def test_what_is_left_when_the_time_to_write_is_over_is_counted(tmp_path, caplog):
    writer = InferenceWriter(f"sqlite:///{tmp_path}/mlflow.db", "x")
    assert writer.opened.wait(120)
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as store:
        store.execute("begin exclusive")
        for post in ("one", "two", "three"):
            writer.put(record_answers([], [Question(post, post)], [[ANSWER]], "fp32", {}))
        writer.close(1.0)
        assert "2 inferences did not reach MLflow before the end" in caplog.text
        store.execute("rollback")
    writer.close(60)


def test_infer_takes_a_server_key():
    assert validate(InferConfig, compose("infer", [])).server == "auto"
