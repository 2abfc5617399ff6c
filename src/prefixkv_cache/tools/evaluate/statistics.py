"""Ratios of sums over samples, with bootstrap intervals. Numbers in, numbers out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A figure and the bounds of its 95 % interval; nan where it is not defined."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Percentile bootstrap over samples, drawn once: all figures of a table are resampled alike, so they pair up.

    Args:
        n: samples.
        seed: of the resampling.
    """

    def __init__(self, n: int, seed: int = 0):
        drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
        self._index = np.vstack([np.arange(n), drawn])

    def ratio(self, sums: ArrayLike, weights: ArrayLike) -> np.ndarray:
        """Sum of `sums` by sum of `weights`: float64 [1 + RESAMPLES], first of the samples as they are."""
        sums, weights = np.asarray(sums, np.float64), np.asarray(weights, np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[self._index].sum(1) / weights[self._index].sum(1)


def estimate(values: np.ndarray) -> Estimate:
    """What `Bootstrap.ratio` returned, or a function of it, as a figure with its interval."""
    defined = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
    return Estimate(float(values[0]), float(low), float(high))
