"""Runs the rules of the schema over given values, reports every fault at once, and describes the keys."""

import difflib
import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from raycv.common.secrets import mask_secrets
from raycv.config.other_names import OTHER_NAMES, WITHOUT_KEY
from raycv.config.schema import Section
from raycv.config.values import RECORDED, VERBATIM
from raycv.errors import ErrorKind, FaultsError, shown

S = TypeVar("S", bound=Section)


def validate(schema: type[S], values: Mapping[str, Any], *, recorded: bool = False) -> S:
    """Checks values against a schema.

    Args:
        schema: The schema.
        values: The values of its keys; those of a section are nested.
        recorded: Whether an earlier run recorded the values. They may then hold addresses that are refused today.

    Returns:
        The typed config.

    Raises:
        FaultsError: The values have faults. The error names every unknown key, wrong type and impossible value.
    """
    try:
        return schema.model_validate(values, context=RECORDED if recorded else None)
    except ValidationError as error:
        wrong, unknown = _faults(schema, error)
        found: dict[ErrorKind, list[str]] = {"config-value": wrong, "config-unknown-key": unknown}
        kinds = tuple(kind for kind, faults in found.items() if faults)
        raise FaultsError("The configuration cannot be used", wrong + unknown, kind=kinds) from error


def fields(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields every key of `schema` with its field. A section comes before its keys."""
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")


def meaning(field: FieldInfo) -> str:
    """The meaning of a key and the words that it takes; empty for a section."""
    words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return _said(field) + (f" [{', '.join(map(str, words))}]" if words else "")


def _said(field: FieldInfo) -> str:
    return without_requirements(field.description or "")


def without_requirements(text: str) -> str:
    """`text` without the numbers of requirements in brackets, which only readers of the code need."""
    return re.sub(r" \((FR-\d+(, FR-\d+)*|user story \d+)\)", "", text)


def hint(key: str, schema: type[Section]) -> str:
    """The most likely meaning of `key`, which `schema` does not have, for a message."""
    return _hint(key, {name: "" for name, _ in fields(schema)})


def text_keys(schema: type[Section]) -> set[str]:
    """The keys that take only text, or text and null."""
    return {key for key, field in fields(schema) if _is_text(field.annotation)}


def list_keys(schema: type[Section]) -> dict[str, bool]:
    """The keys that take a list, each with whether they take nothing else but null."""
    found = {key: _types(field.annotation) for key, field in fields(schema)}
    return {key: kinds <= {list, NoneType} for key, kinds in found.items() if list in kinds}


def _types(annotation: Any) -> set[Any]:
    """The types without their parameters that an annotation allows."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _types(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*map(_types, get_args(annotation)))
    return {origin or annotation}


def verbatim_keys(schema: type[Section]) -> list[str]:
    """The keys that take free text."""
    return [key for key, field in fields(schema) if VERBATIM in str(field.annotation) + str(field.metadata)]


def _is_text(annotation: Any) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _is_text(arguments[0])
    if origin is Literal:
        return all(isinstance(argument, str) for argument in arguments)
    if origin in (Union, UnionType):
        return all(argument is NoneType or _is_text(argument) for argument in arguments)
    return annotation is str


def as_yaml(config: Section) -> str:
    """The resolved config as YAML, with passwords in addresses masked (FR-004)."""
    return mask_secrets(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))


def _faults(schema: type[Section], error: ValidationError) -> tuple[list[str], list[str]]:
    """The impossible values, and the unknown keys."""
    known = {key: _said(field) for key, field in fields(schema)}
    unknown: list[str] = []
    expected: dict[str, list[str]] = {}
    received: dict[str, str] = {}
    for fault in error.errors():
        if fault["type"] == "extra_forbidden":
            unknown += [_unknown(loc, known) for loc in _leaves(fault["loc"], fault["input"])]
            continue
        key = _key(fault["loc"], known)
        # A union reports a fault for each of its types, so we join them into one line with all that it expects.
        if _expectation(fault) not in expected.setdefault(key, []):
            expected[key].append(_expectation(fault))
        # A token is secret even if it is faulty, so we do not repeat it.
        value = "one that is not shown" if key.endswith(".token") else _shown(fault["input"])
        received.setdefault(key, "nothing" if fault["type"] == "missing" else value)
    wrong = [
        f"{key}: {', or '.join(parts)}; received {received[key]}"
        + (f" (the key means: {known[key]})" if known.get(key) else "")
        for key, parts in expected.items()
    ]
    return wrong, unknown


def _leaves(loc: tuple[int | str, ...], value: Any) -> Iterator[tuple[int | str, ...]]:
    """The places of the values in an unknown section. Any other value has one place."""
    if not isinstance(value, Mapping) or not value:
        yield loc
        return
    for name, inner in value.items():
        yield from _leaves((*loc, name), inner)


def _unknown(loc: tuple[int | str, ...], known: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in loc)
    if any("." in str(part) for part in loc):
        return f"{key}: unknown key with a dot in its name; in a file, write sections as nested keys"
    return f"{key}: unknown key; {_hint(key, known)}"


_WORDS = {
    "list_type": "takes a list in brackets, such as [a,b]",
    "int_type": "takes a whole number", "int_parsing": "takes a whole number", "int_from_float": "takes a whole number",
    "float_type": "takes a number", "float_parsing": "takes a number", "finite_number": "takes a finite number",
    "bool_type": "takes true or false", "bool_parsing": "takes true or false",
    "string_type": "takes a text", "string_too_short": "must not be empty", "missing": "must be given",
    "string_pattern_mismatch": "must have the form {pattern}",
    "model_type": "is a section: set its keys, section.key=value",
    "literal_error": "takes one of {expected}",
    "too_short": "needs {min_length} or more items", "too_long": "takes {max_length} items at most",
    "greater_than": "must be more than {gt}", "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}", "less_than_equal": "must be {le} or less",
}  # fmt: skip
"""Pydantic's name of a fault -> the words for it. A fault of our own rules brings its words along."""


def _expectation(fault: Mapping[str, Any]) -> str:
    if words := _WORDS.get(fault["type"]):
        return words.format(**fault.get("ctx", {}))
    message = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return message[0].lower() + message[1:]


def _shown(value: Any) -> str:
    text = repr(value)
    return shown(value) if isinstance(value, str) or len(text) > 40 else text


def _key(loc: tuple[int | str, ...], known: Mapping[str, str]) -> str:
    """The config key of a pydantic location, the end of which may name a type of a union."""
    for end in range(len(loc), 0, -1):
        key = ".".join(str(part) for part in loc[:end])
        if key in known:
            return key
    return ".".join(str(part) for part in loc)


def _hint(key: str, known: Mapping[str, str]) -> str:
    """The likely intended key: of the same name elsewhere, by another tool's name, or of a near name in the section.

    Else it names the section's keys.
    """
    parent, _, leaf = key.rpartition(".")
    name = leaf.casefold().replace("-", "_")
    # A command without the key, such as raycv.infer, must not offer it.
    other = OTHER_NAMES.get(name, name.replace("_", ".", 1))
    if leaf not in {each.rpartition(".")[2] for each in known}:
        if other in known:
            return f"did you mean {other}?"
        if name in OTHER_NAMES or name in WITHOUT_KEY:
            return f"raycv has no such setting{'' if name in WITHOUT_KEY else ' here'}"
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    near = [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)]
    if not near and not parent and len(elsewhere) > 1:
        meant = [f"{name} ({known[name]})" if known[name] else name for name in elsewhere]
        return f"did you mean {' or '.join(meant)}?"
    # Several sections can have the name, so we take the most similar one: train.seed for trian.seed.
    near = near or difflib.get_close_matches(key, elsewhere, n=1, cutoff=0)
    if near:
        return f"did you mean {near[0]}?"
    if not siblings:
        return _hint(parent, known)
    return f"the keys here are: {', '.join(siblings)}"
