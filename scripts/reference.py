"""Writes the pages of the docs that come from code: commands and keys, modules.

python -m scripts.reference             writes them
python -m scripts.reference --check     writes nothing, fails if one is out of date
"""

import argparse
import ast
import os
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import yaml
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from raycv.config.command_line import compose
from raycv.config.schema import Section
from raycv.config.validation import fields, meaning
from scripts.doc_commands import SET_OUTSIDE
from scripts.markdown import ROOT, name_of
from scripts.words import commands, help_header

NOTICE = "<!-- Written by python -m scripts.reference: edit the code that it comes from. -->"


def commands_page() -> str:
    """Every command: what it does, its groups of keys, and each key with default, allowed values and meaning."""
    lines = [
        NOTICE,
        "",
        "# Commands and keys",
        "",
        "Each command takes `key=value` arguments:",
        "",
        "- `--help` prints the keys of a command.",
        "- `--cfg job` checks the arguments and prints the resolved config as YAML.",
        "- raycv refuses unknown keys, wrong types and impossible values before any work, all in one message.",
        "",
        "The folder `configs/` holds the defaults. `raycv/config/schema.py` holds the meanings and the allowed values.",
        "",
    ]
    for name, schema in commands().items():
        lines += [f"## raycv.{name}", "", "```text", help_header(name).rstrip(), "```", "", *_groups(name)]
        lines += [*_keys(name, schema), ""]
    return "\n".join(lines).rstrip() + "\n"


def _groups(command: str) -> list[str]:
    file = yaml.safe_load((ROOT / "configs" / f"{command}.yaml").read_text(encoding="utf-8"))
    named = [next(iter(entry)) for entry in file["defaults"] if isinstance(entry, dict)]
    rows = []
    for group in (name for name in named if " " not in name):
        files = sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))
        if len(files) > 1 or group == "experiment":
            rows.append(f"| `{group}=` | {', '.join(f'`{one}`' for one in files)} |")
    return ["A group sets several keys at once:", "", "| group | files |", "| --- | --- |", *rows, ""] if rows else []


def _keys(command: str, schema: type[Section]) -> list[str]:
    values = compose(command, [], missing_ok=True)
    table = ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for key, field in fields(schema):
        if not field.description:
            continue
        value: Any = values
        for part in key.split("."):
            value = value[part]
        said = meaning(field).partition(" [")[0]
        table.append(_row(f"`{key}`", _default(value), allowed(field), said))
    return table


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(value: Any) -> str:
    if value == "???":
        return "must be given"
    shown = yaml.safe_dump(value, default_flow_style=True, width=200).splitlines()[0]
    return f"`{shown}`"


def allowed(field: FieldInfo) -> str:
    """The values that a key takes, in words."""
    annotation: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return ", ".join(dict.fromkeys(_in_words(TypeAdapter(annotation).json_schema())))


def _in_words(schema: dict[str, Any]) -> list[str]:
    if "anyOf" in schema:
        return [words for each in schema["anyOf"] for words in _in_words(each)]
    if "enum" in schema:
        return [f"`{value}`" for value in schema["enum"]]
    if "const" in schema:
        return [f"`{schema['const']}`"]
    kind = {"integer": "whole number", "string": "text", "array": "list"}.get(schema["type"], schema["type"])
    if kind == "boolean":
        return ["`true`", "`false`"]
    if kind == "null":
        return ["`null`"]
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    # The room of an integer needs no mention.
    named = [f"{word} {schema[bound]:,}" for bound, word in bounds.items() if schema.get(bound, 2**31) < 2**31]
    return [" ".join([kind, *named])]


def modules_page() -> str:
    """Every module with the first sentence of its docstring."""
    lines = [NOTICE, "", "# Modules", "", "Each module with the first lines of its docstring.", ""]
    folders: dict[str, list[str]] = {}
    for path in sorted((ROOT / "raycv").rglob("*.py")):
        if "bundled" not in path.parts:
            words = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
            folders.setdefault(name_of(path.parent), []).append(_row(f"`{name_of(path)}`", " ".join(words.split())))
    for folder, rows in folders.items():
        lines += [f"## {folder}", "", "| module | purpose |", "| --- | --- |", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def refusals_page(kinds: Iterable[tuple[str, str, str]]) -> str:
    """Every kind of refusal with its cause and its cure. `PAGES` takes it in when the code has a list of kinds."""
    rows = [_row(f"`{kind}`", cause, cure) for kind, cause, cure in sorted(kinds)]
    lines = [NOTICE, "", "# Kinds of refusal", "", "The kind stands at the end of a message.", ""]
    return "\n".join([*lines, "| kind | cause | cure |", "| --- | --- | --- |", *rows, ""])


PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/commands.md": commands_page,
    "docs/development/modules.md": modules_page,
}


def outdated() -> list[str]:
    """The pages that are not what the code gives."""
    files = {name: ROOT / name for name in PAGES}
    return [
        name
        for name, page in PAGES.items()
        if not files[name].is_file() or files[name].read_text(encoding="utf-8") != page()
    ]


def main() -> None:
    """Writes the pages, or says which are out of date."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="write nothing, fail if a page is out of date")
    options = arguments.parse_args()
    for variable in [name for name in os.environ if name.startswith(SET_OUTSIDE)]:
        del os.environ[variable]
    old = outdated()
    if options.check and old:
        raise SystemExit(f"out of date: {', '.join(old)}; write them: python -m scripts.reference")
    for name in old:
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_text(PAGES[name](), encoding="utf-8")


if __name__ == "__main__":
    main()
