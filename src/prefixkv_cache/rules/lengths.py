"""How much each layer and each key head keeps: pure functions on keep ratios and counts.

Ratios come from a profile or from one of the shapes here; `prompt_count` makes whole pairs of them for a prompt.
`pool_counts` and the search (threshold.py) find counts from what the keys of one prompt scored. All fractions are
*kept*.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def fraction_of(tokens: float | int, n_tokens: int) -> float:
    """What is a fraction already, or a number of tokens, as a fraction of a row's valid tokens, in [0, 1]."""
    return tokens if isinstance(tokens, float) else min(1.0, tokens / max(1, n_tokens))


@lru_cache(maxsize=4096)
def prompt_count(ratio: float, n: int, sink: int = 1) -> int:
    """Pairs that a head keeps of a prompt: `N - round_half_even(N * (1 - keep))`.

    Never under `sink + 1` (the sink and the prompt's last token stay) nor over N.

    Args:
        ratio: keep ratio, in [0, 1].
        n: N, the prompt's valid tokens.
        sink: the first tokens, which are never pruned.
    """
    return min(n, max(sink + 1, n - round(n * (1 - ratio))))


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


def raise_to_floor(ratios: Tensor, floor: float) -> Tensor:
    """Keep ratios of which none is below `floor`, the mean unchanged: the others are scaled by one factor.

    Ratios that rise elsewhere never lower one here, so nested ratios stay nested.

    Args:
        ratios: float64 of any shape, in [0, 1].
        floor: least keep ratio. Where the mean is not above it, all become the mean.
    """
    if not ratios.numel() or float(ratios.min()) >= floor:
        return ratios
    mean = ratios.mean()
    if float(mean) <= floor:
        return mean.expand_as(ratios).clone()
    rising = ratios.flatten().sort().values
    # With the k lowest on the floor, the others together take what is left: the factor for each k.
    above = rising.flip(0).cumsum(0).flip(0)
    lowest = torch.arange(len(rising), dtype=rising.dtype, device=rising.device)
    factors = (rising.sum() - floor * lowest) / above
    # The first k whose next ratio stays above the floor; the largest ratio does, since the mean is above it.
    fits = factors * rising >= floor
    fits[-1] = True
    return (factors[fits.to(torch.int8).argmax()] * ratios).clamp(floor, 1.0)


def pool_counts(scores: Tensor, total: int, least: int) -> Tensor:
    """Counts from one pool of all heads' keys, of which the largest scores stay; ties: lower layer, head, column.

    Nested: a larger total never gives a head less.

    Args:
        scores: [n_layers, n_heads, n_keys], comparable between heads. nan counts as less than any number.
        total: pairs that all heads keep together, brought between the least and all.
        least: each head keeps so many at least (or all of them where there are fewer).

    Returns:
        int64 [n_layers, n_heads] on the device of the scores.
    """
    n_layers, n_heads, n_keys = scores.shape
    best = scores.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best = best.sort(dim=-1, descending=True).values.flatten(0, 1)
    least = min(least, n_keys)
    free = max(0, min(total, best.numel()) - least * len(best))
    first = best[:, least:].flatten().argsort(descending=True, stable=True)[:free]
    counts = torch.bincount(first // max(1, n_keys - least), minlength=len(best)) + least
    return counts.view(n_layers, n_heads)
