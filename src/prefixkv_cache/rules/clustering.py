"""Few lengths for many heads: an exact one-dimensional clustering of what the heads of a layer keep.

Heads of equal length are stored together (a segment), so a layer shall have few lengths. Each head gets the mean of
its cluster, so the layer's total stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise


def group_means(values: Sequence[float], groups: Sequence[Sequence[int]]) -> list[float]:
    """Each head's value replaced by the mean of its group; equal values stay to the last bit.

    Args:
        values: one for each head.
        groups: indices of the heads in each group, every head in one.
    """
    means = list(values)
    for heads in groups:
        if len({values[head] for head in heads}) > 1:
            mean = math.fsum(values[head] for head in heads) / len(heads)
            for head in heads:
                means[head] = mean
    return means


@lru_cache(maxsize=1024)
def cluster(numbers: tuple[float, ...], most: int) -> tuple[tuple[int, ...], ...]:
    """The at most `most` clusters with the least sum of squared distances to their means: exact k-means.

    In one dimension the clusters are runs of the sorted numbers, so dynamic programming over where the last one begins
    finds the best (Wang and Song, The R Journal 2011). Equal numbers are one point of more weight.

    Returns:
        Indices of the numbers in each cluster, the clusters rising.
    """
    values = sorted(set(numbers))
    weights = [numbers.count(value) for value in values]
    n, most = len(values), max(1, most)
    bounds = list(range(n + 1)) if n <= most else _bounds(values, weights, most)
    return tuple(
        tuple(at for at, number in enumerate(numbers) if values[start] <= number <= values[stop - 1])
        for start, stop in pairwise(bounds)
    )


def _bounds(values: list[float], weights: list[int], most: int) -> list[int]:
    """Where the clusters begin among the rising values, and the end."""
    n = len(values)
    spread = [[0.0] * (n + 1) for _ in range(n)]  # spread[i][j]: squared distances of values i .. j - 1 to their mean
    for i in range(n):
        weight, mean, squares = 0, 0.0, 0.0
        for j in range(i, n):
            weight += weights[j]
            away = values[j] - mean
            mean += away * weights[j] / weight
            squares += weights[j] * away * (values[j] - mean)
            spread[i][j + 1] = squares
    best = [0.0] + [spread[0][j] for j in range(1, n + 1)]
    begins = [[0] * (n + 1)]
    for clusters in range(2, most + 1):
        begin = [0] * (n + 1)
        cost = [float("inf")] * (n + 1)
        for j in range(clusters, n + 1):
            cost[j], begin[j] = min((best[i] + spread[i][j], i) for i in range(clusters - 1, j))
        best = cost
        begins.append(begin)
    bounds = [n]
    for begin in reversed(begins):
        bounds.append(begin[bounds[-1]])
    return bounds[::-1]
