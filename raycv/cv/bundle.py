"""A bundle for reviewers: page, tables and data of a finished run in one ZIP file, without text; and its check."""

import csv
import hashlib
import hmac
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import yaml
from rich.console import Console

from raycv.analysis.bundle_files import (
    AGAIN,
    FORMAT,
    damaged,
    history_of,
    inputs_text,
    made_again,
    read_bundle,
    results_of,
    table_bytes,
    too_large,
)
from raycv.common.environment import package_version
from raycv.common.files import sha256_of, unwritable, write_bytes
from raycv.data.types import Dataset
from raycv.errors import NotShownError, UserError, counted
from raycv.rendering.terminal import say
from raycv.results.find_run import folds_of
from raycv.results.fold_result import FoldResult
from raycv.results.public_records import BASE, ENVIRONMENT, VERSIONS, kept_config
from raycv.results.report import summarize
from raycv.results.run_folder import RunFolder, read_record

if TYPE_CHECKING:
    from raycv.evaluation.study import Study

LOCAL = "a local folder"
"""The name that a bundle gives a base model that is not from the hub."""
MOST_FAULTS = 20
CLOSE = 1e-9
"""Numbers of the statistics have ten digits, and another machine may round the last one differently."""
DRAWN = {"svg", "title", "desc", "defs", "g", "path", "use", "text", "tspan", "clipPath", "rect"}
"""The elements of a figure."""


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
        UserError: A fold is not finished, a file is damaged, or the data set is another one. Or the bundle would be
            larger than a check reads, or `path` cannot be written.
    """
    with console.status("Computing the statistics"):
        given = inputs_of(folder, dataset)
        files = inputs_text(*given) | results_of(*given)
        if large := too_large({name: len(data) for name, data in files.items()}):
            raise UserError(f"The bundle cannot be written: {large}.", kind="disk-unwritable")
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in sorted(files.items()):
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
        UserError: The file is not a bundle, or it is damaged.
        NotShownError: Files do not follow from the data. The message names the first differences.
    """
    files = read_bundle(path)
    with console.status("Computing the statistics"):
        made, versions, study = made_again(files)
    alike = versions["matplotlib"] == package_version("matplotlib")
    faults = [*_faults_of_epochs(study), *_faults_of_counts(study, files), *_faults_of_figures(files)]
    faults += [f"{name}: it does not belong to this bundle" for name in sorted(files.keys() - made.keys())]
    for name in sorted(made):
        with damaged(name):
            faults += _faults(name, files.get(name), made[name], alike)
    here = [
        f"{name} {was or 'missing'} then, {now or 'missing'} now"
        for name, was in versions.items()
        if was != (now := package_version(name))
    ]
    if faults:
        listed = [f"  - {fault}" for fault in faults[:MOST_FAULTS]]
        listed += [f"  ... and {len(faults) - MOST_FAULTS} more"] * (len(faults) > MOST_FAULTS)
        remedies = [AGAIN, *([f"check it with the versions that made it: {'; '.join(here)}"] if here else [])]
        what = f"{path} does not follow from its data: {counted(len(faults), 'difference')}\n" + "\n".join(listed)
        raise NotShownError(what, kind="bundle-differs", remedies=remedies)
    say(console, f"All numbers of {path} follow from its predictions ({counted(len(made), 'file')} made again).")
    if not alike:
        say(console, f"Figures were not compared: matplotlib {versions['matplotlib']} drew them.")
    say(console, f"SHA-256 {sha256_of(path)}: compare it with that of the authors.")


def inputs_of(
    folder: RunFolder, dataset: Dataset | None = None
) -> tuple["Study", dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns what all files of a bundle are computed from, without text and with other post ids.

    Returns:
        The study, and the contents of `run.json`, `config.yaml` and `environment.json`.
    """
    from raycv.results.study import load_study

    study = _renamed(load_study(folder, dataset), _key(folder))
    # The page then shows what a reader of the bundle has.
    study = replace(study, history=history_of(study))
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
        "versions": {name: package_version(name) for name in VERSIONS},
        "run": study.run,
        "control": bool(stats.get("labels_shuffled", False)),
        "warnings": own,
        "data": {key: stats[key] for key in ("data_hash", "criteria_hash") if key in stats},
        "history": study.history,
        "out_of_memory": [result.out_of_memory() for result in results],
        "retries": study.retries,
    }
    base = environment.get("base_model") or {}
    kept = {key: environment[key] for key in ENVIRONMENT if key in environment}
    if "resumed" in kept:
        kept["resumed"] = [{key: one[key] for key in ENVIRONMENT if key in one} for one in kept["resumed"]]
    kept["base_model"] = {key: base[key] for key in BASE if key in base}
    config = kept_config(yaml.safe_load(folder.config.read_text(encoding="utf-8")))
    # Only the hub gives a revision. Any other name may be a folder, whose path names people and places.
    model = config.get("model", {})
    if "name" in model and not (base.get("revision") or str(model["name"]).startswith("raycv://")):
        model["name"] = LOCAL
    return study, run, config, kept


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


def _faults_of_epochs(study: "Study") -> Iterator[str]:
    """The predictions are the scores of one epoch."""
    for fold, scores in enumerate(study.epoch_scores or ()):
        own = study.scores[study.fold == fold]
        if not (scores == own).all(axis=1).any():
            yield f"predictions.csv: the scores of fold {fold} are not those of an epoch"


def _faults_of_counts(study: "Study", files: Mapping[str, bytes]) -> Iterator[str]:
    """The files that follow from the predictions count as many posts and criteria."""
    posts, criteria = len(study.post_ids), len(study.criterion_ids)
    with damaged("splits.csv or evaluation.json"):
        if "splits.csv" in files and (found := len(_rows(files["splits.csv"])) - 1) != posts:
            yield f"splits.csv: {counted(found, 'post')}, and predictions.csv has {posts}"
        statistics = json.loads(files["evaluation.json"]) if "evaluation.json" in files else None
        if statistics and (found := len(statistics["data"]["criteria"])) != criteria:
            yield f"evaluation.json: {found} criteria, and predictions.csv has {criteria}"


def _faults_of_figures(files: Mapping[str, bytes]) -> Iterator[str]:
    """The page shows the figures of the bundle, and they draw only. So another matplotlib's need no comparison."""
    drawn = []
    for name in (name for name in files if name.endswith(".svg")):
        with damaged(name):
            text = files[name].decode()
            inside = text.split("\n", 1)[1]
            drawn.append(inside.strip())
            if "<!" in text or "<?" in inside or not all(map(_draws, ElementTree.fromstring(text).iter())):
                yield f"{name}: it holds more than a drawing"
    with damaged("report.html"):
        if sorted(_figures(files["report.html"].decode())[1]) != sorted(drawn):
            yield "report.html: its figures are not those in figures/"


def _figures(page: str) -> tuple[str, list[str]]:
    """The page with `<svg/>` for each figure, and its figures. A pattern could take hours for a hostile page."""
    first, *parts = page.split("<svg")
    cut = [part.partition("</svg>") for part in parts]
    return "<svg/>".join([first, *(rest for _, _, rest in cut)]), [f"<svg{inside}{end}" for inside, end, _ in cut]


def _draws(element: ElementTree.Element) -> bool:
    name = element.tag.removeprefix("{http://www.w3.org/2000/svg}")
    return name in DRAWN and not any(
        key.lower().startswith("on") or (key.endswith("href") and value[:1] != "#") or re.search(r"url\((?!#)", value)
        for key, value in element.attrib.items()
    )


def _faults(name: str, there: bytes | None, made: bytes, drawn_alike: bool) -> Iterator[str]:
    """Yields where a file differs from what follows from the data. Figures count if one matplotlib drew both."""
    if there is None:
        yield f"{name}: it is missing"
    elif there == made:
        return
    elif name == "evaluation.json":
        value = json.loads(there)
        # A value has one text, so no key is there twice.
        yield from _first_apart(name, there, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
        yield from _apart(name, value, json.loads(made))
    elif name.startswith("tables/") and name.endswith(".csv"):
        rows = _rows(there)
        yield from _first_apart(name, there, table_bytes(rows))
        yield from _apart(name, list(map(_numbers, rows)), list(map(_numbers, _rows(made))))
    elif name.endswith((".svg", ".html")):
        old, new = (_figures(content.decode())[0].encode() for content in (there, made))
        yield from _first_apart(name, old, new)
        if drawn_alike and old == new:
            yield f"{name}: a figure differs"
    else:
        yield from _first_apart(name, there, made)


def _first_apart(name: str, there: bytes, made: bytes) -> Iterator[str]:
    """The first line in which two files differ. Its words stay out of the message: anybody may have written them."""
    for at, (one, other) in enumerate(zip_longest(there.split(b"\n"), made.split(b"\n")), 1):
        if one != other:
            yield f"{name}: it differs from what raycv writes for these data, first in line {at}"
            return


def _rows(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode(), newline="")))


def _numbers(cells: list[str]) -> list[str | float]:
    """The cells, with those as numbers that Python writes as a float. Only they may be close."""
    return [
        float(cell) if re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?", cell, re.ASCII) and repr(float(cell)) == cell else cell
        for cell in cells
    ]


def _apart(where: str, there: Any, made: Any) -> Iterator[str]:
    """The places at which two values of JSON differ, or two tables."""
    if isinstance(there, dict) and isinstance(made, dict) and list(there) == list(made):
        for key in made:
            yield from _apart(f"{where}: {key}" if ": " not in where else f"{where}.{key}", there[key], made[key])
    elif isinstance(there, list) and isinstance(made, list) and len(there) == len(made):
        for at, (one, other) in enumerate(zip(there, made, strict=True)):
            yield from _apart(f"{where}[{at}]", one, other)
    elif type(there) is not type(made) or (there != made and not _close(there, made)):
        value = there if isinstance(there, float | None) else "another value"
        yield f"{where} is {value}, and {json.dumps(made)[:80]} follows from the data"


def _close(one: Any, other: Any) -> bool:
    return isinstance(one, float) and math.isclose(one, other, rel_tol=CLOSE)
