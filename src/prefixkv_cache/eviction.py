"""Where the next pair goes while decoding, and which pair leaves for it: one small machine for each row of a layer.

The count is the same for all rules: a layer that would hold one pair more than its share of the tokens seen, and some
slack if there is any, lets one go. Which one is the rule's own: `FixedPointEviction` is that of Elastic Cache (arXiv
2407.18121, section 3.3) and PrefixKV, `LeastImportantEviction` that of H2O (arXiv 2306.14048, algorithm 1). Plain
integers: no tensor is touched here, the layer writes to the slot that it is given. Slots are places in memory; rotary
angles were applied before the keys were stored, so a pair can lie in any slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol


class Eviction(Protocol):
    """What a layer asks of a row's rule.

    Attributes:
        stored: pairs in the row.
        seen: real tokens that the row was fed so far.
        keep: keep ratio of the layer, fraction kept in [0, 1].
        slack: pairs that may be held beyond the share.
    """

    stored: int
    seen: int
    keep: float
    slack: int

    def next_slot(self) -> int | None:
        """Take in one more token; return the slot for its pair, or None: that of the least important pair."""
        ...

    def copy(self) -> Eviction:
        """An independent continuation of the same row (a beam that splits)."""
        ...

    def shortened(self, stored: int, removed: int) -> Eviction:
        """The row after its newest `removed` tokens were taken back and its `stored` pairs were put in order."""
        ...

    def owed(self) -> tuple[int, ...]:
        """Pairs held beyond the share, which leave first once a later prompt is there: places in their order."""
        ...


class FixedPointEviction:
    """The pair at one fixed index leaves, one decode step after another.

    After a prompt the layer holds `stored` pairs in slots `0 .. stored - 1`, in the order of their positions. Each
    step adds a pair; if then `stored - seen * keep >= 1`, the pair at index `P = stored_at_prompt - distance` (in
    insertion order; `stored_at_prompt // 2` where that is below 1) leaves. All that stand from `P` on are thus a
    queue: the oldest leaves first, and the newcomer takes its slot.

    With slack, an answer ends with pairs beyond its row's share. A later prompt does not forgive them: they leave
    before anything of the new turn does, so that every answer has the same slack to itself.

    Where we differ from the published code: there the pair that leaves is still visible to the token that pushes it
    out; here it is overwritten before that token's attention, so a layer never holds one pair more than its share.

    Args:
        stored: pairs in the row after the prompt.
        seen: real tokens that the row was fed so far.
        keep: keep ratio of the layer, fraction kept in [0, 1]. At 1 nothing leaves.
        distance: P lies this many pairs before the prompt's end; at least 1. None: nothing leaves.
        point: P itself, instead of a distance: `sink` makes everything behind the sink a queue (StreamingLLM).
        slack: pairs that may be held beyond the share before one leaves (the papers: 0).
        owed: what the row before a later prompt owed, rising; these slots are emptied first.
    """

    __slots__ = ("debts", "keep", "paid", "point", "queue", "seen", "slack", "stored")

    def __init__(
        self,
        stored: int,
        seen: int,
        keep: float,
        owed: Iterable[int] = (),
        *,
        distance: int | None = None,
        point: int | None = None,
        slack: int = 0,
    ):
        self.stored, self.seen, self.keep, self.slack = stored, seen, keep, slack
        self.point: int | None = None
        self.queue: deque[int] = deque()
        self.debts: deque[int] = deque()
        self.paid = 0  # debts that have left
        if keep >= 1.0:
            return
        if point is not None:
            self.point = min(point, stored)
        elif distance is not None:
            self.point = stored - distance if stored - distance >= 1 else stored // 2
        if self.point is not None:
            self.debts.extend(slot for slot in owed if slot < self.point)
            self.queue.extend(range(self.point, stored))

    def next_slot(self) -> int | None:
        """Take in one more token and return the slot for its pair: the leaving pair's, or the first unused one."""
        self.seen += 1
        if (self.debts or self.queue) and self.stored + 1 - self.seen * self.keep >= 1 + self.slack:
            slot = self._pay() if self.debts else self.queue.popleft()
        else:
            slot = self.stored
            self.stored += 1
        if self.point is not None:
            self.queue.append(slot)
        return slot

    def copy(self) -> FixedPointEviction:
        """An independent continuation of the same row (a beam that splits)."""
        twin = FixedPointEviction(self.stored, self.seen, self.keep, slack=self.slack)
        twin.point, twin.queue, twin.debts, twin.paid = self.point, self.queue.copy(), self.debts.copy(), self.paid
        return twin

    def shortened(self, stored: int, removed: int) -> FixedPointEviction:
        """The row after its newest `removed` tokens were taken back and its `stored` pairs were put in order."""
        twin = FixedPointEviction(stored, max(stored, self.seen - removed), self.keep, slack=self.slack)
        if self.point is not None:
            twin.point = min(self.point, max(stored - 1, 0))
            twin.debts.extend(place for place in self._debts_in_order() if place < twin.point)
            twin.queue.extend(range(twin.point, stored))
        return twin

    def owed(self) -> tuple[int, ...]:
        """Pairs held beyond the share, which leave first once a later prompt is there: places in their order.

        As many as the slack at most: a layer that holds more because of its least length keeps that.
        """
        if self.point is None:
            return ()
        number = min(self.slack, int(max(0.0, self.stored - self.seen * self.keep)))
        return tuple([*self._debts_in_order(), *range(self.point, self.stored)][:number])

    def _pay(self) -> int:
        """The slot of the oldest debt. What stood behind it moves up, the fixed point with it."""
        assert self.point is not None, "a row in which nothing leaves has no debts"
        self.point, self.paid = self.point - 1, self.paid + 1
        return self.debts.popleft()

    def _debts_in_order(self) -> list[int]:
        """Places of the debts by position: each that has left moved those behind it down by one."""
        return [slot - self.paid for slot in self.debts]


class LeastImportantEviction:
    """The pair that has received least attention leaves; the layer, which holds the sums, knows which one that is.

    Args:
        stored: pairs in the row after the prompt.
        seen: real tokens that the row was fed so far.
        keep: keep ratio of the layer, fraction kept in [0, 1]. At 1 nothing leaves.
        owed: not looked at.
        slack: pairs that may be held beyond the share before one leaves (the paper: 0).
    """

    __slots__ = ("keep", "seen", "slack", "stored")

    def __init__(self, stored: int, seen: int, keep: float, owed: Iterable[int] = (), *, slack: int = 0):
        del owed  # what leaves first is for the attention received to say
        self.stored, self.seen, self.keep, self.slack = stored, seen, keep, slack

    def next_slot(self) -> int | None:
        """Take in one more token; return the first unused slot, or None: that of the least important pair."""
        self.seen += 1
        if self.keep < 1.0 and self.stored + 1 - self.seen * self.keep >= 1 + self.slack:
            return None
        self.stored += 1
        return self.stored - 1

    def copy(self) -> LeastImportantEviction:
        """An independent continuation of the same row (a beam that splits)."""
        return LeastImportantEviction(self.stored, self.seen, self.keep, slack=self.slack)

    def shortened(self, stored: int, removed: int) -> LeastImportantEviction:
        """The row after its newest `removed` tokens were taken back."""
        return LeastImportantEviction(stored, max(stored, self.seen - removed), self.keep, slack=self.slack)

    def owed(self) -> tuple[int, ...]:
        """Nothing: the least important pair leaves, of whichever turn it is."""
        return ()
