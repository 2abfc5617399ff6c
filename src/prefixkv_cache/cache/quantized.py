"""Kept pairs in few bits: what `quantize=` makes of a segment's buffers, after pruning.

The newest pairs of each row and head stay as the model made them. Once there are `NEWEST + GROUP` of them, the oldest
`GROUP` of them become codes, once and for all. As in KIVI (arXiv 2402.02750) a key's channel is scaled over `GROUP`
pairs that follow each other, and a value over its own numbers; each row and each head is quantised by itself, whatever
stands beside it. Reading makes numbers of one segment's codes, for the attention that is about to run.

Which pairs are kept, and which slot the next one takes, is decided elsewhere; how groups become codes in quantizers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantizers import Quantizer
from .storage import Pairs, PromptPairs, in_order, is_frozen, take_columns

GROUP = 64
"""Pairs that share the scales of a key's channels; a value's numbers share one in groups of at most so many. 64 is what
transformers' quantised caches take."""
NEWEST = 16
"""So many of the newest pairs are exact, and at most GROUP - 1 more. On SmolLM2 32 instead of none took 3 to 8 % off
the KL of 4 bits on three of four tasks, and half on the fourth; 128, as in transformers, are all that a short prompt
keeps."""


def quantizing_prompt(quantizer: Quantizer) -> PromptPairs:
    """Where what is kept of a prompt is quantised."""
    return partial(_PromptPairs, quantizer)


class _PromptPairs(Pairs):
    """Pairs of earlier turns, as they were shown, and behind them a prompt's: what is taken of them is quantised.

    Args:
        quantizer: of the cache.
        keys, values, positions: as of `Pairs`.
        before: the stored pairs of earlier turns; None: there are none.
        n_new: pairs of the prompt.
    """

    def __init__(
        self, quantizer: Quantizer, keys: Tensor, values: Tensor, positions: Tensor, before: Pairs | None, n_new: int
    ):
        super().__init__(keys, values, positions)
        self._quantizer, self._n_old = quantizer, keys.shape[2] - n_new
        self._before = before if isinstance(before, QuantizedPairs) else None

    def take(self, columns: Tensor, spare: int = 0) -> Pairs:
        """New buffers of these columns; codes of earlier turns are taken over as they are."""
        taken = super().take(columns, spare)
        if self._before is None:
            return QuantizedPairs.of(taken, self._quantizer)
        old = self._before.take(columns.masked_fill(columns >= self._n_old, -1), spare)
        return old.joined_by(taken)


@dataclass
class _Codes:
    """Pairs in few bits.

    Attributes:
        quantizer: what made them.
        dims: numbers of a key, and of a value.
        keys, values: uint8 [batch, heads, capacity, bytes].
        value_scales, value_shifts: [batch, heads, capacity, groups of a value].
        blocks: int16 [batch, 1 or heads, capacity], the place of each key's scales in the next two; 32767 blocks
            are two million pairs.
        key_scales, key_shifts: [batch, heads, n_blocks, head_dim], of each channel.
    """

    quantizer: Quantizer
    dims: tuple[int, int]
    keys: Tensor
    values: Tensor
    value_scales: Tensor
    value_shifts: Tensor
    blocks: Tensor
    key_scales: Tensor
    key_shifts: Tensor

    @classmethod
    def nothing(cls, quantizer: Quantizer, like: Pairs) -> _Codes:
        """Room for the codes of these pairs."""
        batch, heads, capacity, _ = like.keys.shape
        dims = like.keys.shape[3], like.values.shape[3]
        bytes_of = [size if quantizer.bits == 8 else (size + 1) // 2 for size in dims]
        keys, values = (torch.zeros(batch, heads, capacity, n, dtype=torch.uint8, device=like.device) for n in bytes_of)
        scales = like.values.new_zeros(batch, heads, capacity, dims[1] // _group_of(dims[1]))
        blocks = torch.zeros(like.positions.shape, dtype=torch.int16, device=like.device)
        table = like.keys.new_zeros(batch, heads, 0, dims[0])
        return cls(quantizer, dims, keys, values, scales, scales.clone(), blocks, table, table.clone())

    def tensors(self) -> list[Tensor]:
        """All of them: those with a column for each slot, then the tables of scales."""
        return [*self._by_slot(), self.key_scales, self.key_shifts]

    def _by_slot(self) -> list[Tensor]:
        return [self.keys, self.values, self.value_scales, self.value_shifts, self.blocks]

    def _with(self, by_slot: list[Tensor], tables: list[Tensor]) -> _Codes:
        return _Codes(self.quantizer, self.dims, *by_slot, *tables)

    def take(self, index: Tensor) -> _Codes:
        """These columns, int64 [batch, 1 or heads, n]."""
        *wide, blocks = self._by_slot()
        blocks = blocks.expand(-1, index.shape[1], -1).gather(2, index)
        tables = [self.key_scales.clone(), self.key_shifts.clone()]
        return self._with([*(take_columns(each, index) for each in wide), blocks], tables)

    def rows(self, indices: Tensor) -> _Codes:
        """These rows, int64 [n]."""
        found = [each.index_select(0, indices) for each in self.tensors()]
        return self._with(found[:5], found[5:])

    def grown(self, spare: int) -> _Codes:
        """So many more slots."""
        *wide, blocks = self._by_slot()
        grown = [F.pad(each, (0, 0, 0, spare)) for each in wide]
        return self._with([*grown, F.pad(blocks, (0, spare))], [self.key_scales.clone(), self.key_shifts.clone()])

    def put(self, keys: Tensor, values: Tensor, columns: Tensor, slots: Tensor) -> None:
        """Quantise pairs, `GROUP` columns together.

        Args:
            keys, values: [batch, heads, n, head_dim], where they are taken from.
            columns: int64 [batch, 1 or heads, m], which of them; -1: none.
            slots: likewise, where their codes go.
        """
        (batch, heads), m = keys.shape[:2], columns.shape[2]
        columns, slots = (F.pad(each, (0, -m % GROUP), value=-1) for each in (columns, slots))
        grouped = columns.unflatten(2, (-1, GROUP))
        # A group that is not full is filled with copies of a pair of its own, which change neither end of its range.
        filled = torch.where(grouped < 0, grouped.amax(-1, keepdim=True), grouped).clamp_min(0).flatten(2)

        of_keys = take_columns(keys, filled).unflatten(2, (-1, GROUP)).transpose(3, 4)
        codes, *of_blocks = self.quantizer(of_keys.reshape(-1, GROUP))
        key_codes = codes.view(of_keys.shape).transpose(3, 4).flatten(2, 3)

        size = _group_of(self.dims[1])
        codes, *of_values = self.quantizer(take_columns(values, filled).reshape(-1, size))
        value_codes = codes.view(*key_codes.shape[:3], self.dims[1])

        new = [self.quantizer.pack(key_codes), self.quantizer.pack(value_codes)]
        new += [each.view(batch, heads, slots.shape[2], -1) for each in of_values]
        in_blocks = torch.arange(slots.shape[2], device=slots.device) // GROUP + self.key_scales.shape[2]
        new.append(in_blocks.to(torch.int16).expand(slots.shape))
        for own, each in zip(self._by_slot(), new, strict=True):
            row, head, column = (slots >= 0).expand(-1, own.shape[1], -1).nonzero(as_tuple=True)
            own[row, head, slots.expand(-1, own.shape[1], -1)[row, head, column]] = each[row, head, column]
        tables = [each.view(batch, heads, -1, self.dims[0]) for each in of_blocks]
        self.key_scales, self.key_shifts = (
            torch.cat(pair, dim=2) for pair in zip((self.key_scales, self.key_shifts), tables, strict=True)
        )
        self._drop_unused()

    def _drop_unused(self) -> None:
        """Forget the scales of pairs that have all left."""
        used, blocks = self.blocks.unique(return_inverse=True)
        if len(used) < self.key_scales.shape[2]:
            self.blocks = blocks.to(torch.int16)
            self.key_scales, self.key_shifts = (each[:, :, used.long()] for each in (self.key_scales, self.key_shifts))

    def read_keys(self) -> Tensor:
        """[batch, heads, capacity, head_dim]; any finite numbers where nothing was quantised."""
        numbers = self.quantizer.unpack(self.keys, self.dims[0]).to(self.key_scales.dtype)
        if self.key_scales.shape[2] == 0:
            return numbers
        blocks = self.blocks.long()
        return numbers.mul_(take_columns(self.key_scales, blocks)).sub_(take_columns(self.key_shifts, blocks))

    def read_values(self) -> Tensor:
        """[batch, heads, capacity, head_dim]; any finite numbers where nothing was quantised."""
        numbers = self.quantizer.unpack(self.values, self.dims[1]).to(self.value_scales.dtype)
        by_group = numbers.unflatten(3, (self.value_scales.shape[3], -1))
        return by_group.mul_(self.value_scales[..., None]).sub_(self.value_shifts[..., None]).flatten(3)


@dataclass
class _Newest:
    """Pairs as the model made them, in the order in which they came.

    Attributes:
        keys, values: [batch, heads, room, head_dim].
        slots: int64 [batch, 1 or heads, n], where each belongs; -1: it has left, or there was none.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor

    def rows(self, indices: Tensor) -> _Newest:
        """These rows, int64 [n]."""
        return _Newest(*(each.index_select(0, indices) for each in (self.keys, self.values, self.slots)))

    def put(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add one pair a row, [batch, heads, 1, head_dim], in the place of what lay at its slot, int64 like `slots`."""
        n = self.slots.shape[2]
        if n == self.keys.shape[2]:
            room = NEWEST + GROUP - n
            self.keys, self.values = (F.pad(each, (0, 0, 0, room)) for each in (self.keys, self.values))
        self.keys.narrow(2, n, 1).copy_(keys)
        self.values.narrow(2, n, 1).copy_(values)
        slots = slots.expand(*self.slots.shape[:2], 1)
        self.slots = torch.cat([self.slots.masked_fill(self.slots == slots, -1), slots], dim=2)

    def drop_oldest(self, n: int) -> None:
        """Forget the first `n`."""
        for each in (self.keys, self.values):
            each[:, :, : self.slots.shape[2] - n] = each[:, :, n : self.slots.shape[2]].clone()
        self.slots = self.slots[:, :, n:]

    def over(self, numbers: Tensor, exact: Tensor) -> Tensor:
        """Those of all slots, [batch, heads, capacity, head_dim], with these in their places."""
        capacity, index = numbers.shape[2], self.slots[..., None].expand(-1, numbers.shape[1], -1, numbers.shape[3])
        numbers = F.pad(numbers, (0, 0, 0, 1))  # a column for those that have left
        numbers.scatter_(2, index.where(index >= 0, capacity), exact[:, :, : index.shape[2]])
        return numbers.narrow(2, 0, capacity)


class QuantizedPairs(Pairs):
    """The buffers of some key heads of a layer: the newest pairs exact, the others in codes.

    Args:
        codes: of all slots.
        newest: the exact pairs.
        positions, received: as of `Pairs`.
    """

    def __init__(self, codes: _Codes, newest: _Newest, positions: Tensor, received: Tensor | None):
        self._codes, self._newest = codes, newest
        self.positions, self.received = positions, received
        self.unwritten = {}

    @classmethod
    def of(cls, pairs: Pairs, quantizer: Quantizer) -> QuantizedPairs:
        """These pairs, quantised but for the newest."""
        none = pairs.positions.new_empty(*pairs.positions.shape[:2], 0)
        newest = _Newest(pairs.keys[:, :, :0], pairs.values[:, :, :0], none)
        empty = torch.full_like(pairs.positions, -1)
        return cls(_Codes.nothing(quantizer, pairs), newest, empty, None).joined_by(pairs)

    def joined_by(self, pairs: Pairs) -> QuantizedPairs:
        """The same codes, and beside them what others of these pairs hold; both have the same slots."""
        pending = pairs.positions.masked_fill(self._coded(), -1)
        order, count = in_order(pending), (pending >= 0).sum(2, keepdim=True)
        older = max(0, int(count.max()) - NEWEST)
        if older:
            place = torch.arange(older, device=order.device)
            oldest = order[..., :older].masked_fill(place >= count - NEWEST, -1)
            self._codes.put(pairs.keys, pairs.values, oldest, oldest)
        place = count - NEWEST + torch.arange(NEWEST, device=order.device)
        inside = place.clamp(0, order.shape[2] - 1)
        slots = order.gather(2, inside).masked_fill(place < 0, -1)
        index = slots.clamp_min(0)
        self._newest = _Newest(take_columns(pairs.keys, index), take_columns(pairs.values, index), slots)
        self.positions, self.received = pairs.positions, pairs.received
        return self

    def _coded(self) -> Tensor:
        """Which slots hold a pair in codes: bool [batch, 1 or heads, capacity]."""
        slots = self._newest.slots
        held = F.pad(self.positions >= 0, (0, 1))
        return held.scatter(2, slots.where(slots >= 0, self.capacity), False)[..., :-1]

    # What is read.

    @property
    def keys(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[batch, heads, capacity, head_dim], made anew."""
        return self._newest.over(self._codes.read_keys(), self._newest.keys)

    @property
    def values(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[batch, heads, capacity, head_dim], made anew."""
        return self._newest.over(self._codes.read_values(), self._newest.values)

    @property
    def head_dim(self) -> int:
        """Numbers in a key."""
        return self._codes.dims[0]

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self._codes.keys.device

    @property
    def frozen(self) -> bool:
        """Whether the buffers cannot be written to."""
        return any(map(is_frozen, [*self._codes.tensors(), self._newest.keys]))

    @property
    def pair_bytes(self) -> int:
        """Bytes of one pair of each row and head, as the model made it."""
        newest = self._newest
        return (newest.keys.nbytes + newest.values.nbytes) // newest.keys.shape[2]

    def tensors(self) -> list[Tensor]:
        """Codes, scales, the places of scales, and the exact pairs."""
        return [*self._codes.tensors(), self._newest.keys, self._newest.values]

    # What is changed.

    def take(self, columns: Tensor, spare: int = 0) -> QuantizedPairs:
        """New buffers of these columns, int64 [batch, 1 or heads, n], -1: slots that hold nothing; and spare ones."""
        index, positions, received = self.taken_notes(columns, spare)
        n, capacity = columns.shape[2], self.capacity
        places = columns.new_full((*columns.shape[:2], capacity + 1), -1)
        new = torch.arange(n, device=columns.device).expand_as(columns)
        places.scatter_(2, columns.where(columns >= 0, capacity), new)
        places[..., -1] = -1
        old = self._newest.slots.expand(-1, columns.shape[1], -1)
        slots = places.gather(2, old.where(old >= 0, capacity))
        newest = _Newest(self._newest.keys.clone(), self._newest.values.clone(), slots)
        return QuantizedPairs(self._codes.take(index), newest, positions, received)

    def rows(self, indices: Tensor) -> QuantizedPairs:
        """New buffers of these rows, int64 [n]."""
        self.write_positions()
        received = None if self.received is None else self.received.index_select(0, indices)
        positions = self.positions.index_select(0, indices)
        return QuantizedPairs(self._codes.rows(indices), self._newest.rows(indices), positions, received)

    def grown(self, spare: int) -> QuantizedPairs:
        """The same pairs with so many more slots behind them."""
        self.write_positions()
        received = None if self.received is None else F.pad(self.received, (0, spare))
        newest = _Newest(self._newest.keys.clone(), self._newest.values.clone(), self._newest.slots)
        return QuantizedPairs(self._codes.grown(spare), newest, F.pad(self.positions, (0, spare), value=-1), received)

    def share(self) -> tuple[Tensor, ...]:
        """Nothing: a copy gets codes of its own, which are small."""
        self.write_positions()
        return ()

    def unshare(self) -> None:
        """Nothing is shared."""

    def write_everywhere(self, slot: int, keys: Tensor, values: Tensor, position: int) -> None:
        """Put one pair into the same slot of all rows and heads."""
        self.put(torch.full((1, 1), slot, device=self.device), keys, values)
        self.unwritten[slot] = position

    def put(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put one pair a row, exact, into the slots int64 [batch, 1 or heads]; the oldest exact ones become codes."""
        newest = self._newest
        newest.put(slots[..., None], keys, values)
        if newest.slots.shape[2] == NEWEST + GROUP:
            slots = newest.slots[..., :GROUP]
            columns = torch.arange(GROUP, device=slots.device).expand_as(slots).masked_fill(slots < 0, -1)
            self._codes.put(newest.keys, newest.values, columns, slots)
            newest.drop_oldest(GROUP)


def _group_of(size: int) -> int:
    """The most numbers of a value, at most `GROUP`, that divide it evenly."""
    return next(each for each in range(min(GROUP, size), 0, -1) if size % each == 0)
