"""What the commands share: Hydra's entry, typed config, errors without tracebacks. The only module that knows Hydra."""

import logging
import os
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from raycv.config import Section, validate
from raycv.errors import UserError, shown
from raycv.paths import bundled

S = TypeVar("S", bound=Section)


def run_command(name: str, schema: type[S], body: Callable[[S], None]) -> None:
    """Composes `configs/<name>.yaml` with the command line, checks it against `schema` and calls `body`.

    Exit codes: 0 done; 2 something that the user can mend (printed without a traceback); 1 anything else.
    """
    started = False

    def task(config: object) -> None:
        nonlocal started
        started = True
        _show_warnings()
        try:
            body(_checked(schema, config))
        except UserError as error:
            # Here already: Hydra would print a line of its own about it.
            raise _refused(name, error) from None

    typed = sys.argv[1:]
    # Hydra then raises what it finds, and it is printed here like every other fault.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sys.argv[1:] = _for_hydra(typed)
        import hydra

        hydra.main(config_path=str(bundled("configs")), config_name=name, version_base="1.3")(task)()
    except UserError as error:
        raise _refused(name, error) from None
    except KeyboardInterrupt:
        sys.stderr.write(f"\nraycv.{name}: interrupted\n")
        raise SystemExit(130) from None
    except Exception as error:
        if started:
            raise
        # Hydra could not compose the command line: it raises anything from its own errors to ValueError.
        what = f"The command line cannot be read: {error}\n  received: {shown(' '.join(typed), most=300)}"
        unread = UserError(what, remedies=[f"python -m raycv.{name} --help shows what it takes"])
        raise _refused(name, unread) from None


def _show_warnings() -> None:
    """Hydra's logging is off; what raycv warns of (retries, fallbacks) goes to stderr all the same."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("raycv")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    for name, known in logging.root.manager.loggerDict.items():
        if name.startswith("raycv") and isinstance(known, logging.Logger):
            known.disabled = False


def _refused(name: str, error: UserError) -> SystemExit:
    sys.stderr.write(f"\nraycv.{name}: {error}\n")
    return SystemExit(error.exit_code)


def _for_hydra(arguments: list[str]) -> list[str]:
    if {"-m", "--multirun"} & set(arguments):
        raise UserError("--multirun is not supported.", remedies=["start a run for each value"])
    groups = {
        folder.name: {path.stem for path in folder.glob("*.yaml")}
        for folder in bundled("configs").iterdir()
        if folder.is_dir()
    }
    return [_forced(argument, groups) for argument in arguments]


def _forced(argument: str, groups: dict[str, set[str]]) -> str:
    """`a.b=c` as `++a.b=c`, so that an unknown key reaches our schema, which reports all faults at once with a remedy.

    Raises: UserError if a whole group is set to a value.
    """
    match = re.match(r"([A-Za-z_][\w.]*)=(.*)", argument, re.DOTALL)
    if match is None or match[1].split(".")[0] == "hydra":
        return argument
    key, value = match[1], match[2]
    if key not in groups:
        return f"++{argument}"
    if not re.fullmatch(r"[A-Za-z_][\w/,-]*", value) or value in ("null", "true", "false"):
        choices = ", ".join(sorted(groups[key]))
        raise UserError(
            f"{argument}: {key!r} is a group of keys and cannot be set to {shown(value)}.",
            remedies=[f"choose one of its files ({key}={choices}) or set a key in it ({key}.<key>=<value>)"],
        )
    return argument


def compose(name: str, overrides: list[str]) -> dict[str, object]:
    """The plain values of `configs/<name>.yaml` under `overrides`, outside a command (tests, notebooks)."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(config_dir=str(bundled("configs")), version_base="1.3"):
        return _plain(hydra_compose(name, overrides))


def _checked(schema: type[S], config: object) -> S:
    return validate(schema, _plain(config))


def _plain(config: object) -> dict[str, object]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(
            f"The configuration cannot be resolved: {error}",
            remedies=["give the missing value, or mend the ${...} reference; --cfg job shows the config as it stands"],
        ) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
