"""Does `train.batching=post_grouped` cost accuracy? Paired folds under both, on the full-size synthetic set.

The tiny base under the quickstart's learning rate, every fold of every seed trained and validated twice: same split,
same start, same number of pairs per step; only which pairs share a step differs. The interval is that of the corrected
resampled t-test (Nadeau and Bengio 2003): folds share training data, so the plain one would be too narrow.

The rule: post_grouped is the default only if the whole interval of F1's difference lies within MARGIN of zero, so that
a difference that would matter is ruled out. That the interval holds zero is not enough: that of few folds always does.
The margin is the 0.5 % F1 by which the specification lets two runs of one config differ (SC-003). It was written down
after the first study, of 15 pairs, whose interval is more than three times as wide.

Started again, it goes on where it stopped, if settings, base model and code are the same.
"""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from statistics import fmean, variance
from typing import Any

from benchmarks.corpus import BASE, encode, run_config, synthetic
from benchmarks.harness import Result, logger, parser
from raycv.common.files import read_json
from raycv.data.prompt_encoder import EncodedPairs
from raycv.data.splits import Split, make_splits
from raycv.model.adapters import add_dora
from raycv.model.base_model import fetch_base
from raycv.model.loading import load_classifier, load_tokenizer
from raycv.utils import set_seed

MODES = ("shuffled", "post_grouped")
FOLDS = 5
SETTINGS = ("model=tiny_llama", "train.lr=2e-3", "train.warmup_steps=10", "train.precision=fp32")
METRICS = ("f1", "roc_auc")
MARGIN = 0.005
"""of F1; see above"""


@cache
def _data(posts: int, max_length: int, seed: int) -> tuple[EncodedPairs, list[Split]]:
    """The synthetic set as token arrays, and its folds under `seed`; kept by each process."""
    dataset = synthetic(posts)
    return encode(dataset, f"prompt.max_length={max_length}"), make_splits(dataset.pairs, FOLDS, seed)


def train(posts: int, max_length: int, epochs: int, seed: int, fold: int, batching: str) -> dict[str, Any]:
    """One fold under one way of batching: its metrics at the best epoch, and seconds."""
    import torch

    from benchmarks.fold import StepLosses
    from raycv.training.loop import FoldTrainer

    torch.set_num_threads(1)
    encoded, splits = _data(posts, max_length, seed)
    overrides = [f"train.seed={seed}", f"train.batching={batching}", f"train.epochs={epochs}"]
    config = run_config(*SETTINGS, *overrides)
    base = fetch_base(BASE, None)
    model = load_classifier(base, load_tokenizer(base), torch.float32, seed=seed)
    set_seed(seed)
    loop = FoldTrainer(add_dora(model, config.model, config.dora), encoded, config.train, "fp32", StepLosses())
    outcome = loop.fit(splits[fold].train_indices, splits[fold].val_indices)
    return {
        "seed": seed,
        "fold": fold,
        "batching": batching,
        "best_epoch": outcome.best.epoch,
        "seconds": sum(epoch.seconds for epoch in outcome.epochs),
        **outcome.best.metrics,
    }


def paired(rows: list[dict[str, Any]], metric: str) -> dict[str, float]:
    """Mean difference post_grouped - shuffled over the folds of all seeds, and its 95 % interval."""
    from scipy.stats import t

    value = {(row["seed"], row["fold"], row["batching"]): row[metric] for row in rows}
    keys = sorted({key[:2] for key in value})
    differences = [value[*key, "post_grouped"] - value[*key, "shuffled"] for key in keys]
    # A fold's validation set over its training set is 1 / (FOLDS - 1).
    deviation = math.sqrt((1 / len(differences) + 1 / (FOLDS - 1)) * variance(differences))
    half = float(t.ppf(0.975, len(differences) - 1)) * deviation
    mean = fmean(differences)
    return {"mean": mean, "low": mean - half, "high": mean + half, "pairs": len(differences)}


def is_equivalent(interval: dict[str, float], margin: float = MARGIN) -> bool:
    """Whether a difference of `margin` or more is ruled out."""
    return -margin < interval["low"] and interval["high"] < margin


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over folds and seeds."""
    return {key: fmean(row[key] for row in rows) for key in (*METRICS, "seconds")}


def main() -> None:
    arguments = parser(__doc__, repeats=1)
    arguments.add_argument("--seeds", type=int, default=3, help="seeds of split, start and order [%(default)s]")
    arguments.add_argument("--epochs", type=int, default=1, help="epochs of each training [%(default)s]")
    arguments.add_argument("--max-length", type=int, default=512, help="tokens of a prompt [%(default)s]")
    arguments.add_argument("--processes", type=int, default=2, help="folds at once, one core each [%(default)s]")
    options = arguments.parse_args()
    posts = 30 if options.small else 1484
    settings = {"posts": posts, "epochs": options.epochs, "seeds": options.seeds, "max_length": options.max_length}
    settings |= {"overrides": list(SETTINGS), "base": BASE}
    result = Result("batching", options, **settings, margin=MARGIN)
    rows = _done(result, settings)
    done = {(row["seed"], row["fold"], row["batching"]) for row in rows}
    result.add(*rows)
    wanted = [key for key in product(range(options.seeds), range(FOLDS), MODES) if key not in done]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        started = [pool.submit(train, posts, options.max_length, options.epochs, *key) for key in wanted]
        for future in started:
            result.add(future.result())
    everything = result.value["rows"]
    result.add(
        paired={metric: paired(everything, metric) for metric in METRICS},
        means={mode: means([row for row in everything if row["batching"] == mode]) for mode in MODES},
        equivalent=is_equivalent(paired(everything, "f1")),
    )
    result.report()


def _done(result: Result, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier start under the same settings and by the same code, if there was one."""
    if not result.path.is_file():
        return []
    before = read_json(result.path)
    differs = [key for key, value in settings.items() if before["settings"].get(key) != value]
    differs += ["code"] if before["environment"]["git"] != result.value["environment"]["git"] else []
    if differs:
        logger.info("what %s holds is measured again: other %s", result.path.name, ", ".join(differs))
        return []
    rows: list[dict[str, Any]] = before["rows"]
    return rows


if __name__ == "__main__":
    main()
