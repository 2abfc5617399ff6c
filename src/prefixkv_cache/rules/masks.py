"""A segment's own columns of the attention mask.

transformers builds one mask for all layers, in logical columns: one for every token that the model has *seen*. A pruned
layer *stores* fewer pairs, in an order of its own. These pure functions turn the one into the other, in the form in
which each backend takes its mask, and read off which tokens are padding. They know nothing of caches or models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

_HIDDEN = -1e3


class PickedMask:
    """A [batch or 1, heads or 1, queries, keys] mask, read a piece at a time at some of its queries only.

    Args:
        mask: bool or additive.
        picks: int64 [batch, n]: which queries it shall be read at.
    """

    ndim = 4

    def __init__(self, mask: Tensor, picks: Tensor):
        self._mask, self._picks = mask.expand(picks.shape[0], -1, -1, -1), picks

    def piece(self, rows: slice, span: slice, n_keys: int) -> Tensor:
        """[rows, heads or 1, span, n_keys]: the mask of these rows at these of the picked queries."""
        picks = self._picks[rows, span]
        row = torch.arange(rows.start, rows.stop, device=picks.device)[:, None]
        return self._mask[row, :, picks, :n_keys].transpose(1, 2)


class BlockMaskReader:
    """A flex attention `BlockMask`, read a piece at a time as if it were a bool tensor [batch, 1, queries, keys].

    Args:
        mask: the block mask.
        picks: int64 [batch, n]: which queries it shall be read at; None: all, in order.
    """

    ndim = 4
    dtype = torch.bool

    def __init__(self, mask: BlockMask, picks: Tensor | None = None):
        self._mask, self._picks = mask, picks
        self.shape = (mask.shape[0], 1, mask.shape[2] if picks is None else picks.shape[1], mask.shape[3])

    def at_queries(self, picks: Tensor) -> BlockMaskReader:
        """The same mask at other queries only, int64 [batch, n]."""
        return BlockMaskReader(self._mask, picks)

    def piece(self, rows: slice, span: slice, n_keys: int) -> Tensor:
        """Bool [rows, 1, span, n_keys]: what these queries of these rows see of the first keys."""
        n_rows, n_queries = rows.stop - rows.start, span.stop - span.start

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            row, query = b + rows.start, q + span.start
            return self._mask.mask_mod(row, h, query if self._picks is None else self._picks[row, query], kv)

        # The device is that of the mask's own block table.
        return create_mask(visible, n_rows, 1, n_queries, n_keys, device=str(self._mask.kv_num_blocks.device))


def readable(mask: Any) -> Any:
    """The mask in a form that importance.py reads: tensors and None as they are, a `BlockMask` behind a reader."""
    return BlockMaskReader(mask) if isinstance(mask, BlockMask) else mask


def valid_tokens(mask: Any, n_new: int) -> Tensor | None:
    """Which of the newest `n_new` tokens are valid, not padding.

    A valid token is seen by some query, itself at least; padding by none. (Of a `BlockMask`, which would have to be
    written out for that, the last query is asked: under causal masks it sees every valid token.)

    Args:
        mask: as the backend receives it, in logical columns; see `own_mask`.
        n_new: number of tokens in this forward.

    Returns:
        bool [batch or 1, n_new], or None where the mask is None (no padding).

    Raises:
        TypeError: a mask of a kind that we cannot read.
    """
    if mask is None:
        return None
    if isinstance(mask, BlockMask):
        batch, _, n_queries, n_keys = mask.shape
        last = BlockMaskReader(mask).piece(slice(0, batch), slice(n_queries - 1, n_queries), n_keys)
        return last[:, 0, 0, -n_new:]
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        kind = f"{list(mask.shape)} tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"cannot read an attention mask of this kind: {kind}. Expected None, a [batch, keys] tensor or a "
            "[batch, heads, queries, keys] tensor; load the model with attn_implementation='sdpa' or 'eager'"
        )
    newest = mask[..., -n_new:]
    if newest.ndim == 2 or not newest.is_floating_point():
        return newest.bool() if newest.ndim == 2 else newest.flatten(1, 2).any(1)
    # Additive: about 0 where visible; -inf, the lowest number, or what people write for it (-1e4, -1e9) where not.
    return newest.amax((1, 2)) > _HIDDEN


def at_queries(mask: Any, begin: int, end: int, n_behind: int = 0) -> Any:
    """The mask of some of the queries, without the last `n_behind` keys; in the same form.

    Args:
        mask: as `own_mask` takes it. A mask by keys alone, or None, says nothing of queries.
        begin, end: of the queries.
        n_behind: keys to leave out at the end.
    """
    if mask is None:
        return None
    if not isinstance(mask, BlockMask):
        keys = slice(0, mask.shape[-1] - n_behind)
        return mask[:, keys] if mask.ndim == 2 else mask[:, :, begin:end, keys]
    batch, heads, _, n_keys = mask.shape

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return mask.mask_mod(b, h, q + begin, kv)

    return create_block_mask(
        visible, batch, heads, end - begin, n_keys - n_behind, device=str(mask.kv_num_blocks.device)
    )


def own_mask(
    mask: Any, positions: Tensor, ragged: bool, query: Tensor, backend: str, query_heads: Tensor | None = None
) -> Any:
    """The mask of one segment of a layer: the columns of its stored pairs, slots that hold nothing hidden.

    Args:
        mask: None, bool (True: visible) or additive float [batch or 1, heads or 1, n_queries, seen], or
            [batch, seen] (nonzero: visible; flash attention), or a flex attention `BlockMask`.
        positions: int64 [batch, 1 or kv_heads, stored]: the logical column of each stored pair, -1 where a slot holds
            nothing. The newest tokens stand last.
        ragged: whether there is any -1 in `positions`.
        query: [batch, query_heads, n_queries, head_dim], of the segment; only its shape is looked at.
        backend: name of the attention implementation. It decides the form of a mask that has to be made.
        query_heads: int64 [query_heads], which of the model's they are, for masks that differ by head. None: all.

    Returns:
        The mask in the same form with `stored` columns; None where there is none and none is needed.
    """
    # What hides padding, empty slots and later tokens is the same for all heads, whichever earlier tokens they hold.
    shared = positions[:, 0]
    if mask is None:
        if "flash" in backend:
            return (shared >= 0).int() if ragged else None
        if query.shape[2] == 1:
            held = positions >= 0
            if held.shape[1] > 1:
                held = held.repeat_interleave(query.shape[1] // held.shape[1], 1)
            return held[:, :, None, :] if ragged else None
        # Backends align a causal mask that they make themselves at column n_queries, not at the stored length.
        newest = shared[:, -query.shape[2] :, None]
        return ((shared[:, None, :] <= newest) & (shared >= 0)[:, None, :])[:, None]
    if isinstance(mask, BlockMask):
        return _own_block_mask(mask, positions, query, query_heads)
    if mask.ndim == 2:
        own = mask.expand(shared.shape[0], -1).gather(1, shared.clamp_min(0) if ragged else shared)
        return own.masked_fill(shared < 0, 0) if ragged else own
    if mask.shape[1] > 1 and query_heads is not None:
        mask = mask.index_select(1, query_heads)
    if positions.shape[1] > 1:
        positions = positions.repeat_interleave(query.shape[1] // positions.shape[1], 1)
        mask = mask.expand(-1, query.shape[1], -1, -1)
    own = mask.expand(positions.shape[0], -1, -1, -1)
    columns = positions.clamp_min(0) if ragged else positions
    own = own.gather(3, columns[:, :, None, :].expand(-1, own.shape[1], own.shape[2], -1))
    if not ragged:
        return own
    hidden = False if own.dtype == torch.bool else torch.finfo(own.dtype).min
    return own.masked_fill((positions < 0)[:, :, None, :], hidden)


def _own_block_mask(mask: BlockMask, positions: Tensor, query: Tensor, query_heads: Tensor | None) -> BlockMask:
    batch, heads, stored = positions.shape
    group = query.shape[1] // heads

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        position = positions[b, h // group, kv]
        head = h if query_heads is None else query_heads[h]
        return (position >= 0) & mask.mask_mod(b, head, q, position.clamp_min(0))

    n_heads = query.shape[1] if heads > 1 else None
    return create_block_mask(visible, batch, n_heads, query.shape[2], stored, device=str(positions.device))
