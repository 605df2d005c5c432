"""The errors that are meant for the user: printed without a traceback, exit code 2, or 1 for a failed run."""

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(Exception):
    """A fault that the user can fix: a config value, a file, a missing model, an unreachable service.

    The message names the fault, the value and the next step. It never holds the text of a post.
    """

    exit_code = 2

    def __init__(self, what: str, *, remedies: Sequence[str] = ()) -> None:
        """Stores the parts of the message.

        Args:
            what: The fault in one or more sentences.
            remedies: The next steps. Several are printed with numbers.
        """
        self.what = what
        self.remedies = list(remedies)
        super().__init__(self._text())

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel from workers to the driver. Pickle would call the constructor with the whole text, so we pass
        # the parts.
        return _rebuild, (self.what, self.remedies)

    def _text(self) -> str:
        if not self.remedies:
            return self.what
        if len(self.remedies) == 1:
            return f"{self.what}\n  What to do: {self.remedies[0]}"
        lines = "\n".join(f"  {i}. {remedy}" for i, remedy in enumerate(self.remedies, 1))
        return f"{self.what}\nWhat to do:\n{lines}"


def together(errors: Sequence[UserError]) -> UserError:
    """Joins one or more errors into one, with the remedies of each."""
    if len(errors) == 1:
        return errors[0]
    remedies = [remedy for error in errors for remedy in error.remedies]
    return UserError("\n".join(error.what for error in errors), remedies=list(dict.fromkeys(remedies)))


def _rebuild(what: str, remedies: Sequence[str]) -> UserError:
    return UserError(what, remedies=remedies)


class RunFailedError(UserError):
    """A failure of the run itself, not of its input: a fold died, or training failed. Printed like any user error."""

    exit_code = 1


class NotShownError(UserError):
    """A comparison does not show what the user requires of it. Scripts see it by the exit code 1."""

    exit_code = 1


class FaultsError(UserError):
    """All faults that one pass over a config or a data set found, reported together."""

    def __init__(self, title: str, faults: Sequence[str], *, remedies: Sequence[str] = (), most: int = 50) -> None:
        """Builds the list of faults.

        Args:
            title: The first line of the message, before the number of faults.
            faults: The faults, a line each.
            remedies: The next steps.
            most: Faults to print at most. The message counts the rest.
        """
        self.faults = list(faults)
        shown = [f"  - {fault}" for fault in self.faults[:most]]
        if len(self.faults) > most:
            shown.append(f"  ... and {len(self.faults) - most} more")
        super().__init__(f"{title}: {counted(len(self.faults), 'fault')}\n" + "\n".join(shown), remedies=remedies)


def counted(number: float, noun: str) -> str:
    """A number with its noun: `1 fold`, `2 folds`, `0.5 folds`, `1,000,000 folds`."""
    shown = f"{number:,g}" if isinstance(number, float) else f"{number:,}"
    return f"{shown} {noun}" if number == 1 else f"{shown} {noun}s"


def first_of(names: Sequence[str], most: int) -> str:
    """The first `most` of `names` for a message, and the number of the others."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def printable(text: str) -> str:
    """`text` for a terminal: codes replace control characters, except line breaks and tabs."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def shown(value: object, most: int = 40) -> str:
    """`value` for a message: quoted if short, else its length only, since a shifted column can hold post text."""
    text = str(value)
    return repr(text) if len(text) <= most else f"a value of {len(text)} characters"
