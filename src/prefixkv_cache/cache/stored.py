"""What a layer stores: its segments, read and changed together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .decode import PlannedStep
from .segments import Segment, Shown


class StoredPairs:
    """The segments of one layer.

    Args:
        segments: one for each length; none before the first prompt was pruned.
        n_heads: key heads of the layer.
    """

    def __init__(self, segments: Sequence[Segment] = (), n_heads: int = 0):
        self.segments, self.n_heads = list(segments), n_heads

    @property
    def plan(self) -> PlannedStep | None:
        """The plan of the first segment, which all others follow; None: steps come as they are needed."""
        return self.segments[0].plan if self.segments else None

    @property
    def batch_size(self) -> int:
        """Rows of the batch; 0: nothing is stored."""
        return self.segments[0].batch_size if self.segments else 0

    def heads_of(self, segment: Segment) -> Sequence[int]:
        """The key heads of a segment."""
        return range(self.n_heads) if segment.group is None else segment.group.heads

    def by_head(self) -> list[int]:
        """Pairs that each key head holds, by its longest row."""
        widths = {head: segment.width for segment in self.segments for head in self.heads_of(segment)}
        return [widths[head] for head in sorted(widths)]

    def tensors(self) -> list[Tensor]:
        """All that keys and values take."""
        return [tensor for s in self.segments if s.pairs for tensor in s.pairs.tensors()]

    @property
    def pair_bytes(self) -> int:
        """Bytes of one token's pairs in all rows and heads, as the model made them."""
        return sum(segment.stored.pair_bytes for segment in self.segments)

    def joined(self, name: str, fill: int = 0) -> Tensor:
        """`keys`, `values` or `positions` of all heads, [batch, heads, longest, ...]; copied if need be.

        Args:
            name: of the segments' attribute.
            fill: what stands behind the pairs of heads that hold fewer.
        """
        parts = [getattr(segment, name) for segment in self.segments]
        if len(parts) == 1:
            return parts[0]
        longest = max(part.shape[2] for part in parts)
        joined = parts[0].new_full((parts[0].shape[0], self.n_heads, longest, *parts[0].shape[3:]), fill)
        for segment, part in zip(self.segments, parts, strict=True):
            heads = list(self.heads_of(segment))
            joined[:, heads, : part.shape[2]] = part.expand(-1, len(heads), *part.shape[2:])
        return joined

    def check_keys(self, keys: Tensor) -> None:
        """Refuse new keys, [batch, heads, n_new, head_dim], that do not belong to the stored ones.

        Raises:
            ValueError: another batch, or another model.
        """
        batch, heads, _, head_dim = keys.shape
        rows, size = self.segments[0].batch_size, self.segments[0].stored.head_dim
        if batch != rows:
            raise ValueError(
                f"got a batch of {batch} for a cache that holds {rows} rows; "
                "call cache.reset() before an unrelated prompt, or cache.batch_repeat_interleave(n)"
            )
        if heads != self.n_heads or head_dim != size:
            raise ValueError(
                f"got keys of {heads} heads of {head_dim} for a cache that holds {self.n_heads} heads of {size}; "
                "this is another model: call cache.reset() first"
            )

    def append(self, keys: Tensor, values: Tensor, seen: int) -> list[Shown]:
        """Write one token's pair, [batch, heads, 1, head_dim]; return what the backend shall see."""
        written = [segment.append(segment.own(keys), segment.own(values), seen) for segment in self.segments]
        return [
            Shown(segment.group, *pair, segment.needs_own_mask, segment.ragged, segment=segment)
            for segment, pair in zip(self.segments, written, strict=True)
        ]

    def shown_with(self, keys: Tensor, values: Tensor, positions: Tensor) -> list[Shown]:
        """What the backend shall see of a later prompt: the pairs stored, and behind them the new ones.

        Args:
            keys, values: [batch, heads, n_new, head_dim], of the prompt.
            positions: int64 [batch, 1, n_new], their positions.
        """
        return [
            Shown(
                segment.group,
                torch.cat([segment.keys, segment.own(keys)], dim=2),
                torch.cat([segment.values, segment.own(values)], dim=2),
                segment.needs_own_mask or segment.ragged,
                segment.ragged,
                # Taken now: a model that shares keys between layers shows them again after this layer was pruned.
                torch.cat([segment.positions, positions.expand(-1, segment.positions.shape[1], -1)], dim=2),
            )
            for segment in self.segments
        ]

    def catch_up(self) -> int:
        """Take note, on the host, of the steps that plans took on the device; return how many."""
        taken = [segment.plan.steps_taken() for segment in self.segments if segment.plan is not None]
        for segment in self.segments:
            segment.catch_up(taken[0])
        return taken[0]

    def drop_plan(self) -> None:
        """Go on with growing memory: the planned steps are used up."""
        for segment in self.segments:
            segment.drop_plan()

    def select_rows(self, indices: Tensor, seen: int) -> None:
        """Keep the rows at `indices`, int64, in that order."""
        for segment in self.segments:
            segment.select_rows(indices, seen)

    def check_crop(self, end: int, removed: int) -> None:
        """Refuse to take back the tokens from position `end` on where key heads would be left with different numbers.

        Raises:
            ValueError: they would.
        """
        for segment in self.segments if end else ():
            held = segment.held_before(end)
            if bool((held != held[:, :1]).any()):
                raise ValueError(
                    f"cannot take back {removed} tokens: heads keep keys of their own here, and would be left with "
                    "different numbers of them; call cache.reset(), or use heads='mean'"
                )

    def crop(self, end: int, removed: int, seen: int) -> None:
        """Take back the tokens from position `end` on, `removed` of them; asked for after `check_crop`."""
        for segment in self.segments:
            segment.crop(end, removed, seen)

    def move(self, device: torch.device) -> None:
        """Move the buffers."""
        for segment in self.segments:
            if segment.pairs is not None:
                segment.pairs.move(device)
