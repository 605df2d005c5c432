"""Who may import what: rooms build on those before them, and Ray, MLflow and Hydra have a room each."""

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


def dotted(path: Path) -> str:
    """`data.splits` for raycv/data/splits.py; a room's own name for its __init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}
BASICS = {"errors", "row_faults", "utils"}
"""Single files that every room may import."""
ROOMS = (
    "common", "config", "data", "model", "training", "evaluation", "results", "resources", "rendering", "tracking",
    "inference", "batch_inference", "analysis", "serving", "orchestration", "cv",
)  # fmt: skip
"""Each may import those before it."""
COMMANDS = {"run", "aggregate", "report", "reproduce", "compare", "mistakes", "infer", "serve", "synthesize"}
"""The single files behind `python -m raycv.<command>`, which may import every room."""
FRONT = {"api", "pyfunc"}
"""The single files behind `import raycv` and `mlflow.pyfunc.load_model`, which may import every room."""
SEAMS = {
    "ray": {"orchestration"},
    "mlflow": {"tracking"},
    "hydra": {"config"},
    "omegaconf": {"config"},
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


def module_of(name: str) -> str | None:
    """The module of raycv that an imported name is, or lies in."""
    parts = name.split(".")[1:] if name.startswith("raycv.") else []
    found = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((module for module in found if module in MODULES), None)


def room_of(module: str) -> str:
    return module.partition(".")[0]


def users_of(names: set[str]) -> set[str]:
    return {module for name in names if (module := module_of(name)) is not None}


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
        # Whoever imports a module of a room runs the room's __init__ first.
        todo += [*users_of(found), *({room_of(current)} & MODULES.keys())]
    return names


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_every_module_has_a_room() -> None:
    rooms = {room_of(module) for module in MODULES if "." in module}
    assert rooms == set(ROOMS)
    assert {module for module in MODULES if "." not in module} == BASICS | COMMANDS | FRONT | set(ROOMS)
    assert len(ROOMS) <= 16


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_small_and_says_what_it_is_for(room: str) -> None:
    files = [path for path in (PACKAGE / room).glob("*.py") if path.name != "__init__.py"]
    assert 2 <= len(files) <= 9
    said = ast.get_docstring(tree(room)) or ""
    assert all(part in said for part in ("Comes in:", "Goes out:", "Does not belong here:")), said


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_those_before_it_alone(room: str) -> None:
    """Imports within functions and for types count too."""
    allowed = BASICS | set(ROOMS[: ROOMS.index(room) + 1])
    for module in MODULES:
        if room_of(module) == room:
            found = {room_of(used) for used in users_of(imported(ast.walk(tree(module))))}
            assert found <= allowed, f"{module} imports {found - allowed}"


def test_what_every_room_may_import_imports_no_room_but_common() -> None:
    for module in BASICS:
        assert {room_of(used) for used in users_of(imported(ast.walk(tree(module))))} <= BASICS | {"common"}


def test_modules_of_a_room_import_each_other_in_one_direction() -> None:
    def reached(module: str, seen: frozenset[str] = frozenset()) -> Iterator[str]:
        for used in users_of(imported(at_module_level(tree(module)))) - {module}:
            assert used not in seen, f"{module} and {used} import each other"
            yield used
            yield from reached(used, seen | {module})

    for module in MODULES:
        assert module not in set(reached(module))


@pytest.mark.parametrize("package", SEAMS)
def test_package_is_imported_in_its_room_only(package: str) -> None:
    users = {room_of(module) for module in MODULES if package in tops(imported(ast.walk(tree(module))))}
    assert users == SEAMS[package]


def private_names(path: Path) -> set[str]:
    names = imported(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return {name for name in names if name.startswith("raycv.") and re.search(r"\._[A-Za-z]", name)}


def test_nobody_imports_a_private_name() -> None:
    outside = [path for folder in ("tests", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")]
    for path in [*MODULES.values(), *outside]:
        assert private_names(path) == set(), path


def test_no_test_imports_another() -> None:
    """What several tests share is in tests/support."""
    for path in (ROOT / "tests").rglob("*.py"):
        names = imported(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        assert not [name for name in names if name.startswith("test_")], path


LIBRARIES = ("ray", "huggingface_hub", "mlflow", "transformers", "peft")
"""Their private names may go with any minor version."""


def libraries_private_names(path: Path) -> set[str]:
    """What the module at `path` imports, or reaches from an imported package, by a name that begins with `_`."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = imported(iter(nodes)) | {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    return {name for name in names if re.match(rf"({'|'.join(LIBRARIES)})(\.\w+)*\._[A-Za-z]", name)}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_private_of_a_library_is_used(module: str) -> None:
    assert libraries_private_names(MODULES[module]) == set()


def test_private_names_of_libraries_are_seen(tmp_path: Path) -> None:
    """The check of the check."""
    (tmp_path / "a.py").write_text("import ray\nfrom ray.train._internal import session\nray._private.worker.mode()\n")
    found = libraries_private_names(tmp_path / "a.py")
    assert {"ray.train._internal.session", "ray._private.worker.mode"} <= found


@pytest.mark.parametrize("room", ["data", "model", "training", "evaluation", "results"])
def test_what_does_the_work_knows_neither_ray_nor_mlflow(room: str) -> None:
    for module in MODULES:
        if room_of(module) == room:
            assert not tops(loads(module)) & {"ray", "mlflow", "hydra", "omegaconf"}, module


def test_the_walk_sees_what_is_loaded_through_others() -> None:
    """The check of the check."""
    assert "ray" in tops(loads("orchestration.ray_tune"))
    assert any(name.startswith("raycv.orchestration.fold_task.") for name in loads("orchestration.ray_tune"))
    assert {"mlflow", "ray"} <= tops(loads("orchestration.mlflow_callback"))
    assert "ray" not in tops(loads("tracking.cross_validation"))
    assert "torch" in tops(loads("training.loop"))


def test_no_module_or_room_hides_another_package() -> None:
    """`python raycv/run.py` puts this folder first on sys.path, so `import data` anywhere would find ours."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"}
    assert names >= set(ROOMS)
    assert not names & sys.stdlib_module_names
    assert not names & set(packages_distributions()) - {"raycv"}


HEAVY = ["torch", "transformers", "ray", "mlflow", "pandas", "sklearn", "matplotlib", "jinja2", "huggingface_hub"]


def test_a_refusal_needs_nothing_heavy() -> None:
    modules = ["cv.pipeline", "batch_inference.score_file", *sorted(COMMANDS | FRONT)]
    code = (
        f"import json, sys, {', '.join(f'raycv.{module}' for module in modules)}\n"
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_import_raycv_is_light_and_offers_the_python_api() -> None:
    light = [*HEAVY, "numpy", "scipy", "matplotlib", "pydantic", "yaml"]
    code = (
        "import json, sys, raycv\n"
        f"loaded = [name for name in {light} if name in sys.modules]\n"
        "print(json.dumps([loaded, [name for name in raycv.__all__ if not hasattr(raycv, name)], sorted(dir(raycv))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded, lacking, offered = json.loads(done.stdout)
    assert (loaded, lacking) == ([], [])
    assert set(offered) >= {"load_run", "compare_runs", "cross_validate", "Run", "Comparison"}
    assert (PACKAGE / "py.typed").is_file()


def test_import_writes_nothing(tmp_path: Path) -> None:
    modules = ", ".join(f"raycv.{module}" for module in MODULES if not tops(loads(module)) & {"torch", "ray", "mlflow"})
    done = subprocess.run(
        [sys.executable, "-c", f"import {modules}"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_survey_of_a_node_needs_nothing_of_raycv() -> None:
    """It is sent by value to nodes that may have another raycv, and must run there."""
    assert tops(imported(ast.walk(tree("resources.survey")))) <= sys.stdlib_module_names
