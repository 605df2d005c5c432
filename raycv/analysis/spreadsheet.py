"""Writes the CSV files of `raycv.compare` and `raycv.mistakes`: cells guarded, files of others never replaced."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raycv.common.files import unwritable, write_bytes
from raycv.errors import UserError
from raycv.rendering.blocks import for_spreadsheet


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns a CSV table with guarded cells. An undefined value (None) becomes an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = map(row.get, columns)
        writer.writerow([for_spreadsheet(cell) if isinstance(cell, str) else cell for cell in cells])
    return text.getvalue()


def check_free(path: Path, mark: str) -> None:
    """Checks that `path` is free, or holds an earlier output of the same kind.

    Args:
        path: The file to write.
        mark: A text near the beginning of each output of this kind.

    Raises:
        UserError: It is a folder or another file, or its folder does not exist.
    """
    remedies = ["give another name: output=<name>"]
    if not path.absolute().parent.is_dir():
        what = f"output: the folder {path.absolute().parent} does not exist."
        raise UserError(what, kind="disk-unwritable", remedies=["make it", *remedies])
    try:
        with path.open("rb") as opened:
            ours = mark.encode() in opened.read(4096)
    except FileNotFoundError:
        return
    except OSError as error:
        what = f"output: {path} cannot be replaced: {error.strerror}."
        raise UserError(what, kind="disk-unwritable", remedies=remedies) from error
    if not ours:
        what = f"output: {path} exists, and raycv did not write it."
        raise UserError(what, kind="output-exists", remedies=remedies)


def write_output(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes a file whole or not at all. `private`: only the user may read it. Raises: UserError if that fails."""
    try:
        write_bytes(path, content, private=private)
    except OSError as error:
        raise unwritable(path.name, path.absolute().parent, error) from error
