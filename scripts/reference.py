"""Writes the pages of the docs that come from code: commands and keys, kinds of error, modules.

python -m scripts.reference             writes them
python -m scripts.reference --check     writes nothing, fails if one is out of date
"""

import argparse
import ast
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from raycv.config.command_line import groups_of, help_header, shown_values
from raycv.config.schema import Section
from raycv.config.validation import fields, meaning, without_requirements
from raycv.errors import KINDS, UserError
from scripts.doc_commands import plain_environment
from scripts.markdown import ROOT, name_of
from scripts.words import commands

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
        lines += [f"## raycv.{name}", "", "```text", help_header(name), "```", "", *_groups(name)]
        lines += [*_keys(name, schema), ""]
    return "\n".join(lines).rstrip() + "\n"


def _groups(command: str) -> list[str]:
    choices = {group: files for group, files in groups_of(command).items() if len(files) > 1 or group == "experiment"}
    rows = [_row(f"`{group}=`", ", ".join(f"`{one}`" for one in files)) for group, files in choices.items()]
    return ["A group sets several keys at once:", "", "| group | files |", "| --- | --- |", *rows, ""] if rows else []


def _keys(command: str, schema: type[Section]) -> list[str]:
    table = ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    with plain_environment():
        values = shown_values(command, [])
    for key, field in fields(schema):
        if field.description:
            default = "must be given" if values[key] == "???" else f"`{values[key]}`"
            table.append(_row(f"`{key}`", default, allowed(field), meaning(field).partition(" [")[0]))
    return table


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


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
            purpose = without_requirements(" ".join(words.split()))
            folders.setdefault(name_of(path.parent), []).append(_row(f"`{name_of(path)}`", purpose))
    for folder, rows in folders.items():
        lines += [f"## {folder}", "", "| module | purpose |", "| --- | --- |", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def errors_page() -> str:
    """Every kind of error with its cause and cure."""
    lines = [
        NOTICE,
        "",
        "# Kinds of error",
        "",
        "Each error ends with its kind, a short name that stays the same when the wording changes:",
        "",
        "```text",
        str(UserError("The folder /data/runs holds no run.", kind="run-missing", remedies=["run=<name>"])),
        "```",
        "",
        "- An error that reports several faults names each of their kinds once.",
        "- A refusal of a [scorer](../guides/serving.md) has the field `kind`, and so has the `error.json` of a fold.",
        "- In Python, `kind` of a `raycv.errors.UserError` is the first kind, and `kinds` has all.",
        "",
        "The message itself names the place, the value and the command that helps.",
        "",
        "| kind | cause | cure |",
        "| --- | --- | --- |",
        *(_row(f"`{kind}`", cause, cure) for kind, (cause, cure) in sorted(KINDS.items())),
    ]
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/commands.md": commands_page,
    "docs/reference/errors.md": errors_page,
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
    old = outdated()
    if options.check and old:
        raise SystemExit(f"out of date: {', '.join(old)}; write them: python -m scripts.reference")
    for name in old:
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_text(PAGES[name](), encoding="utf-8")


if __name__ == "__main__":
    main()
