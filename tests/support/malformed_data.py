"""Data sets with every kind of fault, and what raycv must say of each."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from raycv.common.text_files import FIELD_LIMIT
from raycv.data.dataset import load_dataset
from raycv.errors import FaultsError

CANARY = "zebra under moonlight"
"""In every text of every set made here; no message and no statistic may hold it."""


CRITERIA = {f"A.{n}": f"criterion number {n}, {CANARY}" for n in range(1, 10)}


POSTS = {"p1": f"Grey days, {CANARY}", "p2": f'He said "fine"\n{CANARY}', "p3": f"No sleep, {CANARY}"}


MATCHED = {("p1", "A.1"), ("p1", "A.7"), ("p3", "A.4")}


ANNOTATIONS = [
    ("p1", "s1", "DEPRESSED_MOOD", "1"),
    ("p1", "s2", "DEPRESSED_MOOD", "0"),
    ("p1", "s3", "DEPRESSED_MOOD", "1"),
    ("p1", "s3", "WORTHLESSNESS", "1"),
    ("p2", "s1", "ANHEDONIA", "0"),
    ("p2", "s2", "SPECIAL_CASE", "1"),
    ("p3", "s1", "LEEP_ISSUES", "1"),
    ("p3", "s2", "SLEEP_ISSUES", "0"),
    ("p3", "s3", "FATIGUE", "0"),
]


Files = dict[str, bytes]


def table(header: str, rows: list[tuple[str, ...]], **dialect: str) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, **{"lineterminator": "\n", **dialect}).writerows([header.split(","), *rows])
    return text.getvalue().encode("utf-8")


def specification(posts: dict[str, str] = POSTS) -> Files:
    grid = [(p, c, "yes" if (p, c) in MATCHED else "no") for p in posts for c in CRITERIA]
    return {
        "posts.csv": table("post_id,post", list(posts.items())),
        "groundtruth.csv": table("post_id,criterion_id,label", grid),
        "criteria.csv": table("criterion_id,criterion", list(CRITERIA.items())),
    }


def official(posts: dict[str, str] = POSTS, annotations: list[tuple[str, str, str, str]] = ANNOTATIONS) -> Files:
    rows = [(p, s, f"{CANARY}, said", name, status, f"{CANARY}, so") for p, s, name, status in annotations]
    header = "post_id,sentence_id,sentence_text,DSM5_symptom,status,explanation"
    return {
        "redsm5_posts.csv": table("post_id,text", list(posts.items())),
        "redsm5_annotations.csv": table(header, rows),
        "criteria.json": criteria_json(CRITERIA),
    }


def criteria_json(criteria: dict[str, str]) -> bytes:
    entries = [{"id": key, "text": text} for key, text in criteria.items()]
    return json.dumps({"diagnosis": "invented", "criteria": entries}).encode()


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def refusal(folder: Path, criteria_dir: Path | None = None, **options: str) -> str:
    with pytest.raises(FaultsError) as caught:
        load_dataset(folder, criteria_dir or folder, **options)
    message = str(caught.value)
    assert "What to do" in message
    assert CANARY not in message
    for word in (*CANARY.split(), "criterion number", "Grey"):
        assert word not in message
    return message


Edit = Callable[[Files], None]


def replaced(name: str, old: bytes, new: bytes) -> Edit:
    def edit(files: Files) -> None:
        assert old in files[name], (name, old)
        files[name] = files[name].replace(old, new, 1)

    return edit


def added(name: str, more: bytes) -> Edit:
    return lambda files: files.update({name: files.get(name, b"") + more})


def removed(name: str) -> Edit:
    return lambda files: files.pop(name) and None


TEXT = CANARY.encode()


P, G, C, A = "posts.csv", "groundtruth.csv", "criteria.csv", "redsm5_annotations.csv"


ONE_POST = b'p1,"Grey days, ' + TEXT + b'"'


def instead(old: str, new: str, content: bytes) -> Edit:
    return lambda files: (files.pop(old), files.update({new: content}))[1]


def with_ids(posts: tuple[str, str, str], labels: tuple[str, str, str]) -> Edit:
    """The ids p1 to p3, in the posts and in the groundtruth."""

    def edit(files: Files) -> None:
        for name, ids in ((P, posts), (G, labels)):
            for old, new in zip(POSTS, ids, strict=True):
                files[name] = files[name].replace(f"\n{old},".encode(), f"\n{new},".encode())

    return edit


LONG_IDS = ("123456789012345678", "123456789012345999", "123456789012777777")
ROUNDED_IDS = ("1.23457E+17",) * 3
KEPT_IDS = ("123456789012345000", "123456789012345000", "123456789012777000")
AS_TEXT = "pandas.read_csv(..., dtype=str)"
MALFORMED: dict[str, tuple[Edit, list[str]]] = {
    "ids that a spreadsheet rounded in all files": (
        with_ids(ROUNDED_IDS, ROUNDED_IDS),
        [
            "data-id",
            "posts.csv, line 3: post_id '1.23457E+17' is already on line 2; a spreadsheet rounded it",
            "18 ids that a spreadsheet rounded",
            AS_TEXT,
        ],
    ),
    "ids that a spreadsheet rounded in the labels": (
        with_ids(LONG_IDS, ROUNDED_IDS),
        [
            "data-id",
            ": 1 fault",
            "groundtruth.csv: 19 ids that a spreadsheet rounded",
            "line 11: post '1.23457E+17' x criterion 'A.1'",
            AS_TEXT,
        ],
    ),
    "an id that a spreadsheet rounded in the posts": (
        with_ids(("1.23457E+17", "p2", "p3"), (LONG_IDS[0], "p2", "p3")),
        [
            "data-id",
            ": 1 fault",
            "groundtruth.csv, line 2: post_id '123456789012345678' (9 rows) is not in posts.csv, which has "
            "'1.23457E+17'; a spreadsheet rounded it",
            AS_TEXT,
        ],
    ),
    "ids of which a spreadsheet kept 15 digits": (
        with_ids(KEPT_IDS, LONG_IDS),
        [
            "data-id",
            "posts.csv, line 3: post_id '123456789012345000' is already on line 2; a spreadsheet rounded it",
            AS_TEXT,
        ],
    ),
    "ids that became numbers with a point": (
        with_ids(("1", "2", "3"), ("1.0", "2.0", "3.0")),
        [
            "data-id",
            ": 3 faults",
            "groundtruth.csv, line 2: post_id '1.0' (9 rows) is not in posts.csv, which has '1'",
            AS_TEXT,
        ],
    ),
    "ids that lost their zeros": (
        with_ids(("007", "008", "009"), ("7", "8", "9")),
        [
            "data-id",
            ": 3 faults",
            "groundtruth.csv, line 11: post_id '8' (9 rows) is not in posts.csv, which has '008'",
            "spell each id alike in all files",
        ],
    ),
    "a line for Excel": (
        lambda files: files.update({P: b"sep=;\n" + files[P].replace(b",", b";")}),
        ["data-format", "posts.csv, line 1:", "the line `sep=`", "remove a line `sep=`", "write them with commas"],
    ),
    "an old Excel workbook under .csv": (
        lambda files: files.update({G: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99)}),
        ["data-format", "groundtruth.csv, line 1: ", "an Excel workbook of the old kind", "Save As", "to_csv"],
    ),
    "an Excel workbook": (
        instead(P, "posts.xlsx", b"PK\x03\x04"),
        ["data-format", "posts.xlsx: an Excel workbook", "Save As", "to_csv"],
    ),
    "a Parquet file": (
        instead(G, "groundtruth.parquet", b"PAR1"),
        ["data-format", "groundtruth.parquet: a Parquet file", "to_csv"],
    ),
    "JSON of columns": (
        instead(P, "posts.json", b'{"post_id": {"0": "p1"}}'),
        ["data-format", "posts.json: ", "to_json(orient='records')"],
    ),
    "a JSON table with a column twice": (
        instead(P, "posts.json", b'[{"post_id": "p1", "post": "x", "Post": "y"}]'),
        ["data-format, data-id", "posts.json, entry 1: the column 'post' occurs 2 times", "keep one column"],
    ),
    "a JSON post that is a list": (
        instead(P, "posts.json", b'[{"post_id": "p1", "post": "x"}, {"post_id": "p2", "post": []}]'),
        ["data-format, data-id", "posts.json, entry 2: 'post' "],
    ),
    "posts missing": (
        removed(P),
        [
            "data-file",
            "no table `posts` with the columns `post_id`, `post` (or `text`)",
            "groundtruth.csv (columns:",
            "irlab-udc/redsm5",
        ],
    ),
    "groundtruth missing": (
        removed(G),
        [
            "data-file",
            "no table `groundtruth`",
            "or `annotations`",
            "`DSM5_symptom`",
            "found: criteria.csv",
            "experiment=quickstart",
        ],
    ),
    "criteria missing": (removed(C), ["data-file", "no table `criteria`", "criterion_id", "data.criteria_dir"]),
    "column of posts misnamed": (
        replaced(P, b"post_id,post", b"id,post"),
        ["data-format", "posts.csv, line 1: `post_id` missing", "columns: 'id', 'post'"],
    ),
    "text column of posts misnamed": (
        replaced(P, b"post_id,post", b"post_id,body"),
        ["data-format", "posts.csv, line 1: `post` (or `text`) missing", "'body'"],
    ),
    "no label column": (
        replaced(G, b",label", b",answer"),
        ["data-format", "groundtruth.csv, line 1: `label` missing (groundtruth table)", "'answer'"],
    ),
    "criteria column misnamed": (
        replaced(C, b",criterion\n", b",description\n"),
        ["data-format", "criteria.csv, line 1: `criterion` (or `text`) missing", "'description'"],
    ),
    "no header": (
        replaced(P, b"post_id,post\n", b""),
        ["data-format", "posts.csv, line 1: `post_id`, `post` (or `text`) missing", "2 columns, no known name"],
    ),
    "empty file": (
        lambda files: files.update({P: b""}),
        ["data-format", "posts.csv, line 1:", "no columns"],
    ),
    "semicolons": (
        lambda files: files.update({G: files[G].replace(b",", b";")}),
        ["data-format", "groundtruth.csv, line 1:", "'post_id;criterion_id;label'", "separated by semicolons"],
    ),
    "duplicate post": (
        added(P, b"p1,again\n"),
        ["data-id", "posts.csv, line 6: post_id 'p1' is already on line 2"],
    ),
    "duplicate criterion": (
        added(C, b"A.3,again\n"),
        ["data-id", "criteria.csv, line 11: criterion_id 'A.3' is already on line 4"],
    ),
    "duplicate criterion in another spelling": (
        added(C, b"APPETITE_CHANGE,again\n"),
        ["data-id", "criteria.csv, line 11: criterion_id 'APPETITE_CHANGE' is already on line 4, written 'A.3'"],
    ),
    "duplicate pair": (
        added(G, b"p2,A.2,no\n"),
        ["data-id", "groundtruth.csv, line 29: post 'p2' x criterion 'A.2' is already on line 12"],
    ),
    "duplicate pair in another spelling": (
        added(G, b"p2,anhedonia,yes\n"),
        ["data-id", "groundtruth.csv, line 29: post 'p2' x criterion 'A.2' is already on line 12"],
    ),
    "label of an unknown post": (
        added(G, b"p77,A.1,no\np77,A.2,no\n"),
        ["data-id", "groundtruth.csv, line 29: post_id 'p77' (2 rows) is not in posts.csv"],
    ),
    "label of an unknown criterion": (
        added(G, b"p1,B.1,no\n"),
        ["data-id", "groundtruth.csv, line 29: criterion 'B.1' is not in criteria.csv"],
    ),
    "post without pairs": (
        added(P, b"p4,lonely " + TEXT + b"\n"),
        ["data-id", "posts.csv, line 6: post_id 'p4' has no row in groundtruth.csv"],
    ),
    "criterion without pairs": (
        added(C, b"B.1,lonely\n"),
        ["data-id", "criteria.csv, line 11: criterion_id 'B.1' has no row in groundtruth.csv", "data.criteria_dir"],
    ),
    "missing pair": (
        replaced(G, b"p2,A.5,no\n", b""),
        ["data-id", "groundtruth.csv: post 'p2' x criterion 'A.5' has no row"],
    ),
    "unknown label": (
        replaced(G, b"p2,A.5,no", b"p2,A.5,maybe"),
        ["data-label", "groundtruth.csv, line 15: label 'maybe' "],
    ),
    "number that is no label": (
        replaced(G, b"p2,A.5,no", b"p2,A.5,2"),
        ["data-label", "groundtruth.csv, line 15: label '2' "],
    ),
    "empty label": (
        replaced(G, b"p2,A.5,no", b"p2,A.5,"),
        ["data-label", "groundtruth.csv, line 15: label is empty"],
    ),
    "label that is missing to pandas": (
        replaced(G, b"p2,A.5,no", b"p2,A.5,NaN"),
        ["data-label", "groundtruth.csv, line 15: label is empty: it holds NaN", "data.missing"],
    ),
    "label of invisible characters": (
        replaced(G, b"p2,A.5,no", "p2,A.5,\u2800".encode()),
        ["data-label", "groundtruth.csv, line 15: label is empty"],
    ),
    "text in the label column": (
        replaced(G, b"p2,A.5,no", b"p2,A.5," + TEXT),
        ["data-label", "groundtruth.csv, line 15: label a value of 21 characters "],
    ),
    "empty post id": (
        added(P, b" ,words " + TEXT + b"\n"),
        ["data-id", "posts.csv, line 6: post_id is empty"],
    ),
    "text as post id": (
        added(P, b'"' + TEXT * 9 + b'",p4\n'),
        ["data-id", "posts.csv, line 6: post_id has 189 characters"],
    ),
    "line break in an id": (
        added(P, b'"p\n4",words\n'),
        ["data-id", "posts.csv, line 6: post_id holds a line break"],
    ),
    "path separator in a criterion id": (
        lambda files: files.update({n: files[n].replace(b"A.9,", b"A/9,") for n in (G, C)}),
        ["data-id", "criteria.csv, line 10: criterion_id 'A/9' ", "no / or \\"],
    ),
    "criterion id that climbs": (
        lambda files: files.update({n: files[n].replace(b"A.9,", b"..,") for n in (G, C)}),
        ["data-id", "criteria.csv, line 10: criterion_id '..' ", "no / or \\"],
    ),
    "too many fields": (
        replaced(P, ONE_POST, b"p1,Grey days, " + TEXT),
        ["data-format", "posts.csv, line 2: 3 fields instead of 2"],
    ),
    "too few fields": (
        replaced(G, b"p1,A.3,no", b"p1,A.3"),
        ["data-format", "groundtruth.csv, line 4: 2 fields instead of 3"],
    ),
    "stray line": (
        added(G, b"p99\n"),
        ["data-format", "groundtruth.csv, line 29: 1 field instead of 3"],
    ),
    "unclosed quote in the groundtruth": (
        replaced(G, b"p2,A.1,no", b'p2,"A.1,no'),
        ["data-format", "groundtruth.csv, line 11: a quote is opened"],
    ),
    "unclosed quote": (
        added(P, b'p4,"never closed ' + TEXT + b"\n"),
        ["data-format", "posts.csv, line 6: a quote is opened"],
    ),
    "text after a quote": (
        added(P, b'p4,"closed" early ' + TEXT + b"\n"),
        ["data-format", "posts.csv, line 6: a quoted field continues"],
    ),
    "Latin-1": (
        replaced(P, b"Grey", "caf\u00e9".encode("latin-1")),
        ["data-format", "posts.csv, line 2: the byte 0xe9"],
    ),
    "UTF-16": (
        lambda files: files.update({P: files[P].decode().encode("utf-16")}),
        ["data-format", "posts.csv, line 1: ", "UTF-16"],
    ),
    "Excel workbook": (
        lambda files: files.update({G: b"PK\x03\x04" + bytes(range(256))}),
        ["data-format", "groundtruth.csv, line 1: ", "Excel workbook"],
    ),
    "NUL": (
        replaced(P, b"Grey", b"Gr\0ey"),
        ["data-format", "posts.csv, line 2: a NUL character"],
    ),
    "duplicate column": (
        lambda files: files.update({P: table("post_id,post,Post", [(p, t, t) for p, t in POSTS.items()])}),
        ["data-format", "posts.csv, line 1: the column 'post' occurs 2 times"],
    ),
    "two text columns": (
        lambda files: files.update({P: table("post_id,post,text", [(p, t, t) for p, t in POSTS.items()])}),
        ["data-file", "posts.csv, line 1: both post and text"],
    ),
    "over-long field": (
        added(P, b"p4," + b"x" * (FIELD_LIMIT + 1) + b"\n"),
        ["data-format", "posts.csv, line 6: ", "1,000,000 characters"],
    ),
    "two posts tables": (
        lambda files: files.update({"redsm5_posts.csv": files[P].replace(b"post_id,post", b"post_id,text")}),
        ["data-file", "2 files look like posts: posts.csv (columns: 'post_id', 'post'), redsm5_posts.csv"],
    ),
    "two criteria tables": (
        lambda files: files.update({"criteria.json": criteria_json(CRITERIA)}),
        ["data-file", "2 files look like criteria: criteria.csv", "criteria.json"],
    ),
    "groundtruth and annotations": (
        lambda files: files.update({A: official()[A]}),
        ["data-file", "2 files look like groundtruth or annotations: groundtruth.csv", A],
    ),
    "one class": (
        lambda files: files.update({G: files[G].replace(b"yes", b"no")}),
        ["data-split", "groundtruth.csv: all 27 pairs have the label no (0)"],
    ),
    "one class, the other": (
        lambda files: files.update({G: files[G].replace(b",no", b",yes")}),
        ["data-split", "groundtruth.csv: all 27 pairs have the label yes (1)"],
    ),
    "headers only": (
        lambda files: files.update({n: files[n].split(b"\n")[0] + b"\n" for n in (P, G)}),
        [
            "data-id, data-split",
            "groundtruth.csv: ",
            "0 posts x 9 criteria",
            "criteria.csv, line 2: criterion_id 'A.1' has no row",
        ],
    ),
    "posts without a row": (
        lambda files: files.update({P: b"post_id,post\n"}),
        [
            "data-id, data-split",
            ": 4 faults",
            "groundtruth.csv, line 2: post_id 'p1' (9 rows) is not in posts.csv",
            "0 posts x 9 criteria",
        ],
    ),
    "all posts empty": (
        lambda files: files.update({P: b"post_id,post\np1,\np2, \np3,\n"}),
        ["data-split", "groundtruth.csv: ", "0 posts x 9 criteria"],
    ),
}


J = "criteria.json"


MALFORMED_RELEASE: dict[str, tuple[Edit, list[str]]] = {
    "unknown symptom": (
        replaced(A, b"ANHEDONIA", b"ANHEDONIC"),
        ["data-label", f"{A}, line 6: DSM5_symptom 'ANHEDONIC' "],
    ),
    "text as symptom": (
        replaced(A, b"ANHEDONIA", TEXT),
        ["data-label", f"{A}, line 6: DSM5_symptom a value of 21 characters "],
    ),
    "empty symptom": (
        replaced(A, b"ANHEDONIA", b""),
        ["data-label", f"{A}, line 6: DSM5_symptom (empty) "],
    ),
    "empty status": (
        replaced(A, b"SLEEP_ISSUES,0", b"SLEEP_ISSUES,"),
        ["data-label", f"{A}, line 9: status is empty"],
    ),
    "unknown status": (
        replaced(A, b"SLEEP_ISSUES,0", b"SLEEP_ISSUES,-1"),
        ["data-label", f"{A}, line 9: status '-1'"],
    ),
    "annotation of an unknown post": (
        replaced(A, b"p2,s1", b"p22,s1"),
        ["data-id", f"{A}, line 6: post_id 'p22' is not in redsm5_posts.csv"],
    ),
    "status column missing": (
        replaced(A, b",status,", b",state,"),
        ["data-format", f"{A}, line 1: `status` missing (annotations table)", "'state'"],
    ),
    "annotation with too many fields": (
        replaced(A, b'"' + TEXT + b', said"', TEXT + b", said"),
        ["data-format", f"{A}, line 2: 7 fields instead of 6"],
    ),
    "no evidence at all": (
        lambda files: files.update({A: official(annotations=[("p1", "s1", "FATIGUE", "0")])[A]}),
        ["data-split", f"{A}: all 27 pairs have the label no (0)"],
    ),
    "criterion that an annotation needs": (
        lambda files: files.update({J: criteria_json({c: t for c, t in CRITERIA.items() if c != "A.4"})}),
        ["data-id", f"{A}, line 8: criterion 'A.4' (2 rows) is not in criteria.json"],
    ),
    "criterion without a symptom": (
        lambda files: files.update({J: criteria_json({**CRITERIA, "B.1": "other"})}),
        ["data-id", f"{J}, entry 10: criterion_id 'B.1' is not one of A.1 to A.9", "data.criteria_dir"],
    ),
    "broken JSON": (
        replaced(J, b'{"id": "A.2"', b'{"id" "A.2"'),
        ["data-format", f"{J}, line 1: not JSON: Expecting ':' delimiter", 'give the criteria as {"criteria"'],
    ),
    "JSON of another shape": (
        lambda files: files.update({J: b'{"A.1": "' + TEXT + b'"}'}),
        ["data-format", f"{J}: holds no list of criteria", 'give the criteria as {"criteria"'],
    ),
    "JSON entry without text": (
        lambda files: files.update({J: files[J].replace(b'"text"', b'"wording"', 1)}),
        ["data-format", f"{J}, entry 1: needs `id` and `text`", 'give the criteria as {"criteria"'],
    ),
    "JSON entry that is a list": (
        lambda files: files.update({J: files[J].replace(b'{"id"', b'["' + TEXT + b'"], {"id"', 1)}),
        ["data-format", ": 1 fault", f"{J}, entry 1: needs `id` and `text`", 'give the criteria as {"criteria"'],
    ),
    "JSON escape that is not a character": (
        lambda files: files.update({J: files[J].replace(b"number 2", b"\\ud83d", 1)}),
        ["data-format", f"{J}, entry 2: an escape"],
    ),
    "JSON nested without end": (
        lambda files: files.update({J: b"[" * 100_000}),
        ["data-format", f"{J}: JSON", 'give the criteria as {"criteria"'],
    ),
    "duplicate JSON id": (
        lambda files: files.update({J: files[J].replace(b"A.2", b"A1", 1)}),
        ["data-id", f"{J}, entry 2: criterion_id 'A1' is already on entry 1, written 'A.1'"],
    ),
}
