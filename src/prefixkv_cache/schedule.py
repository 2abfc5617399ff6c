"""The decode steps of one layer, decided at the prompt's end: fixed memory, and no Python while decoding.

Where a pair goes in a step depends on nothing but the numbers of pairs stored and tokens seen, so for a known number of
steps all slots can be written down beforehand. A step then reads its slot from a table on the device and moves a
counter on, all by tensor operations at constant addresses: this is what `torch.compile` and CUDA graphs ask for.
Whoever wants to know on the host how far decoding has come asks the counter (`steps_taken`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .eviction import Eviction


class Schedule:
    """The slots of the next `n_steps` pairs of each row.

    Args:
        rows: the decode rule of each row, or one for all; not changed.
        n_steps: decode steps to plan for.
        seen: tokens seen so far, padding included.
        device: where the layer's buffers lie.

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

    def next_slots(self) -> tuple[Tensor, Tensor]:
        """The slots of the next token, int64 [1 or batch], and its position, int64 []; the counters move on."""
        slots = self.slots.index_select(0, self._step)[0]
        position = self.seen.clone()
        self._step.add_(1)
        self.seen.add_(1)
        return slots, position

    def steps_taken(self) -> int:
        """Steps taken since this was last asked. Waits for the device."""
        taken = int(self._step) - self._noticed
        self._noticed += taken
        return taken


def keep_address(tensor: Tensor) -> None:
    """Tell the compiler that this tensor stays where it is, so that CUDA graphs write to it in place."""
    torch._dynamo.mark_static_address(tensor)
