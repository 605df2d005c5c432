"""Does `train.batching=post_grouped` cost accuracy? Paired trainings on data sets that share no post.

A replicate is a fresh synthetic data set, the tiny base with one start, and a training of each way of batching over the
same posts and epochs. Only which pairs share a step differs. The metrics are those of the best epoch, as in a run.

What makes the interval narrow:

- Replicates share no post, so they are independent and the paired t-test holds. Folds of one data set share training
  data, and the correction for it (Nadeau and Bengio 2003) leaves an interval that no number of seeds makes narrow.
- Both ways have the same data, start and seed. The test has twice the posts of the training, since a test is cheap.
- Posts are short and few, so a replicate takes minutes and there are many. Four epochs make 170 optimizer steps; an
  epoch of the full-size set has 334.

The rule, written before the study: post_grouped costs nothing that matters if the whole interval of F1's difference is
above -MARGIN. MARGIN is the 0.5 % F1 by which the specification lets two runs of one config differ (SC-003).

raycv does not offer `mixed`: three criteria of a post at a time, so that a step has three times the posts.

Started again, it continues after the last replicate that was written, if the settings are the same. A replicate is
trained by one process, so all its ways have the same code.
"""

import argparse
import math
import multiprocessing
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks.corpus import BASE, encode, pairs_of_posts, run_config, synthetic
from benchmarks.harness import Result, logger, parser
from raycv.common.environment import code_state
from raycv.common.files import read_json
from raycv.data.prompt_encoder import EncodedPairs
from raycv.model.adapters import add_dora
from raycv.model.base_model import fetch_base
from raycv.model.loading import load_classifier, load_tokenizer
from raycv.utils import set_seed

SHUFFLED, GROUPED, MIXED = "shuffled", "post_grouped", "mixed"
OVERRIDES = ("model=tiny_llama", "train.lr=2e-3", "train.warmup_steps=10", "train.precision=fp32")
METRICS = ("f1", "roc_auc")
MARGIN = 0.005
"""of F1; see above"""
TOGETHER = 3
"""Criteria of a post that stay together in `mixed`."""
FIRST_SEED = 1000
"""The seed of the first replicate's posts. The base model and other benchmarks have seen posts of smaller ones."""


def in_parts(encoded: EncodedPairs, seed: int) -> EncodedPairs:
    """`encoded` with posts cut into parts of `TOGETHER` random criteria each: raycv then groups by part."""
    posts = encoded.post_of_pair
    generator = np.random.default_rng(seed)
    by_post = np.lexsort((generator.random(len(posts)), posts))
    place = np.empty(len(posts), dtype=np.int64)
    place[by_post] = np.concatenate([np.arange(count) for count in np.bincount(posts)])
    return replace(encoded, post_of_pair=(posts * int(place.max() + 1) + place // TOGETHER).astype(np.int32))


def replicate(number: int, ways: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The row of one replicate: metrics of the best epoch, F1 of each epoch and CPU seconds, by way."""
    import torch

    torch.set_num_threads(1)
    posts, tested = settings["posts"], settings["test_posts"]
    dataset = synthetic(posts + tested, seed=FIRST_SEED + number, words_mean=settings["words_mean"])
    encoded = encode(dataset)
    train, test = pairs_of_posts(encoded, range(posts)), pairs_of_posts(encoded, range(posts, posts + tested))
    row: dict[str, Any] = {
        "replicate": number,
        "git": code_state(),
        "mean_tokens": float(encoded.lengths.mean()),
    }
    for way in ways:
        given = in_parts(encoded, number) if way == MIXED else encoded
        row[way] = trained(given, train, test, way, number, settings["epochs"])
    return row


def trained(
    encoded: EncodedPairs, train: np.ndarray, test: np.ndarray, way: str, seed: int, epochs: int
) -> dict[str, Any]:
    """One training."""
    import torch

    from benchmarks.fold import StepLosses
    from raycv.training.loop import FoldTrainer

    batching = SHUFFLED if way == SHUFFLED else GROUPED
    given = (f"train.seed={seed}", f"train.batching={batching}", f"train.epochs={epochs}", f"train.patience={epochs}")
    config = run_config(*OVERRIDES, *given)
    base = fetch_base(BASE, None)
    started = time.process_time()
    model = load_classifier(base, load_tokenizer(base), torch.float32, seed=seed)
    set_seed(seed)
    loop = FoldTrainer(add_dora(model, config.model, config.dora), encoded, config.train, "fp32", StepLosses())
    outcome = loop.fit(train, test)
    return {
        **{metric: outcome.best.metrics[metric] for metric in METRICS},
        "best_epoch": outcome.best.epoch,
        "f1_by_epoch": [epoch.metrics["f1"] for epoch in outcome.epochs],
        "cpu_seconds": time.process_time() - started,
    }


def paired(rows: list[dict[str, Any]], metric: str, way: str = GROUPED) -> dict[str, float]:
    """Mean of `way` - shuffled over the replicates that have both, its 95 % interval (paired t-test), and more.

    `needed` is the number of replicates at which the interval reaches MARGIN to each side.
    """
    from scipy.stats import t

    differences = [row[way][metric] - row[SHUFFLED][metric] for row in rows if way in row]
    count, deviation, mean = len(differences), stdev(differences), fmean(differences)
    half = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    needed = math.ceil((1.96 * deviation / MARGIN) ** 2)
    return {"mean": mean, "low": mean - half, "high": mean + half, "pairs": count, "needed": needed}


def is_harmless(interval: dict[str, float], margin: float = MARGIN) -> bool:
    """Whether a loss of `margin` or more is ruled out."""
    return -margin < interval["low"]


def means(rows: list[dict[str, Any]], way: str) -> dict[str, float]:
    """Over the replicates that have `way`."""
    return {key: fmean(row[way][key] for row in rows if way in row) for key in (*METRICS, "cpu_seconds")}


def summed_up(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows show, once there are two replicates."""
    counted = {way: sum(way in row for row in rows) for way in (SHUFFLED, GROUPED, MIXED)}
    ways = [way for way, count in counted.items() if count > 1]
    if GROUPED not in ways:
        return {}
    return {
        "paired": {way: {metric: paired(rows, metric, way) for metric in METRICS} for way in ways[1:]},
        "means": {way: means(rows, way) for way in ways},
        "harmless": is_harmless(paired(rows, "f1")),
    }


def _done(result: Result, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier start under the same settings, if there was one."""
    if not result.path.is_file():
        return []
    before = read_json(result.path)
    differs = [key for key, value in settings.items() if before["settings"].get(key) != value]
    if differs:
        logger.info("what %s holds is measured again: other %s", result.path.name, ", ".join(differs))
        return []
    rows: list[dict[str, Any]] = before["rows"]
    return rows


def main() -> None:
    arguments = parser(__doc__, repeats=40)
    arguments.add_argument("--mixed", type=int, default=0, help="replicates that train mixed too [%(default)s]")
    arguments.add_argument("--processes", type=int, default=2, help="replicates at once, one core each [%(default)s]")
    options = arguments.parse_args()
    result, settings = opened(options)
    rows = _done(result, settings)
    done = {row["replicate"] for row in rows}
    result.add(*rows, **summed_up(rows))
    context = multiprocessing.get_context("spawn")
    # A worker that waits for work ends with this process, also if it is killed.
    with ProcessPoolExecutor(options.processes, context, initializer=_end_with_parent) as pool:
        started = []
        for number in range(options.repeats):
            ways = (SHUFFLED, GROUPED, MIXED) if number < options.mixed else (SHUFFLED, GROUPED)
            if number not in done:
                started.append(pool.submit(replicate, number, ways, settings))
        for future in as_completed(started):
            rows = sorted([*result.value["rows"], future.result()], key=lambda row: row["replicate"])
            result.renew(rows, [])
            result.add(**summed_up(rows))
    result.report()


def opened(options: argparse.Namespace) -> tuple[Result, dict[str, Any]]:
    """The result, and the settings that rows of an earlier start must share."""
    settings = {
        "posts": 12 if options.small else 150,
        "test_posts": 24 if options.small else 300,
        "words_mean": 40 if options.small else 80,
        "epochs": 1 if options.small else 4,
        "overrides": list(OVERRIDES),
        "base": BASE,
        "margin": MARGIN,
    }
    return Result("batching", options, **settings | {"repeats": 1}), settings


def _end_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
