"""A wave of folds written plainly, for `benchmarks.overhead`: what stands in the guides of Ray Tune, Train and MLflow.

`python -m benchmarks.plain <data folder> <folds>` in the folder where its files shall be. The same pairs, base model,
DoRA and batches as the run of raycv that it is held against, one epoch; every library's defaults, but that a trial's
driver takes no core from its worker. Prints a line when a fold starts and when it is done, as raycv does, then the
seconds of its loops.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import ray
import ray.train
import torch
from peft import LoraConfig, get_peft_model
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.models import PROJECTIONS

BATCH, EFFECTIVE, LENGTH = 8, 32, 512


def train_fold(config: dict[str, Any]) -> None:
    """The worker: reads, tokenises, trains and validates fold `config["fold"]`, reports it with a checkpoint."""
    data, base = Path(config["data"]), config["base"]
    posts = pd.read_csv(data / "posts.csv").set_index("post_id")["post"]
    criteria = pd.read_csv(data / "criteria.csv").set_index("criterion_id")["criterion"]
    pairs = pd.read_csv(data / "groundtruth.csv")
    labels = (pairs["label"] == "yes").astype(int).to_numpy()
    folds = StratifiedGroupKFold(config["folds"], shuffle=True, random_state=0).split(pairs, labels, pairs["post_id"])
    train_rows, val_rows = list(folds)[config["fold"]]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokens = tokenizer(
        criteria[pairs["criterion_id"]].tolist(), posts[pairs["post_id"]].tolist(),
        padding=True, truncation="only_second", max_length=LENGTH, return_tensors="pt",
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.config.pad_token_id = tokenizer.pad_token_id
    adapters = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, use_dora=True, target_modules=PROJECTIONS)
    model = get_peft_model(model, adapters).to(get_device())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    targets = torch.from_numpy(labels)

    def logits(rows: Any) -> torch.Tensor:
        return model(input_ids=tokens["input_ids"][rows], attention_mask=tokens["attention_mask"][rows]).logits

    started = time.perf_counter()
    model.train()
    for step in torch.from_numpy(train_rows).split(EFFECTIVE):
        for rows in step.split(BATCH):
            loss = torch.nn.functional.cross_entropy(logits(rows), targets[rows], reduction="sum") / len(step)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        found = torch.cat([logits(rows).argmax(dim=1) for rows in torch.from_numpy(val_rows).split(BATCH)])
    metrics = {"f1": float(f1_score(labels[val_rows], found)), "seconds": time.perf_counter() - started}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def trial(config: dict[str, Any]) -> None:
    """The driver of a fold."""
    TorchTrainer(
        train_fold,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(
            name=f"fold_{config['fold']}",
            storage_path=config["out"],
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]  # annotated with the callback of Train V1
        ),
    ).fit()


class Lines(tune.Callback):
    """Says when folds start and end."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        print(f"fold {trial.config['fold']}: starting", flush=True)  # noqa: T201

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        print(f"fold {trial.config['fold']}: done", flush=True)  # noqa: T201


def main() -> None:
    data, base, folds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    out = str(Path("plain").absolute())
    ray.init("local")
    runs = MLflowLoggerCallback(tracking_uri=f"sqlite:///{Path('plain.db').absolute()}", experiment_name="plain")
    given: dict[str, Any] = {"folds": folds, "data": data, "base": base, "out": out}
    results: Any = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.001}),
        param_space=given | {"fold": tune.grid_search(list(range(folds)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=folds),
        run_config=tune.RunConfig(name="tune", storage_path=out, callbacks=[runs, Lines()]),
    ).fit()
    print(json.dumps({"loops": sum(result.metrics["seconds"] for result in results if result.metrics)}))  # noqa: T201


if __name__ == "__main__":
    main()
