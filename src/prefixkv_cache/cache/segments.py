"""A segment: the key heads of one layer that hold equally many pairs, in one buffer, with eviction state of its own.

A layer with one length has one segment; a layer with lengths by head has as many as there are different lengths. The
segment is told which columns of a prompt to keep; it computes no importance and knows no profile. Where heads keep keys
of their own, only positions differ from head to head: counts and slots do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..rules.merging import merge_pruned
from .decode import STEPS_PER_GROWTH, GrowingStep, PlannedStep, Policy, keep_address
from .heads import HeadGroup, Kept
from .storage import Pairs, PromptPairs, close_up, exact_prompt, in_order, without

T = TypeVar("T")


class AttendsByItself(Protocol):
    """Candidates of assisted decoding that cannot be attended to in one call; see draft.py."""

    def attend(self, function: Callable, call: Any, shown: Shown) -> Any:
        """What the attention function returns, of this segment."""
        ...


@dataclass(slots=True)
class Shown:
    """What the attention of one segment reads in one forward.

    Attributes:
        group: key heads; None: all.
        keys, values: [batch, heads, n_keys, head_dim]. None: those that the model got from `update`.
        own_mask: whether the mask must be remapped; if not, key i is token i.
        ragged: whether some of the keys are empty slots.
        positions: int64 [batch, 1 or heads, n_keys], the logical position of each key (-1: none). None: ask `segment`,
            which few steps need.
        segment: of a decode step.
        draft: computes the attention of candidates one by one, where each sees pairs of its own.
    """

    group: HeadGroup | None
    keys: Tensor | None = None
    values: Tensor | None = None
    own_mask: bool = False
    ragged: bool = False
    positions: Tensor | None = None
    segment: Segment | None = None
    draft: AttendsByItself | None = None

    def read_positions(self) -> Tensor:
        """The positions, looked up now where they were not taken."""
        if self.positions is not None:
            return self.positions
        assert self.segment is not None, "a prompt's positions are taken when it is shown"
        return self.segment.shown_positions


@dataclass(frozen=True)
class SegmentRule:
    """What all segments of a cache have in common.

    Attributes:
        policy: makes a row's eviction policy.
        recent: recency window of the least-important policy.
        sink: first pairs that are never the least important, and no anchors of a merge.
        merge: whether pruned pairs are merged into their nearest anchor.
        counts_received: whether the policy asks how much attention each pair has received.
        max_new_tokens: decode steps to plan for after each prompt; None: memory grows as it is needed.
        prompt_pairs: how pairs are stored that are kept of a prompt.
    """

    policy: Policy
    recent: float = 1
    sink: int = 1
    merge: bool = False
    counts_received: bool = False
    max_new_tokens: int | None = None
    prompt_pairs: PromptPairs = exact_prompt


class Segment:
    """Keys and values of some key heads of one layer.

    Args:
        heads: which key heads; None: all of the layer.
        rule: what all segments of the cache have in common.

    Attributes:
        group: its key heads; None: all of the layer.
        pairs: the buffers; None before the first prompt was pruned.
        width: slots in use, by the longest row.
        in_place: whether slot i holds position i in every row, so that a mask needs no remapping.
    """

    def __init__(self, heads: tuple[int, ...] | None, rule: SegmentRule):
        self.group, self._rule = None if heads is None else HeadGroup(heads), rule
        self.pairs: Pairs | None = None
        self.width = 0
        self.in_place = True
        self._step = self._growing([])
        self.plan: PlannedStep | None = None
        self._received_at = -1  # seen, when `add_received` was last called

    def _growing(self, rows: Sequence[Any]) -> GrowingStep:
        return GrowingStep(rows, self._rule.recent, self._rule.sink)

    @property
    def stored(self) -> Pairs:
        """The buffers, once there are any."""
        assert self.pairs is not None, "a segment is read only after its first prompt was pruned"
        return self.pairs

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.stored.batch_size

    @property
    def keys(self) -> Tensor:
        """[batch, heads, width, head_dim]."""
        return self.stored.keys.narrow(2, 0, self.width)

    @property
    def values(self) -> Tensor:
        """[batch, heads, width, head_dim]."""
        return self.stored.values.narrow(2, 0, self.width)

    @property
    def positions(self) -> Tensor:
        """int64 [batch, 1 or heads, width], -1 where a slot holds nothing."""
        self.stored.write_positions()
        return self.stored.positions[:, :, : self.width]

    @property
    def shown_positions(self) -> Tensor:
        """Like `positions`, of all the slots that the backend sees in the current step."""
        return self.positions if self.plan is None else self.stored.positions

    @property
    def ragged(self) -> bool:
        """Whether some of the slots that the backend sees hold nothing: rows of different lengths, steps to come."""
        return self.plan is not None or len({row.stored for row in self._step.rows}) > 1

    @property
    def needs_own_mask(self) -> bool:
        """Whether the pairs that the backend sees differ from the tokens that the model's mask speaks of."""
        return self.plan is not None or not self.in_place

    def of_rows(self, name: str, before: T, batch: int | None = None) -> list[T]:
        """An attribute of every row's eviction policy, or what it is before the first prompt."""
        found = [getattr(row, name) for row in self._step.rows] or [before]
        return found if len(found) > 1 else found * (self.batch_size if batch is None else batch)

    def own(self, tensor: Tensor) -> Tensor:
        """The part of a layer's [batch, heads, ...] that belongs to this segment."""
        return tensor if self.group is None else self.group.take(tensor)

    # A prompt.

    def prune(self, prompt: Pairs, n_new: int, kept: Kept, valid: Tensor | None, lengths: list[int], seen: int) -> None:
        """Keep some of a prompt's tokens, and all pairs of earlier turns within their share.

        Args:
            prompt: pairs of earlier turns and behind them the new ones, with their positions.
            n_new: tokens in this prompt, padding included.
            kept: what to keep of them.
            valid: bool [batch, n_new], False at padding. None: no padding.
            lengths: valid tokens of each row.
            seen: tokens seen by now, padding included.
        """
        batch, n_old = len(lengths), prompt.positions.shape[2] - n_new
        if kept.whole and self.in_place:
            columns, held = _in_place(prompt.positions, valid), [n_old + n_new] * batch
            self._begin(prompt, columns, held, lengths, kept.ratios, seen)
            return
        if self._rule.merge:
            self._merge(prompt, n_old, kept, valid)
        columns = (kept.columns + n_old).masked_fill_(kept.columns < 0, -1)
        heads = max(columns.shape[1], prompt.positions.shape[1])
        columns = columns.expand(-1, heads, -1)
        rows = self._step.rows if len(self._step.rows) != 1 else list(self._step.rows) * batch
        leaving = [range(0)] * batch
        if rows:
            leaving = [row.leaving_for(*new) for row, *new in zip(rows, kept.counts, lengths, strict=True)]
        if n_old:
            old = without(in_order(prompt.positions[..., :n_old]), leaving)
            columns = close_up(torch.cat([old.expand(-1, heads, -1), columns], dim=2))
        before = self.of_rows("stored", 0, batch)
        held = [old - len(left) + new for old, left, new in zip(before, leaving, kept.counts, strict=True)]
        self._begin(prompt, columns, held, lengths, kept.ratios, seen)

    def _begin(
        self, prompt: Pairs, columns: Tensor, held: list[int], lengths: list[int], ratios: list[float], seen: int
    ) -> None:
        """Go on from these columns of a prompt, `held` of them in each row."""
        batch = len(lengths)
        fed = [old + new for old, new in zip(self.of_rows("seen", 0, batch), lengths, strict=True)]
        self.width = max(held)
        states = list(zip(held, fed, ratios, self.of_rows("origin", None, batch), strict=True))
        states = states[:1] if len(set(states)) == 1 else states
        self._step = self._growing([self._rule.policy(*state) for state in states])
        self.plan = None
        self.in_place = self.in_place and self.width == seen and not self.ragged
        self._rebuild(prompt, columns[..., : self.width], self._rule.max_new_tokens, seen)

    def _merge(self, prompt: Pairs, n_old: int, kept: Kept, valid: Tensor | None) -> None:
        sink = 0 if n_old else self._rule.sink  # the sink is the first prompt's
        old_keys, old_values = prompt.keys[:, :, :n_old], prompt.values[:, :, :n_old]
        keys, values = merge_pruned(
            prompt.keys[:, :, n_old:], prompt.values[:, :, n_old:], kept.columns, valid=valid, sink=sink
        )
        prompt.keys = torch.cat([old_keys, keys], dim=2) if n_old else keys
        prompt.values = torch.cat([old_values, values], dim=2) if n_old else values

    def _rebuild(self, source: Pairs, columns: Tensor, n_steps: int | None, seen: int) -> None:
        """New buffers of these columns, with room for `n_steps` decode steps if that is known.

        Otherwise there is no spare room: while a prompt runs, all layers hold theirs beside one whole prompt.
        """
        if n_steps is None:
            self.pairs = source.take(columns)
            return
        self.plan = PlannedStep(self._step.rows, n_steps, seen, columns.device)
        self.pairs = source.take(columns, self.plan.capacity - self.width)
        for tensor in (self.pairs.keys, self.pairs.values, self.pairs.positions):
            keep_address(tensor)

    # Decoding.

    def append(self, keys: Tensor, values: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Write one token's pair, [batch, heads, 1, head_dim]; return what the backend shall see."""
        pairs = self.stored
        if self.plan is not None:
            self.plan.append(pairs, keys, values)
            return pairs.keys.view_as(pairs.keys), pairs.values.view_as(pairs.values)
        if pairs.frozen:
            pairs = pairs.grown(0)
        self.pairs, self.width, slots = self._step.append(pairs, self.width, keys, values, seen)
        self.in_place = self.in_place and bool(slots) and min(slots) == seen
        return self.keys, self.values

    # Candidates of assisted decoding (draft.py).

    @property
    def counts_received(self) -> bool:
        """Whether the policy asks how much attention each pair has received."""
        return self._rule.counts_received

    def lets_go_within(self, n: int) -> bool:
        """Whether any pair leaves for the next `n` tokens."""
        rows = [row.copy() for row in self._step.rows]
        return any(row.next_slot() != stored for row in rows for stored in range(row.stored, row.stored + n))

    def copied_step(self) -> GrowingStep:
        """The coming steps, to be taken on trial."""
        return self._growing([row.copy() for row in self._step.rows])

    def hold(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write candidates, [batch, heads, n, head_dim], behind the pairs; return both. Nothing else is changed."""
        width = self.width + keys.shape[2]
        if width > self.stored.capacity or self.stored.frozen:
            room = max(width, self.width + STEPS_PER_GROWTH)
            self.pairs = self.stored.grown(max(0, room - self.stored.capacity))
        self.stored.write_behind(self.width, keys, values)
        return self.stored.keys.narrow(2, 0, width), self.stored.values.narrow(2, 0, width)

    def catch_up(self, steps: int) -> None:
        """Take note, on the host, of steps that a plan took on the device."""
        for _ in range(steps):
            slots = [row.next_slot() for row in self._step.rows]
            self.width = max(self.width, *(slot + 1 for slot in slots if slot is not None))

    def drop_plan(self) -> None:
        """Go on with growing memory: the planned steps are used up."""
        self.plan = None
        self.in_place = self.in_place and all(row.growing for row in self._step.rows)

    def add_received(self, importance: Tensor, seen: int) -> None:
        """Add what each pair has received from the newest tokens, float32 [batch, heads, width].

        Layers that share their keys show the same step several times; it counts once.
        """
        if self.stored.received is None or self._received_at == seen:
            return
        self._received_at = seen
        self.stored.add_received(importance)

    def received_with(self, scores: Tensor | None, keys: Tensor) -> Tensor:
        """Attention received by the stored pairs, then by a prompt's: float32 [batch, 1 or heads, width + n_new].

        Args:
            scores: float32 [batch, 1 or kv_heads, n_new], of the prompt; None: nothing is pruned, so nobody asked.
            keys: [batch, kv_heads, n_new, head_dim], of the prompt.
        """
        new = torch.zeros(len(keys), 1, keys.shape[2], device=keys.device) if scores is None else scores
        new = self.own(new) if new.shape[1] > 1 else new
        if self.pairs is None or self.pairs.received is None:
            return new
        old = self.pairs.received[..., : self.width]
        heads = max(old.shape[1], new.shape[1])
        return torch.cat([old.expand(-1, heads, -1), new.expand(-1, heads, -1)], dim=2)

    # Operations on the batch, and taking tokens back.

    def select_rows(self, indices: Tensor, seen: int) -> None:
        """Keep the rows at `indices`, int64, in that order."""
        pairs, left = self.stored, self._steps_left(seen)
        self.pairs = pairs.rows(indices.to(pairs.device))
        if len(self._step.rows) > 1:
            self._step = self._growing([self._step.rows[row].copy() for row in indices.tolist()])
            # Without the longest rows, the slots that only they used are spare.
            self.width = max((row.stored for row in self._step.rows), default=0)
        if left is not None or self.pairs.capacity - self.width > STEPS_PER_GROWTH:
            slots = torch.arange(self.width, device=self.pairs.device)
            self._rebuild(self.pairs, slots.expand(*self.pairs.positions.shape[:2], -1), left, seen)

    def held_before(self, end: int) -> Tensor:
        """int64 [batch, 1 or heads]: pairs of tokens before position `end`."""
        return ((self.positions >= 0) & (self.positions < end)).sum(2)

    def crop(self, end: int, removed: int, seen: int) -> None:
        """Take back the tokens from position `end` on. Pairs that left for them do not come back."""
        left = self._steps_left(seen)
        positions = self.positions.masked_fill(self.positions >= end, -1)
        if self.in_place:
            held = [end] * self.batch_size
            columns = _in_place(positions[..., :end], None)
        else:
            held, columns = self.held_before(end)[:, 0].tolist(), in_order(positions)
        rows = self._step.rows if len(self._step.rows) == len(held) else list(self._step.rows) * len(held)
        self._step = self._growing([row.shortened(stored, removed) for row, stored in zip(rows, held, strict=True)])
        self.width = max(held)
        self._rebuild(self.stored, columns[..., : self.width], None if left is None else left + removed, end)

    def _steps_left(self, seen: int) -> int | None:
        """Decode steps that the plan still knows; None where there is no plan."""
        return None if self.plan is None else self.plan.last - seen


def _in_place(positions: Tensor, valid: Tensor | None) -> Tensor:
    """The columns of pairs that stay where they are, int64 like `positions`, -1 where they are no valid token's.

    Args:
        positions: int64 [batch, 1 or heads, n].
        valid: bool [batch, n_new], of the last tokens. None: all are.
    """
    columns = torch.arange(positions.shape[2], device=positions.device).expand_as(positions)
    columns = columns.masked_fill(positions < 0, -1)
    if valid is not None:
        n_new = valid.shape[1]
        columns[..., -n_new:] = columns[..., -n_new:].masked_fill(~valid[:, None], -1)
    return columns
