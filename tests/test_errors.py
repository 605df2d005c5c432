"""Each error has a stable kind, which the message shows at its end and the docs explain."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from support.refusals import refuses

from raycv.errors import KINDS, ErrorKind, FaultsError, RunFailedError, UserError, known_kind, last_line, together
from raycv.resources.nodes import NodeError

ROOT = Path(__file__).parent.parent
CODE = [path for path in (ROOT / "raycv").rglob("*.py") if path.name != "errors.py"]
TESTS = [path for path in (ROOT / "tests").glob("*.py") if path.name != Path(__file__).name]


def texts(node: ast.AST, *, given: bool) -> Iterator[str]:
    """The text constants below `node`; with `given`, those that a test makes an error with (kind=...) too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value
        if given or not (isinstance(child, ast.keyword) and child.arg == "kind"):
            yield from texts(child, given=given)


def texts_of(paths: list[Path], *, given: bool) -> set[str]:
    return {text for path in paths for text in texts(ast.parse(path.read_text(encoding="utf-8")), given=given)}


def kinds_in(found: set[str]) -> set[str]:
    """The kinds among `found`: a kind by itself, or the last line of a message."""
    return {kind for text in found for kind in text.removeprefix("Kind: ").split(", ")}


def test_each_kind_is_raised_documented_and_asserted() -> None:
    page = (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")
    assert set(KINDS) == set(get_args(ErrorKind))
    assert set(KINDS) - texts_of(CODE, given=True) == set(), "raised nowhere"
    assert set(KINDS) - kinds_in(texts_of(TESTS, given=False)) == set(), "asserted by no test"
    assert [kind for kind in KINDS if f"\n| `{kind}` | {' | '.join(KINDS[kind])} |\n" not in page] == []


def test_a_kind_that_a_test_only_makes_an_error_with_is_not_asserted() -> None:
    made = ast.parse('UserError("x", kind="run-busy")\nassert caught.value.kind == "run-failed"')
    assert list(texts(made, given=False)) == ["x", "run-failed"]
    assert list(texts(made, given=True)) == ["x", "run-busy", "run-failed"]


def held_by_prose(code: str, errors: set[str]) -> list[int]:
    """The lines of `code` where pytest.raises expects one of `errors` by the words of its message."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and node.args]
    raises = [call for call in calls if ast.unparse(call.func) == "pytest.raises"]
    found = [call for call in raises if {ast.unparse(part) for part in ast.walk(call.args[0])} & errors]
    return [call.lineno for call in found if any(keyword.arg == "match" for keyword in call.keywords)]


def test_tests_expect_a_refusal_by_its_kind() -> None:
    """As support.refusals does: the wording may change."""
    nodes = [node for path in (ROOT / "raycv").rglob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    errors = {node.name for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith("Error")}
    assert {"UserError", "FaultsError", "NodeError"} <= errors
    assert held_by_prose("with pytest.raises((OSError, UserError), match='x'): pass", errors) == [1]
    assert held_by_prose("with pytest.raises(OSError, match='x'): pass", errors) == []
    paths = (ROOT / "tests").rglob("*.py")
    assert [path.name for path in paths if held_by_prose(path.read_text(encoding="utf-8"), errors)] == []


@pytest.mark.parametrize(("kind", "part"), [("run-busy", "run=a"), ("run-missing", "run=b")])
def test_refuses_sees_another_kind_and_a_part_that_is_not_there(kind: str, part: str) -> None:
    error = UserError("No run.", kind="run-missing", remedies=["run=a"])
    with refuses("run-missing", "run=a"):
        raise error
    with pytest.raises(AssertionError), refuses(kind, part):
        raise error


@pytest.mark.parametrize(
    ("remedies", "shown"),
    [
        ([], "No run.\n  Kind: run-missing"),
        (["run=a"], "No run.\n  What to do: run=a\n  Kind: run-missing"),
        (["run=a", "run=b"], "No run.\nWhat to do:\n  1. run=a\n  2. run=b\n  Kind: run-missing"),
    ],
)
def test_a_message_ends_with_its_kind(remedies: list[str], shown: str) -> None:
    error = UserError("No run.", kind="run-missing", remedies=remedies)
    assert str(error) == shown
    assert (error.kind, error.kinds) == ("run-missing", ("run-missing",))


def test_a_joined_error_has_each_kind_once_in_order() -> None:
    errors = [
        UserError("a", kind="disk-full"),
        FaultsError("b", ["c"], kind=("data-label", "disk-full")),
        UserError("d", kind="data-label"),
    ]
    joined = together(errors)
    assert joined.kinds == ("disk-full", "data-label")
    assert str(joined).splitlines()[-1] == "  Kind: disk-full, data-label"
    assert together(errors[:1]) is errors[0]


@pytest.mark.parametrize(
    "error",
    [
        UserError("a", kind=("data-id", "data-label"), remedies=["b"]),
        RunFailedError("a", kind="run-failed"),
        NodeError("a", "node", remedies=["b", "c"]),
    ],
)
def test_the_kind_travels_between_processes(error: UserError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert (there.kinds, there.what, there.remedies) == (error.kinds, error.what, error.remedies)
    assert str(there) == str(error)


def test_a_kind_of_another_version_is_replaced() -> None:
    assert known_kind("data-label", "run-failed") == "data-label"
    assert [known_kind(name, "run-failed") for name in ("data-lable", None, ["data-label"])] == ["run-failed"] * 3


def test_the_last_line_of_an_error_is_not_its_kind() -> None:
    assert last_line(RuntimeError(f"replica died\n{UserError('no GPU', kind='gpu-unusable')}\n")) == "no GPU"
    assert last_line(RuntimeError("")) == "RuntimeError"
