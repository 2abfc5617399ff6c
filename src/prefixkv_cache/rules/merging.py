"""What a pruned pair leaves behind: merging into the nearest pair that stays (Elastic Cache, arXiv 2407.18121).

A pure function on the pairs of one prompt. Which pairs stay is decided before (selection.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_pruned(
    keys: Tensor, values: Tensor, kept: Tensor, *, valid: Tensor | None = None, sink: int = 1
) -> tuple[Tensor, Tensor]:
    """Each anchor becomes the mean of itself and the pruned pairs that are nearest to it.

    Anchors are the kept pairs but the first `sink` and the last valid one, which stay as they are (arXiv 2407.18121,
    section 3.2). Nearest by position, ties to the lower anchor. Where there is no anchor, nothing is merged.

    Args:
        keys, values: of a prompt, [batch, heads, n, head_dim].
        kept: int64 [batch, 1 or heads, m], columns that stay, rising; -1 behind the last one of a shorter row.
        valid: bool [batch, n], False at padding, which is merged into nothing. None: no padding.
        sink: number of leading valid pairs that are no anchors.

    Returns:
        Copies of keys and values in which the anchors are merged; what was pruned is unchanged, since it is dropped.
    """
    batch, heads, n, _ = keys.shape
    kept = kept.expand(-1, heads, -1).flatten(0, 1)
    valid = torch.ones(batch, n, dtype=torch.bool, device=keys.device) if valid is None else valid
    valid = valid.repeat_interleave(heads, 0)
    # "amax", since the -1 entries write to column 0, too.
    stays = torch.zeros_like(valid, dtype=torch.int8)
    stays = stays.scatter_reduce_(1, kept.clamp_min(0), (kept >= 0).to(torch.int8), "amax").bool()
    order = valid.cumsum(1)
    anchor = stays & (order > sink) & (order < order[:, -1:])
    source = valid & ~stays & anchor.any(1, keepdim=True)
    index = _nearest(anchor, order).clamp(0, n - 1)
    return _mean_with(keys, source, index), _mean_with(values, source, index)


def _mean_with(vectors: Tensor, source: Tensor, index: Tensor) -> Tensor:
    """Each vector's mean with the `source` vectors that `index` sends to it: bool and int64 [batch * heads, n]."""
    # In half precision, sums of many would overflow.
    flat = vectors.flatten(0, 1).to(torch.promote_types(vectors.dtype, torch.float32))
    count = torch.ones_like(flat[..., 0]).scatter_add_(1, index, source.to(flat.dtype))
    added = torch.where(source[..., None], flat, 0.0)
    total = flat.scatter_add(1, index[..., None].expand_as(flat), added)
    return (total / count[..., None]).to(vectors.dtype).view_as(vectors)


def _nearest(anchor: Tensor, order: Tensor) -> Tensor:
    """int64 [rows, n]: the column of the anchor nearest to each column by order among valid ones; lower if tied."""
    n = anchor.shape[1]
    columns = torch.arange(n, device=anchor.device)
    below = torch.where(anchor, columns, -1).cummax(1).values
    above = torch.where(anchor, columns, n).flip(1).cummin(1).values.flip(1)
    to_below = order - order.gather(1, below.clamp_min(0))
    to_above = order.gather(1, above.clamp_max(n - 1)) - order
    take_above = (below < 0) | ((above < n) & (to_above < to_below))
    return torch.where(take_above, above, below)
