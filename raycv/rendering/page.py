"""Turns sections into HTML and Markdown by the files in `templates/`, which hold style and colours."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from raycv.rendering.blocks import Section, code_block, for_markdown, markdown_of, shown

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def html_of(head: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Returns the page: one file that loads nothing, and whose only script is named by its hash.

    Args:
        head: run, subtitle, notice and control.
        sections: The sections in their order.
    """
    script = _text("sort.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    texts = {"script": script, "script_hash": digest, "style": _text("page.css")}
    return _environment(True).get_template("page.html.j2").render(**head, sections=sections, **texts)


def markdown_page(head: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Returns the same sections as Markdown."""
    return rendered("report.md.j2", **head, sections=sections)


def rendered(template: str, **values: Any) -> str:
    """Returns a Markdown template with its values. Its filters escape them."""
    text = _environment(False).get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


@cache
def _environment(html: bool) -> "Environment":
    from jinja2 import DictLoader, Environment, StrictUndefined

    names = ("page.html.j2", "report.md.j2", "model_card.md.j2")
    environment = Environment(
        loader=DictLoader({name: _text(name) for name in names}),
        autoescape=html,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    markdown: dict[str, Any] = {
        "md": lambda value: for_markdown(str(value)),
        "md_table": markdown_of,
        "code": code_block,
    }
    environment.filters.update({"shown": shown, "numbers": _with_soft_interval} if html else markdown)
    return environment


def _with_soft_interval(text: str) -> "Markup":
    """Sets an interval in softer colour than its number."""
    from markupsafe import Markup, escape

    found = re.fullmatch(r"(\S+) (\(\S+ to \S+\))", text)
    return Markup("{} <span>{}</span>").format(*found.groups()) if found else escape(text)


@cache
def _text(name: str) -> str:
    return (files("raycv.rendering") / "templates" / name).read_text(encoding="utf-8")
