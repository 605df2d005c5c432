"""Writes rows of scores as CSV, JSON lines or Parquet while the output grows."""

import csv
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raycv.common.files import replaced
from raycv.common.numerics import FIRST_NUMERICS
from raycv.errors import UserError


@dataclass(frozen=True)
class Progress:
    """The part of the output that is safely on disk."""

    identity: dict[str, Any]
    """the facts that the scores depend on; only a run with the same facts may continue the output"""
    records: int = 0
    pairs: int = 0
    matched: int = 0
    truncated: int = 0
    bad: int = 0
    precision: str | None = None
    attention: str | None = None
    """None before the first chunk, and in states of earlier versions"""
    threshold: float | None = None
    part_bytes: int = 0
    errors_bytes: int = 0
    finished: bool = False
    """everything is scored; only the move into place is left"""
    numerics: int = FIRST_NUMERICS
    """the number of the arithmetic of the scores (`raycv.common.numerics.NUMERICS`)"""


class Sink(Protocol):
    """Takes the rows until the output is complete."""

    path: Path
    """the file or folder of the rows"""

    def resume(self, progress: Progress) -> None:
        """Starts, or cuts off what came after `progress`. Raises: UserError if less than `progress` is there."""

    def append(self, rows: Sequence[tuple[Any, ...]], records: int) -> int:
        """Writes the rows of the chunk after `records` records. Returns the bytes of the file; for Parquet 0."""

    def left(self) -> bool:
        """Whether `path` exists: rows that were written are still there."""

    def finish(self, output: Path) -> None:
        """Moves all rows to `output`."""

    def finished(self, output: Path, progress: Progress) -> bool:
        """Whether `output` is the result of `finish`, judged by its size or its number of rows."""

    def discard(self) -> None:
        """Removes all that is left at `path`."""


ERRORS_HEADER = b"row,line,reason\n"
"""Marks the list of an earlier run, which may be replaced. Without it the file belongs to another program."""


def part_of(output: Path) -> Path:
    """The place of the scores until they are complete."""
    return beside(output, "parts" if output.suffix.casefold() == ".parquet" else "part")


def beside(output: Path, ending: str) -> Path:
    return output.with_name(f"{output.name}.{ending}")


# --- CSV and JSON lines ----------------------------------------------------------------------------------------------


class TextPart:
    """Collects the rows as lines of one file."""

    def __init__(self, path: Path, columns: Sequence[str], line_of: Any) -> None:
        self.path = path
        self._columns = tuple(columns)
        self._line_of = line_of
        self._bytes = 0

    def resume(self, progress: Progress) -> None:
        if progress.records == 0:
            header = csv_line(self._columns, self._columns) if self._line_of is csv_line else ""
            self._bytes = append_bytes(self.path, header.encode("utf-8"), at=0)
            return
        cut_to(self.path, progress.part_bytes)
        self._bytes = progress.part_bytes

    def append(self, rows: Sequence[tuple[Any, ...]], records: int) -> int:
        lines = "".join(self._line_of(self._columns, row) for row in rows)
        self._bytes = append_bytes(self.path, lines.encode("utf-8"), at=self._bytes)
        return self._bytes

    def left(self) -> bool:
        return self.path.exists()

    def finish(self, output: Path) -> None:
        os.replace(self.path, output)

    def finished(self, output: Path, progress: Progress) -> bool:
        return not self.left() and output.is_file() and output.stat().st_size == progress.part_bytes

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


def csv_line(columns: Sequence[str], row: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(
        str(value).lower() if isinstance(value, bool) else value for value in row
    )
    return buffer.getvalue()


def json_line(columns: Sequence[str], row: Sequence[Any]) -> str:
    return json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False, allow_nan=False) + "\n"


def append_bytes(path: Path, data: bytes, *, at: int) -> int:
    """Writes `data` at byte `at`, cuts off the rest, and syncs the file to disk. Returns its new size."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.seek(at)
        file.write(data)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def cut_to(path: Path, size: int) -> None:
    """Cuts `path` to `size` bytes. Raises: UserError if it has fewer."""
    there = path.stat().st_size if path.exists() else 0
    if there < size:
        raise changed_since(path, f"{there:,} bytes", f"{size:,}")
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_NOFOLLOW), "wb") as file:
        file.truncate(size)


def clear(path: Path) -> None:
    """Removes a file, a link (not its target), or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def changed_since(path: Path, there: str, written: str) -> UserError:
    remedies = ["delete it and the .state.json beside it, and start again"]
    return UserError(
        f"{path} has {there}, and {written} were written: it was changed since.",
        kind="output-differs",
        remedies=remedies,
    )


# --- Parquet ---------------------------------------------------------------------------------------------------------


class ParquetParts:
    """Collects a file per chunk, named after the number of records before it. They become row groups of one file."""

    def __init__(self, folder: Path, columns: Sequence[str], fold_type: type) -> None:
        self.path = folder
        self._columns = tuple(columns)
        self._fold_type = fold_type

    def resume(self, progress: Progress) -> None:
        self.path.mkdir(mode=0o700, exist_ok=True)
        for path in self._parts():
            if int(path.stem) >= progress.records:
                path.unlink()
        rows = sum(_parquet(path).metadata.num_rows for path in self._parts())
        if rows != progress.pairs:
            raise changed_since(self.path, f"{rows:,} rows", f"{progress.pairs:,}")

    def left(self) -> bool:
        return self.path.exists()

    def append(self, rows: Sequence[tuple[Any, ...]], records: int) -> int:
        import pyarrow
        import pyarrow.parquet

        if rows:
            values = zip(*rows, strict=True)
            arrays = [pyarrow.array(column, kind.type) for column, kind in zip(values, self._schema(), strict=True)]
            table = pyarrow.Table.from_arrays(arrays, schema=self._schema())
            with replaced(self.path / f"{records:015}.parquet", private=True) as temporary:
                pyarrow.parquet.write_table(table, temporary)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
        return 0

    def finish(self, output: Path) -> None:
        import pyarrow.parquet

        with replaced(output, private=True) as temporary:
            with pyarrow.parquet.ParquetWriter(temporary, self._schema()) as writer:
                for path in self._parts():
                    writer.write_table(_parquet(path).read())
            temporary.chmod(0o600)

    def finished(self, output: Path, progress: Progress) -> bool:
        try:
            return bool(_parquet(output).metadata.num_rows == progress.pairs)
        except (OSError, ValueError):
            return False

    def discard(self) -> None:
        if self.left():
            shutil.rmtree(self.path)

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("*.parquet"))

    def _schema(self) -> Any:
        import pyarrow

        kinds = {
            "row": pyarrow.int64(),
            "score": pyarrow.float64(),
            "threshold": pyarrow.float64(),
            "fold": pyarrow.int64() if self._fold_type is int else pyarrow.string(),
            "truncated": pyarrow.bool_(),
        }
        return pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in self._columns])


def _parquet(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)
