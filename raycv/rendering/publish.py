"""Writes all files that people read of a finished run, in this order of sections; computes its statistics before."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from raycv.common.files import write_json, write_text
from raycv.common.secrets import mask_secrets
from raycv.data.types import Dataset
from raycv.evaluation.evaluate import evaluate
from raycv.rendering.blocks import NOT_RECORDED, Figure, csv_of, latex_of
from raycv.rendering.first_sections import first_sections
from raycv.rendering.further_sections import further_sections
from raycv.rendering.model_card import model_card
from raycv.rendering.page import html_of, markdown_page
from raycv.results.find_run import folds_of
from raycv.results.fold_result import FoldResult
from raycv.results.report import summarize
from raycv.results.run_folder import RunFolder, read_record
from raycv.results.study import load_study

_ELSEWHERE = ("tracking.", "run.", "resume", "cv.only")
"""Keys that change no number of a whole run, so the page leaves them out. Most name places of the machine."""


def publish(folder: RunFolder, dataset: Dataset | None = None) -> dict[str, Any]:
    """Computes the statistics of a finished run and writes them in its folder. Equal folders give equal bytes.

    Args:
        folder: The run folder.
        dataset: The data set of the run. It fills what a run of an earlier version did not record.

    Returns:
        The statistics, with the content of `evaluation.json`.

    Raises:
        UserError: A fold is not finished, a file is damaged, or the data set is another one.
    """
    evaluation = evaluate(load_study(folder, dataset))
    texts = texts_of(evaluation, facts_of(folder))
    write_json(folder.evaluation, evaluation)
    for path, text in texts.items():
        write_text(folder.root / path, text)
    return evaluation


def texts_of(evaluation: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns the content of every file but `evaluation.json`, by its path in the run folder."""
    sections = first_sections(evaluation, facts["warnings"]) + further_sections(evaluation, facts)
    data = evaluation["data"]
    head = {
        "run": evaluation["run"],
        "notice": evaluation["notice"],
        "control": facts["control"],
        "subtitle": f"{data['folds']}-fold cross-validation of {facts['base_model']} on {data['posts']:,} posts x "
        f"{len(data['criteria'])} criteria = {data['pairs']:,} pairs, {data['prevalence']:.1%} matched",
    }
    texts = {
        "report.html": html_of(head, sections),
        "report.md": markdown_page(head, sections),
        "model_card.md": model_card(evaluation, facts, sections),
    }
    for section in sections:
        for table in section.tables():
            texts |= {f"tables/{table.name}.csv": csv_of(table), f"tables/{table.name}.tex": latex_of(table)}
        for block in section.blocks:
            if isinstance(block, Figure):
                texts[f"figures/{block.name}.svg"] = '<?xml version="1.0" encoding="utf-8"?>\n' + block.svg
    return texts


def facts_of(folder: RunFolder) -> dict[str, Any]:
    """Returns what the run folder knows about the run besides its predictions, with secrets masked.

    Raises:
        UserError: A record is damaged.
    """
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    environment = read_record(folder.environment) if folder.environment.is_file() else {}
    stats = read_record(folder.data_stats)
    folds = folds_of(folder.config)
    report = summarize(folder.root.name, [FoldResult.of(folder, fold) for fold in range(folds)], folds, stats)
    return facts_from(folder.root.name, config, environment, stats, report)


def facts_from(
    run: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    stats: Mapping[str, Any],
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the facts about a run, with secrets masked.

    Args:
        run: The name of the run.
        config: `config.yaml`.
        environment: `environment.json`; `python`, `platform`, `processor`, `packages` and `git` are read.
        stats: `data_stats.json`; the two hashes are read.
        report: `report.json`; `warnings` and `control` are read.
    """
    settings = {key: value for key, value in _flat(config).items() if not key.startswith(_ELSEWHERE)}
    git = environment.get("git") or {}
    names = {"python": "Python", "platform": "platform", "processor": "processor"}
    machine = [[words, str(environment.get(key, NOT_RECORDED))] for key, words in names.items()]
    packages = [[name, str(version)] for name, version in sorted(environment.get("packages", {}).items())]
    commit = str(git.get("commit", ""))
    changed = ", with changes that are not committed" if git.get("dirty") else ""
    return {
        "settings": settings,
        "config": [[key, value] for key, value in settings.items()],
        "environment": [*machine, ["commit of raycv", (commit or NOT_RECORDED) + changed], *packages],
        "commit": commit,
        "base_model": settings.get("model.name", NOT_RECORDED),
        "data": {key: str(stats[key]) for key in ("data_hash", "criteria_hash") if key in stats},
        "warnings": [mask_secrets(warning) for warning in report["warnings"]],
        "control": report["control"],
        # Without the folder of the runs: the page is the same wherever it is made.
        "report_command": shlex.join(["python", "-m", "raycv.report", f"run={run}"]),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": _said(value)}
    return flat


def _said(value: Any) -> str:
    if isinstance(value, list):
        # As the command line takes it.
        return f"[{','.join(map(_said, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else mask_secrets(str(value))
