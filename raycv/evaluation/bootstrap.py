"""Intervals and tests: the bootstrap over posts (draws, seed), the corrected resampled t, Holm's correction.

The post bootstrap keeps all pairs of a post together, since they share a text. It holds the trained models fixed.
The corrected t looks at the folds instead, and so at training again on similar data.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raycv.evaluation.measures import RANGES, UNIT

DRAWS, SEED, LEVEL = 2000, 42, 0.95
MOST_UNDEFINED = 0.05
"""The share of draws without a defined value above which there is no interval."""
_CELLS = 32_000_000
"""The pairs times draws of one chunk: this bounds the memory."""

Statistic = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Takes weights [posts, draws] and returns named values [..., draws]."""
COVERS = {
    "fixed": "post bootstrap, threshold held fixed: these trained models and thresholds on new posts of the same kind; "
    "not training again",
    "reselected": "post bootstrap, threshold chosen again in every draw: these trained models on new posts, and the "
    "choice of their thresholds too. At cross_fold each draw is compared with the posts themselves at the thresholds "
    "that it chose; not training again",
    "corrected_t": "corrected resampled t (Nadeau and Bengio 2003) over the folds: training again on as many posts of "
    "the same kind; few folds make it wide, its ends are clipped to the metric's range, and it is approximate",
}


@dataclass(frozen=True)
class Samples:
    """Estimates, and their values in every bootstrap draw."""

    estimate: Mapping[str, np.ndarray]
    """values [...] on the posts themselves"""
    draws: Mapping[str, np.ndarray]
    """values [..., draws]"""
    difference: bool = False
    """whether the values are differences of two metrics"""

    def minus(self, other: "Samples") -> "Samples":
        """Returns the differences of the same draws."""
        shared = [name for name in self.estimate if name in other.estimate]
        return Samples(
            {name: self.estimate[name] - other.estimate[name] for name in shared},
            {name: self.draws[name] - other.draws[name] for name in shared},
            difference=True,
        )

    def bounds(self, name: str) -> tuple[float, float]:
        """Returns the range of a value: that of its metric, or that of a difference of two such metrics."""
        low, high = RANGES.get(metric_of(name), UNIT)
        return (low - high, high - low) if self.difference else (low, high)


def weights_of_draws(posts: int, draws: int, seed: int, chunk: int) -> Iterator[np.ndarray]:
    """Yields how often each draw takes each post, float64 [posts, up to `chunk` draws]. Each column sums to `posts`."""
    generator = np.random.default_rng(seed)
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        taken = generator.integers(posts, size=(size, posts))
        cell = taken * size + np.arange(size)[:, None]
        yield np.bincount(cell.ravel(), minlength=posts * size).reshape(posts, size).astype(np.float64)


def resample(statistic: Statistic, posts: int, pairs: int, *, draws: int = DRAWS, seed: int = SEED) -> Samples:
    """Computes a statistic on the posts and on bootstrap draws of them.

    Args:
        statistic: Computes the values.
        posts: The number of posts.
        pairs: The number of pairs, from which the size of a chunk follows.
        draws: The number of draws.
        seed: The seed of the draws. Equal seeds and numbers of posts give equal draws, so differences are paired.
    """
    estimate = {name: value[..., 0] for name, value in statistic(np.ones((posts, 1))).items()}
    chunk = max(16, min(256, _CELLS // max(pairs, 1)))
    parts = [statistic(weights) for weights in weights_of_draws(posts, draws, seed, chunk)]
    return Samples(estimate, {name: np.concatenate([part[name] for part in parts], axis=-1) for name in estimate})


def interval(draws: np.ndarray, level: float = LEVEL) -> dict[str, Any]:
    """Returns the percentile interval of one value: its ends (None without an interval), undefined and equal draws.

    Args:
        draws: The value in every draw, NaN where undefined [draws].
        level: The share of draws within the interval.
    """
    defined = draws[~np.isnan(draws)]
    undefined = len(draws) - len(defined)
    ends: list[float | None] = [None, None]
    if len(defined) and undefined <= MOST_UNDEFINED * len(draws):
        ends = [float(end) for end in np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])]
    # A perfect or constant classifier has the same value in every draw: its interval has no width and says little.
    constant = len(defined) > 0 and bool(defined.min() == defined.max())
    return {"low": ends[0], "high": ends[1], "undefined_draws": undefined, "constant": constant}


def corrected_t(
    values: Sequence[float], level: float = LEVEL, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> dict[str, Any]:
    """Returns the corrected resampled t interval of a mean over the folds of one cross-validation, and its p-value.

    For k folds with sample variance s² the variance of the mean is `(1 / k + 1 / (k - 1)) * s²` (Nadeau and Bengio
    2003). The second term is the number of a fold's test pairs over that of its training pairs.

    Args:
        values: A value per fold, in a comparison a difference per fold.
        level: The confidence level.
        bounds: The range of the metric, or of a difference. The ends are clipped to it, since few folds lead beyond it.

    Returns:
        low, high, p (two-sided, of the mean 0) and df. All but df are None if a fold's value is undefined.
    """
    from scipy.special import stdtr, stdtrit

    folds = len(values)
    if folds < 2 or any(math.isnan(value) for value in values):
        return {"low": None, "high": None, "p": None, "df": folds - 1}
    mean, error = float(np.mean(values)), math.sqrt((1 / folds + 1 / (folds - 1)) * float(np.var(values, ddof=1)))
    half = float(stdtrit(folds - 1, (1 + level) / 2)) * error
    p = 2 * float(stdtr(folds - 1, -abs(mean) / error)) if error else float(mean == 0)
    low, high = (min(max(end, bounds[0]), bounds[1]) for end in (mean - half, mean + half))
    return {"low": low, "high": high, "p": p, "df": folds - 1}


def p_value(draws: np.ndarray) -> float | None:
    """Returns the two-sided bootstrap p-value of a difference of 0; None if too many draws are undefined.

    It is twice the smaller share of draws at or beyond 0, with one added to both counts, so it is never 0.
    """
    defined = draws[~np.isnan(draws)]
    if not len(defined) or len(draws) - len(defined) > MOST_UNDEFINED * len(draws):
        return None
    tail = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(defined) + 1))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Returns p-values adjusted by Holm's step-down method.

    An undefined value stays undefined. It still counts as a test, so an untestable criterion makes no other one easier.
    """
    adjusted: list[float | None] = [None] * len(values)
    tested = sorted((value, position) for position, value in enumerate(values) if value is not None)
    highest = 0.0
    for rank, (value, position) in enumerate(tested):
        highest = max(highest, min(1.0, (len(values) - rank) * value))
        adjusted[position] = highest
    return adjusted


def metric_of(name: str) -> str:
    """Returns the metric at the end of the name of a value."""
    return name.rpartition(".")[2]


def number(samples: Samples, name: str, at: tuple[int, ...] = (), reselected: str | None = None) -> dict[str, Any]:
    """Returns an estimate (`value`, None where undefined) and its intervals by the names of `COVERS`; ECE has None.

    Args:
        samples: Holds the values.
        name: The value, with the threshold held fixed.
        at: The position of the unit, for values by fold or criterion.
        reselected: The name of the same value with the threshold chosen again.
    """
    # The calibration error of a draw is larger than that of the posts themselves, so its bootstrap is biased upwards.
    ends = None if metric_of(name) == "ece" else interval(samples.draws[name][at])
    found = {"value": plain(samples.estimate[name][at]), "fixed": ends}
    return found | ({"reselected": interval(samples.draws[reselected][at])} if reselected else {})


def mean_over_units(samples: Samples, name: str) -> Samples:
    """Returns the mean of a value over its units, folds or criteria, under the same name.

    Units whose estimate is undefined are left out; the caller counts them. A draw in which another unit is undefined is
    undefined, so that every draw averages the same units.
    """
    defined = ~np.isnan(samples.estimate[name])
    if not defined.any():
        return Samples({name: np.array(np.nan)}, {name: np.full(samples.draws[name].shape[-1], np.nan)})
    return replace(
        samples,
        estimate={name: samples.estimate[name][defined].mean(axis=0)},
        draws={name: samples.draws[name][defined].mean(axis=0)},
    )


def fold_mean(samples: Samples, name: str, reselected: str | None = None) -> dict[str, Any]:
    """Returns the mean over the folds with its intervals, the sample standard deviation, each fold, undefined folds."""
    folds = samples.estimate[name]
    defined = folds[~np.isnan(folds)]
    found = {
        **number(mean_over_units(samples, name), name),
        "corrected_t": corrected_t(folds.tolist(), bounds=samples.bounds(name)),
        "sd": float(defined.std(ddof=1)) if len(defined) > 1 else None,
        "folds": [plain(value) for value in folds],
        "undefined": len(folds) - len(defined),
    }
    return found | (
        {"reselected": interval(mean_over_units(samples, reselected).draws[reselected])} if reselected else {}
    )


def criterion_macro(samples: Samples, name: str) -> dict[str, Any]:
    """Returns the mean over the criteria with its interval, and how many criteria are undefined and left out."""
    undefined = int(np.isnan(samples.estimate[name]).sum())
    return {**number(mean_over_units(samples, name), name), "undefined": undefined}


def plain(value: Any) -> float | None:
    """Returns a number as JSON holds it: None for NaN."""
    value = float(value)
    return None if math.isnan(value) else value


def said(value: float | None, ends: dict[str, Any]) -> str:
    """Returns a value with its interval in words, such as `0.614 (0.580 to 0.640)`."""
    if value is None:
        return "undefined"
    if ends["low"] is None:
        return f"{value:.3f} (no interval: {ends['undefined_draws']} draws are undefined)"
    return f"{value:.3f} ({ends['low']:.3f} to {ends['high']:.3f})"


def rounded(value: Any) -> Any:
    """Returns a copy with numbers of 10 significant digits, None for NaN: the last digits depend on the machine."""
    if isinstance(value, float):
        return None if np.isnan(value) else float(f"{value:.10g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value
