"""Candidates of assisted decoding, from the forward that brings them until they are confirmed or taken back.

They lie behind the pairs that a segment stores, in room that nothing uses; the pairs, the eviction policy and the sums
of observed attention stay as they are. Once it is known how many were right, those are stored one after another by the
very steps that unassisted decoding takes, and the others are forgotten.

Where a pair would leave on the way, each candidate sees what it would have seen as a step of its own: its attention is
then computed for itself, over the pairs that a trial of the same steps leaves. Who decides what is a candidate is
assisted.py; this module knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rules.masks import at_queries
from .call import AttentionCall, join_queries
from .segments import Segment, Shown
from .storage import Pairs


class Draft:
    """The candidates behind one segment's pairs.

    Args:
        segment: behind whose pairs they stand.
        keys, values: [batch, heads, n, head_dim], of the segment's key heads.
        seen: position of the first candidate.
    """

    def __init__(self, segment: Segment, keys: Tensor, values: Tensor, seen: int):
        self._segment, self._keys, self._values, self._seen = segment, keys, values, seen
        self._given: list[Tensor] = []  # by candidate: what it gives to the pairs, float32 [batch, heads, slots]

    @property
    def n(self) -> int:
        """Candidates."""
        return self._keys.shape[2]

    def show(self, own_mask: bool) -> Shown:
        """What the backend shall see: the pairs stored, and behind them the candidates.

        Args:
            own_mask: whether the mask must be remapped in any case.
        """
        segment = self._segment
        keys, values = segment.hold(self._keys, self._values)
        stored = segment.positions
        new = torch.arange(self._seen, self._seen + self.n, device=stored.device)
        ragged = segment.ragged or (own_mask and segment.in_place)  # where padding has its places, those are empty
        return Shown(
            segment.group,
            keys,
            values,
            own_mask or segment.needs_own_mask or ragged,
            ragged,
            torch.cat([stored, new.expand(*stored.shape[:2], -1)], dim=2),
            draft=self if segment.counts_received or segment.lets_go_within(self.n) else None,
        )

    def confirm(self, n: int) -> None:
        """Store the first `n` candidates, step by step, and what they have given; forget the others."""
        for step in range(n):
            key, value = (each[:, :, step : step + 1] for each in (self._keys, self._values))
            self._segment.append(key, value, self._seen + step)
            if self._given:
                self._segment.add_received(self._given[step], self._seen + step + 1)

    # Candidate by candidate.

    def attend(self, function: Callable, call: AttentionCall, shown: Shown) -> Any:
        """The attention of each candidate over what it would have seen as a decode step.

        Args:
            function: the model's own attention function.
            call: of the whole layer.
            shown: what `show` returned.

        Returns:
            What the function returns, of all candidates and of this segment's query heads.
        """
        held = Pairs(*_pairs_of(call, shown), positions=_known(shown.positions))
        trial, outputs = _Trial(self._segment, self.n, self._seen), []
        for step in range(self.n):
            columns = trial.step()
            pairs = held.take(columns)
            own = replace(
                call,
                query=call.query[:, :, step : step + 1],
                key=pairs.keys if shown.group is None else call.key,
                value=pairs.values if shown.group is None else call.value,
                mask=at_queries(call.mask, step, step + 1),
            )
            each = Shown(shown.group, pairs.keys, pairs.values, True, trial.ragged, pairs.positions)
            own = own.of_segment(each, call.key.shape[1])
            outputs.append(own.run(function))
            if self._segment.counts_received:
                # Layers that share their keys show the same candidates several times; they count once.
                if len(self._given) == step:
                    self._given.append(own.importance())
                trial.add_received(self._given[step])
        return join_queries(outputs)


class _Trial:
    """The decode steps of the candidates, taken on numbers of columns instead of keys and values.

    Args:
        segment: on whose state they are taken; it is not changed.
        n: candidates.
        seen: position of the first of them.
    """

    def __init__(self, segment: Segment, n: int, seen: int):
        self._stepper, self._width, self._seen = segment.copied_step(), segment.width, seen
        self._next, self._in_place = segment.width, segment.in_place
        positions = F.pad(segment.positions, (0, n), value=-1)
        received = segment.stored.received
        if received is not None:
            received = F.pad(received[..., : segment.width], (0, n))
            positions = positions.expand_as(received).clone()
        columns = torch.arange(segment.width, device=positions.device).expand(*positions.shape[:2], -1)
        columns = F.pad(columns, (0, n), value=-1)[..., None]
        self._pairs = Pairs(columns, columns.clone(), positions, received)

    def step(self) -> Tensor:
        """Take in the next candidate; return the column of each slot, int64 [batch, 1 or heads, slots], -1: none."""
        pairs = self._pairs
        column = pairs.keys.new_full((*pairs.keys.shape[:2], 1, 1), self._next)
        self._pairs, self._width, _ = self._stepper.append(pairs, self._width, column, column, self._seen)
        self._next, self._seen = self._next + 1, self._seen + 1
        self._pairs.write_positions()
        empty = self._pairs.positions[..., : self._width] < 0
        return self._pairs.keys[..., : self._width, 0].masked_fill(empty, -1)

    @property
    def ragged(self) -> bool:
        """Whether some of the columns are empty: rows hold different numbers of pairs, or padding has its places."""
        return self._in_place or len({row.stored for row in self._stepper.rows}) > 1

    def add_received(self, importance: Tensor) -> None:
        """As `Segment.add_received`."""
        self._pairs.add_received(importance)


def _pairs_of(call: AttentionCall, shown: Shown) -> tuple[Tensor, Tensor]:
    """Of a whole layer as they came to the attention, which in latent attention are not those that are stored."""
    if shown.group is None or shown.keys is None or shown.values is None:
        return call.key, call.value
    return shown.keys, shown.values


def _known(positions: Tensor | None) -> Tensor:
    assert positions is not None, "candidates are shown with their positions"
    return positions


def confirm_all(drafts: Sequence[Draft], n: int) -> None:
    """Store the first `n` candidates of each segment."""
    for draft in drafts:
        draft.confirm(n)
