"""How much each layer keeps: pure functions on keep ratios and counts.

Lengths come from a profile (profile.py) or from the search (threshold.py); here are the shapes that other papers use
instead, and what is done to either: a floor and a cap for each layer, and a temperature between these lengths and
uniform ones. Clips come first and the temperature after them; as uniform lengths lie within the clips, so does the
mixture. All fractions are *kept*.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from .scoring import check_fraction, to_float


def check_clips(floor: Any, cap: Any) -> tuple[float, float | None]:
    """Both as floats; a TypeError or ValueError that names the one which no lengths can keep to.

    Args:
        floor: share of the budget that each layer keeps at least, in [0, 1].
        cap: how many times the budget each layer keeps at most, 1 or more; None: all of the prompt.
    """
    meaning = "cap must be a number of at least 1, how many times the budget a layer may keep, or None for no cap"
    floor = check_fraction("floor", floor)
    if cap is None:
        return floor, None
    if not isinstance(cap, numbers.Real) or isinstance(cap, bool):
        raise TypeError(f"{meaning}; got {cap!r}")
    number = to_float(cap)
    if not 1.0 <= number < math.inf:
        raise ValueError(f"{meaning}; got {cap!r}")
    return floor, number


def clip_ratios(
    source: Callable[[float], Sequence[float]], budget: float, floor: float = 0.0, cap: float | None = None
) -> list[float]:
    """Keep ratios between `floor * budget` and `cap * budget`, whose mean is the budget.

    What a cap frees, or a floor takes, is not handed out by a rule of its own. The source is read at another budget
    instead: the one, found by bisection, at which the clipped ratios add up. So more budget still gives no layer less,
    where the source's own ratios rise: with b the budget and r the source's ratio at any fixed place, `clip(r, floor *
    b, min(1, cap * b)) / b` falls or stays as b rises, so the sum over the layers rises no faster than b. At a larger
    budget the ratios of the same place add up to no more than they may, the place moves up or stays, and both clips
    rise. Two places that add up to the same give the same ratios.

    Args:
        source: gives the keep ratio of each layer at a budget in (0, 1], continuous in it, 1 for each layer at 1.
        budget: mean of the result, in (0, 1].
        floor: in [0, 1]. 0: none.
        cap: 1 or more. None: none, all of the prompt.

    Returns:
        The source's ratios as they are where there is neither floor nor cap. Else the mean is the budget, also where
        that of the source is a little off.
    """
    if floor == 0.0 and cap is None:
        return list(source(budget))
    lowest, highest = floor * budget, 1.0 if cap is None else min(1.0, cap * budget)

    def clipped(place: float) -> list[float]:
        return [min(max(ratio, lowest), highest) for ratio in source(place)]

    found = clipped(budget)
    total = budget * len(found)
    if abs(math.fsum(found) - total) < 1e-12:  # as without clips, to the last bit
        return found
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if math.fsum(clipped(middle)) < total:
            low = middle
        else:
            high = middle
    return clipped(high)


def temper_ratios(ratios: Sequence[float], budget: float, temperature: float) -> list[float]:
    """Keep ratios between those given (0) and uniform ones (1): `temperature * budget + (1 - temperature) * ratio`.

    The mean stays the budget, and ratios that were nested over the budgets stay nested.

    Args:
        ratios: keep ratio of each layer, whose mean is the budget.
        budget: in (0, 1].
        temperature: in [0, 1].
    """
    return [temperature * budget + (1.0 - temperature) * ratio for ratio in ratios]


def temper_counts(counts: Sequence[int], temperature: float) -> list[int]:
    """The same on the whole numbers of one prompt: the total stays, the largest remainders are rounded up.

    Args:
        counts: pairs that each layer keeps.
        temperature: in [0, 1].
    """
    if temperature == 0.0 or not counts:
        return list(counts)
    total = sum(counts)
    shares = [temperature * total / len(counts) + (1.0 - temperature) * count for count in counts]
    whole = [int(share) for share in shares]
    # Of equal remainders, the lower layer goes first.
    by_remainder = sorted(range(len(counts)), key=lambda layer: (whole[layer] - shares[layer], layer))
    for layer in by_remainder[: total - sum(whole)]:
        whole[layer] += 1
    return whole


def pyramid_ratios(budget: float, n_layers: int, steepness: float = 20.0) -> list[float]:
    """Keep ratios that fall from the first layer to the last along a line: PyramidKV (arXiv 2406.02069, section 4).

    The last layer keeps `budget / steepness`, the first so much that the mean is the budget. Where that is more than
    all, the line is made as flat as it takes.

    Args:
        budget: mean of the keep ratios, in (0, 1].
        n_layers: number of layers.
        steepness: the paper's beta, at least 1 (1: uniform).
    """
    if n_layers == 1:
        return [budget]
    reach = min(budget - budget / steepness, 1.0 - budget)
    return [budget + reach * (1.0 - 2.0 * layer / (n_layers - 1)) for layer in range(n_layers)]


def dithered_count(ratio: float, length: int, place: int, n_layers: int, sink: int) -> int:
    """Pairs that a layer keeps of a prompt, rounded so that layers of one ratio keep the right number together.

    `floor(ratio * length + (place + 1/2) / n_layers)`: by Hermite's identity the sum over the layers is the nearest
    whole number to `n_layers * ratio * length`, where rounding each layer by itself would move all of them the same
    way. More budget still never gives a layer less.

    Args:
        ratio: keep ratio.
        length: tokens of the prompt.
        place: of the layer among those that are pruned, from 0.
        n_layers: how many these are.
        sink: at least `sink + 1` pairs are kept, at most all.
    """
    return min(length, max(sink + 1, int(ratio * length + (place + 0.5) / n_layers)))
