"""What is recorded of the environment."""

import shutil
import subprocess
import sys
from pathlib import Path

import raycv
from raycv.utils import describe_environment


def test_the_commit_is_that_of_raycvs_own_checkout_and_of_no_other(tmp_path):
    """Installed in somebody's repository, raycv must not pass that repository's commit off as its own."""
    own = tmp_path / "own"
    shutil.copytree(Path(raycv.__file__).parent, own / "raycv", ignore=shutil.ignore_patterns("__pycache__"))
    foreign = shutil.copytree(own / "raycv", tmp_path / "foreign" / "site" / "raycv").parent
    for repository in (own, tmp_path / "foreign"):
        git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run([*git, "init", "--quiet"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    code = "from raycv.utils import describe_environment; print(describe_environment()['git'] is not None)"
    for folder, expected in ((own, "True"), (foreign, "False")):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected, folder


def test_versions_and_hardware_are_there():
    found = describe_environment()
    assert found["packages"]["torch"]
    assert found["cpus"] >= 1
    assert found["memory_bytes"] > 1e9
