"""Checks that the docs are in plain English: no banned phrase, no sentence that opens oddly, none that is too long.

python -m scripts.words             README and its companions, docs, --help, configs/, and the texts in the code
python -m scripts.words FILE ...    these Markdown or Python files alone
"""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from raycv.config import schema
from raycv.config.command_line import help_header
from raycv.config.schema import Section
from raycv.config.validation import fields, meaning
from scripts.docstrings import code_passages, python_files, string_passages
from scripts.markdown import ROOT, Passage, name_of, pages, passages

MOST_WORDS = 25
OPENINGS = ("of", "what", "who", "that", "where")
BANNED = {
    r"go(es|ne|ing)? on|went on": "write: resumes, continues, restarts",
    r"(is|are|was|were|be) (said|told)|said so|says so": "write who logs, warns or prints it",
    r"(is|are|was|were|be) had": "write who has it",
    r"(?<!there )(is|are|was|were) no(?! (longer|more|later|less|earlier|other)\b)": "write: is not a ...",
    r"mend(s|ed|ing)?": "write: fix",
    r"so it is with|so (it )?does|so do|and so (is|are)": "write the second fact as a sentence of its own",
    r"anew": "write: again, new",
    r"whatever|whoever": "write: any, or name the cases",
    r"is none": "write: there is no ...",
    r"of (it|them|these|those) alone|for itself|by itself": "write: only, or automatically",
    r"the very": "write: exactly, or the same",
    r"at hand|lies at|stands in": "write: is in, is at",
    r"lest|save for|as it stands": "write: so that ... not, except, unchanged",
}
"""Phrases that a reader must read twice, and what to write instead."""


def breaches(passage: Passage) -> Iterator[str]:
    """What is wrong with a passage, a line for each breach."""
    yield from banned_phrases(passage)
    for sentence in sentences(passage.text):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        if words and re.sub(r"\W", "", words[0]).lower() in OPENINGS:
            yield f"{passage.where}: a sentence opens with {words[0]!r}: {_start(words)}"
        if len(words) > MOST_WORDS:
            yield f"{passage.where}: {len(words)} words in a sentence, {MOST_WORDS} at most: {_start(words)}"


def banned_phrases(passage: Passage) -> Iterator[str]:
    """The banned phrases of a passage. For strings of the code this is the whole check: many are parts of sentences."""
    for pattern, remedy in BANNED.items():
        for match in re.finditer(rf"\b({pattern})(?!\w)", passage.text, re.IGNORECASE):
            yield f"{passage.where}: {match[0]!r} is banned; {remedy}"


def sentences(text: str) -> list[str]:
    """The sentences of a passage. A full stop within a name, a number or `et al. 2019` ends none."""
    return [part for part in re.split(r"(?<=[.!?])[)\"']*\s+(?=[A-Z`\"'(])", text.strip()) if part]


def _start(words: list[str]) -> str:
    return " ".join(words[:8]) + (" ..." if len(words) > 8 else "")


def commands() -> dict[str, type[Section]]:
    """Each command and its schema: `configs/<command>.yaml` belongs to `<Command>Config`."""
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    return {name: getattr(schema, f"{name.capitalize()}Config") for name in names}


def help_passages() -> Iterator[Passage]:
    """What `--help` of each command says: its header, and the meaning of each key."""
    for command, section in commands().items():
        for line in help_header(command).splitlines():
            # A line with an example: the command, a gap, what it does.
            yield Passage(f"raycv.{command} --help", re.sub(r"^ +python -m.*?(  +|$)", "", line))
        for key, field in fields(section):
            yield Passage(f"raycv.{command} --help, {key}", meaning(field))


def config_comments() -> Iterator[Passage]:
    """The comments in `configs/`."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if comment := re.match(r"\s*# (?!@package)(.*)", line):
                yield Passage(f"{name_of(path)}:{number}", comment[1])


def main(files: Iterable[str]) -> None:
    """Prints every breach; exit code 1 if there is one."""
    given = [Path(file) for file in files]
    checked = given or [*pages(), *python_files(ROOT / "raycv")]
    read = [each for file in checked for each in (code_passages if file.suffix == ".py" else passages)(file)]
    if not given:
        read += [*help_passages(), *config_comments()]
    strings = [each for file in checked if file.suffix == ".py" for each in string_passages(file)]
    found = [breach for passage in read for breach in breaches(passage)]
    found += [breach for passage in strings for breach in banned_phrases(passage)]
    count = len(read) + len(strings)
    print("\n".join(dict.fromkeys(found)) or f"{count:,} passages are in plain English")  # noqa: T201
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
