"""The files of a bundle for reviewers: how raycv writes them, and how it reads them from a stranger."""

import csv
import io
import json
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raycv.common.files import array_bytes
from raycv.errors import NotShownError, UserError, shown
from raycv.results.public_records import (
    MOST_OF_A_RECORD,
    RECORDS,
    check_record,
    check_texts,
    contradictions,
    masked,
    read_settings,
)

if TYPE_CHECKING:
    from raycv.evaluation.study import Study

FORMAT = 1
"""The number of the bundle's format."""
MOST_BYTES = 2**28
"""The most that a bundle may hold, packed and unpacked."""
MOST_OF_A_FILE = 2**26
NAMES = re.compile(
    r"run\.json|config\.yaml|environment\.json|predictions\.csv|near_duplicates\.csv|epoch_scores/fold_\d{1,4}\.npy|"
    r"README\.md|evaluation\.json|splits\.csv|report\.html|report\.md|model_card\.md|"
    r"tables/\w{1,40}\.(csv|tex)|figures/\w{1,40}\.svg",
    re.ASCII,
)
"""The names that a file in a bundle can have. They are safe to print."""
AGAIN = "ask the authors for the bundle again, and compare its SHA-256 with theirs"
README = """\
# A cross-validation for review

report.html is the page of the run, and tables/ has its numbers. Check them from the data in this file:

    pip install raycv
    python -m raycv.report check=<this file>

| file | content |
| --- | --- |
| predictions.csv | a row per pair: fold, post, criterion, label, score, and facts about it |
| splits.csv | the fold of each post |
| epoch_scores/ | the scores after every epoch, columns in the order of the fold's rows in predictions.csv |
| near_duplicates.csv | pairs of posts with nearly the same words |
| run.json | counts of restarts and out-of-memory events, warnings, hashes of the data; F1 of epochs without scores |
| config.yaml, environment.json | settings and versions, without paths, hosts, users and stores |
| evaluation.json | every statistic |

- The names of posts are keyed hashes. One post has the same name in all files of this bundle.
- A person who holds the data set can link posts by their labels, folds and floor scores.
- The bootstrap draws posts in the order of their names. So ends of intervals differ a little from the run's own page,
  which has other names. All other numbers are the same.
- The check shows that the numbers follow from the predictions. It cannot show that a model made these predictions.
- run.json, config.yaml and environment.json are statements of the authors. The check compares their form alone.
- Research use, not for diagnosis.
"""


@contextmanager
def damaged(what: str) -> Iterator[None]:
    """Makes any failure inside a fault of the bundle: a hostile file reaches errors that nobody can list.

    Raises: UserError with `what` and without the words of the error, which may quote the file.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001
        message = f"The bundle is damaged: {what} ({type(error).__name__})."
        raise UserError(message, kind="input-file", remedies=[AGAIN]) from None


def read_bundle(path: Path) -> dict[str, bytes]:
    """Reads the files of a bundle by name. Nothing is unpacked before names and sizes are known to be possible.

    Raises:
        UserError: The file is not a bundle, is too large or is damaged.
    """
    try:
        if path.exists() and not path.is_file():
            raise _not_one(path, "it is not a file")
        if path.stat().st_size > MOST_BYTES:
            raise _not_one(path, f"it is larger than {MOST_BYTES:,} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", kind="input-file") from error
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except Exception as error:
        raise _not_one(path, "it is not a ZIP file") from error
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if strange := [name for name in names if not NAMES.fullmatch(name)]:
        raise _not_one(path, f"it holds {shown(strange[0])}")
    if len(set(names)) < len(names) or "run.json" not in names:
        raise _not_one(path, "it holds a file twice, or lacks run.json")
    # zipfile unpacks the other methods without a limit.
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        raise _not_one(path, "a file in it is packed in another way")
    if large := too_large({entry.filename: entry.file_size for entry in entries}):
        raise _not_one(path, large)
    files = {}
    for entry in entries:
        with damaged(entry.filename), archive.open(entry) as stream:
            # It returns at most as many bytes as the entry declares, and compares their checksum.
            files[entry.filename] = stream.read()
    with damaged("run.json"):
        number = json.loads(files["run.json"])["format"]
    if number != FORMAT:
        raise _not_one(path, f"its format is {shown(number)}, and this version of raycv has {FORMAT}")
    return files


def too_large(sizes: Mapping[str, int]) -> str | None:
    """Which limit files of these sizes in bytes exceed; None if they may be in a bundle."""
    for name, size in sizes.items():
        if size > (most := MOST_OF_A_RECORD if name in RECORDS else MOST_OF_A_FILE):
            return f"{name} is larger than {most:,} bytes"
    return f"its files are larger than {MOST_BYTES:,} bytes" if sum(sizes.values()) > MOST_BYTES else None


def _not_one(path: Path, why: str) -> UserError:
    remedies = ["write one: python -m raycv.report run=<name> bundle=<file>"]
    return UserError(f"{path} is not a bundle of raycv: {why}.", kind="input-file", remedies=remedies)


def made_again(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, str | None], "Study"]:
    """Every file of the bundle as raycv writes it with the same data, the versions that made it, and its study."""
    records = {}
    for name in RECORDS:
        with damaged(name):
            records[name] = read_settings(files[name]) if name == "config.yaml" else json.loads(files[name])
            check_record(name, records[name])
            check_texts(records[name])
    with damaged("predictions.csv"):
        there = {int(row["fold"]) for row in _rows_of(files, "predictions.csv")}
    scored = sum(name.startswith("epoch_scores/") for name in files)
    faults = contradictions(records, len(there), {"epoch_scores/": scored} if scored else {})
    # Folds with a gap are damage, which the study finds.
    if faults and there == set(range(len(there))):
        what = f"The bundle contradicts itself: {'; '.join(faults)}."
        raise NotShownError(what, kind="bundle-differs", remedies=[AGAIN])
    with damaged("predictions.csv, near_duplicates.csv or epoch_scores"):
        study = _study(files, records["run.json"])
    records["run.json"]["history"] = history_of(study)
    with damaged("its statistics cannot be computed"):
        written = inputs_text(study, *(records[name] for name in RECORDS))
        made = written | results_of(study, *(records[name] for name in RECORDS))
    return made, records["run.json"]["versions"], study


def history_of(study: "Study") -> list[list[dict[str, float]]]:
    """Returns what the statistics read of each epoch; nothing if they have the scores of the epochs."""
    keys = ("f1", "roc_auc") if study.epoch_scores is None else ()
    return [
        [{key: epoch[key] for key in keys if key in epoch} for epoch in fold if keys] for fold in study.history or ()
    ]


def inputs_text(
    study: "Study", run: Mapping[str, Any], config: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, bytes]:
    """Returns the files of a bundle that its other files are computed from. Equal values have equal bytes."""
    columns: dict[str, list[Any]] = {
        "fold": study.fold.tolist(),
        "post": [study.post_ids[at] for at in study.post],
        "criterion_id": [study.criterion_ids[at] for at in study.criterion],
        "label": study.labels.tolist(),
        "score": study.scores.tolist(),
    }
    for name in ("shortened", "hard_negative"):
        if (values := getattr(study, name)) is not None:
            columns[name] = values.astype(int).tolist()
    columns |= {f"floor:{name}": scores.tolist() for name, scores in study.floor_scores.items()}
    files = {
        "run.json": _json(run),
        "config.yaml": yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode(),
        "environment.json": _json(environment),
        "predictions.csv": table_bytes([list(columns), *zip(*columns.values(), strict=True)]),
    }
    if study.near_duplicates is not None:
        files["near_duplicates.csv"] = table_bytes([["post_a", "post_b"], *study.near_duplicates])
    for fold, scores in enumerate(study.epoch_scores or ()):
        files[f"epoch_scores/fold_{fold}.npy"] = array_bytes(scores)
    return files


def results_of(
    study: "Study", run: Mapping[str, Any], config: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, bytes]:
    """Returns the files of a bundle that follow from the others."""
    from raycv.evaluation.evaluate import evaluate
    from raycv.rendering.publish import facts_from, texts_of

    facts = facts_from(run["run"], config, environment, run["data"], run)
    facts["report_command"] = shlex.join(["python", "-m", "raycv.report", f"run={run['run']}", "bundle=review.zip"])
    fold_of = {study.post_ids[post]: fold for post, fold in zip(study.post, study.fold.tolist(), strict=True)}
    evaluation = evaluate(study)
    return {
        "README.md": README.encode(),
        "evaluation.json": _json(evaluation),
        "splits.csv": table_bytes([["post", "fold"], *sorted(fold_of.items())]),
        **{name: text.encode() for name, text in texts_of(evaluation, facts).items()},
    }


def table_bytes(rows: Any) -> bytes:
    """Returns rows of cells as CSV. Equal rows have equal bytes."""
    output = io.StringIO()
    csv.writer(output, lineterminator="\n").writerows(rows)
    return output.getvalue().encode()


def _json(value: Any) -> bytes:
    return (json.dumps(masked(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _rows_of(files: Mapping[str, bytes], name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(files[name].decode(), newline="")))


def _study(files: Mapping[str, bytes], run: Mapping[str, Any]) -> "Study":
    import numpy as np

    from raycv.evaluation.study import Study

    def epochs_of(content: bytes) -> np.ndarray:
        scores = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        if scores.dtype != np.float64:
            raise ValueError("not numbers of 64 bits")
        return scores

    rows = _rows_of(files, "predictions.csv")
    column = {name: [row[name] for row in rows] for name in rows[0]}
    posts, criteria = sorted(set(column["post"])), sorted(set(column["criterion_id"]))
    folds = len(run["out_of_memory"])
    fold = np.array(column["fold"], dtype=int)
    labels = np.array(column["label"], dtype=int)
    if fold.min() < 0 or fold.max() >= folds or not np.isin(labels, (0, 1)).all():
        raise ValueError("a fold or a label is impossible")
    if not all(re.fullmatch("p[0-9a-f]{20}", post) for post in posts):
        raise ValueError("a post has another kind of name")
    check_texts([*criteria, *column])
    pairs = None
    if "near_duplicates.csv" in files:
        pairs = [(row["post_a"], row["post_b"]) for row in _rows_of(files, "near_duplicates.csv")]
    if not {post for pair in pairs or () for post in pair} <= set(posts):
        raise ValueError("a near-duplicate is not a post")
    epochs = [files.get(f"epoch_scores/fold_{at}.npy") for at in range(folds)]
    flags = {name: np.array(column[name], dtype=int) == 1 for name in ("shortened", "hard_negative") if name in column}
    return Study(
        run=run["run"],
        labels=labels.astype(np.int8),
        scores=np.array(column["score"], dtype=float),
        fold=fold,
        post=np.searchsorted(posts, column["post"]),
        criterion=np.searchsorted(criteria, column["criterion_id"]),
        post_ids=posts,
        criterion_ids=criteria,
        history=run["history"],
        epoch_scores=[epochs_of(one) for one in epochs if one is not None] if None not in epochs else None,
        floor_scores={
            name.removeprefix("floor:"): np.array(values, dtype=float)
            for name, values in column.items()
            if name.startswith("floor:")
        },
        near_duplicates=pairs,
        events=[["out of memory"] * count for count in run["out_of_memory"]],
        retries=run["retries"],
        **flags,
    )
