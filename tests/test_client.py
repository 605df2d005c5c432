"""Finding a scorer and falling back: against a plain HTTP server. The real scorer is in test_serve.py."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.commands import users_environment
from support.refusals import refuses
from support.scorers import ANSWER, checkpoint, config, scorer  # noqa: F401

from raycv.common.files import write_json
from raycv.common.locations import absolute_uri
from raycv.config.command_line import compose
from raycv.config.schema import InferConfig
from raycv.config.validation import validate
from raycv.errors import UserError
from raycv.infer import infer
from raycv.inference.choose import choose
from raycv.inference.questions import Question
from raycv.model.checkpoint import MANIFEST
from raycv.serving.client import ask
from raycv.serving.connection import Connection, Unavailable, checked_address, checked_token
from raycv.serving.discovery import PATTERN, discovery_file, read_announcement
from raycv.serving.fingerprint import stamps_of
from raycv.serving.watch import watch
from raycv.tracking.lookup import LOCAL_URI

MARCH = "2026-03-01T10:00:00Z"
QUESTION = Question("I lie awake", "A.4")


def announce(scorer, runs: Path, **changes) -> Path:
    record = {"url": scorer.url, "token": "secret-of-the-scorer", "pid": os.getpid(), "host": socket.gethostname()}
    record |= {"instance": "one", "tracking_uri": absolute_uri(LOCAL_URI), "experiment": "raycv-inference"}
    file = discovery_file(runs, scorer.server_address[1])
    write_json(file, {**record, **changes}, private=True)
    return file


def test_a_found_scorer_answers_and_gets_its_token(scorer, checkpoint, tmp_path):
    announce(scorer, tmp_path)
    told = []
    reply = ask(config(checkpoint, tmp_path), [QUESTION], told.append)
    assert reply.answers == [[ANSWER]]
    assert reply.criteria["A.4"].symptom == "SLEEP_ISSUES"
    assert told == ["careful"]
    expected = {"pairs": [{"post": "I lie awake", "criterion": "A.4"}], "log": True, "alone": True}
    assert scorer.asked == [(expected, "Bearer secret-of-the-scorer")]


OTHER = "has run some, fold 0, in {}; this command asks for another model, precision, device or criteria"
PRECISE = {"precision": "auto", "batch_size": 16}


@pytest.mark.long
@pytest.mark.parametrize(
    ("announced", "has", "asked", "why"),
    [
        ({}, {}, {"server": "none"}, None),
        ({}, {}, {"infer": {"precision": "bf16", "batch_size": 16}}, OTHER.format("fp32")),
        ({}, {"device": "cuda"}, {"infer": PRECISE | {"device": "cpu"}}, OTHER.format("fp32 on cuda")),
        ({}, {}, {"base": "elsewhere/base"}, OTHER.format("fp32")),
        ({}, {}, {"tracking": {"uri": "http://other:5000", "experiment": "raycv-inference"}}, "logs elsewhere"),
        ({"host": "another-machine"}, {}, {}, None),
        ({"instance": "two"}, {}, {}, "another program answers"),
        ({"tracking_uri": None}, {}, {}, "logs elsewhere"),
        # Whoever asks for nothing special gets what this process would compute in.
        ({}, {"precision": "int8"}, {}, OTHER.format("int8")),
    ],
)
def test_a_scorer_of_something_else_gets_no_post(scorer, checkpoint, tmp_path, announced, has, asked, why):
    file = announce(scorer, tmp_path, **announced)
    scorer.model |= has
    told = []
    assert ask(config(checkpoint, tmp_path, **asked), [QUESTION], told.append) is None
    assert scorer.asked == []
    assert file.exists()
    if why is None:
        assert told == []
    else:
        assert re.fullmatch(f".*{why}.*: computing in this process", told[0])
        assert scorer.url in told[0]


@pytest.mark.long
@pytest.mark.parametrize(
    "asked", [{}, {"infer": PRECISE | {"device": "cpu"}}, {"infer": PRECISE | {"precision": "fp32"}}, {"base": "base"}]
)
def test_a_scorer_that_would_answer_alike_is_asked(scorer, checkpoint, tmp_path, asked):
    scorer.model["device"] = "cpu"
    announce(scorer, tmp_path)
    assert ask(config(checkpoint, tmp_path, **asked), [QUESTION], lambda text: None) is not None


def test_a_scorer_of_another_run_or_of_an_earlier_version_is_named_and_not_asked(scorer, checkpoint, tmp_path):
    announce(scorer, tmp_path)
    other = shutil.copytree(checkpoint, tmp_path / "other" / "fold_0" / "checkpoint")
    told = []
    assert ask(config(other, tmp_path), [QUESTION], told.append) is None
    assert "has run some, fold 0, in fp32; this command asks for another model" in told[0]
    scorer.identity = lambda: {"model": scorer.model}
    assert ask(config(checkpoint, tmp_path), [QUESTION], told.append) is None
    assert "is of an earlier version of raycv, and has to be started again" in told[1]
    assert scorer.asked == []


def test_a_file_that_others_can_read_or_that_is_damaged_is_not_trusted(scorer, checkpoint, tmp_path):
    file = announce(scorer, tmp_path)
    file.chmod(0o644)
    assert ask(config(checkpoint, tmp_path), [QUESTION], lambda text: None) is None
    file.chmod(0o600)
    whole = json.loads(file.read_text())
    for damaged in (
        [],
        {**whole, "pid": 10**23},
        {**whole, "token": "secret-of-the\nscorer"},
        {**whole, "url": "http://exa mple:80"},
        {"pid": os.getpid()},
    ):
        file.write_text(json.dumps(damaged))
        assert ask(config(checkpoint, tmp_path), [QUESTION], lambda text: None) is None
    file.unlink()
    os.mkfifo(file, 0o600)  # would be waited for
    assert ask(config(checkpoint, tmp_path), [QUESTION], lambda text: None) is None
    assert scorer.asked == []


def test_a_scorer_beside_a_run_that_is_given_by_its_place_is_found(scorer, checkpoint, tmp_path):
    announce(scorer, tmp_path)
    elsewhere = config(checkpoint, tmp_path / "elsewhere")
    assert ask(elsewhere, [QUESTION], lambda text: None) is not None


def test_the_model_is_the_one_that_scorers_were_compared_with(scorer, checkpoint, tmp_path, monkeypatch):
    """`latest` may be another run by the time that a scorer turns out not to fit."""
    searches, loaded = [], []

    def moving(*_):
        searches.append(1)
        return choose(str(checkpoint if len(searches) == 1 else tmp_path / "moved"), "best", tmp_path, None)

    def load(chosen, *_, **__):
        loaded.append(chosen)
        raise UserError("enough", kind="run-failed", remedies=[])

    monkeypatch.setattr("raycv.inference.choose.choose", moving)
    monkeypatch.setattr("raycv.inference.answerer.load_answerer", load)
    announce(scorer, tmp_path, experiment="another")
    with refuses("run-failed", "enough"):
        infer(validate(InferConfig, compose("infer", ["post=a", "run=latest", f"dir={tmp_path}"])))
    assert searches == [1]
    assert loaded[0].checkpoints == (checkpoint,)


TRACKED = {"parent_id": "a" * 32, "fold_id": "b" * 32}


@pytest.mark.long
@pytest.mark.parametrize(
    ("run", "fold", "same"),
    [
        ("a" * 32, "best", True),
        ("a" * 32, 0, True),
        ("a" * 32, 1, False),
        ("b" * 32, "best", True),
        ("b" * 32, "ensemble", False),
        ("c" * 32, "best", False),
    ],
)
def test_a_run_by_its_mlflow_id_is_found_without_mlflow(scorer, checkpoint, tmp_path, monkeypatch, run, fold, same):
    """Which here would not find the run: only an id that the scorer knows is answered."""
    monkeypatch.chdir(tmp_path)
    scorer.model |= TRACKED
    announce(scorer, tmp_path)
    asked = config(run, tmp_path, fold=fold)
    if same:
        assert ask(asked, [QUESTION], lambda text: None).answers == [[ANSWER]]
        return
    with refuses("run-missing, tracking-store", f"run={run} ", tmp_path, "mlflow.db"):
        ask(asked, [QUESTION], lambda text: None)
    assert scorer.asked == []


def test_the_command_asks_by_mlflow_id_and_loads_nothing_heavy(scorer, tmp_path):
    scorer.model |= TRACKED
    announce(scorer, tmp_path / "runs", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    scorer.answer["answers"] = [[ANSWER | {"model": ANSWER["model"] | {"finished": MARCH}}]]
    command = [sys.executable, "-X", "importtime", "-m", "raycv.infer", "post=a", "run=" + "b" * 32, "criterion=A.4"]
    done = subprocess.run(command, cwd=tmp_path, env=users_environment(), capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        b"matched  (probability 0.500, threshold 0.50)",
        b"criterion: A.4 SLEEP_ISSUES",
        b"model: run some, fold 0, finished 2026-03-01T10:00:00Z; base",
    ]
    loaded = {line.rpartition(b"|")[2].strip() for line in done.stderr.splitlines()}
    assert b"raycv.serving.client" in loaded
    # The last four take longer than all that the command does.
    heavy = b"torch transformers ray mlflow pandas sklearn numpy hydra omegaconf pydantic importlib.metadata"
    assert not loaded & set(heavy.split())
    assert json.loads((tmp_path / "runs" / ".last_answer.json").read_text()) == {"run": "some", "finished": MARCH}


def test_a_scorer_that_answers_from_another_run_than_the_last_is_named(scorer, tmp_path, caplog, capsysbinary):
    """A scorer that is named answers `latest` from whatever it has."""

    def answered(run, asked):
        scorer.answer["answers"] = [[ANSWER | {"model": {"run": run, "fold": 0, "base": "base", "finished": MARCH}}]]
        caplog.clear()
        words = [f"server={scorer.url}", "post=a", "criterion=A.4", f"run={asked}", f"dir={tmp_path}"]
        infer(validate(InferConfig, compose("infer", words)))
        assert f"model: run {run}, fold 0, finished {MARCH}; base".encode() in capsysbinary.readouterr().out
        return [record.message for record in caplog.records if record.name == "raycv.infer" and "latest" in record.msg]

    assert answered("some", "latest") == []
    assert answered("some", "latest") == []
    assert answered("other", "latest") == [
        f"run=latest is run other (finished {MARCH}). The last answer here came from run some (finished {MARCH})."
    ]
    assert answered("other", "latest") == []
    assert answered("some", "some") == []


def test_a_scorer_that_started_before_its_run_finished_is_not_asked(scorer, checkpoint, tmp_path):
    """Its answers would lack the finish time, so they would not be the bytes of this process."""
    announce(scorer, tmp_path)
    write_json(checkpoint.parent.parent / "report.json", {"finished": MARCH})
    told = []
    assert ask(config(checkpoint, tmp_path), [QUESTION], told.append) is None
    assert "files changed since the scorer started" in told[0]
    scorer.model["finished"] = MARCH
    assert ask(config(checkpoint, tmp_path), [QUESTION], told.append) is not None


def test_a_fold_that_was_named_is_not_taken_for_the_best_of_its_run(scorer, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scorer.model |= TRACKED | {"fold_asked": 0}
    announce(scorer, tmp_path)
    with refuses("run-missing, tracking-store", f"run={'a' * 32} ", tmp_path, "mlflow.db"):
        ask(config("a" * 32, tmp_path), [QUESTION], lambda text: None)
    assert choose(str(checkpoint), "best", tmp_path, None).fold_asked == 0


def test_files_copied_over_the_checkpoints_are_noticed(scorer, checkpoint, tmp_path):
    """Whatever time a copy gives them."""
    manifest = checkpoint / MANIFEST
    announce(scorer, tmp_path)
    assert ask(config(checkpoint, tmp_path), [QUESTION], lambda text: None) is not None
    before = manifest.stat()
    manifest.write_text(manifest.read_text().replace("0.5", "0.4"))
    os.utime(manifest, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ask(config(checkpoint, tmp_path), [QUESTION], lambda text: None) is None


def test_criteria_that_changed_are_noticed(scorer, checkpoint, tmp_path):
    criteria = tmp_path / "criteria.csv"
    criteria.write_text("criterion_id,criterion\nA.4,one\n")
    scorer.stamps = stamps_of([checkpoint / MANIFEST, criteria])
    announce(scorer, tmp_path)
    assert ask(config(checkpoint, tmp_path), [QUESTION], lambda text: None) is not None
    criteria.write_text("criterion_id,criterion\nA.4,two\n")
    told = []
    assert ask(config(checkpoint, tmp_path), [QUESTION], told.append) is None
    assert "or files changed since the scorer started: computing in this process" in told[0]
    assert len(scorer.asked) == 1


def test_what_is_too_large_for_the_scorer_is_computed_here(scorer, checkpoint, tmp_path):
    announce(scorer, tmp_path)
    for scorer.status in (413, 422):
        told = []
        assert ask(config(checkpoint, tmp_path), [QUESTION], told.append) is None
        assert "takes no question as large as this" in told[0]
        with refuses("scorer-request", "no such criterion", "choose one"):
            ask(config(checkpoint, tmp_path, server=scorer.url), [QUESTION], told.append)


@pytest.mark.long
@pytest.mark.parametrize(
    "answer",
    [
        {"ok": 1},
        *({"answers": answers, "warnings": [], "criteria": {}} for answers in ([[]], [[{}]], 5)),
        *(
            {"answers": [[ANSWER | change]], "warnings": [], "criteria": {}}
            for change in ({"model": {}}, {"model": None}, {"score": "0.5"}, {"score": 2.0}, {"label": "yes"}, {"x": 1})
        ),
        {"answers": [[ANSWER]], "warnings": 5, "criteria": {}},
        {"answers": [[ANSWER]], "warnings": [], "criteria": {"A.4": {}}},
    ],
)
def test_a_program_that_is_no_scorer_is_told_from_one(scorer, checkpoint, tmp_path, answer):
    scorer.answer = answer
    with refuses("scorer-unavailable", f"server={scorer.url}: ", "not as a scorer does", "server=none"):
        ask(config(checkpoint, tmp_path, server=scorer.url), [QUESTION], lambda text: None)
    scorer.model = {}
    with refuses("scorer-unavailable", f"server={scorer.url}: ", "not as a scorer does", "server=none"):
        ask(config(checkpoint, tmp_path, server=scorer.url), [QUESTION], lambda text: None)


def test_a_dead_scorers_file_is_removed(scorer, checkpoint, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    file = announce(scorer, tmp_path, pid=ended.pid)
    assert ask(config(checkpoint, tmp_path), [QUESTION], lambda text: None) is None
    assert not file.exists()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    file = announce(scorer, tmp_path, url=f"http://127.0.0.1:{port}")
    told = []
    assert ask(config(checkpoint, tmp_path), [QUESTION], told.append) is None
    assert not file.exists()
    assert "is gone" in told[0]


def test_a_dead_scorers_file_may_have_to_stay(scorer, checkpoint, tmp_path, monkeypatch):
    """In a folder that others share."""

    def refuse(*_, **__):
        raise PermissionError

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    announce(scorer, tmp_path, pid=ended.pid)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert ask(config(checkpoint, tmp_path), [QUESTION], lambda text: None) is None


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
    ],
)
def test_lengths_that_are_none_are_no_answer(answer):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def reply():
            peer, _ = listening.accept()
            peer.recv(10_000)
            peer.sendall(answer)
            peer.close()

        threading.Thread(target=reply, daemon=True).start()
        with (
            Connection(f"http://127.0.0.1:{listening.getsockname()[1]}", None) as connection,
            pytest.raises(Unavailable),
        ):
            connection.health()


def test_a_scorer_that_cannot_answer_is_told_of_only_where_no_other_does(scorer, checkpoint, tmp_path):
    announce(scorer, tmp_path).rename(tmp_path / PATTERN.replace("*", "2"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    gone = announce(scorer, tmp_path, url=url).rename(tmp_path / PATTERN.replace("*", "1"))
    told = []
    assert ask(config(checkpoint, tmp_path), [QUESTION], told.append).answers == [[ANSWER]]
    assert not gone.exists()
    assert told == ["careful"]


def test_an_overloaded_scorer_is_left_alone_unless_it_was_named(scorer, checkpoint, tmp_path):
    announce(scorer, tmp_path)
    scorer.status = 503
    told = []
    assert ask(config(checkpoint, tmp_path), [QUESTION], told.append) is None
    assert "overloaded" in told[0]
    with refuses("scorer-unavailable", f"server={scorer.url}: ", "503"):
        ask(config(checkpoint, tmp_path, server=scorer.url), [QUESTION], told.append)


def test_a_refused_question_is_the_users_error(scorer, checkpoint, tmp_path):
    announce(scorer, tmp_path)
    scorer.status = 400
    # An earlier scorer sends no kind.
    with refuses("scorer-request", "no such criterion") as caught:
        ask(config(checkpoint, tmp_path), [QUESTION], lambda text: None)
    assert caught.value.remedies == ["choose one"]
    scorer.more = {"kind": "criterion-unknown"}
    with refuses("criterion-unknown", "no such criterion"):
        ask(config(checkpoint, tmp_path), [QUESTION], lambda text: None)


def test_a_named_scorer_has_to_have_the_model(scorer, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("RAYCV_TOKEN", "from-the-environment")
    # latest: whatever it has
    assert ask(config("latest", tmp_path, server=scorer.url), [QUESTION], lambda text: None)
    assert scorer.asked[0][1] == "Bearer from-the-environment"
    assert ask(config("some", tmp_path, server=scorer.url), [QUESTION], lambda text: None)
    assert ask(config(checkpoint, tmp_path, server=scorer.url), [QUESTION], lambda text: None)
    for run in ("latest", "some"):
        with refuses("config-value", f"server={scorer.url}: ", "run some, fold 0", f"run={run} fold=3"):
            ask(config(run, tmp_path, server=scorer.url, fold=3), [QUESTION], lambda text: None)
    for asked in ({"criteria_dir": "x"}, {"base": "x"}, {"infer": {"precision": "int8", "batch_size": 1}}):
        key = "infer.precision" if "infer" in asked else next(iter(asked))
        with refuses("config-value", key, f"at {scorer.url}"):
            ask(config("some", tmp_path, server=scorer.url, **asked), [QUESTION], lambda text: None)
    other = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "some")
    with refuses("config-value", f"server={scorer.url}: ", "run some, fold 0", f"run={other} fold=best"):
        ask(config(other, tmp_path, server=scorer.url), [QUESTION], lambda text: None)
    assert len(scorer.asked) == 3


def test_the_server_says_when_it_stops_answering_and_when_it_answers_again(scorer, tmp_path, capsys):
    """Real sockets; a process of the scorer that died is one that does not listen."""
    record = read_announcement(announce(scorer, tmp_path))
    threading.Thread(target=watch, args=(record, 0.05), daemon=True).start()

    def says(text):
        for _ in range(100):
            said.append(capsys.readouterr().out)
            if text in "".join(said):
                return
            time.sleep(0.05)
        raise AssertionError(said)

    said: list[str] = []
    time.sleep(0.3)
    assert capsys.readouterr().out == ""
    scorer.unwell = True
    says("it does not answer")
    scorer.unwell = False
    says("it answers again")
    assert "".join(said).count("\n") == 2


def test_an_answer_that_takes_too_long_is_told_as_that(monkeypatch):
    monkeypatch.setattr("raycv.serving.connection.CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with refuses("scorer-unavailable", f"server={url}: ", "too long"):
            ask(validate(InferConfig, compose("infer", []) | {"server": url}), [Question("p", "c")], print)


def test_a_token_is_never_repeated():
    with refuses("config-value", "RAYCV_TOKEN", "16 or more") as caught:
        checked_token("sixteen-and-more\nX: y")
    assert "sixteen" not in str(caught.value)


def test_addresses():
    assert checked_address("http://host:80/x?y") == "http://host:80"
    assert checked_address("http://host:/x") == "http://host"
    assert checked_address("http://[::1]") == "http://[::1]"
    for wrong in ("host", "ftp://host", "http://", "http://user:pw@host", "http://host:x", "http://exa mple:80"):
        with refuses("config-value", "server: ", "http://host:port"):
            checked_address(wrong)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with refuses("scorer-unavailable", f"server=http://127.0.0.1:{port}: ", "refused", "python -m raycv.serve"):
        ask(config("latest", Path("runs"), server=f"http://127.0.0.1:{port}"), [QUESTION], lambda text: None)
