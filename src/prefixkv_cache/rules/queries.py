"""Which queries of a prompt count for the importance of its keys.

A pure step before importance.py, which takes what these functions return as `picks`.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Picks: TypeAlias = "slice | Tensor | None"
"""Queries by column: a slice, or int64 [batch or 1, m] (-1: none), or None: all valid ones."""


def last_queries(n_queries: int, window: int, valid: Tensor | None = None) -> slice | Tensor:
    """The observation window of SnapKV (arXiv 2404.14469): each row's last `window` valid queries.

    Args:
        n_queries: number of queries.
        window: how many count, at least 1; all valid ones of a row that has fewer.
        valid: bool [batch, n_queries], False at padding. None: no padding.

    Returns:
        A slice where it is the same for all rows, else int64 [batch, at most window], rising; -1 leads in a row with
        fewer valid queries.
    """
    window = min(window, n_queries)
    if valid is None or bool(valid[:, n_queries - window :].all()):
        return slice(n_queries - window, n_queries)
    columns = torch.arange(n_queries, device=valid.device)
    return torch.where(valid, columns, -1).topk(window, dim=1).values.flip(1)


def even_queries(n_queries: int, number: int, valid: Tensor | None = None) -> slice | Tensor:
    """`number` queries of each row, evenly spaced over its valid ones, the last of them included.

    Of N valid queries those numbered `floor((i + 1) * N / number) - 1` from 0, for i below `number`; all if N is at
    most `number`.

    Args:
        n_queries: number of queries.
        number: how many count, at least 1.
        valid: bool [batch, n_queries], False at padding. None: no padding.

    Returns:
        A slice where all count, else int64 [batch, at most number] ([1, number] without padding), rising; -1 follows
        in a row with fewer valid queries.
    """
    if valid is None:
        if n_queries <= number:
            return slice(0, n_queries)
        return ((torch.arange(number) + 1) * n_queries // number - 1)[None]
    total = valid.sum(1, keepdim=True)
    step = torch.arange(min(number, n_queries), device=valid.device)[None]
    place = torch.where(total <= number, step, (step + 1) * total // number - 1)
    # A stable sort puts a row's valid columns first, in order.
    columns = (~valid).to(torch.uint8).argsort(dim=1, stable=True).gather(1, place.clamp_max(n_queries - 1))
    return columns.masked_fill_(place >= total, -1)
