"""The importance of all queries on a GPU, in one pass and without a [queries, keys] tensor in memory.

One program for each block of keys of each query head: it holds its keys, walks over the queries that can see them, and
adds up exp(q k - lse) in registers. Nothing is shared between programs, so there are no atomic additions and the result
is the same every time; the heads of a group are summed afterwards. That is half the matrix products of the attention
itself. Importing this module needs triton.
"""

from __future__ import annotations

import math

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_LOG2_E = math.log2(math.e)


@triton.jit
def _kernel(
    query, key, lse, mask, out,
    q_batch, q_head, q_token, k_batch, k_head, k_token, m_batch, m_head, m_token, m_key,
    n_queries, n_keys, query_heads, scaling,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """MASK: 0 causal, 1 bool, 2 additive. Scores are in units of log 2, `scaling` and `lse` with them."""
    block = tl.program_id(0)
    head = tl.program_id(1) % query_heads
    row = (tl.program_id(1) // query_heads).to(tl.int64)
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    parts = tl.arange(0, WIDTH)
    in_keys = keys < n_keys
    k_at = key + row * k_batch + (head // GROUP) * k_head + keys[None, :] * k_token + parts[:, None]
    k = tl.load(k_at, mask=in_keys[None, :] & (parts[:, None] < HEAD_DIM), other=0.0)
    ahead = n_keys - n_queries
    total = tl.zeros([BLOCK_K], dtype=tl.float32)
    first = 0
    if MASK == 0:
        first = tl.maximum(block * BLOCK_K - ahead, 0) // BLOCK_Q * BLOCK_Q
    for start in range(first, n_queries, BLOCK_Q):
        queries = start + tl.arange(0, BLOCK_Q)
        in_queries = queries < n_queries
        q_at = query + row * q_batch + head * q_head + queries[:, None] * q_token + parts[None, :]
        q = tl.load(q_at, mask=in_queries[:, None] & (parts[None, :] < HEAD_DIM), other=0.0)
        below = tl.load(lse + (row * query_heads + head) * n_queries + queries, mask=in_queries, other=float("inf"))
        scores = tl.dot(q, k, input_precision=PRECISION) * scaling
        if MASK == 0:
            scores = tl.where(keys[None, :] <= ahead + queries[:, None], scores, float("-inf"))
        else:
            m_at = mask + row * m_batch + head * m_head + queries[:, None] * m_token + keys[None, :] * m_key
            inside = in_queries[:, None] & in_keys[None, :]
            if MASK == 1:
                scores = tl.where(tl.load(m_at, mask=inside, other=0) != 0, scores, float("-inf"))
            else:
                scores += tl.load(m_at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        total += tl.sum(tl.exp2(scores - below[:, None]), 0)
    tl.store(out + (row * query_heads + head) * n_keys + keys, total, mask=in_keys)


def column_sums(query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """As `importance_flash.column_sums`; `lse` is +inf where a query does not count."""
    batch, query_heads, n_queries, head_dim = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    query, key = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key))
    out = torch.empty(batch, query_heads, n_keys, dtype=torch.float32, device=key.device)
    kind, strides = 0, (0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, query_heads, n_queries, n_keys)
        kind, strides = (1 if mask.dtype == torch.bool else 2), mask.stride()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    width = max(16, triton.next_power_of_2(head_dim))
    block_q, block_k = (64, 128) if width <= 128 else (32, 64)
    _kernel[(triton.cdiv(n_keys, block_k), batch * query_heads)](  # pyright: ignore[reportIndexIssue]
        query, key, (lse * _LOG2_E).contiguous(), out if mask is None else mask, out,
        *query.stride()[:3], *key.stride()[:3], *strides,
        n_queries, n_keys, query_heads, scaling * _LOG2_E,
        GROUP=query_heads // kv_heads, HEAD_DIM=head_dim, WIDTH=width, MASK=kind,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", BLOCK_Q=block_q, BLOCK_K=block_k,
        num_warps=8 if width >= 128 else 4, num_stages=2,
    )  # fmt: skip
    return out.view(batch, kv_heads, query_heads // kv_heads, n_keys).sum(2)
