"""What the statistics of a run cost: time and peak memory of `evaluate` at 13,356 and at 200,000 pairs.

Simulated pairs, 9 a post, in 5 folds with three epochs, a floor's scores and all flags; 2,000 bootstrap draws. Every
measurement is a fresh process, since a process's peak never falls.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from raycv.evaluation.evaluate import evaluate
from raycv.evaluation.study import Study

CRITERIA, FOLDS, EPOCHS = 9, 5, 3
POSTS = (1_484, 22_222)
"""As many as ReDSM5 has, and 200,000 pairs."""
SMALL_POSTS, SMALL_DRAWS = (60, 120), 50


def study(posts: int) -> Study:
    """A run with everything recorded."""
    rng = np.random.default_rng(0)
    post, criterion = np.repeat(np.arange(posts), CRITERIA), np.tile(np.arange(CRITERIA), posts)
    labels = (rng.random(len(post)) < 0.1).astype(np.int8)
    fold = (np.arange(posts) % FOLDS)[post]
    scores = 1 / (1 + np.exp(-(2 * labels - 2 + rng.normal(size=(EPOCHS + 1, len(post))))))
    epochs = [scores[:EPOCHS, fold == one] for one in range(FOLDS)]
    flags = (rng.random(posts) < 0.25)[post]
    return Study(
        "benchmark", labels, scores[0], fold, post, criterion, [f"p{one:06d}" for one in range(posts)],
        [f"A.{one + 1}" for one in range(CRITERIA)], epoch_scores=epochs, floor_scores={"a floor": scores[-1]},
        shortened=flags, hard_negative=flags & (labels == 0), near_duplicates=[], events=[[]] * FOLDS,
        retries=[0] * FOLDS,
    )  # fmt: skip


def measure(posts: int, draws: int) -> dict[str, Any]:
    """Seconds, CPU seconds, bytes of memory and of JSON of one evaluation in this process."""
    made = study(posts)
    wall, cpu = time.perf_counter(), time.process_time()
    found = evaluate(made, draws)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    (peak,) = (line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if "VmHWM" in line)
    size = len(json.dumps(found, allow_nan=False))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": int(peak.split()[1]) * 1024,
        "json_bytes": size,
    }


def in_a_process(posts: int, draws: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.report", "--one", str(posts), str(draws)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(*map(int, sys.argv[2:4]))))  # noqa: T201
        return
    # The harness imports torch, which would be most of a measured process's memory.
    from benchmarks.harness import Bar, Result, parser, spread, tell
    from raycv.evaluation.bootstrap import DRAWS

    options: argparse.Namespace = parser(__doc__, repeats=3).parse_args()
    sizes, draws = (SMALL_POSTS, SMALL_DRAWS) if options.small else (POSTS, DRAWS)
    result = Result("report", options, criteria=CRITERIA, folds=FOLDS, epochs=EPOCHS, draws=draws)
    rounds: dict[int, list[dict[str, Any]]] = {posts: [] for posts in sizes}
    for repeat in range(options.repeats):
        tell(f"round {repeat + 1} of {options.repeats}")
        for posts in sizes:
            rounds[posts].append(in_a_process(posts, draws))
    for posts, rows in rounds.items():
        result.add(
            {
                "pairs": posts * CRITERIA,
                "seconds": spread([row["seconds"] for row in rows]),
                "cpu_seconds": spread([row["cpu_seconds"] for row in rows]),
                "peak_bytes": max(row["peak_bytes"] for row in rows),
                "json_bytes": rows[0]["json_bytes"],
            }
        )
    few, many = rounds.values()
    grown = [
        after["cpu_seconds"] / before["cpu_seconds"] / (sizes[1] / sizes[0])
        for before, after in zip(few, many, strict=True)
    ]
    result.add(
        bars=[
            Bar.of_rounds(
                f"CPU seconds at {sizes[0] * CRITERIA:,} pairs", [row["cpu_seconds"] for row in few], 10, at_most=True
            ),
            Bar.of_rounds("growth of CPU seconds over growth of pairs", grown, 1.5, at_most=True),
            Bar("peak memory, GB", max(row["peak_bytes"] for row in many) / 1e9, 2, at_most=True),
        ]
    )
    result.report()


if __name__ == "__main__":
    main()
