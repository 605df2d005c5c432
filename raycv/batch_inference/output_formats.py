"""Writes rows of scores as CSV, JSON lines or Parquet while the output grows."""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from raycv.batch_inference.output_place import part_of
from raycv.batch_inference.state import Progress
from raycv.common.files import replaced
from raycv.errors import UserError

# --- CSV and JSON lines ----------------------------------------------------------------------------------------------


class TextPart:
    """Collects the rows as lines of one file, until the output is complete."""

    def __init__(self, path: Path, columns: Sequence[str], *, as_json: bool) -> None:
        self.path = path
        self._columns = tuple(columns)
        self._as_json = as_json

    def resume(self, progress: Progress) -> None:
        """Starts, or cuts off what came after `progress`. Raises: UserError if less than `progress` is there."""
        if progress.records:
            cut_to(self.path, progress.part_bytes)
        else:
            append_bytes(self.path, b"", at=0)

    def append(self, rows: Sequence[tuple[Any, ...]], before: Progress) -> int:
        """Writes the rows of the chunk after `before`. Returns the bytes of the file."""
        if self._as_json:
            lines = json_lines(self._columns, rows)
        else:
            lines = csv_lines(rows if before.records else [self._columns, *rows])
        return append_bytes(self.path, lines.encode("utf-8"), at=before.part_bytes)

    def left(self) -> bool:
        """Whether rows that were written are still there."""
        return self.path.exists()

    def finish(self, output: Path) -> None:
        """Moves all rows to `output`."""
        os.replace(self.path, output)

    def finished(self, output: Path, progress: Progress) -> bool:
        """Whether `output` is the result of `finish`, judged by its size."""
        return not self.left() and output.is_file() and output.stat().st_size == progress.part_bytes

    def discard(self) -> None:
        """Removes what is left."""
        self.path.unlink(missing_ok=True)


def csv_lines(rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(
        [str(value).lower() if isinstance(value, bool) else value for value in row] for row in rows
    )
    return buffer.getvalue()


def json_lines(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    records = (dict(zip(columns, row, strict=True)) for row in rows)
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


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
    """Collects a file per chunk, named after the number of records before it. They become row groups of one file.

    Its methods are those of `TextPart`, but `append` returns 0, and `finished` compares numbers of rows.
    """

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

    def append(self, rows: Sequence[tuple[Any, ...]], before: Progress) -> int:
        import pyarrow
        import pyarrow.parquet

        if rows:
            values = zip(*rows, strict=True)
            arrays = [pyarrow.array(column, kind.type) for column, kind in zip(values, self._schema(), strict=True)]
            table = pyarrow.Table.from_arrays(arrays, schema=self._schema())
            with replaced(self.path / f"{before.records:015}.parquet", private=True) as temporary:
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


def sink_of(output: Path, columns: Sequence[str], fold_type: type) -> TextPart | ParquetParts:
    """The sink for the format of `output`. `fold_type` is that of the column `fold`."""
    ending = output.suffix.casefold()
    if ending == ".parquet":
        return ParquetParts(part_of(output), columns, fold_type)
    return TextPart(part_of(output), columns, as_json=ending == ".jsonl")
