"""Decode-time eviction: where the next pair goes, and which pair leaves for it. One policy object a row.

How many leave is the same for all rules: a row that would hold one pair more than its share of the tokens seen, and its
headroom, lets one go. Which one is the rule's own: `QueueEviction` is the fixed point of Elastic Cache (arXiv
2407.18121, section 3.3) and PrefixKV, `LeastImportantEviction` that of H2O (arXiv 2306.14048, algorithm 1),
`WindowEviction` ours for layers with a sliding window. Plain integers: no tensor is touched here. A slot is a place in
memory; keys were rotated before they were stored, so a pair can lie in any slot.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Protocol


class Eviction(Protocol):
    """What a segment asks of a row's policy.

    Attributes:
        stored: pairs a head holds in this row.
        seen: valid tokens that the row was fed so far.
        keep: keep ratio, fraction kept in [0, 1].
        headroom: pairs that may be held beyond the share.
    """

    stored: int
    seen: int
    keep: float
    headroom: int

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

    def leaving_for(self, n_kept: int, n_new: int) -> range:
        """Pairs that leave when a prompt of `n_new` tokens comes, of which `n_kept` stay: places in position order."""
        ...

    @property
    def allowance(self) -> int:
        """Tokens of the next prompt that may be kept beyond the share."""
        ...

    @property
    def growing(self) -> bool:
        """Whether pairs only come."""
        ...


@dataclass(slots=True)
class QueueEviction:
    """The pair at one fixed index leaves, one decode step after another.

    After a prompt the row holds K pairs a head in slots `0 .. K - 1`, in the order of their positions. Each step adds a
    pair; if then `stored - seen * keep >= 1 + headroom`, the pair at index `P` (in insertion order) leaves. All that
    stand from `P` on are thus a queue: the oldest leaves first, and the newcomer takes its slot.

    With headroom an answer ends with pairs beyond its row's share. As many leave when the next turn begins, of all that
    came behind the first prompt the oldest, so that every turn has the headroom to itself: up to half of it for the
    prompt, which is a short question mostly and lost if it is pruned like a picture, and the rest for the answer. A
    prompt in chunks is one prompt, not several turns.

    Where we differ from the published code: there the pair that leaves is still visible to the token that pushes it
    out; here it is overwritten before that token's attention, so a row never holds one pair more than its share.

    Args:
        stored: K, pairs a head holds after the prompt.
        seen: valid tokens that the row was fed so far.
        keep: keep ratio, fraction kept in [0, 1]. At 1 nothing leaves.
        point: P; None: nothing leaves.
        headroom: pairs that may be held beyond the share before one leaves (the papers: 0).
        first_origin: `origin` of the row before this prompt.
    """

    stored: int
    seen: int
    keep: float
    point: int | None = None
    headroom: int = 0
    first_origin: int | None = None
    began: int = -1  # tokens seen when decoding began
    queue: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if self.began < 0:
            self.began = self.seen
        if self.keep >= 1.0 or self.point is None:
            self.point = None
        else:
            self.point = min(self.point, self.stored)
            self.queue = self.queue or deque(range(self.point, self.stored))

    def next_slot(self) -> int:
        """Take in one more token and return the slot for its pair: the leaving pair's, or the first unused one."""
        self.seen += 1
        if self.queue and self.stored + 1 - self.seen * self.keep >= 1 + self.headroom:
            slot = self.queue.popleft()
        else:
            slot = self.stored
            self.stored += 1
        if self.point is not None:
            self.queue.append(slot)
        return slot

    def copy(self) -> QueueEviction:
        """An independent continuation of the same row."""
        return replace(self, queue=self.queue.copy())

    def shortened(self, stored: int, removed: int) -> QueueEviction:
        """The row after its newest `removed` tokens were taken back and its `stored` pairs were put in order."""
        seen = max(stored, self.seen - removed)
        return QueueEviction(
            stored,
            seen,
            self.keep,
            None if self.point is None else min(self.point, max(stored - 1, 0)),
            self.headroom,
            None if self.first_origin is None else min(self.first_origin, stored),
            min(self.began, seen),
        )

    @property
    def origin(self) -> int | None:
        """Place, in the order of positions, where the first answer begins; None: no turn has ended yet."""
        return self.point if self.first_origin is None and self.seen > self.began else self.first_origin

    def leaving_for(self, n_kept: int, n_new: int) -> range:
        """Pairs held beyond the share leave when the next turn begins, whatever comes.

        As many as the headroom at most: a row that holds more because of its least length keeps that.
        """
        del n_kept, n_new
        if self.origin is None or self.seen <= self.began:
            return range(0)
        number = min(self.headroom, int(max(0.0, self.stored - self.seen * self.keep)))
        return range(self.origin, min(self.origin + number, self.stored))

    @property
    def allowance(self) -> int:
        """Tokens of the next prompt that may be kept beyond the share."""
        return self.headroom // 2 if self.seen > self.began else 0

    @property
    def growing(self) -> bool:
        """Whether pairs only come."""
        return self.point is None


@dataclass(slots=True)
class WindowEviction:
    """The oldest pair leaves, of a layer with a sliding window: pairs that it has moved past go first.

    The share is one of the window: the tokens that count are those that the next one may see.

    Args:
        stored: pairs a head holds after the prompt.
        seen: valid tokens that the row was fed so far.
        keep: keep ratio, fraction kept in [0, 1].
        reach: earlier tokens that a token sees at most: the window without the token itself.
        headroom: pairs that may be held beyond the share; never more than the window holds.
    """

    stored: int
    seen: int
    keep: float
    reach: int
    headroom: int = 0
    began: int = -1  # tokens seen when decoding began
    queue: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if self.began < 0:
            self.began = self.seen
        self.headroom = min(self.headroom, self.reach - int(self.keep * self.reach))
        self.queue = self.queue or deque(range(self.stored))

    def next_slot(self) -> int:
        """Take in one more token and return the slot for its pair: the oldest pair's, or the first unused one."""
        self.seen += 1
        if self.queue and self.stored + 1 - self._share(self.seen) >= 1 + self.headroom:
            slot = self.queue.popleft()
        else:
            slot = self.stored
            self.stored += 1
        self.queue.append(slot)
        return slot

    def _share(self, seen: int) -> float:
        return min(seen, self.reach) * self.keep

    def copy(self) -> WindowEviction:
        """An independent continuation of the same row."""
        return replace(self, queue=self.queue.copy())

    def shortened(self, stored: int, removed: int) -> WindowEviction:
        """The row after its newest `removed` tokens were taken back and its `stored` pairs were put in order."""
        seen = max(stored, self.seen - removed)
        return WindowEviction(stored, seen, self.keep, self.reach, self.headroom, min(self.began, seen))

    @property
    def origin(self) -> None:
        """None: the oldest pair leaves, of whichever turn it is."""

    def leaving_for(self, n_kept: int, n_new: int) -> range:
        """Pairs that leave when a prompt comes: the oldest, as many as there are then beyond share and headroom."""
        allowed = int(self._share(self.seen + n_new)) + self.headroom
        return range(min(self.stored, max(0, self.stored + n_kept - allowed)))

    @property
    def allowance(self) -> int:
        """Tokens of the next prompt that may be kept beyond the share."""
        return self.headroom // 2 if self.seen > self.began else 0

    @property
    def growing(self) -> bool:
        """Whether pairs only come: never for good."""
        return False


@dataclass(slots=True)
class LeastImportantEviction:
    """The pair that has received least attention leaves; the segment, which holds the sums, knows which one that is.

    Args:
        stored: pairs a head holds after the prompt.
        seen: valid tokens that the row was fed so far.
        keep: keep ratio, fraction kept in [0, 1]. At 1 nothing leaves.
        headroom: pairs that may be held beyond the share before one leaves (the paper: 0).
    """

    stored: int
    seen: int
    keep: float
    headroom: int = 0

    def next_slot(self) -> int | None:
        """Take in one more token; return the first unused slot, or None: that of the least important pair."""
        self.seen += 1
        if self.keep < 1.0 and self.stored + 1 - self.seen * self.keep >= 1 + self.headroom:
            return None
        self.stored += 1
        return self.stored - 1

    def copy(self) -> LeastImportantEviction:
        """An independent continuation of the same row."""
        return replace(self)

    def shortened(self, stored: int, removed: int) -> LeastImportantEviction:
        """The row after its newest `removed` tokens were taken back."""
        return LeastImportantEviction(stored, max(stored, self.seen - removed), self.keep, self.headroom)

    @property
    def origin(self) -> None:
        """None: the least important pair leaves, of whichever turn it is."""

    def leaving_for(self, n_kept: int, n_new: int) -> range:
        """None leave between turns."""
        del n_kept, n_new
        return range(0)

    @property
    def allowance(self) -> int:
        """0: what is held beyond the share does not leave between turns."""
        return 0

    @property
    def growing(self) -> bool:
        """Whether pairs only come."""
        return self.keep >= 1.0


def fixed_point(stored: int, distance: int | None) -> int | None:
    """P, the index from which pairs leave: `distance` before the prompt's end, the middle where that is below 1."""
    if distance is None:
        return None
    return stored - distance if stored - distance >= 1 else stored // 2
