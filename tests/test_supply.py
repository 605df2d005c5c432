"""What is installed: exactly the lock, which fits what the package asks for, with a license for each package."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"


def pins() -> dict[str, str]:
    return {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in LOCK.read_text().split())
    }


def steps(target: str, *variables: str) -> str:
    """What `make target` would run, in a checkout where nothing is installed yet."""
    return subprocess.run(
        ["make", "--dry-run", "--always-make", target, *variables], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("target", ["test", "test-slow", "check", "docs", "quickstart"])
def test_everything_is_installed_from_the_lock(target: str) -> None:
    """`.ci/run` is these targets and nothing else."""
    installs = [line for line in steps(target).splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert "-r requirements.lock" in installs[0]
    assert "--no-deps --no-build-isolation -e ." in installs[1]


def test_ci_runs_the_targets_alone() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test", "make test-slow"]


def test_each_line_of_the_lock_is_one_version() -> None:
    lines = LOCK.read_text().split()
    assert len(lines) == len(pins()) > 100
    assert all(line.count("==") == 1 and "*" not in line for line in lines)


def test_the_lock_holds_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = [*project["project"]["dependencies"], *extras["dev"], *extras["docs"]]
    for requirement in map(Requirement, [*asked, *project["build-system"]["requires"]]):
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def test_each_locked_package_is_listed_with_its_license() -> None:
    script = [sys.executable, "scripts/licenses.py", "requirements.lock"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert {canonicalize_name(name): version for name, version, _ in rows} == pins()
    found = {canonicalize_name(name): license_name for name, _, license_name in rows}
    assert "BSD-3-Clause" in found["torch"]
    assert found["ray"].startswith("Apache")
    assert found["mlflow"].startswith("Apache")
    # Both state it in a file alone: MIT.
    assert {name for name, license_name in found.items() if license_name == "not stated"} <= {"huey", "skops"}
    # docutils' sources hold an editor mode under the GPL, which its package does not install.
    assert {name for name, license_name in found.items() if "GPL" in license_name} == {"docutils"}
    assert not [file for file in metadata.files("docutils") or [] if file.suffix == ".el"]
    assert all(metadata.version(name) for name in found)


def test_the_audit_says_when_it_could_not_look() -> None:
    """Without a network: a proxy that is not there."""
    environment = {"PATH": "/usr/bin:/bin", "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        ["make", "audit", f"PYTHON={sys.executable}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert "NOTHING WAS CHECKED" in done.stdout
    assert "pip-audit --strict --no-deps --disable-pip --progress-spinner off -r requirements.lock" in steps("audit")
