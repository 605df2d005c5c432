"""The commands of README, docs and `--help` that this machine can run: each is typed as it is written, and succeeds."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ROOT, raycv, users_environment

import raycv as api
from scripts.doc_commands import shown

NOT_RUN = {
    r"^(make|source|pip|mlflow ui|curl|RAYCV_TOKEN)": "installs, tests, or a server that stays",
    r"^ray |raycv/run\.py": "a cluster",
    r"raycv\.run (?!.*(experiment=quickstart|--help|--cfg))": "the base with 7 billion parameters, or a run to resume",
    r"raycv\.run$": "the base with 7 billion parameters",
    r"redsm5": "the data of ReDSM5",
    r"raycv\.serve(?! --help)": "a server that stays",
    r"benchmarks\.|scripts\.": "tools of the checkout",
    r"=\.\.\.": "a value is left out",
    r"(first|runs)=?.*short": "runs of the base with 7 billion parameters",
    r"runs=\[a,b\]|run=old": "names that stand for any run",
    r"require=": "the verdict is its exit code",
}
"""What is not run, with what it would need."""
COMMANDS = list(
    dict.fromkeys(
        shlex.join(words)
        for _, words in shown()
        if "-m" in words or "scripts/" in " ".join(words)
        if not any(re.search(pattern, " ".join(words)) for pattern in NOT_RUN)
    )
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with what the docs speak of: two runs, posts of the user, pairs, scores of another tool."""
    folder = tmp_path_factory.mktemp("docs")
    sample = ROOT / "data" / "sample"
    for name, files in {"my_posts": ("posts.csv", "groundtruth.csv"), "my_criteria": ("criteria.csv",)}.items():
        (folder / name).mkdir()
        for file in files:
            shutil.copy(sample / file, folder / name / file)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "pairs.csv").write_text("post,criterion\nI lie awake most of the night.,A.4\n")
    (folder / "post.txt").write_text("I lie awake most of the night.\n")
    small = ("experiment=quickstart", "cv.folds=2")
    for overrides in (("run.name=first", "train.epochs=1"), ("run.name=second", "train.epochs=2")):
        done = raycv("run", *small, *overrides, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    done = raycv("reproduce", "run=first", "folds=[0]", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = api.load_run(folder / "runs" / "first").predictions()[["post_id", "criterion_id", "score"]]
    scores.to_csv(folder / "other.csv", index=False)
    return folder


def test_what_can_be_run_is_most_of_it():
    assert len(COMMANDS) > 25, COMMANDS


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_docs_succeeds_as_it_is_written(place: Path, command: str):
    words = [re.sub("<store>", "sqlite:///other.db", re.sub("<name>", "first", word)) for word in shlex.split(command)]
    words[0] = re.sub(r"^(\.venv/bin/)?python$", sys.executable, words[0])
    for word in words:
        if word.startswith("output=") and "." in word:
            (place / word.removeprefix("output=")).unlink(missing_ok=True)
    done = subprocess.run(
        words,
        cwd=place,
        env=users_environment(),
        input="I lie awake most of the night.",
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
