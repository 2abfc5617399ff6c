"""How much each layer keeps, where no profile says it: pure functions on keep ratios and counts.

The search itself is threshold.py; here are the shapes that other papers use instead of it, and the floor under either.
All fractions are *kept*.
"""

from __future__ import annotations

from collections.abc import Sequence


def raise_to_floor(ratios: Sequence[float], budget: float, floor: float) -> list[float]:
    """Keep ratios of which a share is handed out equally: `floor * budget + (1 - floor) * ratio`.

    One number does for a least length of each layer (`floor * budget` of the tokens), for a cap, and for a temperature
    between searched lengths (0) and uniform ones (1). The mean stays the budget, and lengths that were nested over the
    budgets stay nested, which clipping and handing out again does not promise.

    Args:
        ratios: keep ratio of each layer, whose mean is the budget.
        budget: in (0, 1].
        floor: in [0, 1].
    """
    return [floor * budget + (1.0 - floor) * ratio for ratio in ratios]


def raise_counts_to_floor(counts: Sequence[int], floor: float) -> list[int]:
    """The same on the whole numbers of one prompt: the total stays, the largest remainders are rounded up.

    Args:
        counts: pairs that each layer keeps.
        floor: in [0, 1].
    """
    if floor == 0.0 or not counts:
        return list(counts)
    total = sum(counts)
    shares = [floor * total / len(counts) + (1.0 - floor) * count for count in counts]
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
