"""Composes the ordinary command line without Hydra, whose start takes longer than a scorer's answer.

It reads only what Hydra certainly reads in the same way. It returns None for everything else, and Hydra then composes.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import yaml

from raycv.common.locations import bundled

if TYPE_CHECKING:
    from raycv.config.schema import InferConfig

OVERRIDE = re.compile(r"\+\+([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)=(?:'([^'\\$]*)'|([\w.]+))", re.ASCII)
"""`++a.b='text'` or `++a.b=word`."""
INTEGER = re.compile(r"0|-?[1-9]\d{0,15}", re.ASCII)
FRACTION = re.compile(r"-?(?:0|[1-9]\d{0,8})\.\d{1,8}", re.ASCII)
WORD = re.compile(r"[a-z][a-z_]*")
WORDS = {"null": None, "true": True, "false": False}
NUMBERS = ("nan", "inf")
"""Words that Hydra reads as numbers."""
MISSING = "???"
VARIABLE = re.compile(r'\$\{oc\.env:(\w+),("?)([a-z][\w./:-]*)\2\}', re.ASCII)
"""`${oc.env:NAME,default}`"""
SWITCH = re.compile(r'\$\{oc\.decode:\$\{oc\.env:(\w+),"(true|false)"\}\}', re.ASCII)
"""The same for a default that is true or false."""


class _Unsure(Exception):  # noqa: N818
    """Hydra may read it in another way."""


SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML's safe loader: the one in C, which is ten times as fast, where PyYAML has it."""


class _Loader(SafeLoader):
    """Reads YAML as Hydra does: `1e-4` is a number, and a repeated key is a fault."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping of `node`."""
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(values) != len(node.value):
            raise _Unsure
        return values


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(_[0-9]+)*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def plain_values(name: str, overrides: Sequence[str], *, missing_ok: bool = False) -> dict[str, Any] | None:
    """The values of `configs/<name>.yaml` under `overrides`; None if only Hydra can tell them, or refuse them.

    Args:
        name: The command.
        overrides: `++key=value` in Hydra's grammar.
        missing_ok: Whether a required value (???) may stay unset.
    """
    try:
        values = _defaults(bundled("configs"), name)
        for override in overrides:
            _set(values, override)
        return {key: _resolved(value, missing_ok=missing_ok) for key, value in values.items()}
    except (_Unsure, OSError, ValueError, yaml.YAMLError):
        return None


def _defaults(configs: Path, name: str) -> dict[str, Any]:
    values = _read(configs / f"{name}.yaml")
    composed: dict[str, Any] = {}
    entries = values.pop("defaults", None)
    # The command has no such section: these settings are Hydra's own.
    values.pop("hydra", None)
    if not isinstance(entries, list) or entries.count("_self_") != 1:
        raise _Unsure
    for entry in entries:
        if entry == "_self_":
            _merge(composed, values)
            continue
        ((group, option),) = entry.items() if isinstance(entry, dict) and len(entry) == 1 else [("", "")]
        if str(group).startswith("override hydra/") or option is None:
            continue
        if not re.fullmatch("[a-z]+", str(group)) or not re.fullmatch(r"\w+", str(option)):
            raise _Unsure
        _merge(composed, {group: _read(configs / group / f"{option}.yaml")})
    return composed


def _read(file: Path) -> dict[str, Any]:
    """The values in a file. Its first lines, or `defaults` in a group's file, may ask Hydra for more."""
    text = file.read_text(encoding="utf-8")
    values = yaml.load(text, _Loader)
    if not isinstance(values, dict) or "@package" in text or ("defaults" in values and file.parent.name != "configs"):
        raise _Unsure
    return values


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _set(values: dict[str, Any], override: str) -> None:
    match = OVERRIDE.fullmatch(override)
    if match is None:
        raise _Unsure
    *parents, leaf = match[1].split(".")
    section: Any = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise _Unsure
    if isinstance(section.get(leaf), dict) or match[1].split(".")[0] in ("hydra", "defaults"):
        raise _Unsure
    section[leaf] = _word(match[3]) if match[2] is None else match[2]


def _word(word: str) -> Any:
    if word in WORDS:
        return WORDS[word]
    if INTEGER.fullmatch(word):
        return int(word)
    if FRACTION.fullmatch(word):
        return float(word)
    if WORD.fullmatch(word) and word not in NUMBERS:
        return word
    raise _Unsure


def _resolved(value: Any, *, missing_ok: bool) -> Any:
    """`value` with the variables of the environment in it."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise _Unsure
        return {key: _resolved(inner, missing_ok=missing_ok) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, missing_ok=missing_ok) for inner in value]
    if value is not None and type(value) not in (str, int, float, bool):
        raise _Unsure
    return _text(value, missing_ok=missing_ok) if isinstance(value, str) else value


def _text(value: str, *, missing_ok: bool) -> Any:
    if (match := VARIABLE.fullmatch(value)) and match[3] not in (*WORDS, *NUMBERS):
        return os.environ.get(match[1], match[3])
    if (match := SWITCH.fullmatch(value)) and match[1] not in os.environ:
        return match[2] == "true"
    if "$" in value or (value == MISSING and not missing_ok):
        raise _Unsure
    return value


VERBATIM = ("post", "criterion")
"""The keys of `raycv.infer` that take free text."""
NAME = r"[\w./][\w./-]{0,150}|-"
COUNT = r"[1-9]\d{0,6}"
FORMS = {
    "post_file": NAME, "output": "text|json", "missing": "empty|text", "engine": "local", "run": NAME,
    "fold": rf"best|ensemble|0|{COUNT}", "dir": NAME, "criteria_dir": NAME, "base": NAME,
    "server": r"auto|none|https?://[\w.:]+", "infer.device": "auto|cpu", "infer.precision": "auto|fp32|bf16|int8",
    "infer.batch_size": COUNT, "tracking.uri": "none", "tracking.experiment": NAME,
}  # fmt: skip
"""The forms in which the values of the other keys are certainly allowed. The schema allows more, and checks those.

A new key of InferConfig needs a form here. Else the schema checks every question, which a test notices.
"""
NUMBERED = ("fold", "infer.batch_size")
MAY_LACK = ("post", "criterion", "post_file", "input", "criteria_dir", "base", "tracking.uri")
"""The keys that may be null."""


def plain_question(arguments: Sequence[str]) -> "InferConfig | None":
    """The config of `raycv.infer` for an ordinary question: in all that is read of it as the schema would give it.

    A client of a scorer needs neither Hydra nor pydantic for it. None if the schema must decide.
    """
    texts, overrides = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            return None
        if key in VERBATIM:
            texts[key] = value
        elif value == "null" or re.fullmatch(FORMS.get(key, ""), value, re.ASCII) is None:
            return None
        else:
            overrides.append(f"++{key}={value}" if key in NUMBERED else f"++{key}='{value}'")
    values = plain_values("infer", overrides)
    if values is None or not all(map(_is_utf8, texts.values())):
        return None
    values |= texts
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    flat = {key: value for key, value in values.items() if key not in sections}
    flat |= {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    if flat.keys() != {*FORMS, *VERBATIM, "input"} or not all(_is_allowed(key, value) for key, value in flat.items()):
        return None
    named = values | {name: SimpleNamespace(**section) for name, section in sections.items()}
    return cast("InferConfig", SimpleNamespace(**named))


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_allowed(key: str, value: Any) -> bool:
    if value is None:
        return key in MAY_LACK
    if key in VERBATIM:
        return isinstance(value, str)
    kind = int if key in NUMBERED and value not in ("best", "ensemble") else str
    return key in FORMS and type(value) is kind and re.fullmatch(FORMS[key], str(value), re.ASCII) is not None
