"""One pruned layer: it stores a prompt, is pruned once, and then decodes in place.

Behaviour lives here, `cache.py` is a list of these. The layer owns one buffer for keys and one for values, with spare
room behind the stored pairs, and for each slot the logical position of its pair. *Seen* (tokens the model was fed,
what transformers asks for) and *stored* (pairs held) are two numbers. The layer is told which columns of a prompt to
keep; it computes no importance and knows no profile. Where heads keep keys of their own, only positions differ from
head to head: counts and slots do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .compat import MaxLengthNames, explain_crop, n_queries
from .eviction import Eviction, FixedPointEviction, LeastImportantEviction
from .merging import merge_pruned
from .schedule import Schedule, keep_address

T = TypeVar("T")

STEPS_PER_GROWTH = 64
"""Where the number of decode steps is not known beforehand, buffers grow by what so many steps need: growing copies a
layer, so it costs at most two in 64 of reading it, whatever its length."""


@dataclass
class Prompt:
    """A prompt on its way through a layer: from `update` until the layer is pruned.

    Attributes:
        keys, values: [batch, heads, stored + n_new, head_dim], what the backend sees: pairs of earlier turns, then
            the new ones.
        n_new: tokens in this prompt, padding included.
        attended: whether the attention call of this prompt was seen at the door.
        scores: float32 [batch, 1 or heads, n_new], by which keys are kept; None if not needed or not known yet.
        real: bool [batch, n_new], False at padding; None: no padding.
        image: bool [batch, n_new], True at image tokens; None: nothing is known of images.
        lengths: real tokens of each row.
    """

    keys: Tensor
    values: Tensor
    n_new: int
    attended: bool = False
    scores: Tensor | None = None
    real: Tensor | None = None
    image: Tensor | None = None
    lengths: list[int] = field(default_factory=list)


@dataclass
class Buffers:
    """Where a layer's pairs lie: slots in use first, spare ones behind them.

    Attributes:
        keys, values: [batch, heads, capacity, head_dim]; finite numbers in every slot, also where it holds nothing.
        positions: int64 [batch, 1 or heads, capacity], the logical position of each slot's pair, -1 where a slot holds
            nothing; one row for all heads unless they keep keys of their own.
        scores: float32 like `positions`, attention received so far; only where the decode rule asks for it.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None = None

    def take(self, columns: Tensor, spare: int = 0) -> Buffers:
        """New buffers of these columns, int64 [batch, 1 or heads, n], -1: slots that hold nothing; and spare ones."""
        index = F.pad(columns, (0, spare), value=-1)
        empty = index < 0
        # Slots that hold nothing become copies of the first pair: what is masked out must still be a finite number.
        index.clamp_min_(0)
        positions = self.positions.expand(-1, index.shape[1], -1).gather(2, index).masked_fill_(empty, -1)
        scores = self.scores
        if scores is not None:
            scores = scores.expand(-1, index.shape[1], -1).gather(2, index).masked_fill_(empty, 0.0)
        return Buffers(_take(self.keys, index), _take(self.values, index), positions, scores)

    def rows(self, indices: Tensor) -> Buffers:
        """New buffers of these rows, int64 [n]."""
        scores = None if self.scores is None else self.scores.index_select(0, indices)
        keys, values, positions = (each.index_select(0, indices) for each in (self.keys, self.values, self.positions))
        return Buffers(keys, values, positions, scores)

    def grown(self, spare: int) -> Buffers:
        """The same pairs with so many more slots behind them."""
        scores = None if self.scores is None else F.pad(self.scores, (0, spare))
        keys, values = (F.pad(each, (0, 0, 0, spare)) for each in (self.keys, self.values))
        return Buffers(keys, values, F.pad(self.positions, (0, spare), value=-1), scores)


class PrunedLayer(MaxLengthNames, CacheLayerMixin):
    """Keys and values of one decoder layer, pruned to a length of its own.

    Args:
        evict: makes a row's decode rule of its `(stored, seen, keep, origin)`; see eviction.py. By default nothing
            leaves.
        recent: share of a row's pairs, in [0, 1), that are its newest and never the least important.
        sink: number of first pairs that are never the least important.
        merge: `"kv"`: pruned pairs are merged into the nearest that stays (merging.py), `"value"`: their values only;
            None: nothing is.
        merge_shift: see `merge_pruned`.
        max_new_tokens: so many decode steps after a prompt find their memory allocated and their slots decided, see
            schedule.py. None: memory grows as it is needed.
    """

    is_sliding = False
    is_croppable = False

    @property
    def is_compileable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether decode steps have fixed shapes and addresses."""
        return self.max_new_tokens is not None

    def __init__(
        self,
        evict: Callable[[int, int, float, int | None], Eviction] = FixedPointEviction,
        *,
        recent: float = 0.0,
        sink: int = 0,
        merge: str | None = None,
        merge_shift: int = 0,
        max_new_tokens: int | None = None,
    ):
        self.max_new_tokens = max_new_tokens
        self._evict, self._recent, self._sink = evict, recent, sink
        self._merge, self.merge_shift = merge, merge_shift
        self._clear()

    def _clear(self) -> None:
        self._buffers: Buffers | None = None
        self._rows: list[Eviction] = []  # one for each row, or one for all where all have the same numbers
        self._width = 0  # slots in use, by the longest row
        self._in_place = True  # slot i holds position i in every row, so that a mask needs no remapping
        self._unwritten: dict[int, int] = {}  # slot -> position: not yet written to the buffers, which few steps read
        self._schedule: Schedule | None = None
        self._seen = 0
        self._accumulated = -1  # seen, when `accumulate` was last called
        self.prompt: Prompt | None = None
        self.is_initialized = False

    @property
    def seen(self) -> int:
        """Tokens seen, padding included."""
        self._catch_up()
        return self._seen

    def _catch_up(self) -> None:
        """Take note, on the host, of the steps that a schedule took on the device."""
        if self._schedule is None or torch.compiler.is_compiling():
            return
        for _ in range(self._schedule.steps_taken()):
            slots = [row.next_slot() for row in self._rows]
            self._width = max(self._width, *(slot + 1 for slot in slots if slot is not None))
            self._seen += 1

    # What transformers reads.

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[batch, heads, stored, head_dim], or None before the first prompt."""
        if self.prompt is not None:
            return self.prompt.keys
        self._catch_up()
        return None if self._buffers is None else self._buffers.keys.narrow(2, 0, self._width)

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[batch, heads, stored, head_dim], or None before the first prompt."""
        if self.prompt is not None:
            return self.prompt.values
        self._catch_up()
        return None if self._buffers is None else self._buffers.values.narrow(2, 0, self._width)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: where the next token's position starts.

        While steps go by a schedule, this is an int64 tensor [] on the device, as it is in transformers' static layers.
        """
        return self._seen if self._schedule is None else self._schedule.seen  # pyright: ignore[reportReturnType]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask, in logical columns; the layer takes its own columns at the door."""
        if self._schedule is not None and n_queries(query_length) == 1:
            return self._schedule.last, 0
        return self.seen + n_queries(query_length), 0

    @property
    def batch_size(self) -> int:
        """Rows of the batch, 0 before the first prompt."""
        return 0 if self.keys is None else self.keys.shape[0]

    @property
    def stored(self) -> int:
        """Pairs held, by the longest row; a prompt that is not pruned yet counts whole."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value tensors that are allocated, spare room included."""
        held = [pairs for pairs in (self.prompt, self._buffers) if pairs is not None]
        tensors = [tensor for pairs in held for tensor in (pairs.keys, pairs.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def ragged(self) -> bool:
        """Whether some of the slots that the backend sees hold nothing: rows of different lengths, steps to come."""
        return self.by_schedule or (len(self._rows) > 1 and len({row.stored for row in self._rows}) > 1)

    @property
    def keep_ratios(self) -> list[float]:
        """Keep ratio of each row, fraction kept; empty before the first prompt was pruned."""
        return self._per_row("keep", 0.0) if self._rows else []

    @property
    def allowances(self) -> list[int]:
        """Tokens of a later prompt that each row may keep beyond its share."""
        return self._per_row("allowance", 0)

    def slot_positions(self) -> Tensor:
        """The logical position of the pair in each slot, -1 where a slot holds nothing.

        Returns:
            int64 [batch, 1, stored]; [batch, heads, stored] where heads keep keys of their own.
        """
        stored = (
            torch.empty(0, 1, 0, dtype=torch.int64) if self._buffers is None else self._stored_positions(self._buffers)
        )
        if self.prompt is None:
            return stored
        new = torch.arange(self.seen - self.prompt.n_new, self.seen, device=self.prompt.keys.device)
        new = new.expand(self.batch_size, stored.shape[1], -1)
        return new if self._buffers is None else torch.cat([stored, new], dim=2)

    def _stored_positions(self, buffers: Buffers) -> Tensor:
        self._catch_up()
        self._write_positions(buffers)
        return buffers.positions[:, :, : self._width]

    def _write_positions(self, buffers: Buffers) -> None:
        if self._unwritten:
            slots, positions = (
                torch.tensor(list(each), device=buffers.positions.device)
                for each in (self._unwritten, self._unwritten.values())
            )
            if _is_frozen(buffers.positions):
                buffers.positions = buffers.positions.clone()
            buffers.positions[:, :, slots] = positions
            self._unwritten.clear()

    @property
    def needs_own_mask(self) -> bool:
        """Whether the pairs that the backend sees differ from the tokens that the model's mask speaks of."""
        return self.by_schedule or not self._in_place

    @property
    def by_schedule(self) -> bool:
        """Whether decode steps go by a schedule made beforehand, see schedule.py."""
        return self._schedule is not None

    def shown_positions(self) -> Tensor:
        """Like `slot_positions`, of all the slots that the backend sees in the current step."""
        if self._schedule is not None and self._buffers is not None:
            return self._buffers.positions
        return self.slot_positions()

    # The way of the data: a prompt comes in whole, is pruned, then tokens come one by one.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take note of dtype and device; buffers are made when the first prompt has been pruned."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new pairs; return the keys and values that the backend shall see.

        A single token on top of stored pairs is a decode step; anything else is a prompt, which stays whole until
        `prune` is called.

        Args:
            key_states: [batch, heads, n_new, head_dim]. Stored without its autograd history.
            value_states: likewise.
            args: ignored, as transformers' own layers do.
            kwargs: ignored.

        Raises:
            ValueError: the batch is not the one that is stored, or there are no tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._buffers is not None:
            self._check(key_states, self._buffers.keys.shape)
            if key_states.shape[2] == 1:
                if key_states.requires_grad or value_states.requires_grad:
                    key_states, value_states = key_states.detach(), value_states.detach()
                step = self._decode if self._schedule is None else self._decode_by_schedule
                return step(self._buffers, key_states, value_states)
        if key_states.shape[2] == 0:
            raise ValueError("the prompt has no tokens; a cache layer needs at least one")
        return self._begin_prompt(key_states, value_states)

    def _check(self, key_states: Tensor, stored: torch.Size) -> None:
        batch, heads, _, head_dim = key_states.shape
        if batch != stored[0]:
            raise ValueError(
                f"got a batch of {batch} for a cache that holds {stored[0]} rows; "
                "call cache.reset() before an unrelated prompt, or cache.batch_repeat_interleave(n)"
            )
        if heads != stored[1] or head_dim != stored[3]:
            raise ValueError(
                f"got keys of {heads} heads of {head_dim} for a cache that holds {stored[1]} heads of {stored[3]}; "
                "this is another model: call cache.reset() first"
            )

    def _begin_prompt(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        n_new = keys.shape[2]
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self._schedule = None  # and the next is made when this prompt has been pruned
        self.prompt = Prompt(keys.detach(), values.detach(), n_new)
        self._seen += n_new
        return keys, values

    def prune(self, kept: Tensor, counts: list[int], keep: list[float]) -> None:
        """Keep these tokens of the prompt, and all pairs of earlier turns; make the buffers that decoding goes on in.

        Args:
            kept: int64 [batch, 1 or heads, max(counts)], columns of the prompt (0 is its first token), rising; -1 fills
                shorter rows.
            counts: how many tokens each row keeps.
            keep: keep ratio of each row, fraction kept in [0, 1], for the decode rule.
        """
        prompt = self.prompt
        if prompt is None:
            raise RuntimeError("there is no prompt to prune: prune() follows the update() of a prompt")
        positions = self.slot_positions()
        n_old = positions.shape[2] - prompt.n_new
        keys, values = self._merged(prompt, kept, n_old)
        scores = self._all_scores(prompt) if self.accumulates else None
        columns = (kept + n_old).masked_fill_(kept < 0, -1)
        heads = max(each.shape[1] for each in (columns, positions, scores) if each is not None)
        columns = columns.expand(-1, heads, -1)
        leaving = self._per_row("beyond", range(0))
        if n_old:
            old = _without(_in_order(positions[..., :n_old]), leaving)
            columns = _close_up(torch.cat([old.expand(-1, heads, -1), columns], dim=2))
        held = [
            old - len(left) + new for old, left, new in zip(self._per_row("stored", 0), leaving, counts, strict=True)
        ]
        seen = [old + new for old, new in zip(self._per_row("seen", 0), prompt.lengths, strict=True)]

        self._width = max(held)
        states = list(zip(held, seen, keep, self._per_row("origin", None), strict=True))
        states = states[:1] if len(set(states)) == 1 else states
        self._rows = [self._evict(*state) for state in states]
        self._in_place = self._in_place and self._width == self._seen and not self.ragged
        self.prompt = None
        self._rebuild(Buffers(keys, values, positions, scores), columns[..., : self._width], self.max_new_tokens)

    def _rebuild(self, source: Buffers, columns: Tensor, n_steps: int | None) -> None:
        """New buffers of these columns of `source`, with room for `n_steps` decode steps if that is known.

        Otherwise there is no spare room: while a prompt runs, all layers hold theirs beside one whole prompt.
        """
        self._unwritten.clear()
        if n_steps is None:
            self._buffers = source.take(columns)
            return
        self._schedule = schedule = Schedule(self._rows, n_steps, self._seen, columns.device)
        self._buffers = buffers = source.take(columns, schedule.capacity - self._width)
        for tensor in (buffers.keys, buffers.values, buffers.positions):
            keep_address(tensor)

    def _merged(self, prompt: Prompt, kept: Tensor, n_old: int) -> tuple[Tensor, Tensor]:
        """Keys and values of old pairs and prompt, what is pruned of the prompt merged into what stays."""
        # The sink is the first prompt's.
        sink, shift = (0, 0) if n_old else (self._sink, self.merge_shift)

        def merged(pairs: Tensor) -> Tensor:
            new = pairs[:, :, n_old:]
            new = merge_pruned(new, kept, real=prompt.real, sink=sink, shift=shift)
            return torch.cat([pairs[:, :, :n_old], new], dim=2) if n_old else new

        keys = merged(prompt.keys) if self._merge == "kv" else prompt.keys
        return keys, merged(prompt.values) if self._merge else prompt.values

    @property
    def accumulates(self) -> bool:
        """Whether the decode rule asks how much attention each pair has received: then `accumulate` is to be called."""
        return isinstance(self._rows[0] if self._rows else self._evict(0, 0, 0.0, None), LeastImportantEviction)

    def _all_scores(self, prompt: Prompt) -> Tensor:
        """float32 [batch, 1 or heads, stored + n_new]: of the old pairs, then of the prompt's."""
        new = prompt.scores
        if new is None:  # nothing is pruned, so nobody asked
            new = torch.zeros(self.batch_size, 1, prompt.n_new, device=prompt.keys.device)
        if self._buffers is None or self._buffers.scores is None:
            return new
        old = self._buffers.scores[..., : self._width]
        heads = max(old.shape[1], new.shape[1])
        return torch.cat([old.expand(-1, heads, -1), new.expand(-1, heads, -1)], dim=2)

    def accumulate(self, importance: Tensor) -> None:
        """Add what each pair has received from the newest tokens, float32 [batch, 1 or heads, stored].

        Layers that share their keys show the same step several times; it counts once.
        """
        if self._buffers is None or self._buffers.scores is None or self._accumulated == self.seen:
            return
        self._accumulated = self.seen
        scores = self._buffers.scores
        if importance.shape[1] > scores.shape[1]:
            importance = importance.mean(1, keepdim=True)
        scores[..., : self._width] += importance

    def _per_row(self, name: str, before: T) -> list[T]:
        """An attribute of every row's decode rule, or what it is before the first prompt."""
        found = [getattr(row, name) for row in self._rows] or [before]
        return found if len(found) > 1 else found * self.batch_size

    def _decode(self, buffers: Buffers, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One token: its pair goes to the slot of the pair that leaves, or to the first unused one."""
        if _is_frozen(buffers.keys):
            self._write_positions(buffers)
            buffers = self._buffers = buffers.grown(0)
        slots = [row.next_slot() for row in self._rows]
        known = [slot for slot in slots if slot is not None]
        last = max(known, default=-1)
        if last >= buffers.keys.shape[2]:
            self._write_positions(buffers)
            buffers = self._buffers = buffers.grown(self._room())
        if self._in_place:
            self._in_place = len(known) == len(slots) and min(known) == self._seen
        if len(slots) == len(known) == 1 and buffers.scores is None:
            # The usual case: one slot for all rows, one write a tensor, no index tensors.
            buffers.keys.narrow(2, last, 1).copy_(keys)
            buffers.values.narrow(2, last, 1).copy_(values)
            self._unwritten[last] = self._seen
        else:
            self._write_positions(buffers)
            index = torch.tensor(slots, device=keys.device) if len(slots) == len(known) else None
            index = self._slots_of_least(buffers, slots) if index is None else index[:, None]
            self._write(buffers, keys, values, index.expand(keys.shape[0], -1), self._seen)
        self._width = width = max(self._width, last + 1)
        self._seen += 1
        return buffers.keys.narrow(2, 0, width), buffers.values.narrow(2, 0, width)

    def _decode_by_schedule(self, buffers: Buffers, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One token, by tensor operations alone; the backend sees all slots, and a mask hides the empty ones."""
        assert self._schedule is not None, "asked for by update()"
        slots, position = self._schedule.next_slots()
        if slots.shape[0] == 1:
            buffers.keys.index_copy_(2, slots, keys)
            buffers.values.index_copy_(2, slots, values)
            buffers.positions.index_copy_(2, slots, position.expand(*buffers.positions.shape[:2], 1))
        else:
            self._write(buffers, keys, values, slots[:, None], position)
        return buffers.keys.view_as(buffers.keys), buffers.values.view_as(buffers.values)

    def _room(self) -> int:
        """Slots that the next `STEPS_PER_GROWTH` steps need at most."""
        keep = max(row.keep for row in self._rows)
        never = any(isinstance(row, FixedPointEviction) and row.point is None for row in self._rows)
        slack = max(row.slack for row in self._rows)
        return STEPS_PER_GROWTH if never else min(STEPS_PER_GROWTH, math.ceil(keep * STEPS_PER_GROWTH) + 1 + slack)

    def _write(self, buffers: Buffers, keys: Tensor, values: Tensor, index: Tensor, position: int | Tensor) -> None:
        """Put one pair a row into the slots int64 [batch, 1 or heads]."""
        index = index[..., None]
        everywhere = index.expand(-1, keys.shape[1], -1)[..., None]
        buffers.keys.scatter_(2, everywhere.expand_as(keys), keys)
        buffers.values.scatter_(2, everywhere.expand_as(values), values)  # of another size in latent attention
        slots = index.expand(-1, buffers.positions.shape[1], -1)
        if isinstance(position, Tensor):
            buffers.positions.scatter_(2, slots, position.expand_as(slots))
        else:
            buffers.positions.scatter_(2, slots, position)
        if buffers.scores is not None:
            buffers.scores.scatter_(2, index.expand(-1, buffers.scores.shape[1], -1), 0.0)

    def _slots_of_least(self, buffers: Buffers, slots: list[int | None]) -> Tensor:
        """int64 [batch, 1 or heads]: the slots given, and those of the least important pairs where there is none.

        Sink and recent pairs go last. The sink lies in the first slots, which nothing else takes.
        """
        assert buffers.scores is not None, "a rule that asks for the least important pair gets the scores at the prompt"
        scores = buffers.scores[..., : self._width]
        positions = buffers.positions[..., : self._width]
        recent = torch.tensor([round(self._recent * row.stored) for row in self._rows], device=scores.device)
        scores = torch.where(positions > self.seen - recent[:, None, None], scores + 1e30, scores)
        slot = torch.arange(self._width, device=scores.device)
        least = scores.masked_fill((positions < 0) | (slot < self._sink), torch.inf).argmin(-1)
        given = torch.tensor([-1 if slot is None else slot for slot in slots], device=scores.device)[:, None]
        return torch.where(given < 0, least, given)

    # Operations on the batch. An unpruned prompt cannot be reordered: it lives only inside a forward, or, where the
    # lengths are searched on the prompt, until the last layer has been seen.

    def reset(self) -> None:
        """Forget everything, and be as new."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of what was row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, int64 or a bool mask over the rows, in that order."""
        if self._buffers is None:
            return
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._stored_positions(self._buffers)
        left = self._steps_left()
        self._buffers = self._buffers.rows(indices.to(self._buffers.keys.device))
        if len(self._rows) > 1:
            self._rows = [self._rows[row].copy() for row in indices.tolist()]
            # Without the longest rows, the slots that only they used are spare.
            self._width = max((row.stored for row in self._rows), default=0)
        if left is not None or self._buffers.keys.shape[2] - self._width > STEPS_PER_GROWTH:
            slots = torch.arange(self._width, device=self._buffers.keys.device)
            self._rebuild(self._buffers, slots.expand(len(indices), 1, -1), left)

    def _steps_left(self) -> int | None:
        """Decode steps that the schedule still knows; None where there is no schedule."""
        return None if self._schedule is None else self._schedule.last - self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens. Pairs that left for them do not come back.

        Raises:
            ValueError: a positive number, or more tokens than were seen.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self.seen:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, from {-self.seen} to 0; got {tokens_to_remove}"
                f"{explain_crop()}"
            )
        if tokens_to_remove == 0 or self._buffers is None:
            return
        end = self.seen + tokens_to_remove
        if end == 0:
            self._clear()
            return
        positions = self._stored_positions(self._buffers)
        left = self._steps_left()
        positions = positions.masked_fill(positions >= end, -1)
        of_heads = (positions >= 0).sum(2)
        if bool((of_heads != of_heads[:, :1]).any()):
            raise ValueError(
                f"cannot take back {-tokens_to_remove} tokens: heads keep keys of their own here (heads='each'), and "
                "would be left with different numbers of them; call cache.reset(), or use heads='mean'"
            )
        held = of_heads[:, 0].tolist()
        rows = self._rows if len(self._rows) == len(held) else self._rows * len(held)
        self._rows = [row.shortened(stored, -tokens_to_remove) for row, stored in zip(rows, held, strict=True)]
        self._width, self._seen = max(held), end
        left = None if left is None else left - tokens_to_remove
        self._rebuild(self._buffers, _in_order(positions)[..., : self._width], left)

    # Offloading of whole layers, as `Cache.offload` and `Cache.prefetch` ask for it.

    def offload(self) -> None:
        """Move the buffers to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move the buffers back to the layer's device, if there are any yet."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self._buffers is not None and self._buffers.keys.device != device:
            self._buffers.keys = self._buffers.keys.to(device, non_blocking=True)
            self._buffers.values = self._buffers.values.to(device, non_blocking=True)


def _is_frozen(tensor: Tensor) -> bool:
    """Whether the tensor was made in inference mode, which has been left since: it cannot be written to."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def _take(source: Tensor, index: Tensor) -> Tensor:
    """Gather columns of [batch, heads, n, head_dim] by int64 [batch, 1 or heads, m]: [batch, heads, m, head_dim].

    Row by row: a row's head vectors are copied whole, with no index tensor of the size of the result.
    """
    batch, heads, _, head_dim = source.shape
    taken = source.new_empty(batch, heads, index.shape[2], head_dim)
    for row in range(batch):
        if index.shape[1] == 1:
            torch.index_select(source[row], 1, index[row, 0], out=taken[row])
            continue
        for head in range(heads):
            torch.index_select(source[row, head], 0, index[row, head], out=taken[row, head])
    return taken


def _without(order: Tensor, places: Sequence[range]) -> Tensor:
    """Columns of [batch, 1 or heads, n] with those at a range of places of each row set to -1."""
    if not any(places):
        return order
    place = torch.arange(order.shape[2], device=order.device)
    first, end = (
        torch.tensor(each, device=order.device)[:, None, None]
        for each in zip(*((of_row.start, of_row.stop) for of_row in places), strict=True)
    )
    return order.masked_fill((place >= first) & (place < end), -1)


def _in_order(positions: Tensor) -> Tensor:
    """The slots of each row by rising position, int64 [batch, 1 or heads, n]; -1 behind them for empty slots."""
    order = positions.masked_fill(positions < 0, torch.iinfo(torch.int64).max).argsort(dim=-1)
    return order.masked_fill_(positions.gather(-1, order) < 0, -1)


def _close_up(columns: Tensor) -> Tensor:
    """Move the -1 entries of each row behind the others, whose order stays."""
    order = (columns < 0).to(torch.int8).argsort(dim=-1, stable=True)
    return columns.gather(-1, order)
