"""README and docs: plain English, commands that raycv accepts, pages that are current, links that hold."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from support.pages import page

pytest.importorskip("scripts.words", reason="the docs are in the checkout, not in the wheel")

from scripts import doc_commands, links, reference, words
from scripts.docstrings import code_passages, string_passages
from scripts.markdown import ROOT, Passage, anchors, code_blocks, inline_code, pages, passages


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 2000


# --- Words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The fold goes on from its last state.", "'goes on' is banned; write: resumes"),
        ("Going on is possible.", "'Going on' is banned"),
        ("The fold restarts, and that is said.", "'is said' is banned"),
        ("A share cannot be had.", "'be had' is banned"),
        ("The answer is no number.", "'is no' is banned"),
        ("Mend the file.", "'Mend' is banned"),
        ("So it is with proxies.", "'So it is with' is banned"),
        ("The run starts anew.", "'anew' is banned"),
        ("Read it. What lies there stays.", "opens with 'What'"),
        ("Of two processes the second is refused.", "opens with 'Of'"),
        ("who computes: this process", "opens with 'who'"),
        ("**That** holds.", "opens with"),
        ("`x` ends. Where it ends, it stays.", "opens with 'Where'"),
        (" ".join(["word"] * 26) + ".", "26 words in a sentence, 25 at most"),
        ("- one\n- " + " ".join(["word"] * 26), "26 words in a sentence"),
        ("| a | b |\n| --- | --- |\n| short | the loss is no number |", "'is no' is banned"),
        ("```{note}\nThe loss is no number.\n```", "'is no' is banned"),
        ("![the loss is no number](x.svg)", "'is no' is banned"),
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, text: str, found: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{text}\n", encoding="utf-8")
    (breach,) = [breach for passage in passages(page) for breach in words.breaches(passage)]
    assert found in breach
    assert breach.startswith(f"{page}:")


@pytest.mark.parametrize(
    "text",
    [
        "The fold restarts up to `resources.retries` times. A word.5 is no longer read.",
        "There is no TLS.",
        " ".join(["word"] * 25) + ". " + " ".join(["Word"] * 25) + ".",
        "```bash\n" + " ".join(["goes on"] * 30) + "\n```",
        "`" + " ".join(["goes on"] * 30) + "`",
    ],
)
def test_plain_english_passes(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert [breach for passage in passages(page) for breach in words.breaches(passage)] == []


def test_a_breach_names_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nGood.\n\n| a |\n| --- |\n| good |\n| is said |\n", encoding="utf-8")
    (breach,) = [breach for passage in passages(page) for breach in words.breaches(passage)]
    assert breach.startswith(f"{page}:8: ")


@pytest.mark.parametrize(
    ("code", "line", "found"),
    [
        ('"""The run goes on."""\n', 1, "'goes on' is banned"),
        ('def f():\n    """Ends.\n\n    Where it ends, it stays.\n    """\n', 4, "opens with 'Where'"),
        ('"""Ends.\n\nArgs:\n    a: it is good\n    b: what it takes\n"""\n', 5, "opens with 'what'"),
        ('"""Ends.\n\nRaises: the loss is no number\n"""\n', 3, "'is no' is banned"),
        ('class C:\n    x: int\n    """the loss is no number"""\n', 3, "'is no' is banned"),
        ("x = 1  # the loss is no number\n", 1, "'is no' is banned"),
        ("# One.\n#\n# The loss is\n# no number.\n", 1, "'is no' is banned"),
    ],
)
def test_a_planted_breach_of_code_is_found(tmp_path: Path, code: str, line: int, found: str) -> None:
    module = tmp_path / "module.py"
    module.write_text(code, encoding="utf-8")
    (breach,) = [breach for passage in code_passages(module) for breach in words.breaches(passage)]
    assert breach.startswith(f"{module}:{line}: ")
    assert found in breach


@pytest.mark.parametrize(
    ("code", "line", "found"),
    [
        ('raise UserError(\n    "The file is damaged.", remedies=["write it anew"]\n)\n', 2, "'anew' is banned"),
        ('what = f"{path} is no {kind}"\n', 1, "'is no' is banned"),
        ('what = (\n    f"{shown(value)} is "\n    "none of them"\n)\n', 2, "'is none' is banned"),
        ('say(console, f"{kept} goes on" if kept else "stopped")\n', 1, "'goes on' is banned"),
    ],
)
def test_a_planted_breach_of_a_message_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, line: int, found: str
) -> None:
    module = tmp_path / "module.py"
    module.write_text(code, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        words.main([str(module)])
    assert ended.value.code == 1
    (breach,) = capsys.readouterr().out.splitlines()
    assert breach.startswith(f"{module}:{line}: ")
    assert found in breach


def test_names_and_code_are_not_words(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    text = (
        'x["anew"] = f"{goes(on)}: `goes on`"  # noqa: goes on\n'
        '"""`goes on`, goes_on and on(goes on=1)."""\n# fmt: goes on\n'
    )
    module.write_text(text, encoding="utf-8")
    read = [*code_passages(module), *string_passages(module)]
    assert [breach for passage in read for breach in words.breaches(passage)] == []


def test_a_message_may_be_a_part_of_a_sentence_or_a_list_of_many_words(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('x = "where memory ran out: ' + "word " * 30 + '"\n', encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        words.main([str(module)])
    assert ended.value.code == 0


def test_readme_docs_help_and_code_are_in_plain_english(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        words.main([])
    assert ended.value.code == 0, capsys.readouterr().out


def test_help_and_the_comments_of_the_configs_are_looked_at() -> None:
    help_texts, comments = list(words.help_passages()), list(words.config_comments())
    assert Passage("raycv.run --help, cv.folds", "n_splits of StratifiedGroupKFold") in help_texts
    assert any(passage.where == "raycv.infer --help" for passage in help_texts)
    # What an example of a header does, without the example.
    assert any(passage.text == "MentaLLaMA-chat-7B on data/redsm5" for passage in help_texts)
    assert any(passage.where.startswith("configs/train/default.yaml:") for passage in comments)
    assert set(words.commands()) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}


# --- Commands --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_each_command_of_readme_and_docs_is_accepted() -> None:
    found, count = doc_commands.faults()
    assert found == []
    assert count > 50


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("python -m raycv.run train.epoch=3", "unknown key; did you mean train.epochs?"),
        ("python -m raycv.run train.epochs=many", "received 'many'"),
        ("python -m raycv.run experiment=quickstrat", "'quickstrat' is not one of its files"),
        ("python -m raycv.results.find_run resume=latest", "there is no command raycv.results.find_run"),
        ("python -m raycv.run cv.folds 5", "cv.folds, 5: not key=value"),
        ("python -m raycv.infer post=one criterion=A.4 words", "words: not key=value"),
        ("python -m raycv.run --epochs=3", "there is no option --epochs"),
        ("python -m raycv.run train.lr=0.1 --cfg job train.x=1", "unknown key"),
        ("python -m raycv.run resume=<nmae>", "unknown placeholder <nmae>"),
        ("ray submit cluster.yaml raycv/run.py -- cv.fold=5", "unknown key"),
        ("ray job submit --working-dir . -- python -m raycv.run cv.folds=1", "cv.folds"),
        ("RAYCV_TOKEN=x python -m raycv.serve serve.hots=0.0.0.0", "unknown key"),
        ("make quickstrat", "no target quickstrat"),
        ("python -m benchmarks.layers", "no module benchmarks.layers"),
        ("python scripts/pictures.py report.json x.svg", "no file scripts/pictures.py"),
    ],
)
def test_a_command_that_would_fail_is_found(line: str, why: str) -> None:
    ((_, typed),) = doc_commands.typed(line)
    assert why in (doc_commands.fault(typed) or "accepted")


def test_commands_are_read_as_a_shell_reads_them() -> None:
    block = "# a comment\nmake check   # another\nA=b python -m raycv.run \\\n  x=y && ray up z; echo 'a && b' | cat\n"
    assert list(doc_commands.typed(block)) == [
        (1, ["make", "check"]),
        (2, ["A=b", "python", "-m", "raycv.run", "x=y"]),
        (2, ["ray", "up", "z"]),
        (2, ["echo", "a && b"]),
        (2, ["cat"]),
    ]


def test_a_stale_key_in_inline_code_is_found() -> None:
    assert doc_commands.unknown_keys("train.epoch=3 train.lr=1") == ["train.epoch"]
    assert doc_commands.unknown_keys("torch.dtype=x train.lr=1 y=train.epoch") == []


def test_a_file_that_has_moved_is_found() -> None:
    assert doc_commands.missing_files("raycv/no_such.py") == ["raycv/no_such.py"]
    assert doc_commands.missing_files("configs/no_such/") == ["configs/no_such/"]
    for there in ("raycv/run.py", "configs/experiment/", "configs/<command>.yaml", "configs/model/*.yaml", "raycv/"):
        assert doc_commands.missing_files(there) == []


def test_the_citation_is_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version


def test_code_is_found_where_it_stands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Say `a=1`.\n\n```bash\nmake\n```\n\n```{note}\nOr `b=2`.\n```\n", encoding="utf-8")
    assert list(code_blocks(page, "bash")) == [(4, "make\n")]
    assert list(inline_code(page)) == [(1, "a=1"), (8, "b=2")]


# --- Names of tests ---------------------------------------------------------------------------------------------------


def test_the_fault_table_names_tests_that_exist() -> None:
    """The docs, `When something fails`: each line has a test; `...` stands for a part of the name."""
    lines = page("reference/failures.md").splitlines()
    lines = [line for line in lines if line.startswith("| ") and not line.startswith(("| ---", "| fault "))]
    rows = [line.split("|")[3] for line in lines]
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(rows) > 45
    for row in rows:
        named = re.findall(r"`([^`]+)`", row)
        assert named, row
        for name in named:
            pattern = re.escape(name).replace(r"\.\.\.", r"\w+").replace(r"\*", r"\w+")
            assert any(re.fullmatch(pattern, test) for test in defined), name


# --- Pages that come from code ---------------------------------------------------------------------------------------


def test_the_page_of_the_specification_has_each_line_of_it_with_tests_that_exist() -> None:
    page = (ROOT / "docs/reference/specification.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if "`test_" in line]
    named = {row[0] for row in rows}
    assert {f"FR-{number:03}" for number in range(1, 13)} | {f"SC-{number:03}" for number in range(1, 5)} <= named
    assert len(rows) == 30
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)::(\w+)`", row[2])
        assert tests, row
        for file, test in tests:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (file, test)
    deviations = {number for row in rows for number in re.findall(r"\d+", row[3] if len(row) > 3 else "")}
    assert deviations <= set(re.findall(r"^(\d+)\. ", page, re.MULTILINE))


def test_the_generated_pages_are_current() -> None:
    assert reference.outdated() == [], "python -m scripts.reference"


def test_a_page_that_is_not_what_the_code_gives_is_out_of_date(monkeypatch: pytest.MonkeyPatch) -> None:
    page, write = next(iter(reference.PAGES.items()))
    monkeypatch.setitem(reference.PAGES, page, lambda: write() + "one more key")
    monkeypatch.setitem(reference.PAGES, "docs/reference/missing.md", lambda: "new")
    assert reference.outdated() == [page, "docs/reference/missing.md"]


def test_the_page_of_keys_has_defaults_and_allowed_values() -> None:
    page = reference.commands_page()
    for row in (
        "| `cv.folds` | `5` | whole number from 2 | n_splits of StratifiedGroupKFold |",
        "| `train.precision` | `auto` | `auto`, `bf16`, `fp32` |",
        "| `train.checkpoint_minutes` | `15` | number above 0, `null` |",
        "| `out` | must be given | text |",
        "| `experiment=` | `quickstart` |",
    ):
        assert row in page


def test_the_pages_do_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCV_RUN_DIR", "/elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert reference.outdated() == []


def test_the_page_of_modules_has_no_numbers_of_requirements() -> None:
    page = reference.modules_page()
    assert "| `raycv/utils.py` | Seeds, random states, and" in page
    assert not re.search(r"FR-\d|SC-\d|user story", page)


# --- Links -----------------------------------------------------------------------------------------------------------


def built(docs: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """The pages of `docs`, made as `make docs` makes them."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "html", str(docs), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_the_docs_are_built_without_a_warning_and_load_nothing_from_the_web(tmp_path: Path) -> None:
    done = built(ROOT / "docs", tmp_path / "html")
    assert done.returncode == 0, done.stderr
    assert list(links.broken_in_html(tmp_path / "html")) == []
    # Every page is there, and in a table of contents: one that is not is a warning.
    names = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in pages() if ROOT / "docs" in path.parents}
    assert all((tmp_path / "html" / name).is_file() for name in names)
    assert len(names) > 20


@pytest.mark.long
@pytest.mark.parametrize(
    ("link", "broken"),
    [
        ("guides/resume.md#the-training-state", ""),
        ("guides/resume.md#no-such-heading", "no-such-heading"),
        ("no-such-page.md", "no-such-page.md"),
        ("../no-such-file.md", "no-such-file.md"),
    ],
)
def test_a_broken_link_fails_the_build(tmp_path: Path, link: str, broken: str) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "docs" / "conf.py", docs)
    shutil.copytree(ROOT / "docs" / "_static", docs / "_static")
    (docs / "guides").mkdir()
    (docs / "guides" / "resume.md").write_text("# Resume\n\n## The training state\n", encoding="utf-8")
    text = f"# Title\n\n[a link]({link})\n\n```{{toctree}}\nguides/resume\n```\n"
    (docs / "index.md").write_text(text, encoding="utf-8")
    done = built(docs, tmp_path / "html")
    assert (done.returncode != 0) == bool(broken), done.stderr
    assert broken in done.stderr


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('<a href="b.html">', "b.html: there is no such file"),
        ('<a href="a.html#x">', "a.html#x: there is no such anchor"),
        ('<a href="#x">', "#x: there is no such anchor"),
        ('<img src="x.svg">', "x.svg: there is no such file"),
        ('<script src="https://cdn.example/x.js"></script>', "would be loaded from the web"),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', "would be loaded from the web"),
    ],
)
def test_a_broken_link_of_a_built_page_is_found(tmp_path: Path, body: str, why: str) -> None:
    (tmp_path / "a.html").write_text(f'<p id="y">{body}', encoding="utf-8")
    (found,) = links.broken_in_html(tmp_path)
    assert found == f"a.html: {found.removeprefix('a.html: ')}"
    assert why in found


def test_links_that_hold_are_not_reported(tmp_path: Path) -> None:
    (tmp_path / "a b.html").write_text("<p id='y'>", encoding="utf-8")
    text = '<a href="https://example.org/x"><a href="a%20b.html#y"><a href="#z" id="z"><a href="mailto:x@example.org">'
    (tmp_path / "c.html").write_text(text, encoding="utf-8")
    assert list(links.broken_in_html(tmp_path)) == []


def test_the_links_of_readme_and_its_companions_hold() -> None:
    assert [fault for path in sorted(ROOT.glob("*.md")) for fault in links.broken_in_markdown(path)] == []


def test_a_broken_link_of_a_markdown_file_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading, with `code`\n[a](page.md#a-heading-with-code) [b](#no) [c](no.md) [d](https://example.org)\n",
        encoding="utf-8",
    )
    assert anchors(page) == {"a-heading-with-code"}
    assert list(links.broken_in_markdown(page)) == [
        f"{page}:2: #no: there is no such heading",
        f"{page}:2: no.md: there is no such file",
    ]
