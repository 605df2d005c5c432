"""Bad input, through the commands as a user types them: one message with place, value and remedy, and nothing written.

What the loader and the schema refuse is listed with their tests, and goes through the command here.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
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
from support.refusals import refuses, said_refusal

from raycv import aggregate, compare, infer, mistakes, report, reproduce, run, serve, synthesize
from raycv.batch_inference.output_place import check_output
from raycv.common.locations import check_ray_folder
from raycv.data.dataset import load_dataset
from raycv.data.synthetic import write_dataset
from raycv.errors import FaultsError
from raycv.inference.choose import choose
from raycv.results.find_run import find_run, folds_of, recorded_config
from raycv.results.run_folder import RunFolder

COMMANDS = {
    "run": run.main, "infer": infer.main, "serve": serve.main, "aggregate": aggregate.main,
    "report": report.main, "synthesize": synthesize.main, "compare": compare.main, "mistakes": mistakes.main,
    "reproduce": reproduce.main,
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
    "UTF-16 without a mark": (recoded(P, "utf-16-le"), ["data-format", "posts.csv, line 1: ", "UTF-16"]),
    "big-endian UTF-16 without a mark": (
        recoded(G, "utf-16-be"),
        ["data-format", "groundtruth.csv, line 1: not UTF-8"],
    ),
    "UTF-32": (recoded(C, "utf-32"), ["data-format", "criteria.csv, line 1: not UTF-8"]),
    "gzip": (
        lambda files: files.update({P: b"\x1f\x8b\x08\x00" + bytes(40)}),
        ["data-format", "posts.csv, line 1: ", "gzip"],
    ),
    "Parquet": (
        lambda files: files.update({G: b"PAR1" + bytes(40)}),
        ["data-format", "groundtruth.csv, line 1: ", "Parquet"],
    ),
    "Windows-1252 quotes": (replaced(P, b"Grey", b"\x93Grey\x94"), ["data-format", "posts.csv, line 2: the byte 0x93"]),
    "UTF-8 longer than it may be": (
        replaced(P, b"Grey", b"Gr\xc0\xafey"),
        ["data-format", "posts.csv, line 2: the byte 0xc0"],
    ),
    "half a surrogate pair": (
        replaced(P, b"Grey", b"Gr\xed\xa0\x80ey"),
        ["data-format", "posts.csv, line 2: the byte 0xed"],
    ),
    "columns that are misspelt": (
        replaced(G, b"criterion_id,label", b"criterion,lable"),
        [
            "data-format",
            "line 1: `criterion_id`, `label` missing",
            "perhaps 'criterion' is the criterion_id; perhaps 'lable' is the label",
        ],
    ),
    "a byte order mark twice": (
        lambda files: files.update({P: b"\xef\xbb\xbf" * 2 + files[P]}),
        ["data-format", "posts.csv, line 1: `post_id` missing"],
    ),
    "a byte order mark within the header": (
        replaced(P, b"post_id,post", b"post_id,\xef\xbb\xbfpost"),
        ["data-format", "posts.csv, line 1: `post` (or `text`) missing", "a value of 5 characters"],
    ),
    "tabs": (every(P, b",", b"\t"), ["data-format", "posts.csv, line 1:", "separated by tabs"]),
    "bars": (every(G, b",", b"|"), ["data-format", "groundtruth.csv, line 1:", "separated by bars"]),
    "NaN as label": (replaced(G, b"p2,A.5,no", b"p2,A.5,NaN"), ["data-label", "line 15: label is empty: it holds NaN"]),
    "a negative label": (replaced(G, b"p2,A.5,no", b"p2,A.5,-1"), ["data-label", "line 15: label '-1' "]),
    "a fraction as label": (replaced(G, b"p2,A.5,no", b"p2,A.5,0.5"), ["data-label", "line 15: label '0.5' "]),
    "infinity as label": (replaced(G, b"p2,A.5,no", b"p2,A.5,1e999"), ["data-label", "line 15: label '1e999' "]),
    "duplicate column of labels": (
        every(G, b",label\n", b",label,Label\n"),
        ["data-format", "groundtruth.csv, line 1: the column 'label' occurs 2 times"],
    ),
    "NUL in an id": (
        replaced(G, b"p2,A.5,no", b"p2,A.\x005,no"),
        ["data-format, data-id", "groundtruth.csv, line 15: a NUL character"],
    ),
    "NUL in the header": (
        replaced(C, b"criterion_id,", b"criterion\0_id,"),
        ["data-format", "criteria.csv, line 1: `criterion_id` missing", "13 characters"],
    ),
    "an id that looks like another": (criterion_named("A\u20248"), ["data-id", "already on line 9", "written 'A.8'"]),
    "a JSON key twice": (
        lambda files: files.update({"criteria.json": b'[{"id": "A.1", "id": "A.2", "text": "x"}]', C: b""}),
        ["data-format", "criteria.json: an object that has a key twice"],
    ),
    "absolute criterion id": (criterion_named("/etc/x"), ["data-id", "line 10: criterion_id '/etc/x' "]),
    "climbing criterion id": (criterion_named("../../x"), ["data-id", "line 10: criterion_id '../../x' "]),
    "criterion id of Windows": (
        criterion_named("..\\x"),
        ["data-id", "criteria.csv, line 10: criterion_id", "no / or \\"],
    ),
    "criterion id that is a dot": (criterion_named("."), ["data-id", "line 10: criterion_id '.' "]),
    "escape sequence in an id": (criterion_named("A\x1b[2J"), ["data-id", "line 10: criterion_id holds a line break"]),
    "rows that are all broken": (every(G, b",no\n", b"\n"), ["data-format", "24 rows"]),
    "a header in quotes that never close": (
        replaced(P, b"post_id,", b'"post_id,'),
        ["data-format", "posts.csv, line 1: a quoted field"],
    ),
    "HTML of a login page": (
        lambda files: files.update({P: b"<!DOCTYPE html>\n<html><body>log in</body></html>\n"}),
        ["data-format", "posts.csv, line 1: `post_id`"],
    ),
    "a git-lfs pointer": (
        lambda files: files.update({P: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}),
        ["data-format", "posts.csv, line 1: `post_id`"],
    ),
}

DATA = [
    *[(name, specification, case) for name, case in (MALFORMED | MORE_DATA).items()],
    *[(name, official, case) for name, case in MALFORMED_RELEASE.items()],
]


@pytest.mark.parametrize(("made", "case"), [one[1:] for one in DATA], ids=[one[0] for one in DATA])
def test_a_malformed_data_set_is_refused(
    tmp_path: Path, refused: Callable[..., str], made: Callable[[], Files], case: tuple[Edit, list[str]]
) -> None:
    edit, expected = case
    files = made()
    edit(files)
    data = write(tmp_path / "data", files)
    said_refusal(refused("run", *using(data)), *expected)


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
        ["data-file", "posts.csv: a symbolic link"],
    ),
    "links in a circle": (
        both(link(P, "b.csv"), link("b.csv", P)),
        ["data-file", "posts.csv: a symbolic link"],
    ),
    "a link to nothing": (
        link(G, "nothing.csv"),
        ["data-file", "groundtruth.csv: a symbolic link"],
    ),
    "a folder for a file": (folder(C), ["data-file", "criteria.csv: a folder"]),
    "a device for a file": (
        link(P, "/dev/zero"),
        ["data-file", "posts.csv: no regular file"],
    ),
    "a file that fails while it is read": (
        link(P, "/proc/self/mem"),
        ["data-file", "posts.csv: Input/output error"],
    ),
    "a pipe for a file": (
        both(lambda data: (data / P).unlink(), lambda data: os.mkfifo(data / P)),
        ["data-file", "posts.csv: no regular file"],
    ),
    "a folder that links to itself": (moved("data"), ["data-file", "/data: ", "Too many levels of symbolic links"]),
    "a folder that links to nothing": (
        moved("nowhere"),
        ["data-file", "/data: ", "a symbolic link"],
    ),
    "a folder of another name": (
        lambda data: data.rename(data.with_name("dota")),
        ["data-file", "did you mean ", "/dota?"],
    ),
    "a folder that is not there": (
        lambda data: data.rename(data.with_name("elsewhere")),
        ["data-file", "holds: elsewhere"],
    ),
    "an empty folder": (
        lambda data: [path.unlink() for path in data.iterdir()],
        ["data-file", "no table `posts`"],
    ),
    "a gigabyte in one field": (
        sparse(P, b'post_id,post\np1,"x'),
        ["data-format", "posts.csv, line 2", "1,000,000 characters"],
    ),
    "a gigabyte of nothing": (sparse(G, b""), ["data-format", "groundtruth.csv, line 1: not UTF-8"]),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.long
def test_files_and_folders_that_are_none_are_refused(tmp_path: Path, refused: Callable[..., str], case: str) -> None:
    spoil, expected = PLACES[case]
    data = write(tmp_path / "data", specification())
    spoil(data)
    said_refusal(refused("run", *using(data)), *expected)


# --- Configs ---------------------------------------------------------------------------------------------------------

# On the command line the values of these keys are text: a model may be called 5.
TEXT_KEYS = ("model.name=5", "run.dir=false", "train.gradient_checkpointing=2")
TYPED = [(override, said) for override, said in MALFORMED_CONFIG if override not in TEXT_KEYS]

MORE_CONFIG: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["train.learning_rat=1"], ["config-unknown-key", "train.learning_rat: unknown key"]),
    "near key": (
        ["train.epoch=3"],
        ["config-unknown-key", "train.epoch: unknown key; did you mean train.epochs?"],
    ),
    "key of another section": (
        ["cv.epochs=3"],
        ["config-unknown-key", "cv.epochs: unknown key; did you mean train.epochs?"],
    ),
    "unknown section": (
        ["trian.lr=1e-4"],
        ["config-unknown-key", "trian.lr: unknown key; did you mean train.lr?"],
    ),
    "key below a value": (
        ["train.lr.value=1"],
        ["config-value", "train.lr: ", "received {'value': '1'}"],
    ),
    "a value for a section": (
        ["run=abc"],
        ["config-value", "run: ", "received 'abc'"],
    ),
    "a value for a group": (["cv=3"], ["config-value", "cv=3", "cv=default"]),
    "a section taken away": (
        ["~tracking.uri"],
        ["config-value", "tracking.uri: ", "received nothing"],
    ),
    "code of models": (
        ["model.trust_remote_code=true"],
        ["config-unknown-key", "model.trust_remote_code: unknown key"],
    ),
    "keys that exclude each other": (
        ["train.batching=post_grouped", "train.imbalance=weighted_sampling"],
        ["config-value", "train.imbalance: ", "train.batching=post_grouped"],
    ),
    "PEFT's layer and our dropout": (
        ["dora.implementation=peft", "dora.dropout=lora_path"],
        ["config-value", "dora.implementation: ", "dora.dropout=peft"],
    ),
    "batches that do not divide": (
        ["train.batch_size=5", "train.effective_batch_size=32"],
        [
            "config-value",
            "train.effective_batch_size: ",
            "train.batch_size, which is 5 (it may be: 1, 2, 4, 8, 16, 32)",
            "received 32",
        ],
    ),
    "a store that is forgotten": (
        ["tracking.uri=sqlite:///:memory:"],
        ["config-value", "tracking.uri: ", "received 'sqlite:///:memory:'"],
    ),
    "a store that MLflow does not know": (
        ["tracking.uri=nonsense://ann:hunter2222@host"],
        ["config-value", "tracking.uri: ", "received 'nonsense://***@host'"],
    ),
    "a password with a space": (
        ["tracking.uri=http://ann:my hunter2222@host"],
        ["config-value", "tracking.uri: ", "%20", "received 'http://***@host'"],
    ),
    "half an address": (
        ["tracking.uri=http://[::1"],
        ["config-value", "tracking.uri: ", "Invalid IPv6 URL"],
    ),
    "epochs for ever": (
        ["train.epochs=99999999999999999999"],
        ["config-value", "train.epochs: ", "received 99999999999999999999"],
    ),
    "a rank beyond all models": (["dora.r=1000000000"], ["config-value", "dora.r: ", "received 1000000000"]),
    "retries for ever": (
        ["resources.retries=1000000000"],
        ["config-value", "resources.retries: ", "received 1000000000"],
    ),
    "more folds than posts": (
        ["cv.folds=4"],
        ["data-split", "cv.folds=4 ", "only 3 posts", "lower cv.folds"],
    ),
    "a fold without a match": (
        ["cv.folds=3"],
        ["data-split", "fold 0: its validation part (9 pairs)"],
    ),
    "a million folds": (["cv.folds=1000000"], ["data-split", "cv.folds=1000000 ", "only 3 posts"]),
    "empty texts refused": (
        ["data.empty=refuse", "data.dir={empty}"],
        ["data-text", "posts.csv, line 2: post 'p1' has no text"],
    ),
    "a file for the data folder": (
        ["data.dir={data}/posts.csv"],
        ["data-file", "posts.csv: "],
    ),
    "a name for a folder that is too long": (
        ["data.dir=" + "x" * 300],
        ["config-value", "data.dir: is too long"],
    ),
    "a folder of artifacts that cannot be": (
        ["tracking.artifacts=" + "x" * 300],
        ["config-value", "tracking.artifacts: is too long"],
    ),
    "buckets for folders": (
        ["run.dir=gs://bucket/runs", "tracking.artifacts=s3://bucket/a", "data.dir=hdfs:/x", "model.name=s3://b/m"],
        ["config-value", "4 faults", "run.dir: must be a path", "received 'gs://bucket/runs'"],
    ),
    "a run that cannot be": (["resume=" + "x" * 300], ["config-value", "resume: is too long"]),
    "a run with a control character": (
        ["resume=a\x01b"],
        ["run-missing", r"resume=a\x01b: "],
    ),
    "a store of no kind": (
        ["tracking.uri=bad://x"],
        ["config-value", "tracking.uri: ", "received 'bad://x'"],
    ),
    "a name that is too long in bytes": (
        ["data.criteria_dir=" + "\u00e9" * 128],
        ["config-value", "data.criteria_dir: is too long"],
    ),
    "criteria elsewhere": (["data.criteria_dir=nowhere"], ["data-file", "nowhere", "data.criteria_dir"]),
    "climbing name": (
        ["run.name=../../etc"],
        ["config-value", "run.name: ", "received '../../etc'"],
    ),
    "absolute name": (
        ["run.name=/tmp/x"],
        ["config-value", "run.name: ", "received '/tmp/x'"],
    ),
    "name that is a dot": (["run.name=.."], ["config-value", "run.name: ", "received '..'"]),
    "name with a line break": (
        ["run.name=a\n"],
        ["config-value", "run.name: ", r"received 'a\n'"],
    ),
    "name that is too long": (
        ["run.name=" + "x" * 101],
        ["config-value", "run.name: ", "101 characters"],
    ),
    "no folder of runs": (
        ["run.dir=/proc/x"],
        ["disk-unwritable, tracking-store", "run.dir=/proc/x: raycv cannot write to /proc "],
    ),
    "file of runs": (
        ["run.dir={data}/posts.csv"],
        ["disk-unwritable, tracking-store", "run.dir=", "/posts.csv (", "run.dir=<folder>"],
    ),
    "no model": (
        ["model.name=/nowhere"],
        ["base-files", "The folder /nowhere"],
    ),
    "a folder that is not a model": (
        ["model.name={data}"],
        ["base-files", "/data ", "no config.json"],
    ),
    "no id of a model": (
        ["model.name=a/b/c"],
        ["base-files", "model.name='a/b/c' "],
    ),
    "a climbing id of a model": (
        ["model.name=org/.."],
        ["base-files", "model.name='org/..' "],
    ),
    "a model that does not ship": (
        ["model.name=raycv://models/x"],
        ["package-damaged", "'models/x'"],
    ),
    "a revision of a folder": (["model.revision=v2"], ["config-value", "model.revision=v2 ", "model.revision=null"]),
    "an environment variable that is not set": (
        ["data.dir=${oc.env:NOT_SET_AT_ALL}"],
        ["config-value", "NOT_SET_AT_ALL"],
    ),
    "a reference to nothing": (["train.lr=${train.rate}"], ["config-value", "train.rate"]),
    "references in a circle": (
        ["train.lr=${train.weight_decay}", "train.weight_decay=${train.lr}"],
        ["config-value", "full_key: train.lr", "--cfg job"],
    ),
    "a list without its end": (
        ["model.target_modules=[a"],
        ["config-syntax", "model.target_modules", "[a", "model.target_modules=[a]"],
    ),
    "a word": (["nonsense"], ["config-syntax", "nonsense", "--help"]),
    "no key": (["=5"], ["config-syntax", "=5", "--help"]),
    "an option of Hydra's without its kind": (
        ["--info=nonsense"],
        ["config-syntax", "--info", "nonsense"],
    ),
    "an option that there is not": (
        ["--folds=3"],
        ["config-unknown-key", "--folds"],
    ),
    "a sweep": (["cv.folds=2,3", "--multirun"], ["config-syntax", "--multirun"]),
    "several values": (["cv.folds=2,3"], ["config-value", "cv.folds: ", "'2,3'", "cv.folds=2"]),
    "a number without end": (["cv.folds=" + "9" * 5000], ["config-syntax", "cv.folds", "5000 characters", "--help"]),
    "no experiment": (
        ["experiment=nope"],
        ["config-value", "'nope'", "experiment=quickstart"],
    ),
}

FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "tabs": ("train:\n\tlr: 1\n", ["config-syntax", "character '\\t'", "own.yaml", "line 3, column 1"]),
    "no YAML": ("train: [1\n", ["config-syntax", "own.yaml"]),
    "Latin-1": ("data:\n  dir: caf\u00e9\n".encode("latin-1"), ["config-syntax", "utf-8", "--config-name=own"]),
    "a list": ("- a\n- b\n", ["config-syntax", "'own'", "--config-name=own"]),
    "a text": ("just words\n", ["config-value, config-unknown-key", "own"]),
    "NUL": (b"data:\n  dir: a\0b\n", ["config-syntax", "own.yaml"]),
    "an escaped NUL": ('data:\n  dir: "a\\0b"\n', ["config-value", "data.dir: ", "received 'a\\x00b'"]),
    "an object of Python": (
        "train:\n  lr: !!python/object/apply:os.getcwd []\n",
        ["config-syntax", "python/object/apply:os.getcwd"],
    ),
    "numbers as text": ('train:\n  epochs: "3"\n', ["config-value", "train.epochs: ", "received '3'"]),
    "not a number": ("train:\n  lr: .nan\n", ["config-value", "train.lr: ", "received nan"]),
    "a date": ("train:\n  epochs: 2025-11-12\n", ["config-value", "train.epochs: ", "received "]),
    "a switch": ("train:\n  schedule: on\n", ["config-value", "train.schedule: ", "received True"]),
    "a key twice": ("train:\n  lr: 1e-4\n  lr: 1e-5\n", ["config-syntax", "duplicate key lr"]),
    "a dotted key": ("train.lr: 1e-4\n", ["config-unknown-key", "train.lr: unknown key with a dot in its name"]),
    "aliases without end": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
        ["config-unknown-key", "d: unknown key", "a: unknown key"],
    ),
}


@pytest.mark.parametrize(("override", "said"), TYPED, ids=[override for override, _ in TYPED])
def test_a_malformed_value_is_refused(refused: Callable[..., str], override: str, said: str) -> None:
    message = f"{refused('run', 'experiment=quickstart', BACKSTOP, override)} ".replace("\n", " ")
    assert message.endswith("Kind: config-value  ")
    assert f"- {override.split('=')[0]}: " in message
    assert said in message


@pytest.mark.parametrize("case", MORE_CONFIG)
def test_a_malformed_command_line_is_refused(tmp_path: Path, refused: Callable[..., str], case: str) -> None:
    overrides, expected = MORE_CONFIG[case]
    data = write(tmp_path / "data", specification())
    empty = write(tmp_path / "empty", specification({"p1": "", "p2": "a", "p3": "b"}))
    said = refused(
        "run", *using(data, *(one.replace("{data}", f"{data}").replace("{empty}", f"{empty}") for one in overrides))
    )
    said_refusal(said, *expected)


@pytest.mark.parametrize("case", FILES)
def test_a_malformed_file_of_ones_own_is_refused(tmp_path: Path, refused: Callable[..., str], case: str) -> None:
    content, expected = FILES[case]
    own = tmp_path / "configs"
    own.mkdir()
    content = content.encode() if isinstance(content, str) else content
    (own / "own.yaml").write_bytes(b"defaults: [run, _self_]\n" * (content[:1] not in (b"-", b"j")) + content)
    said_refusal(refused("run", f"--config-dir={own}", "--config-name=own", BACKSTOP), *expected)


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
    "no post": ("infer", [], ["input-empty", 'post="..."', "post_file=post.txt"]),
    "two posts": ("infer", ["post=a", "post_file=b"], ["config-value", "post and post_file"]),
    "a post without quotes": (
        "infer",
        ["post=I", "feel", "bad"],
        ["config-syntax", "2 words"],
    ),
    "a file that is not there": (
        "infer",
        ["post_file=no.txt"],
        ["input-file", "post_file=no.txt ", "No such file"],
    ),
    "a folder of posts": ("infer", ["post_file=."], ["input-file", "post_file=. ", "Is a directory"]),
    "a post without end": (
        "infer",
        ["post_file=/dev/zero"],
        ["input-file", "more than 4,000,000 bytes", "input=pairs.csv"],
    ),
    "a fold below none": ("infer", ["post=a", "fold=-1"], ["config-value", "fold: ", "received -1"]),
    "a fold by name": ("infer", ["post=a", "fold=first"], ["config-value", "fold: ", "received 'first'"]),
    "an output of no kind": (
        "infer",
        ["post=a", "output=xml"],
        ["config-value", "output=xml: ", "output=json"],
    ),
    "rows without a number": (
        "infer",
        ["post=a", "infer.batch_size=0"],
        ["config-value", "infer.batch_size: ", "received 0 "],
    ),
    "no run": (
        "infer",
        ["post=a", "run=nothing"],
        ["run-missing, tracking-store", "run=nothing ", "mlflow.db", "experiment=quickstart"],
    ),
    "a run that climbs": (
        "infer",
        ["post=a", "run=../../etc"],
        ["run-missing", "run=../../etc: "],
    ),
    "not one run": ("infer", ["post=a"], ["run-missing", "holds no run", "experiment=quickstart"]),
    "a table without end": ("infer", ["input=/dev/zero", "output=s.csv"], ["run-missing", "holds no run"]),
    "a table and a post": (
        "infer",
        ["input=a.csv", "post=b", "output=s.csv"],
        ["config-value", "input and post"],
    ),
    "scores of no kind": (
        "infer",
        ["input=a.csv", "output=s.xlsx"],
        ["config-value", "output=s.xlsx"],
    ),
    "scores over a device": (
        "infer",
        ["input=a.csv", "output=/dev/null.csv/x.csv"],
        ["run-missing", "holds no run"],
    ),
    "a dash and a post": ("infer", ["-", "post=a"], ["config-value", "post and post_file"]),
    "an engine of no kind": ("infer", ["post=a", "engine=gpu"], ["config-value", "engine: ", "received 'gpu'"]),
    "a run with too long a name": (
        "infer",
        ["post=a", f"run={LONG}"],
        ["config-value", "run: is too long"],
    ),
    "runs in too long a folder": (
        "infer",
        ["post=a", f"dir={LONG}"],
        ["config-value", "dir: is too long"],
    ),
    "scores in a bucket": (
        "infer",
        ["input=s3://b/in.csv", "output=s3://b/out.csv", "dir=gs://b/runs"],
        ["config-value", "3 faults", "output: must be a path", "received 's3://b/in.csv'"],
    ),
    "a bucket to serve from": (
        "serve",
        ["run=s3://b/runs/mine", "base=s3://b"],
        ["config-value", "2 faults", "run: must be a path"],
    ),
    "a summary in a bucket": (
        "aggregate",
        ["dir=s3://B/../runs"],
        ["config-value", "dir: is not an address of an object storage", "s3://bucket/folder"],
    ),
    "a set for a bucket": (
        "synthesize",
        ["out=s3:/b"],
        ["config-value", "out: must be a path"],
    ),
    "GPUs and none": (
        "serve",
        ["infer.device=cpu", "serve.gpus_per_replica=1"],
        ["config-value", "infer.device=cpu ", "serve.gpus_per_replica=1 "],
    ),
    "scores with too long a name": (
        "infer",
        ["input=a.csv", f"output={LONG}.csv"],
        ["config-value", "output: is too long"],
    ),
    "scores whose parts have too long a name": (
        "infer",
        ["input=a.csv", f"output={LONG[:250]}.csv"],
        ["disk-unwritable", "output=a value of 254 characters ", "File name too long"],
    ),
    "no run to serve": ("serve", [], ["run-missing", "holds no run", "experiment=quickstart"]),
    "a port that is none": ("serve", ["serve.port=70000"], ["config-value", "serve.port: ", "received 70000"]),
    "a run to serve with too long a name": (
        "serve",
        [f"run={LONG}"],
        ["config-value", "run: is too long"],
    ),
    "crumbs of a core": (
        "serve",
        ["serve.cpus_per_replica=1e-300"],
        ["config-value", "serve.cpus_per_replica: ", "received 1e-300"],
    ),
    "a summary of too long a name": (
        "aggregate",
        [f"run={LONG}"],
        ["config-value", "run: is too long"],
    ),
    "the summary of no run": (
        "aggregate",
        ["run=nothing"],
        ["run-missing, tracking-store", "mlflow.db", "sqlite:////folder/mlflow.db"],
    ),
    "a summary with an unknown key": (
        "aggregate",
        ["rum=3"],
        ["config-unknown-key", "rum: unknown key; did you mean run?"],
    ),
    "nothing to compare": ("compare", [], ["config-value", "runs: ", "runs=<value>"]),
    "one run to compare": ("compare", ["runs=[a]"], ["config-value", "runs: ", "received ['a']"]),
    "runs in a bucket": ("compare", ["runs=[a,s3:/b]"], ["config-value", "runs", "must be a path"]),
    "a comparison of no runs": ("compare", ["runs=[a,b]"], ["run-missing", "holds no run a", "experiment=quickstart"]),
    "another requirement": (
        "compare",
        ["runs=[a,b]", "require=worse"],
        ["config-value", "require: ", "received 'worse'"],
    ),
    "the mistakes of no run": (
        "mistakes",
        ["run=nothing"],
        ["run-missing", "holds no run nothing", "experiment=quickstart"],
    ),
    "no mistakes": ("mistakes", ["most=0"], ["config-value", "most: ", "received 0 "]),
    "text of no word": ("mistakes", ["text=maybe"], ["config-value", "text: ", "received 'maybe'"]),
    "nowhere to write": ("synthesize", [], ["config-value", "out: must be given", "out=<value>"]),
    "no posts": ("synthesize", ["out=x", "posts=0"], ["config-value", "posts: ", "received 0 "]),
    "a profile of no kind": (
        "synthesize",
        ["out=x", "profile=long"],
        ["config-value", "profile: ", "received 'long'"],
    ),
    "words below none": (
        "synthesize",
        ["out=x", "words_mean=-3"],
        ["config-value", "words_mean: ", "received -3"],
    ),
    "words that are no number": (
        "synthesize",
        ["out=x", "words_mean=nan"],
        ["config-value", "words_mean: ", "received nan"],
    ),
    "a page of too long a name": ("report", [f"run={LONG}"], ["config-value", "run: is too long"]),
    "the page of no run": (
        "report",
        ["run=nothing"],
        ["run-missing", "holds no run nothing", "experiment=quickstart"],
    ),
    "a page with an unknown key": (
        "report",
        ["data.dri=x"],
        ["config-unknown-key", "data.dri: unknown key; did you mean data.dir?"],
    ),
    "a folder that cannot be made": (
        "synthesize",
        ["out=/proc/x", "posts=3"],
        ["disk-unwritable", "/proc/x: No such file or directory"],
    ),
    "a folder with too long a name": (
        "synthesize",
        [f"out={LONG}"],
        ["config-value", "out: is too long"],
    ),
    "a folder too deep": (
        "synthesize",
        ["out=" + "x/" * 256],
        ["config-value", "out: is too long", "255 slashes"],
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
        with refuses("data-file", "written/posts.csv: Permission denied"):
            load_dataset(written, written)
        with refuses("run-damaged", "runs/mine/config.yaml ", "Permission denied"):
            recorded_config(RunFolder(run))
        with refuses("run-damaged", "runs/mine/config.yaml ", "Permission denied"):
            folds_of(config)
        with refuses("disk-unwritable", "to data: Permission denied"):
            write_dataset(data, posts=3, seed=1)
        with refuses("disk-unwritable", "output='data/scores.csv' ", "Permission denied"):
            check_output(data / "scores.csv")
    run.chmod(0)
    with refuses("run-missing", "run=a value of 4094 characters ", "File name too long"):
        find_run(Path("runs"), "x/" * 2047)
    for ask in (find_run, lambda runs, run: choose(run, "best", runs, None)):
        with anybody(), refuses("run-missing", "run='mine' ", "runs/mine", "Permission denied"):
            ask(Path("runs"), "mine")
    data.chmod(0o755)
    run.chmod(0o755)


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.long
def test_the_other_commands_refuse_too(refused: Callable[..., str], case: str) -> None:
    command, arguments, expected = OTHERS[case]
    said_refusal(refused(command, *arguments), *expected)


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
    said_refusal(said, "data-format", place, "1,000,000 characters")


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize("case", ["a gigabyte in one field", "links in a circle", "a file that fails while it is read"])
def test_a_process_refuses_files_in_seconds_and_little_memory(tmp_path: Path, case: str) -> None:
    spoil, expected = PLACES[case]
    data = write(tmp_path / "data", specification())
    spoil(data)
    said_refusal(as_process(tmp_path, "run", *using(data)), *expected)


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize("case", ["near key", "more folds than posts", "a number without end", "no model"])
def test_a_process_refuses_configs_in_seconds(tmp_path: Path, case: str) -> None:
    overrides, expected = MORE_CONFIG[case]
    data = write(tmp_path / "data", specification())
    said_refusal(as_process(tmp_path, "run", *using(data, *overrides)), *expected)


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


@pytest.mark.parametrize("command", ["run", "infer", "serve", "aggregate", "report", "mistakes", "reproduce"])
def test_an_address_for_the_runs_in_the_environment_is_refused(refused, monkeypatch, command: str) -> None:
    monkeypatch.setenv("RAYCV_RUN_DIR", "hdfs://host/runs")
    said = refused(command, *(["experiment=quickstart"] if command == "run" else []))
    assert re.search(r"- (run\.)?dir: must be a path, and this is an address: .*; received 'hdfs://host/runs'", said), (
        said
    )


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_for_ray_with_a_path_too_long_for_its_sockets_is_refused(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """The limit is that of Ray: one byte less is not refused here, and Ray says the same."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "")
    longest = 107 - len(f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
    monkeypatch.setenv(variable, "/tmp/".ljust(longest, "x"))
    check_ray_folder()
    folder = "/tmp/".ljust(longest + 1, "x")
    monkeypatch.setenv(variable, folder)
    said = refused("run", "experiment=quickstart")
    said_refusal(said, "cluster-unreachable", f"{variable}={folder} ", "by 1 byte", "export RAY_TMPDIR=")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    check_ray_folder()


@pytest.mark.ray
def test_ray_itself_refuses_a_folder_that_is_one_byte_too_long() -> None:
    # The number of the process is part of the path.
    code = (
        "import os, sys, ray;"
        "n = 107 - len(f'/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store');"
        "os.environ['RAY_TMPDIR'] = (sys.argv[1] + '/').ljust(n + 1, 'x'); ray.init('local', include_dashboard=False)"
    )
    with tempfile.TemporaryDirectory(prefix="r") as short:
        ended = subprocess.run([sys.executable, "-c", code, short], capture_output=True, text=True)
    refusal = ended.stderr.strip().splitlines()[-1]
    assert "AF_UNIX path length cannot exceed 107 bytes: " in refusal
    assert len(refusal.rpartition(": ")[2]) == 108


def test_a_folder_for_ray_that_cannot_be_written_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("RAY_TMPDIR", "/proc/scratch")
    said = refused("run", "experiment=quickstart")
    said_refusal(said, "disk-unwritable", "/proc cannot be written", "RAY_TMPDIR=/proc/scratch", "export RAY_TMPDIR=")
