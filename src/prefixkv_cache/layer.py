"""One pruned layer: it stores a prompt, is pruned once, and then decodes in place.

Behaviour lives here, `cache.py` is a list of these. The layer owns one buffer for keys and one for values, with spare
room behind the stored pairs, and for each slot the logical position of its pair. *Seen* (tokens the model was fed,
what transformers asks for) and *stored* (pairs held) are two numbers. The layer is told which columns of a prompt to
keep; it computes no importance and knows no profile. Where heads keep keys of their own, only positions differ from
head to head: counts and slots do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .compat import MaxLengthNames, explain_crop, n_queries
from .eviction import Eviction, FixedPointEviction, LeastImportantEviction
from .merging import merge_pruned


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

    def take(self, columns: Tensor) -> Buffers:
        """New buffers, with spare room, of these columns: int64 [batch, 1 or heads, n], -1: slots that hold nothing."""
        index = _padded(columns)
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

    def grown(self) -> Buffers:
        """The same pairs with new spare room behind them."""
        scores = None if self.scores is None else _padded(self.scores, 2, 0)
        return Buffers(_padded(self.keys, 2, 0), _padded(self.values, 2, 0), _padded(self.positions), scores)


class PrunedLayer(MaxLengthNames, CacheLayerMixin):
    """Keys and values of one decoder layer, pruned to a length of its own.

    Args:
        evict: makes a row's decode rule of its `(stored, seen, keep)`; see eviction.py. By default nothing leaves.
        recent: share of a row's pairs, in [0, 1), that are its newest and never the least important.
        sink: number of first pairs that are never the least important.
        merge: `"kv"`: pruned pairs are merged into the nearest that stays (merging.py), `"value"`: their values only;
            None: nothing is.
        merge_shift: see `merge_pruned`.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(
        self,
        evict: Callable[[int, int, float], Eviction] = FixedPointEviction,
        *,
        recent: float = 0.0,
        sink: int = 0,
        merge: str | None = None,
        merge_shift: int = 0,
    ):
        self._evict, self._recent, self._sink = evict, recent, sink
        self._merge, self.merge_shift = merge, merge_shift
        self._clear()

    def _clear(self) -> None:
        self._buffers: Buffers | None = None
        self._rows: list[Eviction] = []  # one for each row, or one for all where all have the same numbers
        self._width = 0  # slots in use, by the longest row
        self._in_place = True  # slot i holds position i in every row, so that a mask needs no remapping
        self.seen = 0
        self._accumulated = -1  # seen, when `accumulate` was last called
        self.prompt: Prompt | None = None
        self.is_initialized = False

    # What transformers reads.

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[batch, heads, stored, head_dim], or None before the first prompt."""
        if self.prompt is not None:
            return self.prompt.keys
        return None if self._buffers is None else self._buffers.keys[:, :, : self._width]

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[batch, heads, stored, head_dim], or None before the first prompt."""
        if self.prompt is not None:
            return self.prompt.values
        return None if self._buffers is None else self._buffers.values[:, :, : self._width]

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: where the next token's position starts."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask, in logical columns; the layer takes its own columns at the door."""
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
        """Whether rows hold different numbers of pairs, so that some slots hold nothing."""
        return len({row.stored for row in self._rows}) > 1

    @property
    def keep_ratios(self) -> list[float]:
        """Keep ratio of each row, fraction kept; empty before the first prompt was pruned."""
        ratios = [row.keep for row in self._rows]
        return ratios if len(ratios) != 1 else ratios * self.batch_size

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
        return buffers.positions[:, :, : self._width]

    @property
    def needs_own_mask(self) -> bool:
        """Whether the pairs that the backend sees differ from the tokens that the model's mask speaks of."""
        return not self._in_place

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
        self._check(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._buffers is not None and key_states.shape[2] == 1:
            return self._decode(self._buffers, key_states.detach(), value_states.detach())
        return self._begin_prompt(key_states, value_states)

    def _check(self, key_states: Tensor) -> None:
        batch, heads, n_new, head_dim = key_states.shape
        if n_new == 0:
            raise ValueError("the prompt has no tokens; a cache layer needs at least one")
        if self._buffers is not None and batch != self.batch_size:
            raise ValueError(
                f"got a batch of {batch} for a cache that holds {self.batch_size} rows; "
                "call cache.reset() before an unrelated prompt, or cache.batch_repeat_interleave(n)"
            )

        if self._buffers is not None and (heads, head_dim) != self._buffers.keys.shape[1::2]:
            stored = self._buffers.keys.shape
            raise ValueError(
                f"got keys of {heads} heads of {head_dim} for a cache that holds {stored[1]} heads of {stored[3]}; "
                "this is another model: call cache.reset() first"
            )

    def _begin_prompt(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        n_new = keys.shape[2]
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.prompt = Prompt(keys.detach(), values.detach(), n_new)
        self.seen += n_new
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
        if n_old:
            old = _in_order(positions[..., :n_old])
            columns = _close_up(torch.cat([old.expand(-1, heads, -1), columns], dim=2))
        held = [old + new for old, new in zip(self._per_row("stored"), counts, strict=True)]
        seen = [old + new for old, new in zip(self._per_row("seen"), prompt.lengths, strict=True)]

        self._width = max(held)
        self._buffers = Buffers(keys, values, positions, scores).take(columns[..., : self._width])
        states = list(zip(held, seen, keep, strict=True))
        states = states[:1] if len(set(states)) == 1 else states
        self._rows = [self._evict(*state) for state in states]
        self._in_place = self._in_place and self._width == self.seen and not self.ragged
        self.prompt = None

    def _merged(self, prompt: Prompt, kept: Tensor, n_old: int) -> tuple[Tensor, Tensor]:
        """Keys and values of old pairs and prompt, what is pruned of the prompt merged into what stays."""

        def merged(pairs: Tensor) -> Tensor:
            new = pairs[:, :, n_old:]
            new = merge_pruned(new, kept, real=prompt.real, sink=self._sink, shift=self.merge_shift)
            return torch.cat([pairs[:, :, :n_old], new], dim=2) if n_old else new

        keys = merged(prompt.keys) if self._merge == "kv" else prompt.keys
        return keys, merged(prompt.values) if self._merge else prompt.values

    @property
    def accumulates(self) -> bool:
        """Whether the decode rule asks how much attention each pair has received: then `accumulate` is to be called."""
        return isinstance(self._rows[0] if self._rows else self._evict(0, 0, 0.0), LeastImportantEviction)

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

    def _per_row(self, number: str) -> list[int]:
        """`stored` or `seen` of every row, 0 before the first prompt."""
        numbers = [getattr(row, number) for row in self._rows] or [0]
        return numbers if len(numbers) > 1 else numbers * self.batch_size

    def _decode(self, buffers: Buffers, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One token: its pair goes to the slot of the pair that leaves, or to the first unused one."""
        slots = [row.next_slot() for row in self._rows]
        known = [slot for slot in slots if slot is not None]
        last = max(known, default=-1)
        if last >= buffers.keys.shape[2]:
            buffers = self._buffers = buffers.grown()
        self._in_place = self._in_place and len(known) == len(slots) and min(known) == self.seen
        if len(slots) == len(known) == 1 and buffers.scores is None:
            # The usual case: one slot for all rows, no index tensors.
            buffers.keys.select(2, last).copy_(keys.select(2, 0))
            buffers.values.select(2, last).copy_(values.select(2, 0))
            buffers.positions.select(2, last).fill_(self.seen)
        elif len(slots) == len(known):
            index = torch.tensor(slots, device=keys.device)[:, None]
            self._write(buffers, keys, values, index.expand(keys.shape[0], -1))
        else:
            self._write(buffers, keys, values, self._slots_of_least(buffers, slots))
        self._width = max(self._width, last + 1)
        self.seen += 1
        return buffers.keys[:, :, : self._width], buffers.values[:, :, : self._width]

    def _write(self, buffers: Buffers, keys: Tensor, values: Tensor, index: Tensor) -> None:
        """Put one pair a row into the slots int64 [batch, 1 or heads]."""
        index = index[..., None]
        everywhere = index.expand(-1, keys.shape[1], -1)[..., None].expand_as(keys)
        buffers.keys.scatter_(2, everywhere, keys)
        buffers.values.scatter_(2, everywhere, values)
        buffers.positions.scatter_(2, index.expand(-1, buffers.positions.shape[1], -1), self.seen)
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
        self._buffers = self._buffers.rows(indices.to(self._buffers.keys.device))
        if len(self._rows) > 1:
            self._rows = [self._rows[row].copy() for row in indices.tolist()]
            # Without the longest rows, the slots that only they used are spare.
            self._width = max((row.stored for row in self._rows), default=0)
            if self._buffers.keys.shape[2] - self._width > spare_slots(self._width):
                slots = torch.arange(self._width, device=self._buffers.keys.device)
                self._buffers = self._buffers.take(slots.expand(len(self._rows), 1, -1))

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
        self._width, self.seen = max(held), end
        self._buffers = self._buffers.take(_in_order(positions)[..., : self._width])

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


def spare_slots(stored: int) -> int:
    """Unused slots behind the stored pairs when a buffer is made: a tenth, so that growth is geometric; at least 16."""
    return max(16, stored // 10)


def _padded(tensor: Tensor, dim: int = 2, fill: int = -1) -> Tensor:
    """A copy of the tensor with spare slots behind its last one."""
    shape = list(tensor.shape)
    shape[dim] = spare_slots(shape[dim])
    return torch.cat([tensor, tensor.new_full(shape, fill)], dim=dim)


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


def _in_order(positions: Tensor) -> Tensor:
    """The slots of each row by rising position, int64 [batch, 1 or heads, n]; -1 behind them for empty slots."""
    order = positions.masked_fill(positions < 0, torch.iinfo(torch.int64).max).argsort(dim=-1)
    return order.masked_fill_(positions.gather(-1, order) < 0, -1)


def _close_up(columns: Tensor) -> Tensor:
    """Move the -1 entries of each row behind the others, whose order stays."""
    order = (columns < 0).to(torch.int8).argsort(dim=-1, stable=True)
    return columns.gather(-1, order)
