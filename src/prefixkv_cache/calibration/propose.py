"""Proposals: lengths for each layer or key head, from what was found in samples. Pure functions on tensors.

`mass` is the paper's search on scores, `reconstruction` one pool of how much attention each key gets when the context
is repeated (KVzip), `loss` the cheapest lengths by what each layer or head costs when it alone is pruned. What they
cost together is measured elsewhere (measure.py): no criterion is trusted unmeasured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..rules.lengths import pool_counts
from ..rules.threshold import search_lengths

CRITERIA = ("mass", "reconstruction", "loss")
UNITS = ("layer", "head")
LOSS_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
"""Keep ratios at which a layer, or a head, alone is measured. Keeping everything costs nothing."""
BLENDS = (0.0, 0.25, 0.5)
"""Shares of uniform lengths that every proposal is also tried with."""


def mass_counts(scores: Tensor, budgets: Sequence[float], sink: int) -> Tensor:
    """Lengths by one threshold on cumulative score (PrefixKV, arXiv 2412.03409, section 3.3).

    Args:
        scores: float32 [n_layers, n_heads, n_keys], n_heads = 1 for a length a layer.
        budgets: fractions kept.
        sink: each keeps at least `sink + 1`.

    Returns:
        int64 [n_budgets, n_layers, n_heads].
    """
    counts = search_lengths(scores.flatten(0, 1), budgets, sink=sink)
    return counts.view(len(budgets), *scores.shape[:2])


def reconstruction_counts(scores: Tensor, budgets: Sequence[float], sink: int, unit: str) -> Tensor:
    """Lengths by one pool of reconstruction scores over all layers and heads (KVzip, arXiv 2505.23416, section 3.3).

    Args:
        scores: float32 [n_layers, n_heads, n_keys].
        budgets: fractions kept.
        sink: each head keeps at least `sink + 1`.
        unit: `"head"`, or `"layer"` for the mean over the heads of a layer.

    Returns:
        float64 [n_budgets, n_layers, n_heads or 1], in pairs.
    """
    totals = [round(budget * scores.numel()) for budget in budgets]
    counts = torch.stack([pool_counts(scores, total, sink + 1) for total in totals]).double()
    return counts if unit == "head" else counts.mean(2, keepdim=True)


def loss_ratios(costs: Tensor, budgets: Sequence[float], ratios: Sequence[float] = LOSS_RATIOS) -> Tensor:
    """The lengths whose costs, taken as independent, add up to the least at each budget.

    Greedy on the lower convex hull of each unit's cost: budget goes first where a pair more saves most. Segments that
    save equally grow together. Rising budgets give no unit less.

    Args:
        costs: float64 [n_ratios, n_layers, n_heads]: what each one costs when it alone keeps so much; 0 at ratio 1.
        budgets: fractions kept.
        ratios: rising, in (0, 1).

    Returns:
        float64 [n_budgets, n_layers, n_heads] keep ratios whose mean is the budget; uniform up to the least ratio.
    """
    shape = costs.shape[1:]
    hulls = [_hull([*zip(ratios, column, strict=True), (1.0, 0.0)]) for column in costs.flatten(1).T.tolist()]
    steps: dict[float, list[tuple[int, float]]] = {}
    for unit, hull in enumerate(hulls):
        for (low, cost), (high, lower) in pairwise(hull):
            steps.setdefault((lower - cost) / (high - low), []).append((unit, high - low))
    rows = [_spend(budget, len(hulls), ratios[0], steps) for budget in budgets]
    return torch.tensor(rows, dtype=torch.float64).view(len(budgets), *shape)


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points with rising first coordinate."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _above(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether the middle point lies on the line from left to right, or above it."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])


def _spend(budget: float, n_units: int, least: float, steps: dict[float, list[tuple[int, float]]]) -> list[float]:
    """Keep ratios of the units at one budget; `steps` are (unit, width) by slope, the steepest first to be taken."""
    if budget <= least:
        return [budget] * n_units
    kept, free = [least] * n_units, (budget - least) * n_units
    for slope in sorted(steps):
        widths = math.fsum(width for _, width in steps[slope])
        share = min(1.0, max(0.0, free / widths))
        for unit, width in steps[slope]:
            kept[unit] += share * width
        free -= share * widths
    return [min(1.0, ratio) for ratio in kept]


def blend(keep: Tensor, budgets: Sequence[float], strength: float) -> Tensor:
    """Keep ratios [n_budgets, n_layers, n_heads] between these (0) and uniform ones (1); the means stay."""
    uniform = torch.tensor(list(budgets), dtype=keep.dtype).view(-1, 1, 1)
    return keep + strength * (uniform - keep)


def blends(name: str, keep: Tensor, budgets: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
    """A proposal as it is, and blended with uniform lengths; each with its name."""
    for strength in BLENDS:
        yield (f"{name} {strength:g} uniform" if strength else name), blend(keep, budgets, strength)
