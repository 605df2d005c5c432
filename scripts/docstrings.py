"""Docstrings, comments and other strings of Python files, as passages of prose for the check of words."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from scripts.markdown import CODE, Passage, name_of

SECTIONS = ("Args", "Returns", "Raises", "Yields", "Attributes", "Example", "Examples", "Note", "Notes")
"""The headings of a Google docstring."""
_DIRECTIVE = re.compile(r"#\s*(fmt:|noqa|type:|mypy:|ruff:|pragma:|!)")
_RULER = re.compile(r"#\s*-{3,}")
_ENTRY = re.compile(r"[*\w`., ]+(\([^)]*\))?: ")


def code_passages(path: Path) -> Iterator[Passage]:
    """The docstrings and comments of a Python file, in their order within it."""
    text = path.read_text(encoding="utf-8")
    found = sorted([*_docstrings(text), *_comments(text)])
    yield from (Passage(f"{name_of(path)}:{line}", _without_code(prose)) for line, prose in found if prose)


def string_passages(path: Path) -> Iterator[Passage]:
    """The strings of several words that are not docstrings: messages to the user are among them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    parts = [part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values]
    elsewhere = {id(node) for node in (*docstrings, *parts)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in elsewhere:
            text = _text(node)
            if " " in text:
                yield Passage(f"{name_of(path)}:{node.lineno}", _without_code(text))


def _text(node: ast.expr) -> str:
    """The text of a string, with one word for each placeholder; empty for another constant."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return CODE


def python_files(place: Path) -> list[Path]:
    """The Python files of a room, or `place` itself if it is a file."""
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def _docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Line and prose of each paragraph of each string that stands alone: docstrings of fields are such strings."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from _paragraphs(node.lineno, node.value.value)


def _paragraphs(line: int, docstring: str) -> Iterator[tuple[int, str]]:
    start, parts, in_section = line, list[str](), False
    for number, one in enumerate(docstring.splitlines(), line):
        prose = one.strip()
        section, _, rest = prose.partition(":")
        if section in SECTIONS and prose.endswith(":"):
            in_section, prose = True, ""
        elif section in SECTIONS and rest:
            prose = rest.strip()
        elif in_section and _ENTRY.match(prose):
            # The name of an entry is code, and its text a sentence of its own.
            yield start, " ".join(parts)
            start, parts = number, [prose.partition(": ")[2]]
            continue
        if not prose or prose.startswith("- "):
            yield start, " ".join(parts)
            start, parts = number, []
        if prose:
            start = start if parts else number
            parts.append(prose.removeprefix("- "))
    yield start, " ".join(parts)


def _comments(text: str) -> Iterator[tuple[int, str]]:
    """Line and prose of each comment; comments on consecutive lines of their own are one."""
    start, last, parts = 0, 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT or _DIRECTIVE.match(token.string) or _RULER.match(token.string):
            continue
        line, alone = token.start[0], not token.line[: token.start[1]].strip()
        prose = re.sub(r"\s+#\s*(fmt:|noqa|type:).*", "", token.string).lstrip("# ")
        if parts and alone and line == last + 1:
            parts.append(prose)
        else:
            yield start, " ".join(parts)
            start, parts = line, [prose]
        last = line if alone else 0
    yield start, " ".join(parts)


def _without_code(prose: str) -> str:
    """`prose` with one word for each piece of code: what is in backticks, calls, and names with an underscore."""
    prose = re.sub(r"``?[^`]+``?", CODE, prose)
    return re.sub(r"(?<![\w`])[\w.]*(\w_\w|\w=\w|\w\()[^\s]*?(?=[.,;:)]*(\s|$))", CODE, prose)
