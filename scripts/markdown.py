"""Markdown as the checks of the docs need it: passages of prose, blocks of code, inline code, headings, links."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
ADMONITIONS = ("{note}", "{tip}", "{important}", "{warning}")
CODE = "`code`"
"""Stands for inline code in a passage, so that it counts as one word."""


@dataclass(frozen=True)
class Passage:
    """A piece of prose: a paragraph, a heading, an item of a list, a cell of a table, the meaning of a key."""

    where: str
    text: str


def pages() -> list[Path]:
    """The Markdown files of the product: README, its companions, and docs."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path: Path) -> str:
    """`path` as messages name it: from the root of the checkout."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def tokens(text: str) -> Iterator[tuple[int, Token]]:
    """Each block of `text` with its line (from 1); an admonition's content is read like the text around it."""
    line = 1
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        # A cell has no line of its own: it stands in that of its row.
        line = token.map[0] + 1 if token.map else line
        if token.type == "fence" and token.info.startswith(ADMONITIONS):
            yield from ((line + inner, each) for inner, each in tokens(token.content))
        else:
            yield line, token


def passages(path: Path) -> Iterator[Passage]:
    """The prose of a file."""
    for line, token in tokens(path.read_text(encoding="utf-8")):
        if token.type == "inline":
            yield Passage(f"{name_of(path)}:{line}", _plain(token))


def _plain(token: Token) -> str:
    parts = []
    for child in token.children or []:
        if child.type == "code_inline":
            parts.append(CODE)
        elif child.type in ("softbreak", "hardbreak"):
            parts.append(" ")
        elif child.type in ("text", "image"):
            parts.append(child.content)
    return "".join(parts)


def code_blocks(path: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line and content of each block of code in `language`."""
    for line, token in tokens(path.read_text(encoding="utf-8")):
        if token.type == "fence" and token.info.split()[:1] == [language]:
            yield line + 1, token.content


def inline_code(path: Path) -> Iterator[tuple[int, str]]:
    """Line and content of each piece of inline code."""
    for line, token in tokens(path.read_text(encoding="utf-8")):
        for child in token.children or []:
            if child.type == "code_inline":
                yield line, child.content


def links(path: Path) -> Iterator[tuple[int, str]]:
    """Line and target of each link and picture."""
    for line, token in tokens(path.read_text(encoding="utf-8")):
        for child in token.children or []:
            if target := child.attrs.get("href") or child.attrs.get("src"):
                yield line, str(target)


def anchors(path: Path) -> set[str]:
    """The anchors of a file's headings, as GitHub and MyST make them."""
    found = set()
    heading = False
    for _, token in tokens(path.read_text(encoding="utf-8")):
        if heading and token.type == "inline":
            found.add(re.sub(r"[^\w\- ]", "", token.content.lower()).replace(" ", "-"))
        heading = token.type == "heading_open"
    return found
