"""Prints one line for the user, with secrets masked, and formats durations."""

from rich.console import Console

from raycv.common.secrets import mask_secrets
from raycv.errors import printable


def say(console: Console, text: str, style: str | None = None) -> None:
    """Prints a line without markup, highlighting or wrapping, so that paths can be copied. Masks secrets."""
    console.print(
        printable(mask_secrets(text)), style=style, markup=False, emoji=False, highlight=False, soft_wrap=True
    )


def duration(seconds: float) -> str:
    """`seconds` as `1:02:03` or `2:03`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
