"""The command line: Hydra composes it, the schema checks it, errors are printed without tracebacks."""

import contextlib
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from raycv import __version__
from raycv.common.environment import seldom_collecting
from raycv.common.locations import bundled
from raycv.common.secrets import mask_secrets
from raycv.common.signals import discard
from raycv.config.schema import Section
from raycv.config.validation import as_yaml, fields, meaning, text_keys, validate, verbatim_keys
from raycv.errors import UserError, counted, printable, shown

S = TypeVar("S", bound=Section)

HYDRA_OPTIONS = (
    "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--hydra-help", "--info", "-i", "--config-path",
    "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--shell-completion", "-sc", "--experimental-rerun",
)  # fmt: skip

# As in our own files: a file of the user's may lack it, and Hydra would make a folder and a log before it is refused.
SILENT_HYDRA = (
    "hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled",
)  # fmt: skip


def run_command(name: str, schema: type[S], body: Callable[[S], None]) -> None:
    """Composes `configs/<name>.yaml` with the command line, checks it against `schema` and calls `body`.

    Exit codes: 0 done; 2 something that the user can mend (printed without a traceback); 130 it was interrupted; 1
    anything else.
    """
    sys.excepthook = _show_traceback
    if sys.stderr is None:
        # It was closed: the next file that is opened would get its number, and what libraries write to it.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        config = _composed(name, schema)
        if config is not None:
            _show_warnings()
            with seldom_collecting():
                body(config)
    except UserError as error:
        raise _refused(name, error) from None
    except KeyboardInterrupt:
        _say(f"\nraycv.{name}: interrupted\n")
        raise SystemExit(130) from None


def _composed(name: str, schema: type[S]) -> S | None:
    """The config that the command line asks for, checked; None if it asked for an answer, which is then printed.

    Raises: UserError if it cannot be composed.
    """
    configs: list[S] = []
    faults: list[UserError] = []

    def take(config: object) -> None:
        # No work in here, and no error out of here: Hydra would print the command line with it, passwords and all.
        try:
            configs.append(validate(schema, _plain(config) | verbatim))
        except UserError as error:
            faults.append(error)

    typed: list[str] = []
    said = io.StringIO()
    # Hydra then raises what it finds, and it is printed here like every other fault.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        typed, verbatim = without_verbatim(sys.argv[1:], schema)
        for_hydra = _for_hydra(typed, schema)
        overrides = _overrides(for_hydra)
        answer = _answer(name, schema, typed, overrides, verbatim)
        if answer is not None:
            sys.stdout.write(answer)
            return None
        import hydra

        # Options first: argparse does not know again the key=value behind one that follows others.
        sys.argv[1:] = [*(part for part in for_hydra if part not in overrides), *SILENT_HYDRA, *overrides]
        with contextlib.redirect_stderr(said):
            hydra.main(config_path=str(bundled("configs")), config_name=name, version_base="1.3")(take)()
        _say(said.getvalue())
    except UserError:
        raise
    except SystemExit as stop:
        if not stop.code:
            raise
        # Of argparse, with its usage; it repeats what was typed, so a password is masked like in every other message.
        raise _unread(name, schema, said.getvalue().strip().rpartition("error: ")[2], typed) from None
    except Exception as error:
        # Hydra could not compose the command line: it raises anything from its own errors to ValueError.
        raise _unread(name, schema, error, typed) from error
    if faults:
        raise faults[0]
    return configs[0] if configs else None


def _unread(name: str, schema: type[Section], why: object, typed: list[str]) -> UserError:
    remedies = [
        "write key=value, without spaces around the =; quote a list for the shell: 'a.b=[c,d]'",
        f"python -m raycv.{name} --help shows what it takes",
    ]
    what = f"The command line cannot be read: {why}\n  received: {shown(' '.join(typed), most=300)}"
    if verbatim_keys(schema):
        # Behind a mistyped key there may be a text, which is not repeated; the reason quotes it too.
        keys = [part.partition("=")[0] for part in typed if re.match(r"[\w./@~+:-]{1,40}=", part)]
        what = f"The command line cannot be read; its keys: {shown(' '.join(keys), most=300)}"
    return UserError(what, remedies=remedies)


def typed_keys(name: str) -> set[str]:
    """The keys that this process's command line sets, singly or by whole groups (experiment=x)."""
    from hydra.core.global_hydra import GlobalHydra

    # What composed this command is done, and Hydra composes one thing at a time.
    GlobalHydra.instance().clear()
    overrides = [part for part in _overrides(sys.argv[1:]) if part not in SILENT_HYDRA]
    values, defaults = _flat(compose(name, overrides)), _flat(compose(name, []))
    # A key that is set to its default is set all the same.
    named = {part.partition("=")[0].lstrip("+~") for part in overrides}
    return {
        key
        for key, value in values.items()
        if key not in defaults or value != defaults[key] or any(f"{key}.".startswith(f"{one}.") for one in named)
    }


def _overrides(arguments: list[str]) -> list[str]:
    """Those of `arguments` that set a key or a group, in Hydra's grammar."""
    return [part for part in arguments if re.match(r"[~+\w]\S*=|~", part)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.key` -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def without_verbatim(arguments: list[str], schema: type[Section]) -> tuple[list[str], dict[str, str]]:
    """`arguments` without those of the keys that take free text, and these: Hydra would read grammar into a text.

    Raises: UserError if a text is not UTF-8, or lacks its quotes.
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
            raise UserError(f"{key}: the text given is not UTF-8.", remedies=remedies) from error
        texts[key.lstrip("+")] = text
    stray = [argument for argument in rest if not re.match(r"-|~|\+*[\w./@]+=", argument)]
    if keys and stray and not {"--cfg", "-c"} & set(rest):
        raise UserError(
            f"{counted(len(stray), 'word')} on the command line belong to no key=value.",
            remedies=[
                f'write key=value, without dashes or spaces, and quote a text for the shell: {keys[0]}="..."',
                f"or read it from a file: {keys[0]}_file=post.txt",
            ],
        )
    return rest, texts


def _show_warnings() -> None:
    """Hydra's logging is off; what raycv warns of (retries, fallbacks) goes to stderr all the same."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Masked("%(levelname)s: %(message)s"))
    logger = logging.getLogger("raycv")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    for name, known in logging.root.manager.loggerDict.items():
        if name.startswith("raycv") and isinstance(known, logging.Logger):
            known.disabled = False


class _Masked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(mask_secrets(super().format(record)))


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own, but for passwords: an unexpected error of a client may hold the whole address."""
    sys.stderr.write(mask_secrets("".join(traceback.format_exception(kind, error, trace))))


def _say(text: str) -> None:
    """To standard error. That nobody takes it, as on a full disk, is no reason to fail."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def _refused(name: str, error: UserError) -> SystemExit:
    _say(printable(mask_secrets(f"\nraycv.{name}: {error}\n")))
    return SystemExit(error.exit_code)


def _for_hydra(arguments: list[str], schema: type[Section]) -> list[str]:
    if {"-m", "--multirun"} & set(arguments) or any(re.match(r"\+*hydra\.mode=", part) for part in arguments):
        raise UserError("--multirun is not supported.", remedies=["start a run for each value"])
    groups, texts = _groups(), text_keys(schema)
    known = {key for key, _ in fields(schema)}
    # Hydra takes no null for a group, although that is what `experiment` is unless it is given.
    given = [argument for argument in arguments if argument != "experiment=null"]
    return [_forced(argument, groups, known, texts) for argument in given]


def _groups() -> dict[str, set[str]]:
    folders = (folder for folder in bundled("configs").iterdir() if folder.is_dir())
    return {folder.name: {path.stem for path in folder.glob("*.yaml")} for folder in folders}


def _forced(argument: str, groups: dict[str, set[str]], known: set[str], texts: set[str]) -> str:
    """`a.b=c` as `++a.b=c`, so that an unknown key reaches our schema, which reports all faults at once with a remedy.

    The value of a key that takes text is quoted, so that numbers, spaces, commas and ~ need no second set of quotes.
    Raises: UserError if a whole group is set to a value, or to a file that it does not have.
    """
    match = re.match(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", argument, re.DOTALL)
    if match is None or match[2].split(".")[0] == "hydra":
        return argument
    key, value = match[2], match[3]
    if key in groups:
        if value not in groups[key]:
            raise UserError(
                f"{argument}: {key!r} is a group of keys, and {shown(value)} is none of its files.",
                remedies=[
                    f"choose one of them ({key}={', '.join(sorted(groups[key]))}), or set single keys: train.lr=1e-4"
                ],
            )
        return argument
    if key not in known:
        # Our schema refuses it, by its name alone: a mistyped post= must not be parsed, and repeated in the complaint.
        value = _quoted(value)
    elif key in texts and value != "null" and value[:1] not in ("'", '"'):
        value = _quoted(os.path.expanduser(value))
    return f"++{key}={value}"


def _quoted(text: str) -> str:
    """`text` as a quoted value of Hydra's grammar, where backslashes count only before a quote or at the end."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"


def _answer(
    name: str, schema: type[Section], typed: list[str], overrides: list[str], verbatim: dict[str, str]
) -> str | None:
    """What the command prints instead of doing its work, if it was asked to; `overrides` as Hydra takes them."""
    if {"-h", "--help"} & set(typed):
        return _usage(name, schema, overrides)
    if "--version" in typed:
        return f"raycv {__version__}\n"
    # Hydra's own would show the values as they stand in the files, unknown keys and all.
    if re.search(r"(?:^|\n)(?:--cfg|-c)(?:=|\n)job(?:$|\n)", "\n".join(typed)):
        return as_yaml(validate(schema, compose(name, overrides) | verbatim))
    # By their names alone: what is written behind one may be a text.
    options = [part.partition("=")[0] for part in typed]
    if unknown := [part for part in options if re.fullmatch(r"--?[a-z][\w.-]*", part) and part not in HYDRA_OPTIONS]:
        remedies = ["write key=value without dashes, say train.epochs=3", f"python -m raycv.{name} --help"]
        raise UserError(f"There is no option {', '.join(unknown)}.", remedies=remedies)
    return None


def _usage(name: str, schema: type[Section], overrides: list[str]) -> str:
    """What `--help` prints: every key with its value under `overrides`, and its meaning."""
    import yaml

    file = yaml.safe_load(bundled(f"configs/{name}.yaml").read_text(encoding="utf-8"))
    lines = [f"python -m raycv.{name} [key=value ...]", "", file["hydra"]["help"]["header"].rstrip(), ""]
    chosen = [entry for entry in file["defaults"] if isinstance(entry, dict) and " " not in next(iter(entry))]
    if chosen:
        groups = _groups()
        lines += ["Groups of keys, each in files to choose from (group=file):"]
        lines += [f"  {group}: {', '.join(sorted(groups[group]))}" for entry in chosen for group in entry] + [""]
    lines.append("Keys, with the value that they would have now:")
    values = compose(name, overrides, missing_ok=True)
    for key, field in fields(schema):
        if not field.description:
            lines.append("")
            continue
        value: Any = values
        for part in key.split("."):
            value = value[part]
        lines += [
            f"  {key}={yaml.safe_dump(value, default_flow_style=True, width=200).splitlines()[0]}",
            f"      {meaning(field)}",
        ]
    more = ["--cfg job checks and prints the same values as YAML. --hydra-help shows what else Hydra can do.", ""]
    return "\n".join([*lines, "", *more])


def compose(name: str, overrides: list[str], *, missing_ok: bool = False) -> dict[str, Any]:
    """The plain values of `configs/<name>.yaml` under `overrides`, outside a command (tests, notebooks).

    With `missing_ok` a value that must be given (???) is left as it is.
    """
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
        raise UserError(f"{error.full_key}: must be given.", remedies=[f"{error.full_key}=<value>"]) from error
    except OmegaConfBaseException as error:
        raise UserError(
            f"The configuration cannot be resolved: {error}",
            remedies=["give the missing value, or mend the ${...} reference; --cfg job shows the config as it stands"],
        ) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
