"""The loader: both layouts; each fault with place, value and remedy; never a word of a post. All texts are invented."""

import csv
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.malformed_data import (
    ANNOTATIONS,
    CANARY,
    CRITERIA,
    MALFORMED,
    MALFORMED_RELEASE,
    MATCHED,
    ONE_POST,
    POSTS,
    A,
    C,
    Files,
    G,
    J,
    P,
    added,
    criteria_json,
    official,
    refusal,
    replaced,
    specification,
    table,
    write,
)
from support.refusals import refuses, said_refusal

from raycv.common.table_reader import IGNORABLE, MISSING, is_blank, is_missing, read_columns
from raycv.common.text_files import FIELD_LIMIT
from raycv.data.dataset import (
    EXPECTED_COUNTS,
    EXPECTED_IN_RELEASE,
    criteria_hash,
    load_criteria,
    load_dataset,
    size_warning,
)
from raycv.data.types import SYMPTOMS, Dataset, Pair, criterion_code

ROOT = Path(__file__).parent.parent
SAMPLE_HASHES = {"data_hash": "88a295bf110007c5", "criteria_hash": "2d7308a2f991d163"}
"""As the runs of every version have recorded them."""


def load(folder: Path, files: Files, **options: str) -> Dataset:
    write(folder, files)
    return load_dataset(folder, folder, **options)


# --- What is accepted ------------------------------------------------------------------------------------------------


def test_symptom_names_are_those_of_the_file_where_they_are_names(tmp_path: Path) -> None:
    rows = [
        "A.1,low,MY_MOOD",
        "A.2,joy,TWICE",
        "A.3,food,twice as much",
        "A.4,bed,A.1",
        "x,a,TWICE",
        "y,b,y_name",
        "z,c,",
    ]
    (tmp_path / "criteria.csv").write_text("\n".join(["criterion_id,criterion,symptom", *rows]) + "\n")
    found = {key: criterion.symptom for key, criterion in load_criteria(tmp_path).items()}
    unnamed = dict.fromkeys(["A.2", "A.3", "A.4", "x", "z"])
    assert found == {"A.1": "MY_MOOD", "y": "y_name", **unnamed}


def test_the_nine_have_the_releases_names_where_the_file_has_none(tmp_path: Path) -> None:
    rows = [f"A{number},words {number}," for number in range(2, 10)]
    (tmp_path / "criteria.csv").write_text(
        "\n".join(["criterion_id,criterion,symptom", "a.1,low,MY_MOOD", *rows]) + "\n"
    )
    found = {key: criterion.symptom for key, criterion in load_criteria(tmp_path).items()}
    assert found == {"a.1": "MY_MOOD"} | {
        code.replace(".", ""): name for name, code in SYMPTOMS.items() if code != "A.1"
    }


def test_the_specifications_tables_in_one_folder(tmp_path: Path) -> None:
    data = load(tmp_path, specification())
    assert data.posts == POSTS
    assert {key: criterion.text for key, criterion in data.criteria.items()} == CRITERIA
    assert [(pair.post_id, pair.criterion_id) for pair in data.pairs] == [(p, c) for p in POSTS for c in CRITERIA]
    assert {(pair.post_id, pair.criterion_id) for pair in data.pairs if pair.label == 1} == MATCHED
    assert data.criteria["A.4"].symptom == "SLEEP_ISSUES"
    assert data.stats["layout"] == "specification"


def test_the_official_release_derivation_by_hand(tmp_path: Path) -> None:
    data = load(tmp_path, official())
    pairs = {(pair.post_id, pair.criterion_id): pair for pair in data.pairs}
    assert len(pairs) == 27
    assert pairs["p1", "A.1"] == Pair("p1", "A.1", 1, 2, False)
    assert pairs["p1", "A.7"] == Pair("p1", "A.7", 1, 1, False)
    assert pairs["p2", "A.2"] == Pair("p2", "A.2", 0, 0, True)
    assert pairs["p3", "A.4"] == Pair("p3", "A.4", 1, 1, False)
    assert pairs["p3", "A.6"] == Pair("p3", "A.6", 0, 0, True)
    assert sum(pair.label for pair in pairs.values()) == 3
    assert sum(pair.explicit_negative for pair in pairs.values()) == data.stats["hard_negatives"] == 2
    assert data.stats["annotations"] == {
        "rows": 9,
        "special_case": 1,
        "aliased": 1,
        "repeated": 0,
        "contradictory": 0,
    }


@pytest.fixture(scope="module")
def full_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As large as ReDSM5: 1484 posts of about 295 words, some 3,000 annotations; in two folders."""
    root = tmp_path_factory.mktemp("full")
    rng = random.Random(7)
    words = ["grey", "tired", "again", "alone", "coffee", "it's", "the", "my", "day,", '"fine"', "…", "疲れ"]
    posts = {f"post_{n}": " ".join(rng.choices(words, k=rng.randint(2, 588))) for n in range(1484)}
    names = [*SYMPTOMS, "LEEP_ISSUES", "SPECIAL_CASE", " sleep_issues "]
    drawn = {(rng.choice(list(posts)), f"s{rng.randint(0, 30)}", rng.choice(names)) for _ in range(3000)}
    files = official(posts, [(*key, str(int(rng.random() < 0.6))) for key in sorted(drawn)])
    write(root / "DSM5", {"MDD_Criteira.json": files.pop("criteria.json")})
    return write(root / "redsm5", files).parent


def test_the_official_derivation_agrees_with_pandas(full_release: Path) -> None:
    data = load_dataset(full_release / "redsm5", full_release / "dsm5")

    rows = pd.read_csv(full_release / "redsm5" / "redsm5_annotations.csv", keep_default_na=False)
    rows["name"] = rows["DSM5_symptom"].str.strip().str.upper().replace({"LEEP_ISSUES": "SLEEP_ISSUES"})
    rows = rows[rows["name"] != "SPECIAL_CASE"]
    rows["criterion_id"] = rows["name"].map(SYMPTOMS)
    by_sentence = rows.groupby(["post_id", "criterion_id", "sentence_id"])["status"].max()
    by_pair = by_sentence.groupby(["post_id", "criterion_id"]).agg(["max", "sum"])
    posts = pd.read_csv(full_release / "redsm5" / "redsm5_posts.csv")["post_id"]
    grid = pd.MultiIndex.from_product([sorted(posts), list(CRITERIA)], names=["post_id", "criterion_id"])
    expected = by_pair.reindex(grid)

    assert [(pair.post_id, pair.criterion_id) for pair in data.pairs] == list(grid)
    assert [pair.label for pair in data.pairs] == expected["max"].fillna(0).astype(int).tolist()
    assert [pair.n_evidence for pair in data.pairs] == expected["sum"].fillna(0).astype(int).tolist()
    assert [pair.explicit_negative for pair in data.pairs] == (expected["max"] == 0).tolist()
    assert data.stats["positives"] == expected["max"].sum()
    assert data.stats["posts_without_positive"] == (expected["max"].fillna(0).groupby("post_id").max() == 0).sum()


def test_the_full_size_loads_the_same_each_time(full_release: Path) -> None:
    first = load_dataset(full_release / "redsm5", full_release / "dsm5")
    again = load_dataset(full_release / "redsm5", full_release / "DSM5")
    assert first == again
    assert {name: first.stats[name] for name in EXPECTED_COUNTS} == EXPECTED_COUNTS
    assert first.stats["files"]["criteria"]["name"] == "MDD_Criteira.json"


@pytest.mark.parametrize("given", ["dsm5", "DSM5", "DSM-5", "Dsm5"])
def test_criteria_folder_is_found_in_another_spelling(tmp_path: Path, given: str) -> None:
    files = specification()
    write(tmp_path / "DSM5", {"criteria.csv": files.pop("criteria.csv")})
    write(tmp_path / "redsm5", files)
    assert len(load_dataset(tmp_path / "redsm5", tmp_path / given).criteria) == 9


def test_strings_and_names_do_not_matter_only_columns_do(tmp_path: Path) -> None:
    files = specification()
    renamed = {
        "first.csv": files["posts.csv"],
        "Second.CSV": files["groundtruth.csv"],
        "third.csv": files["criteria.csv"],
        "notes.csv": b"author,date\nme,today\n",
        "settings.json": b'{"seed": 1}',
        "folds.json": b'[{"fold": 0, "id": 3}]',
        ".hidden.csv": files["posts.csv"],
        "README.md": b"hello",
    }
    write(tmp_path, renamed)
    assert load_dataset(str(tmp_path), str(tmp_path)).posts == POSTS  # type: ignore[arg-type]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("column", ["post", "text", " Text "])
def test_bom_line_ends_and_both_names_of_the_text_column(tmp_path: Path, bom: bytes, end: str, column: str) -> None:
    posts = {
        "p1": "two\nlines, a comma",
        "p2": 'a "quote"\r\nand CRLF',
        "p3": "我今天很累，睡不着。",
        "p4": "أشعر بالتعب اليوم",
        "p5": "🌧️👩‍👩‍👧 all day\u2028long",
        "p6": "नींद नहीं आती",
        "p7": "  spaces stay  ",
    }
    plain = specification(posts)
    files = {name: bom + content for name, content in plain.items()}
    files["posts.csv"] = bom + table(f"post_id,{column}", list(posts.items()), lineterminator=end)
    files["groundtruth.csv"] = bom + plain["groundtruth.csv"].replace(b"\n", end.encode())
    data = load(tmp_path, files)
    assert data.posts == posts
    assert list(data.criteria) == list(CRITERIA)


def test_old_mac_line_ends_quoted_fields_and_an_index_column(tmp_path: Path) -> None:
    files = specification()
    files["posts.csv"] = b',post_id,post\r0,p1,"one\rtwo"\r1,p2,three\r\r2,p3,four\r'
    assert load(tmp_path, files).posts == {"p1": "one\rtwo", "p2": "three", "p3": "four"}


@pytest.mark.parametrize(
    ("yes", "no"), [("yes", "no"), ("Yes", "NO"), ("1", "0"), ("true", "False"), (" TRUE ", "false"), ("1.0", "0.0")]
)
def test_labels_in_every_spelling(tmp_path: Path, yes: str, no: str) -> None:
    files = specification()
    rows = files["groundtruth.csv"].replace(b",yes", f",{yes}".encode()).replace(b",no", f",{no}".encode())
    data = load(tmp_path, {**files, "groundtruth.csv": rows})
    assert {(pair.post_id, pair.criterion_id) for pair in data.pairs if pair.label} == MATCHED


def spelt(style: str, criterion_id: str) -> str:
    symptom = next(name for name, code in SYMPTOMS.items() if code == criterion_id)
    return {
        "A.1": criterion_id,
        "A1": criterion_id.replace(".", ""),
        "a.1": criterion_id.lower(),
        "symptom": symptom,
        "Symptom": symptom.replace("_", " ").title(),
    }[style]


STYLES = ["A.1", "A1", "a.1", "symptom", "Symptom"]


@pytest.mark.parametrize("in_labels", STYLES)
@pytest.mark.parametrize("in_criteria", STYLES)
def test_criterion_ids_are_mapped_to_those_of_the_criteria_file(
    tmp_path: Path, in_labels: str, in_criteria: str
) -> None:
    files = specification()
    grid = [(p, spelt(in_labels, c), "1" if (p, c) in MATCHED else "0") for p in POSTS for c in CRITERIA]
    files["groundtruth.csv"] = table("post_id,criterion_id,label", grid)
    files["criteria.csv"] = table("criterion_id,criterion", [(spelt(in_criteria, c), t) for c, t in CRITERIA.items()])
    data = load(tmp_path / "own", files)
    assert set(data.criteria) == {spelt(in_criteria, c) for c in CRITERIA}
    matched = {(pair.post_id, pair.criterion_id) for pair in data.pairs if pair.label}
    assert matched == {(p, spelt(in_criteria, c)) for p, c in MATCHED}
    release = {**official(), "criteria.json": criteria_json({spelt(in_criteria, c): t for c, t in CRITERIA.items()})}
    assert {(p.post_id, p.criterion_id) for p in load(tmp_path / "release", release).pairs if p.label} == matched


def test_criterion_codes() -> None:
    assert [criterion_code(name) for name in ("A.1", "a9", "A_3", "leep issues", " Fatigue ")] == [
        "A.1",
        "A.9",
        "A.3",
        "A.4",
        "A.6",
    ]
    assert [criterion_code(name) for name in ("A.10", "A.0", "B.1", "SPECIAL_CASE", "", "A.1x")] == [None] * 6


def test_own_criteria_need_not_be_the_nine(tmp_path: Path) -> None:
    files = {
        "posts.csv": table("post_id,post", [("b", "x y"), ("a", "z")]),
        "groundtruth.csv": table(
            "label,criterion_id,post_id", [("1", "C.2", "a"), ("0", "C.10", "a"), ("0", "C.10", "b"), ("0", "C.2", "b")]
        ),
        "criteria.json": b'[{"id": "C.2", "text": "one"}, {"criterion_id": "C.10", "criterion": "two"}]',
    }
    data = load(tmp_path, files)
    # Plain strings: "C.10" before "C.2".
    assert [(p.post_id, p.criterion_id, p.label) for p in data.pairs] == [
        ("a", "C.10", 0),
        ("a", "C.2", 1),
        ("b", "C.10", 0),
        ("b", "C.2", 0),
    ]
    assert data.criteria["C.2"].symptom is None
    assert data.warnings == []


@pytest.mark.parametrize(("folder", "name"), [("redsm5", "posts.csv"), ("mine", "ReDSM5_posts.csv")])
def test_data_that_claim_to_be_redsm5_by_a_name_warn_about_their_size(tmp_path: Path, folder: str, name: str) -> None:
    files = specification()
    files[name] = files.pop(P)
    place = write(tmp_path / folder, files)
    (warning,) = load_dataset(place, place).warnings
    assert "which has 1,484 posts, 9 criteria, 13,356 pairs: here are 3 posts, 9 criteria, 27 pairs" in warning


def test_numeric_json_ids_and_the_release_labels_as_text(tmp_path: Path) -> None:
    files = specification()
    files["criteria.csv"] = table("criterion_id,text", list(CRITERIA.items()))
    assert len(load(tmp_path / "a", files).criteria) == 9
    files = {
        "posts.csv": table("post_id,post", [("1", "x"), ("2", "y")]),
        "groundtruth.csv": b"post_id,criterion_id,label\n1,7,yes\n2,7,no\n",
        "criteria.json": b'{"criteria": [{"id": 7, "text": "seven"}]}',
    }
    assert list(load(tmp_path / "b", files).criteria) == ["7"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60), min_size=1, max_size=5
    ),
    # The csv module quotes a lone CR only where it is part of the line end, or if it quotes everything.
    style=st.sampled_from([("\r\n", csv.QUOTE_MINIMAL), ("\r\n", csv.QUOTE_ALL), ("\n", csv.QUOTE_ALL)]),
    bom=st.booleans(),
)
def test_any_text_is_loaded_unchanged(tmp_path: Path, texts: list[str], style: tuple[str, int], bom: bool) -> None:
    """Round trip through the csv module."""
    posts = {f"p{n}": f"x{text}" for n, text in enumerate(texts)} | {"last": "y"}
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=style[0], quoting=style[1]).writerows([("post_id", "text"), *posts.items()])
    grid = [(p, "A.1", "yes" if p == "last" else "no") for p in posts]
    files = {
        "posts.csv": (b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode("utf-8"),
        "groundtruth.csv": table("post_id,criterion_id,label", grid),
        "criteria.csv": table("criterion_id,criterion", [("A.1", "low")]),
    }
    assert load(tmp_path, files).posts == posts


# --- Numbers, hashes, warnings ---------------------------------------------------------------------------------------


def test_statistics_by_hand(tmp_path: Path) -> None:
    data = load(tmp_path, specification({"p1": "one", "p2": "one two three", "p3": "a b", "p4": "one"}))
    stats = data.stats
    expected = {
        "layout": "specification",
        "posts": 4,
        "criteria": 9,
        "pairs": 36,
        "positives": 3,
        "negatives": 33,
        "positive_rate": 3 / 36,
        "posts_without_positive": 2,
        "hard_negatives": 0,
        "posts_with_repeated_text": 1,
        "words_per_post": {"min": 1, "mean": 1.75, "median": 1.5, "max": 3},
        "dropped": {"posts": [], "criteria": [], "pairs": 0},
        "expected": {"posts": 1484, "criteria": 9, "pairs": 13356},
    }
    assert {name: stats[name] for name in expected} == expected
    assert stats["positives_per_criterion"] == {c: int(c in ("A.1", "A.4", "A.7")) for c in CRITERIA}
    for name, file in stats["files"].items():
        content = (tmp_path / f"{name}.csv").read_bytes()
        assert file == {"name": f"{name}.csv", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert json.loads(json.dumps(stats, allow_nan=False)) == stats
    assert any("1 post with the text of another post" in warning for warning in data.warnings)


def test_data_hash_depends_on_the_content_alone(tmp_path: Path) -> None:
    base = load(tmp_path / "base", specification())
    header, *rows = specification()["groundtruth.csv"].splitlines(keepends=True)
    reordered = {
        "b.csv": b"\xef\xbb\xbf" + b"".join([header, *reversed(rows)]).replace(b"\n", b"\r\n").replace(b"yes", b"TRUE"),
        "a.csv": table("text,post_id", [(t, p) for p, t in reversed(POSTS.items())]),
        "c.json": criteria_json(dict(reversed(CRITERIA.items()))),
    }
    other = load(tmp_path / "other", reordered)
    assert (other.posts, other.criteria, other.pairs) == (base.posts, base.criteria, base.pairs)
    assert list(other.posts) == list(base.posts)
    assert other.stats["data_hash"] == base.stats["data_hash"]
    assert other.stats["criteria_hash"] == base.stats["criteria_hash"] == criteria_hash(base.criteria)

    changed = {
        "label": {"groundtruth.csv": specification()["groundtruth.csv"].replace(b"p2,A.1,no", b"p2,A.1,yes")},
        "post": {"posts.csv": specification()["posts.csv"].replace(b"Grey", b"grey")},
        "criteria": {"criteria.csv": specification()["criteria.csv"].replace(b"number 9", b"number nine")},
    }
    for name, change in changed.items():
        stats = load(tmp_path / name, {**specification(), **change}).stats
        assert (stats["data_hash"] == base.stats["data_hash"]) == (name == "criteria")
        assert (stats["criteria_hash"] == base.stats["criteria_hash"]) == (name != "criteria")


def test_the_official_release_of_another_size_warns_with_its_positives(tmp_path: Path) -> None:
    warning = next(w for w in load(tmp_path, official()).warnings if "ReDSM5" in w)
    assert "which has 1,484 posts, 9 criteria, 13,356 pairs, 1,292 positives, 392 posts without positive" in warning
    assert "here are 3 posts, 9 criteria, 27 pairs, 3 positives (11.11%), 1 posts without positive" in warning


def test_expected_counts_do_not_warn() -> None:
    stats = {"layout": "official", "positive_rate": 0.0967, **EXPECTED_COUNTS, **EXPECTED_IN_RELEASE}
    assert size_warning(stats, claimed=True) == []
    assert len(size_warning({**stats, "positives": 1291}, claimed=True)) == 1
    assert size_warning({**stats, "positives": 1291, "layout": "specification"}, claimed=True) == []
    pairs = {**stats, "pairs": 13355, "layout": "specification"}
    assert len(size_warning(pairs, claimed=True)) == 1
    assert size_warning(pairs, claimed=False) == []


def test_repeated_annotations_count_once(tmp_path: Path) -> None:
    rows = [*ANNOTATIONS, ("p1", "s1", "DEPRESSED_MOOD", "0"), ("p3", "s3", "FATIGUE", "1"), ("p2", "", "FATIGUE", "1")]
    data = load(tmp_path, official(annotations=[*rows, ("p2", "", "FATIGUE", "1")]))
    pairs = {(pair.post_id, pair.criterion_id): pair for pair in data.pairs}
    assert pairs["p1", "A.1"] == Pair("p1", "A.1", 1, 2, False)
    assert pairs["p3", "A.6"] == Pair("p3", "A.6", 1, 1, False)
    assert pairs["p2", "A.6"].n_evidence == 2
    assert (data.stats["annotations"]["repeated"], data.stats["annotations"]["contradictory"]) == (2, 2)
    assert any("2 annotation rows repeat" in warning for warning in data.warnings)


INVISIBLE = ["\u2800", "\u3164", "\u00ad", "\u200e", "\u2063", "\ufe0f", "\u034f", "\U000e0020"]
"""A braille pattern without dots, a filler, a soft hyphen, a mark of direction, a separator, a variation, a joiner, a
tag: a few of thousands."""


@pytest.mark.parametrize(
    "blank",
    ["", "   ", "\t\n", "\u00a0\u3000", "\u200b\ufeff", " \u200b ", *INVISIBLE, "".join(INVISIBLE), "NaN", " NULL "],
)
@pytest.mark.parametrize("layout", [specification, official])
def test_empty_texts_are_dropped_with_their_pairs(tmp_path: Path, blank: str, layout: Callable[..., Files]) -> None:
    files = layout({**POSTS, "p8": blank, "p9": blank})
    data = load(tmp_path, files)
    assert set(data.posts) == set(POSTS)
    assert len(data.pairs) == 27
    assert data.stats["dropped"] == {"posts": ["p8", "p9"], "criteria": [], "pairs": 18}
    assert "2 posts without text dropped, with the pairs: 'p8', 'p9'." in data.warnings
    message = refusal(tmp_path, empty="refuse")
    said_refusal(message, "data-text", "posts.csv, line 6: post 'p8' ", "post 'p9' ", "data.empty=drop")


def test_the_ignorable_characters_are_those_of_unicode() -> None:
    """The regex package has Unicode's own tables; of its other properties a few stand for those of Python."""
    ignorable = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{White_Space}\p{Noncharacter_Code_Point}\p{Cf}]")
    found = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and ignorable.match(chr(code))]
    assert len(found) > 4000
    # Python knows fewer characters than the package; those that it does not know count as seen.
    assert {text for text in found if not is_blank(text)} <= {
        text for text in found if unicodedata.category(text) == "Cn"
    }
    only_ignorable = [text for text in found if regex.match(r"\p{Default_Ignorable_Code_Point}", text)]
    assert all(is_blank(text) for text in only_ignorable)
    table = [chr(code) for code in range(0x110000) if IGNORABLE.match(chr(code))]
    assert table == only_ignorable


def test_what_shows_something_is_no_blank() -> None:
    """Every letter, digit, sign and symbol, private and unassigned characters; a surrogate is another fault."""
    inkless = {"\u2800", "\U0001d159"}
    for code in range(0x110000):
        text = chr(code)
        seen = unicodedata.category(text)[0] in "LNPS" and not IGNORABLE.match(text) and text not in inkless
        if seen or unicodedata.category(text) in ("Co", "Cs"):
            assert not is_blank(text), hex(code)
        elif unicodedata.category(text)[0] in "MZ" or unicodedata.category(text) in ("Cc", "Cf"):
            assert is_blank(text), hex(code)
    assert not is_blank("\U0001fae9"), "a face that Unicode 16 brought, whatever the version of Python"
    for text in ("\u2764\ufe0f", "1\ufe0f\u20e3", "e\u0301", "\u0915\u093f", "\u200fא", "?", "\u3164x"):
        assert not is_blank(text), text
    for text in ("\u0301", "\u093f\u0301", "\ufe0f\ufe0f", "\uffff", "\ufdd0", "\x1b", "\u2028"):
        assert is_blank(text), ascii(text)


@pytest.mark.parametrize("blank", INVISIBLE)
def test_ids_of_invisible_characters_are_refused(tmp_path: Path, blank: str) -> None:
    files = specification()
    files[P] += f"{blank},words\n".encode()
    files[C] += f"{blank},words\n".encode()
    message = refusal(write(tmp_path, files))
    places = ("posts.csv, line 6: post_id ", "criteria.csv, line 11: criterion_id ")
    said_refusal(message, "data-id", *places, "invisible characters (1)")


# --- Words for nothing -----------------------------------------------------------------------------------------------


def test_every_spelling_of_pandas_is_known_and_no_persons_is() -> None:
    from pandas._libs.parsers import STR_NA_VALUES

    assert STR_NA_VALUES - {""} <= MISSING
    for spelling in MISSING:
        assert is_missing(f" {spelling}\n")
        assert not is_missing(f"{spelling} again")
    for typed in (
        "none",
        "NONE",
        "Null",
        "na",
        "Na",
        "Nan",
        "NAN",
        "N/a",
        "nil",
        "nothing",
        "-",
        "?",
        "#NoMore!",
        "",
        " ",
    ):
        assert not is_missing(typed), typed


@pytest.mark.parametrize("spelling", ["NaN", "NULL", "None", "#N/A", "<NA>", "#VALUE!"])
@pytest.mark.parametrize("layout", [specification, official])
def test_what_pandas_writes_for_nothing_is_empty(tmp_path: Path, spelling: str, layout: Callable[..., Files]) -> None:
    files = layout({**POSTS, "p8": "x", "p9": "y"})
    name = P if P in files else "redsm5_posts.csv"
    frame = pd.read_csv(io.BytesIO(files[name])).set_index("post_id")
    frame.loc[["p8", "p9"]] = None
    files[name] = frame.to_csv(na_rep=spelling).encode()
    data = load(tmp_path, files)
    assert data.posts == POSTS
    assert data.stats["dropped"] == {"posts": ["p8", "p9"], "criteria": [], "pairs": 18}
    assert data.stats["missing"] == {"posts": {spelling: 2}, "criteria": {}}
    (warning,) = (warning for warning in data.warnings if "data.missing" in warning)
    assert f"Cells of the posts that hold only what software writes for nothing (2 x {spelling}) count" in warning
    message = refusal(tmp_path, empty="refuse")
    assert f"{name}, line 6: post 'p8' has no text: its cell holds {spelling}" in message
    assert "data.missing=text keeps them as text" in message
    kept = load_dataset(tmp_path, tmp_path, missing="text")
    assert kept.posts == POSTS | {"p8": spelling, "p9": spelling}
    assert kept.stats["missing"] == {"posts": {}, "criteria": {}}


def test_a_criterion_that_is_missing_and_ids_that_are_spelt_like_that(tmp_path: Path) -> None:
    posts = {**POSTS, "None": f"a post, {CANARY}"}
    files = specification(posts)
    rows = [(key, "NULL" if key == "A.9" else text, "NaN" if key == "A.2" else "") for key, text in CRITERIA.items()]
    files[C] = table("criterion_id,criterion,symptom", [*rows, ("NA", "words", "")])
    files[G] += b"".join(f"{post},NA,no\n".encode() for post in posts)
    data = load(tmp_path, files)
    assert data.posts == posts
    assert sorted(data.criteria) == [*(f"A.{n}" for n in range(1, 9)), "NA"]
    assert data.criteria["A.2"].symptom is None
    assert data.stats["missing"] == {"posts": {}, "criteria": {"NULL": 1}}
    (warning,) = (warning for warning in data.warnings if "data.missing" in warning)
    assert warning == (
        "Cells of the criteria that hold only what software writes for nothing (1 x NULL) count as without text; "
        "data.missing=text keeps such cells as text."
    )
    assert sorted(load_criteria(tmp_path)) == sorted(data.criteria)
    kept = load_criteria(tmp_path, missing="text")
    assert (kept["A.9"].text, kept["A.2"].symptom) == ("NULL", "NaN")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / J).write_bytes(criteria_json(CRITERIA | {"A.9": "NaN"}))
    assert len(load_criteria(tmp_path / "json")) == 8


def test_without_such_cells_nothing_changes(tmp_path: Path) -> None:
    write(tmp_path, specification({**POSTS, "p4": "None of it", "p5": "nullify", "p6": "none"}))
    one, other = (load_dataset(tmp_path, tmp_path, missing=missing) for missing in ("empty", "text"))
    assert one == other
    assert len(one.posts) == 6
    sample = load_dataset(ROOT / "data/sample", ROOT / "data/sample").stats
    hashes = {key: sample[key][:16] for key in ("data_hash", "criteria_hash")}
    assert hashes == SAMPLE_HASHES, "runs that were begun earlier could not be resumed"


def test_an_empty_criterion_is_dropped_with_its_pairs(tmp_path: Path) -> None:
    files = specification()
    files["criteria.csv"] = table("criterion_id,criterion", [*list(CRITERIA.items())[:8], ("A.9", "  ")])
    data = load(tmp_path, files)
    assert "A.9" not in data.criteria
    assert len(data.pairs) == 24
    assert data.stats["dropped"] == {"posts": [], "criteria": ["A.9"], "pairs": 3}
    message = refusal(tmp_path, empty="refuse")
    said_refusal(message, "data-text", "criteria.csv, line 10: criterion 'A.9' ")


def test_a_dropped_post_needs_no_pairs(tmp_path: Path) -> None:
    files = specification()
    files["posts.csv"] += b"p9,\n"
    assert load(tmp_path, files).stats["dropped"] == {"posts": ["p9"], "criteria": [], "pairs": 0}


def test_criteria_that_are_not_used_are_mentioned(tmp_path: Path) -> None:
    write(tmp_path / "own", specification())
    write(tmp_path / "dsm5", {"criteria.json": criteria_json(CRITERIA)})
    data = load_dataset(tmp_path / "own", tmp_path / "dsm5")
    assert data.stats["files"]["criteria"]["name"] == "criteria.json"
    assert any("criteria.csv looks like criteria and is not used" in warning for warning in data.warnings)


def test_columns_that_look_like_one_that_is_read_are_mentioned(tmp_path: Path) -> None:
    files = specification()
    files[P] = table("post_id,post,posts,date,post_length", [(p, t, "x", "x", "x") for p, t in POSTS.items()])
    files[C] = table("criterion_id,text,criteria,x_symptom", [(c, t, "x", "y") for c, t in CRITERIA.items()])
    files[G] = files[G].replace(b"label\n", b"label,label_2,labels\n").replace(b"yes\n", b"yes,1,no\n")
    files[G] = files[G].replace(b"no\n", b"no,1,no\n").replace(b"yes,1,no,1,no", b"yes,1,no")
    found = [warning.rpartition("/")[2] for warning in load(tmp_path, files).warnings if "is not read" in warning]
    assert found == [
        "posts.csv: the column 'posts' is not read, since `post` is.",
        "groundtruth.csv: the column 'labels' is not read, since `label` is.",
        "criteria.csv: the column 'criteria' is not read, since `text` is.",
    ]


@pytest.mark.parametrize("column", ["symptoms", "symptom_name", "symptom name"])
def test_an_optional_column_in_another_spelling_is_mentioned(tmp_path: Path, column: str) -> None:
    """It changes no number, so it is not refused."""
    files = specification()
    expected = load(tmp_path / "without", files)
    files[C] = table(f"criterion_id,criterion,{column}", [(c, t, "mood") for c, t in CRITERIA.items()])
    data = load(tmp_path / "with", files)
    assert data.criteria == expected.criteria
    (said,) = [warning.rpartition("/")[2] for warning in data.warnings if "is not read" in warning]
    assert said == f"criteria.csv: the column '{column}' is not read; if it is the `symptom`, rename it to that."


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tables_are_refused_with_place_value_and_remedy(tmp_path: Path, case: str) -> None:
    edit, expected = MALFORMED[case]
    files = specification()
    edit(files)
    said_refusal(refusal(write(tmp_path, files)), *expected)


@pytest.mark.parametrize("case", MALFORMED_RELEASE)
def test_malformed_releases_are_refused_with_place_value_and_remedy(tmp_path: Path, case: str) -> None:
    edit, expected = MALFORMED_RELEASE[case]
    files = official()
    edit(files)
    said_refusal(refusal(write(tmp_path, files)), *expected)


def test_at_least_thirty_malformed_sets() -> None:
    assert len(MALFORMED) + len(MALFORMED_RELEASE) >= 60


SINGLE_FAULT = [
    "duplicate post",
    "duplicate pair",
    "label of an unknown post",
    "label of an unknown criterion",
    "missing pair",
    "unknown label",
    "label that is missing to pandas",
    "post without pairs",
    "path separator in a criterion id",
    "too many fields",
    "too few fields",
    "stray line",
    "unclosed quote",
    "unclosed quote in the groundtruth",
    "text after a quote",
    "Latin-1",
    "NUL",
    "over-long field",
    "posts missing",
    "criteria missing",
    "UTF-16",
]


@pytest.mark.parametrize("case", SINGLE_FAULT)
def test_one_mistake_is_one_fault(tmp_path: Path, case: str) -> None:
    """A mistake must not drown in its consequences, such as every label of a post whose row is broken."""
    files = specification()
    MALFORMED[case][0](files)
    assert ": 1 fault\n" in refusal(write(tmp_path, files))


def test_what_could_not_be_read_has_no_consequences(tmp_path: Path) -> None:
    """Reading of the posts stops at their first row, and no label is known: neither makes ids or classes missing."""
    files = specification()
    replaced(P, ONE_POST, b'p1,"closed" early')(files)
    files[G] = files[G].replace(b",yes", b",ja")
    message = refusal(write(tmp_path, files))
    assert ": 4 faults\n" in message
    assert "posts.csv, line 2: a quoted field" in message
    assert message.count("label 'ja' is unknown") == 3


def test_labels_that_are_all_unknown_are_no_missing_class(tmp_path: Path) -> None:
    files = specification()
    files[G] = files[G].replace(b",yes", b",ja")
    assert ": 3 faults\n" in refusal(write(tmp_path, files))


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    files = specification()
    for case in ("duplicate post", "unknown label", "label of an unknown criterion", "Latin-1"):
        MALFORMED[case][0](files)
    replaced(G, b"p3,A.9,no\n", b"")(files)
    added(C, b"A\\10,x\n")(files)
    message = refusal(write(tmp_path, files))
    assert ": 6 faults\n" in message
    for fragment in (
        "posts.csv, line 2: the byte 0xe9",
        "posts.csv, line 6: post_id 'p1' is already on line 2",
        "criteria.csv, line 11: criterion_id 'A\\\\10' is or holds a path separator",
        "groundtruth.csv, line 15: label 'maybe'",
        "groundtruth.csv, line 28: criterion 'B.1'",
        "groundtruth.csv: post 'p3' x criterion 'A.9' has no row",
    ):
        assert fragment in message, message


def test_many_equal_faults_are_counted_with_examples(tmp_path: Path) -> None:
    posts = {f"p{n}": f"words {n} {CANARY}" for n in range(1, 1000)}
    files = specification(posts)
    kept = [line for line in files[G].split(b"\n") if b",A.1," in line or b",A.2," in line or b"label" in line]
    files[G] = b"\n".join([*kept, *(b"p1,A.%d,no" % n for n in range(3, 10))]) + b"\n"
    message = refusal(write(tmp_path, files))
    assert "groundtruth.csv: 6,986 missing pairs, e.g. post 'p10' x criterion 'A.3' has no row; " in message
    assert len(message) < 1500
    assert ": 1 fault\n" in message


def test_the_line_is_the_one_on_which_the_record_starts(tmp_path: Path) -> None:
    files = specification()
    files[P] = b'post_id,post\n\np1,"one\ntwo\r\nthree"\n\np2,"x\n\ny"\np1,again\np3,z\n'
    said_refusal(refusal(write(tmp_path, files)), "data-id", "posts.csv, line 10: post_id 'p1' ", "line 3")


def test_a_gigabyte_in_one_field_is_refused_without_reading_it(tmp_path: Path) -> None:
    files = specification()
    write(tmp_path, files)
    with (tmp_path / P).open("ab") as file:
        file.write(b"p4,")
        file.truncate(2**30)
    tracemalloc.start()
    message = refusal(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    said_refusal(message, "data-format", "posts.csv, line 6: ", "8,000,000 characters")
    assert peak < 150 * 2**20


def test_a_long_quoted_field_of_many_lines_is_refused(tmp_path: Path) -> None:
    files = specification()
    files[P] += b'p4,"' + b"short line\n" * 200_000 + b'"\n'
    message = refusal(write(tmp_path, files))
    said_refusal(message, "data-format", "posts.csv, line 6: a field ", "1,000,000 characters")


def test_a_field_at_the_limit_is_read_and_the_csv_limit_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit(5000)
    try:
        files = specification({**POSTS, "p4": "x" * FIELD_LIMIT})
        assert len(load(tmp_path, files).posts["p4"]) == FIELD_LIMIT
        assert csv.field_size_limit() == 5000
    finally:
        csv.field_size_limit(before)


# --- Folders and special files ---------------------------------------------------------------------------------------


def test_a_missing_folder_says_where_what_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "sample", {"x.txt": b""})
    message = refusal(Path("data/redsm5"), Path("data/dsm5"))
    places = (f"folder {tmp_path / 'data' / 'redsm5'}: ", f"folder {tmp_path / 'data' / 'dsm5'}", "into data/redsm5")
    said_refusal(message, "data-file", *places, f"{tmp_path / 'data'} holds: sample")
    assert "irlab-udc/redsm5" in message
    assert "signed agreement" in message
    assert "python -m raycv.run experiment=quickstart" in message


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "redsm5", {"README.md": b"how to get it"})
    write(tmp_path / "dsm5", {"criteria.csv": specification()[C]})
    message = refusal(tmp_path / "redsm5", tmp_path / "dsm5")
    names = ("`posts`", "redsm5_posts.csv", "redsm5_annotations.csv", "experiment=quickstart")
    said_refusal(message, "data-file", f"{tmp_path / 'redsm5'}; found: README.md", *names)


def test_a_file_where_a_folder_is_expected(tmp_path: Path) -> None:
    write(tmp_path, specification())
    message = refusal(tmp_path / P, tmp_path)
    said_refusal(message, "data-file", f"{tmp_path / P}: ")


def test_two_spellings_of_the_criteria_folder(tmp_path: Path) -> None:
    files = specification()
    for name in ("DSM5", "DSM-5"):
        write(tmp_path / name, {C: files[C]})
    files.pop(C)
    message = refusal(write(tmp_path / "redsm5", files), tmp_path / "dsm5")
    said_refusal(message, "data-file", f"{tmp_path / 'dsm5'}: ", "DSM-5 and DSM5")


@pytest.mark.parametrize("kind", ["folder", "loop", "dangling", "pipe"])
@pytest.mark.parametrize("name", [P, G, C])
def test_no_regular_file_where_one_is_expected(tmp_path: Path, kind: str, name: str) -> None:
    files = specification()
    files.pop(name)
    write(tmp_path, files)
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else tmp_path / "nowhere")
    expected = {
        "folder": "a folder",
        "loop": "Too many levels of symbolic links",
        "dangling": "No such file or directory",
        "pipe": "no regular file",
    }[kind]
    said_refusal(refusal(tmp_path), "data-file", f"{path}: ", expected)


def test_a_loop_of_folders(tmp_path: Path) -> None:
    (tmp_path / "redsm5").symlink_to(tmp_path / "redsm5")
    message = refusal(tmp_path / "redsm5", tmp_path / "redsm5")
    assert "Too many levels of symbolic links" in message
    assert ": 1 fault\n" in message


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", specification())
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (P, G, C):
        (linked / name).symlink_to(tmp_path / "real" / name)
    data = [load_dataset(tmp_path / name, tmp_path / name) for name in ("real", "folder", "linked")]
    assert data[0] == data[1] == data[2]


def test_something_unreadable_that_is_not_needed_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "old.csv").mkdir()
    (tmp_path / "more.json").symlink_to(tmp_path / "more.json")
    assert load(tmp_path, {**specification(), "thesis.json": b"{no json"}).posts == POSTS


# --- Privacy and weight ----------------------------------------------------------------------------------------------


def test_no_text_in_statistics_and_warnings(tmp_path: Path) -> None:
    for name, files in (("a", specification({**POSTS, "p9": ""})), ("b", official({**POSTS, "p8": POSTS["p1"]}))):
        data = load(tmp_path / name, files)
        told = json.dumps(data.stats) + "".join(data.warnings)
        assert data.warnings
        assert not any(word in told for word in (*CANARY.split(), "Grey", "number 1"))


@pytest.mark.parametrize("text", ["I cannot go on", "我不想活了", "لا أستطيع", "so\nsad", "sad " * 400, 'sad"', "sad,"])
def test_texts_in_the_wrong_columns_are_not_shown(tmp_path: Path, text: str) -> None:
    """Ids, labels, symptoms and headers that are texts: what a shifted or headerless file gives."""
    files = specification()
    files[G] += table("x", [("p1", "A.1", text), (text, "A.1", "no"), ("p1", text, "no")]).split(b"\n", 1)[1]
    files[C] += table("x", [(text, text)]).split(b"\n", 1)[1]
    files[P] += table("x", [(text, text)]).split(b"\n", 1)[1] * 2
    release = official()
    release[A] += table("x", [("p1", "s9", "", text, text, "")]).split(b"\n", 1)[1]
    release["redsm5_posts.csv"] = table(f"p1,{text}".replace("\n", " "), [("p2", text)])
    release[J] = criteria_json({text: text, "A.1": "x"})
    for name, broken in (("a", files), ("b", release)):
        message = refusal(write(tmp_path / name, broken))
        assert text.strip() not in message
        assert repr(text)[1:-1] not in message
        assert "sad" not in message


def test_import_is_light_and_silent() -> None:
    program = (
        "import sys, raycv.data.dataset;"
        "heavy = {'pandas', 'numpy', 'torch', 'ray', 'transformers', 'mlflow', 'sklearn', 'hydra', 'pydantic'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("ending", ["tsv", "json"])
def test_tables_with_tabs_and_in_json_are_the_same_data(tmp_path: Path, ending: str) -> None:
    files = specification({key: f"{text}\ta, b" for key, text in POSTS.items()})
    other = {}
    for name, content in files.items():
        frame = pd.read_csv(io.BytesIO(content), dtype=str)
        text = frame.to_csv(sep="\t", index=False) if ending == "tsv" else frame.to_json(orient="records")
        other[name.replace("csv", ending)] = text.encode()
    ours, theirs = (
        load_dataset(folder, folder) for folder in (write(tmp_path / "a", files), write(tmp_path / "b", other))
    )
    assert theirs.stats["data_hash"] == ours.stats["data_hash"]
    assert theirs.pairs == ours.pairs


def test_numbers_of_a_json_table_are_ids_as_they_are_spelt(tmp_path: Path) -> None:
    ids = ("12345678901234567890123", "1.50", "7")
    posts = ",".join(f'{{"post_id": {key}, "post": "{text}"}}' for key, text in zip(ids, ("a", "b", "c"), strict=True))
    grid = [{"post_id": key, "criterion_id": c, "label": c == "A.1"} for key in ids for c in CRITERIA]
    files = {"posts.json": f"[{posts}]".encode(), "labels.json": json.dumps(grid).encode(), C: specification()[C]}
    folder = write(tmp_path, files)
    assert list(load_dataset(folder, folder).posts) == sorted(ids)


def test_a_key_of_json_that_holds_prose_is_not_printed(tmp_path: Path) -> None:
    files = specification()
    files.pop("posts.csv")
    entry = {"post_id": "p1", "post": "a", "I feel empty today": "x" * (FIELD_LIMIT + 1)}
    files["posts.json"] = json.dumps([entry]).encode()
    prose, kinds = "posts.json, entry 1: a value of 18 characters ", "data-format, data-id, data-split"
    with refuses(kinds, prose, f"{FIELD_LIMIT:,}") as caught:
        load(tmp_path, files)
    assert "empty" not in str(caught.value)


@pytest.mark.parametrize(
    "names", [("post_id", "criterion_id", "label", "text"), ("post_id", "id", "label", "criterion")]
)
def test_a_json_table_with_a_post_id_is_no_list_of_criteria(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "t.json").write_text(json.dumps([dict.fromkeys(names, "x")]))
    assert read_columns(tmp_path / "t.json") == names


def test_a_tsv_with_commas_is_named_as_one(tmp_path: Path) -> None:
    files = specification()
    files["posts.tsv"] = files.pop("posts.csv")
    with refuses("data-format", "posts.tsv, line 1: ", "separated by commas", "tabs"):
        load(tmp_path, files)
