"""Checks that no link of the docs is broken, and that reading them needs no network.

    python -m scripts.links build/docs

In the built pages each link, picture, script and style has its file, and each `#anchor` its place; nothing is loaded
from the web. In README and its companions each relative link has its file and its heading. Links to the web are not
fetched.
"""

import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from scripts.markdown import ROOT, anchors, links, name_of

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("object", "data")}
"""Attributes that a browser fetches without a click."""


class _Page(HTMLParser):
    """The ids of a page, and what it refers to: tag, attribute, target."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[tuple[str, str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src", "data") and value:
                self.targets.append((tag, name, value))


@cache
def _page(path: Path) -> _Page:
    return _Page(path)


def broken_in_html(built: Path) -> Iterator[str]:
    """What is wrong with the pages in `built`."""
    for path in sorted(built.rglob("*.html")):
        for tag, attribute, target in _page(path).targets:
            parts = urlsplit(target)
            place = f"{path.relative_to(built)}: {target}"
            if parts.scheme or parts.netloc:
                if (tag, attribute) in LOADED and parts.scheme != "data":
                    yield f"{place}: would be loaded from the web"
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not file.is_file():
                yield f"{place}: there is no such file"
            elif parts.fragment and file.suffix == ".html" and unquote(parts.fragment) not in _page(file).ids:
                yield f"{place}: there is no such anchor"


def broken_in_markdown(path: Path) -> Iterator[str]:
    """What is wrong with the relative links of a Markdown file that is read as it stands."""
    for line, target in links(path):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        place = f"{name_of(path)}:{line}: {target}"
        file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not file.exists():
            yield f"{place}: there is no such file"
        elif parts.fragment and (file.suffix != ".md" or parts.fragment not in anchors(file)):
            yield f"{place}: there is no such heading"


def main(built: Path) -> None:
    """Prints every broken link; exit code 1 if there is one."""
    pages = len(list(built.rglob("*.html")))
    if not pages:
        raise SystemExit(f"there are no pages in {built}: make docs")
    found = list(broken_in_html(built))
    found += [fault for path in sorted(ROOT.glob("*.md")) for fault in broken_in_markdown(path)]
    print("\n".join(found) or f"the links of {pages} pages and of README hold")  # noqa: T201
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
