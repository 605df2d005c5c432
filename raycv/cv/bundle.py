"""A bundle for reviewers: page, tables and data of a finished run in one ZIP file, without text; and its check."""

import csv
import hashlib
import hmac
import io
import json
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from raycv import __version__
from raycv.common.environment import package_version
from raycv.common.files import array_bytes, sha256_of, unwritable, write_bytes
from raycv.common.secrets import mask_secrets
from raycv.data.types import Dataset
from raycv.errors import NotShownError, UserError, counted
from raycv.rendering.terminal import say
from raycv.results.find_run import folds_of
from raycv.results.fold_result import FoldResult
from raycv.results.report import summarize
from raycv.results.run_folder import RunFolder, read_record

if TYPE_CHECKING:
    from raycv.evaluation.study import Study

FORMAT = 1
"""The number of the bundle's format."""
MOST_BYTES = 2**31
"""The most that a bundle may hold unpacked."""
MOST_FAULTS = 20
LEFT_OUT = ("tracking", "run", "resume")
"""Sections of the config that name places, people and hosts."""
ENVIRONMENT = (
    "python", "platform", "processor", "cpus", "memory_bytes", "packages", "numerics", "git", "seeds", "resumed",
)  # fmt: skip
NO_RESULT = ("seconds",)
CLOSE = 1e-9
"""Numbers of the statistics have ten digits, and another machine may round the last one differently."""
FIGURE = re.compile(r"<svg.*?</svg>", re.DOTALL)
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
| run.json | metrics of each epoch, counts of restarts and out-of-memory events, hashes of the data |
| config.yaml, environment.json | settings and versions, without paths, hosts, users and stores |
| evaluation.json | every statistic |

- The names of posts are keyed hashes. One post has the same name in all files of this bundle.
- The bootstrap draws posts in the order of their names. So ends of intervals differ a little from the run's own page,
  which has other names. All other numbers are the same.
- The check shows that the numbers follow from the predictions. It cannot show that a model made these predictions.
- Research use, not for diagnosis.
"""


def check_free(path: Path) -> None:
    """Raises: UserError if `path` holds something else than a bundle, or its folder does not exist."""
    if not path.absolute().parent.is_dir():
        what = f"bundle={path}: the folder {path.absolute().parent} does not exist."
        raise UserError(what, kind="disk-unwritable", remedies=["make it", "give another name: bundle=<file>"])
    if path.exists():
        try:
            read_bundle(path)
        except UserError:
            what = f"bundle={path}: this is not a bundle of raycv, so it is not replaced."
            raise UserError(what, kind="output-exists", remedies=["give another name: bundle=<file>"]) from None


def write_bundle(path: Path, folder: RunFolder, dataset: Dataset | None, console: Console) -> None:
    """Writes the bundle of a finished run. Equal run folders give equal bytes.

    Raises:
        UserError: A fold is not finished, a file is damaged, the data set is another one, or `path` cannot be written.
    """
    with console.status("Computing the statistics"):
        given = inputs_of(folder, dataset)
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in sorted((given | results_of(given)).items()):
                # A file in a ZIP has a time, and the present one would make each bundle another.
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    try:
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise unwritable("The bundle", path, error) from error
    say(console, f"Written: {path} (SHA-256 {sha256_of(path)})\nCheck it: python -m raycv.report check={path}")


def check_bundle(path: Path, console: Console) -> None:
    """Computes every number of a bundle again from its data, and prints that all agree.

    Raises:
        UserError: The file is not a bundle, or its data are damaged.
        NotShownError: Files do not follow from the data. The message names the first differences.
    """
    files = read_bundle(path)
    with console.status("Computing the statistics"):
        made = results_of(files)
    versions = json.loads(files["run.json"]).get("versions", {})
    alike = versions.get("matplotlib") == _version("matplotlib")
    strangers = files.keys() - made.keys() - _inputs(files)
    faults = [*_faults_of_epochs(files), *(f"{name}: it does not belong to a bundle" for name in sorted(strangers))]
    faults += [fault for name in sorted(made) for fault in _faults(name, files.get(name), made[name], alike)]
    here = [f"{name} {was} then, {now} now" for name, was in versions.items() if was != (now := _version(name))]
    if faults:
        shown = [f"  - {fault}" for fault in faults[:MOST_FAULTS]]
        shown += [f"  ... and {len(faults) - MOST_FAULTS} more"] * (len(faults) > MOST_FAULTS)
        remedies = ["ask the authors for the bundle again, and compare its SHA-256 with theirs"]
        remedies += [f"check it with the versions that made it: {'; '.join(here)}"] if here else []
        what = f"{path} does not follow from its data: {counted(len(faults), 'difference')}\n" + "\n".join(shown)
        raise NotShownError(what, kind="bundle-differs", remedies=remedies)
    say(console, f"All numbers of {path} follow from its predictions ({counted(len(made), 'file')} made again).")
    say(console, f"SHA-256 {sha256_of(path)}: compare it with that of the authors.")


def read_bundle(path: Path) -> dict[str, bytes]:
    """Reads the files of a bundle by name. Raises: UserError if it is not one, or too large."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(set(names)) < len(names) or sum(entry.file_size for entry in entries) > MOST_BYTES:
                raise ValueError("it holds a file twice, or too much")
            files = {name: archive.read(name) for name in names}
        run = json.loads(files["run.json"])
        if run["format"] != FORMAT:
            raise ValueError(f"its format is {run['format']}, and this version of raycv has {FORMAT}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", kind="input-file") from error
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, NotImplementedError, RuntimeError) as error:
        remedies = ["write one: python -m raycv.report run=<name> bundle=<file>"]
        raise UserError(f"{path} is not a bundle of raycv: {error}.", kind="input-file", remedies=remedies) from error
    return files


def inputs_of(folder: RunFolder, dataset: Dataset | None = None) -> dict[str, bytes]:
    """Returns the files of a bundle that its other files are computed from, without text and with other post ids."""
    from raycv.results.study import load_study

    study = _renamed(load_study(folder, dataset), _key(folder))
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    stats, environment = read_record(folder.data_stats), read_record(folder.environment)
    folds = folds_of(folder.config)
    results = [FoldResult.of(folder, fold) for fold in range(folds)]
    # Warnings about the data can name posts and files, so they are counted only.
    own = summarize(study.run, results, folds)["warnings"]
    warnings = stats.get("warnings", [])
    if warnings:
        own.append(f"{counted(len(warnings), 'warning')} about data and prompts may name posts, so not in this bundle")
    run = {
        "format": FORMAT,
        "versions": {name: _version(name) for name in ("raycv", "numpy", "scipy", "scikit-learn", "matplotlib")},
        "run": study.run,
        "control": bool(stats.get("labels_shuffled", False)),
        "warnings": own,
        "data": {key: stats[key] for key in ("data_hash", "criteria_hash") if key in stats},
        "history": [
            [{key: value for key, value in epoch.items() if key not in NO_RESULT} for epoch in result.history]
            for result in results
        ],
        "out_of_memory": [result.out_of_memory() for result in results],
        "retries": study.retries,
    }
    base = environment.get("base_model") or {}
    kept = {key: environment[key] for key in ENVIRONMENT if key in environment}
    if "resumed" in kept:
        kept["resumed"] = [{key: one[key] for key in ENVIRONMENT if key in one} for one in kept["resumed"]]
    kept["base_model"] = {key: base[key] for key in ("revision", "files", "sha256") if key in base}
    return {
        "run.json": _json(run),
        "config.yaml": yaml.safe_dump(_without_places(config), sort_keys=False, allow_unicode=True).encode(),
        "environment.json": _json(kept),
        **_data_files(study),
    }


def _version(package: str) -> str | None:
    return __version__ if package == "raycv" else package_version(package)


def _key(folder: RunFolder) -> bytes:
    """The key of the post names: nobody without the run folder can compute it, and it is the same in each bundle."""
    sums = [sha256_of(folder.fold(fold).predictions) for fold in range(folds_of(folder.config))]
    return hashlib.sha256("".join(["raycv bundle", *sums]).encode()).digest()


def _renamed(study: "Study", key: bytes) -> "Study":
    """The study with other post ids, and its rows in the order of fold, new id and criterion."""
    import numpy as np

    names = [f"p{hmac.new(key, post.encode(), 'sha256').hexdigest()[:20]}" for post in study.post_ids]
    ordered = replace(study, post_ids=names).in_order()
    order = np.argsort(ordered.fold, kind="stable")
    rows = {
        name: getattr(ordered, name)[order]
        for name in ("labels", "scores", "fold", "post", "criterion", "shortened", "hard_negative")
        if getattr(ordered, name) is not None
    }
    floors = {name: scores[order] for name, scores in ordered.floor_scores.items()}
    new = dict(zip(study.post_ids, names, strict=True))
    pairs = study.near_duplicates
    if pairs is not None:
        pairs = sorted(tuple(sorted((new[a], new[b]))) for a, b in pairs if a in new and b in new)  # type: ignore[misc]
    return replace(ordered, **rows, floor_scores=floors, near_duplicates=pairs)


def _data_files(study: "Study") -> dict[str, bytes]:
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
    files = {"predictions.csv": _table(list(columns), zip(*columns.values(), strict=True))}
    if study.near_duplicates is not None:
        files["near_duplicates.csv"] = _table(["post_a", "post_b"], study.near_duplicates)
    for fold, scores in enumerate(study.epoch_scores or ()):
        files[f"epoch_scores/fold_{fold}.npy"] = array_bytes(scores)
    return files


def _table(names: list[str], rows: Any) -> bytes:
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return output.getvalue().encode()


def _json(value: Any) -> bytes:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return mask_secrets(text).encode()


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: dict(keys) for name, keys in config.items() if name not in LEFT_OUT and isinstance(keys, Mapping)}
    for key in ("dir", "criteria_dir"):
        kept.get("data", {}).pop(key, None)
    name = str(kept.get("model", {}).get("name", ""))
    # A name of the hub has one slash; the path of a folder may hold the name of a user.
    if "://" not in name and (name.count("/") != 1 or name[:1] in "/.~"):
        kept["model"]["name"] = Path(name).name
    return kept


def results_of(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the files of a bundle that follow from the others.

    Raises:
        UserError: A file is missing or damaged.
    """
    from raycv.evaluation.evaluate import evaluate
    from raycv.rendering.publish import facts_from, texts_of

    try:
        study = _study(files)
        run, environment = json.loads(files["run.json"]), json.loads(files["environment.json"])
        facts = facts_from(run["run"], yaml.safe_load(files["config.yaml"]), environment, run["data"], run)
        facts["report_command"] = shlex.join(["python", "-m", "raycv.report", f"run={run['run']}", "bundle=review.zip"])
        fold_of = {study.post_ids[post]: fold for post, fold in zip(study.post, study.fold.tolist(), strict=True)}
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, EOFError, yaml.YAMLError) as error:
        what = f"The data of the bundle are damaged: {type(error).__name__} ({error})."
        raise UserError(what, kind="input-file", remedies=["ask the authors for the bundle again"]) from error
    evaluation = evaluate(study)
    return {
        "README.md": README.encode(),
        "evaluation.json": _json(evaluation),
        "splits.csv": _table(["post", "fold"], sorted(fold_of.items())),
        **{name: text.encode() for name, text in texts_of(evaluation, facts).items()},
    }


def _study(files: Mapping[str, bytes]) -> "Study":
    import numpy as np

    from raycv.evaluation.study import Study

    rows = list(csv.DictReader(io.StringIO(files["predictions.csv"].decode())))
    column = {name: [row[name] for row in rows] for name in rows[0]}
    posts, criteria = sorted(set(column["post"])), sorted(set(column["criterion_id"]))
    run = json.loads(files["run.json"])
    fold = np.array(column["fold"], dtype=int)
    epochs = [files.get(f"epoch_scores/fold_{at}.npy") for at in range(fold.max() + 1)]
    pairs = files.get("near_duplicates.csv")
    flags = {name: np.array(column[name], dtype=int) == 1 for name in ("shortened", "hard_negative") if name in column}
    return Study(
        run=run["run"],
        labels=np.array(column["label"], dtype=np.int8),
        scores=np.array(column["score"], dtype=float),
        fold=fold,
        post=np.searchsorted(posts, column["post"]),
        criterion=np.searchsorted(criteria, column["criterion_id"]),
        post_ids=posts,
        criterion_ids=criteria,
        history=run["history"],
        epoch_scores=[np.load(io.BytesIO(one), allow_pickle=False) for one in epochs if one] if all(epochs) else None,
        floor_scores={
            name.removeprefix("floor:"): np.array(values, dtype=float)
            for name, values in column.items()
            if name.startswith("floor:")
        },
        near_duplicates=None
        if pairs is None
        else [(row["post_a"], row["post_b"]) for row in csv.DictReader(io.StringIO(pairs.decode()))],
        events=[["out of memory"] * count for count in run["out_of_memory"]],
        retries=run["retries"],
        **flags,
    )


def _inputs(files: Mapping[str, bytes]) -> set[str]:
    """The names in `files` of what a bundle may hold beside the results."""
    names = r"run\.json|config\.yaml|environment\.json|predictions\.csv|near_duplicates\.csv"
    return {name for name in files if re.fullmatch(rf"{names}|epoch_scores/fold_\d+\.npy", name)}


def _faults_of_epochs(files: Mapping[str, bytes]) -> Iterator[str]:
    """The predictions are the scores of one epoch."""
    study = _study(files)
    for fold, scores in enumerate(study.epoch_scores or ()):
        own = study.scores[study.fold == fold]
        if not (scores == own).all(axis=1).any():
            yield f"predictions.csv: the scores of fold {fold} are not those of an epoch"


def _faults(name: str, there: bytes | None, made: bytes, drawn_alike: bool) -> Iterator[str]:
    """Yields where a file differs from what follows from the data. Figures count if one matplotlib drew both."""
    if there is None:
        yield f"{name}: it is missing"
        return
    if there == made:
        return
    try:
        if name.endswith(".json"):
            yield from _apart(name, json.loads(there), json.loads(made))
            return
        old, new = there.decode(), made.decode()
    except ValueError:
        yield f"{name}: it is damaged"
        return
    if name.endswith(".csv"):
        yield from _apart(name, list(csv.reader(io.StringIO(old))), list(csv.reader(io.StringIO(new))))
    elif FIGURE.sub("", old) != FIGURE.sub("", new):
        lines = zip(FIGURE.sub("", old).splitlines(), FIGURE.sub("", new).splitlines(), strict=False)
        first = next((line for line, other in lines if line != other), "its last lines")
        yield f"{name}: it differs from what follows from the data, first in: {first.strip()[:80]}"
    elif drawn_alike:
        yield f"{name}: a figure differs"


def _apart(where: str, there: Any, made: Any) -> Iterator[str]:
    """The places at which two values of JSON differ, or two tables."""
    if isinstance(there, dict) and isinstance(made, dict) and there.keys() == made.keys():
        for key in made:
            yield from _apart(f"{where}: {key}" if ": " not in where else f"{where}.{key}", there[key], made[key])
    elif isinstance(there, list) and isinstance(made, list) and len(there) == len(made):
        for at, (one, other) in enumerate(zip(there, made, strict=True)):
            yield from _apart(f"{where}[{at}]", one, other)
    elif there != made and not _close(there, made):
        yield f"{where} is {json.dumps(there)[:80]}, and {json.dumps(made)[:80]} follows from the data"


def _close(one: Any, other: Any) -> bool:
    try:
        return abs(float(one) - float(other)) <= CLOSE * max(1.0, abs(float(other)))
    except (TypeError, ValueError):
        return False
