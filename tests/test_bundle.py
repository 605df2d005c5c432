"""A bundle for reviewers: all of it can be computed again, and nothing in it names a post, a person or a place."""

import contextlib
import csv
import io
import json
import re
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import yaml
from rich.console import Console
from support.refusals import refuses
from support.studies import folder_of, richest, simulated

from raycv.analysis.bundle_files import inputs_text, read_bundle, too_large
from raycv.common.files import array_bytes, read_json, write_json
from raycv.config.command_line import compose
from raycv.config.schema import ReportConfig
from raycv.config.validation import validate
from raycv.cv.aggregation import make_page
from raycv.cv.bundle import check_bundle, inputs_of
from raycv.errors import FaultsError, NotShownError, UserError
from raycv.evaluation.evaluate import evaluate
from raycv.results.run_folder import RunFolder
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
    assert yaml.safe_load(files["config.yaml"])["model"]["name"] == "a local folder"
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


def first_number(content, change):
    """Changes the first value of an F1 in the statistics."""
    return re.sub(
        rb'("f1": \{\n\s+"value": )([\d.]+)',
        lambda found: found[1] + repr(change(float(found[2]))).encode(),
        content,
        count=1,
    )


def cell_changed(content):
    lines = content.decode().splitlines()
    lines[1] = re.sub(r"0\.\d", "0.9", lines[1], count=1)
    return ("\n".join(lines) + "\n").encode()


def json_changed(text, change):
    value = json.loads(text)
    change(value)
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


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
    "a setting": ("config.yaml", lambda text: text.replace(b"0.002", b"0.001"), "tables/config"),
    "the scores of an epoch": (
        "epoch_scores/fold_1.npy",
        lambda content: array_bytes(np.load(io.BytesIO(content)) ** 2),
        "the scores of fold 1 are not those of an epoch",
    ),
    "a file that is gone": ("splits.csv", None, "splits.csv: it is missing"),
    "a table more": ("tables/extra.csv", lambda _: b"x", "tables/extra.csv: it does not belong"),
    "the scores of a fold more": ("epoch_scores/fold_7.npy", lambda _: b"x", "epoch_scores/ says 6 folds"),
    "the scores of a fold less": ("epoch_scores/fold_1.npy", None, "epoch_scores/ says 4 folds"),
    "other folds in the config": (
        "config.yaml",
        lambda text: text.replace(b"folds: 5", b"folds: 4"),
        "config.yaml: cv.folds says 4 folds, and predictions.csv has 5",
    ),
    "events of a fold more": (
        "run.json",
        lambda text: json_changed(text, lambda run: run["out_of_memory"].append(0)),
        "run.json: out_of_memory says 6 folds, and predictions.csv has 5",
    ),
    "restarts of a fold less": (
        "run.json",
        lambda text: json_changed(text, lambda run: run["retries"].pop()),
        "run.json: retries says 4 folds, and predictions.csv has 5",
    ),
    "a post less": (
        "splits.csv",
        lambda text: b"".join(text.splitlines(keepends=True)[:-1]),
        "splits.csv: 44 posts, and predictions.csv has 45",
    ),
    "a criterion less": (
        "evaluation.json",
        lambda text: json_changed(text, lambda found: found["data"]["criteria"].pop()),
        "evaluation.json: 8 criteria, and predictions.csv has 9",
    ),
    "a cell more": (
        "predictions.csv",
        lambda text: text.replace(b"\n0,", b",secret\n0,", 1),
        "predictions.csv: it differs",
    ),
    "bytes behind the scores": ("epoch_scores/fold_1.npy", lambda content: content + b"x", "fold_1.npy: it differs"),
    "metrics of an epoch": (
        "run.json",
        lambda text: json_changed(text, lambda run: run["history"][0].append({"f1": 0.99})),
        "run.json: it differs",
    ),
    "a comment": ("config.yaml", lambda text: text + b"# x\n", "config.yaml: it differs"),
    "figures without an end": ("report.html", lambda _: b"<svg" * 2**20, "report.html: its figures are not"),
    "a key that is there twice": (
        "evaluation.json",
        lambda text: text.replace(b"{\n", b'{\n  "run": "better",\n', 1),
        "evaluation.json: it differs",
    ),
    "metrics of a fold more": (
        "run.json",
        lambda text: json_changed(text, lambda run: run["history"].append([])),
        "run.json: history says 6 folds, and predictions.csv has 5",
    ),
    "a number by more than its rounding": (
        "evaluation.json",
        lambda text: first_number(text, lambda value: value + 1e-8),
        "follows from the data",
    ),
    "a digit more": (
        "tables/metrics.csv",
        lambda text: re.sub(rb"(,0\.\d+)", rb"\g<1>0", text, count=1),
        "follows from the data",
    ),
    "a cell in quotes": (
        "tables/metrics.csv",
        lambda text: re.sub(rb",(0\.\d+)", rb',"\g<1>"', text, count=1),
        "tables/metrics.csv: it differs",
    ),
    "a fraction for a count": (
        "evaluation.json",
        lambda text: text.replace(b'"folds": 5', b'"folds": 5.0', 1),
        "5.0, and 5 follows from the data",
    ),
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


def first_row(name, value):
    """Changes a cell of the first row of predictions.csv."""

    def change(content):
        rows = list(csv.reader(io.StringIO(content.decode())))
        rows[1][rows[0].index(name)] = value
        return "".join(",".join(row) + "\n" for row in rows).encode()

    return change


DAMAGED = {
    "a label of another value": ("predictions.csv", first_row("label", "2")),
    "a huge label": ("predictions.csv", first_row("label", "9" * 30)),
    "a huge fold": ("predictions.csv", first_row("fold", "30000000")),
    "a fold below 0": ("predictions.csv", first_row("fold", "-1")),
    "a score that is a word": ("predictions.csv", first_row("score", "zebra")),
    "a score above 1": ("predictions.csv", first_row("score", "1.5")),
    "a name with text": ("predictions.csv", first_row("post", "zebra")),
    "a cell beyond the limit of csv": ("predictions.csv", first_row("post", "z" * 200_000)),
    "other columns": ("predictions.csv", lambda _: b"fold,post\n1,2\n"),
    "no rows": ("predictions.csv", lambda _: b""),
    "no UTF-8": ("predictions.csv", lambda _: b"\xff"),
    "a near-duplicate that is not there": ("near_duplicates.csv", lambda _: b"post_a,post_b\nzebra,zebra\n"),
    "no array": ("epoch_scores/fold_1.npy", lambda _: b"x"),
    "an array in a ZIP file": ("epoch_scores/fold_1.npy", lambda _: b"PK\x03\x04"),
    "an array of numbers of 32 bits": (
        "epoch_scores/fold_1.npy",
        lambda content: array_bytes(np.load(io.BytesIO(content)).astype(np.float32)),
    ),
    "deep lists": ("environment.json", lambda _: b"[" * 200_000),
    "deep lists in YAML": ("config.yaml", lambda _: b"[" * 500_000),
    "another key of the run": ("run.json", lambda text: json_changed(text, lambda run: run.update(note="zebra"))),
    "a version more": ("run.json", lambda text: json_changed(text, lambda run: run["versions"].update(zebra="1"))),
    "versions that are a list": (
        "run.json",
        lambda text: json_changed(text, lambda run: run.update(versions=["zebra"])),
    ),
    "a version less": ("run.json", lambda text: json_changed(text, lambda run: run["versions"].pop("matplotlib"))),
    "a version with text": (
        "run.json",
        lambda text: json_changed(text, lambda run: run["versions"].update(numpy="zebra zebra")),
    ),
    "a number for yes": ("run.json", lambda text: json_changed(text, lambda run: run.update(control=1))),
    "an F1 that is not a number": (
        "run.json",
        lambda text: json_changed(text, lambda run: run["history"][0].append({"f1": float("nan")})),
    ),
    "events of one fold": ("run.json", lambda text: json_changed(text, lambda run: run.update(out_of_memory=[0]))),
    "another key of the base model": (
        "environment.json",
        lambda text: json_changed(text, lambda found: found["base_model"].update(zebra=1)),
    ),
    "too many events": (
        "run.json",
        lambda text: text.replace(b'"out_of_memory": [\n    0', b'"out_of_memory": [\n    9999999'),
    ),
    "another key of the environment": ("environment.json", lambda text: text.replace(b"{", b'{"zebra": 1,', 1)),
    "packages that are a list": ("environment.json", lambda text: text.replace(b'"packages": {', b'"packages": [{', 1)),
    "half a letter": ("environment.json", lambda text: text.replace(b'"3.11"', b'"\\ud800"')),
    "a setting that the schema lacks": ("config.yaml", lambda text: text + b"zebra:\n  zebra: 1\n"),
    "aliases of aliases": ("config.yaml", lambda _: b"cv: &a {}\ndora:\n  <<: [*a, *a]\n"),
    "a long text": ("run.json", lambda text: json_changed(text, lambda run: run["warnings"].append(":/a:" * 2**17))),
    "a long id of a criterion": ("predictions.csv", first_row("criterion_id", ":/a:" * 2**14)),
    "a password": ("config.yaml", lambda text: text.replace(b"a local folder", b"http://zebra:zebra@host")),
    "settings in settings": ("config.yaml", lambda text: text.replace(b"r: 8", b"r: {zebra: 1}")),
    "a file that is gone": ("config.yaml", None),
    "statistics that are not JSON": ("evaluation.json", lambda _: b"zebra"),
    "a page that is not UTF-8": ("report.html", lambda _: b"\xffzebra"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named_and_not_quoted(bundle, tmp_path, case):
    name, change = DAMAGED[case]
    path = rewritten(bundle, tmp_path / "review.zip", **{name: change})
    assert read_bundle(path).get(name) != read_bundle(bundle).get(name), "the test changed nothing"
    with refuses("input-file", "ask the authors for the bundle again") as caught:
        check_bundle(path, Console(file=io.StringIO()))
    assert caught.value.exit_code == 2
    assert "zebra" not in str(caught.value)


class Planted:
    """An object whose pickle makes the file `path` when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_bundle_runs_no_code_of_its_sender(bundle, tmp_path):
    content = io.BytesIO()
    np.save(content, np.array([Planted(tmp_path / "planted")], dtype=object), allow_pickle=True)
    path = rewritten(bundle, tmp_path / "review.zip", **{"epoch_scores/fold_1.npy": lambda _: content.getvalue()})
    with refuses("input-file", "ask the authors for the bundle again"):
        check_bundle(path, Console(file=io.StringIO()))
    assert not (tmp_path / "planted").exists()


@pytest.mark.long
def test_the_last_digit_of_a_number_may_be_rounded_in_another_way(bundle, tmp_path):
    def rounded(content):
        return first_number(content, lambda value: value + 1e-11)

    path = rewritten(bundle, tmp_path / "review.zip", **{"evaluation.json": rounded})
    assert read_bundle(path)["evaluation.json"] != read_bundle(bundle)["evaluation.json"]
    check_bundle(path, Console(file=io.StringIO()))


@pytest.mark.long
def test_a_long_list_of_differences_is_cut_quotes_no_word_and_names_the_versions(bundle, tmp_path):
    def other_words(value):
        if isinstance(value, dict):
            return {key: other_words(one) for key, one in value.items()}
        return [other_words(one) for one in value] if isinstance(value, list) else "zebra"

    path = rewritten(
        bundle,
        tmp_path / "review.zip",
        **{
            "run.json": lambda text: json_changed(text, lambda run: run["versions"].update(scipy="1.0")),
            "evaluation.json": lambda text: json.dumps(other_words(json.loads(text)), indent=2).encode() + b"\n",
        },
    )
    with refuses("bundle-differs", "scipy 1.0 then, ", error=NotShownError) as caught:
        check_bundle(path, Console(file=io.StringIO()))
    said = str(caught.value)
    assert said.count("\n  - ") == 20
    assert re.search(r"\n  \.\.\. and \d+ more", said)
    assert "zebra" not in said


@pytest.mark.parametrize("at", range(20))
def test_a_flipped_byte_is_refused_or_changes_no_file(bundle, tmp_path, at):
    content = bytearray(bundle.read_bytes())
    content[len(content) * at // 20 + 11] ^= 0x55
    path = tmp_path / "review.zip"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        assert read_bundle(path) == read_bundle(bundle)


def test_bytes_that_do_not_unpack_are_named(bundle, tmp_path):
    with zipfile.ZipFile(bundle) as archive:
        entry = archive.getinfo("predictions.csv")
    content = bytearray(bundle.read_bytes())
    at = entry.header_offset + 30 + len(entry.filename)
    content[at : at + 40] = b"\xff" * 40
    path = tmp_path / "review.zip"
    path.write_bytes(content)
    with refuses("input-file", "damaged: predictions.csv (error)"):
        read_bundle(path)


def archived(path, entries, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("entries", "method", "said"),
    [
        ([("run.json", b" " * 2**21)], zipfile.ZIP_DEFLATED, "run.json is larger than 1,048,576 bytes"),
        ([("run.json", b"{}"), ("a/../b", b"")], zipfile.ZIP_DEFLATED, "it holds 'a/../b'"),
        ([("run.json", b"{}"), ("run.json/b", b"")], zipfile.ZIP_DEFLATED, "it holds 'run.json/b'"),
        ([("run.json", b"{}"), ("run.json", b"{}")], zipfile.ZIP_DEFLATED, "it holds a file twice"),
        ([("run.json", b"{}"), ("report.html", b"")], zipfile.ZIP_LZMA, "packed in another way"),
        ([("run.json", b"{}"), ("report.html", b"")], zipfile.ZIP_BZIP2, "packed in another way"),
        ([("run.json", b'{"format": 2}')], zipfile.ZIP_DEFLATED, "its format is '2'"),
        ([("report.md", b"")], zipfile.ZIP_DEFLATED, "lacks run.json"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_cannot_be_a_bundle_is_not_unpacked(tmp_path, entries, method, said):
    path = archived(tmp_path / "review.zip", entries, method)
    with refuses("input-file", f"{path} is not a bundle", said):
        read_bundle(path)


def test_a_bomb_is_refused_by_its_size(tmp_path):
    zeros = bytes(2**26)
    path = archived(tmp_path / "one.zip", [("run.json", b"{}"), ("report.html", zeros + b"0")])
    with refuses("input-file", "report.html is larger than 67,108,864 bytes"):
        read_bundle(path)
    # A size that is a lie: no more than that is unpacked, and its checksum differs.
    content = path.read_bytes()
    path.write_bytes(content.replace((2**26 + 1).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with refuses("input-file", "damaged: report.html (BadZipFile)"):
        read_bundle(path)
    with refuses("input-file", f"{tmp_path} is not a bundle of raycv: it is not a file"):
        read_bundle(tmp_path)


def test_a_bundle_has_a_largest_size_in_all(run, tmp_path, monkeypatch):
    path = tmp_path / "review.zip"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)
    with refuses("input-file", f"{path} is not a bundle of raycv: it is larger than 268,435,456 bytes"):
        read_bundle(path)
    parts = {f"epoch_scores/fold_{fold}.npy": 2**26 for fold in range(4)}
    assert too_large(parts) is None
    assert too_large(parts | {"report.html": 1}) == "its files are larger than 268,435,456 bytes"
    monkeypatch.setattr("raycv.analysis.bundle_files.MOST_OF_A_FILE", 1000)
    with refuses("disk-unwritable", "The bundle cannot be written: ", "is larger than 1,000 bytes"):
        make_page(asked(f"run={run.root}", f"bundle={tmp_path / 'other.zip'}"))
    assert not (tmp_path / "other.zip").exists()


def other_matplotlib(text):
    return json_changed(text, lambda run: run["versions"].update(matplotlib="1.0"))


def test_figures_of_another_matplotlib_are_not_compared_but_draw_only(bundle, tmp_path):
    def shifted(content):
        return content.replace(b"</desc>", b"1</desc>", 1)

    def said(change, *names):
        path = rewritten(
            bundle, tmp_path / "review.zip", **{"run.json": other_matplotlib}, **dict.fromkeys(names, change)
        )
        output = io.StringIO()
        check_bundle(path, Console(file=output, width=200))
        return output.getvalue()

    # The first figure of the page is the one that the page shows first.
    first = re.search(r'<svg[^>]*aria-labelledby="([\w-]+)-title', read_bundle(bundle)["report.html"].decode())[1]
    first = first.replace("-", "_")
    names = ("report.html", f"figures/{first}.svg")
    assert "Figures were not compared: matplotlib 1.0 drew them." in said(shifted, *names)
    with refuses("bundle-differs", "report.html: its figures", error=NotShownError):
        said(shifted, names[1])
    for hostile in (
        b"<script>1</script></svg>",
        b"<foreignObject/></svg>",
        b"<?zebra 1?></svg>",
        b'<g ONLOAD="1"/></svg>',
        b'<g onload="1"/></svg>',
        b'<use href="http://host/a.svg#a"/></svg>',
        b'<g style="fill: url(http://host)"/></svg>',
        b"<!-- --></svg>",
    ):
        with refuses("bundle-differs", f"{first}.svg: it holds more", error=NotShownError):
            said(lambda content, hostile=hostile: content.replace(b"</svg>", hostile, 1), *names)


@pytest.mark.parametrize(
    ("name", "revision", "kept"),
    [
        ("/home/alice/llama", None, "a local folder"),
        ("alice/llama", None, "a local folder"),
        ("llama", None, "a local folder"),
        ("C:\\Users\\alice\\llama", None, "a local folder"),
        ("file:///home/alice/llama", None, "a local folder"),
        ("raycv://models/tiny_llama", None, "raycv://models/tiny_llama"),
        ("meta-llama/Llama-3.1-8B", "0e9e39f", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_only_a_name_of_the_hub_stays(run, tmp_path, name, revision, kept):
    folder = RunFolder(tmp_path / "mine")
    shutil.copytree(run.root, folder.root)
    config = yaml.safe_load(folder.config.read_text())
    config["model"] = {"name": name, "target_modules": ["token=alices"]}
    config["cv"]["note"] = config["note"] = {"by": "alice"}
    folder.config.write_text(yaml.safe_dump(config))
    environment = read_json(folder.environment)
    write_json(
        folder.environment,
        environment | {"platform": "token=alices", "base_model": {"name": name, "revision": revision}},
    )
    files = inputs_text(*inputs_of(folder))
    assert yaml.safe_load(files["config.yaml"])["model"] == {"name": kept, "target_modules": ["token=***"]}
    assert not [name for name, content in files.items() if b"alice" in content]


def test_a_run_without_scores_of_epochs_keeps_their_f1(tmp_path):
    folder = folder_of(replace(simulated(posts=20), run="plain"), tmp_path)
    for fold in range(5):
        file = folder.fold(fold).result
        epoch = {"epoch": 1, "f1": 0.5, "roc_auc": 0.6, "seconds": 3.0, "train_loss": 0.1}
        write_json(file, read_json(file) | {"history": [epoch, epoch]})
    path = tmp_path / "review.zip"
    make_page(asked(f"run={folder.root}", f"bundle={path}"))
    assert json.loads(read_bundle(path)["run.json"])["history"] == [[{"f1": 0.5, "roc_auc": 0.6}] * 2] * 5
    make_page(asked(f"check={path}"))


def test_impossible_keys_are_refused(tmp_path):
    with refuses("input-file", f"{tmp_path / 'none.zip'} cannot be read", "No such file"):
        make_page(asked(f"check={tmp_path / 'none.zip'}"))
    with refuses("disk-unwritable", f"bundle={tmp_path / 'none' / 'a.zip'}: ", f"{tmp_path / 'none'} does not exist"):
        make_page(asked(f"bundle={tmp_path / 'none' / 'a.zip'}"))
    with refuses("config-value", "check: ", "bundle=", "received 'a.zip'", error=FaultsError):
        asked("check=a.zip", "bundle=b.zip")
