"""Parses cells into ids, labels, posts and criteria, and derives pairs from the annotations of ReDSM5."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from raycv.common.table_reader import Missing, Row, Table, is_blank, is_missing, read_table
from raycv.data.discovery import CRITERIA, POSTS, Sources, text_column
from raycv.data.types import ALIASES, SYMPTOMS, Pair, criterion_code, symptom_name
from raycv.row_faults import Faults, Kind, NumberedIds, is_rounded, listed, named

_NO_SYMPTOM = "SPECIAL_CASE"
"""A name of the release beside the nine symptoms. Its rows are skipped."""
# pandas writes 1.0 and 0.0 for a column of numbers that once had an empty cell.
_LABELS = {"yes": 1, "no": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0, "true": 1, "false": 0}
_ID_LIMIT = 100
_NAME = re.compile(r"[A-Za-z][\w-]{0,39}", re.ASCII)

# --- Posts and criteria ----------------------------------------------------------------------------------------------


@dataclass
class Texts:
    """The posts or the criteria of a file."""

    path: Path
    whole: bool
    texts: dict[str, str] = field(default_factory=dict)
    """id -> text, which may be blank."""
    missing: dict[str, str] = field(default_factory=dict)
    """id -> the spelling in its cell, if that is one of MISSING and counts as an empty text."""
    places: dict[str, str] = field(default_factory=dict)
    """id -> its place in the file. Faulty rows are included, so that references to them are not further faults."""
    looks: dict[str, str] = field(default_factory=dict)
    """Compatible form of an id (NFKC) -> the id. Two ids with one form look alike: one id, typed in two ways."""
    symptoms: dict[str, str] = field(default_factory=dict)
    """Criteria only: id -> the name in its column `symptom`, if that is one word."""
    codes: dict[str, str] = field(default_factory=dict)
    """Criteria only: A.1 to A.9 -> the spelling of that id in the file."""

    @cached_property
    def numbered(self) -> NumberedIds:
        """The ids that are numbers. All rows were read before the first use."""
        return NumberedIds(self.places)

    def blank(self) -> list[str]:
        """The ids without text, sorted."""
        return sorted(key for key, text in self.texts.items() if is_blank(text))

    def kept(self) -> list[str]:
        """The ids with text, sorted as plain strings."""
        blank = set(self.blank())
        return sorted(key for key in self.texts if key not in blank)

    def symptom_of(self, criterion_id: str) -> str | None:
        """The symptom name of a criterion.

        Returns:
            The name in the file, if it is unique there and is not an id. Otherwise the name in ReDSM5, if the file has
            exactly the nine criteria. Otherwise None.
        """
        name = self.symptoms.get(criterion_id)
        if name and name not in self.texts and list(self.symptoms.values()).count(name) == 1:
            return name
        if set(self.codes) != set(SYMPTOMS.values()) or len(self.places) != len(SYMPTOMS):
            # In a file with other criteria, A.1 need not be that of the DSM-5, so we give no name.
            return None
        code = criterion_code(criterion_id)
        return next((name for name in SYMPTOMS if SYMPTOMS[name] == code), None)

    def find(self, name: str) -> str | None:
        """The id in the file for `name`, which is that id or another spelling of it; None if there is no such id."""
        if name in self.places:
            return name
        code = criterion_code(name)
        return self.codes.get(code) if code else None


def read_texts(path: Path | None, table: str, faults: Faults, missing: Missing) -> Texts | None:
    """Reads posts or criteria, without the rows that have a fault.

    Args:
        path: The file; None if it is missing.
        table: POSTS or CRITERIA.
        faults: Takes the faults.
        missing: Whether NaN and the like in a cell of text count as empty. Ids stay unchanged.

    Returns:
        The posts or criteria; None without a path.
    """
    if path is None:
        return None
    file = read_table(path, faults)
    columns = text_column(table, file.columns)
    if len(columns) > 1:
        detail = f"both {' and '.join(columns)} are there: it is not clear which holds the text"
        faults.add(Kind.AMBIGUOUS, path, detail, "line 1")
    found = Texts(path, file.whole)
    for row in file.rows:
        key = _new_id(row, table, found, faults)
        if key is not None and not row.broken and columns:
            found.texts[key] = text = row.values[columns[0]]
            if missing == "empty" and is_missing(text):
                found.texts[key], found.missing[key] = "", text.strip()
            name = row.id("symptom")
            # Messages and tables repeat a name, so we take none that could be prose.
            if table == CRITERIA and _NAME.fullmatch(name) and not (missing == "empty" and is_missing(name)):
                found.symptoms[key] = name
    return found


def _new_id(row: Row, table: str, found: Texts, faults: Faults) -> str | None:
    """The id of a row, also added to `found`; None if it is faulty, or if an earlier row has it."""
    id_column = "post_id" if table == POSTS else "criterion_id"
    key = row.id(id_column)
    code = criterion_code(key) if table == CRITERIA else None
    if row.broken and not key:
        return None
    look = unicodedata.normalize("NFKC", key)
    same = key if key in found.places else found.looks.get(look, found.codes.get(code or ""))
    if fault := id_fault(key, is_criterion=table == CRITERIA):
        faults.add(Kind.ID, found.path, f"{id_column} {fault}", row.place)
        found.places.setdefault(key, row.place)
        return None
    if same is not None:
        detail = f"{id_column} {named(key)} is already on {found.places[same]}"
        detail += f", written {named(same)}" if same != key else ""
        kind = Kind.ROUNDED if is_rounded(key) else Kind.DUPLICATE_ID
        faults.add(kind, found.path, detail + _note(key), row.place)
        return None
    found.places[key] = row.place
    found.looks[look] = key
    if code:
        found.codes[code] = key
    return key


def _note(*ids: str) -> str:
    """The end of a message about `ids`, if a spreadsheet rounded one of them."""
    return "; a spreadsheet rounded it" if any(map(is_rounded, ids)) else ""


def id_fault(key: str, *, is_criterion: bool) -> str | None:
    """The fault of `key` as an id, for a message; None if it has no fault."""
    if is_blank(key):
        return f"holds nothing but invisible characters ({len(key)})" if key else "is empty"
    if len(key) > _ID_LIMIT:
        return f"has {len(key):,} characters, more than {_ID_LIMIT}: not an id, perhaps a text"
    if not key.isprintable():
        return f"holds a line break or another character that cannot be shown ({len(key)} characters)"
    if is_criterion and (re.search(r"[/\\]", key) or key in (".", "..")):
        return f"{named(key)} is or holds a path separator"
    return None


# --- Labels ----------------------------------------------------------------------------------------------------------


@dataclass
class Labels:
    """The labels of a file, by pair."""

    path: Path
    whole: bool
    official: bool
    pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)
    seen: dict[tuple[str, str], str] = field(default_factory=dict)
    """(post id, criterion id) -> its place in the file. Pairs with an unreadable label are included."""
    counts: Counter[str] = field(default_factory=Counter)
    """Annotation rows by what became of them."""


class _References:
    """Resolves the ids of label rows, and collects the unknown ones: each once, however many rows name it.

    An unknown id resolves to the only id that is the same number, or to itself. So no other id of its row, and no id
    that is only spelt differently, seems unused.
    """

    def __init__(self, posts: Texts | None, criteria: Texts | None) -> None:
        self.posts = posts
        self.criteria = criteria
        self._unknown: dict[tuple[Kind, str], list[str]] = {}

    def post(self, row: Row) -> str:
        """The post id of `row`, which is collected if it is unknown."""
        key = row.id("post_id")
        if self.posts is not None and key not in self.posts.places:
            return self._unknown_id(Kind.NO_POST, key, row, self.posts)
        return key

    def criterion(self, row: Row, name: str) -> str:
        """The id in the criteria file for `name`, which is collected if it is unknown."""
        key = self.criteria.find(name) if self.criteria is not None else None
        if self.criteria is not None and key is None:
            key = self._unknown_id(Kind.NO_CRITERION, name, row, self.criteria)
            return key if key in self.criteria.places else criterion_code(name) or name
        return key or criterion_code(name) or name

    def _unknown_id(self, kind: Kind, key: str, row: Row, file: Texts) -> str:
        if file.whole and not row.broken:
            self._unknown.setdefault((kind, key), []).append(row.place)
        alike = file.numbered.find(key)
        return alike[0] if len(alike) == 1 else key

    def report(self, path: Path, faults: Faults) -> None:
        """Adds a fault for each unknown id of `path`."""
        for (kind, key), places in self._unknown.items():
            file = self.posts if kind is Kind.NO_POST else self.criteria
            assert file
            what = "post_id" if kind is Kind.NO_POST else "criterion"
            rows = f" ({len(places):,} rows)" if len(places) > 1 else ""
            value = named(key) if key else "(empty)"
            detail = f"{what} {value}{rows} is not in {file.path.name}"
            if alike := file.numbered.find(key):
                detail += f", which has {listed(alike, 3)}"
            note = _note(key, *alike)
            kind = Kind.ROUNDED if note else Kind.SPELLING if alike else kind
            faults.add(kind, path, detail + note, places[0])


def read_labels(sources: Sources, posts: Texts | None, criteria: Texts | None, faults: Faults) -> Labels | None:
    """Reads the labels from the groundtruth or the annotations; None if `sources` has neither."""
    path = sources.groundtruth or sources.annotations
    if path is None:
        return None
    file = read_table(path, faults)
    references = _References(posts, criteria)
    read = _read_groundtruth if sources.groundtruth else _read_annotations
    labels = read(file, references, faults)
    references.report(path, faults)
    return labels


def _label(row: Row, column: str, path: Path, faults: Faults) -> int | None:
    value = row.id(column)
    if is_blank(value) or is_missing(value):
        held = f": it holds {value}" if is_missing(value) else ""
        faults.add(Kind.NO_LABEL, path, f"{column} is empty{held}", row.place)
    elif value.casefold() not in _LABELS:
        faults.add(Kind.LABEL, path, f"{column} {named(value)} is unknown", row.place)
    return _LABELS.get(value.casefold())


def _read_groundtruth(file: Table, references: _References, faults: Faults) -> Labels:
    """Reads the specification's groundtruth, which has a row for each pair."""
    labels = Labels(file.path, file.whole, official=False)
    for row in file.rows:
        post_id, criterion_id = references.post(row), references.criterion(row, row.id("criterion_id"))
        label = None if row.broken else _label(row, "label", file.path, faults)
        earlier = labels.seen.setdefault((post_id, criterion_id), row.place)
        if earlier != row.place and not row.broken:
            detail = f"post {named(post_id)} x criterion {named(criterion_id)} is already on {earlier}"
            note = _note(post_id, criterion_id)
            faults.add(Kind.ROUNDED if note else Kind.DUPLICATE_PAIR, file.path, detail + note, row.place)
        elif label is not None:
            labels.pairs[post_id, criterion_id] = Pair(post_id, criterion_id, label)
    return labels


def _read_annotations(file: Table, references: _References, faults: Faults) -> Labels:
    """Reads ReDSM5's annotations, which have a row for each sentence and symptom.

    A pair is matched if one of its sentences has status 1. Status 0 marks a sentence that an annotator examined and did
    not count as evidence. Without the status such pairs would be positive.
    """
    labels = Labels(file.path, file.whole, official=True)
    sentences: dict[tuple[str, str], dict[str, int]] = {}
    for row in file.rows:
        if row.broken:
            continue
        labels.counts["rows"] += 1
        post_id = references.post(row)
        if symptom_name(row.id("dsm5_symptom")) == _NO_SYMPTOM:
            labels.counts["special_case"] += 1
            continue
        criterion_id = _annotated_criterion(row, labels, references, faults)
        status = _label(row, "status", file.path, faults)
        if criterion_id is not None and status is not None:
            _count_sentence(row, status, sentences.setdefault((post_id, criterion_id), {}), labels.counts)
    for pair, statuses in sentences.items():
        n_evidence = sum(statuses.values())
        label = int(n_evidence > 0)
        labels.pairs[pair] = Pair(*pair, label, n_evidence, explicit_negative=label == 0)
    return labels


def _count_sentence(row: Row, status: int, statuses: dict[str, int], counts: Counter[str]) -> None:
    """Stores the status of a sentence. Two rows of one sentence and symptom count once, with the larger status."""
    # Without a sentence id nothing links two rows, so each counts as a sentence of its own.
    sentence_id = row.id("sentence_id") or row.place
    counts["repeated"] += sentence_id in statuses
    counts["contradictory"] += statuses.get(sentence_id, status) != status
    statuses[sentence_id] = max(status, statuses.get(sentence_id, 0))


def _annotated_criterion(row: Row, labels: Labels, references: _References, faults: Faults) -> str | None:
    """The criterion id for the symptom of an annotation row; None, with a fault, if the symptom is unknown."""
    symptom = row.id("dsm5_symptom")
    code = criterion_code(symptom)
    if code is None:
        value = named(symptom) if symptom else "(empty)"
        faults.add(Kind.SYMPTOM, labels.path, f"DSM5_symptom {value} is unknown", row.place)
        return None
    labels.counts["aliased"] += symptom_name(symptom) in ALIASES
    return references.criterion(row, code)
