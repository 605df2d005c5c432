"""What all benchmarks share: arguments, interleaved timing, spread, bars, and the JSON of a result.

Imports nothing that needs Ray, MLflow, Hydra or pydantic: `benchmarks.gpu` runs where these are not installed.
"""

import argparse
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.table import RESULTS, render
from raycv.common.environment import describe_device, describe_environment
from raycv.common.files import write_json

logger = logging.getLogger(__name__)

ON_A_GPU = "_gpu"
"""Ends the name of a result of a benchmark that has one of a CPU too."""

Variants = Mapping[str, Callable[[], object]]
Clock = Callable[[], float]


def parser(doc: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes; `doc` is the module's docstring. Rounds are told on stderr."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--small", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    arguments.add_argument("--repeats", type=_positive, default=repeats, help="interleaved repetitions [%(default)s]")
    arguments.add_argument("--out", type=Path, help="JSON file to write [benchmarks/results/<name>.json]")
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _options(arguments: argparse.Namespace) -> str:
    """The switches that say what was measured; those that name places or counts stand elsewhere in the result."""
    switches = [
        f" --{name.replace('_', '-')}" for name in ("small", "one_core", "compile") if getattr(arguments, name, False)
    ]
    layers = getattr(arguments, "layers", None)
    return "".join([*switches, f" --layers {layers}" if layers else ""])


def add_one_core(arguments: argparse.ArgumentParser) -> None:
    """Adds `--one-core`, for a machine that is not idle; `clock` obeys it."""
    arguments.add_argument(
        "--one-core", action="store_true", help="one thread, and its CPU seconds: what else runs counts little"
    )


def clock(*, one_core: bool) -> Clock:
    """What seconds are read from: the wall, or the CPU time of this process, which from here on has one thread."""
    if not one_core:
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def timed(work: Callable[[], object], device: torch.device | None = None, *, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call; on a GPU until its work is done."""
    _wait(device)
    started = clock()
    work()
    _wait(device)
    return clock() - started


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    variants: Variants,
    repeats: int,
    *,
    device: torch.device | None = None,
    warm_up: bool = True,
    clock: Clock = time.perf_counter,
    after_round: Callable[[dict[str, list[float]]], object] = lambda seconds: None,
) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls of each variant, after one that does not count (`warm_up`).

    Variants take turns, so that a busy spell of the machine meets all of them; each round begins with another one.
    `after_round` gets what there is at the end of each.
    """
    if warm_up:
        for work in variants.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for repeat in range(repeats):
        tell(f"round {repeat + 1} of {repeats}: {', '.join(names)}")
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(variants[name], device, clock=clock))
        after_round(seconds)
    return seconds


def tell(text: str) -> None:
    """Says what is measured next."""
    logger.info(text)


def spread(values: list[float]) -> dict[str, float]:
    """Median and range of a few measurements."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


@dataclass(frozen=True)
class Bar:
    """A claim that a result is held against."""

    claim: str
    value: float
    limit: float
    at_most: bool = False
    worst: float | None = None
    """of the rounds that `value` is the median of"""

    why_missed: str = ""
    """what a reader should know if it is"""

    @classmethod
    def of_rounds(cls, claim: str, values: list[float], limit: float, *, at_most: bool = False) -> "Bar":
        """The median of the rounds, beside their worst."""
        return cls(claim, median(values), limit, at_most, max(values) if at_most else min(values))

    def judged(self) -> dict[str, Any]:
        """As it stands in the JSON; a bar is met by the median, and whether the worst round meets it is said too."""
        bound = {"at_most" if self.at_most else "at_least": self.limit}
        judged = {"claim": self.claim, "value": self.value, **bound, "met": self._meets(self.value)}
        if self.worst is not None:
            judged |= {"worst": self.worst, "every_round": self._meets(self.worst)}
        if self.why_missed and not judged["met"]:
            judged["why"] = self.why_missed
        return judged

    def _meets(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def ratios(of: list[float], over: list[float]) -> list[float]:
    """`of` over `over`, round by round: what slowed a round down slowed both."""
    return [one / other for one, other in zip(of, over, strict=True)]


class Result:
    """The JSON of one benchmark: `rows` of measurements, the bars, and where it was measured."""

    def __init__(self, name: str, arguments: argparse.Namespace, **settings: Any) -> None:
        self.path: Path = arguments.out or RESULTS / f"{name}{'.small' if arguments.small else ''}.json"
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.value: dict[str, Any] = {
            "benchmark": name,
            "command": f"python -m benchmarks.{name.removesuffix(ON_A_GPU)}{_options(arguments)}",
            "small": arguments.small,
            "settings": {"repeats": arguments.repeats, **settings},
            "environment": {**describe_environment(), "device": describe_device(device)},
            # Runnable threads, the benchmark's own among them: more than there are cores, and times say little.
            "load_average": {"start": os.getloadavg()[0]},
            "rows": [],
            "bars": [],
        }

    def add(self, *rows: dict[str, Any], bars: list[Bar] | None = None, **more: Any) -> None:
        """Adds measurements and writes what there is: a run that is cut short keeps what it has."""
        self.value["rows"] += rows
        self.value["bars"] += [bar.judged() for bar in bars or []]
        self.value.update(more)
        self.value["load_average"]["end"] = os.getloadavg()[0]
        write_json(self.path, self.value)

    def renew(self, rows: list[dict[str, Any]], bars: list[Bar], part: str | None = None) -> None:
        """Puts `rows` in the place of those of the same `part`, or of all, and `bars` in the place of all."""
        self.value["rows"] = [row for row in self.value["rows"] if part is not None and row["part"] != part]
        self.value["bars"] = []
        self.add(*rows, bars=bars)

    def report(self) -> None:
        """Says what was measured, and where it is."""
        print("\n".join(render(self.value)))  # noqa: T201
        print(f"\nwritten to {self.path}")  # noqa: T201
