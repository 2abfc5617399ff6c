"""One threshold on cumulative attention mass for all layers, and the lengths that follow from it.

The search of PrefixKV (arXiv 2412.03409, section 3.3): each layer keeps the shortest prefix of its sorted
importance whose mass reaches p, and p is as large as the budget allows. Pure functions on importance alone;
used by the calibrator, for a grid of budgets at once, and by the cache when it has no profile. Which keys the lengths
mean is not decided here (selection.py).
"""

from __future__ import annotations

import numbers
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .lengths import check_clips


def search_threshold(
    importance: Tensor, budget: float, *, sink: int = 1, floor: float = 0.0, cap: float | None = None
) -> tuple[float, Tensor]:
    """Lengths of all layers for one prompt, from the largest threshold that fits the budget.

    The paper bisects p. Only the cumulative masses themselves can be the answer, so they are sorted, once, and the
    answer is read off: where the bisection would end if it ran for ever, on any input. Where the next step of the
    threshold would take more pairs than are free (layers that reach the same mass), the free ones go to the layers of
    that step whose next key has most mass; of equals, to the shorter layer, then to the lower. Lengths are so nested:
    a larger budget never gives any layer less.

    A floor and a cap clip these lengths. What they take and free is found by reading the search further down or up
    (`_Clipped`), so the total stays and lengths stay nested.

    Args:
        importance: [n_layers, n_keys], not negative; a layer need not sum to 1. A layer without any mass counts as
            uniform.
        budget: fraction of all `n_layers * n_keys` pairs that is kept, in (0, 1].
        sink: each layer keeps at least `sink + 1` keys (or all of them where there are fewer).
        floor: no layer keeps less than `floor` times the mean length, which the total makes, in [0, 1], to within one
            pair. 0: none.
        cap: no layer keeps more than `cap` times the mean length, 1 or more, to within `(cap + 1) / 2` pairs. None:
            none. The least length goes before the cap where both cannot be had.

    Returns:
        (threshold, counts): the mass p in [0, 1] that every layer reaches, save those that the cap stops, and int64
        [n_layers] on the CPU, whose total is `round(budget * n_layers * n_keys)`, or the total of the least lengths
        where that is more.

    Raises:
        TypeError: the importance is no tensor; the budget, the floor or the cap is not a number, or the sink not an
            integer.
        ValueError: importance that is not a matrix with at least one layer and one key, or holds nan, inf or negative
            numbers; a budget outside (0, 1]; a negative sink; a floor outside [0, 1]; a cap below 1.
    """
    _check_budget(budget)
    floor, cap = check_clips(floor, cap)
    search = _Search(importance, sink)
    if floor == 0.0 and cap is None:
        return search.at(budget)
    return _Clipped(search, floor, cap).at(budget)


def search_lengths(importance: Tensor, budgets: Sequence[float], *, sink: int = 1) -> Tensor:
    """The lengths that `search_threshold` gives at each of several budgets, for the price of one sorting.

    Args:
        importance: [n_layers, n_keys], as for `search_threshold`.
        budgets: fractions kept, each in (0, 1], in any order.
        sink: as for `search_threshold`.

    Returns:
        int64 [n_budgets, n_layers] on the CPU; where the budgets rise, no column falls.

    Raises:
        TypeError, ValueError: as `search_threshold`.
    """
    for budget in budgets:
        _check_budget(budget)
    search = _Search(importance, sink)
    counts = torch.empty(len(budgets), search.mass.shape[0], dtype=torch.int64)
    for row, budget in enumerate(budgets):
        counts[row] = search.at(budget)[1]
    return counts


def _check_budget(budget: float) -> None:
    meaning = "budget is the fraction of the KV pairs to keep, in (0, 1]"
    if not isinstance(budget, numbers.Real) or isinstance(budget, bool):
        raise TypeError(f"{meaning}; got {budget!r}, of type {type(budget).__name__}")
    if not 0.0 < budget <= 1.0:  # nan fails every comparison
        raise ValueError(f"{meaning}; got {budget!r}")


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
        meaning = "sink is how many first tokens are never pruned, 0 or more"
        if not isinstance(sink, numbers.Integral) or isinstance(sink, bool):
            raise TypeError(f"{meaning}; got {sink!r}, of type {type(sink).__name__}")
        if sink < 0:
            raise ValueError(f"{meaning}; got {sink!r}")
        self.mass = _sorted_mass(importance)
        self.n_layers, self.n_keys = self.mass.shape
        self.least = min(sink + 1, self.n_keys)
        cumulative = self.mass.cumsum(1)
        # Exactly 1 where a layer's mass is complete, whatever the rounding of its sum.
        cumulative /= cumulative[:, -1:].clone()
        self.before = torch.zeros_like(self.mass)
        self.before[:, 1:] = cumulative[:, :-1]
        self.before[:, : self.least] = -1.0
        self.thresholds = _sorted(self.before.flatten())

    def at(self, budget: float) -> tuple[float, Tensor]:
        """Threshold and counts for one budget."""
        target = self.target(budget)
        if target == self.thresholds.numel():
            return 1.0, torch.full((self.n_layers,), self.n_keys)
        # The first pair that does not fit: any higher threshold would take it, and those equal to it.
        threshold = self.thresholds[target]
        lower = torch.searchsorted(self.before, threshold.repeat(self.n_layers, 1)).flatten()
        return float(threshold), self._spend(lower, threshold, target - int(lower.sum()))

    def target(self, budget: float) -> int:
        """Pairs that all layers keep together."""
        return max(round(float(budget) * self.n_layers * self.n_keys), self.n_layers * self.least)

    def turns(self) -> Tensor:
        """int64 [n_layers, n_keys], rising in each layer: which pair of all enters first, second, ... from 0.

        With `total` pairs, a layer keeps those whose turn is below the total, as `at` gives it.
        """
        # By place first, and by layer in a place: the sort is stable, so this decides between equals, as in `_spend`.
        before, mass = self.before.T.flatten().numpy(), self.mass.T.flatten().numpy()
        turns = np.empty(len(mass), dtype=np.int64)
        turns[np.lexsort((-mass, before))] = np.arange(len(mass))
        return torch.from_numpy(turns).view(self.n_keys, self.n_layers).T.contiguous()

    def _spend(self, counts: Tensor, threshold: Tensor, free: int) -> Tensor:
        """Give the free pairs to the heaviest of those that the next step of the threshold would take together."""
        if free == 0:
            return counts
        # By place first, so that a stable sort prefers the shorter layer among equals, then the lower.
        place, layer = (self.before == threshold).T.nonzero(as_tuple=True)
        heaviest = self.mass[layer, place].argsort(descending=True, stable=True)[:free]
        return counts + torch.bincount(layer[heaviest], minlength=self.n_layers)


class _Clipped:
    """The search's lengths between a floor and a cap, in whole numbers.

    As `clip_ratios` (lengths.py) does with fractions: the search is read at the total, another than the one asked for,
    at which the clipped lengths add up. In whole numbers that alone is not nested: all layers on the floor would step
    up together, and some other layer would have to pay for it. So lengths are a path: a clock runs from the least total
    to the largest, at each tick floor, cap and the reading of the search are those of that total (as fractions, where
    the proof holds that the reading never falls), and each length is rounded to the nearest. No length on this path
    ever falls. The total that was asked for is read off it; where a tick takes several pairs at once and not all fit,
    they go by their turn in the search.

    Rounding moves the clock by up to half a pair a layer: hence one pair for the floor, `(cap + 1) / 2` for the cap.
    """

    def __init__(self, search: _Search, floor: float, cap: float | None):
        self.search, self.floor = search, floor
        self.cap = float(search.n_keys) if cap is None else cap
        self.turns = search.turns()
        self.totals = range(search.n_layers * search.least, search.n_layers * search.n_keys + 1)

    def at(self, budget: float) -> tuple[float, Tensor]:
        """Threshold and counts for one budget."""
        target = self.search.target(budget)
        tick = bisect_right(self.totals, target, key=lambda clock: int(self._lengths(clock).sum())) - 1
        clock = self.totals[tick]
        counts, reading = self._lengths(clock), self._reading(clock)
        threshold = float(self.search.thresholds[reading]) if reading < self.turns.numel() else 1.0
        if free := target - int(counts.sum()):
            counts = self._spend(counts, self._lengths(self.totals[tick + 1]), free)
        return threshold, counts

    def _lengths(self, clock: int) -> Tensor:
        low, high = self._clips(clock)
        return self._searched(self._reading(clock)).clamp(int(low + 0.5), int(high + 0.5))

    def _reading(self, clock: int) -> int:
        """The largest total of the search whose clipped lengths fit the clock's."""
        low, high = self._clips(clock)

        def clipped(total: int) -> float:
            return float(self._searched(total).double().clamp(low, high).sum())

        # What is equal may not hang on rounding: with a floor of 1 every total would be.
        return self.totals[bisect_right(self.totals, clock * (1 + 1e-12), key=clipped) - 1]

    def _clips(self, clock: int) -> tuple[float, float]:
        """Least and largest length, as fractions of a pair."""
        n_layers, least = self.search.n_layers, float(self.search.least)
        low, high = self.floor * clock / n_layers, self.cap * clock / n_layers
        return max(least, low), min(float(self.search.n_keys), max(least, high))

    def _searched(self, total: int) -> Tensor:
        """int64 [n_layers]: the lengths of the search for a total."""
        return torch.searchsorted(self.turns, self.turns.new_full((len(self.turns), 1), total)).flatten()

    def _spend(self, counts: Tensor, next_counts: Tensor, free: int) -> Tensor:
        """Give the free pairs to those of the next tick whose turn comes first."""
        place = torch.arange(self.search.n_keys)
        layer, column = ((place >= counts[:, None]) & (place < next_counts[:, None])).nonzero(as_tuple=True)
        first = self.turns[layer, column].argsort()[:free]
        return counts + torch.bincount(layer[first], minlength=len(counts))


def _sorted_mass(importance: Tensor) -> Tensor:
    """float64 [n_layers, n_keys] on the CPU: falling in each layer, each layer's sum 1. Checks the input."""
    if not isinstance(importance, Tensor):
        raise TypeError(f"importance must be a tensor [n_layers, n_keys]; got {type(importance).__name__}")
    if importance.ndim != 2 or 0 in importance.shape:
        raise ValueError(f"importance must be [n_layers, n_keys], both at least 1; got {list(importance.shape)}")
    importance = importance.detach().to("cpu")
    # Sorting in float32, where it came so, is half the work and the same order.
    mass = _sorted(importance if importance.dtype == torch.float32 else importance.double()).flip(1).double()
    if not bool(torch.isfinite(mass).all()) or bool((mass < 0).any()):
        raise ValueError("importance must be finite and not negative; got nan, inf or a number below 0")
    # Divided by the peak first, so that the sum of huge numbers stays finite.
    peak = mass[:, :1]
    mass = torch.where(peak > 0, mass / peak, 1.0)
    return mass / mass.sum(1, keepdim=True)


def _sorted(values: Tensor) -> Tensor:
    """Rising along the last dimension. numpy's sort of plain numbers is many times faster than torch's on a CPU."""
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))
