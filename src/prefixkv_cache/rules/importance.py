"""How much attention each key of a layer receives from the queries that count.

First of the pure functions on the way of the data: (query, key, mask) of one layer -> importance
[batch, key heads, keys].
The attention itself has been computed by the model's own backend, which does not return its weights; this module
computes the weights again, a piece at a time, and keeps only their column sums. It knows nothing of caches or models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .importance_flash import believable, column_sums, covers
from .masks import BlockMaskReader, PickedMask
from .queries import Picks

Mask: TypeAlias = Tensor | BlockMaskReader | PickedMask | None

_NOTHING = 1e-24  # attention that counts as none: far below what a float32 softmax can tell from zero
DEFAULT_MAX_BYTES = 64 * 2**20
"""Ceiling for the temporaries of one call, all of them together."""
_CPU_BYTES = 16 * 2**20
"""On a CPU pieces that fit the caches are faster: 16 MiB took 0.9 to 1.1 times as long as the attention call, 64 MiB
1.1 to 1.5 times (8 heads of 128, 1k to 4k tokens, one thread; docs/notes.md)."""


@torch.no_grad()
def attention_importance(
    query: Tensor,
    key: Tensor,
    mask: Mask = None,
    *,
    picks: Picks = None,
    valid: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    log_sum_exp: Tensor | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Tensor:
    """Attention probability that each key receives, summed over the queries that count, by key head.

    The mean over the heads is, with all queries, the importance of PrefixKV (arXiv 2412.03409, section 3.2) and of
    Elastic Cache (arXiv 2407.18121, equation 4).

    Args:
        query: [batch, query_heads, n_queries, head_dim], as the attention function receives it.
        key: [batch, kv_heads, n_keys, head_dim]; kv_heads divides query_heads. The queries are the last of the keys.
        mask: as the backend receives it: None (causal, aligned at the last key), bool (True: visible) or additive
            float [batch or 1, heads or 1, n_queries, n_keys], or [batch, n_keys] (nonzero: visible, and causal).
            A flex attention mask comes behind a `BlockMaskReader`.
        picks: which queries count, see queries.py. None: all.
        valid: bool [batch, n_queries], False at padding, which never counts. None: no padding.
        scaling: factor on the scores; head_dim ** -0.5 when None.
        softcap: the scores pass `softcap * tanh(scores / softcap)` when given.
        sink_logits: [query_heads], a learned score that takes part in the softmax sinks the keys (gpt-oss).
        log_sum_exp: float32 [batch, query_heads, n_queries], the logarithm of each softmax's denominator, if the
            backend's kernel gave it: all queries are cheaper with it, see importance_flash.py.
        max_bytes: ceiling for all temporaries together.

    Returns:
        float32 [batch, kv_heads, n_keys], the mean over the query heads that share each key head; zero where no
        counting query sees the key.
    """
    factor = query.shape[3] ** -0.5 if scaling is None else scaling
    if isinstance(picks, slice) and picks == slice(0, query.shape[2]):
        picks = None
    if picks is None and covers(mask, log_sum_exp, softcap, sink_logits, query):
        assert log_sum_exp is not None and (mask is None or isinstance(mask, Tensor)), "covers() says so"
        total = column_sums(query, key, log_sum_exp, mask=mask, counts=valid, scaling=factor)
        if believable(total, query.shape[2], query.shape[1], valid):
            return _mean_of_group(total, query)
    total = torch.zeros(*key.shape[:3], dtype=torch.float32, device=key.device)
    work = _counting(query, mask, key.shape[2], picks, valid)
    _add_attention(total, key, work, factor, softcap, sink_logits, max_bytes)
    return _mean_of_group(total, query)


def _mean_of_group(total: Tensor, query: Tensor) -> Tensor:
    return total.masked_fill_(total < _NOTHING, 0.0).div_(query.shape[1] // total.shape[1])


class _Counting(NamedTuple):
    """The queries that count.

    Attributes:
        query: [batch, query_heads, n, head_dim].
        mask: at these queries.
        weight: bool [batch, n], False at a query that does not count after all; None: all do.
        causal_end: where only the causal rule hides keys beyond the mask, the number of keys that each query sees:
            int64 [n], or [batch, n].
    """

    query: Tensor
    mask: Mask
    weight: Tensor | None
    causal_end: Tensor | None


def _counting(query: Tensor, mask: Mask, n_keys: int, picks: Picks, valid: Tensor | None) -> _Counting:
    """Narrow query and mask to the queries that count."""
    batch, _, n_queries, _ = query.shape
    if isinstance(mask, Tensor) and mask.ndim == 4:
        mask = mask.expand(-1, -1, n_queries, -1)  # one row for all queries is a mask, too
    # Query i is the key number n_keys - n_queries + i, and sees all up to itself.
    causal_end = None
    if mask is None or mask.ndim == 2:
        causal_end = torch.arange(n_keys - n_queries + 1, n_keys + 1)
    if isinstance(picks, Tensor):
        # Rows end at different columns: each has queries of its own.
        picks = picks.to(query.device).expand(batch, -1)
        weight, picks = picks >= 0, picks.clamp_min(0)
        if valid is not None:
            weight = weight & valid.to(picks.device).gather(1, picks)
        if isinstance(mask, Tensor) and mask.ndim == 4:
            mask = PickedMask(mask, picks)
        elif isinstance(mask, BlockMaskReader):
            mask = mask.at_queries(picks)
        query = torch.take_along_dim(query, picks[:, None, :, None], dim=2)
        return _Counting(query, mask, weight, None if causal_end is None else causal_end.to(picks.device)[picks])
    span = slice(*(picks or slice(None)).indices(n_queries)[:2])
    if valid is not None and picks is None:
        # Queries before the first that counts in any row, or behind the last, need not be looked at.
        counting = valid.any(0).nonzero().flatten().tolist() or [0]
        span = slice(counting[0], counting[-1] + 1)
    weight = None if valid is None else valid[:, span].to(query.device)
    if span != slice(0, n_queries):
        if isinstance(mask, BlockMaskReader):
            mask = mask.at_queries(torch.arange(span.start, span.stop, device=query.device).expand(batch, -1))
        elif isinstance(mask, Tensor) and mask.ndim == 4:
            mask = mask[:, :, span]
    return _Counting(query[:, :, span], mask, weight, None if causal_end is None else causal_end[span])


def _add_attention(
    total: Tensor,
    key: Tensor,
    work: _Counting,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    max_bytes: int,
) -> None:
    """Add to `total` the attention of the counting queries, summed over each group's heads, piece by piece."""
    query, mask, weight, causal_end = work
    batch, kv_heads, n_keys, head_dim = key.shape
    group = query.shape[1] // kv_heads
    if key.device.type == "cpu":
        max_bytes = min(max_bytes, _CPU_BYTES)
    for rows, heads, spans in _pieces(batch, kv_heads, query.shape[2], group, n_keys, head_dim, max_bytes):
        piece_of_keys = key[rows, heads]
        if piece_of_keys.numel() <= max_bytes // 16:  # else even one head's keys are converted a block at a time
            piece_of_keys = piece_of_keys.float()
        sinks = None if sink_logits is None else sink_logits.view(kv_heads, group)[heads].float()
        for span in spans:
            # Under the plain causal mask no query of this span sees the keys behind its last query.
            seen = n_keys if causal_end is None else min(n_keys, int(causal_end[..., span].max()))
            scores = _scores(query[rows, :, span], piece_of_keys[:, :, :seen], heads, group, scaling, max_bytes)
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            _hide(scores, mask, causal_end, rows, heads, span, group)
            span_weight = None if weight is None else weight[rows, span]
            total[rows, heads, :seen] += _column_sums(scores, span_weight, sinks)


def _scores(query: Tensor, keys: Tensor, heads: slice, group: int, scaling: float, max_bytes: int) -> Tensor:
    """float32 scores [batch, kv_heads, group, n, n_keys]; the query heads of a group share the keys, uncopied."""
    batch, _, n, head_dim = query.shape
    kv_heads, n_keys = keys.shape[1], keys.shape[2]
    query = query[:, heads.start * group : heads.stop * group].float() * scaling
    query = query.reshape(batch, kv_heads, group * n, head_dim)
    if keys.dtype == torch.float32:
        return (query @ keys.transpose(-1, -2)).view(batch, kv_heads, group, n, n_keys)
    scores = query.new_empty(batch, kv_heads, group * n, n_keys)
    block = max(1, max_bytes // 16 // (batch * kv_heads * head_dim))
    for start in range(0, n_keys, block):
        some = slice(start, start + block)
        scores[..., some] = query @ keys[:, :, some].float().transpose(-1, -2)
    return scores.view(batch, kv_heads, group, n, n_keys)


def _hide(
    scores: Tensor,
    mask: Mask,
    causal_end: Tensor | None,
    rows: slice,
    heads: slice,
    span: slice,
    group: int,
) -> None:
    """Set the scores of keys that a query does not see to -inf, in place; an additive mask is added."""
    n_keys = scores.shape[-1]
    if causal_end is not None:
        end = causal_end[..., span].to(scores.device)
        end = end[rows, None, None, :, None] if end.ndim == 2 else end[:, None]
        scores.masked_fill_(torch.arange(n_keys, device=scores.device) >= end, -torch.inf)
    if mask is None:
        return
    if isinstance(mask, (BlockMaskReader, PickedMask)):
        piece = mask.piece(rows, span, n_keys)
    elif mask.ndim == 2:
        piece = mask[rows, None, None, :n_keys] != 0
    else:
        piece = mask[rows if mask.shape[0] > 1 else slice(None), :, span, :n_keys]
    if piece.shape[1] > 1:
        piece = piece[:, heads.start * group : heads.stop * group].unflatten(1, (-1, group))
    else:
        piece = piece[:, :, None]
    if piece.dtype == torch.bool:
        scores.masked_fill_(~piece, -torch.inf)
    else:
        scores.add_(piece)


def _column_sums(scores: Tensor, weight: Tensor | None, sink_logits: Tensor | None) -> Tensor:
    """Softmax over the last dimension, then the sum over weighted queries and each group: [batch, kv_heads, n_keys].

    The scores are overwritten. Dividing by the row sums is folded into the sum over the queries, so that the
    exponentials are written once and read once.
    """
    # A query that sees nothing has a maximum of -inf, or the lowest number under an additive mask. It gets no share;
    # the finite number keeps its differences from being nan.
    lowest = torch.finfo(scores.dtype).min
    peak = scores.amax(-1, keepdim=True).clamp_min_(lowest)
    sees = peak.squeeze(-1) > lowest
    scores.sub_(peak)
    if scores.device.type == "cpu":
        # A weight below e^-70 of the largest is lost in any float32 sum, and denormal numbers are slow: without this,
        # peaked attention took six times as long. What is left of hidden keys is cleared in the end.
        scores.clamp_min_(-70.0)
    scores.exp_()
    norm = scores.sum(-1)
    if sink_logits is not None:
        norm = norm + (sink_logits[:, :, None] - peak.squeeze(-1)).exp()
    share = torch.where(sees, norm.reciprocal(), 0.0)
    if weight is not None:
        share = share * weight[:, None, None, :]
    batch, kv_heads, group, n, n_keys = scores.shape
    flat = scores.view(batch, kv_heads, group * n, n_keys)
    return (share.reshape(batch, kv_heads, 1, group * n) @ flat).squeeze(2)


def _pieces(
    batch: int, kv_heads: int, n_queries: int, group: int, n_keys: int, head_dim: int, max_bytes: int
) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Cut the work into (rows, key heads, query spans) whose float32 temporaries stay under `max_bytes` together.

    Whole batches and all heads at once where they fit; then fewer heads; then fewer rows.
    """
    # A quarter for the keys in float32, a half for scores and mask; the rest is left for the small ones.
    key_elements, score_elements = max_bytes // 16, max_bytes // 16
    one_head = max(n_keys * head_dim, 1)
    one_query = max(n_keys * group, 1)
    fitting = max(1, min(key_elements // one_head, score_elements // one_query))
    heads = min(kv_heads, fitting)
    rows = min(batch, max(1, fitting // kv_heads)) if heads == kv_heads else 1
    step = max(1, score_elements // (one_query * heads * rows))
    spans = [slice(start, min(start + step, n_queries)) for start in range(0, n_queries, step)]
    for row in range(0, batch, rows):
        for head in range(0, kv_heads, heads):
            yield slice(row, min(row + rows, batch)), slice(head, min(head + heads, kv_heads)), spans
