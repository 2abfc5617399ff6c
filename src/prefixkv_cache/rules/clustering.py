"""Few lengths for many heads: an exact one-dimensional clustering of what the heads of a layer keep.

Heads of equal length are stored together (a segment), so a layer shall have few lengths. Each head gets the mean of
its cluster, so the layer's total stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


def group_ratios(ratios: Tensor, most: int = 4) -> Tensor:
    """Keep ratios of at most `most` different values, as near to those given as can be (least squares).

    Args:
        ratios: float64 [n_heads].
        most: number of different values, at least 1.

    Returns:
        float64 [n_heads]: the mean of each head's cluster. Equal ratios share one; the order of the ratios stays.
    """
    given = tuple(ratios.tolist())
    grouped = list(given)
    for heads in cluster(given, most):
        if len({given[head] for head in heads}) > 1:
            mean = math.fsum(given[head] for head in heads) / len(heads)
            for head in heads:
                grouped[head] = mean
    return torch.tensor(grouped, dtype=torch.float64, device=ratios.device)


def group_counts(
    counts: Sequence[int], most: int = 4, *, least: int = 0, limit: int | None = None
) -> tuple[list[int], int]:
    """The same on whole numbers of pairs, whose total never becomes more.

    Args:
        counts: pairs of each head.
        most: number of different counts, at least 1.
        least: no head gets fewer (the total has to suffice for it).
        limit: no head gets more. None: no limit.

    Returns:
        (counts of each head, pairs left over): fewer are left than the smallest group that is below the limit has
        heads.
    """
    groups = cluster(tuple(counts), most)
    sizes = [len(heads) for heads in groups]
    shares = [sum(counts[head] for head in heads) / len(heads) for heads in groups]
    limit = sum(counts) if limit is None else limit
    lengths = [min(limit, max(least, int(share))) for share in shares]
    left = sum(counts) - sum(size * length for size, length in zip(sizes, lengths, strict=True))
    while left < 0 and max(lengths) > least:
        longest = lengths.index(max(lengths))
        lengths[longest] -= 1
        left += sizes[longest]
    while fitting := [at for at, size in enumerate(sizes) if size <= left and lengths[at] < limit]:
        # The one that was rounded down most goes first; of equals the longest.
        at = max(fitting, key=lambda each: (shares[each] - lengths[each], lengths[each]))
        lengths[at] += 1
        left -= sizes[at]
    result = list(counts)
    for heads, length in zip(groups, lengths, strict=True):
        for head in heads:
            result[head] = length
    return result, left


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
