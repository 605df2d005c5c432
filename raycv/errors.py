"""The one error type that is meant for the user: printed without a traceback, exit code 2."""

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(Exception):
    """Something that the user can mend: a config value, a file, a missing model, an unreachable service.

    The message says what happened, with which value, and what to do next. It never holds post text.
    """

    exit_code = 2

    def __init__(self, what: str, *, remedies: Sequence[str] = ()) -> None:
        """`what`: one or more sentences; `remedies`: what to do next, printed numbered when there are several."""
        self.what = what
        self.remedies = list(remedies)
        super().__init__(self._text())

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel from workers to the driver, and the default would call the constructor with the whole text.
        return _rebuild, (self.what, self.remedies)

    def _text(self) -> str:
        if not self.remedies:
            return self.what
        if len(self.remedies) == 1:
            return f"{self.what}\n  What to do: {self.remedies[0]}"
        lines = "\n".join(f"  {i}. {remedy}" for i, remedy in enumerate(self.remedies, 1))
        return f"{self.what}\nWhat to do:\n{lines}"


def together(errors: Sequence[UserError]) -> UserError:
    """One or more errors as one, with what to do about each."""
    if len(errors) == 1:
        return errors[0]
    remedies = [remedy for error in errors for remedy in error.remedies]
    return UserError("\n".join(error.what for error in errors), remedies=list(dict.fromkeys(remedies)))


def _rebuild(what: str, remedies: Sequence[str]) -> UserError:
    return UserError(what, remedies=remedies)


class RunFailedError(UserError):
    """The run itself failed: a fold died, training broke down. Printed like any user error, but not a wrong input."""

    exit_code = 1


class FaultsError(UserError):
    """Several faults found in one pass over a config or a data set, reported together."""

    def __init__(self, title: str, faults: Sequence[str], *, remedies: Sequence[str] = (), most: int = 50) -> None:
        """`title` names what was checked; at most `most` faults are printed, the rest are counted."""
        self.faults = list(faults)
        shown = [f"  - {fault}" for fault in self.faults[:most]]
        if len(self.faults) > most:
            shown.append(f"  ... and {len(self.faults) - most} more")
        super().__init__(f"{title}: {counted(len(self.faults), 'fault')}\n" + "\n".join(shown), remedies=remedies)


def counted(number: float, noun: str) -> str:
    """`1 fold`, `2 folds`, `0.5 folds`, `1,000,000 folds`."""
    shown = f"{number:,g}" if isinstance(number, float) else f"{number:,}"
    return f"{shown} {noun}" if number == 1 else f"{shown} {noun}s"


def printable(text: str) -> str:
    """`text` for a terminal: control characters, but for line breaks and tabs, by their codes."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def shown(value: object, most: int = 40) -> str:
    """`value` for a message: quoted if short, else only its length, since a shifted column can hold post text."""
    text = str(value)
    return repr(text) if len(text) <= most else f"a value of {len(text)} characters"
