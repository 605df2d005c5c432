"""What people read of a run: one sealed page, Markdown, tables, a model card; the same bytes each time, and no text."""

import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.refusals import refuses
from support.studies import folder_of, richest, study_of

from raycv.config.command_line import compose_checked
from raycv.config.schema import ReportConfig, RunConfig
from raycv.cv.aggregation import make_page
from raycv.cv.open_run import OpenRun
from raycv.evaluation.evaluate import evaluate
from raycv.rendering.blocks import Column, Estimate, Table, csv_of, for_latex, for_markdown, latex_of, markdown_of
from raycv.rendering.publish import facts_from, publish
from raycv.rendering.terminal import summary_table, verdict_lines
from raycv.results.fold_result import FoldResult
from raycv.results.report import summarize
from raycv.results.run_folder import RunFolder

CANARY = "zebra-canary-7731"
EVIL = "</script><img src=x onerror=alert(1)>|[a](http://evil.example)_$\\input{x}"
FIGURES = 10
MADE = ("evaluation.json", "report.html", "report.md", "model_card.md")


def made_files(folder: RunFolder) -> dict[str, bytes]:
    paths = [folder.root / name for name in MADE] + [*folder.tables.iterdir(), *folder.figures.iterdir()]
    return {path.relative_to(folder.root).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """A finished run that recorded everything, with its page; every post has the canary as its text."""
    folder = folder_of(replace(richest(), run="mine"), tmp_path_factory.mktemp("runs"), text=CANARY)
    publish(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> RunFolder:
    """An older run with markup and formulas in its name, criteria and warnings; its last criterion has no match."""
    study = richest(posts=60)
    criteria = [EVIL, "=1+1", *study.criterion_ids[2:]]
    labels = np.where(study.criterion == len(criteria) - 1, 0, study.labels)
    study = replace(study, run='<b onclick="x">&amp;\'#', criterion_ids=criteria, labels=labels.astype(np.int8))
    folder = folder_of(study, tmp_path_factory.mktemp("runs"), warnings=[f"beware: {EVIL}"], recorded=False)
    publish(folder)
    return folder


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        (self.scripts if self.elements and self.elements[-1][0] == "script" else self.texts).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if attributes.get(name) is not None]


@pytest.fixture(scope="module", params=["run", "hostile"])
def page(request) -> Page:
    return Page(request.getfixturevalue(request.param).page.read_text())


def test_the_page_is_small_and_sealed(run, page):
    assert run.page.stat().st_size <= 1_500_000
    (policy,) = [one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    (script,) = page.scripts[:1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'")
    assert len(script) <= 2048
    assert not re.search("localStorage|cookie|fetch|XMLHttpRequest|import", script)


def test_the_page_refers_to_nothing_outside(page):
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    assert not page.values("src")
    assert all(target.startswith("#") for target in page.values("href"))
    style = "".join(page.texts)
    assert "@import" not in style
    assert all(value.startswith("url(#") for value in re.findall(r"url\([^)]*", " ".join(page.values("clip-path"))))


def test_ids_are_unique_and_every_reference_has_its_target(page):
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 100
    references = [target[1:] for target in page.values("href")]
    references += re.findall(r"url\(#([^)]+)\)", " ".join(page.values("clip-path")))
    references += " ".join(page.values("aria-labelledby")).split()
    assert set(references) <= set(ids)


def test_every_figure_has_a_title_a_finding_and_the_table_behind_it(run):
    text = run.page.read_text()
    figures = re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL)
    assert len(figures) == FIGURES == len(list(run.figures.iterdir()))
    titles = set()
    for figure in figures:
        assert figure.count("<svg ") == 1 == figure.count('role="img"')
        titles.add(re.search(r"<title id=[^>]*>([^<]+)</title>", figure)[1])
        finding = re.search(r"<desc id=[^>]*>([^<]+)</desc>", figure)[1]
        assert finding.endswith(".")
        details = figure[figure.index("<details") :]
        assert details.count("<tr>") + details.count("<tr class") >= 3
        # Its texts are text, so that they can be selected and found.
        assert len(re.findall("<text", figure)) > 4
    assert len(titles) == FIGURES


def test_the_sections_have_their_order_and_the_verdict_comes_first(run):
    text = run.page.read_text()
    names = re.findall(r"<h2[^>]*>(\d+)\. ([^<]+)</h2>", text)
    assert [int(number) for number, _ in names] == list(range(1, 16))
    assert [name for _, name in names][:3] == ["Verdict", "Checks", "Operating points"]
    evaluation = json.loads(run.evaluation.read_text())
    for sentence in evaluation["verdict"]["sentences"]:
        assert f"<p>{sentence}</p>" in text
    for made in ("report.html", "report.md", "model_card.md"):
        assert "Research use, not for diagnosis." in (run.root / made).read_text()


def test_equal_folders_give_equal_bytes_wherever_they_are(run, tmp_path, monkeypatch):
    before = made_files(run)
    copy = RunFolder(tmp_path / "elsewhere" / run.root.name)
    shutil.copytree(run.root, copy.root, ignore=shutil.ignore_patterns(*MADE, "tables", "figures"))
    monkeypatch.chdir(tmp_path)
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        publish(copy)
    assert made_files(copy) == before


def test_no_output_holds_text_secrets_or_places_of_the_machine(run):
    assert CANARY in run.fold(0).predictions.read_text()
    for name, content in made_files(run).items():
        for private in (CANARY, "hunter2", "myhost", str(run.root.parent)):
            assert private.encode() not in content, name


def test_markup_in_names_and_warnings_is_text_everywhere(hostile):
    text = hostile.page.read_text()
    found = Page(text)
    assert not {"img", "b"} & {tag for tag, _ in found.elements}
    assert not found.values("onclick")
    assert not found.values("onerror")
    assert text.count("</script>") == 1
    # It is there, as text: in the table of criteria, in the figure, in the warning.
    assert "".join(found.texts).count("<img src=x onerror=alert(1)>") >= 3
    for figure in hostile.figures.iterdir():
        assert "<img" not in figure.read_text()
    for name in ("report.md", "model_card.md"):
        # Blocks of code, which are indented, show markup as it is.
        body = re.sub(r"(?m)^    .*$", "", (hostile.root / name).read_text().split("\n---\n")[-1])
        assert not re.search(r"<[a-z/]", body), name
        assert r"\[a\]" in body
        assert "[a]" not in body
        assert "://evil" not in body
    table = (hostile.tables / "criteria.tex").read_text()
    assert r"\input" not in table
    assert r"\textbackslash{}input\{x\}" in table
    rows = list(csv.DictReader((hostile.tables / "criteria.csv").open(newline="")))
    assert {row["criterion"] for row in rows} >= {"'=1+1", EVIL}


def test_what_is_undefined_or_not_recorded_is_said(hostile):
    rows = list(csv.DictReader((hostile.tables / "criteria.csv").open(newline="")))
    (empty,) = [row for row in rows if row["matched"] == "0"]
    assert (empty["f1"], empty["recall"], empty["roc_auc"]) == ("", "", "")
    text = hostile.page.read_text()
    assert "undefined" in text[text.index('id="criteria"') : text.index('id="slices"')]
    assert "Whether a post was shortened is not recorded." in text
    assert "Scores of TF-IDF and a logistic regression are not recorded." in text
    assert "data.dir=&lt;folder&gt;" in text


@pytest.mark.parametrize(
    ("labels", "scores"),
    [([1, 0, 1, 0, 0, 0], [0.5] * 6), ([0] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 1]), ([1] * 6, [0, 0, 0, 0, 1, 1])],
    ids=["one score", "no match", "all match"],
)
@pytest.mark.filterwarnings("error")
def test_a_run_that_shows_nothing_has_a_page_too(tmp_path, labels, scores):
    folder = folder_of(study_of(labels, scores, [0, 0, 1, 1, 0, 1], run="odd"), tmp_path)
    evaluation = publish(folder)
    assert evaluation["verdict"]["sentences"][0] in folder.page.read_text()
    assert len(list(folder.figures.iterdir())) == FIGURES - 1, "all but the learning curves"


def test_the_curves_only_rise(run):
    rows = list(csv.DictReader((run.tables / "roc.csv").open(newline="")))
    for name in ("false_positive_rate", "recall"):
        values = [float(row[name]) for row in rows]
        assert values == sorted(values)
        assert values[-1] == 1
    assert len(rows) > 26, "the page shows a part, the file all of it"


def test_a_table_is_the_same_in_each_form():
    columns = [Column("name", "a & b"), Column("value", "value", "metric"), Column("rest", "rest", "difference")]
    rows = [["x|y", Estimate(0.5, 0.25, 0.75), -0.5], ["-1", None, None], ["\t=2", Estimate(0.25, None, None), 1.0]]
    table = Table("t", "50 % of\nall", columns, rows)
    assert list(csv.reader(io.StringIO(csv_of(table)))) == [
        ["name", "value", "value_low", "value_high", "rest"],
        ["x|y", "0.5", "0.25", "0.75", "-0.5"],
        ["-1", "", "", "", ""],
        ["'\t=2", "0.25", "", "", "1.0"],
    ]
    assert markdown_of(table).splitlines()[2:] == [
        r"| x\|y | 0.500 (0.250 to 0.750) | -0.500 |",
        "| -1 | undefined | undefined |",
        "| =2 | 0.250 | +1.000 |",
    ]
    assert latex_of(table) == (
        "% 50 \\% of all. Needs \\usepackage{booktabs}.\n\\begin{tabular}{lrr}\n\\toprule\n"
        "a \\& b & value & rest \\\\\n\\midrule\n"
        "x\\textbar{}y & 0.500 (0.250 to 0.750) & -0.500 \\\\\n"
        "-1 & undefined & undefined \\\\\n=2 & 0.250 & +1.000 \\\\\n\\bottomrule\n\\end{tabular}\n"
    )


@pytest.mark.parametrize(
    ("text", "markdown", "latex"),
    [
        ("a_b*c", r"a\_b\*c", r"a\_b*c"),
        ("[x](y)", r"\[x\](y)", "[x](y)"),
        ("# 50 %", r"\# 50 %", r"\# 50 \%"),
        ("- item", r"\- item", "- item"),
        ("1. item", r"1\. item", "1. item"),
        ("a\n\n# b", r"a \# b", r"a \# b"),
        ("`x` ~y~ $z$", r"\`x\` \~y\~ \$z\$", r"`x` \textasciitilde{}y\textasciitilde{} \$z\$"),
        ("https://a.b <c>", "https&#58;//a.b &lt;c&gt;", r"https://a.b \textless{}c\textgreater{}"),
        ("\\end{tabular}", r"\\end\{tabular\}", r"\textbackslash{}end\{tabular\}"),
    ],
)
def test_text_stays_text_in_markdown_and_latex(text, markdown, latex):
    assert for_markdown(text) == markdown
    assert for_latex(text) == latex


def test_the_model_card_is_one_that_the_hub_reads(run):
    from huggingface_hub import ModelCard

    card = ModelCard((run.root / "model_card.md").read_text())
    evaluation = json.loads(run.evaluation.read_text())
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["f1"] == evaluation["verdict"]["f1"]["value"]
    assert card.data.to_dict()["library_name"] == "peft"
    assert "[to fill in]" in card.text.replace("\\", "")


def test_the_terminal_shows_table_and_verdict_on_one_screen(run, monkeypatch):
    monkeypatch.chdir(run.root.parent.parent)
    evaluation = json.loads(run.evaluation.read_text())
    report = summarize("mine", [FoldResult.of(run, fold) for fold in range(5)], 5)
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table(report))
    lines = verdict_lines(evaluation, run)
    assert [line.partition(":")[0] for line in lines.splitlines()] == [
        "Honest F1", "Best floor", "Weakest F1", "Checks", "Page",
    ]  # fmt: skip
    assert f"{evaluation['verdict']['f1']['value']:.3f} (" in lines
    assert all(len(line) <= 80 for line in lines.splitlines()[:-1])
    # Five lines with the places of report, checkpoint and MLflow follow.
    assert len(console.file.getvalue().splitlines()) + len(lines.splitlines()) + 5 <= 24


def test_a_fault_in_the_page_loses_no_run(run, tmp_path):
    folder = RunFolder(tmp_path / run.root.name)
    shutil.copytree(run.root, folder.root)
    (folder.fold(1).predictions).write_text("damaged")
    printed = io.StringIO()
    opened = OpenRun(None, folder, None, "", Console(file=printed, width=200))
    assert opened.make_page() is None
    assert "Warning: the page of the run could not be made" in printed.getvalue()
    assert f"python -m raycv.report run={run.root.name} dir={tmp_path}" in printed.getvalue()


def test_the_command_makes_the_page_again_and_prints_the_verdict(run, tmp_path, capsys):
    folder = RunFolder(tmp_path / run.root.name)
    shutil.copytree(run.root, folder.root, ignore=shutil.ignore_patterns(*MADE, "tables", "figures"))
    make_page(ReportConfig(run="latest", dir=str(tmp_path), data={"dir": None}, bundle=None, check=None))
    assert made_files(folder) == made_files(run)
    assert capsys.readouterr().out.startswith("run=latest is mine\nHonest F1:")
    with refuses("run-missing", f"{tmp_path} holds no run mime", "did you mean mine"):
        make_page(ReportConfig(run="mime", dir=str(tmp_path), data={"dir": None}, bundle=None, check=None))


CHROMIUM = shutil.which("chromium")
RUNNER = """
const button = document.querySelector("#criteria th:nth-child(3) button");
button.click();
const cells = document.querySelectorAll("#criteria tbody tr td:nth-child(3)");
const result = {
  order: button.parentElement.getAttribute("aria-sort"),
  column: [...cells].map((cell) => Number(cell.textContent.replace(",", ""))),
  width: innerWidth,
  beside: document.documentElement.scrollWidth - document.documentElement.clientWidth,
};
for (const one of document.querySelectorAll("details")) one.open = true;
axe.run().then((found) => {
  result.violations = found.violations.map((one) => [one.id, one.nodes.map((node) => node.html)]);
  parent.postMessage(JSON.stringify(result), "*");
});
"""
FRAME = """<iframe src="page.html" width={width} height=900></iframe><pre></pre>
<script>
addEventListener("message", (event) => {{ document.querySelector("pre").textContent = event.data; }});
</script>"""
"""A window of headless Chromium cannot be as narrow as a telephone, but a frame in it can."""


def chromium(*arguments: str) -> subprocess.CompletedProcess:
    if CHROMIUM is None:
        pytest.skip("chromium is missing: apt-get install chromium")
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--enable-logging=stderr"]
    return subprocess.run([CHROMIUM, *always, *arguments], capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.core
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_axe_finds_nothing_and_the_tables_sort_in_a_browser(run, tmp_path, width, scheme):
    found = find_spec("axe_core_python")
    if found is None:
        pytest.skip("axe is missing: make install")
    axe = (Path(found.origin).parent / "axe.min.js").read_text()
    # axe runs as a script of the page, which the page's own policy forbids.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", run.page.read_text())
    scripts = f"<script>{axe}</script><script>{RUNNER}</script></body>"
    (tmp_path / "page.html").write_text(text.replace("</body>", scripts))
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    preferred = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    done = chromium(preferred, "--window-size=1500,900", "--dump-dom", f"file://{tmp_path}/frame.html")
    outcome = json.loads(unescape(re.search("<pre>(.*?)</pre>", done.stdout, flags=re.DOTALL)[1]))
    assert outcome["width"] == width
    assert outcome["violations"] == []
    assert outcome["beside"] == 0, "the page scrolls sideways"
    assert outcome["order"] == "ascending"
    assert outcome["column"] == sorted(outcome["column"])


@pytest.mark.slow
@pytest.mark.core
def test_the_page_works_in_the_sandboxed_frame_of_mlflow(run, tmp_path):
    """The frame has no origin, so cookies and storage throw there. The policy must let the page's script run."""
    shutil.copy(run.page, tmp_path / "page.html")
    frame = '<iframe sandbox="allow-scripts" src="page.html" width=400 height=900></iframe>'
    (tmp_path / "frame.html").write_text(frame)
    done = chromium("--dump-dom", f"file://{tmp_path}/frame.html")
    assert "<iframe" in done.stdout
    assert not re.search("CONSOLE|Refused|violat", done.stderr), done.stderr


def test_the_end_of_a_run_says_each_check_in_words_within_80_columns(tmp_path):
    study = richest(posts=45)
    folder = folder_of(study, tmp_path)
    evaluation = evaluate(study, 20)
    verdict = {**evaluation["verdict"], "checks": [check["code"] for check in evaluation["checks"]]}
    said = verdict_lines({**evaluation, "verdict": verdict}, folder).splitlines()
    for check in evaluation["checks"]:
        assert any(line.endswith(f"{check['code']} {check['title']}") for line in said)
    assert [line for line in said if len(line) > 80 and "Page:" not in line] == []
    assert "Checks:        none found anything" in verdict_lines(
        {**evaluation, "verdict": {**verdict, "checks": []}}, folder
    )


def test_the_page_shows_a_list_as_the_command_line_takes_it():
    facts = facts_from("a", {"model": {"target_modules": ["q", "k"]}}, {}, {}, {"warnings": [], "control": False})
    ((key, value),) = facts["config"]
    assert compose_checked("run", RunConfig, [f"{key}={value}"]).model.target_modules == ["q", "k"]
