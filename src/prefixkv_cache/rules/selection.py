"""Which keys of a layer stay: scores and a count for each row -> kept columns, rising.

A pure function between the lengths (lengths.py or threshold.py) and the layer that gathers what is kept.
Ranking is by one order for all counts, so a larger count keeps a superset (law 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 1e30


def select_keys(
    scores: Tensor | None,
    counts: Sequence[int],
    *,
    valid: Tensor | None = None,
    sink: int = 0,
    recent: int | Sequence[int] = 1,
    protected: Tensor | None = None,
    n_keys: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The `counts[b]` keys of row b to keep: the protected ones, then by falling score, ties to the lower column.

    Protected are the first `sink` valid keys of a row and its last one, then its other `recent` ones, newest first,
    then those marked as `protected` by falling score: in this order where there is no space for all.

    Args:
        scores: float32 [batch, 1 or kv_heads, n_keys], or None where every valid key stays (then `n_keys` and `device`
            are given). Where heads have scores of their own, each keeps keys of its own.
        counts: how many keys each row keeps, at most its valid keys.
        valid: bool [batch, n_keys], False at padding, which is never kept. None: no padding.
        sink: number of leading valid keys that are never pruned.
        recent: number of last valid keys that are never pruned, for all rows or for each.
        protected: bool [batch, n_keys], more keys that go before the others. None: no more.
        n_keys: number of keys, asked for only where `scores` is None.
        device: of the result, likewise.

    Returns:
        int64 [batch, 1 or kv_heads, max(counts)]: kept columns, rising in each row; -1 fills the rows that keep fewer.
    """
    batch = len(counts)
    if scores is not None:
        n_keys, device = scores.shape[-1], scores.device
    if n_keys is None:
        raise ValueError("select_keys needs the scores or n_keys")
    width = max(counts, default=0)
    if scores is None:
        chosen = torch.arange(n_keys, device=device).expand(batch, 1, -1)
        chosen = chosen if valid is None else torch.where(valid[:, None], chosen, n_keys)
    else:
        recents = recent if isinstance(recent, Sequence) else [recent] * batch
        chosen = _order(scores, valid, sink, recents, protected)[..., :width]
        if min(counts, default=0) < width:
            limit = torch.tensor(list(counts), device=device)[:, None, None]
            chosen = chosen.masked_fill(torch.arange(width, device=device) >= limit, n_keys)
    # What fills shorter rows is n_keys so far, and so comes last.
    chosen = chosen.sort(dim=-1).values[..., :width]
    return chosen.masked_fill_(chosen == n_keys, -1)


def _order(scores: Tensor, valid: Tensor | None, sink: int, recent: Sequence[int], protected: Tensor | None) -> Tensor:
    """int64 [batch, heads, n_keys]: columns, the first to be kept first. Protected keys lead, padding comes last."""
    batch, _, n_keys = scores.shape
    # A key that is not a number (an overflow in the model) must not push out the ones that are.
    scores = scores.float().nan_to_num(nan=0.0, posinf=_LARGE / 10).clamp_max(_LARGE / 10)
    if valid is None:
        valid = torch.ones(batch, n_keys, dtype=torch.bool, device=scores.device)
    order = valid.cumsum(1)
    last = order[:, -1:]
    if protected is not None:
        by_rank = places(scores.argsort(dim=-1, descending=True, stable=True)).to(scores.dtype)
        scores = torch.where(protected[:, None], _LARGE * (2.0 - by_rank / n_keys), scores)
    newest = order > last - torch.tensor(list(recent), device=scores.device)[:, None]
    scores = torch.where(newest[:, None], (_LARGE * (4.0 + order / n_keys))[:, None], scores)
    ends = valid & ((order <= sink) | (order == last))
    scores = scores.masked_fill(ends[:, None], torch.inf).masked_fill(~valid[:, None], -torch.inf)
    return scores.argsort(dim=-1, descending=True, stable=True)


def places(order: Tensor) -> Tensor:
    """The rank of each column from the order of the columns: the inverse permutation along the last dimension."""
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)
