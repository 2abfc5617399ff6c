"""Where the next pair goes while decoding, and which pair leaves for it: fixed-point eviction.

The decode rule of Elastic Cache (arXiv 2407.18121, section 3.3) and PrefixKV, kept for one row of one layer as plain
integers: no tensor is touched here, the layer writes to the slot that it is given. Slots are places in memory;
rotary angles were applied before the keys were stored, so a pair can lie in any slot.
"""

from __future__ import annotations

from collections import deque


class FixedPointEviction:
    """The slots of one row of one layer, one decode step after another.

    After a prompt the layer holds `stored` pairs in slots `0 .. stored - 1`, in the order of their positions. Each
    step adds a pair; if then `stored - seen * keep >= 1`, the pair at index `P = stored_at_prompt - distance` (in
    insertion order; `stored_at_prompt // 2` where that is below 1) leaves. All that stand from `P` on are thus a
    queue: the oldest leaves first, and the newcomer takes its slot.

    Where we differ from the published code: there the pair that leaves is still visible to the token that pushes it
    out; here it is overwritten before that token's attention, so a layer never holds one pair more than its share.

    Args:
        stored: pairs in the row after the prompt.
        seen: real tokens that the row was fed so far.
        keep: keep ratio of the layer, fraction kept in [0, 1]. At 1 nothing leaves.
        distance: P lies this many pairs before the prompt's end; at least 1. None: nothing leaves while decoding.
    """

    __slots__ = ("keep", "point", "queue", "seen", "stored")

    def __init__(self, stored: int, seen: int, keep: float, distance: int | None):
        self.stored, self.seen, self.keep = stored, seen, keep
        self.point: int | None = None
        self.queue: deque[int] = deque()
        if distance is not None and keep < 1.0:
            self.point = stored - distance if stored - distance >= 1 else stored // 2
            self.queue.extend(range(self.point, stored))

    def next_slot(self) -> int:
        """Take in one more token and return the slot for its pair: the leaving pair's, or the first unused one."""
        self.seen += 1
        if self.queue and self.stored + 1 - self.seen * self.keep >= 1:
            slot = self.queue.popleft()
        else:
            slot = self.stored
            self.stored += 1
        if self.point is not None:
            self.queue.append(slot)
        return slot

    def copy(self) -> FixedPointEviction:
        """An independent continuation of the same row (a beam that splits)."""
        twin = FixedPointEviction(self.stored, self.seen, self.keep, None)
        twin.point, twin.queue = self.point, self.queue.copy()
        return twin

    def shortened(self, stored: int, removed: int) -> FixedPointEviction:
        """The row after its newest `removed` tokens were taken back and its `stored` pairs were put in order."""
        twin = FixedPointEviction(stored, max(stored, self.seen - removed), self.keep, None)
        if self.point is not None:
            twin.point = min(self.point, max(stored - 1, 0))
            twin.queue.extend(range(twin.point, stored))
        return twin
