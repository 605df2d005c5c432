"""Free text is free text: from every place where it comes in to what the model reads, not a character changes."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.builders import tiny_llama
from support.http_calls import api, call
from support.scorers import checkpoint, config, scorer  # noqa: F401
from support.toy import Toy, prompt_config
from support.trained_runs import NASTY, save_toy

from raycv.config.arguments import without_verbatim
from raycv.config.schema import InferConfig, InferenceConfig
from raycv.data.prompt_template import render
from raycv.infer import main
from raycv.inference.predictor import Predictor
from raycv.inference.questions import ModelIdentity, Prediction, Question
from raycv.model.base_model import fetch_base
from raycv.serving.client import ask

TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=60)
PAIRS = [(text, f"{text} is it?") for text in NASTY]


class Heard:
    """In the place of the model: keeps the pairs that it is asked."""

    identity = ModelIdentity("toy", 0, "base")
    threshold = 0.5
    computed_in = precision_of_auto = "fp32"
    attention = earlier_attention = "sdpa"
    pairs: list[tuple[str, str]] = []  # noqa: RUF012

    def __init__(self, *_: object) -> None:
        pass

    def check_pair(self, post: str, criterion: str) -> None:
        pass

    def predict(self, pairs):
        Heard.pairs += pairs
        return [Prediction(0.5, False) for _ in pairs]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("text"))


@pytest.fixture
def infer(saved, monkeypatch, tmp_path):
    """Runs the command here; returns what the model was asked."""
    monkeypatch.setattr("raycv.inference.predictor.Predictor", Heard)

    def run(*arguments: str) -> list[tuple[str, str]]:
        Heard.pairs = []
        fixed = (f"run={saved}", f"dir={tmp_path}", "tracking.uri=none")
        monkeypatch.setattr(sys, "argv", ["raycv.infer", *fixed, *arguments])
        main()
        return Heard.pairs

    return run


@given(post=TEXT, criterion=TEXT, others=st.lists(st.sampled_from(["run=x", "fold=3", "output=json"]), unique=True))
@settings(max_examples=300, deadline=None)
def test_any_text_is_set_apart_before_hydra_reads_the_rest(post, criterion, others):
    """The whole way, with fewer examples: test_infer."""
    half = len(others) // 2
    typed = [*others[:half], f"criterion={criterion}", f"post={post}", *others[half:]]
    assert without_verbatim(typed, InferConfig) == (others, {"post": post, "criterion": criterion})


@pytest.mark.long
def test_from_arguments_to_the_model(infer):
    for post, criterion in PAIRS:
        assert infer(f"post={post}", f"criterion={criterion}") == [(post, criterion)]


def test_from_a_file_and_standard_input_to_the_model(infer, tmp_path, monkeypatch):
    """But for the end of the last line, which editors and echo add."""
    for post, end in ((" \t padded\r\n\n", "\n"), ("\n".join(NASTY), ""), (NASTY[0], "\r\n")):
        (tmp_path / "post.txt").write_bytes((post + end).encode())
        assert infer(f"post_file={tmp_path / 'post.txt'}", "criterion=own words") == [(post, "own words")]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((post + end).encode())))
        assert infer("post_file=-", "criterion=own words") == [(post, "own words")]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_from_a_file_of_many_to_the_model(infer, tmp_path, ending):
    source = tmp_path / f"in.{ending}"
    names = ("post", "criterion")
    records = [dict(zip(names, pair, strict=True)) for pair in PAIRS]
    if ending == "csv":
        with source.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([names, *PAIRS])
    elif ending == "jsonl":
        source.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), source)
    # One of the texts is the word that software writes for nothing.
    assert infer(f"input={source}", f"output={tmp_path / 'out.csv'}", "missing=text") == PAIRS


@pytest.mark.long
def test_from_the_client_into_the_body_of_its_request(scorer, checkpoint, tmp_path):
    for post, criterion in PAIRS:
        asked = config(checkpoint, tmp_path, server=scorer.url)
        assert ask(asked, [Question(post, criterion)], print) is not None
        assert scorer.asked[-1][0]["pairs"] == [{"post": post, "criterion": criterion}]


def test_from_a_body_to_the_scorer():
    app, echo = api(max_pairs=100, max_post_characters=200_000, max_body_bytes=2_000_000)
    bodies = [{"post": post, "criterion": criterion} for post, criterion in PAIRS]
    for body in (*bodies, {"pairs": bodies}):
        assert call(app, "POST", "/score", body)[0] == 200
    questions = [Question(*pair) for pair in PAIRS]
    assert [asked for asked, *_ in echo.asked] == [[question] for question in questions] + [questions]


@pytest.mark.core
@pytest.mark.slow
def test_from_the_arguments_of_a_process_to_the_model(saved, tmp_path):
    """All at once: what execve hands over is bytes, and no argument may have more than 128 kB."""
    code = (
        "import json, sys; sys.path.insert(0, 'tests'); import raycv.inference.predictor;"
        "from test_text import Heard, main;"
        "raycv.inference.predictor.Predictor = Heard; main(); print(json.dumps(Heard.pairs))"
    )
    post, criterion = "\n".join(NASTY), "-\n" + "\t".join(text for text in NASTY if len(text) < 1000)
    given = [f"run={saved}", f"dir={tmp_path}", "tracking.uri=none", "output=json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *given, f"post={post}", f"criterion={criterion}"],
        cwd=Path(__file__).parent.parent, env={**os.environ, "LC_ALL": "C"}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout.splitlines()[-1]) == [[post, criterion]]


@given(post=TEXT, criterion=TEXT)
@example(post="{post} {criterion} {0}", criterion=" {} \\ %s ")
@settings(max_examples=300, deadline=None)
def test_the_prompt_holds_both_as_they_are(post, criterion):
    end = " Does the post match the criterion description? Output yes or no"
    assert render(post, criterion) == "post: " + post + ", criterion: " + criterion + end


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """A model whose tokenizer loses nothing: its tokens are bytes, and some of their runs."""
    folder = tmp_path_factory.mktemp("bytes")
    toy = Toy(fetch_base(str(tiny_llama(folder / "base")), None), prompt=prompt_config(max_length=1024))
    return Predictor([toy.save_with_criteria(folder, toy.model())], InferenceConfig(precision="fp32", batch_size=1))


@given(post=TEXT, criterion=TEXT)
@example(post=" padded\r\n\t", criterion="🙂 לא ישן {post}")
@settings(max_examples=300, deadline=None)
def test_the_tokens_are_those_of_the_prompt(predictor, post, criterion):
    encoded, (truncated,) = predictor._encode([(post, criterion)])
    tokens = encoded.input_ids[0, : encoded.lengths[0]]
    read = predictor.encoder.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert not truncated
    assert read == f"<s>{render(post, criterion)}"
