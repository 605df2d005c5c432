"""A bundle for reviewers: all of it can be computed again, and nothing in it names a post, a person or a place."""

import csv
import io
import json
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import yaml
from rich.console import Console
from support.refusals import refuses
from support.studies import folder_of, richest

from raycv.common.files import array_bytes, read_json, write_json
from raycv.config.command_line import compose
from raycv.config.schema import ReportConfig
from raycv.config.validation import validate
from raycv.cv.aggregation import make_page
from raycv.cv.bundle import check_bundle, read_bundle
from raycv.errors import FaultsError, NotShownError
from raycv.evaluation.evaluate import evaluate
from raycv.results.study import load_study

CANARY = "zebra-canary-7731"
POST = "s_1270_"
"""The beginning of each post id."""


def asked(*words):
    return validate(ReportConfig, compose("report", list(words)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run that recorded everything, and places and people in its records."""
    study = richest(posts=45)
    study = replace(study, run="mine", post_ids=[f"{POST}{at * 7 % 45:03}" for at in range(45)])
    pairs = [(study.post_ids[0], study.post_ids[1]), (study.post_ids[5], study.post_ids[0])]
    study = replace(study, near_duplicates=pairs)
    warnings = [
        f"1 post without text dropped, with the pairs: {POST}999.",
        "/home/alice/data/x.csv looks like criteria",
    ]
    folder = folder_of(study, tmp_path_factory.mktemp("runs"), text=CANARY, warnings=warnings)
    config = yaml.safe_load(folder.config.read_text())
    config["model"]["name"] = "/home/alice/models/llama"
    config["data"] = {"dir": "/home/alice/data", "criteria_dir": "/home/alice/data", "empty": "drop"}
    config["run"] = {"name": "mine", "dir": "/home/alice/runs"}
    folder.config.write_text(yaml.safe_dump(config))
    environment = read_json(folder.environment)
    base = {"name": "/home/alice/models/llama", "revision": None, "files": {"a": 1}, "sha256": {"a": "0"}}
    write_json(folder.environment, environment | {"base_model": base, "host": "alices-laptop"})
    for fold in range(study.folds):
        file = folder.fold(fold).result
        events = ["training: out of memory: micro-batch 8 -> 4"] if fold == 2 else ["resumes on alices-laptop"]
        write_json(file, read_json(file) | {"events": events, "restarts": []})
    return folder


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "review.zip"
    make_page(asked(f"run={run.root}", f"bundle={path}"))
    return path


def rewritten(bundle, path, **changed):
    """The bundle with some files changed: a function of the bytes, or None to remove; a new name gets bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        files = read_bundle(bundle)
        for name in files.keys() | changed.keys():
            change = changed.get(name, lambda content: content)
            if change is not None:
                archive.writestr(name, change(files.get(name, b"")))
    return path


@pytest.mark.long
def test_equal_runs_have_equal_bytes_and_the_run_folder_stays(run, bundle, tmp_path):
    again = tmp_path / "other.zip"
    for _ in range(2):
        make_page(asked(f"run={run.root}", f"bundle={again}"))
        assert again.read_bytes() == bundle.read_bytes()
    assert not run.page.exists()


def test_nothing_in_it_names_a_post_a_person_or_a_place(bundle):
    files = read_bundle(bundle)
    for name, content in files.items():
        for secret in (CANARY, POST, "alice", "/home/", "hunter2", "myhost", "postgresql", "/tmp/"):
            assert secret.encode() not in content, (name, secret)
    assert yaml.safe_load(files["config.yaml"])["model"]["name"] == "llama"
    assert "2 warnings about data and prompts" in files["report.md"].decode()


def test_files_are_joined_by_names_that_follow_neither_order_nor_id(run, bundle):
    files = read_bundle(bundle)
    rows = list(csv.DictReader(io.StringIO(files["predictions.csv"].decode())))
    names = {row["post"] for row in rows}
    assert len(names) == 45
    assert all(re.fullmatch("p[0-9a-f]{20}", name) for name in names)
    splits = {row["post"]: row["fold"] for row in csv.DictReader(io.StringIO(files["splits.csv"].decode()))}
    assert splits == {row["post"]: row["fold"] for row in rows}
    pairs = list(csv.DictReader(io.StringIO(files["near_duplicates.csv"].decode())))
    assert len(pairs) == 2
    assert {name for pair in pairs for name in pair.values()} <= names
    # Posts are told apart by labels and scores here: the order of the names is not that of the ids.
    study = load_study(run)
    of_name, of_id = {}, {}
    for row in rows:
        of_name.setdefault(row["post"], []).append((row["criterion_id"], float(row["score"])))
    for at, score in enumerate(study.scores.tolist()):
        of_id.setdefault(study.post_ids[study.post[at]], []).append((study.criterion_ids[study.criterion[at]], score))
    names_of = {tuple(sorted(scores)): name for name, scores in of_name.items()}
    by_id = [names_of[tuple(sorted(of_id[post]))] for post in sorted(of_id)]
    assert sorted(by_id) == sorted(names)
    assert by_id != sorted(by_id)


def numbers(value, path=()):
    """Every number without an interval's ends, which depend on the order of the posts."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in ("fixed", "reselected", "band", "undefined_draws", "difference", "numbers", "sentences"):
                yield from numbers(part, (*path, key))
    elif isinstance(value, list):
        for at, part in enumerate(value):
            yield from numbers(part, (*path, at))
    elif isinstance(value, float | int):
        yield path, value


@pytest.mark.long
def test_its_numbers_are_those_of_the_run_but_for_the_draws(run, bundle):
    there = dict(numbers(json.loads(read_bundle(bundle)["evaluation.json"])))
    own = dict(numbers(evaluate(load_study(run))))
    assert there.keys() == own.keys()
    apart = {path for path in own if own[path] != pytest.approx(there[path], abs=1e-9)}
    assert {path for path in apart if "low" not in path and "high" not in path and path[0] != "verdict"} == set()
    assert len(own) > 500


def test_a_bundle_is_checked(bundle, capsys):
    make_page(asked(f"check={bundle}"))
    said = capsys.readouterr().out
    assert "follow from its predictions" in said
    assert re.search("SHA-256 [0-9a-f]{64}", said)


def scores_changed(content):
    lines = content.decode().splitlines()
    cells = lines[7].split(",")
    cells[4] = repr(float(np.nextafter(float(cells[4]), 1)))
    lines[7] = ",".join(cells)
    return ("\n".join(lines) + "\n").encode()


def label_changed(content):
    lines = content.decode().splitlines()
    cells = lines[7].split(",")
    cells[3] = str(1 - int(cells[3]))
    lines[7] = ",".join(cells)
    return ("\n".join(lines) + "\n").encode()


def number_changed(content):
    return re.sub(rb'"f1": \{\n(\s+)"value": 0\.(\d)', rb'"f1": {\n\1"value": 0.9\2', content, count=1)


def cell_changed(content):
    lines = content.decode().splitlines()
    lines[1] = re.sub(r"0\.\d", "0.9", lines[1], count=1)
    return ("\n".join(lines) + "\n").encode()


TAMPERED = {
    "a last bit of a prediction": ("predictions.csv", scores_changed, "the scores of fold 0 are not those of an epoch"),
    "a label": ("predictions.csv", label_changed, "evaluation.json: "),
    "a number of the statistics": ("evaluation.json", number_changed, "follows from the data"),
    "a cell of a table": ("tables/metrics.csv", cell_changed, "tables/metrics.csv[1]"),
    "a number in the page": (
        "report.html",
        lambda page: page.replace(b"</td>", b"1</td>", 1),
        "report.html: it differs",
    ),
    "a figure": ("figures/roc.svg", lambda svg: svg.replace(b'<path d="M ', b'<path d="M 1', 1), "a figure differs"),
    "a setting": ("config.yaml", lambda text: text.replace(b"0.002", b"0.001"), "tables/config.csv"),
    "the scores of an epoch": (
        "epoch_scores/fold_1.npy",
        lambda content: array_bytes(np.load(io.BytesIO(content)) ** 2),
        "the scores of fold 1 are not those of an epoch",
    ),
    "a file that is gone": ("splits.csv", None, "splits.csv: it is missing"),
    "a file more": ("extra.txt", lambda _: b"x", "extra.txt: it does not belong"),
}


@pytest.mark.long
@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_seen(bundle, tmp_path, case):
    name, change, said = TAMPERED[case]
    path = rewritten(bundle, tmp_path / "review.zip", **{name: change})
    before = read_bundle(bundle).get(name)
    assert read_bundle(path).get(name) != before, "the test changed nothing"
    with refuses("bundle-differs", said, error=NotShownError) as caught:
        check_bundle(path, Console(file=io.StringIO()))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("content", [b"no zip", None, b""])
def test_another_file_is_no_bundle_and_stays(run, tmp_path, content):
    path = tmp_path / "other.zip"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "x")
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with refuses("input-file", path, "raycv.report run=<name> bundle=<file>"):
        make_page(asked(f"check={path}"))
    with refuses("output-exists", f"bundle={path}: ", "bundle=<file>"):
        make_page(asked(f"run={run.root}", f"bundle={path}"))
    assert path.read_bytes() == before


def test_damaged_data_and_impossible_keys_are_refused(bundle, tmp_path):
    path = rewritten(bundle, tmp_path / "review.zip", **{"predictions.csv": lambda _: b"fold,post\n1,2\n"})
    with refuses("input-file", "data of the bundle", "KeyError"):
        make_page(asked(f"check={path}"))
    with refuses("input-file", f"{tmp_path / 'none.zip'} cannot be read", "No such file"):
        make_page(asked(f"check={tmp_path / 'none.zip'}"))
    with refuses("disk-unwritable", f"bundle={tmp_path / 'none' / 'a.zip'}: ", f"{tmp_path / 'none'} does not exist"):
        make_page(asked(f"bundle={tmp_path / 'none' / 'a.zip'}"))
    with refuses("config-value", "check: ", "bundle=", "received 'a.zip'", error=FaultsError):
        asked("check=a.zip", "bundle=b.zip")
