"""Measured numbers with 95 % confidence intervals."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES, SEED = 2000, 0  # of a bootstrap


@dataclass(frozen=True)
class Estimate:
    """A number measured on `count` items, and its 95 % confidence interval [low, high].

    low and high equal value where nothing is known about the spread, as for one item.
    """

    value: float
    low: float
    high: float
    count: int

    def scaled(self, factor: float) -> "Estimate":
        """The same in another unit, as percent."""
        return dataclasses.replace(
            self, value=self.value * factor, low=self.low * factor, high=self.high * factor
        )


def share(successes: int, count: int) -> Estimate:
    """The share of `count` trials that succeeded, with Wilson's score interval.

    Unlike a bootstrap it has an interval of its own at 0 and 1. Raises ValueError for no trials.
    """
    if count < 1:
        raise ValueError("a share needs at least one trial")
    from scipy import stats

    interval = stats.binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(successes / count, float(interval.low), float(interval.high), count)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of values [N] with a bootstrap interval. Raises ValueError for no values."""
    return ratio(values, [1.0] * len(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum of numerators [N] over sum of denominators [N], with a bootstrap interval over the items.

    The interval is BCa, or the percentiles where BCa is not defined; the same items give the same
    one. Raises ValueError for no items or a sum of denominators of 0.
    """
    over, under = np.asarray(numerators, float), np.asarray(denominators, float)
    if not over.size or not under.sum():
        raise ValueError("nothing was measured")
    value = float(over.sum() / under.sum())
    if over.size == 1 or np.ptp(over) == np.ptp(under) == 0:
        return Estimate(value, value, value, over.size)
    low, high = interval(over, under, "BCa")
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = interval(over, under, "percentile")
    return Estimate(value, low, high, over.size)


def interval(over: np.ndarray, under: np.ndarray, method: str) -> tuple[float, float]:
    """The bootstrap interval of sum(over) / sum(under); NaN where the method is not defined."""
    from scipy import stats

    def statistic(over: np.ndarray, under: np.ndarray, axis: int = -1) -> np.ndarray:
        return over.sum(axis) / np.maximum(under.sum(axis), np.finfo(float).tiny)

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of data for which BCa is not defined
        result = stats.bootstrap(
            (over, under),
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method=method,
            rng=np.random.default_rng(SEED),
        )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
