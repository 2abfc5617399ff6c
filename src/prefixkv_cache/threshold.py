"""One threshold on cumulative attention mass for all layers, and the lengths that follow from it.

The search of PrefixKV (arXiv 2412.03409, section 3.3): each layer keeps the shortest prefix of its sorted
importance whose mass reaches p, and p is as large as the budget allows. Pure functions on importance alone;
used by the calibrator, and by the cache when it has no profile.
"""

from __future__ import annotations

import torch
from torch import Tensor


def search_threshold(importance: Tensor, budget: float, *, sink: int = 1) -> tuple[float, Tensor]:
    """Lengths of all layers for one prompt, by binary search for the largest threshold that fits the budget.

    The mass that a layer reaches is a step function of its length, so only the `n_layers * n_keys` values of the
    cumulative masses can be the answer. The search runs over those, sorted: it ends after log2 of their number,
    whatever the input. Pairs still free after that (the next step would be one too many) go one by one to the layer
    whose next key has most mass, ties to the lower layer.

    Args:
        importance: [n_layers, n_keys], not negative; a layer need not sum to 1. A layer without any mass counts as
            uniform.
        budget: fraction of all `n_layers * n_keys` pairs that is kept, in (0, 1].
        sink: each layer keeps at least `sink + 1` keys (or all of them where there are fewer).

    Returns:
        (threshold, counts): the mass that every layer reaches, in [0, 1] (0.0 where the least lengths alone use up
        the budget), and int64 [n_layers], whose total is `round(budget * n_layers * n_keys)`, or the total of the
        least lengths where that is more.

    Raises:
        ValueError: importance that is not a matrix with at least one layer and one key, holds nan, inf or negative
            numbers; a budget outside (0, 1].
    """
    mass = _sorted_mass(importance, budget)
    n_layers, n_keys = mass.shape
    least = max(0, min(sink + 1, n_keys))
    target = max(round(budget * n_layers * n_keys), n_layers * least)
    cumulative = mass.cumsum(1)
    # Exactly 1 where a layer's mass is complete, whatever the rounding of its sum.
    cumulative = cumulative / cumulative[:, -1:]

    candidates = cumulative.flatten().sort().values
    low, high = -1, candidates.numel() - 1  # candidates[low] fits (-1: no threshold at all), above high none does
    while low < high:
        middle = (low + high + 1) // 2
        if int(_prefix_lengths(cumulative, candidates[middle], least).sum()) <= target:
            low = middle
        else:
            high = middle - 1
    threshold = float(candidates[low]) if low >= 0 else 0.0
    counts = (
        _prefix_lengths(cumulative, candidates[low], least)
        if low >= 0
        else torch.full((n_layers,), least, dtype=torch.int64)
    )
    return threshold, _spend(mass, counts, target)


def _sorted_mass(importance: Tensor, budget: float) -> Tensor:
    """float64 [n_layers, n_keys] on the CPU: falling in each layer, each layer's sum 1. Checks the input."""
    if not 0.0 < float(budget) <= 1.0:
        raise ValueError(f"budget is the fraction of the KV pairs to keep, in (0, 1]; got {budget!r}")
    if importance.ndim != 2 or 0 in importance.shape:
        raise ValueError(f"importance must be [n_layers, n_keys], both at least 1; got {list(importance.shape)}")
    mass = importance.detach().to(device="cpu", dtype=torch.float64)
    if not bool(torch.isfinite(mass).all()) or bool((mass < 0).any()):
        raise ValueError("importance must be finite and not negative; got nan, inf or a number below 0")
    # Divided by the peak first, so that the sum of huge numbers stays finite.
    peak = mass.amax(1, keepdim=True)
    mass = torch.where(peak > 0, mass / peak, 1.0)
    mass = mass / mass.sum(1, keepdim=True)
    return mass.sort(dim=1, descending=True).values


def _prefix_lengths(cumulative: Tensor, threshold: Tensor, least: int) -> Tensor:
    """int64 [n_layers]: length of the shortest prefix that reaches the threshold, at least `least`."""
    return ((cumulative < threshold).sum(1) + 1).clamp_(min=least, max=cumulative.shape[1])


def _spend(mass: Tensor, counts: Tensor, target: int) -> Tensor:
    """Give the pairs that are still free to the heaviest keys not yet kept, ties to the lower layer."""
    free = target - int(counts.sum())
    if free <= 0:
        return counts
    # Within a layer masses fall, so taking the heaviest remaining keys overall always takes them in order.
    beyond = torch.arange(mass.shape[1]) >= counts[:, None]
    heaviest = mass.masked_fill(~beyond, -1.0).flatten().argsort(descending=True, stable=True)[:free]
    return counts + torch.bincount(heaviest // mass.shape[1], minlength=mass.shape[0])
