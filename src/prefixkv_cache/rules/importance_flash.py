"""Importance of all queries at less than the price of the attention call itself: from its log-sum-exp.

Flash attention kernels compute, beside their output, the logarithm of each query's softmax denominator, and PyTorch's
`scaled_dot_product_attention` throws it away. `CaughtLogSumExp` catches it while the model's own backend runs, and
`column_sums` needs one pass over the scores then, exp(q k - lse), with no softmax of its own: no maximum, no sum over
the row, and nothing behind the causal diagonal. On a CPU the scores come in pieces that fit the caches; on a GPU a
Triton kernel keeps them in registers (importance_triton.py). Whatever these do not cover is left to importance.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_LOWEST = -70.0
"""Weights below e^-70 are lost in any float32 sum; smaller ones would be denormal numbers, a hundred times as slow."""
_PIECE = 2**19
"""Scores in one piece, float32: 2 MiB, what a core's cache holds (docs/performance.md has the measurements)."""
_QUERIES = 128
"""Queries, over a group's heads, in one piece."""

_NAMES = {
    "_scaled_dot_product_flash_attention_for_cpu": None,
    "_scaled_dot_product_flash_attention": None,
    "_scaled_dot_product_efficient_attention": 4,
    "_scaled_dot_product_cudnn_attention": 4,
}
_KERNELS = {
    getattr(torch.ops.aten, name).default: asked for name, asked in _NAMES.items() if hasattr(torch.ops.aten, name)
}
"""Kernels that know the log-sum-exp; where it has to be asked for, the argument that does."""


class CaughtLogSumExp(TorchDispatchMode):
    """While this is entered, the log-sum-exp of the attention kernel that runs is kept; its output is untouched.

    Attributes:
        found: float32 [batch, query_heads, n_queries], or None: no such kernel ran, or more than one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Tensor | None = None
        self._calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in _KERNELS:
            return func(*args, **(kwargs or {}))
        asked = _KERNELS[func]
        if asked is not None and len(args) > asked:
            args = (*args[:asked], True, *args[asked + 1 :])
        result = func(*args, **(kwargs or {}))
        self._calls += 1
        self.found = None
        lse, n_queries = result[1], args[0].shape[2]
        if self._calls == 1 and lse.ndim >= 3 and lse.shape[2] >= n_queries:
            self.found = lse.reshape(*lse.shape[:2], -1)[..., :n_queries]  # some kernels round the length up
        return result


def column_sums(
    query: Tensor, key: Tensor, log_sum_exp: Tensor, *, mask: Tensor | None, counts: Tensor | None, scaling: float
) -> Tensor:
    """Attention that each key receives: the sum of exp(score - lse) over the queries that count and the group's heads.

    Args:
        query: [batch, query_heads, n_queries, head_dim]; the queries are the last of the keys.
        key: [batch, kv_heads, n_keys, head_dim].
        log_sum_exp: float32 [batch, query_heads, n_queries], natural logarithm.
        mask: None: causal, aligned at the last key; bool (True: visible) or additive [batch or 1, heads or 1,
            n_queries, n_keys].
        counts: bool [batch, n_queries], whose attention counts; None: everybody's.
        scaling: factor on the scores.

    Returns:
        float32 [batch, kv_heads, n_keys].
    """
    # A query that sees nothing, or does not count, gets a denominator that leaves nothing of its weights.
    lse = torch.where(log_sum_exp.isfinite(), log_sum_exp.float(), torch.inf)
    if counts is not None:
        lse = lse.masked_fill(~counts[:, None], torch.inf)
    kernel = _triton_kernel() if query.is_cuda else None
    return (kernel or _column_sums)(query, key, lse, mask, scaling)


@functools.cache
def _triton_kernel() -> Callable[..., Tensor] | None:
    try:
        from .importance_triton import column_sums as kernel
    except ImportError:  # CPU builds of torch, and those for some systems, come without triton
        return None
    return kernel


def _column_sums(query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """In pieces of some queries of one group and some keys, each computed in one buffer."""
    batch, kv_heads, n_keys, _ = key.shape
    n_queries = query.shape[2]
    group = query.shape[1] // kv_heads
    total = torch.zeros(batch, kv_heads, n_keys, device=key.device)
    step = max(1, _QUERIES // group) if not key.is_cuda else 1024
    width = max(256, (_PIECE if not key.is_cuda else 2**25) // (group * step))
    buffer = torch.empty(group * step * min(width, n_keys), device=key.device)
    # Query i is the key number ahead + i, and sees all up to itself.
    ahead = n_keys - n_queries
    later = torch.ones(step, step, dtype=torch.bool, device=key.device).triu_(1)
    for row in range(batch):
        for head in range(kv_heads):
            heads = slice(head * group, (head + 1) * group)
            for start in range(0, n_queries, step):
                span = slice(start, min(start + step, n_queries))
                n = span.stop - start
                queries = query[row, heads, span].float().reshape(group * n, -1)
                below = lse[row, heads, span].reshape(group * n, 1).neg()
                seen = n_keys if mask is not None else ahead + span.stop
                for first in range(0, seen, width):
                    some = slice(first, min(first + width, seen))
                    scores = buffer[: group * n * (some.stop - first)].view(group * n, -1)
                    keys = key[row, head, some].float()
                    torch.addmm(below.expand_as(scores), queries, keys.T, alpha=scaling, out=scores)
                    of_heads = scores.view(group, n, -1)
                    if mask is not None:
                        _hide(of_heads, mask[row if mask.shape[0] > 1 else 0], heads, span, some)
                    elif some.stop > ahead + start:  # the diagonal
                        _hide_later(of_heads, later[:n, :n], ahead + start - first)
                    scores.clamp_min_(_LOWEST).exp_()
                    total[row, head, some] += scores.sum(0)
    return total


def _hide(scores: Tensor, mask: Tensor, heads: slice, span: slice, some: slice) -> None:
    piece = mask[heads if mask.shape[0] > 1 else slice(None), span, some]
    if piece.dtype == torch.bool:
        scores.masked_fill_(~piece, -torch.inf)
    else:
        scores.add_(piece)


def _hide_later(scores: Tensor, later: Tensor, at: int) -> None:
    """Hide what lies behind the diagonal, which starts at column `at` of these scores (before them, if negative)."""
    n = min(later.shape[1], scores.shape[2] - at)
    scores[:, :, max(at, 0) :].masked_fill_(later[:, max(-at, 0) : n], -torch.inf)


def covers(
    mask: Any, log_sum_exp: Tensor | None, softcap: float | None, sink_logits: Tensor | None, query: Tensor
) -> bool:
    """Whether `column_sums` can do this call."""
    if log_sum_exp is None or softcap is not None or sink_logits is not None:
        return False
    readable = mask is None or (isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == query.shape[2])
    return readable and log_sum_exp.shape == query.shape[:3]


def believable(sums: Tensor, n_queries: int, query_heads: int, counts: Tensor | None) -> bool:
    """Whether every query's attention sums to one: a check on kernels whose log-sum-exp may mean something else."""
    expected = query_heads * (n_queries if counts is None else counts.sum(1).clamp_min(1))
    found = sums.sum((1, 2))
    return bool(((found / expected - 1).abs() < 0.05).all()) and math.isfinite(float(found.sum()))
