"""Steps between what keys received and what ranks them: pooling, value norms, normalisation, one row for all heads.

Pure functions between importance.py and selection.py; which of them a method uses, and in which order, its scoring rule
decides. Everywhere `scores` is [batch, heads, n], not negative, and `valid` bool [batch, n], False at padding (None: no
padding). A score of nan stays nan, so that a broken sample is noticed, and changes no other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_PIECE_BYTES = 16 * 2**20  # of vectors that stand in float32 at a time
_TINY = torch.finfo(torch.float32).tiny


def pool_neighbours(scores: Tensor, width: int, by: str = "max", valid: Tensor | None = None) -> Tensor:
    """The largest, or the mean, score among the `width` keys around each key, itself in the middle.

    (SnapKV, arXiv 2404.14469, section 4.2, takes the largest.) Padding, nan and what lies beyond the ends are no
    neighbours.

    Args:
        scores: [batch, heads, n].
        width: odd.
        by: `"max"` or `"mean"`.
        valid: bool [batch, n] or None. Padding scores 0.
    """
    ignored = scores.isnan()
    if valid is not None:
        scores, ignored = scores.masked_fill(~valid[:, None], 0.0), ignored | ~valid[:, None]
    if width == 1 or not scores.shape[2]:
        return scores
    width = min(width, 2 * scores.shape[2] - 1)  # so wide, each key sees all the others
    counting = scores.masked_fill(ignored, 0.0)
    if by == "max":
        pooled = F.max_pool1d(counting, width, stride=1, padding=width // 2)
    else:
        pooled = _window_sum(counting, width) / _window_sum((~ignored).to(scores.dtype), width)
    return torch.where(ignored, scores, pooled)


def _window_sum(numbers: Tensor, width: int) -> Tensor:
    # In two dimensions, since the pooling in one has no `divisor_override`, and dividing twice would round twice.
    rows = numbers[:, :, None]
    return F.avg_pool2d(rows, (1, width), stride=1, padding=(0, width // 2), divisor_override=1).squeeze(2)


def join_heads(scores: Tensor, how: str) -> Tensor:
    """[batch, heads, n] -> [batch, 1, n] by `"mean"` or `"max"`; unchanged for `"each"`."""
    if how == "each" or scores.shape[1] == 1:
        return scores
    return scores.amax(1, keepdim=True) if how == "max" else scores.mean(1, keepdim=True)


def normalised_without_sink(scores: Tensor, sink: int, valid: Tensor | None = None) -> Tensor:
    """Scores of heads or layers on one scale: the sink's become 0, the others are divided by their sum.

    Sink tokens always stay, and how much attention they draw says nothing of how much the others need.

    Args:
        scores: [batch, heads, n].
        sink: number of first valid columns that become 0.
        valid: bool [batch, n] or None. Padding scores 0.

    Returns:
        float32 [batch, heads, n]; each head's finite scores sum to 1, or to 0 where there is no mass.
    """
    if valid is None:
        counting = (torch.arange(scores.shape[2], device=scores.device) >= sink)[None]
    else:
        counting = valid & (valid.cumsum(1) > sink)
    scores = scores.float().masked_fill(~counting[:, None], 0.0)
    total = scores.masked_fill(~scores.isfinite(), 0.0).sum(-1, keepdim=True)
    return scores / total.clamp_min(_TINY)


def vector_norms(vectors: Tensor) -> Tensor:
    """The L2 norm of each vector, 0 where it is not finite: [batch, heads, n, size] -> float32 [batch, heads, n]."""
    norms = torch.empty(vectors.shape[:3], dtype=torch.float32, device=vectors.device)
    for rows, heads, span in _pieces(vectors):
        # In half precision the squares would overflow.
        norms[rows, heads, span] = torch.linalg.vector_norm(vectors[rows, heads, span].float(), dim=-1)
    return norms.nan_to_num_(nan=0.0, posinf=0.0)


def _pieces(vectors: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cut [batch, heads, n, size] into (rows, heads, span of n), small enough for a copy in float32.

    All heads of several rows at once where they fit; then fewer rows; then fewer heads; then a span of one head.
    """
    batch, heads, n, size = vectors.shape
    own_bytes = vectors.numel() * vectors.element_size()
    elements = min(_PIECE_BYTES, max(_PIECE_BYTES // 16, own_bytes // 2)) // 4
    fitting = max(1, elements // max(1, n * size))
    some, rows = min(heads, fitting), max(1, fitting // max(1, heads))
    step = max(1, elements // max(1, rows * some * size))
    for row in range(0, batch, rows):
        for head in range(0, heads, some):
            for start in range(0, n, step):
                yield slice(row, row + rows), slice(head, head + some), slice(start, start + step)
