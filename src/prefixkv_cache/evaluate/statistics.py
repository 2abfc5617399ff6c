"""Means over samples with bootstrap intervals. Numbers in, numbers out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A figure and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Percentile bootstrap over samples, drawn once: all figures of one table are resampled alike, so they pair up.

    Args:
        n: samples.
        seed: of the resampling.
    """

    def __init__(self, n: int, seed: int = 0):
        self._index = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))

    def mean(self, values: ArrayLike) -> Estimate:
        """The mean of one value a sample."""
        return self.ratio(values, np.ones(self._index.shape[1]))

    def ratio(self, sums: ArrayLike, weights: ArrayLike) -> Estimate:
        """The sum of `sums` by the sum of `weights`, such as log-likelihoods by numbers of tokens."""
        sums, weights = np.asarray(sums, np.float64), np.asarray(weights, np.float64)
        resampled = sums[self._index].sum(1) / weights[self._index].sum(1)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return Estimate(float(sums.sum() / weights.sum()), float(low), float(high))


def exponential(estimate: Estimate) -> Estimate:
    """From mean negative log-likelihood to perplexity; infinite where it is too large for a float."""
    return Estimate(*(math.exp(min(value, 709.0)) if value <= 709.0 else math.inf for value in estimate))
