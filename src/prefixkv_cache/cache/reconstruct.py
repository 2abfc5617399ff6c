"""Reconstruction scores: how much attention each key gets while the prompt is repeated (KVzip, arXiv 2505.23416).

An observer of the second pass, in which the prompt is fed behind itself (compress.py, and calibration/measure.py). It
computes the attention again from queries and keys, a span of queries at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import AttentionCall


def _causal(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Bool [1, 1, n_queries, n_keys]: the queries are the last of the keys."""
    visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return visible.tril(n_keys - n_queries)[None, None]


class LargestAttention:
    """Observer of the second pass.

    Attributes:
        valid: bool [batch, n_queries], False at padding, whose queries do not count; None: no padding.
        of_layer: float32 [batch, kv_heads, n] on the CPU, by layer index: `largest_attention` of the first n keys.
    """

    def __init__(self, valid: Tensor | None, max_bytes: int):
        self.valid, self._max_bytes = valid, max_bytes
        self.of_layer: dict[int, Tensor] = {}

    def wants_log_sum_exp(self, layer_idx: int) -> bool:
        """It is not asked for."""
        return False

    def look(self, layer_idx: int, call: AttentionCall) -> None:
        """The largest of this call, and of others to the same keys."""
        found = largest_attention(call, call.key.shape[2] - call.query.shape[2], self.valid, self._max_bytes).cpu()
        before = self.of_layer.get(layer_idx)
        self.of_layer[layer_idx] = found if before is None else torch.maximum(before, found)


def largest_attention(call: AttentionCall, n: int, valid: Tensor | None, max_bytes: int) -> Tensor:
    """The largest attention that any query of a call gives each of the first n keys.

    Args:
        call: whose queries are the last of its keys.
        n: so many first keys are asked about.
        valid: bool [batch, n_queries], False at padding, whose queries do not count; None: no padding.
        max_bytes: ceiling for the temporaries.

    Returns:
        float32 [batch, kv_heads, n], the largest over the query heads of each key head, too.
    """
    batch, heads, n_queries, size = call.query.shape
    kv_heads, n_keys = call.key.shape[1:3]
    options, mask = call.options, call.mask
    if mask is None:
        mask = _causal(n_queries, n_keys, call.key.device)
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise TypeError(f"cannot read the mask of {call.backend!r} here; load the model with sdpa or eager attention")
    scaling = size**-0.5 if options.get("scaling") is None else options["scaling"]
    keys = call.key.float().transpose(2, 3) * scaling
    largest = torch.full((batch, heads, n), -torch.inf, device=call.key.device)  # of logarithms: one exp, at the end
    step = max(1, max_bytes // (12 * batch * heads * n_keys))
    for start in range(0, n_queries, step):
        span = slice(start, start + step)
        query = call.query[:, :, span].float().reshape(batch, kv_heads, -1, size)  # heads of a group, side by side
        scores = (query @ keys).view(batch, heads, -1, n_keys)
        if options.get("softcap") is not None:
            scores = (scores / options["softcap"]).tanh() * options["softcap"]
        own = mask[:, :, span]
        scores = scores + own if own.is_floating_point() else scores.masked_fill(~own, -1e30)
        total = scores.logsumexp(-1, keepdim=True)
        if options.get("s_aux") is not None:  # a learned score beside the keys (gpt-oss)
            total = torch.logaddexp(total, options["s_aux"].float().view(1, -1, 1, 1))
        logs = scores[..., :n] - total
        if valid is not None:
            logs = logs.masked_fill(~valid.to(logs.device)[:, None, span, None], -torch.inf)
        largest = torch.maximum(largest, logs.amax(2))
    return largest.exp().view(batch, kv_heads, heads // kv_heads, n).amax(2)
