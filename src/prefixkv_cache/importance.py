"""How much attention each key of a layer receives from the queries that count.

First of the pure functions on the way of the data: (query, key, mask) of one layer -> importance [batch, keys].
The attention itself has been computed by the model's own backend, which does not return its weights; this module
computes the weights again, a piece at a time, and keeps only their column sums. It knows nothing of caches or models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from .importance_flash import believable, column_sums, covers
from .masks import BlockMaskReader, PickedMask

Mask: TypeAlias = Tensor | BlockMaskReader | PickedMask | None

_NOTHING = 1e-24  # attention that counts as none: far below what a float32 softmax can tell from zero
_HIDDEN_SCORE = -5e3  # a score below is that of a hidden key: -inf, or what an additive mask of any dtype makes of it
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
    queries: int | str = "all",
    real: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    average: str = "sum",
    per_head: bool = False,
    log_sum_exp: Tensor | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Tensor:
    """Attention probability that each key receives, summed over the queries that count, averaged over the heads.

    With `queries="all"` this is the importance of PrefixKV (arXiv 2412.03409, section 3.2) and of Elastic Cache
    (arXiv 2407.18121, equation 4); with an integer it is the observation window of SnapKV (arXiv 2404.14469).

    Args:
        query: [batch, query_heads, n_queries, head_dim], as the attention function receives it.
        key: [batch, kv_heads, n_keys, head_dim]; kv_heads divides query_heads. The queries are the last of the keys.
        mask: as the backend receives it: None (causal, aligned at the last key), bool (True: visible) or additive
            float [batch or 1, heads or 1, n_queries, n_keys], or [batch, n_keys] (nonzero: visible, and causal).
            A flex attention mask comes behind a `BlockMaskReader`.
        queries: `"all"`, or how many of each row's last real queries count.
        real: bool [batch, n_queries], False at queries that never count: padding tokens and whoever else shall not.
            None: no padding.
        scaling: factor on the scores; head_dim ** -0.5 when None.
        softcap: the scores pass `softcap * tanh(scores / softcap)` when given.
        sink_logits: [query_heads], a learned score that takes part in the softmax beside the keys (gpt-oss).
        average: `"sum"` over the queries that count, or `"visible"`: that sum divided by the number of counting
            queries that can see the key, so that early keys, which more queries see, have no advantage.
        per_head: whether to give one row for each key head, the mean over the query heads that share it.
        log_sum_exp: float32 [batch, query_heads, n_queries], the logarithm of each softmax's denominator, where the
            backend's kernel has told it: all queries are cheaper with it, see importance_flash.py.
        max_bytes: ceiling for all temporaries together.

    Returns:
        float32 [batch, n_keys], or [batch, kv_heads, n_keys] with `per_head`; zero where no counting query sees the
        key.
    """
    batch, query_heads, _, head_dim = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    factor = head_dim**-0.5 if scaling is None else scaling
    if queries == "all" and average == "sum" and covers(mask, log_sum_exp, softcap, sink_logits, query):
        assert log_sum_exp is not None and (mask is None or isinstance(mask, Tensor)), "covers() says so"
        sums = column_sums(query, key, log_sum_exp, mask=mask, counts=real, scaling=factor)
        if believable(sums, query.shape[2], query_heads, real):
            return _joined(sums, query_heads // kv_heads, per_head)
    query, mask, weight, causal_end = _queries_that_count(query, mask, n_keys, queries, real)
    group = query_heads // kv_heads
    total = torch.zeros(batch, kv_heads, n_keys, dtype=torch.float32, device=key.device)
    viewers = torch.zeros(batch, n_keys, dtype=torch.float32, device=key.device) if average == "visible" else None
    if key.device.type == "cpu":
        max_bytes = min(max_bytes, _CPU_BYTES)

    for rows, heads, steps in _pieces(batch, kv_heads, query.shape[2], group, n_keys, head_dim, max_bytes):
        piece_of_keys = key[rows, heads]
        if piece_of_keys.numel() <= max_bytes // 16:  # else even one head's keys are converted a block at a time
            piece_of_keys = piece_of_keys.float()
        for span in steps:
            # Under the plain causal mask nobody in this span sees the keys behind its last query.
            seen = n_keys if causal_end is None else min(n_keys, int(causal_end[..., span].max()))
            scores = _scores(query[rows, :, span], piece_of_keys[:, :, :seen], heads, group, factor, max_bytes)
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            _hide(scores, mask, causal_end, rows, heads, span, group)
            span_weight = None if weight is None else weight[rows, span]
            beside = None if sink_logits is None else sink_logits.view(kv_heads, group)[heads].float()
            if viewers is not None and heads.start == 0:  # which keys a query sees is the same in all heads
                viewers[rows, :seen] += _viewers(scores[:, 0, 0], span_weight)
            total[rows, heads, :seen] += _column_sums(scores, span_weight, beside)
    if viewers is not None:
        total = total.masked_fill_(total < _NOTHING, 0.0) / viewers.clamp_min_(1.0)[:, None]
    return _joined(total, group, per_head)


def _joined(total: Tensor, group: int, per_head: bool) -> Tensor:
    """The mean over the heads, of all or of each group, from the sums over each group [batch, kv_heads, n_keys]."""
    total.masked_fill_(total < _NOTHING, 0.0)
    return total / group if per_head else total.sum(1) / (group * total.shape[1])


def _viewers(scores: Tensor, weight: Tensor | None) -> Tensor:
    """How many of the queries that count see each key: scores [batch, n, n_keys] -> [batch, n_keys]."""
    visible = scores > _HIDDEN_SCORE
    return (visible if weight is None else visible & weight[..., None]).sum(1)


def _queries_that_count(
    query: Tensor, mask: Mask, n_keys: int, queries: int | str, real: Tensor | None
) -> tuple[Tensor, Mask, Tensor | None, Tensor | None]:
    """Narrow query and mask to the queries that count.

    Returns the query, the mask, the weight of each query (bool [batch, n] or None for all ones) and, where only the
    causal rule hides keys beyond the mask, the number of keys that each query sees (int64 [n], or [batch, n]).
    """
    n_queries = query.shape[2]
    if isinstance(mask, Tensor) and mask.ndim == 4:
        mask = mask.expand(-1, -1, n_queries, -1)  # one row for all queries is a mask, too
    # Query i is the key number n_keys - n_queries + i, and sees all up to itself.
    causal_end = None
    if mask is None or mask.ndim == 2:
        causal_end = torch.arange(n_keys - n_queries + 1, n_keys + 1)
    if queries == "all" or int(queries) >= n_queries:
        if real is None:
            return query, mask, None, causal_end
        # Queries before the first that counts in any row, or behind the last, need not be looked at.
        counting = real.any(0).nonzero().flatten().tolist() or [0]
        span = slice(counting[0], counting[-1] + 1)
        return _span_of_queries(query, mask, span, real[:, span], causal_end)

    window = int(queries)
    if real is None or bool(real[:, -window:].all()):
        return _span_of_queries(query, mask, slice(n_queries - window, n_queries), None, causal_end)

    # Rows end at different columns (or have fewer real tokens than the window): pick for each row its own queries.
    columns = torch.arange(n_queries, device=real.device)
    picks = torch.where(real, columns, -1).topk(window, dim=1).values.flip(1)
    weight, picks = picks >= 0, picks.clamp_min(0).to(query.device)
    query = torch.take_along_dim(query, picks[:, None, :, None], dim=2)
    if isinstance(mask, BlockMaskReader):
        mask = mask.at_queries(picks)
    elif isinstance(mask, Tensor) and mask.ndim == 4:
        mask = PickedMask(mask, picks)
    if causal_end is not None:
        causal_end = causal_end.to(picks.device)[picks]
    return query, mask, weight.to(query.device), causal_end


def _span_of_queries(
    query: Tensor, mask: Mask, span: slice, weight: Tensor | None, causal_end: Tensor | None
) -> tuple[Tensor, Mask, Tensor | None, Tensor | None]:
    """What `_queries_that_count` returns, for queries that stand together."""
    if span == slice(0, query.shape[2]):
        return query, mask, weight, causal_end
    if isinstance(mask, BlockMaskReader):
        mask = mask.at_queries(torch.arange(span.start, span.stop, device=query.device).expand(len(query), -1))
    elif isinstance(mask, Tensor) and mask.ndim == 4:
        mask = mask[:, :, span]
    return query[:, :, span], mask, weight, None if causal_end is None else causal_end[span]


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
    if sink_logits is not None:
        peak = torch.maximum(peak, sink_logits[:, :, None, None])
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
    # A quarter for the keys in float32, a half for scores and mask; the rest is slack for the small ones.
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
