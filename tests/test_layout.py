"""Who may import what: Ray, MLflow and Hydra stay at the seams, and a refusal needs nothing heavy."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import raycv

ROOT = Path(__file__).parent.parent
PACKAGE = Path(raycv.__file__).resolve().parent
MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}

SEAMS = {
    "ray": {"cv", "fold", "ray_train", "callback", "ray_scoring", "scorer"},  # callback: Ray's own for MLflow
    "mlflow": {"tracking"},
    "hydra": {"cli"},
    "omegaconf": {"cli"},
}


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Full names of what the import statements among `nodes` name."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "modules are imported by their full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def at_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run on import: no function bodies, nothing under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from (descendant for other in child.orelse for descendant in ast.walk(other))
            continue
        yield child
        yield from at_module_level(child)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def loads(module: str) -> set[str]:
    """All that importing raycv.`module` names, through other modules of raycv too."""
    seen, names, todo = set(), set(), [module]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        found = imported(at_module_level(tree(current)))
        names |= found
        todo += [parts[1] for name in found if (parts := name.split("."))[0] == "raycv" and parts[1] in MODULES]
    return names


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_there_are_modules_and_no_folders_of_them() -> None:
    assert {"run", "driver", "cv", "fold", "train", "tracking", "cli", "config"} <= set(MODULES)
    assert [path for path in PACKAGE.glob("*/*.py") if "bundled" not in path.parts] == []


@pytest.mark.parametrize("package", SEAMS)
def test_package_is_imported_at_its_seam_only(package: str) -> None:
    users = {module for module in MODULES if package in tops(imported(ast.walk(tree(module))))}
    assert users == SEAMS[package]


@pytest.mark.parametrize(
    "module", ["train", "state", "progress", "model", "checkpoint", "metrics", "encoding", "report", "data", "splits"]
)
def test_what_does_the_work_knows_neither_ray_nor_mlflow(module: str) -> None:
    assert not tops(loads(module)) & {"ray", "mlflow", "hydra", "omegaconf"}


def test_the_survey_of_a_node_needs_nothing_of_raycv() -> None:
    """It is sent by value to nodes that may have another raycv, and must run there."""
    assert tops(imported(ast.walk(tree("survey")))) <= sys.stdlib_module_names


def test_the_walk_sees_what_is_loaded_through_others() -> None:
    """The check of the check: cv loads torch-free seams, train loads torch through raycv.model."""
    assert "ray" in tops(loads("cv"))
    assert any(name.startswith("raycv.fold.") for name in loads("cv"))
    assert {"mlflow", "ray"} <= tops(loads("callback"))
    assert "ray" not in tops(loads("tracking"))
    assert "torch" in tops(loads("train"))


def test_no_module_hides_another_package() -> None:
    """`python raycv/run.py` puts this folder first on sys.path, so `import data` anywhere would find ours."""
    assert not set(MODULES) & sys.stdlib_module_names
    assert not set(MODULES) & set(packages_distributions()) - {"raycv"}


HEAVY = ["torch", "transformers", "ray", "mlflow", "pandas", "sklearn"]


def test_a_refusal_needs_nothing_heavy() -> None:
    code = (
        "import json, sys\n"
        "import raycv.run, raycv.driver, raycv.aggregate, raycv.infer, raycv.many, raycv.serve\n"
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_import_writes_nothing(tmp_path: Path) -> None:
    modules = ", ".join(f"raycv.{module}" for module in MODULES if not tops(loads(module)) & {"torch", "ray", "mlflow"})
    done = subprocess.run(
        [sys.executable, "-c", f"import {modules}"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_fault_table_names_tests_that_exist() -> None:
    """The docs, `When something fails`: each line has a test; `...` stands for a part of the name."""
    page = (ROOT / "docs" / "reference" / "failures.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| fault "))]
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
