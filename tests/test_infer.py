"""Inference of one question: which model answers, texts that pass untouched, what is printed, logged and refused."""

import contextlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.builders import tiny_llama, wordlevel_tokenizer
from support.commands import users_environment
from support.pages import undocumented
from support.refusals import refuses, said_refusal
from support.trained_runs import NASTY, make_run

from raycv.batch_inference.pairs import AskedPair, Chunk
from raycv.batch_inference.score_file import score_chunk
from raycv.batch_inference.writer import ScoreFile
from raycv.common.files import read_json, write_json, write_text
from raycv.config.command_line import run_command
from raycv.config.schema import InferConfig, InferenceConfig, TrackingConfig
from raycv.data.types import Criterion
from raycv.infer import main
from raycv.inference.answer_output import show
from raycv.inference.answerer import load_answerer, read_criteria
from raycv.inference.choose import choose, warn_of_control, with_fold_id
from raycv.inference.last_answer import remember, warn_if_moved
from raycv.inference.log import Record, log_answered, text_facts
from raycv.inference.question_input import read_question
from raycv.inference.questions import Answerer, ModelIdentity, Prediction, Question, as_json, as_text, find_criterion
from raycv.results.find_run import make_newest
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import RunFolder
from raycv.tracking.cross_validation import CrossValidationStore
from raycv.tracking.experiment import open_experiment

CANARY = "w3 w5 zebra-canary"
MARCH, APRIL = "2026-03-01T10:00:00Z", "2026-04-01T10:00:00Z"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("infer"))


def infer(*overrides: str, cwd: Path, **options: object) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-m", "raycv.infer", *overrides],
        cwd=cwd,
        env=environment,
        capture_output=True,
        timeout=300,
        **({"stdin": subprocess.DEVNULL} if "input" not in options else {}),
        **options,
    )


# --- Text passes untouched -------------------------------------------------------------------------------------------


def through_the_command_line(monkeypatch, *arguments: str) -> InferConfig:
    got: list[InferConfig] = []
    monkeypatch.setattr(sys, "argv", ["raycv.infer", *arguments])
    run_command("infer", InferConfig, got.append)
    return got[0]


@pytest.mark.parametrize("text", NASTY)
def test_free_text_is_free_text(monkeypatch, text):
    config = through_the_command_line(monkeypatch, f"post={text}", "run=x", f"criterion={text}", "fold=3")
    assert (config.post, config.criterion, config.run, config.fold) == (text, text, "x", 3)


ARGUMENT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=60)


@given(post=ARGUMENT, criterion=ARGUMENT)
@example(post="${oc.env:HOME}", criterion="'\"\\'")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.long
def test_any_text_arrives_as_it_was(monkeypatch, post, criterion):
    config = through_the_command_line(monkeypatch, f"criterion={criterion}", f"post={post}")
    assert (config.post, config.criterion) == (post, criterion)


def test_a_text_without_quotes_is_refused_without_repeating_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["raycv.infer", "post=I", "feel", "terrible"])
    with pytest.raises(SystemExit) as stopped:
        run_command("infer", InferConfig, print)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    said_refusal(said, "config-syntax", "2 words", 'post="..."', "post_file=post.txt")
    assert "terrible" not in said


def test_bytes_that_are_no_utf8_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["raycv.infer", "post=caf\udce9"])
    with pytest.raises(SystemExit) as stopped:
        run_command("infer", InferConfig, print)
    assert stopped.value.code == 2
    said_refusal(capsys.readouterr().err, "config-syntax", "raycv.infer: post: ", "UTF-8")


# --- Which model answers ---------------------------------------------------------------------------------------------


def test_the_best_fold_of_the_newest_finished_run_answers_unless_told(run):
    runs = run.parent
    chosen = choose("latest", "best", runs, None)
    assert (chosen.run, chosen.fold) == ("toy", 1)
    assert chosen.checkpoints == (run / "fold_1" / "checkpoint",)
    assert chosen.tracking_uri == f"sqlite:///{runs.parent / 'mlflow.db'}"
    assert choose("toy", 0, runs, None).checkpoints == (run / "fold_0" / "checkpoint",)
    assert len(choose(str(run), "ensemble", runs, None).checkpoints) == 2
    folder = run / "fold_0" / "checkpoint"
    assert choose(str(folder), "best", runs, None).checkpoints == (folder,)


def test_a_checkpoint_that_is_not_the_one_that_its_fold_left_is_refused(run, tmp_path):
    copy = RunFolder(shutil.copytree(run, tmp_path / "toy"))
    for fold in (0, 1):
        result = copy.fold(fold).result
        write_json(result, read_json(result) | {"sha256": copy.fold(fold).sums()})
    choose("toy", "ensemble", tmp_path, None)
    shutil.rmtree(copy.fold(1).checkpoint)
    shutil.copytree(copy.fold(0).checkpoint, copy.fold(1).checkpoint)
    choose("toy", 0, tmp_path, None)
    for fold in (1, "ensemble"):
        with refuses("checkpoint-damaged", copy.fold(1).checkpoint / "raycv.json", "result.json"):
            choose("toy", fold, tmp_path, None)


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize("place", ["2>&-", "2>/dev/full"])
def test_the_answer_comes_where_nobody_takes_standard_error(run, place):
    words = [f"run={run}", f"dir={run.parent}", "server=none", "post=w0", "criterion=C0", "output=json"]
    words.append("tracking.experiment=unheard")
    command = f"{shlex.join([sys.executable, '-m', 'raycv.infer', *words])} {place}"
    done = subprocess.run(command, shell=True, cwd=run.parent.parent, stdout=subprocess.PIPE, timeout=120)
    assert json.loads(done.stdout)["criterion_id"] == "C0"
    assert done.returncode == 0
    unknown = subprocess.run(command.replace("=C0", "=Z.9"), shell=True, cwd=run.parent, stdout=subprocess.PIPE)
    assert (unknown.returncode, unknown.stdout) == (2, b"")


LATER = "mlflow sqlalchemy fastapi pandas"
NEVER = "sklearn scipy ray hydra omegaconf"


@pytest.mark.core
@pytest.mark.slow
def test_a_cold_answer_is_printed_before_what_it_does_not_need_is_imported(run):
    words = [f"run={run}", f"dir={run.parent}", "server=none", "post=w0", "criterion=C0", "output=json"]
    command = [sys.executable, "-X", "importtime", "-m", "raycv.infer", *words]
    # One pipe for both streams keeps the order of the answer and of the imports that Python reports.
    done = subprocess.run(
        command, cwd=run.parent, env=users_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:]
    before, answer, after = (
        {line.rpartition("|")[2].strip() for line in part.splitlines()}
        for part in done.stdout.decode().partition('{"label"')
    )
    assert answer
    assert {"torch", "transformers", "peft"} <= before
    assert not before & {*LATER.split(), *NEVER.split()}
    assert "mlflow" in after
    assert not after & {"ray", "hydra", "omegaconf"}


@pytest.mark.parametrize("typed", ["/post={}", "9post={}", "~post={}", "post@x={} [a", "hydra.post='{} [x"])
def test_a_text_behind_a_mistyped_key_is_not_repeated(run, monkeypatch, capsysbinary, typed):
    code, printed = run_here(monkeypatch, capsysbinary, typed.format(f"{CANARY} it's"), "server=none")
    assert code == 2
    assert b"canary" not in printed.out + printed.err


@pytest.mark.parametrize(
    ("name", "fold", "kind", "parts"),
    [
        ("toy", 7, "run-missing", ["fold=7: run toy", "fold 0 to 1", "fold=0 or fold=1"]),
        ("nothing", "best", "run-missing, tracking-store", ["run=nothing", "MLflow", "mlflow.db"]),
        ("nowhere/toi", "best", "run-missing", ["run=nowhere/toi: ", "did you mean toy"]),
        ("{run}/fold_0", "best", "run-missing", ["run={run}/fold_0 ", "config.yaml", "raycv.json"]),
        ("{run}/fold_0/checkpoint", 1, "run-missing", ["fold=1: {run}/fold_0/checkpoint", "of fold 0"]),
        ("{run}/fold_0/checkpoint", "ensemble", "run-missing", ["fold=ensemble: {run}/fold_0/checkpoint", "of fold 0"]),
    ],
)
def test_a_model_that_is_not_there_is_refused_with_a_remedy(run, tmp_path, monkeypatch, name, fold, kind, parts):
    monkeypatch.chdir(tmp_path)
    with refuses(kind, *(part.format(run=run) for part in parts)) as caught:
        choose(name.format(run=run), fold, run.parent, None)
    assert caught.value.remedies


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("toi", "did you mean toy?"),
        ("latset", "did you mean latest?"),
        ("x", "the runs there are (latest is the newest): toy"),
    ],
)
def test_where_there_is_no_run_of_a_name_those_that_there_are_are_offered(run, tmp_path, monkeypatch, name, offered):
    monkeypatch.chdir(tmp_path)
    with refuses("run-missing, tracking-store", f"run={name} ", offered):
        choose(name, "best", run.parent, None)


def test_without_a_finished_run_the_quickstart_is_named(tmp_path):
    with refuses("run-missing", f"{tmp_path} holds no run", "experiment=quickstart"):
        choose("latest", "best", tmp_path, None)
    write_text(tmp_path / "half" / "config.yaml", "cv: {folds: 2}")
    with refuses("run-missing", f"{tmp_path} is finished", "experiment=quickstart", "run=half fold=<k>"):
        choose("latest", "best", tmp_path, None)


def renamed(run: Path, name: str, finished: str | None = None) -> Path:
    """A copy of `run` beside nothing else than its like: the newest run there, under another name."""
    copy = RunFolder(shutil.copytree(run, run.parent.parent / "moving" / name))
    for manifest in copy.root.glob("fold_*/checkpoint/raycv.json"):
        write_json(manifest, read_json(manifest) | {"run": name})
    write_json(copy.report, {"finished": finished} if finished else {})
    make_newest(copy)
    return copy.root


def test_a_finish_time_is_that_of_the_report_however_the_run_is_named(run, tmp_path):
    folder = RunFolder(shutil.copytree(run, tmp_path / "toy"))
    checkpoint = folder.fold(0).checkpoint

    def finished() -> set[str | None]:
        named = ("toy", str(folder.root), str(checkpoint), "latest")
        return {choose(name, "best", tmp_path, None).finished for name in named}

    assert finished() == {None}
    write_json(folder.report, {"finished": MARCH})
    assert finished() == {MARCH}
    alone = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "fold_0" / "checkpoint")
    write_json(tmp_path / "elsewhere" / "report.json", {"finished": APRIL})
    assert choose(str(alone), "best", tmp_path, None).finished is None
    # It is printed, and a file may hold anything.
    for value in ("yesterday", "2026-03-01T10:00:00Z\x1b[2J", 5, [MARCH], None):
        write_json(folder.report, {"finished": value})
        assert finished() == {None}
    for damaged in ("", "[]", "{", "[" * 100_000):
        folder.report.write_text(damaged)
        assert finished() == {None}
    # An unfinished run has no report, and a fold of it may answer.
    folder.report.unlink()
    assert finished() == {None}


def test_where_latest_is_another_run_than_the_one_that_answered_last_it_is_told(tmp_path):
    told: list[str] = []

    def answers(run: str, finished: str | None) -> list[str]:
        told.clear()
        model = {"run": run, "fold": 0, "base": "b", "finished": finished}
        warn_if_moved(tmp_path, model, told.append)
        remember(tmp_path, model)
        return told

    write_text(tmp_path / "a run" / "config.yaml", "")
    assert answers("a run", MARCH) == []
    before = (tmp_path / ".last_answer.json").stat().st_ino
    assert answers("a run", MARCH) == []
    assert (tmp_path / ".last_answer.json").stat().st_ino == before, "written although nothing changed"
    assert answers("b", APRIL) == [
        f"run=latest is run b (finished {APRIL}). The last answer here came from run a run (finished {MARCH}). "
        "To ask that run again: run='a run'"
    ]
    assert answers("b", APRIL) == []
    # The old run is gone, another took its name; a time that was not recorded tells no two runs apart.
    assert answers("b", MARCH) == [
        f"run=latest is run b (finished {MARCH}). The last answer here came from run b (finished {APRIL})."
    ]
    assert answers("b", None) == []
    assert answers("b", APRIL) == []
    assert read_json(tmp_path / ".last_answer.json") == {"run": "b", "finished": APRIL}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".last_answer.json", "a run"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"run": 5}', '{"finished": "x"}', "[" * 1500, "x" * 9000, b"\xff"])
def test_a_damaged_note_of_the_last_answer_costs_nothing(tmp_path, content):
    file = tmp_path / ".last_answer.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    model = {"run": "b", "finished": None}
    warn_if_moved(tmp_path, model, pytest.fail)
    remember(tmp_path, model)
    assert read_json(file) == model


def test_a_place_that_cannot_be_written_costs_nothing(tmp_path):
    model, file = {"run": "b", "finished": None}, tmp_path / ".last_answer.json"
    file.mkdir()
    for place in (tmp_path, tmp_path / "none", Path("/proc/self"), tmp_path / ("n" * 300)):
        warn_if_moved(place, model, pytest.fail)
        remember(place, model)
    assert list(tmp_path.iterdir()) == [file]
    file.rmdir()
    # Opened, a pipe would be waited for.
    os.mkfifo(file)
    warn_if_moved(tmp_path, model, pytest.fail)
    remember(tmp_path, model)
    assert read_json(file) == model


@pytest.mark.long
def test_the_command_says_where_latest_moved_and_names_its_run(run, monkeypatch, capsysbinary):
    def asked(name: str, *more: str) -> tuple[dict, str]:
        words = ["post=w0 w3", "criterion=C0", f"run={name}", f"dir={runs}", "tracking.uri=none", "output=json"]
        code, printed = run_here(monkeypatch, capsysbinary, *words, *more)
        assert code == 0, printed.err
        return json.loads(printed.out)["model"], printed.err.decode()

    runs = renamed(run, "first", MARCH).parent
    for _ in range(2):
        model, said = asked("latest")
        assert (model["run"], model["fold"], model["finished"], said) == ("first", 1, MARCH, "")
    renamed(run, "second", APRIL)
    moved = (
        f"WARNING: run=latest is run second (finished {APRIL}). The last answer here came from run first "
        f"(finished {MARCH}). To ask that run again: run=first\n"
    )
    model, said = asked("latest")
    assert (model["run"], model["finished"], said) == ("second", APRIL, moved)
    assert asked("latest")[1] == ""
    # Who names a run knows which one answers.
    model, said = asked("first")
    assert (model["run"], said) == ("first", "")
    # A file of pairs: told before the work, and the summary names the model.
    pairs, scores = runs.parent / "pairs.csv", runs.parent / "scores.csv"
    write_text(pairs, f"post,criterion\n{CANARY},C0\n")
    given = [f"input={pairs}", f"output={scores}", f"dir={runs}", "tracking.uri=none"]
    code, printed = run_here(monkeypatch, capsysbinary, *given)
    assert code == 0, printed.err
    said = printed.err.decode()
    assert said.startswith(moved)
    assert said.endswith(f"model: run second, fold 1, finished {APRIL}; {run.parent.parent / 'base'}\n")
    assert "run=latest" not in run_here(monkeypatch, capsysbinary, *given)[1].err.decode()
    assert "canary" not in (runs / ".last_answer.json").read_text()


# --- Criteria and answers --------------------------------------------------------------------------------------------

CRITERIA = {"A.1": Criterion("A.1", "low mood", "DEPRESSED_MOOD"), "X9": Criterion("X9", "other words")}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("A.1", "A.1"),
        (" a1 ", "A.1"),
        ("DEPRESSED_MOOD", "A.1"),
        ("depressed mood", "A.1"),
        ("low mood", "A.1"),
        ("X9", "X9"),
        ("x9", "X9"),
        ("Depressed_mood", "A.1"),
        ("self-harm", ""),
        ("is sad about the rain", ""),
        ("sleepless", ""),
    ],
)
def test_a_criterion_is_found_by_id_symptom_or_wording_else_taken_as_text(asked, found):
    criterion = find_criterion(asked, CRITERIA)
    assert criterion.criterion_id == found
    assert criterion.text == (CRITERIA[found].text if found else asked)


def test_a_name_is_none_of_a_criterion_that_does_not_bear_it():
    """An A.1 of a set of one's own may be anything."""
    own = {"A.1": Criterion("A.1", "likes gardening")}
    assert find_criterion("a1", own) == own["A.1"]
    with refuses("criterion-unknown", "criterion=DEPRESSED_MOOD", "names: A.1"):
        find_criterion("DEPRESSED_MOOD", own)


@pytest.mark.parametrize(
    "asked",
    [
        "A.4",
        "SLEEP_ISSUES",
        "B12",
        "NO_SUCH_NAME",
        "z.9",
        "a.99",
        "no_such_name",
        "A.1.2",
        "PHQ-9",
        "4",
        " b_3 ",
        "A.1,X9",
        "A.1, A.4",
    ],
)
def test_an_unknown_id_is_refused_and_the_known_ones_are_named(asked):
    with refuses("criterion-unknown", f"criterion={asked.strip()}: ", "A.1 (DEPRESSED_MOOD), X9"):
        find_criterion(asked, CRITERIA)


@pytest.mark.parametrize(
    ("asked", "meant"), [("ANHEDONI", "ANHEDONIA"), ("SLEEP", "SLEEP_ISSUES"), ("DEPRESED_MOOD", None), ("PTSD", "")]
)
def test_a_word_in_capitals_that_is_nearly_a_name_is_not_taken_for_a_text(asked, meant):
    names = ("DEPRESSED_MOOD", "SLEEP_ISSUES", "ANHEDONIA")
    criteria = {f"A.{number}": Criterion(f"A.{number}", "text", name) for number, name in enumerate(names)}
    if meant == "":
        assert find_criterion(asked, criteria).text == asked
        return
    with refuses("criterion-unknown", f"criterion={asked}: ", f"did you mean {meant}?" if meant else "A.0"):
        find_criterion(asked, criteria)


class Fixed:
    """Says 0.5 of everything, at a threshold of 0.5: the border is matched."""

    identity = ModelIdentity("r", 2, "base")
    threshold = 0.5
    computed_in = "fp32"

    def predict(self, pairs):
        return [
            Prediction(0.5 if criterion == "low mood" else 0.499, post.startswith("long")) for post, criterion in pairs
        ]


@pytest.mark.parametrize(
    ("score", "threshold", "label", "shown"),
    [
        (0.7799996, 0.78, "unmatched", 0.779999),
        (0.78, 0.78, "matched", 0.78),
        (0.4666668, 1.4 / 3, "matched", 0.466667),
        (0.46666664, 1.4 / 3, "unmatched", 0.466666),
        (0.50000042, 0.5000004, "matched", 0.500001),
    ],
)
def test_a_label_is_that_of_the_score_and_what_is_printed_shows_it(score, threshold, label, shown, tmp_path):
    """Of one pair and of a file of them: rounding moves no score over its threshold."""

    class Near(Fixed):
        attention = earlier_attention = "sdpa"

        def predict(self, pairs):
            return [Prediction(score, False) for _ in pairs]

    Near.threshold = threshold
    ((answer,),) = Answerer(Near(), CRITERIA).answer([Question("p", "A.1")])
    assert (answer["label"], answer["score"]) == (label, shown)
    assert (answer["score"] >= answer["threshold"]) == (label == "matched")
    line = as_text([answer], CRITERIA, single=True)
    said, probability, against = re.match(r"(\w+)  \(probability ([\d.]+), threshold ([\d.]+)\)", line).groups()
    assert (float(probability) >= float(against)) == (said == "matched") == (label == "matched")
    output = ScoreFile(tmp_path / "scores.csv", (), 0, {})
    with output.opened():
        output.append(score_chunk(Chunk(1, 1, [AskedPair(1, 2, (), "p", CRITERIA["A.1"])]), Near()))
        output.finish()
    assert f",{label}," in (tmp_path / "scores.csv").read_text()
    assert output.progress.matched == (label == "matched")


def test_what_people_read_of_one_pair_and_of_all():
    long = Answerer(Fixed(), CRITERIA, MARCH).answer(
        [Question("long p", "A.1"), Question("long p"), Question("p", "free")]
    )
    one, table, free = (as_text(each, CRITERIA, single=len(each) == 1) for each in long)
    assert one.splitlines() == [
        "matched  (probability 0.500, threshold 0.50)",
        "criterion: A.1 DEPRESSED_MOOD",
        "model: run r, fold 2, finished 2026-03-01T10:00:00Z; base",
        "the post was shortened to fit the prompt",
    ]
    assert table.splitlines() == [
        "criterion           probability  label",
        "A.1 DEPRESSED_MOOD        0.500  matched",
        "X9                        0.499  unmatched",
        "matched: a probability of 0.50 or more",
        "model: run r, fold 2, finished 2026-03-01T10:00:00Z; base",
        "the post was shortened to fit the prompt (2 pairs)",
    ]
    assert free.splitlines()[1:] == ["criterion: as given", f"model: run r, fold 2, finished {MARCH}; base"]
    # A run of an earlier version, or a scorer of one, does not say when.
    ensemble = {"run": "r", "fold": "ensemble", "base": "base"}
    for model in (ensemble, ensemble | {"finished": None}):
        text = as_text([long[0][0] | {"model": model}], CRITERIA, single=True)
        assert "model: run r, the mean of its folds, finish time not recorded; base\n" in text


def test_answers_keep_the_order_of_questions_and_criteria():
    answers = Answerer(Fixed(), CRITERIA).answer([Question("p"), Question("long p", "A.1"), Question("p", "free")])
    assert [[(a["criterion_id"], a["label"]) for a in each] for each in answers] == [
        [("A.1", "matched"), ("X9", "unmatched")],
        [("A.1", "matched")],
        [(None, "unmatched")],
    ]
    assert [each[0]["truncated"] for each in answers] == [False, True, False]
    assert json.loads(as_json(answers[1], single=True)) == {
        "label": "matched",
        "score": 0.5,
        "threshold": 0.5,
        "criterion_id": "A.1",
        "model": {"run": "r", "fold": 2, "base": "base", "finished": None},
        "truncated": True,
    }
    assert isinstance(json.loads(as_json(answers[0], single=False)), list)
    assert "A.1 DEPRESSED_MOOD" in as_text(answers[0], CRITERIA, single=False)


@pytest.mark.parametrize(
    "post", ["", " \n\t", "\u200b\ufeff", "\u2800", "\u3164\u00ad", "\u200e\u2063\ufe0f", "\u034f\U000e0020", "\u0301"]
)
def test_an_empty_post_or_criterion_is_refused(post):
    with refuses("input-empty", "The post is empty"):
        Answerer(Fixed(), CRITERIA).answer([Question(post)])
    with refuses("input-empty", "Pair 2: The criterion"):
        Answerer(Fixed(), CRITERIA).answer([Question("p"), Question("p", post)])


def test_without_standard_input_or_output_it_says_so(monkeypatch, tmp_path):
    config = through_the_command_line(monkeypatch, "post_file=-")
    monkeypatch.setattr(sys, "stdin", None)
    with refuses("input-file", "post_file=-: standard input", "post_file=<file>"):
        read_question(config)
    answers = Answerer(Fixed(), CRITERIA).answer([Question("p", "A.1")])[0]
    read_end, write_end = os.pipe()
    os.close(read_end)
    full = os.open("/dev/full", os.O_WRONLY)
    for out, said in (
        (None, "it is closed"),
        (os.fdopen(full, "w"), "No space left on device"),
        (os.fdopen(write_end, "w"), "Broken pipe"),
    ):
        monkeypatch.setattr(sys, "stdout", out)
        with refuses("disk-unwritable", "standard output", said):
            show(answers, CRITERIA, config, single=True)
        if out is not None:
            # What is left in its buffer does not fail once more, as it would at the end of the process.
            out.close()


@pytest.mark.parametrize(
    ("given", "kind", "parts"),
    [
        ((), "input-empty", ['post="..."', "post_file=post.txt"]),
        (("post=a", "post_file=b"), "config-value", ["post and post_file", "leave one out"]),
        (("post_file=missing.txt",), "input-file", ["post_file=missing.txt", "No such file"]),
        (("post_file=.",), "input-file", ["post_file=. ", "Is a directory"]),
        (("post=a", "output=xml"), "config-value", ["output=xml", "output=json"]),
    ],
)
def test_a_question_that_cannot_be_read_is_refused(monkeypatch, tmp_path, given, kind, parts):
    monkeypatch.chdir(tmp_path)
    with refuses(kind, *parts):
        read_question(through_the_command_line(monkeypatch, *given))


def test_a_post_file_is_read_as_it_stands(monkeypatch, tmp_path):
    (tmp_path / "post.txt").write_bytes("\ufeffzwei\r\nZeilen ${x}".encode())
    config = through_the_command_line(monkeypatch, f"post_file={tmp_path / 'post.txt'}")
    assert read_question(config).post == "zwei\r\nZeilen ${x}"
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with refuses("input-file", f"post_file={tmp_path / 'latin.txt'}", "UTF-8 (byte 3)"):
        read_question(through_the_command_line(monkeypatch, f"post_file={tmp_path / 'latin.txt'}"))


def test_of_a_text_only_length_and_hash_are_logged():
    facts = text_facts("post", ["abc"])
    assert facts == {
        "post.characters": 3,
        "post.sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }


# --- What is missing, moved or changed since training ----------------------------------------------------------------

AS_TRAINED = InferenceConfig(precision="auto", batch_size=4)


def moved(run: Path, folder: Path, **changes: object) -> Path:
    """A copy of fold 0's checkpoint elsewhere, which says other things of where it comes from."""
    checkpoint = shutil.copytree(run / "fold_0" / "checkpoint", folder / "checkpoint")
    write_json(checkpoint / "raycv.json", read_json(checkpoint / "raycv.json") | changes)
    return checkpoint


def answers_of(checkpoint: Path, *questions: Question, tell=lambda text: None, **options: object) -> list:
    chosen = choose(str(checkpoint), "best", checkpoint.parent, None)
    answerer = load_answerer(chosen, AS_TRAINED, None, tell, questions=questions, **options)
    return [[(a["label"], a["score"]) for a in each] for each in answerer.answer(questions)]


def test_nan_in_the_criteria_is_what_it_was_in_training(run, tmp_path):
    """Earlier versions kept it as text, and their checkpoints do not say so."""
    folder = tmp_path / "criteria"
    folder.mkdir()
    (folder / "criteria.csv").write_text("criterion_id,criterion\nC0,w0\nC1,NaN\n")
    read = {}
    for missing in ("empty", "text", None):
        changes = {"missing": missing} if missing else {}
        checkpoint = moved(run, tmp_path / str(missing), criteria_dir=str(folder), **changes)
        if missing is None:
            values = read_json(checkpoint / "raycv.json")
            del values["missing"]
            write_json(checkpoint / "raycv.json", values)
        read[missing] = list(read_criteria(checkpoint, None, lambda text: None))
    assert read == {"empty": ["C0"], "text": ["C0", "C1"], None: ["C0", "C1"]}


@pytest.mark.parametrize("word", ["None", "NaN", "null", "N/A", "NULL"])
def test_a_word_that_a_person_types_is_text(monkeypatch, tmp_path, word):
    """Nothing has its own spelling there: no key on the command line, null in JSON. A table's cell has none."""
    answers = Answerer(Fixed(), CRITERIA).answer([Question(word, "A.1"), Question(word, word)])
    assert [each["criterion_id"] for answer in answers for each in answer] == ["A.1", None]
    (tmp_path / "post.txt").write_text(f"{word}\n")
    for typed in (f"post={word}", f"post_file={tmp_path / 'post.txt'}"):
        config = through_the_command_line(monkeypatch, typed, f"criterion={word}", "missing=empty")
        assert read_question(config) == Question(word, word)


@pytest.mark.parametrize(
    ("question", "kind", "parts"),
    [
        (Question("w0", "Z.99"), "criterion-unknown", ["criterion=Z.99"]),
        (Question(" "), "input-empty", ["The post"]),
        (Question("w0", ""), "input-empty", ["The criterion"]),
        (Question("w0", "C1"), "base-files", ["folder /nowhere", "base=<folder"]),
    ],
)
def test_a_question_is_checked_before_the_model_is_looked_for(run, tmp_path, question, kind, parts):
    with refuses(kind, *parts) as caught:
        answers_of(moved(run, tmp_path, base_model="/nowhere"), question)
    assert "model.name to" not in str(caught.value)


def test_a_base_that_moved_is_given_by_its_place(run, tmp_path):
    base, question = run.parent.parent / "base", Question("w0 w3", "C1")
    checkpoint = moved(run, tmp_path, base_model="/nowhere")
    assert answers_of(checkpoint, question, base=str(base)) == answers_of(run / "fold_0" / "checkpoint", question)
    other = tiny_llama(tmp_path / "other", tokenizer=wordlevel_tokenizer(["other", "words"]), vocab=None)
    with refuses("base-changed", f"base={other}: its tokenizer"):
        answers_of(checkpoint, question, base=str(other))


def test_the_command_takes_the_place_of_a_base_that_moved(run, tmp_path, monkeypatch, capsysbinary):
    checkpoint, base = moved(run, tmp_path, base_model="org/gone"), run.parent.parent / "base"
    given = ["post=w0 w3", "criterion=C1", f"run={checkpoint}", "tracking.uri=none", f"dir={tmp_path}"]
    code, printed = run_here(monkeypatch, capsysbinary, *given)
    assert code == 2
    said_refusal(printed.err.decode(), "hub-unreachable", "org/gone", "base=<folder or hub id>")
    assert b"model.name to" not in printed.err
    assert printed.out == b""
    code, printed = run_here(monkeypatch, capsysbinary, *given, f"base={base}", "output=json")
    assert (code, printed.err) == (0, b"")
    assert json.loads(printed.out)["model"]["base"] == "org/gone"


def run_here(monkeypatch, capsysbinary, *arguments: str):
    """The command in this process: its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["raycv.infer", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code
    return code, capsysbinary.readouterr()


def test_own_words_need_no_criteria_files(run, tmp_path):
    told, asked = [], Question("w0 w3", "own words")
    checkpoint = moved(run, tmp_path, criteria_dir="/gone")
    assert answers_of(checkpoint, asked, tell=told.append) == answers_of(run / "fold_0" / "checkpoint", asked)
    assert "is used unchanged" in told[0]
    for named in (Question("w0"), Question("w0", "C1"), Question("w0", "A.4"), Question("w0", "z_z")):
        with refuses("data-file", "/gone", "criteria_dir="):
            answers_of(checkpoint, named)


def test_criteria_that_are_worded_otherwise_are_a_warning(run, tmp_path, monkeypatch, capsysbinary):
    text = (run.parent.parent / "criteria" / "criteria.csv").read_text()
    write_text(tmp_path / "criteria.csv", text.replace("w1", "w7"))
    given = ["post=w0 w3", "criterion=C0", f"run={run}", f"dir={run.parent}", "tracking.uri=none", "output=json"]
    _, plain = run_here(monkeypatch, capsysbinary, *given)
    code, printed = run_here(monkeypatch, capsysbinary, *given, f"criteria_dir={tmp_path}")
    assert code == 0
    assert b"are not worded as those that the model was trained with" in printed.err
    assert printed.out == plain.out
    assert plain.err == b""


@pytest.mark.parametrize("given", ["post=w0 w3", "criterion=C0"])
def test_criteria_without_any_text_are_refused(run, tmp_path, monkeypatch, capsysbinary, given):
    write_text(tmp_path / "criteria.csv", "criterion_id,criterion\nC0,\n")
    words = ["post=w0", given, f"run={run}", f"dir={run.parent}", "tracking.uri=none", f"criteria_dir={tmp_path}"]
    code, printed = run_here(monkeypatch, capsysbinary, *dict.fromkeys(words))
    assert code == 2
    said_refusal(printed.err.decode(), "data-file", "criteria.csv: holds no criterion", "criteria_dir=<folder>")


def test_a_lone_dash_is_standard_input(run, monkeypatch, capsysbinary):
    for dash in ("-", "post_file=-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        code, printed = run_here(monkeypatch, capsysbinary, dash, f"run={run}", f"dir={run.parent}")
        assert code == 2
        said_refusal(printed.err.decode(), "input-empty", "post_file=-: ")


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"parent_run_id": "x"}'])
def test_a_damaged_note_of_where_the_run_was_tracked_is_told(run, tmp_path, content):
    copy = shutil.copytree(run, tmp_path / "toy")
    (copy / "tracking.json").write_text(content)
    with refuses("run-damaged", f"{copy / 'tracking.json'} is damaged"):
        choose("toy", "best", tmp_path, None)


@pytest.mark.long
def test_a_store_that_hangs_is_asked_once_and_not_for_long(run, monkeypatch, capsys):
    """The answer is printed, and a script that reads it waits for the end of the process."""
    monkeypatch.setattr("raycv.inference.log.LOG_SECONDS", 1)
    chosen, asked = choose("toy", 0, run.parent, None), []
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        threading.Thread(target=lambda: [asked.append(hanging.accept()) for _ in range(9)], daemon=True).start()
        address = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        config = through_the_command_line(monkeypatch, f"tracking.uri={address}")
        log_answered(config, chosen.tracking_uri, Record({}, {"a": 1}, {}), logging.getLogger("raycv.infer").warning)
        assert len(asked) == 1
    assert "the answer stands, but is not in MLflow" in capsys.readouterr().err
    refusing = through_the_command_line(monkeypatch, "tracking.uri=http://127.0.0.1:9")
    log_answered(refusing, chosen.tracking_uri, Record({}, {"a": 1}, {}), logging.getLogger("raycv.infer").warning)
    # No word of a second attempt, before which it would wait.
    assert capsys.readouterr().err.count("WARNING") == 1
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "30"


@pytest.mark.long
def test_a_run_and_a_fold_are_chosen_by_their_mlflow_ids(run, tmp_path):
    uri, files = f"sqlite:///{tmp_path}/mlflow.db", RunFolder(run)
    store = CrossValidationStore(uri)
    config = TrackingConfig(uri=uri, artifacts=str(tmp_path / "mlruns"), experiment="x")
    parent_id, ids = store.start_parent(open_experiment(store, config), "toy", {}), []
    for fold in range(2):
        ids.append(store.start_child(parent_id, fold, {}))
        store.log_fold(ids[fold], FoldResult.read(files.fold(fold).result), files.fold(fold), files.config)
        store.finish(ids[fold], "FINISHED")
    store.log_metrics(parent_id, {"best_fold": 1})
    assert choose(parent_id, "best", tmp_path, uri).finished is None
    store.set_tags(parent_id, {"raycv.finished": MARCH})
    for asked, fold, found in ((parent_id, "best", 1), (parent_id, 0, 0), (ids[0], "best", 0), (ids[1], 1, 1)):
        chosen = choose(asked, fold, tmp_path, uri)
        (place,) = chosen.checkpoints
        assert (chosen.run, chosen.fold, chosen.tracking_uri) == ("toy", found, uri)
        assert (chosen.parent_id, chosen.fold_id, chosen.finished) == (parent_id, ids[found], MARCH)
        assert chosen.fold_asked == (fold if asked == parent_id else found)
        assert place.is_relative_to(tmp_path / "mlruns")
        assert read_json(place / "raycv.json")["fold"] == found
    assert [place.parent.parent.name for place in choose(parent_id, "ensemble", tmp_path, uri).checkpoints] == ids
    with refuses("run-missing", "fold=1: ", ids[0], "choose one: fold=0"):
        choose(ids[0], 1, tmp_path, uri)
    # Chosen by its folder, a scorer's run learns them from the store.
    copy = shutil.copytree(run, tmp_path / "toy")
    write_json(copy / "tracking.json", {"uri": uri, "parent_run_id": parent_id})
    here = choose("toy", "best", tmp_path, None)
    assert (here.parent_id, here.fold_id) == (parent_id, None)
    assert with_fold_id(here, 5).fold_id == ids[1]


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.slow
def test_the_command_prints_one_json_object_and_logs_no_text(run):
    cwd = run.parent.parent
    done = infer(f"post={CANARY}", "criterion=C1", "output=json", cwd=cwd)
    assert done.returncode == 0, done.stderr.decode()
    answer = json.loads(done.stdout)
    assert list(answer) == ["label", "score", "threshold", "criterion_id", "model", "truncated"]
    assert answer["model"] == {"run": "toy", "fold": 1, "base": str(cwd / "base"), "finished": None}
    assert answer["label"] == ("matched" if answer["score"] >= answer["threshold"] else "unmatched")
    assert done.stdout.count(b"\n") == 1
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{cwd / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raycv-inference")
    logged = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])[0]
    assert logged.info.status == "FINISHED"
    assert logged.data.params["model.run"] == "toy"
    assert float(logged.data.params["threshold"]) == answer["threshold"]
    assert logged.data.params["post.characters"] == str(len(CANARY))
    assert {"seconds_load", "seconds_answer", "pairs"} <= set(logged.data.metrics)
    names = {*logged.data.params, *logged.data.metrics, *logged.data.tags} - {"mlflow.user", "mlflow.runName"}
    assert undocumented(names, "reference/mlflow.md") == set()
    for file in cwd.rglob("*"):
        if file.is_file():
            assert b"zebra-canary" not in file.read_bytes(), file


@pytest.mark.core
@pytest.mark.slow
def test_the_answer_comes_although_tracking_is_away(run):
    post = f"post={CANARY}"
    done = infer(post, "criterion=C0", "tracking.uri=sqlite:////proc/no/mlflow.db", cwd=run.parent.parent)
    assert done.returncode == 0, done.stderr.decode()
    assert re.match(rb"(un)?matched  \(probability 0\.\d{3}, threshold 0\.50\)\n", done.stdout)
    assert b"the answer stands, but is not in MLflow" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.core
@pytest.mark.slow
def test_an_answer_that_nobody_takes_is_told_once_and_logged(run):
    cwd = run.parent.parent
    read_end, write_end = os.pipe()
    os.close(read_end)
    question = ["-m", "raycv.infer", f"post={CANARY}", "criterion=C0", "tracking.experiment=unread"]
    done = subprocess.run(
        [sys.executable, *question], cwd=cwd, stdout=write_end, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        env=users_environment(), timeout=300,
    )  # fmt: skip
    os.close(write_end)
    assert done.returncode == 2
    said_refusal(done.stderr.decode(), "disk-unwritable", "standard output: Broken pipe")
    assert b"Traceback" not in done.stderr
    assert b"ignored" not in done.stderr
    with contextlib.closing(sqlite3.connect(cwd / "mlflow.db")) as store:
        logged = "select status from runs join experiments using (experiment_id) where experiments.name = 'unread'"
        assert store.execute(logged).fetchall() == [("FINISHED",)]


@pytest.mark.core
@pytest.mark.slow
def test_standard_input_and_all_criteria(run):
    done = infer("post_file=-", "output=json", "tracking.uri=none", cwd=run.parent.parent, input=CANARY.encode())
    assert done.returncode == 0, done.stderr.decode()
    assert [answer["criterion_id"] for answer in json.loads(done.stdout)] == ["C0", "C1", "C2"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda checkpoint: (checkpoint / "raycv.json").write_text("{"), "raycv.json is damaged: it is not JSON"),
        (lambda checkpoint: (checkpoint / "raycv.json").write_text('{"format": 1}'), "raycv.json is damaged"),
        (lambda checkpoint: (checkpoint / "adapter_model.safetensors").write_bytes(b"x" * 50), "adapter_model"),
        (lambda checkpoint: (checkpoint / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_refused_without_a_traceback(run, tmp_path, damage, said, monkeypatch, capsys):
    checkpoint = shutil.copytree(run / "fold_0" / "checkpoint", tmp_path / "checkpoint")
    damage(checkpoint)
    monkeypatch.setattr(sys, "argv", ["raycv.infer", "post=x", f"run={checkpoint}", "tracking.uri=none"])
    from raycv.infer import infer as body

    with pytest.raises(SystemExit) as stopped:
        run_command("infer", InferConfig, body)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    said_refusal(told, "checkpoint-damaged", checkpoint, said)
    assert "What to do" in told or "not JSON" in told


def test_a_control_that_answers_is_told_of(tmp_path):
    """`latest` may be a run with permuted labels, whose answers read like any other's."""
    run = make_run(tmp_path, folds=1)
    told: list[str] = []
    warn_of_control(choose("toy", "best", run.parent, None), told.append)
    assert told == []
    write_json(RunFolder(run).data_stats, {"labels_shuffled": True})
    for asked in ("toy", str(RunFolder(run).fold(0).checkpoint)):
        warn_of_control(choose(asked, "best", run.parent, None), told.append)
    assert len(told) == 2
    assert told[0].startswith("run toy is a control with permuted labels (data.shuffle_labels=true)")
    said = subprocess.run(
        [sys.executable, "-m", "raycv.infer", f"run={run}", "post=w1", "criterion=C0", "tracking.uri=none"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "run toy is a control" in said.stderr
