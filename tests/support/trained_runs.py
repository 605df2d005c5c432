"""Run folders with a small trained classifier, to ask or to serve."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

from raycv.common.files import write_json, write_text
from raycv.model.checkpoint import save_checkpoint
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import RunFolder
from raycv.training.loop import FoldTrainer
from support.toy import Recorder, Toy, toy_base, train_config

CANARY = "quokkacanary"


FINISHED = "2026-03-01T10:00:00Z"


SERVER = {
    "host": "127.0.0.1",
    "port": 0,
    "token": None,
    "replicas": 1,
    "max_replicas": 1,
    "cpus_per_replica": "auto",
    "gpus_per_replica": "auto",
    "max_queued": 4,
    "batch_wait_ms": 2.0,
    "max_pairs": 8,
    "max_post_characters": 1000,
    "max_body_bytes": 20000,
}


def save_toy(folder: Path) -> Path:
    """A checkpoint, in a finished run, with three criteria; its scores mean nothing."""
    fold = folder / "toy" / "fold_0"
    fold.mkdir(parents=True)
    write_json(folder / "toy" / "report.json", {"finished": FINISHED})
    toy = Toy(toy_base(fold))
    return toy.save_with_criteria(fold, toy.model())


TRAIN, VAL = np.arange(30), np.arange(30, 48)


def make_run(folder: Path, name: str = "toy", folds: int = 2) -> Path:
    """A finished run of toy folds, as the driver leaves it, with MLflow in `folder`."""
    toy = Toy(toy_base(folder))
    criteria = toy.write_criteria(folder)
    run = RunFolder(folder / "runs" / name)
    for fold in range(folds):
        model = toy.model(seed=fold, dropout=0.1)
        outcome = FoldTrainer(model, toy.encoded, train_config(epochs=1, seed=fold), "fp32", Recorder()).fit(TRAIN, VAL)
        info = toy.info(threshold=0.4 + 0.1 * fold, criteria_dir=str(criteria), run=name, fold=fold)
        files = run.fold(fold)
        files.checkpoint.mkdir(parents=True)
        save_checkpoint(files.checkpoint, model, toy.tokenizer, info)
        metrics = dict.fromkeys(("precision", "recall", "f1", "accuracy", "roc_auc"), 0.5 + fold / 10)
        result = FoldResult(fold, info.threshold, 1, 1, metrics, 1.0, 30, 18, 9, [], [], {})
        write_json(files.result, asdict(result))
        pairs = [toy.dataset.pairs[index] for index in VAL]
        rows = [
            f"{pair.post_id},{pair.criterion_id},{pair.label},{score!r}"
            for pair, score in zip(pairs, map(float, outcome.val_scores), strict=True)
        ]
        write_text(files.predictions, "\n".join(["post_id,criterion_id,label,score", *rows]) + "\n")
    write_text(run.config, yaml.safe_dump({"cv": {"folds": folds}}))
    write_json(run.tracking, {"uri": f"sqlite:///{folder / 'mlflow.db'}", "parent_run_id": "0" * 32})
    write_json(run.report, {})
    return run.root


NASTY = [
    "I can't sleep, \"really\"; a=b, c: d {e: [f, g]} ${oc.env:HOME} ${post} ??? \\ \\' 'x",
    "-leading dash",
    "--cfg job\n--help\n-h",
    "null",
    "~",
    "???",
    "a\n\tb\r\nc",
    "🙂 לא ישן 日本語 é",
    "${now:%Y}",
    "[1,2",
    "x" * 100_000,
    " padded ",
    "= == +post=",
]
