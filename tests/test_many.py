"""Files of many pairs: what goes in comes out scored, in any format, by any engine, however often it is interrupted."""

import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console
from support.builders import no_gpu, tiny_gemma2, tiny_llama
from support.refusals import refuses, said_refusal
from support.toy import WORDS, Recorder, Toy, prompt_config, toy_base, train_config

from raycv.batch_inference import pairs as pairs_module
from raycv.batch_inference.columns import Layout
from raycv.batch_inference.pairs import BadRow, Chunk, PairSource, ScoredChunk, open_source
from raycv.batch_inference.score_file import ProgressView, local_engine, score_chunk
from raycv.batch_inference.state import SUM, Progress, sum_of_state
from raycv.batch_inference.writer import ScoreFile, Stage
from raycv.common.table_reader import read_table
from raycv.config.command_line import compose
from raycv.config.schema import InferConfig, InferenceConfig
from raycv.config.validation import validate
from raycv.data.prompt_template import render
from raycv.data.types import Criterion
from raycv.errors import FaultsError, UserError
from raycv.infer import infer
from raycv.inference.predictor import Predictor
from raycv.inference.questions import ModelIdentity, Prediction
from raycv.model.base_model import fetch_base
from raycv.model.checkpoint import read_info, save_checkpoint
from raycv.row_faults import Faults
from raycv.training.loop import FoldTrainer

ROOT = Path(__file__).parent.parent
CANARY = "zebrafinch"
"""A word of every post: nothing that is written or said may hold it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of a toy fold, its criteria beside it."""
    folder = tmp_path_factory.mktemp("many")
    toy = Toy(toy_base(folder))
    model = toy.model()
    trainer = FoldTrainer(model, toy.encoded, train_config(epochs=2), "fp32", Recorder())
    trainer.fit(np.arange(30), np.arange(30, 48))
    place = toy.save_with_criteria(folder, model)
    # A threshold that tells the posts of these tests apart.
    asked = [(post, criterion.text) for post in posts(12) for criterion in toy.dataset.criteria.values()]
    scores = [one.score for one in Predictor([place], InferenceConfig(precision="auto", batch_size=4)).predict(asked)]
    save_checkpoint(place, model, toy.tokenizer, replace(read_info(place), threshold=float(np.median(scores))))
    return place


def posts(number: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join([CANARY, *generator.choice(WORDS, size=int(generator.integers(2, 9)))]) for _ in range(number)]


def arguments(checkpoint: Path, source: Path, output: Path, *overrides: str) -> list[str]:
    return [f"run={checkpoint}", f"input={source}", f"output={output}", "tracking.uri=none", *overrides]


def score(checkpoint: Path, source: Path, output: Path, *overrides: str) -> None:
    infer(validate(InferConfig, compose("infer", arguments(checkpoint, source, output, *overrides))))


def write_csv(path: Path, header: str, rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(header + "\n")
        csv.writer(file).writerows(rows)
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows_of(number: int) -> list[list[object]]:
    return [[f"p{index}", f"C{index % 3}", post] for index, post in enumerate(posts(number))]


def everything_written(folder: Path) -> str:
    return "".join(path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())


# --- In and out ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_every_format_in_and_out_gives_the_same(checkpoint, tmp_path, capfd):
    rows = rows_of(12)
    names = ("post_id", "criterion_id", "text")
    records = [dict(zip(names, row, strict=True)) for row in rows]
    sources = [tmp_path / f"in.{ending}" for ending in ("csv", "jsonl", "parquet", "tsv", "json")]
    write_csv(sources[0], ",".join(names), rows)
    sources[1].write_text("".join(json.dumps(record) + "\n" for record in records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sources[2])
    pandas.DataFrame(records).to_csv(sources[3], sep="\t", index=False)
    pandas.DataFrame(records).to_json(sources[4], orient="records")
    places = tmp_path / "out"
    found = {}
    for source in sources:
        for ending in ("csv", "jsonl", "parquet"):
            output = places / f"{source.suffix[1:]}.{ending}"
            score(checkpoint, source, output)
            found[output.name] = output.read_bytes()
            assert output.stat().st_mode & 0o777 == 0o600
    assert len(found) == 15
    for ending in ("csv", "jsonl", "parquet"):
        assert len({content for name, content in found.items() if name.endswith(f".{ending}")}) == 1
    lines = [json.loads(line) for line in found["csv.jsonl"].decode().splitlines()]
    assert lines == pyarrow.parquet.read_table(places / "csv.parquet").to_pylist()
    assert [
        {**line, "row": str(line["row"]), "fold": "0", "truncated": str(line["truncated"]).lower()} for line in lines
    ] == [
        {**row, "score": float(row["score"]), "threshold": float(row["threshold"])}
        for row in read_csv(places / "csv.csv")
    ]
    assert list(lines[0]) == ["row", "post_id", "criterion_id", "label", "score", "threshold", "fold", "truncated"]
    assert [(line["row"], line["post_id"], line["criterion_id"]) for line in lines] == [
        (index + 1, f"p{index}", f"C{index % 3}") for index in range(12)
    ]
    assert {line["label"] for line in lines} == {"matched", "unmatched"}
    assert all((line["score"] >= line["threshold"]) == (line["label"] == "matched") for line in lines)
    assert sorted(path.name for path in places.iterdir()) == sorted(found), "nothing else is left"
    assert CANARY not in everything_written(places) + "".join(capfd.readouterr())


def test_without_a_criterion_column_each_post_is_asked_for_all_or_for_the_given_one(checkpoint, tmp_path, capfd):
    source = write_csv(tmp_path / "posts.csv", "id,post,upvotes", [[7, post, 1] for post in posts(3)])
    score(checkpoint, source, tmp_path / "all.csv")
    said = "no column criterion, so each post is asked for every criterion; not read: 'upvotes'"
    assert said in " ".join(capfd.readouterr().err.split())
    found = read_csv(tmp_path / "all.csv")
    assert [(row["row"], row["id"], row["criterion_id"]) for row in found] == [
        (str(row), "7", criterion) for row in (1, 2, 3) for criterion in ("C0", "C1", "C2")
    ]
    score(checkpoint, source, tmp_path / "one.csv", "criterion=C1")
    one = read_csv(tmp_path / "one.csv")
    asked = [row for row in found if row["criterion_id"] == "C1"]
    assert [row["row"] for row in one] == [row["row"] for row in asked]
    np.testing.assert_allclose([float(row["score"]) for row in one], [float(row["score"]) for row in asked], atol=1e-6)


def test_scores_are_those_of_single_pairs_whatever_the_chunks(checkpoint, tmp_path, monkeypatch):
    rows = rows_of(20)
    source = write_csv(tmp_path / "in.csv", "post_id,criterion_id,post", rows)
    score(checkpoint, source, tmp_path / "whole.csv")
    monkeypatch.setattr(pairs_module, "CHUNK_PAIRS", 3)
    score(checkpoint, source, tmp_path / "chunked.csv")
    predictor = Predictor([checkpoint], InferenceConfig(precision="auto", batch_size=4))
    single = [predictor.predict([(post, f"w{key[1]}")])[0].score for _, key, post in rows]
    for name in ("whole.csv", "chunked.csv"):
        found = [float(row["score"]) for row in read_csv(tmp_path / name)]
        np.testing.assert_allclose(found, single, atol=1e-6)


# --- Bad rows --------------------------------------------------------------------------------------------------------

BAD_CSV = (
    b"post_id,criterion,post\n"
    b"p1,C0," + CANARY.encode() + b" w1\n"
    b"p2,C0,\n"  # 3
    b"p3,Z.9," + CANARY.encode() + b"\n"  # 4
    b'p4,C1,"' + CANARY.encode() + b'\nw2\n\nw3"\n'  # 5, good, four lines
    b"p5,C1," + CANARY.encode() + b" \xff\n"  # 9
    b"p6,C1," + CANARY.encode() + b",and more\n"  # 10
    b"p7,C1," + CANARY.encode() + b" \0\n"  # 11
    b'p8,C1,"' + CANARY.encode() + b" never closed\n"  # 12
    b"\n"
    b"p9," + b"w3 " * 60 + b"," + CANARY.encode() + b"\n"  # 14
    b"p10,C2\n"  # 15
    b'p11,C2,"' + CANARY.encode() + b'" said\n'  # 16
    b"p12,," + CANARY.encode() + b"\n"  # 17
    b"p13,C2," + CANARY.encode() + b" w4\n"
)


def test_bad_rows_are_named_by_line_and_the_rest_is_scored(checkpoint, tmp_path, capfd):
    source = tmp_path / "in.csv"
    source.write_bytes(BAD_CSV)
    score(checkpoint, source, tmp_path / "out" / "scores.csv")
    assert [row["post_id"] for row in read_csv(tmp_path / "out" / "scores.csv")] == ["p1", "p4", "p13"]
    assert [row["row"] for row in read_csv(tmp_path / "out" / "scores.csv")] == ["1", "4", "13"]
    bad = {int(row["line"]): row["reason"] for row in read_csv(tmp_path / "out" / "scores.csv.errors.csv")}
    expected = {
        3: "the post is empty",
        4: "criterion=Z.9: the run has no such criterion",
        9: "the post is not UTF-8",
        10: "4 fields instead of 3",
        11: "the post holds a NUL character",
        12: "a quoted field continues after its closing quote",
        14: "leaves no room for a post",
        15: "2 fields instead of 3",
        16: "a quoted field continues after its closing quote",
        17: "the criterion is empty",
    }
    assert list(bad) == list(expected)
    for line, reason in expected.items():
        assert reason in bad[line]
    assert (tmp_path / "out" / "scores.csv.errors.csv").stat().st_mode & 0o777 == 0o600
    said = capfd.readouterr().err
    assert "line 3: the post is empty" in said
    assert "3 pairs scored" in said
    assert "10 bad rows skipped" in said
    assert CANARY not in said + everything_written(tmp_path / "out")


def test_bad_json_lines_and_parquet_rows(checkpoint, tmp_path):
    lines = [
        json.dumps({"Post": f"{CANARY} w1", "post_id": 1}),
        "{broken",
        "",
        json.dumps([CANARY]),
        json.dumps({"post": 3}),
        '{"post": "\\ud800"}',
        json.dumps({"post": CANARY, "criterion": "C1"}),
        json.dumps({"text": CANARY}),
        json.dumps({"post": CANARY, "post_id": "a " * 60}),
        json.dumps({"post": CANARY}),
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    score(checkpoint, source, tmp_path / "j.csv", "criterion=C0")
    assert [(row["row"], row["post_id"]) for row in read_csv(tmp_path / "j.csv")] == [("1", "1"), ("9", "")]
    errors = read_csv(tmp_path / "j.csv.errors.csv")
    assert [row["line"] for row in errors] == ["2", "4", "5", "6", "7", "8", "9"]
    kept = {row["row"] for row in read_csv(tmp_path / "j.csv")}
    assert not kept & {row["row"] for row in errors}
    assert kept | {row["row"] for row in errors} == {str(number) for number in range(1, len(kept) + len(errors) + 1)}
    raw = pyarrow.array([b"w1", b"\xff", None, b"w2"], pyarrow.binary())
    table = pyarrow.table({"post": pyarrow.Array.from_buffers(pyarrow.string(), 4, raw.buffers()), "id": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    score(checkpoint, tmp_path / "in.parquet", tmp_path / "p.csv", "criterion=C0")
    assert [row["id"] for row in read_csv(tmp_path / "p.csv")] == ["1", "4"]
    assert [row["line"] for row in read_csv(tmp_path / "p.csv.errors.csv")] == ["2", "3"]


def test_an_unclosed_quote_costs_its_line_alone(tmp_path):
    source = tmp_path / "in.csv"
    source.write_text('post\nw1\n"w2\nw3\nw4\n')
    (chunk,) = open_source(source, CRITERIA, "C0").chunks()
    assert [(pair.row, pair.line, pair.post) for pair in chunk.pairs] == [(1, 2, "w1"), (3, 4, "w3"), (4, 5, "w4")]
    assert [bad.line for bad in chunk.bad] == [3]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("p2,a,b\n", "3 fields instead of 2"),
        ('p2,"a" b\n', "a quoted field continues after its closing quote"),
        ('p2,"a\n', "a quote is opened and never closed"),
        ("p2," + "a " * 10 + "\n", "a line has more than 20 characters"),
    ],
)
def test_a_table_and_a_file_of_pairs_name_a_broken_record_in_the_same_words(tmp_path, monkeypatch, record, reason):
    monkeypatch.setattr("raycv.common.text_files.LINE_LIMIT", 20)
    source = tmp_path / "in.csv"
    source.write_text(f"post_id,post\np1,w1\n{record}")
    (chunk,) = open_source(source, CRITERIA, "C0").chunks()
    assert [(bad.line, bad.reason) for bad in chunk.bad] == [(3, reason)]
    faults = Faults()
    assert [row.id("post_id") for row in read_table(source, faults).rows if not row.broken] == ["p1"]
    with pytest.raises(FaultsError) as caught:
        faults.raise_any("")
    stops = "" if "fields" in reason else "; reading stopped"
    assert caught.value.faults == [f"{source}, line 3: {reason}{stops}"]


def test_a_line_that_was_cut_is_bad_even_if_an_unclosed_quote_swallowed_it(tmp_path, monkeypatch):
    monkeypatch.setattr("raycv.common.text_files.LINE_LIMIT", 40)
    source = tmp_path / "in.csv"
    source.write_text('post\nw1\n"w2\n' + "w" * 100 + "\nw4\n")
    (chunk,) = open_source(source, CRITERIA, "C0").chunks()
    assert [(pair.line, pair.post) for pair in chunk.pairs] == [(2, "w1"), (5, "w4")]
    assert [(bad.line, bad.reason) for bad in chunk.bad] == [
        (3, "a quote is opened and never closed"),
        (4, "a line has more than 40 characters"),
    ]


@pytest.mark.parametrize(
    ("ending", "beside"),
    [("csv", "part"), ("jsonl", "part"), ("parquet", "parts"), ("csv", "errors.csv"), ("csv", "state.json")],
)
@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling"])
def test_what_lies_beside_the_output_and_is_no_runs_is_left_alone(
    checkpoint, tmp_path, monkeypatch, ending, beside, kind
):
    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text("post,criterion\nw1 w2,C0\n,C0\n")
    victims = tmp_path / "victims"
    victims.mkdir()
    (victims / "kept").write_text("kept")
    place = Path(f"out.{ending}.{beside}")
    if kind == "file":
        place.write_text("kept")
    elif kind == "folder":
        place.mkdir()
        (place / "kept").write_text("kept")
    else:
        place.symlink_to(victims if kind == "link" else tmp_path / "nowhere")
    with refuses("output-differs" if beside == "state.json" and kind != "dangling" else "output-exists", place):
        score(checkpoint, Path("in.csv"), Path(f"out.{ending}"))
    assert place.is_symlink() == (kind in ("link", "dangling"))
    assert [path.read_text() for path in tmp_path.rglob("kept")] == ["kept"] * (1 + (kind == "folder"))
    assert kind != "file" or place.read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", "victims", place.name}


def test_the_list_of_bad_rows_of_an_earlier_run_makes_room_and_other_formats_files_stay(checkpoint, tmp_path):
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    for name in ("out.csv.parts", "out.csv.lock"):
        (tmp_path / name).write_text("kept")
    source.write_text("post,criterion\n,C0\n")
    with refuses("input-empty", f"for {output}: ", f"see {tmp_path / 'out.csv.errors.csv'}"):
        score(checkpoint, source, output)
    source.write_text("post,criterion\nw1,C0\n\n,C1\n")
    for _ in range(2):
        score(checkpoint, source, output)
        assert [row["line"] for row in read_csv(tmp_path / "out.csv.errors.csv")] == ["4"]
        output.unlink()
    assert [(tmp_path / name).read_text() for name in ("out.csv.parts", "out.csv.lock")] == ["kept"] * 2


@pytest.mark.parametrize("long_post", ["head_tail", "sliding"])
def test_a_pair_without_room_for_a_word_of_its_post_is_a_bad_row(tmp_path, long_post):
    toy = Toy(
        fetch_base(str(tiny_llama(tmp_path / "base")), None), prompt=prompt_config(max_length=150, long_post=long_post)
    )
    place = toy.save_with_criteria(tmp_path, toy.model())
    model = Predictor([place], InferenceConfig(precision="auto", batch_size=4))
    empty = model.encoder.count(render("", ""))
    # Room for two tokens, of which the first character takes four.
    narrow = next(text for n in range(200) if model._post_limit(text := "x " * n + "y") == empty + 2)
    post = f"\N{GRINNING FACE} {CANARY} " * 20
    rows = [
        ["a", "C0", post],
        ["b", narrow, post],
        ["c", narrow, "a " * 200],
        ["d", "z " * 150, post],
        ["e", "C1", "w1"],
    ]
    score(place, write_csv(tmp_path / "in.csv", "id,criterion,post", rows), tmp_path / "out.csv")
    assert [row["id"] for row in read_csv(tmp_path / "out.csv")] == ["a", "c", "e"]
    bad = read_csv(tmp_path / "out.csv.errors.csv")
    assert [(row["row"], row["line"]) for row in bad] == [("2", "3"), ("4", "5")]
    assert bad[0]["reason"] == (
        "The criterion and the question leave no room for a word of the post in the prompt's 150 tokens."
    )
    assert "leaves no room for a post" in bad[1]["reason"]
    with refuses("prompt-length", "prompt's 150 tokens") as caught:
        model.predict([(post, narrow)])
    assert caught.value.remedies == ["shorten the criterion"]
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_the_longest_line_that_may_be_costs_no_other(tmp_path, monkeypatch, ending, end):
    monkeypatch.setattr("raycv.common.text_files.LINE_LIMIT", 40)
    for length in (*range(36, 46), *range(78, 86), *range(118, 126)):
        lines = [line if ending == "csv" else json.dumps({"post": line}) for line in ("w1", "w2", "w3")]
        lines[1] = "w" * length if ending == "csv" else json.dumps({"post": "w" * (length - 12)})
        assert len(lines[1]) == length
        source = tmp_path / f"in.{ending}"
        source.write_bytes(end.join(["post", *lines] if ending == "csv" else lines).encode())
        (chunk,) = open_source(source, CRITERIA, "C0").chunks()
        first = 2 if ending == "csv" else 1
        good = [1, 2, 3] if length <= 40 else [1, 3]
        assert [(pair.row, pair.line) for pair in chunk.pairs] == [(row, row + first - 1) for row in good], length
        assert [bad.row for bad in chunk.bad] == ([] if length <= 40 else [2])


@pytest.mark.parametrize("name", ["id", "post"])
def test_times_and_nested_values_of_parquet_are_no_ids_and_no_posts(tmp_path, name):
    """Some are beyond what Python has room for."""
    far = 2**62
    kinds = [pyarrow.timestamp("ms"), pyarrow.timestamp("ns"), pyarrow.duration("s")]
    columns = [pyarrow.array([far, None], pyarrow.int64()).cast(kind) for kind in kinds]
    columns.append(pyarrow.array([2**31 - 1, None], pyarrow.int32()).cast(pyarrow.date32()))
    columns.append(pyarrow.array([[far], None], pyarrow.list_(pyarrow.int64())).cast(pyarrow.list_(kinds[0])))
    for column in columns:
        table = pyarrow.table({"post": ["w1", "w2"]} | {name: column})
        pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
        (chunk,) = open_source(tmp_path / "in.parquet", CRITERIA, "C0").chunks()
        fault = "id is neither a text nor a number" if name == "id" else "the post is not a text"
        assert chunk.bad[0] == BadRow(1, 1, fault), column.type
        assert [pair.row for pair in chunk.pairs] == ([2] if name == "id" else [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"post": "a"}, {"post": "b"}]\n', "line 1: not a JSON object"),
        ('\n[\n  {\n    "post": "a"\n  }\n]\n', "line 2: not JSON: Expecting value"),
        ("{'post': 'a'}\n{'post': 'b'}\n", "line 1: not JSON: Expecting property name"),
        ('{"post": "a", "post": "b"}\n', "line 1: the key post occurs 2 times"),
        ("{}\n", "line 1: an object without keys"),
    ],
)
def test_json_that_is_no_lines_of_objects_is_told_by_its_first_line(tmp_path, content, said):
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    with refuses("input-file", f"{source}: ", said, '{"post": "..."}'):
        open_source(source, CRITERIA, None)


def test_a_key_that_a_json_line_has_twice_is_refused_as_in_the_other_formats(tmp_path):
    source = tmp_path / "in.jsonl"
    lines = ['{"post": "a", "other": {"x": 1, "x": 2}, "m": 1, "M": 2}', '{"post": "a", "post": "b"}', '{"post": "a"}']
    lines += ['{"post": "a", "Post ": "b"}', '{"post": "a", "id": 1, "ID": 2}', f'{{"{CANARY}": 1, "{CANARY}": 2}}']
    source.write_text("\n".join(lines))
    (chunk,) = open_source(source, CRITERIA, "C0").chunks()
    assert [pair.row for pair in chunk.pairs] == [1, 3]
    assert [(bad.row, bad.reason) for bad in chunk.bad] == [
        (2, "the key post occurs 2 times"),
        (4, "the key post occurs 2 times"),
        (5, "the key id occurs 2 times"),
        (6, "the post is missing"),
    ]


@pytest.mark.parametrize(
    ("content", "overrides", "kind", "said"),
    [
        ("a,b\n1,2\n", [], "input-file", "in.csv has no column post or text: its columns are 'a', 'b'"),
        ("post;criterion\na;b\n", [], "input-file", "in.csv has no column post or text: its columns are 'post;"),
        ("", [], "input-file", "in.csv has no column post or text: it is empty"),
        ("post,text\n1,2\n", [], "input-file", "in.csv has both post and text"),
        ("post,post\n1,2\n", [], "input-file", "in.csv: the column post occurs 2 times"),
        ("post,criterion,criterion_id\n1,2,3\n", [], "input-file", "in.csv has both criterion and criterion_id"),
        ("post\n", [], "input-empty", "out.csv: it has no rows"),
        ("post\n \n", [], "input-empty", "out.csv: all of its rows are bad, see out.csv.errors.csv"),
        ("post,criterion\na,C0\n", ["criterion=C0"], "config-value", "in.csv has a column criterion"),
        ("post\na\n", ["criterion=Z.9"], "criterion-unknown", "criterion=Z.9"),
        ("post\na\n", ["post=b"], "config-value", "input and post"),
        ("post\na\n", ["output=json"], "config-value", "output=json"),
        ("post\na\n", ["input=in.txt"], "input-file", "input=in.txt"),
        ("post\na\n", ["input=no.csv"], "input-file", "input=no.csv: No such file"),
    ],
)
def test_what_cannot_be_used_is_refused(checkpoint, tmp_path, monkeypatch, content, overrides, kind, said):
    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text(content)
    with refuses(kind, said) as caught:
        score(checkpoint, Path("in.csv"), Path("out.csv"), *overrides)
    assert caught.value.remedies
    assert (caught.value.remedies == ["save it with commas"]) == ("post;" in said)
    assert not Path("out.csv").exists()
    assert {path.name for path in Path().iterdir()} <= {"in.csv", "out.csv.errors.csv"}


CRITERIA_OF_TWO = {key: Criterion(key, f"criterion {key}") for key in ("A.1", "A.2")}
WORKBOOK = ["CSV UTF-8", "pandas.DataFrame.to_csv"]
FORMS = {
    "a.xlsx": (b"PK\x03\x04", "an Excel workbook", WORKBOOK),
    "a.xls": (b"\xd0\xcf\x11\xe0", "an Excel workbook", WORKBOOK),
    "xls.csv": (b"\xd0\xcf\x11\xe0", "an Excel workbook of the old kind (.xls)", WORKBOOK),
    "utf16.csv": ("post\nx\n".encode("utf-16"), "UTF-16", WORKBOOK),
    "a.csv": (b"sep=;\npost;id\nx;1\n", "the line `sep=`", ["save it with commas"]),
    "lines.json": (b'{"post": "x"}\n{"post": "y"}\n', "ends in .jsonl", []),
    "columns.json": (b'{"post": {"0": "x"}}', "to_json(orient='records')", []),
    "a.txt": (b"x", "ending", [".tsv", ".json"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_another_form_is_named_with_the_way_to_save_it(tmp_path, name):
    content, form, remedies = FORMS[name]
    (tmp_path / name).write_bytes(content)
    with refuses("input-file", tmp_path / name, form) as caught:
        open_source(tmp_path / name, CRITERIA_OF_TWO, None)
    assert caught.value.remedies
    assert all(remedy in " ".join(caught.value.remedies) for remedy in remedies)


@pytest.mark.parametrize("name", ["in.jsonl", "in.json"])
def test_numbers_of_json_are_ids_as_they_are_spelt_and_no_posts(tmp_path, name):
    ids = ["12345678901234567890123", "1.50", "1e5", "-0", "NaN"]
    records = [f'{{"post_id": {key}, "post": "x"}}' for key in ids] + ['{"post_id": 1, "post": 5}']
    text = "\n".join(records) if name == "in.jsonl" else f"[{', '.join(records)}]"
    (tmp_path / name).write_text(text)
    (chunk,) = open_source(tmp_path / name, CRITERIA_OF_TWO, "A.1").chunks()
    assert [pair.ids for pair in chunk.pairs] == [(key,) for key in ids]
    assert [bad.reason for bad in chunk.bad] == ["the post is not a text"]


def test_a_number_of_json_names_a_criterion_by_its_id(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"post": "x", "criterion_id": 2}\n')
    criteria = {"2": Criterion("2", "sleep")}
    (chunk,) = open_source(tmp_path / "in.jsonl", criteria, None).chunks()
    assert [pair.criterion.criterion_id for pair in chunk.pairs] == ["2"]


def test_an_input_is_never_overwritten(checkpoint, tmp_path):
    for name in ("out.csv", "out.csv.errors.csv", "out.csv.state.json"):
        source = tmp_path / name
        source.write_text("post\nprecious\n")
        with refuses("output-exists", f"output={tmp_path / 'out.csv'}: ", f"the input {source}.", "output=<file>"):
            score(checkpoint, source, tmp_path / "out.csv")
        assert source.read_text() == "post\nprecious\n"
        source.unlink()
    (tmp_path / "in.csv").write_text("post\nprecious\n")
    (tmp_path / "out.csv.errors.csv").symlink_to("in.csv")
    with refuses("output-exists", f"output={tmp_path / 'out.csv'}: ", f"the input {tmp_path / 'in.csv'}."):
        score(checkpoint, tmp_path / "in.csv", tmp_path / "out.csv")


def test_a_parquet_column_that_occurs_twice_is_refused(checkpoint, tmp_path):
    for names in (["post", "post"], ["Post", "post"]):
        path = tmp_path / "in.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=names), path)
        with refuses("input-file", f"{path}: the column post", "2 times"):
            score(checkpoint, path, tmp_path / "out.csv")


# --- Words for nothing, and near misses ------------------------------------------------------------------------------


def test_what_pandas_writes_for_nothing_is_a_bad_row(checkpoint, tmp_path, capfd):
    frame = pandas.DataFrame({"id": ["NaN", "b", "c"], "post": ["w1", None, "w2"], "criterion": ["C0", "C1", None]})
    source = tmp_path / "in.csv"
    frame.to_csv(source, index=False, na_rep="NaN")
    score(checkpoint, source, tmp_path / "out.csv")
    assert [(row["row"], row["id"]) for row in read_csv(tmp_path / "out.csv")] == [("1", "NaN")]
    reason = "the {} is empty: it holds NaN (missing=text takes it as text)"
    errors = read_csv(tmp_path / "out.csv.errors.csv")
    assert [(row["line"], row["reason"]) for row in errors] == [
        ("3", reason.format("post")),
        ("4", reason.format("criterion")),
    ]
    assert "2 bad rows skipped" in capfd.readouterr().err
    score(checkpoint, source, tmp_path / "text.csv", "missing=text")
    assert [row["criterion_id"] for row in read_csv(tmp_path / "text.csv")] == ["C0", "C1", ""]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_words_for_nothing_in_every_format_and_ids_that_are_spelt_like_them(tmp_path, ending):
    criteria = {**CRITERIA, "NA": Criterion("NA", "w9")}
    texts = [("null", "C0"), ("#N/A", "C1"), ("none", "C0"), ("null and void", "C1"), ("w1", "NA"), ("w2", "<NA>")]
    names = ("post", "criterion")
    source = tmp_path / f"in.{ending}"
    records = [dict(zip(names, each, strict=True)) for each in texts]
    if ending == "csv":
        write_csv(source, ",".join(names), [list(each) for each in texts])
    elif ending == "jsonl":
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), source)
    (chunk,) = open_source(source, criteria, None).chunks()
    assert [(pair.row, pair.criterion.criterion_id) for pair in chunk.pairs] == [(3, "C0"), (4, "C1"), (5, "NA")]
    assert [bad.row for bad in chunk.bad] == [1, 2, 6]
    (chunk,) = open_source(source, criteria, None, missing="text").chunks()
    assert [pair.post for pair in chunk.pairs] == [post for post, _ in texts]
    by_id = write_csv(tmp_path / "ids.csv", "post,criterion_id", [["w1", "NA"], ["w1", "NaN"]])
    (chunk,) = open_source(by_id, criteria, None).chunks()
    assert [pair.criterion.criterion_id for pair in chunk.pairs] == ["NA"]
    assert [bad.reason for bad in chunk.bad] == ["criterion_id 'NaN' is not one of the run's"]


def test_an_output_is_continued_with_the_same_meaning_of_nothing_alone(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "CHUNK_PAIRS", 9)
    for number, (first, then) in enumerate([("missing=empty", "missing=text"), ("missing=text", "missing=empty")]):
        (folder := tmp_path / str(number)).mkdir()
        source, output, _ = left_in_the_middle(checkpoint, folder, monkeypatch, first)
        with refuses("output-differs", f"{output} ", ": missing changed"):
            score(checkpoint, source, output, then)
        score(checkpoint, source, output, first)


@pytest.mark.parametrize("overrides", [[], ["missing=text"]])
def test_what_an_earlier_version_began_is_continued_as_text(checkpoint, tmp_path, monkeypatch, capfd, overrides):
    """Such versions had no key for it, and took NaN and the like as text."""
    monkeypatch.setattr(pairs_module, "CHUNK_PAIRS", 3)
    texts = [*posts(4), "NaN", "null", *posts(2)]
    source, output = write_csv(tmp_path / "in.csv", "post", [[post] for post in texts]), tmp_path / "out.csv"
    score(checkpoint, source, tmp_path / "whole.csv", "criterion=C0", "missing=text")
    with monkeypatch.context() as patch:
        patch.setattr("raycv.batch_inference.score_file.ProgressView.update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(checkpoint, source, output, "criterion=C0")
    rewrite(tmp_path / "out.csv.state.json", lambda values: values["identity"].pop("missing"))
    capfd.readouterr()
    score(checkpoint, source, output, "criterion=C0", *overrides)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    said = "an earlier version began this file: NaN and the like stay text, as it began (missing=text)"
    assert (said in capfd.readouterr().err) == (overrides == [])


@pytest.mark.parametrize("blank", ["\u2800", "\u3164", "\u00ad", "\u200e", "\u2063", "\ufe0f", "\u034f", "\U000e0020"])
def test_posts_criteria_and_ids_of_invisible_characters_are_bad_rows(tmp_path, blank):
    rows = [["a", "w1", "C0"], ["b", blank, "C0"], ["c", "w1", blank], [blank, "w1", "C0"]]
    (chunk,) = open_source(write_csv(tmp_path / "in.csv", "id,post,criterion", rows), CRITERIA, None).chunks()
    assert [pair.row for pair in chunk.pairs] == [1]
    assert [(bad.row, bad.reason.partition(":")[0]) for bad in chunk.bad] == [
        (2, "the post is empty"),
        (3, "the criterion is empty"),
        (4, "id holds nothing but invisible characters (1)"),
    ]


def test_a_json_line_of_invisible_characters_or_nul_is_no_blank_line(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"post": "w1"}\n\u2800\n\0\0\n \t\n{"post": "w2"}\n', "utf-8")
    (chunk,) = open_source(source, CRITERIA, "C0").chunks()
    assert [(pair.row, pair.line) for pair in chunk.pairs] == [(1, 1), (4, 5)]
    assert [bad.line for bad in chunk.bad] == [2, 3]


NEAR = {
    "criterion": """criteria criterions criterias critera criteron crierion criterion? criterium kriterion cirterion
        citerion criterion_text criterion_name criteria_name criterion-description criterion_code symptom symptoms
        DSM5_symptom dsm5_symptoms symptom_name dsm5symptom criterionText criterionDescription CriterionName""",
    "criterion_id": """criterionid criterion-id criteria_id critera_id criterion_ids CriterionID criterion.id
        criteriaids crieterion_id criterin_id""",
    "post_id": "postid post-id PostID post.id post_ids psot_id post__id posts_id",
    "id": "ids id?",
}
# By one of their words these may say which criterion is asked.
NAMES_A_CRITERION = {
    "criterion": """symptom_text symptom_description criterion_desc criteria_desc criterion_definition
        criterion_statement criterion_question criterion_label crit dsm_criterion dsm5_criterion DSM5_criterion
        target_criterion Kriterium criterion_text_de symptomText asked_crit Symptom-Beschreibung criterion_dsm5""",
    "criterion_id": "symptom_id criterion_number criterion_key crit_id SymptomID symptom_nr dsm5_criterion_id",
}
FINE = """text_length label_2 score date criteria_version label annotator author subreddit title language url split fold
    criterion_1 criterion_2 criterion2 criteria_count n_criteria criterion_date poster_id user_id
    thread_id host_id comment_id posted posted_at post_date post_length post_url post_score context test cost port
    source iteration critical criticism critic symptom_count status sentence_id sentence_text explanation index rating
    created_utc upvotes idx uid x_criterion x_post_id x_id Unnamed:_0 diagnosis
    num_of_criteria number_of_symptoms has_symptoms criterion_source criteria_set symptom_severity criterion_met
    symptomatic x_symptom_id x_crit criterion_scores critique criteria_url symptom_n"""


def test_near_misses_of_known_columns_are_refused_and_other_columns_are_not(tmp_path):
    path, near = tmp_path / "in.csv", [(name, meant) for meant, names in NEAR.items() for name in names.split()]
    assert (len(near), len(FINE.split())) >= (40, 40)
    near += [("Criterion ID", "criterion_id"), (" post  id ", "post_id")]
    for name, meant in near:
        write_csv(path, f"post,{name}", [["w1", "C0"]])
        shown = repr(name.strip())
        parts = (f"{path} ", "1 fault", f"line 1: the column {shown} ", f"did you mean {meant}?")
        with refuses("input-file", *parts, f"1. rename {shown} to {meant}\n", f"x_{meant}"):
            open_source(path, CRITERIA, None)
    for name in FINE.split():
        assert open_source(write_csv(path, f"post,{name}", [["w1", "C0"]]), CRITERIA, None).layout.notices == ()


def test_a_column_that_may_name_a_criterion_is_refused_where_each_post_would_be_asked_for_all(tmp_path):
    path = tmp_path / "in.csv"
    for meant, names in NAMES_A_CRITERION.items():
        for name in names.split():
            write_csv(path, f"post,{name}", [["w1", "C0"]])
            with refuses("input-file", "1 fault", f"line 1: the column {name!r} ", f"did you mean {meant}?"):
                open_source(path, CRITERIA, None)
            # One criterion is given for all rows, or another column names it.
            assert open_source(path, CRITERIA, "C0").layout.others == (name,)
            write_csv(path, f"post,{name},criterion", [["w1", "C0", "C0"]])
            assert open_source(path, CRITERIA, None).layout.others == (name,)
    # What could be prose is not repeated.
    write_csv(path, f"post,the symptom of {CANARY}", [["w1", "C0"]])
    with refuses("input-file", "the column number 2 (a value of 25 characters)") as caught:
        open_source(path, CRITERIA, None)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_all_near_misses_of_a_file_are_named_at_once(checkpoint, tmp_path, ending):
    source = tmp_path / f"in.{ending}"
    record = {"post": CANARY, "criteria": CANARY, "postid": CANARY}
    where = {"csv": "line 1", "jsonl": "the first object", "parquet": "the schema"}[ending]
    if ending == "csv":
        write_csv(source, ",".join(record), [list(record.values())])
    elif ending == "jsonl":
        source.write_text(json.dumps(record))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), source)
    for overrides in ([], ["criterion=C0"]):
        faults = (f"{where}: the column 'criteria' ", f"{where}: the column 'postid' ")
        hints = ("did you mean criterion?", "did you mean post_id?")
        with refuses("input-file", f"input={source} ", "2 faults", *faults, *hints) as caught:
            score(checkpoint, source, tmp_path / "out.csv", *overrides)
        assert CANARY not in str(caught.value)
    assert not (tmp_path / "out.csv").exists()


def test_a_near_miss_beside_the_column_that_is_read_is_told(checkpoint, tmp_path, capfd):
    source = write_csv(tmp_path / "in.csv", "post,criterion,criteria,posts,date", [["w1", "C0", "x", "y", "z"]])
    score(checkpoint, source, tmp_path / "out.csv")
    said = capfd.readouterr().err
    assert "the column 'criteria' is not read, since criterion is" in said
    assert "the column 'posts' is not read, since post is" in said
    assert "date" not in said
    assert len(read_csv(tmp_path / "out.csv")) == 1


def test_a_later_json_line_with_a_near_miss_is_a_bad_row(tmp_path):
    source = tmp_path / "in.jsonl"
    lines = [{"post": "a", "date": 1}, {"post": "b", "criteria": "C0"}, {"post": "c", "criteria": None}]
    source.write_text(
        "\n".join(json.dumps(line) for line in [*lines, {"post": "d", "n_criteria": 2}, {"post": "e", "symptom_id": 3}])
    )
    (chunk,) = open_source(source, CRITERIA, None).chunks()
    assert sorted({pair.row for pair in chunk.pairs}) == [1, 3, 4]
    assert [bad.reason for bad in chunk.bad] == [
        "has 'criteria', which the first record has not; is it criterion?",
        "has 'symptom_id', which the first record has not; is it criterion_id?",
    ]


def test_a_misspelt_column_of_posts_is_hinted_at(tmp_path):
    for name, meant in (("Posts", "post"), ("texts", "text"), ("post_text", "post")):
        path = write_csv(tmp_path / "in.csv", f"{name},criterion", [])
        with refuses("input-file", f"{path} ", f"; perhaps '{name}' is the {meant}.\n"):
            open_source(path, CRITERIA, None)


# --- Continuing ------------------------------------------------------------------------------------------------------

CRITERIA = {f"C{index}": Criterion(f"C{index}", WORDS[index]) for index in range(3)}


class Fake:
    """Scores by the length of the post."""

    identity = ModelIdentity("toy", 0, "none")
    threshold = 0.5
    computed_in = "fp32"
    attention = earlier_attention = "sdpa"

    def check_pair(self, post: str, criterion: str) -> None:
        pass

    def predict(self, pairs):
        return [Prediction(len(post) % 10 / 10, False) for post, _ in pairs]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def refused(*_: object) -> None:
    raise UserError("it is broken", kind="input-file")


def scored(source: PairSource, done: int = 0) -> list[ScoredChunk]:
    return list(local_engine(Fake)(source, done))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_interrupted_after_any_chunk_or_within_one_the_bytes_are_those_of_an_unbroken_run(tmp_path, ending):
    rows = [["p", post] for post in posts(20)]
    rows[4][1] = rows[17][1] = ""
    source = open_source(write_csv(tmp_path / "in.csv", "post_id,post", rows), CRITERIA, None, chunk_pairs=9)
    expected = {}
    for stop in range(8):
        output = ScoreFile(tmp_path / str(stop) / f"out.{ending}", source.layout.ids, 0, {"a": 1})
        with output.opened():
            for chunk in scored(source)[:stop]:
                output.append(chunk)
            # A chunk that was written and not counted, torn in the middle.
            for file in output.output.parent.glob("*"):
                if file.name.endswith((".part", ".errors.csv")):
                    file.write_bytes(file.read_bytes() + b"999,torn")
            if ending == "parquet" and stop:
                (output.output.parent / f"out.{ending}.parts" / f"{999:015}.parquet").write_bytes(b"torn")
        again = ScoreFile(output.output, source.layout.ids, 0, {"a": 1})
        with again.opened():
            assert again.progress.records == min(3 * stop, 20)
            assert again.stage is (Stage.GROWING if stop else Stage.NEW)
            for chunk in scored(source, again.progress.records):
                again.append(chunk)
            again.finish()
        assert again.stage is Stage.MOVED
        assert (again.progress.pairs, again.progress.bad) == (54, 2)
        files = {file.name: file.read_bytes() for file in output.output.parent.iterdir()}
        assert set(files) == {f"out.{ending}", f"out.{ending}.errors.csv"}
        expected = expected or files
        assert files == expected


@pytest.mark.long
@pytest.mark.parametrize(("sink", "ending"), [("TextPart", "csv"), ("TextPart", "jsonl"), ("ParquetParts", "parquet")])
@pytest.mark.parametrize("step", ["finish", "discard"])
def test_killed_before_or_after_the_move_into_place_the_same_command_ends_it(
    checkpoint, tmp_path, monkeypatch, sink, step, ending
):
    source = write_csv(tmp_path / "in.csv", "post,criterion", [["w1", "C0"], ["", "C0"], ["w2", "C1"]])
    whole, broken = tmp_path / "whole" / f"out.{ending}", tmp_path / "broken" / f"out.{ending}"
    score(checkpoint, source, whole)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"raycv.batch_inference.output_formats.{sink}.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            score(checkpoint, source, broken)
    assert broken.exists() == (step == "discard")
    kept = {path.name: path.read_bytes() for path in broken.parent.glob("*") if path.is_file()}
    if broken.exists():
        with refuses("output-exists", f"output={broken} "):
            score(checkpoint, write_csv(tmp_path / "other.csv", "post", [["w1"]]), broken)
        broken.write_bytes(kept[broken.name][:-3])
        with refuses("output-exists", f"output={broken} "):
            score(checkpoint, source, broken)
        broken.write_bytes(kept[broken.name])
    monkeypatch.setattr("raycv.batch_inference.score_file.Recipe.load", killed)  # nothing is left to score
    score(checkpoint, source, broken)
    assert {path.name: path.read_bytes() for path in broken.parent.iterdir()} == {
        path.name: path.read_bytes() for path in whole.parent.iterdir()
    }


def test_an_output_that_was_taken_away_before_its_state_was_is_made_anew(checkpoint, tmp_path, monkeypatch):
    source = write_csv(tmp_path / "in.csv", "post,criterion", [["w1", "C0"]])
    output = tmp_path / "out.csv"
    score(checkpoint, source, output)
    whole = output.read_bytes()
    output.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("raycv.batch_inference.output_formats.TextPart.discard", lambda self: sys.exit())
        with pytest.raises(SystemExit):
            score(checkpoint, source, output)
    output.unlink()
    score(checkpoint, source, output)
    assert output.read_bytes() == whole


def test_other_inputs_are_not_continued(checkpoint, tmp_path, monkeypatch):
    source = write_csv(tmp_path / "in.csv", "post", [[post] for post in posts(9)])
    output = tmp_path / "out.csv"

    with monkeypatch.context() as patch:
        patch.setattr("raycv.batch_inference.score_file.ProgressView.update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(checkpoint, source, output)
    state = tmp_path / "out.csv.state.json"
    assert json.loads(state.read_text())["records"] == 9
    with refuses("output-differs", f"{output} ", ": criterion, the records of a chunk changed", f"delete {state}"):
        score(checkpoint, source, output, "criterion=C1")
    manifest = checkpoint / "raycv.json"
    before = manifest.read_text()
    try:
        manifest.write_text(json.dumps({**json.loads(before), "threshold": 0.1}))
        with refuses("output-differs", f"{output} ", ": the checkpoints changed"):
            score(checkpoint, source, output)
    finally:
        manifest.write_text(before)
    os.utime(source, (1, 1))
    with refuses("output-differs", f"{output} ", ": the time of the input changed"):
        score(checkpoint, source, output)
    state.unlink()
    with refuses("output-exists", f"output={output}: {output}.part is there"):
        score(checkpoint, source, output)
    (tmp_path / "out.csv.part").unlink()
    score(checkpoint, source, output)
    with refuses("output-exists", f"output={output} is there"):
        score(checkpoint, source, output)
    assert len(read_csv(output)) == 27


def left_in_the_middle(checkpoint, folder, monkeypatch, *overrides):
    """The input, the output and the state of scores that were interrupted after the first of three chunks."""
    source = write_csv(folder / "in.csv", "post", [[post] for post in posts(9)])
    with monkeypatch.context() as patch:
        patch.setattr("raycv.batch_inference.score_file.ProgressView.update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(checkpoint, source, folder / "out.csv", *overrides)
    return source, folder / "out.csv", folder / "out.csv.state.json"


def rewrite(state, change):
    """`state` with its values changed, and its sum again."""
    values = json.loads(state.read_text())
    del values[SUM]
    change(values)
    state.write_text(json.dumps({**values, SUM: sum_of_state(values)}))


def test_a_state_of_the_first_version_is_continued(checkpoint, tmp_path, monkeypatch):
    """Whichever its number was: another version of raycv alone is no other arithmetic."""
    monkeypatch.setattr(pairs_module, "CHUNK_PAIRS", 9)
    source = write_csv(tmp_path / "in.csv", "post", [[post] for post in posts(9)])
    score(checkpoint, source, tmp_path / "whole.csv")
    source, output, state = left_in_the_middle(checkpoint, tmp_path, monkeypatch)

    def as_first(values):
        del values["format"], values["numerics"], values["attention"]
        values["identity"]["the version of raycv"] = "0.0.9"
        del values["identity"]["missing"]

    rewrite(state, as_first)
    begun = (tmp_path / "out.csv.part").read_bytes()
    assert begun
    score(checkpoint, source, output)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert output.read_bytes().startswith(begun)


@pytest.mark.long
def test_scores_of_two_attentions_are_not_mixed(tmp_path, monkeypatch):
    """An earlier version computed a model that caps its scores with the kernel, which drops the cap."""
    toy = Toy(toy_base(tmp_path, tiny_gemma2))
    capped = toy.save_with_criteria(tmp_path, toy.model())
    monkeypatch.setattr(pairs_module, "CHUNK_PAIRS", 9)
    source, output, state = left_in_the_middle(capped, tmp_path, monkeypatch)
    assert json.loads(state.read_text())["attention"] == "eager"

    def as_before_it_was_recorded(values):
        assert values.pop("attention") == "eager"
        values["format"] = 1

    begun = state.read_text()
    for change in (as_before_it_was_recorded, lambda values: values.update(attention="sdpa")):
        rewrite(state, change)
        with refuses("output-differs", f"in {output} ", "with sdpa attention", "with eager", f"delete {state}"):
            score(capped, source, output)
        state.write_text(begun)
    score(capped, source, output)
    assert len(read_csv(output)) == 27


@pytest.mark.parametrize(
    ("key", "said"), [("format", "its format is 3, and not 2"), ("numerics", "whose arithmetic has number 2")]
)
def test_a_state_of_another_format_or_arithmetic_is_refused_in_words(checkpoint, tmp_path, monkeypatch, key, said):
    source, output, state = left_in_the_middle(checkpoint, tmp_path, monkeypatch)
    # What a later version may keep there too.
    rewrite(state, lambda values: values.update({key: values[key] + 1} | ({"later": 1} if key == "format" else {})))
    with refuses("package-version", output, said, "continue with that version of raycv", f"delete {state}"):
        score(checkpoint, source, output)


@pytest.mark.parametrize(
    "change", [{"identity": 5}, {"records": "x"}, {"records": 10**9}, {"part_bytes": 10}, {"sha256": ""}]
)
def test_a_damaged_state_is_not_continued(checkpoint, tmp_path, monkeypatch, change):
    """It would leave rows out, or write some twice."""
    source = write_csv(tmp_path / "in.csv", "post", [[post] for post in posts(9)])
    with monkeypatch.context() as patch:
        patch.setattr("raycv.batch_inference.score_file.ProgressView.update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(checkpoint, source, tmp_path / "out.csv")
    state = tmp_path / "out.csv.state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    with refuses("output-differs", f"{state} is damaged", f"delete {state}"):
        score(checkpoint, source, tmp_path / "out.csv")


def test_an_input_that_changes_while_it_is_scored_is_not_finished(checkpoint, tmp_path, monkeypatch):
    source = write_csv(tmp_path / "in.csv", "post", [[post] for post in posts(9)])
    monkeypatch.setattr(pairs_module, "CHUNK_PAIRS", 9)
    output = tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        patch.setattr("raycv.batch_inference.score_file.ProgressView.update", lambda *_: os.utime(source, (1, 1)))
        with refuses("output-differs", f"input={source} changed"):
            score(checkpoint, source, output)
    assert not output.exists()
    with refuses("output-differs", f"{output} ", ": the time of the input changed", f"delete {output}.state.json"):
        score(checkpoint, source, output)


def test_quotes_that_are_never_closed_one_after_the_other_end_the_reading(checkpoint, tmp_path, monkeypatch):
    """Each would be looked for up to the end of the file: hours, for a large one."""
    monkeypatch.setattr("raycv.common.text_files.READ_AGAIN", 100)
    source = tmp_path / "in.csv"
    source.write_text("post,id\n" + "w1,2\n" * 50 + '6\'2","w2 and w3\n' * 200)
    with refuses("input-file", f"input={source}, line 65: ", "never closed"):
        score(checkpoint, source, tmp_path / "out.csv", "criterion=C0")
    source.write_text("post,id\n" + "w1,2\n" * 50 + '6\'2","w2 and w3\n')
    score(checkpoint, source, tmp_path / "few.csv", "criterion=C0")
    assert len(read_csv(tmp_path / "few.csv")) == 50


def test_another_base_model_is_not_continued_and_one_that_was_moved_is(checkpoint, tmp_path, monkeypatch):
    source = write_csv(tmp_path / "in.csv", "post", [[post] for post in posts(9)])
    monkeypatch.setattr(pairs_module, "CHUNK_PAIRS", 9)
    score(checkpoint, source, tmp_path / "whole.csv")
    with monkeypatch.context() as patch:
        patch.setattr("raycv.batch_inference.score_file.ProgressView.update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(checkpoint, source, tmp_path / "out.csv")
    moved, other = (shutil.copytree(read_info(checkpoint).base_model, tmp_path / name) for name in ("moved", "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with refuses("output-differs", f"{tmp_path / 'out.csv'} ", ": the base model changed"):
        score(checkpoint, source, tmp_path / "out.csv", f"base={other}")
    score(checkpoint, source, tmp_path / "out.csv", f"base={moved}")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_vocabulary_that_an_earlier_version_did_not_record_is_no_other_base_model(checkpoint, tmp_path, monkeypatch):
    base = shutil.copytree(read_info(checkpoint).base_model, tmp_path / "base")
    (base / "dict.txt").write_text("w1 1\n")
    source, output, state = left_in_the_middle(checkpoint, tmp_path, monkeypatch, f"base={base}")
    begun = state.read_text()

    def without(file):
        rewrite(state, lambda values: values["identity"]["the base model"][0].pop(file))

    def is_refused():
        with refuses("output-differs", f"{output} ", ": the base model changed"):
            score(checkpoint, source, output, f"base={base}")

    without("config.json")
    is_refused()
    state.write_text(begun)
    (base / "dict.txt").write_text("w2 1\n")
    is_refused()
    without("dict.txt")
    score(checkpoint, source, output, f"base={base}")
    assert len(read_csv(output)) == 27


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_what_is_refused_before_anything_is_scored_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch, ending):
    """A base model that is not there, or that cannot be loaded; then the corrected command."""
    source = write_csv(tmp_path / "in.csv", "post", [["w1"]])
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    for output in (tmp_path / "new" / "folder" / f"out.{ending}", tmp_path / "there" / f"out.{ending}"):
        with refuses("base-files", "folder /nonexistent", "base=<folder"):
            score(checkpoint, source, output, "base=/nonexistent", "criterion=C0")
        with monkeypatch.context() as patch:
            patch.setattr("raycv.batch_inference.score_file.Recipe.load", refused)
            with refuses("input-file", "it is broken"):
                score(checkpoint, source, output, "criterion=C0")
        assert sorted(tmp_path.iterdir()) == before
        assert not list((tmp_path / "there").iterdir())
    score(checkpoint, source, tmp_path / "there" / f"out.{ending}", "criterion=C1")


@pytest.mark.parametrize(("sink", "ending"), [("TextPart", "csv"), ("ParquetParts", "parquet")])
def test_what_was_begun_and_has_no_scores_makes_room_for_other_inputs(checkpoint, tmp_path, monkeypatch, sink, ending):
    source = write_csv(tmp_path / "in.csv", "post", [["w1"], [""]])
    output = tmp_path / f"out.{ending}"
    score(checkpoint, source, tmp_path / f"whole.{ending}", "criterion=C1")
    with monkeypatch.context() as patch:
        patch.setattr(f"raycv.batch_inference.output_formats.{sink}.append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(checkpoint, source, output)
    part = tmp_path / f"out.{ending}.part"
    assert part.exists() or (tmp_path / f"out.{ending}.parts").exists()
    score(checkpoint, source, output, "criterion=C1")
    assert output.read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_what_is_made_at_the_output_while_it_is_scored_stays_and_so_do_the_scores(
    checkpoint, tmp_path, monkeypatch, ending
):
    source, output = write_csv(tmp_path / "in.csv", "post", [["w1"], [""]]), tmp_path / f"out.{ending}"
    score(checkpoint, source, tmp_path / f"whole.{ending}")
    part = tmp_path / f"out.{ending}.part{'s' if ending == 'parquet' else ''}"
    with monkeypatch.context() as patch:
        patch.setattr("raycv.batch_inference.score_file.ProgressView.update", lambda *_: output.write_text("kept"))
        with refuses("output-exists", f"output={output} ", f"in {part}."):
            score(checkpoint, source, output)
    with refuses("output-exists", f"output={output} is there"):
        score(checkpoint, source, output)
    assert output.read_text() == "kept"
    output.unlink()
    monkeypatch.setattr("raycv.batch_inference.score_file.Recipe.load", refused)  # nothing is left to score
    score(checkpoint, source, output)
    assert output.read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    assert not part.exists()


def test_what_is_made_beside_the_output_while_the_model_is_loaded_stays(checkpoint, tmp_path, monkeypatch):
    source, place = write_csv(tmp_path / "in.csv", "post", [["w1"]]), tmp_path / "out.csv.part"
    monkeypatch.setattr("raycv.batch_inference.score_file.Recipe.load", lambda *_: place.write_text("kept") and Fake())
    with refuses("output-exists", f"{place} is there"):
        score(checkpoint, source, tmp_path / "out.csv")
    assert place.read_text() == "kept"


def test_a_part_that_was_changed_or_is_being_written_is_refused(tmp_path):
    source = open_source(write_csv(tmp_path / "in.csv", "post", [["w1"], ["w2"]]), CRITERIA, None, chunk_pairs=3)
    for ending in ("csv", "parquet"):
        output = ScoreFile(tmp_path / f"out.{ending}", (), 0, {})
        with output.opened():
            output.append(scored(source)[0])
            with refuses("run-busy", output.output), ScoreFile(output.output, (), 0, {}).opened():
                pass
        with output.opened(), refuses("output-differs", output.output, "in fp32", "in bf16", "infer.precision=fp32"):
            output.append(ScoredChunk(2, 2, 0.5, "bf16", "sdpa", "sdpa"))
    (tmp_path / "out.csv.part").write_bytes(b"row")
    next((tmp_path / "out.parquet.parts").iterdir()).unlink()
    for ending, written in (("csv", "out.csv.part has 3 bytes"), ("parquet", "out.parquet.parts has 0 rows")):
        with refuses("output-differs", tmp_path, written), ScoreFile(tmp_path / f"out.{ending}", (), 0, {}).opened():
            pass


SMALL_CHUNKS = "from raycv.batch_inference import pairs; pairs.CHUNK_PAIRS = 6; from raycv.infer import main; main()"


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_killed_and_started_again_the_bytes_are_the_same(checkpoint, tmp_path, ending):
    source = write_csv(tmp_path / "in.csv", "post_id,criterion_id,post", rows_of(600))
    whole, broken = tmp_path / f"whole.{ending}", tmp_path / f"broken.{ending}"

    def command(output: Path) -> list[str]:
        return [sys.executable, "-c", SMALL_CHUNKS, *arguments(checkpoint, source, output)]

    subprocess.run(command(whole), check=True, timeout=800, cwd=ROOT)
    state = tmp_path / f"broken.{ending}.state.json"
    for records in (60, 240):
        process = subprocess.Popen(command(broken), cwd=ROOT)
        try:
            while not state.exists() or json.loads(state.read_text())["records"] < records:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.005)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert not broken.exists()
    done = subprocess.run(command(broken), check=True, timeout=800, cwd=ROOT, capture_output=True, text=True)
    assert "continues after" in done.stderr
    assert broken.read_bytes() == whole.read_bytes()
    assert not state.exists()


# --- What is shown ----------------------------------------------------------------------------------------------------


def progress_of(tmp_path, monkeypatch, chunks, *, terminal: bool) -> str:
    """What is shown of a file of 100 JSON lines, ten bytes each: of `chunks`, (seconds, records, bad rows)."""
    (tmp_path / "in.jsonl").write_text('{"a": 12}\n' * 100)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("raycv.batch_inference.score_file.time", SimpleNamespace(monotonic=lambda: clock.now))
    said = io.StringIO()
    console = Console(file=said, force_terminal=terminal, width=100, color_system=None)
    source = PairSource(tmp_path / "in.jsonl", Layout("a", None, ()), CRITERIA, None, 10)
    progress = Progress({})
    with ProgressView(console, source, progress) as view:
        for seconds, records, bad in chunks:
            clock.now += seconds
            rows = [BadRow(index, records + index, f"fault {index}") for index in range(bad)]
            progress = replace(progress, pairs=progress.pairs + 1000, bad=progress.bad + bad)
            view.update(ScoredChunk(records, 10 * records, 0.5, "fp32", "sdpa", "sdpa", [], rows), progress)
    return said.getvalue()


def test_the_bar_shows_how_far_it_is_and_the_time_left(tmp_path, monkeypatch):
    # The first chunk loads the model, so it says nothing of the pace: 10 records in 60 s, then 10 in 2 s.
    shown = progress_of(tmp_path, monkeypatch, [(60, 10, 0)], terminal=True)
    assert "1,000 pairs scored" in shown
    assert "10%" in shown
    assert "left" not in shown
    shown = progress_of(tmp_path, monkeypatch, [(60, 10, 0), (2, 20, 3)], terminal=True)
    assert "line 22: fault 2" in shown
    assert re.search(r"2,000 pairs scored, 3 bad rows .* 20% about 0:16 left", shown)
    shown = progress_of(tmp_path, monkeypatch, [(60, 10, 0), (600, 50, 0)], terminal=True)
    assert re.search(r"━ +50% about 12:30 left", shown)


def test_without_a_terminal_there_is_a_line_each_half_minute(tmp_path, monkeypatch):
    chunks = [(10, 10, 0), (10, 20, 0), (11, 30, 1), (29, 40, 0), (1, 50, 0)]
    assert progress_of(tmp_path, monkeypatch, chunks, terminal=False).splitlines() == [
        "line 30: fault 0",
        "[0:31] 30%: 3,000 pairs scored, 1 bad row, about 1:13 left",
        "[1:01] 50%: 5,000 pairs scored, 1 bad row, about 1:03 left",
    ]


def test_ten_bad_rows_are_shown_and_then_where_the_others_are(tmp_path, monkeypatch):
    said = progress_of(tmp_path, monkeypatch, [(1, 10, 4), (1, 20, 6), (1, 30, 3), (1, 40, 3)], terminal=False)
    shown = said.splitlines()
    assert [line.partition(":")[0] for line in shown[:10]] == [
        f"line {line}" for line in (*range(10, 14), *range(20, 26))
    ]
    assert shown[10:] == ["further bad rows are in the file of errors alone"]


# --- Size ------------------------------------------------------------------------------------------------------------

MEMORY = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
import pyarrow.parquet
from test_many import CRITERIA, Fake
from raycv.config.command_line import compose
from raycv.config.schema import InferConfig
from raycv.config.validation import validate
from raycv.batch_inference.score_file import (local_engine, score_file)
from raycv.inference.choose import Chosen
peaks = []

def peak():
    # Not what getrusage says, which begins with the size of the process that started this one.
    status = Path("/proc/self/status").read_text()
    peaks.append(int(status.partition("VmHWM:")[2].split()[0]) / 1024)

def engine(source, done):
    peak()
    for chunk in local_engine(Fake)(source, done):
        yield chunk
        if len(peaks) == 1 and chunk.records >= int(sys.argv[3]) / 10:
            peak()

given = [f"input={sys.argv[1]}", f"output={sys.argv[2]}"]
done = score_file(validate(InferConfig, compose("infer", given)), Chosen("toy", 0, (), None, 0), CRITERIA, engine)
peak()
print(done.records, done.pairs, *peaks)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "written", "number"),
    [("csv", "parquet", 1_000_000), ("jsonl", "csv", 80_000), ("parquet", "jsonl", 200_000)],
)
def test_a_million_rows_take_no_more_memory_than_a_tenth(tmp_path, given, written, number):
    """The JSON lines name no criterion, so each post is asked for three. The Parquet file is one row group."""
    source, output = tmp_path / f"in.{given}", tmp_path / f"out.{written}"
    post = "w1 w2, " * (20_000_000 // number)
    if given == "parquet":
        columns = {"post": [f"{index} {post}" for index in range(number)], "criterion": ["C0"] * number}
        pyarrow.parquet.write_table(pyarrow.table(columns), source, row_group_size=number)
        del columns
    with source.open("a" if given == "parquet" else "w") as file:
        if given == "csv":
            file.write("post_id,criterion_id,post\n")
            file.writelines(f'p{index},C{index % 3},"{post}{index}"\n' for index in range(number))
        elif given == "jsonl":
            file.writelines(f'{{"post_id": {index}, "post": "{post}{index}"}}\n' for index in range(number))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(source), str(output), str(number)],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records, pairs, start, tenth, whole = map(float, done.stdout.split())
    assert (records, pairs) == (number, 3 * number if given == "jsonl" else number)
    # The file has 140 MB or more, and far more as objects.
    assert whole - tenth < 50
    assert whole - start < 120


def test_huge_posts_end_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "CHUNK_CHARACTERS", 100)
    source = open_source(write_csv(tmp_path / "in.csv", "post", [["w" * 60]] * 5), CRITERIA, None)
    ends = [chunk.records for chunk in source.chunks()]
    assert ends == [2, 4, 5]
    assert [chunk.records for chunk in source.chunks(2)] == [4, 5]


def test_a_chunk_of_bad_rows_alone_asks_the_model_nothing():
    class Silent(Fake):
        def predict(self, pairs):
            raise AssertionError

    assert score_chunk(Chunk(3, 3), Silent()).scores == []


# --- Ray -------------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.ray
def test_ray_writes_the_same_bytes_and_continues_what_was_begun_here(checkpoint, tmp_path):
    source = write_csv(tmp_path / "in.csv", "post_id,criterion_id,post", [*rows_of(40), ["bad", "C0", ""], *rows_of(9)])
    outputs = {engine: tmp_path / f"{engine}.csv" for engine in ("local", "ray")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = ""
    for engine, output in outputs.items():
        done = subprocess.run(
            [sys.executable, "-c", SMALL_CHUNKS, *arguments(checkpoint, source, output, f"engine={engine}")],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert outputs["ray"].read_bytes() == outputs["local"].read_bytes()
    errors = [Path(f"{output}.errors.csv").read_bytes() for output in outputs.values()]
    assert errors[0] == errors[1]
    assert CANARY not in said


@pytest.mark.parametrize(
    ("nodes", "shares"),
    [
        ([2], (1, 2, 0)),
        ([2, 2, 4], (3, 2, 0)),
        ([2, 64], (1, 64, 0)),  # a small head is left out, and no node holds two models
        ([0, 8, 8, 2], (2, 8, 0)),
    ],
)
def test_a_scorer_on_a_node_and_most_cores_at_work(nodes, shares):
    from raycv.orchestration.ray_data import scorer_shares

    assert scorer_shares([{"CPU": float(cores)} for cores in nodes]) == shares


def test_a_scorer_on_each_gpu_and_none_without_cores():
    from raycv.orchestration.ray_data import scorer_shares

    assert scorer_shares([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}]) == (3, 1, 1)
    assert scorer_shares([{"CPU": 4.0, "GPU": 1.0}], on_cpus=True) == (1, 4, 0)
    with refuses("cluster-resources", "neither GPUs nor cores", "engine=local"):
        scorer_shares([{"memory": 1.0}])


@no_gpu
def test_a_gpu_that_torch_cannot_use_is_refused_before_ray_starts(checkpoint, tmp_path, unusable_gpu):
    import ray

    source = write_csv(tmp_path / "in.csv", "post", [["w1"]])
    with refuses("gpu-unusable", f"NVIDIA GPU of {socket.gethostname()}", "infer.device=cpu"):
        score(checkpoint, source, tmp_path / "out.csv", "engine=ray")
    assert not ray.is_initialized()
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", "root"}


@pytest.mark.slow
@pytest.mark.ray
@no_gpu
def test_a_node_whose_gpu_torch_cannot_use_is_named_and_the_cpu_scores_if_asked(checkpoint, tmp_path):
    """Ray counts a GPU there, and gives it to the scorer."""
    from ray.cluster_utils import Cluster

    source = write_csv(tmp_path / "in.csv", "post", [[post] for post in posts(3)])
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    done = {}
    try:
        made.add_node(num_cpus=2, num_gpus=1, object_store_memory=100_000_000)
        made.wait_for_nodes()
        for device in ("auto", "cpu"):
            given = arguments(checkpoint, source, tmp_path / f"{device}.csv", "engine=ray", f"infer.device={device}")
            done[device] = subprocess.run(
                [sys.executable, "-m", "raycv.infer", *given],
                cwd=ROOT, env={**os.environ, "RAY_ADDRESS": made.address}, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
    finally:
        made.shutdown()
    assert done["auto"].returncode == 2, done["auto"].stderr
    parts = (f"GPU of {socket.gethostname()} (driver of an unknown version", "infer.device=cpu")
    said_refusal(done["auto"].stderr, "gpu-unusable", *parts)
    assert done["cpu"].returncode == 0, done["cpu"].stderr
    assert len(read_csv(tmp_path / "cpu.csv")) == 9


SLOW_FIRST = """
import json, os, sys, time
from pathlib import Path
import ray
import raycv.batch_inference.pairs
from raycv.inference.questions import Prediction
from raycv.config.schema import InferenceConfig
from raycv.orchestration.ray_data import ray_engine
from raycv.data.types import Criterion

raycv.batch_inference.pairs.CHUNK_PAIRS = 2

class SlowFirst:
    threshold, computed_in = 0.5, "fp32"
    attention = earlier_attention = "sdpa"

    def check_pair(self, post, criterion):
        pass

    def predict(self, pairs):
        first = int(pairs[0][0])
        time.sleep(0.0 if first % 4 else 1.0)
        (Path(sys.argv[2]) / f"{ray.get_runtime_context().get_node_id()}.{os.getpid()}").touch()
        return [Prediction(int(post) / 100, False) for post, _ in pairs]

class Recipe:
    infer = InferenceConfig(precision="auto", batch_size=1)

    def load(self, tell):
        return SlowFirst()

source = raycv.batch_inference.pairs.open_source(Path(sys.argv[1]), {"C0": Criterion("C0", "w1")}, "C0")
chunks = ray_engine(Recipe())(source, 0)
print(json.dumps([[score.row, score.score] for chunk in chunks for score in chunk.scores]))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_several_scorers_have_a_node_each_and_their_chunks_come_in_order(tmp_path):
    from ray.cluster_utils import Cluster

    source = write_csv(tmp_path / "in.csv", "post", [[index] for index in range(36)])
    scorers = tmp_path / "scorers"
    scorers.mkdir()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        for cores in (2, 4):
            made.add_node(num_cpus=cores, object_store_memory=100_000_000)
        made.wait_for_nodes()
        done = subprocess.run(
            [sys.executable, "-c", SLOW_FIRST.replace("sys.argv[2]", repr(str(scorers))), str(source)],
            cwd=ROOT, env={**os.environ, "RAY_ADDRESS": made.address}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    finally:
        made.shutdown()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[index + 1, index / 100] for index in range(36)]
    found = [path.name.split(".") for path in scorers.iterdir()]
    assert len({node for node, _ in found}) == len(found) == 3
