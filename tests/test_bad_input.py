"""Bad input, through the commands as a user types them: one message with place, value and remedy, and nothing written.

What the loader and the schema refuse is listed with their tests, and goes through the command here.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.malformed_config import MALFORMED as MALFORMED_CONFIG
from support.malformed_data import (
    CANARY,
    MALFORMED,
    MALFORMED_RELEASE,
    C,
    Edit,
    Files,
    G,
    P,
    official,
    refusal,
    replaced,
    specification,
    write,
)

from raycv import aggregate, compare, infer, mistakes, report, run, serve, synthesize
from raycv.batch_inference.output_place import check_output
from raycv.data.dataset import load_dataset
from raycv.data.synthetic import write_dataset
from raycv.errors import FaultsError, UserError
from raycv.inference.choose import choose
from raycv.results.find_run import find_run, folds_of, recorded_config
from raycv.results.run_folder import RunFolder

COMMANDS = {
    "run": run.main, "infer": infer.main, "serve": serve.main, "aggregate": aggregate.main,
    "report": report.main, "synthesize": synthesize.main, "compare": compare.main, "mistakes": mistakes.main,
}  # fmt: skip
BACKSTOP = "tracking.uri=sqlite:////proc/refused-at-last.db"
"""What a run would stumble over after config and data, so that no test can start one."""


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in an empty folder; returns the message with which it refuses."""
    work = tmp_path / "work"
    work.mkdir()
    for name in ("MLFLOW_TRACKING_URI", "RAYCV_RUN_DIR", "RAYCV_AUTOSCALING"):
        monkeypatch.delenv(name, raising=False)

    def refuse(command: str, *arguments: str) -> str:
        monkeypatch.chdir(work)
        monkeypatch.setattr(sys, "argv", [f"raycv.{command}", *arguments])
        with pytest.raises(SystemExit) as stopped:
            COMMANDS[command]()
        printed = capsys.readouterr()
        check(printed.out, printed.err, command, stopped.value.code, work)
        return printed.err

    return refuse


def check(out: str, err: str, command: str, code: object, work: Path) -> None:
    """One message, for a person, that holds no text of a post; nothing else printed or written."""
    assert code == 2, err
    assert out == ""
    assert err.count(f"raycv.{command}: ") == 1, err
    assert any(remedy in err for remedy in ("What to do", "; received", "unknown key; ", "write sections as")), err
    assert "Traceback" not in err
    assert "Error executing job" not in err
    # With a folder of runs that cannot be written comes what else cannot.
    assert "refused-at-last.db cannot be opened" not in err or "run.dir=" in err
    assert CANARY not in err
    assert list(work.iterdir()) == []


# --- Data sets -------------------------------------------------------------------------------------------------------

TEXT = CANARY.encode()


def recoded(name: str, encoding: str) -> Edit:
    return lambda files: files.update({name: files[name].decode().encode(encoding)})


def every(name: str, old: bytes, new: bytes) -> Edit:
    return lambda files: files.update({name: files[name].replace(old, new)})


def criterion_named(new: str) -> Edit:
    return lambda files: files.update({name: files[name].replace(b"A.9,", f"{new},".encode()) for name in (G, C)})


MORE_DATA: dict[str, tuple[Edit, list[str]]] = {
    "UTF-16 without a mark": (recoded(P, "utf-16-le"), ["posts.csv, line 1: not UTF-8 text but UTF-16",
        "Kind: data-format"]),
    "big-endian UTF-16 without a mark": (recoded(G, "utf-16-be"), ["groundtruth.csv, line 1: not UTF-8 text but",
        "Kind: data-format"]),
    "UTF-32": (recoded(C, "utf-32"), ["criteria.csv, line 1: not UTF-8 text", "Kind: data-format"]),
    "gzip": (
        lambda files: files.update({P: b"\x1f\x8b\x08\x00" + bytes(40)}),
        ["posts.csv, line 1: not UTF-8 text but a gzip archive", "Kind: data-format"],
    ),
    "Parquet": (
        lambda files: files.update({G: b"PAR1" + bytes(40)}),
        ["groundtruth.csv, line 1: not UTF-8 text but a Parquet file", "Kind: data-format"],
    ),
    "Windows-1252 quotes": (replaced(P, b"Grey", b"\x93Grey\x94"), ["posts.csv, line 2: the byte 0x93 is not UTF-8",
        "Kind: data-format"]),
    "UTF-8 longer than it may be": (replaced(P, b"Grey", b"Gr\xc0\xafey"), ["posts.csv, line 2: the byte 0xc0",
        "Kind: data-format"]),
    "half a surrogate pair": (replaced(P, b"Grey", b"Gr\xed\xa0\x80ey"), ["posts.csv, line 2: the byte 0xed",
        "Kind: data-format"]),
    "columns that are misspelt": (
        replaced(G, b"criterion_id,label", b"criterion,lable"),
        [
            "line 1: `criterion_id`, `label` missing",
            "perhaps 'criterion' is the criterion_id; perhaps 'lable' is the label", "Kind: data-format",
        ],
    ),
    "a byte order mark twice": (
        lambda files: files.update({P: b"\xef\xbb\xbf" * 2 + files[P]}),
        ["posts.csv, line 1: `post_id` missing", "name the columns", "Kind: data-format"],
    ),
    "a byte order mark within the header": (
        replaced(P, b"post_id,post", b"post_id,\xef\xbb\xbfpost"),
        ["posts.csv, line 1: `post` (or `text`) missing", "a value of 5 characters", "Kind: data-format"],
    ),
    "tabs": (every(P, b",", b"\t"), ["posts.csv, line 1:", "separated by tabs", "write them with commas",
        "Kind: data-format"]),
    "bars": (every(G, b",", b"|"), ["groundtruth.csv, line 1:", "separated by bars", "write them with commas",
        "Kind: data-format"]),
    "NaN as label": (replaced(G, b"p2,A.5,no", b"p2,A.5,NaN"), ["line 15: label is empty: it holds NaN", "judge it",
        "Kind: data-label"]),
    "a negative label": (replaced(G, b"p2,A.5,no", b"p2,A.5,-1"), ["line 15: label '-1' is unknown", "yes or no",
        "Kind: data-label"]),
    "a fraction as label": (replaced(G, b"p2,A.5,no", b"p2,A.5,0.5"), ["line 15: label '0.5' is unknown",
        "Kind: data-label"]),
    "infinity as label": (replaced(G, b"p2,A.5,no", b"p2,A.5,1e999"), ["line 15: label '1e999' is unknown",
        "Kind: data-label"]),
    "duplicate column of labels": (
        every(G, b",label\n", b",label,Label\n"),
        ["groundtruth.csv, line 1: the column 'label' occurs 2 times", "keep one column", "Kind: data-format"],
    ),
    "NUL in an id": (replaced(G, b"p2,A.5,no", b"p2,A.\x005,no"), ["groundtruth.csv, line 15: a NUL character",
        "Kind: data-format, data-id"]),
    "NUL in the header": (
        replaced(C, b"criterion_id,", b"criterion\0_id,"),
        ["criteria.csv, line 1: `criterion_id` missing", "13 characters", "Kind: data-format"],
    ),
    "an id that looks like another": (criterion_named("A\u20248"), ["already on line 9", "written 'A.8'",
        "Kind: data-id"]),
    "a JSON key twice": (
        lambda files: files.update({"criteria.json": b'[{"id": "A.1", "id": "A.2", "text": "x"}]', C: b""}),
        ["criteria.json: an object that has a key twice", "Kind: data-format"],
    ),
    "absolute criterion id": (criterion_named("/etc/x"), ["line 10: criterion_id '/etc/x' is or holds a path",
        "Kind: data-id"]),
    "climbing criterion id": (criterion_named("../../x"), ["line 10: criterion_id '../../x' is or holds a path",
        "Kind: data-id"]),
    "criterion id of Windows": (criterion_named("..\\x"), ["criteria.csv, line 10: criterion_id", "no / or \\",
        "Kind: data-id"]),
    "criterion id that is a dot": (criterion_named("."), ["line 10: criterion_id '.' is or holds a path",
        "Kind: data-id"]),
    "escape sequence in an id": (criterion_named("A\x1b[2J"), ["line 10: criterion_id holds a line break or another",
        "Kind: data-id"]),
    "rows that are all broken": (every(G, b",no\n", b"\n"), ["24 rows with a wrong number of fields", "needs quotes",
        "Kind: data-format"]),
    "a header in quotes that never close": (
        replaced(P, b"post_id,", b'"post_id,'),
        ["posts.csv, line 1: a quoted field", "quotes where it must", "Kind: data-format"],
    ),
    "HTML of a login page": (
        lambda files: files.update({P: b"<!DOCTYPE html>\n<html><body>log in</body></html>\n"}),
        ["posts.csv, line 1:", "name the columns", "Kind: data-format"],
    ),
    "a git-lfs pointer": (
        lambda files: files.update({P: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}),
        ["posts.csv, line 1:", "name the columns", "Kind: data-format"],
    ),
}  # fmt: skip

DATA = [
    *[(name, specification, case) for name, case in (MALFORMED | MORE_DATA).items()],
    *[(name, official, case) for name, case in MALFORMED_RELEASE.items()],
]


@pytest.mark.parametrize(("made", "case"), [one[1:] for one in DATA], ids=[one[0] for one in DATA])
def test_a_malformed_data_set_is_refused(
    tmp_path: Path, refused: Callable[..., str], made: Callable[[], Files], case: tuple[Edit, list[str]]
) -> None:
    edit, fragments = case
    files = made()
    edit(files)
    data = write(tmp_path / "data", files)
    said = refused("run", *using(data))
    for fragment in fragments:
        assert fragment in said, said


def using(data: Path, *more: str) -> list[str]:
    own = [f"data.dir={data}", f"data.criteria_dir={data}", "model=tiny_llama", "cv.folds=2", BACKSTOP]
    return [*own, *more]


Spoil = Callable[[Path], object]


def both(first: Spoil, second: Spoil) -> Spoil:
    return lambda data: (first(data), second(data))


def link(name: str, target: str) -> Spoil:
    def made(data: Path) -> None:
        (data / name).unlink(missing_ok=True)
        (data / name).symlink_to(target)

    return made


def folder(name: str) -> Spoil:
    def made(data: Path) -> None:
        (data / name).unlink()
        (data / name).mkdir()

    return made


def moved(target: str) -> Spoil:
    """The data folder itself is a link."""

    def made(data: Path) -> None:
        data.rename(data.with_name("elsewhere"))
        data.symlink_to(target)

    return made


def sparse(name: str, head: bytes) -> Spoil:
    """A file of 1 GB that takes no room."""

    def made(data: Path) -> None:
        with (data / name).open("wb") as file:
            file.write(head)
            file.truncate(10**9)

    return made


PLACES: dict[str, tuple[Spoil, list[str]]] = {
    "a link to itself": (
        link(P, P),
        ["posts.csv: a symbolic link that cannot be followed", "symbolic link", "Kind: data-file"],
    ),
    "links in a circle": (
        both(link(P, "b.csv"), link("b.csv", P)),
        ["posts.csv: a symbolic link that cannot be followed", "Kind: data-file"],
    ),
    "a link to nothing": (
        link(G, "nothing.csv"),
        ["groundtruth.csv: a symbolic link that cannot be followed", "Kind: data-file"],
    ),
    "a folder for a file": (folder(C), ["criteria.csv: a folder where a file is expected", "Kind: data-file"]),
    "a device for a file": (
        link(P, "/dev/zero"),
        ["posts.csv: no regular file (a pipe, socket or device)", "Kind: data-file"],
    ),
    "a file that fails while it is read": (
        link(P, "/proc/self/mem"),
        ["posts.csv: Input/output error", "Kind: data-file"],
    ),
    "a pipe for a file": (
        both(lambda data: (data / P).unlink(), lambda data: os.mkfifo(data / P)),
        ["posts.csv: no regular file (a pipe, socket or device)", "Kind: data-file"],
    ),
    "a folder that links to itself": (moved("data"), ["data: looked for the folder", "Kind: data-file"]),
    "a folder that links to nothing": (
        moved("nowhere"),
        ["data: looked for the folder", "a symbolic link that cannot", "Kind: data-file"],
    ),
    "a folder of another name": (
        lambda data: data.rename(data.with_name("dota")),
        ["did you mean ", "/dota?", "Kind: data-file"],
    ),
    "a folder that is not there": (
        lambda data: data.rename(data.with_name("elsewhere")),
        ["holds: elsewhere", "Kind: data-file"],
    ),
    "an empty folder": (
        lambda data: [path.unlink() for path in data.iterdir()],
        ["no table `posts`", "Kind: data-file"],
    ),
    "a gigabyte in one field": (
        sparse(P, b'post_id,post\np1,"x'),
        ["posts.csv, line 2", "1,000,000 characters", "Kind: data-format"],
    ),
    "a gigabyte of nothing": (sparse(G, b""), ["groundtruth.csv, line 1: not UTF-8 text", "Kind: data-format"]),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.long
def test_files_and_folders_that_are_none_are_refused(tmp_path: Path, refused: Callable[..., str], case: str) -> None:
    spoil, fragments = PLACES[case]
    data = write(tmp_path / "data", specification())
    spoil(data)
    said = refused("run", *using(data))
    for fragment in fragments:
        assert fragment in said, said


# --- Configs ---------------------------------------------------------------------------------------------------------

# On the command line the values of these keys are text: a model may be called 5.
TEXT_KEYS = ("model.name=5", "run.dir=false", "train.gradient_checkpointing=2")
TYPED = [(override, said) for override, said in MALFORMED_CONFIG if override not in TEXT_KEYS]

MORE_CONFIG: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["train.learning_rat=1"], ["train.learning_rat: unknown key", "Kind: config-unknown-key"]),
    "near key": (
        ["train.epoch=3"],
        ["train.epoch: unknown key; did you mean train.epochs?", "Kind: config-unknown-key"],
    ),
    "key of another section": (
        ["cv.epochs=3"],
        ["cv.epochs: unknown key; did you mean train.epochs?", "Kind: config-unknown-key"],
    ),
    "unknown section": (
        ["trian.lr=1e-4"],
        ["trian.lr: unknown key; did you mean train.lr?", "Kind: config-unknown-key"],
    ),
    "key below a value": (
        ["train.lr.value=1"],
        ["train.lr: should be a valid number; received {'value': '1'}", "Kind: config-value"],
    ),
    "a value for a section": (
        ["run=abc"],
        ["run: should be a valid dictionary", "received 'abc'", "Kind: config-value"],
    ),
    "a value for a group": (["cv=3"], ["cv=3", "is a group of keys", "cv=default", "Kind: config-value"]),
    "a section taken away": (
        ["~tracking.uri"],
        ["tracking.uri: field required; received nothing", "Kind: config-value"],
    ),
    "code of models": (
        ["model.trust_remote_code=true"],
        ["model.trust_remote_code: unknown key", "Kind: config-unknown-key"],
    ),
    "keys that exclude each other": (
        ["train.batching=post_grouped", "train.imbalance=weighted_sampling"],
        ["train.imbalance: draws pairs one by one, which train.batching=post_grouped cannot", "Kind: config-value"],
    ),
    "PEFT's layer and our dropout": (
        ["dora.implementation=peft", "dora.dropout=lora_path"],
        ["dora.implementation: needs dora.dropout=peft", "Kind: config-value"],
    ),
    "batches that do not divide": (
        ["train.batch_size=5", "train.effective_batch_size=32"],
        [
            "train.effective_batch_size: must be a multiple of train.batch_size, which is 5 (it may be: "
            "1, 2, 4, 8, 16, 32); received 32",
            "Kind: config-value",
        ],
    ),
    "a store that is forgotten": (
        ["tracking.uri=sqlite:///:memory:"],
        ["tracking.uri: keeps nothing in memory", "Kind: config-value"],
    ),
    "a store that MLflow does not know": (
        ["tracking.uri=nonsense://ann:hunter2222@host"],
        [
            "tracking.uri: is not an MLflow store: name a database",
            "received 'nonsense://***@host'",
            "Kind: config-value",
        ],
    ),
    "a password with a space": (
        ["tracking.uri=http://ann:my hunter2222@host"],
        ["tracking.uri: holds white space: write %20", "received 'http://***@host'", "Kind: config-value"],
    ),
    "half an address": (
        ["tracking.uri=http://[::1"],
        ["tracking.uri: is not an address (Invalid IPv6 URL)", "Kind: config-value"],
    ),
    "epochs for ever": (["train.epochs=99999999999999999999"], ["train.epochs: ", "Kind: config-value"]),
    "a rank beyond all models": (["dora.r=1000000000"], ["dora.r: ", "Kind: config-value"]),
    "retries for ever": (["resources.retries=1000000000"], ["resources.retries: ", "Kind: config-value"]),
    "more folds than posts": (
        ["cv.folds=4"],
        ["cv.folds=4 but there are only 3 posts", "lower cv.folds", "Kind: data-split"],
    ),
    "a fold without a match": (
        ["cv.folds=3"],
        ["fold 0: its validation part (9 pairs) has no matched pair", "Kind: data-split"],
    ),
    "a million folds": (["cv.folds=1000000"], ["cv.folds=1000000 but there are only 3 posts", "Kind: data-split"]),
    "empty texts refused": (
        ["data.empty=refuse", "data.dir={empty}"],
        ["posts.csv, line 2: post 'p1' has no text", "Kind: data-text"],
    ),
    "a file for the data folder": (
        ["data.dir={data}/posts.csv"],
        ["a file; give the folder that holds it", "Kind: data-file"],
    ),
    "a name for a folder that is too long": (
        ["data.dir=" + "x" * 300],
        ["data.dir: is too long for a path", "Kind: config-value"],
    ),
    "a folder of artifacts that cannot be": (
        ["tracking.artifacts=" + "x" * 300],
        ["tracking.artifacts: is too long", "Kind: config-value"],
    ),
    "buckets for folders": (
        ["run.dir=s3://bucket/runs", "tracking.artifacts=gs://b/a", "data.dir=hdfs:/x", "model.name=s3://b/m"],
        [
            "4 faults",
            "run.dir: must be a path, and this is an address: mount",
            "received 's3://bucket/runs'",
            "Kind: config-value",
        ],
    ),
    "a run that cannot be": (["resume=" + "x" * 300], ["resume: is too long for a path", "Kind: config-value"]),
    "a run with a control character": (
        ["resume=a\x01b"],
        [r"resume=a\x01b: there is no such run", "Kind: run-missing"],
    ),
    "a store of no kind": (
        ["tracking.uri=bad://x"],
        ["tracking.uri: is not an MLflow store", "received 'bad://x'", "Kind: config-value"],
    ),
    "a name that is too long in bytes": (
        ["data.criteria_dir=" + "\u00e9" * 128],
        ["data.criteria_dir: is too long", "Kind: config-value"],
    ),
    "criteria elsewhere": (["data.criteria_dir=nowhere"], ["nowhere", "data.criteria_dir", "Kind: data-file"]),
    "climbing name": (
        ["run.name=../../etc"],
        ["run.name: string should match pattern", "received '../../etc'", "Kind: config-value"],
    ),
    "absolute name": (
        ["run.name=/tmp/x"],
        ["run.name: string should match pattern", "received '/tmp/x'", "Kind: config-value"],
    ),
    "name that is a dot": (["run.name=.."], ["run.name: string should match", "received '..'", "Kind: config-value"]),
    "name with a line break": (
        ["run.name=a\n"],
        ["run.name: string should match pattern", r"received 'a\n'", "Kind: config-value"],
    ),
    "name that is too long": (
        ["run.name=" + "x" * 101],
        ["run.name: string should match", "101 characters", "Kind: config-value"],
    ),
    "no folder of runs": (
        ["run.dir=/proc/x"],
        ["run.dir=/proc/x: raycv cannot write to /proc ", "Kind: disk-unwritable, tracking-store"],
    ),
    "file of runs": (["run.dir={data}/posts.csv"], ["raycv cannot write to ", "Kind: disk-unwritable, tracking-store"]),
    "no model": (
        ["model.name=/nowhere"],
        ["There is no folder /nowhere, which is to hold the base", "Kind: base-files"],
    ),
    "a folder that is not a model": (
        ["model.name={data}"],
        ["is not a model: it has no config.json", "Kind: base-files"],
    ),
    "no id of a model": (
        ["model.name=a/b/c"],
        ["model.name='a/b/c' is neither a folder", "an id on the hub", "Kind: base-files"],
    ),
    "a climbing id of a model": (
        ["model.name=org/.."],
        ["model.name='org/..' is neither a folder", "Kind: base-files"],
    ),
    "a model that does not ship": (
        ["model.name=raycv://models/x"],
        ["raycv's own 'models/x' is missing", "Kind: package-damaged"],
    ),
    "a revision of a folder": (["model.revision=v2"], ["model.revision=v2 means nothing", "Kind: config-value"]),
    "an environment variable that is not set": (
        ["data.dir=${oc.env:NOT_SET_AT_ALL}"],
        ["NOT_SET_AT_ALL", "Kind: config-value"],
    ),
    "a reference to nothing": (["train.lr=${train.rate}"], ["cannot be resolved", "train.rate", "Kind: config-value"]),
    "references in a circle": (
        ["train.lr=${train.weight_decay}", "train.weight_decay=${train.lr}"],
        ["train.lr", "Kind: config-value"],
    ),
    "a list without its end": (
        ["model.target_modules=[a"],
        ["[a", "--help shows what it takes", "Kind: config-syntax"],
    ),
    "a word": (["nonsense"], ["nonsense", "--help shows what it takes", "Kind: config-syntax"]),
    "no key": (["=5"], ["=5", "--help shows what it takes", "Kind: config-syntax"]),
    "an option of Hydra's without its kind": (
        ["--info=nonsense"],
        ["--info", "invalid choice", "nonsense", "Kind: config-syntax"],
    ),
    "an option that there is not": (
        ["--folds=3"],
        ["There is no option --folds", "write key=value without dashes", "Kind: config-unknown-key"],
    ),
    "a sweep": (["cv.folds=2,3", "--multirun"], ["--multirun is not supported", "Kind: config-syntax"]),
    "several values": (["cv.folds=2,3"], ["cv.folds=2,3", "--help shows what it takes", "Kind: config-syntax"]),
    "a number without end": (["cv.folds=" + "9" * 5000], ["--help shows what it takes", "Kind: config-syntax"]),
    "no experiment": (
        ["experiment=nope"],
        ["'nope' is not one of its files", "experiment=quickstart", "Kind: config-value"],
    ),
}

FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "tabs": ("train:\n\tlr: 1\n", ["found character '\\t' that cannot start", "own.yaml", "line 3, column 1",
        "Kind: config-syntax"]),
    "no YAML": ("train: [1\n", ["own.yaml", "Kind: config-syntax"]),
    "Latin-1": ("data:\n  dir: caf\u00e9\n".encode("latin-1"), ["utf-8", "Kind: config-syntax"]),
    "a list": ("- a\n- b\n", ["own", "Kind: config-syntax"]),
    "a text": ("just words\n", ["own", "Kind: config-value, config-unknown-key"]),
    "NUL": (b"data:\n  dir: a\0b\n", ["own.yaml", "Kind: config-syntax"]),
    "an escaped NUL": ('data:\n  dir: "a\\0b"\n', ["data.dir: must not hold a NUL character; received 'a\\x00b'",
        "Kind: config-value"]),
    "an object of Python": ("train:\n  lr: !!python/object/apply:os.getcwd []\n", ["python/object/apply:os.getcwd",
        "Kind: config-syntax"]),
    "numbers as text": ('train:\n  epochs: "3"\n', ["train.epochs: should be a valid integer; received '3'",
        "Kind: config-value"]),
    "not a number": ("train:\n  lr: .nan\n", ["train.lr: should be a finite number; received nan",
        "Kind: config-value"]),
    "a date": ("train:\n  epochs: 2025-11-12\n", ["train.epochs: should be a valid integer", "Kind: config-value"]),
    "a switch": ("train:\n  schedule: on\n", ["train.schedule: should be", "received True", "Kind: config-value"]),
    "a key twice": ("train:\n  lr: 1e-4\n  lr: 1e-5\n", ["duplicate key lr", "Kind: config-syntax"]),
    "a dotted key": ("train.lr: 1e-4\n", ["train.lr: unknown key with a dot in its name", "Kind: config-unknown-key"]),
    "aliases without end": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n", ["d: unknown key", "a: unknown key",
            "Kind: config-unknown-key"]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("override", "said"), TYPED, ids=[override for override, _ in TYPED])
def test_a_malformed_value_is_refused(refused: Callable[..., str], override: str, said: str) -> None:
    message = refused("run", "experiment=quickstart", BACKSTOP, override)
    assert f"- {override.split('=')[0]}: " in message
    assert said in f"{message} ".replace("\n", " ")


@pytest.mark.parametrize("case", MORE_CONFIG)
def test_a_malformed_command_line_is_refused(tmp_path: Path, refused: Callable[..., str], case: str) -> None:
    overrides, fragments = MORE_CONFIG[case]
    data = write(tmp_path / "data", specification())
    empty = write(tmp_path / "empty", specification({"p1": "", "p2": "a", "p3": "b"}))
    said = refused(
        "run", *using(data, *(one.replace("{data}", f"{data}").replace("{empty}", f"{empty}") for one in overrides))
    )
    for fragment in fragments:
        assert fragment in said, said


@pytest.mark.parametrize("case", FILES)
def test_a_malformed_file_of_ones_own_is_refused(tmp_path: Path, refused: Callable[..., str], case: str) -> None:
    content, fragments = FILES[case]
    own = tmp_path / "configs"
    own.mkdir()
    content = content.encode() if isinstance(content, str) else content
    (own / "own.yaml").write_bytes(b"defaults: [run, _self_]\n" * (content[:1] not in (b"-", b"j")) + content)
    said = refused("run", f"--config-dir={own}", "--config-name=own", BACKSTOP)
    for fragment in fragments:
        assert fragment in said, said


URI = "http://ann:s3cret-heron@host"


@pytest.mark.parametrize(
    "overrides",
    [
        [f"tracking.uri={URI}", "cv.folds=["],
        [f"tracking.uri={URI}", "--config-name=run", "nonsense", "--config-dir=x"],
        [f"tracking.uri={URI}", "--tracking=x"],
        [f"tracking.url={URI}"],
        [f"train.lr={URI}"],
        [f"model.name={URI}"],
        [f"data.dir={URI}"],
        ["data.dir=http://host/?token=s3cret-heron"],
        [f"run.dir={URI}/\0"],
    ],
    ids=lambda overrides: overrides[-1],
)
def test_a_refusal_does_not_repeat_a_password(refused: Callable[..., str], overrides: list[str]) -> None:
    assert "s3cret" not in refused("run", "experiment=quickstart", *overrides)


def test_not_even_a_traceback_repeats_a_password() -> None:
    code = "\n".join(
        [
            "from raycv.config.command_line import run_command",
            "from raycv.config.schema import RunConfig",
            "def body(config): raise RuntimeError(config.tracking.uri)",
            "run_command('run', RunConfig, body)",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"tracking.uri={URI}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "RuntimeError: http://***@host" in done.stderr
    assert "s3cret" not in done.stdout + done.stderr


# --- The other commands ----------------------------------------------------------------------------------------------

LONG = "x" * 256

OTHERS: dict[str, tuple[str, list[str], list[str]]] = {
    "no post": ("infer", [], ["no post is given", "post_file=post.txt", "Kind: input-empty"]),
    "two posts": ("infer", ["post=a", "post_file=b"], ["post and post_file are both given", "Kind: config-value"]),
    "a post without quotes": (
        "infer",
        ["post=I", "feel", "bad"],
        ["2 words on the command line belong to no", "Kind: config-syntax"],
    ),
    "a file that is not there": (
        "infer",
        ["post_file=no.txt"],
        ["post_file=no.txt cannot be read: No such file", "Kind: input-file"],
    ),
    "a folder of posts": ("infer", ["post_file=."], ["post_file=. cannot be read: Is a directory", "Kind: input-file"]),
    "a post without end": (
        "infer",
        ["post_file=/dev/zero"],
        ["more than 4,000,000 bytes", "input=pairs.csv", "Kind: input-file"],
    ),
    "a fold below none": ("infer", ["post=a", "fold=-1"], ["fold: ", "received -1", "Kind: config-value"]),
    "a fold by name": ("infer", ["post=a", "fold=first"], ["fold: ", "received 'first'", "Kind: config-value"]),
    "an output of no kind": (
        "infer",
        ["post=a", "output=xml"],
        ["output=xml: must be text or json", "Kind: config-value"],
    ),
    "rows without a number": (
        "infer",
        ["post=a", "infer.batch_size=0"],
        ["infer.batch_size: ", "received 0 ", "Kind: config-value"],
    ),
    "no run": (
        "infer",
        ["post=a", "run=nothing"],
        ["run=nothing is neither a run in", "experiment=quickstart", "Kind: run-missing, tracking-store"],
    ),
    "a run that climbs": (
        "infer",
        ["post=a", "run=../../etc"],
        ["run=../../etc: there is no such folder", "Kind: run-missing"],
    ),
    "not one run": ("infer", ["post=a"], ["There is no run in", "experiment=quickstart", "Kind: run-missing"]),
    "a table without end": ("infer", ["input=/dev/zero", "output=s.csv"], ["There is no run in", "Kind: run-missing"]),
    "a table and a post": (
        "infer",
        ["input=a.csv", "post=b", "output=s.csv"],
        ["input and post are both given", "Kind: config-value"],
    ),
    "scores of no kind": (
        "infer",
        ["input=a.csv", "output=s.xlsx"],
        ["output=s.xlsx", "ends in a format", "Kind: config-value"],
    ),
    "scores over a device": (
        "infer",
        ["input=a.csv", "output=/dev/null.csv/x.csv"],
        ["There is no run in", "Kind: run-missing"],
    ),
    "a dash and a post": ("infer", ["-", "post=a"], ["post and post_file are both given", "Kind: config-value"]),
    "an engine of no kind": ("infer", ["post=a", "engine=gpu"], ["engine: ", "received 'gpu'", "Kind: config-value"]),
    "a run with too long a name": (
        "infer",
        ["post=a", f"run={LONG}"],
        ["run: is too long for a path", "Kind: config-value"],
    ),
    "runs in too long a folder": (
        "infer",
        ["post=a", f"dir={LONG}"],
        ["dir: is too long for a path", "Kind: config-value"],
    ),
    "scores in a bucket": (
        "infer",
        ["input=s3://b/in.csv", "output=s3://b/out.csv", "dir=s3://b/runs"],
        [
            "3 faults",
            "output: must be a path, and this is an address",
            "received 's3://b/in.csv'",
            "Kind: config-value",
        ],
    ),
    "a bucket to serve from": (
        "serve",
        ["run=s3://b/runs/mine", "base=s3://b"],
        ["2 faults", "run: must be a path", "Kind: config-value"],
    ),
    "a summary in a bucket": (
        "aggregate",
        ["dir=s3://b"],
        ["dir: must be a path, and this is an address", "Kind: config-value"],
    ),
    "a set for a bucket": (
        "synthesize",
        ["out=s3:/b"],
        ["out: must be a path, and this is an address", "Kind: config-value"],
    ),
    "GPUs and none": (
        "serve",
        ["infer.device=cpu", "serve.gpus_per_replica=1"],
        [
            "infer.device=cpu computes on no GPU, and serve.gpus_per_replica=1 asks",
            "leave one of the two out",
            "Kind: config-value",
        ],
    ),
    "scores with too long a name": (
        "infer",
        ["input=a.csv", f"output={LONG}.csv"],
        ["output: is too long for", "Kind: config-value"],
    ),
    "scores whose parts have too long a name": (
        "infer",
        ["input=a.csv", f"output={LONG[:250]}.csv"],
        ["output=a value of 254 characters cannot be written: File name too long", "Kind: disk-unwritable"],
    ),
    "no run to serve": ("serve", [], ["There is no run in", "experiment=quickstart", "Kind: run-missing"]),
    "a port that is none": ("serve", ["serve.port=70000"], ["serve.port: ", "received 70000", "Kind: config-value"]),
    "a run to serve with too long a name": (
        "serve",
        [f"run={LONG}"],
        ["run: is too long for a path", "Kind: config-value"],
    ),
    "crumbs of a core": (
        "serve",
        ["serve.cpus_per_replica=1e-300"],
        ["serve.cpus_per_replica: ", "received 1e-300", "Kind: config-value"],
    ),
    "a summary of too long a name": (
        "aggregate",
        [f"run={LONG}"],
        ["run: is too long for a path", "Kind: config-value"],
    ),
    "the summary of no run": (
        "aggregate",
        ["run=nothing"],
        ["mlflow.db does not exist", "give its place", "Kind: run-missing, tracking-store"],
    ),
    "a summary with an unknown key": (
        "aggregate",
        ["rum=3"],
        ["rum: unknown key; did you mean run?", "Kind: config-unknown-key"],
    ),
    "nothing to compare": ("compare", [], ["runs: must be given", "runs=<value>"]),
    "one run to compare": ("compare", ["runs=[a]"], ["runs: ", "at least 2 items"]),
    "runs in a bucket": ("compare", ["runs=[a,s3:/b]"], ["runs", "must be a path, and this is an address"]),
    "a comparison of no runs": ("compare", ["runs=[a,b]"], ["There is no run a in", "experiment=quickstart"]),
    "another requirement": ("compare", ["runs=[a,b]", "require=worse"], ["require: ", "received 'worse'"]),
    "the mistakes of no run": ("mistakes", ["run=nothing"], ["There is no run nothing in", "experiment=quickstart"]),
    "no mistakes": ("mistakes", ["most=0"], ["most: ", "received 0 "]),
    "text of no word": ("mistakes", ["text=maybe"], ["text: ", "received 'maybe'"]),
    "nowhere to write": ("synthesize", [], ["out: must be given", "out=<value>", "Kind: config-value"]),
    "no posts": ("synthesize", ["out=x", "posts=0"], ["posts: ", "received 0 ", "Kind: config-value"]),
    "a profile of no kind": (
        "synthesize",
        ["out=x", "profile=long"],
        ["profile: ", "received 'long'", "Kind: config-value"],
    ),
    "words below none": (
        "synthesize",
        ["out=x", "words_mean=-3"],
        ["words_mean: ", "received -3", "Kind: config-value"],
    ),
    "words that are no number": (
        "synthesize",
        ["out=x", "words_mean=nan"],
        ["words_mean: ", "received nan", "Kind: config-value"],
    ),
    "a page of too long a name": ("report", [f"run={LONG}"], ["run: is too long for a path", "Kind: config-value"]),
    "the page of no run": (
        "report",
        ["run=nothing"],
        ["There is no run nothing in", "experiment=quickstart", "Kind: run-missing"],
    ),
    "a page with an unknown key": (
        "report",
        ["data.dri=x"],
        ["data.dri: unknown key; did you mean data.dir?", "Kind: config-unknown-key"],
    ),
    "a folder that cannot be made": (
        "synthesize",
        ["out=/proc/x", "posts=3"],
        ["The data set cannot be written to /proc/x: No such file or directory", "Kind: disk-unwritable"],
    ),
    "a folder with too long a name": (
        "synthesize",
        [f"out={LONG}"],
        ["out: is too long for a path", "Kind: config-value"],
    ),
    "a folder too deep": (
        "synthesize",
        ["out=" + "x/" * 256],
        ["out: is too long for a path", "255 slashes", "Kind: config-value"],
    ),
}


@contextlib.contextmanager
def anybody() -> Iterator[None]:
    """Within it this process is not root, who may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run; a run's config; for a synthetic set; and a file of posts."""
    tmp_path.chmod(0o755)
    # Paths from here: the folders above may be closed to all but root.
    monkeypatch.chdir(tmp_path)
    run, data = Path("runs/mine"), Path("data")
    run.mkdir(parents=True)
    data.mkdir(mode=0)
    config = run / "config.yaml"
    config.write_text("cv: {folds: 2}")
    config.chmod(0)
    written = write(Path("written"), specification())
    # Python's own files may be closed too: what is needed of them is read here.
    load_dataset(written, written)
    (written / P).chmod(0)
    with anybody():
        with pytest.raises(UserError, match=r"posts.csv: Permission denied"):
            load_dataset(written, written)
        with pytest.raises(UserError, match=r"runs/mine/config.yaml cannot be read: Permission denied"):
            recorded_config(RunFolder(run))
        with pytest.raises(UserError, match=r"runs/mine/config.yaml cannot be read: Permission denied"):
            folds_of(config)
        with pytest.raises(UserError, match=r"cannot be written to data: Permission denied"):
            write_dataset(data, posts=3, seed=1)
        with pytest.raises(UserError, match="cannot be written: Permission denied"):
            check_output(data / "scores.csv")
    run.chmod(0)
    with pytest.raises(UserError, match=r"run=\S* .*cannot be looked for: .*File name too long"):
        find_run(Path("runs"), "x/" * 2047)
    for ask in (find_run, lambda runs, run: choose(run, "best", runs, None)):
        with anybody(), pytest.raises(UserError, match=r"run=\S*mine\S* cannot be looked for: .*Permission denied"):
            ask(Path("runs"), "mine")
    data.chmod(0o755)
    run.chmod(0o755)


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.long
def test_the_other_commands_refuse_too(refused: Callable[..., str], case: str) -> None:
    command, arguments, fragments = OTHERS[case]
    said = refused(command, *arguments)
    for fragment in fragments:
        assert fragment in f"{said} ".replace("\n", " "), said


def test_there_are_many_of_them() -> None:
    assert len(DATA) + len(PLACES) >= 60
    assert len(TYPED) + len(MORE_CONFIG) + len(FILES) + len(OTHERS) >= 60


# --- As processes ----------------------------------------------------------------------------------------------------


def gigabyte(head: bytes, part: bytes) -> Spoil:
    """A table of posts of 1 GB that does take room: `head`, and then `part` again and again."""

    def made(data: Path) -> None:
        block = part * (10**6 // len(part))
        with (data / P).open("wb") as file:
            file.write(head)
            for _ in range(10**9 // len(block)):
                file.write(block)

    return made


GIGABYTES = {
    "in one line": (gigabyte(b"post_id,post\np1,", b"the cat sat on the mat "), "posts.csv, line 2"),
    "in a quoted field of many lines": (
        gigabyte(b'post_id,post\np1,"', b"the cat sat\non the mat\n"),
        "posts.csv, line",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", GIGABYTES)
def test_a_process_refuses_a_gigabyte_of_words_in_seconds_and_little_memory(tmp_path: Path, case: str) -> None:
    spoil, place = GIGABYTES[case]
    data = write(tmp_path / "data", specification())
    try:
        spoil(data)
        said = as_process(tmp_path, "run", *using(data))
    finally:
        # pytest keeps the folders of its last runs.
        (data / P).unlink()
    assert place in said
    assert "1,000,000 characters" in said


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize("case", ["a gigabyte in one field", "links in a circle", "a file that fails while it is read"])
def test_a_process_refuses_files_in_seconds_and_little_memory(tmp_path: Path, case: str) -> None:
    spoil, fragments = PLACES[case]
    data = write(tmp_path / "data", specification())
    spoil(data)
    said = as_process(tmp_path, "run", *using(data))
    for fragment in fragments:
        assert fragment in said


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize("case", ["near key", "more folds than posts", "a number without end", "no model"])
def test_a_process_refuses_configs_in_seconds(tmp_path: Path, case: str) -> None:
    overrides, fragments = MORE_CONFIG[case]
    data = write(tmp_path / "data", specification())
    said = as_process(tmp_path, "run", *using(data, *overrides))
    for fragment in fragments:
        assert fragment in said


def as_process(tmp_path: Path, command: str, *arguments: str) -> str:
    work = tmp_path / "work"
    work.mkdir()
    # An address space of 2 GB: what reads a gigabyte into strings fails in it.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))"
    code = f"{limit}; import raycv.{command} as command; command.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=work, capture_output=True, text=True, timeout=300
    )
    check(done.stdout, done.stderr, command, done.returncode, work)
    return done.stderr


# --- Anything at all -------------------------------------------------------------------------------------------------


@st.composite
def spoilt(draw: st.DrawFn) -> Files:
    """A data set with some bytes of some file cut out, put in, or exchanged."""
    files = draw(st.sampled_from([specification, official]))()
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(files)))
        content = files[name]
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 60)))
        new = draw(st.one_of(st.binary(max_size=6), st.sampled_from(NASTY)))
        files[name] = content[:start] + new + content[end:]
    return files


NASTY = [
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\r\n",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"NaN",
    b"../",
    b"{",
    b"]",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=spoilt())
def test_a_spoilt_data_set_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, files: Files) -> None:
    """Never another error, never a text in the message; what is read has only known ids and labels."""
    data = write(tmp_path_factory.mktemp("spoilt"), files)
    try:
        dataset = load_dataset(data, data)
    except FaultsError:
        refusal(data)
        return
    assert {pair.label for pair in dataset.pairs} == {0, 1}
    assert {pair.post_id for pair in dataset.pairs} <= set(dataset.posts)
    assert {pair.criterion_id for pair in dataset.pairs} <= set(dataset.criteria)
    assert not any("/" in key or "\0" in key for key in dataset.criteria)


@pytest.mark.parametrize("command", ["run", "infer", "serve", "aggregate", "report", "mistakes"])
def test_a_bucket_for_the_runs_in_the_environment_is_refused(refused, monkeypatch, command: str) -> None:
    monkeypatch.setenv("RAYCV_RUN_DIR", "s3://bucket/runs")
    said = refused(command, *(["experiment=quickstart"] if command == "run" else []))
    assert re.search(r"- (run\.)?dir: must be a path, and this is an address: .*; received 's3://bucket/runs'", said), (
        said
    )
