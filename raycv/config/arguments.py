"""The arguments of a command line: separates texts, refuses lists that cannot be read, writes the rest for Hydra."""

import os
import re

from raycv.common.locations import bundled
from raycv.config.schema import Section
from raycv.config.validation import fields, list_keys, text_keys, verbatim_keys
from raycv.errors import UserError, counted, shown


def overrides_of(arguments: list[str]) -> list[str]:
    """The arguments that set a key or a group, in Hydra's grammar."""
    return [part for part in arguments if re.match(r"[~+\w]\S*=|~", part)]


def without_verbatim(arguments: list[str], schema: type[Section]) -> tuple[list[str], dict[str, str]]:
    """Separates the keys that take free text, since Hydra would read grammar into a text.

    Returns:
        The other arguments, and the texts by key.

    Raises:
        UserError: A text is not UTF-8, or the user did not quote it for the shell.
    """
    keys = verbatim_keys(schema)
    rest: list[str] = []
    texts: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key.lstrip("+") not in keys:
            rest.append(argument)
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            remedies = [f"save the text as UTF-8, and give {key} again"]
            raise UserError(f"{key}: the text given is not UTF-8.", kind="config-syntax", remedies=remedies) from error
        texts[key.lstrip("+")] = text
    stray = [argument for argument in rest if not re.match(r"-|~|\+*[\w./@]+=", argument)]
    if keys and stray and not {"--cfg", "-c"} & set(rest):
        raise UserError(
            f"{counted(len(stray), 'word')} on the command line belong to no key=value.",
            kind="config-syntax",
            remedies=[
                f'write key=value, without dashes or spaces, and quote a text for the shell: {keys[0]}="..."',
                f"or read it from a file: {keys[0]}_file=post.txt",
            ],
        )
    return rest, texts


def for_hydra(arguments: list[str], schema: type[Section]) -> list[str]:
    """`arguments` in Hydra's grammar, so that texts need no second quotes and unknown keys reach our schema.

    Raises:
        UserError: A sweep is asked for, a list cannot be read, or a group is set to a value that is not one of its
            files.
    """
    if {"-m", "--multirun"} & set(arguments) or any(re.match(r"\+*hydra\.mode=", part) for part in arguments):
        raise UserError("--multirun is not supported.", kind="config-syntax", remedies=["start a run for each value"])
    groups, texts = files_of_groups(), text_keys(schema)
    known = {key for key, _ in fields(schema)}
    # Hydra refuses null for a group, although null is the default of `experiment`, so we leave the argument out.
    given = [argument for argument in arguments if argument != "experiment=null"]
    _refuse_lists(given, schema, known)
    return [_forced(argument, groups, known, texts) for argument in given]


def _refuse_lists(arguments: list[str], schema: type[Section], known: set[str]) -> None:
    """Refuses lists that the shell has cut, lists without brackets, and several values for a key that takes one.

    Raises:
        UserError: The message has the argument as it should be.
    """
    lists, texts = list_keys(schema), text_keys(schema)
    for at, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        name = key.lstrip("+")
        if not equals or name not in known or name in texts or value[:1] in ("'", '"', "$"):
            continue
        if name not in lists:
            # Hydra takes commas for a sweep.
            if re.match(r"[^\[({]*,", value):
                remedies = [f"give one value, and start a run for each: {name}={value.partition(',')[0]}"]
                if re.fullmatch(r"[+-]?\d+,\d+(e[+-]?\d+)?", value, re.IGNORECASE):
                    remedies.insert(
                        0, f"if the comma is a decimal one, write a point: {name}={value.replace(',', '.')}"
                    )
                raise UserError(
                    f"{name}: takes one value; received {shown(value)}.", kind="config-value", remedies=remedies
                )
        elif value.startswith("["):
            words = [value]
            for word in arguments[at + 1 :] if "]" not in value else ():
                words.append(word)
                if "]" in word:
                    break
            text = " ".join(words)
            if "]" not in text or len(words) > 1:
                what = f"{name}: the list has no ]; received {shown(text)}."
                if "]" in text:
                    what = f"{name}: the shell cut the list at its spaces; received {counted(len(words), 'word')}."
                items = [item for item in re.split(r"[\[\],\s]+", text) if item]
                raise UserError(what, kind="config-syntax", remedies=_as_list(name, items))
            items = [item.strip() for item in value.strip("[]").split(",")]
            if spaced := [item for item in items if re.search(r"\s", item) and item[:1] not in ("'", '"')]:
                what = f"{name}: an item of the list has a space; received {shown(spaced[0])}."
                raise UserError(what, kind="config-syntax", remedies=_as_list(name, " ".join(items).split()))
        elif value != "null" and (lists[name] or "," in value):
            items = [item.strip() for item in value.split(",") if item.strip()]
            raise UserError(
                f"{name}: takes a list; received {shown(value)}.", kind="config-value", remedies=_as_list(name, items)
            )


def _as_list(key: str, items: list[str]) -> list[str]:
    shown_items = ",".join(items) if sum(map(len, items)) <= 200 else "a,b"
    return [f"write the list in brackets, without spaces: {key}=[{shown_items}]"]


def files_of_groups() -> dict[str, set[str]]:
    folders = (folder for folder in bundled("configs").iterdir() if folder.is_dir())
    return {folder.name: {path.stem for path in folder.glob("*.yaml")} for folder in folders}


def _forced(argument: str, groups: dict[str, set[str]], known: set[str], texts: set[str]) -> str:
    """Turns `a.b=c` into `++a.b=c`, so that an unknown key reaches our schema, which reports all faults with remedies.

    The value of a key that takes text gets quotes, so that the user need not quote numbers, spaces and commas twice. A
    leading `~` becomes the home folder.

    Raises:
        UserError: A group is set to a value that is not one of its files.
    """
    match = re.match(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", argument, re.DOTALL)
    if match is None or match[2].split(".")[0] == "hydra":
        return argument
    key, value = match[2], match[3]
    if key in groups:
        if value not in groups[key]:
            raise UserError(
                f"{argument}: {key!r} is a group of keys, and {shown(value)} is not one of its files.",
                kind="config-value",
                remedies=[
                    f"choose one of them ({key}={', '.join(sorted(groups[key]))}), or set single keys: train.lr=1e-4"
                ],
            )
        return argument
    if key not in known:
        # A mistyped post= holds a text, which Hydra would parse and repeat in an error. So we quote the value, and our
        # schema refuses the key by its name only.
        value = quoted(value)
    elif key in texts and value != "null" and value[:1] not in ("'", '"'):
        value = quoted(os.path.expanduser(value))
    return f"++{key}={value}"


def quoted(text: str) -> str:
    """`text` as a quoted value of Hydra's grammar, in which backslashes count only before a quote or at the end."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"
