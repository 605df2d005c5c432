"""What bf16 and int8 change of a fold's scores: full validation folds, beside float32 and the run's predictions.csv.

`--run runs/<name>` takes a finished run of yours, whatever its base model, and writes `drift.json` (`--out`); without
it a quickstart run is made first.
Every fold's checkpoint scores its own validation fold; flips are labels that change at that fold's threshold.
"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from peft import PeftModel

from benchmarks.harness import Clock, Result, add_one_core, clock, interleaved, parser, spread
from raycv.common.locations import resolve
from raycv.config.schema import InferenceConfig
from raycv.data.dataset import load_dataset
from raycv.data.types import Dataset
from raycv.inference.predictor import Computed, Predictor
from raycv.model.base_model import fetch_base
from raycv.model.int8 import has_fast_int8
from raycv.model.loading import load_classifier
from raycv.results.run_folder import RunFolder

TRAINED, STOCK = "predictions.csv", "PEFT, unmerged DoRA, fp32"
BATCH_SIZE = 16
Pairs = list[tuple[str, str]]


def quickstart(folder: Path, *, small: bool) -> Path:
    """The folder of a quickstart run made in `folder`."""
    overrides = ["experiment=quickstart", "run.name=drift", *(["cv.folds=2", "train.epochs=1"] if small else [])]
    done = subprocess.run(
        [sys.executable, "-m", "raycv.run", *overrides], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return folder / "runs" / "drift"


class Fold:
    """A fold's validation pairs, and its model in every precision that this machine computes."""

    def __init__(self, folder: RunFolder, fold: int, dataset: Dataset) -> None:
        place = folder.fold(fold)
        table = pd.read_csv(place.predictions, dtype={"post_id": str, "criterion_id": str})
        self.trained = table["score"].to_numpy()
        self.pairs: Pairs = [
            (dataset.posts[post], dataset.criteria[criterion].text)
            for post, criterion in zip(table["post_id"], table["criterion_id"], strict=True)
        ]
        kinds: list[Computed] = ["fp32", "bf16"]
        if has_fast_int8() and not torch.cuda.is_available():
            kinds.append("int8")
        self.predictors: dict[str, Predictor] = {kind: predictor(place.checkpoint, kind) for kind in kinds}
        self.threshold = self.predictors["fp32"].threshold
        self.stock = predictor(place.checkpoint, "fp32")
        self.stock.model = _stock(self.stock, place.checkpoint)

    def scores(self) -> dict[str, np.ndarray]:
        """Probabilities [P] by who computed them."""
        return {TRAINED: self.trained} | {name: probabilities(each, self.pairs) for name, each in self.all().items()}

    def all(self) -> dict[str, Predictor]:
        """The predictors, PEFT's own layer among them."""
        return {**self.predictors, STOCK: self.stock}


def predictor(checkpoint: Path, precision: Computed) -> Predictor:
    """As `raycv.infer` makes it."""
    return Predictor([checkpoint], InferenceConfig(precision=precision, batch_size=BATCH_SIZE))


def _stock(like: Predictor, checkpoint: Path) -> Any:
    base = fetch_base(like.info.base_model, like.info.base_revision)
    classifier = load_classifier(base, like.encoder.tokenizer, torch.float32, seed=0, device=str(like.device))
    return PeftModel.from_pretrained(classifier, str(checkpoint)).eval()


def probabilities(model: Predictor, pairs: Pairs) -> np.ndarray:
    """float64 [P]"""
    return np.array([prediction.score for prediction in model.predict(pairs)])


def compared(folds: list[dict[str, np.ndarray]], thresholds: list[float], name: str) -> dict[str, Any]:
    """Flips and differences of `name` from fp32 over all folds."""
    differences = np.concatenate([np.abs(scores[name] - scores["fp32"]) for scores in folds])
    flips = sum(
        int(((scores[name] >= threshold) != (scores["fp32"] >= threshold)).sum())
        for scores, threshold in zip(folds, thresholds, strict=True)
    )
    return {
        "variant": name,
        "pairs": len(differences),
        "flips": flips,
        "max": differences.max(),
        "mean": differences.mean(),
    }


def measure(result: Result, root: Path, repeats: int, most: int | None, seconds_of: Clock) -> None:
    """All folds of the run at `root`, and seconds on the first."""
    folder = RunFolder(root.absolute())
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    data = config["data"]
    dataset = load_dataset(Path(resolve(data["dir"])), Path(resolve(data["criteria_dir"])))
    scores, thresholds = [], []
    seconds: dict[str, list[float]] = {}
    for fold in range(config["cv"]["folds"])[:most]:
        each = Fold(folder, fold, dataset)
        scores.append(each.scores())
        thresholds.append(each.threshold)
        if not fold:
            work = {name: partial(probabilities, model, each.pairs) for name, model in each.all().items()}
            seconds = interleaved(work, repeats, clock=seconds_of)
    rows = [compared(scores, thresholds, name) for name in scores[0] if name != "fp32"]
    base = {"variant": "fp32", "pairs": rows[0]["pairs"], "flips": 0, "max": 0.0, "mean": 0.0}
    rows = [
        {**row, **({"seconds": spread(seconds[row["variant"]])} if row["variant"] in seconds else {})}
        for row in [base, *rows]
    ]
    result.add(*rows, base_model=each.predictors["fp32"].info.base_model, folds=len(scores), thresholds=thresholds)


def main() -> None:
    arguments = parser(__doc__, repeats=5)
    arguments.add_argument("--run", type=Path, help="folder of a finished run [a quickstart run is made]")
    arguments.add_argument("--folds", type=int, help="only so many of its folds [all]")
    add_one_core(arguments)
    options = arguments.parse_args()
    if options.run and not RunFolder(options.run).config.is_file():
        arguments.error(f"--run {options.run}: no folder of a run: it has no config.yaml")
    if options.run and options.out is None:
        # Yours are not the figures of the docs.
        options.out = Path("drift.json")
    seconds_of = clock(one_core=options.one_core)
    result = Result("drift", options, one_core=options.one_core, batch_size=BATCH_SIZE)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.run or quickstart(Path(temporary), small=options.small)
        measure(result, root, options.repeats, options.folds, seconds_of)
    result.report()


if __name__ == "__main__":
    main()
