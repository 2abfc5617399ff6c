"""Decode steppers: how one new token's pair gets into a segment's buffers.

`GrowingStep` asks the eviction policies for the slot, step by step, and makes room as it is needed. `PlannedStep` knows
all slots of the coming steps beforehand, in fixed memory: a step reads its slot from a table on the device and moves a
counter on, all by tensor operations at constant addresses, as `torch.compile` and CUDA graphs ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ..methods import Decode, Method
from ..rules.eviction import Eviction, LeastImportantEviction, QueueEviction, WindowEviction, fixed_point
from .storage import Pairs

STEPS_PER_GROWTH = 64
"""Where the number of decode steps is not known beforehand, buffers grow by what so many steps need: growing copies a
segment, so it costs at most two in 64 of reading it, whatever its length."""

Policy: TypeAlias = Callable[[int, int, float, int | None], Eviction]
"""Makes a row's eviction policy from its (stored, seen, keep ratio, origin)."""


def eviction_policy(method: Method) -> Policy:
    """The policy that a method asks for."""
    if method.decode.evict == "least-important":
        return partial(_least_important, method.decode.headroom)
    return partial(_queue, method.decode, method.protect.sink)


def window_policy(method: Method, window: int) -> Policy:
    """The policy of a layer with a sliding window, whatever the method says of others."""
    return partial(_window, method.decode.headroom, window - 1)


def _window(headroom: int, reach: int, stored: int, seen: int, keep: float, origin: int | None) -> Eviction:
    del origin  # all turns are alike
    return WindowEviction(stored, seen, keep, reach, headroom)


def _least_important(headroom: int, stored: int, seen: int, keep: float, origin: int | None) -> Eviction:
    del origin  # all turns are alike
    return LeastImportantEviction(stored, seen, keep, headroom)


def _queue(decode: Decode, sink: int, stored: int, seen: int, keep: float, origin: int | None) -> Eviction:
    point = sink if decode.evict == "oldest" else fixed_point(stored, decode.distance)
    return QueueEviction(stored, seen, keep, point, decode.headroom, origin)


class GrowingStep:
    """Step by step: the slot comes from the policies, and memory grows as it is needed.

    Args:
        rows: the policy of each row, or one for all; they move on with every step.
        recent: recency window of the least-important policy: tokens, or below 1 a share of the row's pairs.
        sink: first pairs that are never the least important.
    """

    def __init__(self, rows: Sequence[Eviction], recent: float, sink: int):
        self.rows, self._recent, self._sink = rows, recent, sink

    def append(self, pairs: Pairs, width: int, keys: Tensor, values: Tensor, seen: int) -> tuple[Pairs, int, list[int]]:
        """Write one token's pair.

        Args:
            pairs: the buffers; they may be replaced by larger ones.
            width: slots in use so far.
            keys, values: [batch, heads, 1, head_dim].
            seen: position of the token.

        Returns:
            The buffers, the slots in use now, and the slots that the policies named, [] where they named none.
        """
        slots = [row.next_slot() for row in self.rows]
        known = [slot for slot in slots if slot is not None]
        last = max(known, default=-1)
        if last >= pairs.capacity:
            pairs = pairs.grown(self._room())
        if len(slots) == len(known) == 1 and pairs.received is None:
            pairs.write_everywhere(last, keys, values, seen)
        else:
            index = self._least(pairs, width, slots, seen) if len(known) < len(slots) else _column(slots, keys.device)
            pairs.write(index.expand(keys.shape[0], -1), keys, values, seen)
        return pairs, max(width, last + 1), known if len(known) == len(slots) else []

    def _room(self) -> int:
        """Slots that the next `STEPS_PER_GROWTH` steps need at most."""
        if any(row.growing for row in self.rows):
            return STEPS_PER_GROWTH
        keep, headroom = max(row.keep for row in self.rows), max(row.headroom for row in self.rows)
        return min(STEPS_PER_GROWTH, math.ceil(keep * STEPS_PER_GROWTH) + 1 + headroom)

    def _least(self, pairs: Pairs, width: int, slots: list[int | None], seen: int) -> Tensor:
        """int64 [batch, 1 or heads]: the slots given, and those of the least important pairs where there is none.

        Sink and recency window go last. The sink lies in the first slots, which nothing else takes.
        """
        assert pairs.received is not None, "a policy that asks for the least important pair gets the sums at the prompt"
        pairs.write_positions()
        received, positions = pairs.received[..., :width], pairs.positions[..., :width]
        recent = [self._recent if self._recent >= 1 else round(self._recent * row.stored) for row in self.rows]
        first_recent = seen - _column(recent, received.device)[..., None]
        # Where the window is all that there is, the oldest of it goes.
        received = torch.where(positions > first_recent, 1e30 + 1e24 * positions, received)
        slot = torch.arange(width, device=received.device)
        least = received.masked_fill((positions < 0) | (slot < self._sink), torch.inf).argmin(-1)
        given = _column([-1 if each is None else each for each in slots], received.device)
        return torch.where(given < 0, least, given)


class PlannedStep:
    """The slots of the next `n_steps` pairs of each row, decided at the prompt's end.

    Args:
        rows: the policy of each row, or one for all; not changed.
        n_steps: decode steps to plan for.
        seen: tokens seen so far, padding included.
        device: where the segment's buffers lie.

    Attributes:
        slots: int64 [n_steps, rows].
        capacity: pairs of the longest row when all steps are taken.
        last: tokens seen when all steps are taken.
        seen: int64 [], tokens seen, on the device.
    """

    def __init__(self, rows: Sequence[Eviction], n_steps: int, seen: int, device: torch.device):
        futures = [row.copy() for row in rows]
        table = [[row.next_slot() for row in futures] for _ in range(n_steps)]
        self.capacity = max(row.stored for row in futures)
        self.last = seen + n_steps
        self.slots = torch.tensor(table, dtype=torch.int64, device=device).view(n_steps, len(futures))
        self.seen = torch.tensor(seen, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._noticed = 0
        for tensor in (self.slots, self.seen, self._step):
            keep_address(tensor)

    def append(self, pairs: Pairs, keys: Tensor, values: Tensor) -> None:
        """Write one token's pair by tensor operations alone; the counters move on."""
        slots = self.slots.index_select(0, self._step)[0]
        position = self.seen.clone()
        self._step.add_(1)
        self.seen.add_(1)
        if slots.shape[0] == 1:
            pairs.keys.index_copy_(2, slots, keys)
            pairs.values.index_copy_(2, slots, values)
            pairs.positions.index_copy_(2, slots, position.expand(*pairs.positions.shape[:2], 1))
        else:
            pairs.write(slots[:, None], keys, values, position)

    def steps_taken(self) -> int:
        """Steps taken since this was last asked. Waits for the device."""
        taken = int(self._step) - self._noticed
        self._noticed += taken
        return taken


def keep_address(tensor: Tensor) -> None:
    """Tell the compiler that this tensor stays where it is, so that CUDA graphs write to it in place."""
    torch._dynamo.mark_static_address(tensor)


def _column(values: Sequence[float | None], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None]
