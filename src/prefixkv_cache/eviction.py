"""Where the next pair goes while decoding, and which pair leaves for it: one small machine for each row of a layer.

The count is the same for all rules: a layer that would hold one pair more than its share of the tokens seen, and some
slack if there is any, lets one go. Which one is the rule's own: `FixedPointEviction` is that of Elastic Cache (arXiv
2407.18121, section 3.3) and PrefixKV, `LeastImportantEviction` that of H2O (arXiv 2306.14048, algorithm 1). Plain
integers: no tensor is touched here, the layer writes to the slot that it is given. Slots are places in memory; rotary
angles were applied before the keys were stored, so a pair can lie in any slot.
"""

from __future__ import annotations

from collections import deque
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

    @property
    def origin(self) -> int | None:
        """Place, in the order of positions, where the first answer begins; None: no turn has ended yet."""
        ...

    @property
    def beyond(self) -> range:
        """Pairs held beyond the share, which leave when the next turn begins: places in the order of positions."""
        ...

    @property
    def allowance(self) -> int:
        """Tokens of the next prompt that may be kept beyond the share."""
        ...


class FixedPointEviction:
    """The pair at one fixed index leaves, one decode step after another.

    After a prompt the layer holds `stored` pairs in slots `0 .. stored - 1`, in the order of their positions. Each
    step adds a pair; if then `stored - seen * keep >= 1`, the pair at index `P = stored_at_prompt - distance` (in
    insertion order; `stored_at_prompt // 2` where that is below 1) leaves. All that stand from `P` on are thus a
    queue: the oldest leaves first, and the newcomer takes its slot.

    With slack, an answer ends with pairs beyond its row's share. As many leave when the next turn begins, of all that
    came behind the first prompt the oldest, so that every turn has the slack to itself: up to half of it for the
    prompt, which is a short question mostly and lost if it is pruned like a picture, and the rest for the answer. A
    prompt in chunks is one prompt, not several turns.

    Where we differ from the published code: there the pair that leaves is still visible to the token that pushes it
    out; here it is overwritten before that token's attention, so a layer never holds one pair more than its share.

    Args:
        stored: pairs in the row after the prompt.
        seen: real tokens that the row was fed so far.
        keep: keep ratio of the layer, fraction kept in [0, 1]. At 1 nothing leaves.
        distance: P lies this many pairs before the prompt's end; at least 1. None: nothing leaves.
        point: P itself, instead of a distance: `sink` makes everything behind the sink a queue (StreamingLLM).
        slack: pairs that may be held beyond the share before one leaves (the papers: 0).
        origin: that of the row before this prompt.
    """

    __slots__ = ("_origin", "began", "keep", "point", "queue", "seen", "slack", "stored")

    def __init__(
        self,
        stored: int,
        seen: int,
        keep: float,
        origin: int | None = None,
        *,
        distance: int | None = None,
        point: int | None = None,
        slack: int = 0,
    ):
        self.stored, self.seen, self.keep, self.slack = stored, seen, keep, slack
        self._origin, self.began = origin, seen  # decoding begins here
        self.point: int | None = None
        self.queue: deque[int] = deque()
        if keep >= 1.0:
            return
        if point is not None:
            self.point = min(point, stored)
        elif distance is not None:
            self.point = stored - distance if stored - distance >= 1 else stored // 2
        if self.point is not None:
            self.queue.extend(range(self.point, stored))

    def next_slot(self) -> int | None:
        """Take in one more token and return the slot for its pair: the leaving pair's, or the first unused one."""
        self.seen += 1
        if self.queue and self.stored + 1 - self.seen * self.keep >= 1 + self.slack:
            slot = self.queue.popleft()
        else:
            slot = self.stored
            self.stored += 1
        if self.point is not None:
            self.queue.append(slot)
        return slot

    def copy(self) -> FixedPointEviction:
        """An independent continuation of the same row (a beam that splits)."""
        twin = FixedPointEviction(self.stored, self.seen, self.keep, slack=self.slack)
        twin._origin, twin.began, twin.point, twin.queue = self._origin, self.began, self.point, self.queue.copy()
        return twin

    def shortened(self, stored: int, removed: int) -> FixedPointEviction:
        """The row after its newest `removed` tokens were taken back and its `stored` pairs were put in order."""
        twin = FixedPointEviction(stored, max(stored, self.seen - removed), self.keep, slack=self.slack)
        twin._origin, twin.began = None if self._origin is None else min(self._origin, stored), self.began
        if self.point is not None:
            twin.point = min(self.point, max(stored - 1, 0))
            twin.queue.extend(range(twin.point, stored))
        return twin

    @property
    def origin(self) -> int | None:
        """Place, in the order of positions, where the first answer begins; None: no turn has ended yet."""
        return self.point if self._origin is None and self.seen > self.began else self._origin

    @property
    def beyond(self) -> range:
        """Pairs held beyond the share, which leave when the next turn begins: places in the order of positions.

        As many as the slack at most: a row that holds more because of its least length keeps that.
        """
        if self.origin is None or self.seen <= self.began:
            return range(0)
        number = min(self.slack, int(max(0.0, self.stored - self.seen * self.keep)))
        return range(self.origin, min(self.origin + number, self.stored))

    @property
    def allowance(self) -> int:
        """Tokens of the next prompt that may be kept beyond the share."""
        return self.slack // 2 if self.seen > self.began else 0


class LeastImportantEviction:
    """The pair that has received least attention leaves; the layer, which holds the sums, knows which one that is.

    Args:
        stored: pairs in the row after the prompt.
        seen: real tokens that the row was fed so far.
        keep: keep ratio of the layer, fraction kept in [0, 1]. At 1 nothing leaves.
        slack: pairs that may be held beyond the share before one leaves (the paper: 0).
        origin: not looked at.
    """

    __slots__ = ("keep", "seen", "slack", "stored")

    def __init__(self, stored: int, seen: int, keep: float, origin: int | None = None, *, slack: int = 0):
        del origin  # all turns are alike
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

    @property
    def origin(self) -> None:
        """None: the least important pair leaves, of whichever turn it is."""

    @property
    def beyond(self) -> range:
        """None: the least important pair leaves, of whichever turn it is."""
        return range(0)

    @property
    def allowance(self) -> int:
        """None: what is held beyond the share does not leave between turns."""
        return 0

    def shortened(self, stored: int, removed: int) -> LeastImportantEviction:
        """The row after its newest `removed` tokens were taken back."""
        return LeastImportantEviction(stored, max(stored, self.seen - removed), self.keep, slack=self.slack)
