"""Reads the command line: raycv or Hydra composes the config, and the schema checks it."""

import contextlib
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from raycv import __version__
from raycv.common.locations import bundled
from raycv.config.arguments import files_of_groups, for_hydra, overrides_of, without_verbatim
from raycv.config.plain import plain_values
from raycv.config.process import run_process, say
from raycv.config.schema import Section
from raycv.config.validation import as_yaml, fields, hint, meaning, validate, verbatim_keys
from raycv.errors import UserError, shown

S = TypeVar("S", bound=Section)

COLUMNS = 80
"""The width of a terminal that the help fits."""
HYDRA_OPTIONS = (
    "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--hydra-help", "--info", "-i", "--config-path",
    "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--shell-completion", "-sc", "--experimental-rerun",
)  # fmt: skip

# Our own files set these. A user's file may lack them, and Hydra would then make a folder and a log before we refuse
# the file.
SILENT_HYDRA = (
    "hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled",
)  # fmt: skip


def run_command(name: str, schema: type[S], body: Callable[[S], None]) -> None:
    """Composes `configs/<name>.yaml` with the command line, checks it against `schema` and calls `body`.

    Args:
        name: The command, such as `run`.
        schema: The schema of its config.
        body: The work of the command.
    """
    # Rooms that serve several commands name keys as `raycv.run` does.
    own_names = {"tracking.uri": "tracking_uri"} if "tracking_uri" in schema.model_fields else {}
    run_process(name, partial(composed, name, schema), body, own_names)


def composed(name: str, schema: type[S]) -> S | None:
    """Composes and checks the config of the command line.

    Returns:
        The config; None if the user asked for an answer such as `--help`, which is then printed.

    Raises:
        UserError: The config cannot be composed, or has a fault.
    """
    configs: list[S] = []
    faults: list[UserError] = []

    def take(config: object) -> None:
        # On an error in here Hydra prints the command line with its passwords. So we work outside, and only collect the
        # errors here.
        try:
            configs.append(validate(schema, _plain(config) | verbatim))
        except UserError as error:
            faults.append(error)

    typed: list[str] = []
    said = io.StringIO()
    # With this Hydra raises its errors, so that they are printed here like every other fault.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        typed, verbatim = without_verbatim(sys.argv[1:], schema)
        forced = for_hydra(typed, schema)
        overrides = overrides_of(forced)
        answer = _answer(name, schema, typed, overrides, verbatim)
        if answer is not None:
            sys.stdout.write(answer)
            return None
        # argparse does not recognise a key=value behind an option that follows others, so options come first.
        sys.argv[1:] = [*(part for part in forced if part not in overrides), *SILENT_HYDRA, *overrides]
        plain = plain_values(name, forced)
        if plain is not None:
            return validate(schema, plain | verbatim)
        import hydra

        with contextlib.redirect_stderr(said):
            hydra.main(config_path=str(bundled("configs")), config_name=name, version_base="1.3")(take)()
        say(said.getvalue())
    except UserError:
        raise
    except SystemExit as stop:
        if not stop.code:
            raise
        # argparse prints its usage and repeats the typed words, so we take its reason only and mask passwords in it.
        raise _unread(name, schema, said.getvalue().strip().rpartition("error: ")[2], typed) from None
    except Exception as error:
        # Hydra raises many types of error if it cannot compose the command line, from its own to ValueError.
        raise _uncomposed(name, schema, error, typed) from error
    if faults:
        raise faults[0]
    return configs[0] if configs else None


def _uncomposed(name: str, schema: type[Section], why: Exception, typed: list[str]) -> UserError:
    """Names the argument that Hydra cannot read, or repeats the words of its error."""
    from hydra.core.global_hydra import GlobalHydra

    known = {key for key, _ in fields(schema)}
    for override in overrides_of(for_hydra(typed, schema)) if not verbatim_keys(schema) else ():
        key, _, value = override.lstrip("+").partition("=")
        GlobalHydra.instance().clear()
        try:
            compose(name, [override], missing_ok=True)
        except Exception:  # noqa: BLE001
            if key in known:
                remedies = [
                    f"quote a value that holds spaces or signs twice: \"{key}='...'\"",
                    f"python -m raycv.{name} --help shows what it takes",
                ]
                what = f"{key}: the value cannot be read; received {shown(value)}."
                return UserError(what, kind="config-syntax", remedies=remedies)
    return _unread(name, schema, why, typed)


def _unread(name: str, schema: type[Section], why: object, typed: list[str]) -> UserError:
    remedies = [
        "write key=value, without spaces around the =; quote a list for the shell: 'a.b=[c,d]'",
        f"python -m raycv.{name} --help shows what it takes",
    ]
    if str(why).startswith("Ambiguous value"):
        # Hydra advises --multirun, which raycv refuses.
        why = f"{str(why).splitlines()[0]}, since it has a comma"
        remedies.insert(0, "write a number with a point: train.lr=1.5e-4")
    what = f"The command line cannot be read: {why}\n  received: {shown(' '.join(typed), most=300)}"
    if verbatim_keys(schema):
        # A text may follow a mistyped key, and the reason quotes it too. We must not repeat it, so we name only keys.
        keys = [part.partition("=")[0] for part in typed if re.match(r"[\w./@~+:-]{1,40}=", part)]
        what = f"The command line cannot be read; its keys: {shown(' '.join(keys), most=300)}"
    return UserError(what, kind="config-syntax", remedies=remedies)


def typed_keys(name: str) -> set[str]:
    """The keys that the command line of this process sets, singly or by whole groups (`experiment=x`)."""
    from hydra.core.global_hydra import GlobalHydra

    # Hydra composes one config at a time, and that of this command is done, so we clear it.
    GlobalHydra.instance().clear()
    return _keys_set(name, [part for part in overrides_of(sys.argv[1:]) if part not in SILENT_HYDRA])


def keys_set(name: str, schema: type[Section], arguments: Sequence[str]) -> set[str]:
    """The keys that `arguments` of a command set, which did not come from the command line of this process."""
    return _keys_set(name, overrides_of(for_hydra(list(arguments), schema)))


def _keys_set(name: str, overrides: list[str]) -> set[str]:
    values, defaults = _flat(compose(name, overrides)), _flat(compose(name, []))
    # A user may set a key to its default, so we look at the typed names too.
    named = {part.partition("=")[0].lstrip("+~") for part in overrides}
    return {
        key
        for key, value in values.items()
        if key not in defaults or value != defaults[key] or any(f"{key}.".startswith(f"{one}.") for one in named)
    }


def compose_checked(name: str, schema: type[S], arguments: Sequence[str]) -> S:
    """Composes and checks the config of a command for a caller in Python.

    Args:
        name: The command.
        schema: The schema of its config.
        arguments: Those of the command line: `key=value` and `group=file`.

    Raises:
        UserError: An argument cannot be read, or the config has a fault.
    """
    given = list(arguments)
    try:
        overrides = for_hydra(given, schema)
        if stray := [part for part in overrides if part not in overrides_of(overrides)]:
            raise _unread(name, schema, f"{shown(stray[0])} is not key=value", given)
        values = compose(name, overrides)
    except UserError:
        raise
    except Exception as error:
        # As above: Hydra raises many types of error.
        raise _uncomposed(name, schema, error, given) from error
    return validate(schema, values)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of all sections in one dictionary: `section.key` -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _answer(
    name: str, schema: type[Section], typed: list[str], overrides: list[str], verbatim: dict[str, str]
) -> str | None:
    """The answer that the command prints instead of its work, if the user asked for one.

    Args:
        name: The command.
        schema: The schema of its config.
        typed: The typed arguments, without those of free text.
        overrides: Those that set a key or a group, as Hydra takes them.
        verbatim: The free texts by key.

    Raises:
        UserError: An option is unknown, or the config to print has a fault.
    """
    if {"-h", "--help"} & set(typed):
        return _usage(name, schema, overrides)
    if "--version" in typed:
        return f"raycv {__version__}\n"
    # Hydra's own --cfg prints the values without a check, unknown keys included, so we answer it.
    if re.search(r"(?:^|\n)(?:--cfg|-c)(?:=|\n)job(?:$|\n)", "\n".join(typed)):
        return as_yaml(validate(schema, compose(name, overrides) | verbatim))
    # A text may follow the = of an option, so we repeat only its name.
    options = [part.partition("=")[0] for part in typed]
    if unknown := [part for part in options if re.fullmatch(r"--?[a-z][\w.-]*", part) and part not in HYDRA_OPTIONS]:
        remedies = ["write key=value without dashes, say train.epochs=3", f"python -m raycv.{name} --help"]
        hints = [said for part in unknown if not (said := hint(part.strip("-"), schema)).startswith("the keys here")]
        meant = f" ({'; '.join(hints)})" if hints else ""
        raise UserError(
            f"raycv.{name} has no option {', '.join(unknown)}{meant}.", kind="config-unknown-key", remedies=remedies
        )
    return None


def _usage(name: str, schema: type[Section], overrides: list[str]) -> str:
    """The output of `--help`: every key with its value under `overrides`, and its meaning."""
    lines = [f"python -m raycv.{name} [key=value ...]", "", help_header(name), ""]
    if groups := groups_of(name):
        lines.append("Groups of keys, each in files to choose from (group=file):")
        lines += [*(f"  {group}: {', '.join(files)}" for group, files in groups.items()), ""]
    lines.append("Keys, with the value that they would have now:")
    values = shown_values(name, overrides)
    for key, field in fields(schema):
        lines += [f"  {key}={values[key]}", f"      {meaning(field)}"] if field.description else [""]
    more = ["--cfg job checks and prints the same values as YAML. --hydra-help shows what else Hydra can do.", ""]
    return "\n".join(part for line in "\n".join([*lines, "", *more]).split("\n") for part in _within(line))


def _within(line: str) -> list[str]:
    """A line of the help as lines that fit a terminal. The comment behind an example goes below it."""
    if len(line) <= COLUMNS:
        return [line]
    if example := re.fullmatch(r"( +\S.*?\S) {2,}(\S.*)", line):
        return [*_within(example[1]), *_within(f"      {example[2]}")]
    indent = "      " if line.startswith(" ") else ""
    return textwrap.wrap(line, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def help_header(name: str) -> str:
    """The text that `--help` of a command prints before its keys: its purpose, and examples."""
    return str(_file(name)["hydra"]["help"]["header"]).rstrip()


def groups_of(name: str) -> dict[str, list[str]]:
    """The groups of keys of a command, each with its files."""
    groups = files_of_groups()
    named = [next(iter(entry)) for entry in _file(name)["defaults"] if isinstance(entry, dict)]
    return {group: sorted(groups[group]) for group in named if group in groups}


def shown_values(name: str, overrides: list[str]) -> dict[str, str]:
    """The value of each key under `overrides` as YAML on one line; `???` is one that must be given."""
    import yaml

    values = _flat(compose(name, overrides, missing_ok=True))
    return {
        key: yaml.safe_dump(value, default_flow_style=True, width=200).splitlines()[0] for key, value in values.items()
    }


def _file(name: str) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = yaml.safe_load(bundled(f"configs/{name}.yaml").read_text(encoding="utf-8"))
    return values


def compose(name: str, overrides: list[str], *, missing_ok: bool = False) -> dict[str, Any]:
    """Composes the plain values of `configs/<name>.yaml` without the command line of this process.

    Args:
        name: The command.
        overrides: `key=value` in Hydra's grammar.
        missing_ok: Whether a required value (???) may stay unset.

    Raises:
        UserError: A required value is missing, or a reference cannot be resolved.
    """
    plain = plain_values(name, overrides, missing_ok=missing_ok)
    if plain is not None:
        return plain
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(config_dir=str(bundled("configs")), version_base="1.3"):
        return _plain(hydra_compose(name, overrides), missing_ok=missing_ok)


def _plain(config: object, *, missing_ok: bool = False) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=not missing_ok)
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key}: must be given.", kind="config-value", remedies=[f"{error.full_key}=<value>"]
        ) from error
    except OmegaConfBaseException as error:
        raise UserError(
            f"The configuration cannot be resolved: {error}",
            kind="config-value",
            remedies=["give the missing value, or fix the ${...} reference; --cfg job shows the config"],
        ) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
