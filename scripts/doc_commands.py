"""Checks that each command in README, docs and `--help` would be accepted: command, keys, values, targets, files.

    python -m scripts.doc_commands

The commands are parsed and validated as the real ones are (`--cfg job`), and do no work. Keys and files of the checkout
in inline code are looked up too.
"""

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from unittest.mock import patch

from raycv.config.command_line import HYDRA_OPTIONS, help_header, run_command
from raycv.config.validation import fields
from scripts.markdown import ROOT, code_blocks, inline_code, name_of, pages
from scripts.words import commands

PLACEHOLDERS = {
    "<name>": "name",
    "<new name>": "name",
    "<k>": "0",
    "<folder>": "folder",
    "<store>": "sqlite:///other.db",
    "<id>": "0123456789abcdef0123456789abcdef",
}
"""What a reader replaces in a command, and something that fits there."""
ANSWERS = {"--help", "--cfg", "--version"}
"""Options under which a command prints something and does no work."""
SET_OUTSIDE = ("RAYCV_", "MLFLOW_", "RAY_")
"""Variables that change defaults: the docs are of a machine that sets none."""


@contextlib.contextmanager
def plain_environment() -> Iterator[None]:
    """Takes the variables of `SET_OUTSIDE` out of the environment meanwhile."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SET_OUTSIDE)}
    with patch.dict(os.environ, environment, clear=True):
        yield


def typed(text: str) -> Iterator[tuple[int, list[str]]]:
    """The simple commands of a block of shell with their lines: continued lines joined, `&&`, `;` and `|` split."""
    continued, start = "", 0
    for number, line in enumerate(text.splitlines()):
        start = start if continued else number
        continued += line.removesuffix("\\")
        if not line.endswith("\\"):
            words: list[str] = []
            lexer = shlex.shlex(continued, posix=True, punctuation_chars="&;|")
            lexer.whitespace_split = True
            for word in [*lexer, ";"]:
                if set(word) <= set("&;|"):
                    if words:
                        yield start, words
                    words = []
                else:
                    words.append(word)
            continued = ""


def fault(words: list[str]) -> str | None:
    """Why a command that the docs show cannot be right; None if it can."""
    text = " ".join(words)
    if unknown := set(re.findall(r"<[^<>]*>", text)) - set(PLACEHOLDERS):
        return f"unknown placeholder {', '.join(sorted(unknown))}: use one of {', '.join(PLACEHOLDERS)}"
    for placeholder, example in PLACEHOLDERS.items():
        words = [word.replace(placeholder, example) for word in words]
    if "make" in words[:1] and (missing := set(words[1:]) - _targets()):
        return f"the Makefile has no target {', '.join(sorted(missing))}"
    if "raycv/run.py" in words:
        # As Ray's launcher runs it: what follows -- is the command's.
        return refusal("run", words[words.index("--") + 1 :] if "--" in words else [])
    for index, word in enumerate(words):
        package, _, module = word.partition(".")
        if index and words[index - 1] == "-m" and package == "raycv":
            return refusal(module, words[index + 1 :])
        is_ours = words[index - 1] == "-m" and package in ("benchmarks", "scripts")
        if index and is_ours and not (ROOT / package / f"{module}.py").is_file():
            return f"there is no module {word}"
        if re.fullmatch(r"scripts/\w+\.py", word) and not (ROOT / word).is_file():
            return f"there is no file {word}"
    return None


def refusal(command: str, arguments: list[str]) -> str | None:
    """What `python -m raycv.<command>` says when it refuses `arguments`; None if it accepts them."""
    if command not in commands():
        return f"there is no command raycv.{command}"
    if stray := [word for word in arguments if "=" not in word and not word.startswith("-") and word != "job"]:
        return f"{', '.join(stray)}: not key=value"
    # --cfg answers before the command looks at its other options.
    options = [word.partition("=")[0] for word in arguments if word.startswith("-")]
    if unknown := set(options) - {*ANSWERS, *HYDRA_OPTIONS}:
        return f"there is no option {', '.join(sorted(unknown))}"
    asked = arguments if ANSWERS & set(arguments) else [*arguments, "--cfg=job"]
    said = io.StringIO()
    with (
        patch.object(sys, "argv", ["raycv", *asked]),
        patch.object(sys, "excepthook", sys.excepthook),
        plain_environment(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
    ):
        try:
            run_command(command, commands()[command], lambda _: None)
        except SystemExit as stop:
            return said.getvalue().strip() or f"exit code {stop.code}"
    return None


def unknown_keys(code: str) -> list[str]:
    """The keys with a section in a piece of inline code (`train.lr=1e-4`) that no command has."""
    known = {key for schema in commands().values() for key, _ in fields(schema)}
    written = re.findall(r"(?:^|\s)([a-z_]+(?:\.[a-z_]+)+)=", code)
    return [key for key in written if key not in known and key.split(".")[0] in {one.split(".")[0] for one in known}]


def missing_files(code: str) -> list[str]:
    """The file or folder of the checkout that a piece of inline code names, if there is no such one."""
    names = re.findall(r"^(?:raycv|configs|scripts|tests|benchmarks|docs|models)/(?:[\w./-]+\.\w+|[\w/-]+/)$", code)
    return [name for name in names if not (ROOT / name).exists()]


def _targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))


def shown() -> Iterator[tuple[str, list[str]]]:
    """Place and words of each command that README, docs and `--help` show."""
    for page in [*pages(), *sorted((ROOT / "data").rglob("*.md")), *sorted((ROOT / "models").rglob("*.md"))]:
        for line, block in code_blocks(page, "bash"):
            for offset, words in typed(block):
                yield f"{name_of(page)}:{line + offset}", words
        for line, code in inline_code(page):
            if code.startswith(("python -m raycv.", "make ")) and "..." not in code:
                yield f"{name_of(page)}:{line}", shlex.split(code)
    for command in commands():
        for text in help_header(command).splitlines():
            if example := re.match(r" +(python -m .*?)(  |$)", text):
                yield f"raycv.{command} --help", shlex.split(example[1])


def faults() -> tuple[list[str], int]:
    """What is wrong, a line for each place, and how many commands were looked at."""
    known: dict[tuple[str, ...], str | None] = {}
    found = []
    for place, words in shown():
        if tuple(words) not in known:
            known[tuple(words)] = fault(words)
        if why := known[tuple(words)]:
            found.append(f"{place}: {shlex.join(words)}\n    {why}")
    for page in pages():
        for line, code in inline_code(page):
            found += [f"{name_of(page)}:{line}: no command has the key {key}" for key in unknown_keys(code)]
            found += [f"{name_of(page)}:{line}: there is no {name}" for name in missing_files(code)]
    return found, len(known)


def main() -> None:
    """Prints every fault; exit code 1 if there is one."""
    found, count = faults()
    print("\n".join(found) or f"{count} commands are accepted")  # noqa: T201
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
