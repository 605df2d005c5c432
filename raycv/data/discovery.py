"""Finds by the columns which file of a folder holds which table."""

import difflib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from raycv.common.column_names import misspelt, near_misses
from raycv.common.table_reader import folded, read_columns, separator_of
from raycv.common.text_files import UnreadableError, check_file
from raycv.errors import counted, first_of
from raycv.row_faults import Faults, Kind, named

POSTS, GROUNDTRUTH, ANNOTATIONS, CRITERIA = "posts", "groundtruth", "annotations", "criteria"

COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    # A file counts as the first table whose columns it has, so the order matters. Alternative names are in one tuple.
    ANNOTATIONS: (("post_id",), ("sentence_id",), ("dsm5_symptom",), ("status",)),
    GROUNDTRUTH: (("post_id",), ("criterion_id",), ("label",)),
    POSTS: (("post_id",), ("post", "text")),
    CRITERIA: (("criterion_id",), ("criterion", "text")),
}
"""The required columns of each table of the specification and of the ReDSM5 release, in small letters."""
OPTIONAL: dict[str, tuple[tuple[str, ...], ...]] = {CRITERIA: (("symptom",),)}
"""The optional columns of a table."""
_SPELT = {"dsm5_symptom": "DSM5_symptom"}
_KNOWN_COLUMNS = {name for columns in COLUMNS.values() for names in columns for name in names} | {"id"}

_HINTS = {
    ANNOTATIONS: ("annotation",),
    GROUNDTRUTH: ("groundtruth", "ground_truth", "ground-truth", "label"),
    POSTS: ("post",),
    CRITERIA: ("crite",),
}
_NAMED_LIKE = {
    ANNOTATIONS: "redsm5_annotations.csv",
    GROUNDTRUTH: "groundtruth.csv",
    POSTS: "posts.csv or redsm5_posts.csv",
    CRITERIA: "criteria.csv or criteria.json",
}
_SUFFIXES = (".csv", ".tsv", ".json")
_UNREAD = {
    ".xlsx": "an Excel workbook", ".xls": "an Excel workbook", ".ods": "a LibreOffice workbook",
    ".parquet": "a Parquet file", ".jsonl": "a file of JSON lines", ".gz": "a gzip archive", ".zip": "a zip archive",
}  # fmt: skip
"""Endings of files that hold tables in forms that raycv does not read, or not in a data set."""
_MOST_NAMES = 12


@dataclass(frozen=True)
class Sources:
    """The files to read. None stands for the unused label table, or for a missing file, which is then a fault."""

    posts: Path | None
    groundtruth: Path | None
    annotations: Path | None
    criteria: Path | None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    path: Path
    spelt: tuple[str, ...] = ()
    """The columns as the file spells them."""
    problem: UnreadableError | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return folded(self.spelt)

    @property
    def table(self) -> str | None:
        return next((table for table in COLUMNS if not missing_columns(table, self.columns)), None)

    @property
    def named_like(self) -> str | None:
        stem = self.path.stem.casefold()
        return next((table for table, hints in _HINTS.items() if any(hint in stem for hint in hints)), None)

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.path.name} (cannot be read: {self.problem.detail})"
        return f"{self.path.name} ({_column_list(self.spelt)})"


def unread_form(path: Path) -> UnreadableError | None:
    """The fault of a file that holds a table in a form that raycv does not read; None for any other file."""
    form = _UNREAD.get(path.suffix.casefold())
    return UnreadableError("ENCODING", f"{form}, which raycv does not read as a table") if form else None


@dataclass(frozen=True)
class _Folder:
    path: Path
    files: list[_File]
    others: list[str]

    @property
    def unread(self) -> list[_File]:
        """The files that may hold a table in a form that raycv does not read."""
        others = [self.path / name for name in self.others]
        return [_File(path, problem=problem) for path in others if (problem := unread_form(path))]

    def of(self, table: str) -> list[_File]:
        return [file for file in self.files if file.table == table]

    def found(self) -> str:
        """The content of the folder for a message: tables with their columns, then the names of all other entries."""
        names = [str(file) for file in self.files] + self.others
        return first_of(names, _MOST_NAMES) or "nothing"


def find_sources(posts_dir: Path, criteria_dir: Path, faults: Faults) -> Sources:
    """Finds the tables in `posts_dir` and the criteria in `criteria_dir` (maybe the same), but not in subfolders."""
    folder = _scan(posts_dir, Kind.FOLDER, faults)
    criteria_dir = _spelt_as_on_disk(criteria_dir, faults)
    same = os.path.realpath(posts_dir) == os.path.realpath(criteria_dir)
    criteria_folder = folder if same else _scan(criteria_dir, Kind.NO_CRITERIA, faults)
    posts = labels = groundtruth = annotations = criteria = None
    if folder is not None:
        posts = _pick(folder, (POSTS,), Kind.NO_TABLE, faults)
        labels = _pick(folder, (GROUNDTRUTH, ANNOTATIONS), Kind.NO_TABLE, faults)
        if labels is not None:
            groundtruth, annotations = (labels.path, None) if labels.table == GROUNDTRUTH else (None, labels.path)
    if criteria_folder is not None:
        criteria = _pick(criteria_folder, (CRITERIA,), Kind.NO_CRITERIA, faults)
    unused = [] if folder is None or same else folder.of(CRITERIA)
    return Sources(
        posts=posts.path if posts else None,
        groundtruth=groundtruth,
        annotations=annotations,
        criteria=criteria.path if criteria else None,
        warnings=[
            f"{file.path} looks like criteria and is not used, since data.criteria_dir is {criteria_dir}; to use it: "
            f"data.criteria_dir={posts_dir}"
            for file in unused
        ]
        + [warning for file in (posts, labels, criteria) if file is not None for warning in _unread(file)],
    )


def find_criteria(criteria_dir: Path, faults: Faults) -> Path | None:
    """Finds the criteria in `criteria_dir` without posts; None, with a fault, for no such file or several."""
    folder = _scan(_spelt_as_on_disk(criteria_dir, faults), Kind.NO_CRITERIA, faults)
    found = _pick(folder, (CRITERIA,), Kind.NO_CRITERIA, faults) if folder is not None else None
    return found.path if found else None


def missing_columns(table: str, columns: tuple[str, ...]) -> list[str]:
    """The columns that `table` needs and `columns` lacks, for a message."""
    return [_either(names) for names in COLUMNS[table] if not set(names) & set(columns)]


def text_column(table: str, columns: tuple[str, ...]) -> list[str]:
    """The columns that can hold the text of `table` (posts or criteria); more than one is a fault."""
    return [name for name in COLUMNS[table][1] if name in columns]


def _either(names: tuple[str, ...]) -> str:
    return " (or ".join(f"`{_SPELT.get(name, name)}`" for name in names) + ")" * (len(names) - 1)


def _column_list(columns: tuple[str, ...]) -> str:
    """The columns of a file for a message. Without a known name the first line may be data, so only their number."""
    if not columns:
        return "no columns"
    words = {word for column in folded(columns) for word in re.split(r"[;|\t]", column)}
    if not words & _KNOWN_COLUMNS:
        return f"{counted(len(columns), 'column')}, no known name in the first line"
    return "columns: " + first_of([named(name.strip()) for name in columns], _MOST_NAMES)


# --- Folders ---------------------------------------------------------------------------------------------------------


def _scan(path: Path, kind: Kind, faults: Faults) -> _Folder | None:
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        faults.add(kind, path, f"looked for the folder {os.path.abspath(path)}: {_folder_problem(path, error)}")
        return None
    tables = [entry for entry in entries if entry.suffix.casefold() in _SUFFIXES and not entry.name.startswith(".")]
    others = [entry.name for entry in entries if entry not in tables]
    return _Folder(path, [_peek(entry) for entry in tables], others)


def _folder_problem(path: Path, error: OSError) -> str:
    if isinstance(error, NotADirectoryError) and path.is_file():
        return "a file; give the folder that holds it"
    if not isinstance(error, FileNotFoundError):
        return str(error.strerror)
    if path.is_symlink():
        return "a symbolic link that cannot be followed: there is nothing where it leads"
    parent = next((parent for parent in path.absolute().parents if parent.is_dir()), None)
    if parent is None:
        return "it does not exist"
    try:
        names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        return "it does not exist"
    if near := difflib.get_close_matches(path.name, names, n=1):
        return f"it does not exist; did you mean {parent / near[0]}?"
    return f"it does not exist; {parent} holds: {first_of(names, _MOST_NAMES) or 'nothing'}"


def _spelt_as_on_disk(path: Path, faults: Faults) -> Path:
    """`path`, or if it is missing, its sibling with another spelling of the name: data/DSM5 for data/dsm5."""
    if os.path.lexists(path):
        return path
    try:
        siblings = sorted(sibling for sibling in path.parent.iterdir() if _plain(sibling) == _plain(path))
    except OSError:
        return path
    if len(siblings) > 1:
        names = " and ".join(sibling.name for sibling in siblings)
        faults.add(Kind.AMBIGUOUS, path, f"does not exist, and it is not clear which of its siblings is meant: {names}")
    return siblings[0] if siblings else path


def _plain(path: Path) -> str:
    return "".join(character for character in path.name.casefold() if character.isalnum())


def _peek(path: Path) -> _File:
    try:
        check_file(path)
        return _File(path, read_columns(path))
    except UnreadableError as problem:
        return _File(path, problem=problem)


# --- Tables ----------------------------------------------------------------------------------------------------------


def _pick(folder: _Folder, tables: tuple[str, ...], missing: Kind, faults: Faults) -> _File | None:
    """The only file of `folder` that holds one of `tables`. If there are several or none, it reports a fault."""
    matches = [file for table in tables for file in folder.of(table)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(str(file) for file in matches)
        faults.add(Kind.AMBIGUOUS, folder.path, f"{len(matches)} files look like {' or '.join(tables)}: {names}")
        return None
    suspects = [file for file in (*folder.files, *folder.unread) if file.table is None and file.named_like in tables]
    for file in suspects:
        _report_suspect(file, faults)
    if not suspects:
        wanted = ", or ".join(
            f"`{table}` with the columns {', '.join(map(_either, COLUMNS[table]))} (such as {_NAMED_LIKE[table]})"
            for table in tables
        )
        where = os.path.abspath(folder.path)
        faults.add(missing, folder.path, f"no table {wanted}; looked in {where}; found: {folder.found()}")
    return None


def _unread(file: _File) -> list[str]:
    """A warning for each column that resembles a known one and is not read.

    The file has every column that it must have, so such a column changes no number.
    """
    table = str(file.table)
    return [
        f"{file.path}: the column {miss.shown} is not read"
        + (f", since `{miss.beside}` is." if miss.beside else f"; if it is the `{miss.meant}`, rename it to that.")
        for miss in near_misses(file.spelt, (*COLUMNS[table], *OPTIONAL.get(table, ())))
    ]


def _report_suspect(file: _File, faults: Faults) -> None:
    if file.problem is not None:
        faults.add(Kind[file.problem.kind], file.path, file.problem.detail, file.problem.place)
    elif file.path.suffix.casefold() == ".json" and not file.spelt:
        records = "records: pandas.DataFrame.to_json(orient='records') writes one"
        faults.add(Kind.JSON, file.path, f"holds no list of {CRITERIA if file.named_like == CRITERIA else records}")
    else:
        table = str(file.named_like)
        lacking = ", ".join(missing_columns(table, file.columns))
        meant = misspelt(COLUMNS[table], file.spelt)
        is_tsv = file.path.suffix.casefold() == ".tsv"
        found, separator = _column_list(file.spelt), separator_of(file.columns, tabs=is_tsv)
        if separator:
            found += f", separated by {separator}" + (", in a file whose ending promises tabs" if is_tsv else "")
            faults.add(Kind.SEPARATOR, file.path, f"{found} ({table} table)", "line 1")
        else:
            faults.add(Kind.COLUMN, file.path, f"{lacking} missing ({table} table); {found}{meant}", "line 1")
