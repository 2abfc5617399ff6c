"""Which keys of a layer stay: importance and a count for each row -> kept columns, rising.

A pure function between the lengths (profile.py or threshold.py) and the layer that gathers what is kept.
Ranking is by one order for all counts, so a larger count keeps a superset (law 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_keys(
    importance: Tensor | None,
    counts: Sequence[int],
    *,
    real: Tensor | None = None,
    sink: int = 0,
    n_keys: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The `counts[b]` keys of row b to keep: the protected ones, then by falling importance, ties to the lower column.

    Protected are the first `sink` real keys of a row and its last real key.

    Args:
        importance: float32 [batch, n_keys], or None where every real key stays (then `n_keys` and `device` are given).
        counts: how many keys each row keeps, at most its real keys.
        real: bool [batch, n_keys], False at padding, which is never kept. None: no padding.
        sink: number of leading real keys that are never pruned.
        n_keys: number of keys, asked for only where `importance` is None.
        device: of the result, likewise.

    Returns:
        int64 [batch, max(counts)]: kept columns, rising in each row; -1 fills the rows that keep fewer.
    """
    batch = len(counts)
    if importance is not None:
        n_keys, device = importance.shape[1], importance.device
    if n_keys is None:
        raise ValueError("select_keys needs the importance or n_keys")
    columns = torch.arange(n_keys, device=device)
    if importance is None:
        kept = torch.ones(batch, n_keys, dtype=torch.bool, device=device) if real is None else real
    else:
        rank = _rank(importance, real, sink)
        limit = torch.tensor(list(counts), device=device)
        kept = rank < limit[:, None]
    # Columns that stay come first, rising; the others are all n_keys, behind them.
    width = max(counts, default=0)
    chosen = torch.where(kept, columns, n_keys).sort(dim=1).values[:, :width]
    return chosen.masked_fill_(chosen == n_keys, -1)


def _rank(importance: Tensor, real: Tensor | None, sink: int) -> Tensor:
    """int64 [batch, n_keys]: 0 for the first to be kept. Protected keys lead, padding comes last."""
    n_keys = importance.shape[1]
    # A key that is not a number (an overflow in the model) must not push out the ones that are.
    score = importance.float().nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max)
    if real is None:
        real = torch.ones_like(importance, dtype=torch.bool)
    order = real.cumsum(1)
    protected = real & ((order <= sink) | (order == order[:, -1:]))
    score = score.masked_fill(protected, torch.inf).masked_fill(~real, -torch.inf)
    by_score = score.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(n_keys, device=score.device).expand_as(by_score)
    return torch.empty_like(by_score).scatter_(1, by_score, places)
