"""One threshold on cumulative attention mass for all layers, and the lengths that follow from it.

The search of PrefixKV (arXiv 2412.03409, section 3.3): each layer keeps the shortest prefix of its sorted
importance whose mass reaches p, and p is as large as the budget allows. Pure functions on importance alone;
used by the calibrator, for a grid of budgets at once, and by the cache when it has no profile. Which keys the lengths
mean is not decided here (selection.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_budget, check_integer


def search_threshold(importance: Tensor, budget: float | int, *, sink: int = 1) -> tuple[float, Tensor]:
    """Lengths of all layers for one prompt, from the largest threshold that fits the budget.

    The paper bisects p. Only the cumulative masses themselves can be the answer, so they are sorted, once, and the
    answer is read off: where the bisection would end if it ran for ever, on any input. Where the next step of the
    threshold would take more pairs than are free (layers that reach the same mass), the free ones go to the layers of
    that step whose next key has most mass; of equals, to the shorter layer, then to the lower. Lengths are so nested:
    a larger budget never gives any layer less.

    Args:
        importance: [n_layers, n_keys], not negative; a layer need not sum to 1. A layer without any mass counts as
            uniform.
        budget: fraction of all `n_layers * n_keys` pairs that is kept, in (0, 1], or an integer: so many pairs a layer
            on average.
        sink: each layer keeps at least `sink + 1` keys (or all of them where there are fewer).

    Returns:
        (threshold, counts): the mass p in [0, 1] that every layer reaches, and int64 [n_layers] on the CPU, whose total
        is `round(budget * n_layers * n_keys)`, or the total of the least lengths where that is more.

    Raises:
        TypeError: the importance is no tensor; the budget is not a number, or the sink not an integer.
        ValueError: importance that is not a matrix with at least one layer and one key, or holds nan, inf or negative
            numbers; a budget outside (0, 1] or an integer below 1; a negative sink.
    """
    budget = check_budget(budget)
    return _Search(importance, sink).at(budget)


def search_lengths(importance: Tensor, budgets: Sequence[float | int], *, sink: int = 1) -> Tensor:
    """The lengths that `search_threshold` gives at each of several budgets, for the price of one sorting.

    Args:
        importance: [n_layers, n_keys], as for `search_threshold`.
        budgets: as for `search_threshold`, in any order.
        sink: as for `search_threshold`.

    Returns:
        int64 [n_budgets, n_layers] on the CPU; where the budgets rise, no column falls.

    Raises:
        TypeError, ValueError: as `search_threshold`.
    """
    budgets = [check_budget(budget) for budget in budgets]
    search = _Search(importance, sink)
    counts = torch.empty(len(budgets), search.mass.shape[0], dtype=torch.int64)
    for row, budget in enumerate(budgets):
        counts[row] = search.at(budget)[1]
    return counts


class _Search:
    """What does not depend on the budget: done once, asked for many.

    A layer's next key enters when the threshold passes the mass that the keys before it have reached; the least lengths
    enter first of all.

    Attributes:
        mass: float64 [n_layers, n_keys], falling in each layer, each layer's sum 1.
        before: float64 [n_layers, n_keys], rising in each layer: the mass of the keys before each one, -1 for the least
            lengths.
        thresholds: float64 [n_layers * n_keys], the same numbers in rising order.
    """

    def __init__(self, importance: Tensor, sink: int):
        sink = check_integer("sink", sink, 0)
        self.mass = _sorted_mass(importance)
        self.n_layers, self.n_keys = self.mass.shape
        self.least = min(sink + 1, self.n_keys)
        cumulative = self.mass.cumsum(1)
        # Exactly 1 where a layer's mass is complete, whatever the rounding of its sum.
        cumulative /= cumulative[:, -1:].clone()
        self.before = torch.zeros_like(self.mass)
        self.before[:, 1:] = cumulative[:, :-1]
        self.before[:, : self.least] = -1.0
        self.thresholds = self.before.flatten().sort().values

    def at(self, budget: float | int) -> tuple[float, Tensor]:
        """Threshold and counts for one budget."""
        if isinstance(budget, int):
            budget = min(1.0, budget / self.n_keys)
        target = max(round(budget * self.n_layers * self.n_keys), self.n_layers * self.least)
        if target == self.thresholds.numel():
            return 1.0, torch.full((self.n_layers,), self.n_keys)
        # The first pair that does not fit: any higher threshold would take it, and those equal to it.
        threshold = self.thresholds[target]
        lower = torch.searchsorted(self.before, threshold.repeat(self.n_layers, 1)).flatten()
        return float(threshold), self._spend(lower, threshold, target - int(lower.sum()))

    def _spend(self, counts: Tensor, threshold: Tensor, free: int) -> Tensor:
        """Give the free pairs to the heaviest of those that the next step of the threshold would take together."""
        if free == 0:
            return counts
        # By place first, so that a stable sort prefers the shorter layer among equals, then the lower.
        place, layer = (self.before == threshold).T.nonzero(as_tuple=True)
        heaviest = self.mass[layer, place].argsort(descending=True, stable=True)[:free]
        return counts + torch.bincount(layer[heaviest], minlength=self.n_layers)


def _sorted_mass(importance: Tensor) -> Tensor:
    """float64 [n_layers, n_keys] on the CPU: falling in each layer, each layer's sum 1. Checks the input."""
    if not isinstance(importance, Tensor):
        raise TypeError(f"importance must be a tensor [n_layers, n_keys]; got {type(importance).__name__}")
    if importance.ndim != 2 or 0 in importance.shape:
        raise ValueError(f"importance must be [n_layers, n_keys], both at least 1; got {list(importance.shape)}")
    importance = importance.detach().to("cpu")
    # Sorting in float32, where it came so, is half the work and the same order.
    if importance.dtype != torch.float32:
        importance = importance.double()
    mass = importance.sort(dim=1, descending=True).values.double()
    if not bool(torch.isfinite(mass).all()) or bool((mass < 0).any()):
        raise ValueError("importance must be finite and not negative; got nan, inf or a number below 0")
    # Divided by the peak first, so that the sum of huge numbers stays finite.
    peak = mass[:, :1]
    mass = torch.where(peak > 0, mass / peak, 1.0)
    return mass / mass.sum(1, keepdim=True)
