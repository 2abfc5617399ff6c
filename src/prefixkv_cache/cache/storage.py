"""Where a segment's pairs lie: key and value buffers, and the logical position of each slot.

Slots in use stand first, spare ones behind them. What may be done to buffers is here: take columns, take rows, grow,
write, move. Which columns, and why, is decided elsewhere (segments.py, decode.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Pairs:
    """The buffers of some key heads of a layer; kept in fewer bits, they are a `QuantizedPairs` (quantized.py).

    Attributes:
        keys, values: [batch, heads, capacity, head_dim]; finite numbers in every slot, also where it holds nothing.
        positions: int64 [batch, 1 or heads, capacity], the logical position of each slot's pair, -1 where a slot holds
            nothing; one row for all heads unless they keep keys of their own.
        received: float32 like `positions`, attention received so far; only where the eviction policy asks for it.
        unwritten: slot -> position, not yet in `positions`, which few steps read.
        shared: whether copies of the cache read the same keys, values and positions: who writes first takes its own.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    received: Tensor | None = None
    unwritten: dict[int, int] = field(default_factory=dict)
    shared: bool = False

    @property
    def capacity(self) -> int:
        """Slots, in use or spare."""
        return self.positions.shape[2]

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.positions.shape[0]

    @property
    def head_dim(self) -> int:
        """Numbers in a key."""
        return self.keys.shape[3]

    @property
    def device(self) -> torch.device:
        """Where keys and values lie."""
        return self.keys.device

    @property
    def frozen(self) -> bool:
        """Whether the buffers cannot be written to; see `is_frozen`."""
        return is_frozen(self.keys)

    @property
    def pair_bytes(self) -> int:
        """Bytes of one pair of each row and head, as the model made it."""
        return (self.keys.nbytes + self.values.nbytes) // self.keys.shape[2]

    def tensors(self) -> list[Tensor]:
        """All that keys and values take, spare room included."""
        return [self.keys, self.values]

    def take(self, columns: Tensor, spare: int = 0) -> Pairs:
        """New buffers of these columns, int64 [batch, 1 or heads, n], -1: slots that hold nothing; and spare ones."""
        # Slots that hold nothing become copies of the first pair: what is masked out must still be a finite number.
        index, positions, received = self.taken_notes(columns, spare)
        return Pairs(take_columns(self.keys, index), take_columns(self.values, index), positions, received)

    def taken_notes(self, columns: Tensor, spare: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `take` needs beside keys and values: the columns with 0 for -1; positions; attention received."""
        self.write_positions()
        index = F.pad(columns, (0, spare), value=-1)
        empty = index < 0
        index = index.clamp_min(0)
        positions = self.positions.expand(-1, index.shape[1], -1).gather(2, index).masked_fill_(empty, -1)
        received = self.received
        if received is not None:
            index_of_sums = index.expand(-1, received.shape[1], -1) if index.shape[1] == 1 else index
            received = received.expand(-1, index_of_sums.shape[1], -1).gather(2, index_of_sums)
            received = received.masked_fill_(empty.expand_as(received), 0.0)
        return index, positions, received

    def rows(self, indices: Tensor) -> Pairs:
        """New buffers of these rows, int64 [n]."""
        self.write_positions()
        received = None if self.received is None else self.received.index_select(0, indices)
        keys, values, positions = (each.index_select(0, indices) for each in (self.keys, self.values, self.positions))
        return Pairs(keys, values, positions, received)

    def grown(self, spare: int) -> Pairs:
        """The same pairs with so many more slots behind them."""
        self.write_positions()
        received = None if self.received is None else F.pad(self.received, (0, spare))
        keys, values = (F.pad(each, (0, 0, 0, spare)) for each in (self.keys, self.values))
        return Pairs(keys, values, F.pad(self.positions, (0, spare), value=-1), received)

    def share(self) -> tuple[Tensor, ...]:
        """The buffers that a copy may read as well, until one of both writes."""
        self.write_positions()
        self.shared = True
        return self.keys, self.values, self.positions

    def unshare(self) -> None:
        """Take buffers of its own, before they are written to."""
        if self.shared:
            self.keys, self.values, self.positions = (each.clone() for each in (self.keys, self.values, self.positions))
            self.shared = False

    def write_everywhere(self, slot: int, keys: Tensor, values: Tensor, position: int) -> None:
        """Put one pair into the same slot of all rows and heads: two copies, no index tensors."""
        self.unshare()
        self.keys.narrow(2, slot, 1).copy_(keys)
        self.values.narrow(2, slot, 1).copy_(values)
        self.unwritten[slot] = position

    def write(self, slots: Tensor, keys: Tensor, values: Tensor, position: int | Tensor) -> None:
        """Put one pair a row into the slots int64 [batch, 1 or heads]."""
        self.unshare()
        self.write_positions()
        self.put(slots, keys, values)
        index = slots[..., None]
        in_positions = index.expand(-1, self.positions.shape[1], -1)
        if isinstance(position, Tensor):
            self.positions.scatter_(2, in_positions, position.expand_as(in_positions))
        else:
            self.positions.scatter_(2, in_positions, position)
        if self.received is not None:
            self.received.scatter_(2, index.expand(-1, self.received.shape[1], -1), 0.0)

    def put(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """The keys and values of `write`."""
        everywhere = slots[..., None].expand(-1, keys.shape[1], -1)[..., None]
        self.keys.scatter_(2, everywhere.expand_as(keys), keys)
        self.values.scatter_(2, everywhere.expand_as(values), values)  # of another size in latent attention

    def add_received(self, importance: Tensor) -> None:
        """Add what the first pairs have received, float32 [batch, heads, n]; as a mean where heads count together."""
        assert self.received is not None, "asked for only where the eviction policy counts"
        if importance.shape[1] > self.received.shape[1]:
            importance = importance.mean(1, keepdim=True)
        self.received[..., : importance.shape[2]] += importance

    def write_behind(self, width: int, keys: Tensor, values: Tensor) -> None:
        """Put pairs, [batch, heads, n, head_dim], into spare slots from `width` on, which stay spare."""
        self.unshare()
        self.keys.narrow(2, width, keys.shape[2]).copy_(keys)
        self.values.narrow(2, width, values.shape[2]).copy_(values)

    def write_positions(self) -> None:
        """Write down the positions that decode steps have left for later."""
        if not self.unwritten:
            return
        slots = torch.tensor(list(self.unwritten), device=self.positions.device)
        positions = torch.tensor(list(self.unwritten.values()), device=self.positions.device)
        if is_frozen(self.positions):
            self.positions = self.positions.clone()
        self.positions[:, :, slots] = positions
        self.unwritten.clear()

    def move(self, device: torch.device) -> None:
        """Move keys and values; positions stay where masks are made."""
        if self.keys.device != device:
            self.keys = self.keys.to(device, non_blocking=True)
            self.values = self.values.to(device, non_blocking=True)


PromptPairs: TypeAlias = Callable[[Tensor, Tensor, Tensor, Pairs | None, int], Pairs]
"""Makes the pairs that a prompt is pruned from: of keys, values and positions as they were shown, of what was stored
before (None: nothing), and of how many of the last pairs are new. What `take` takes of them is what will be stored."""


def exact_prompt(keys: Tensor, values: Tensor, positions: Tensor, before: Pairs | None, n_new: int) -> Pairs:
    """Stored as the model made them; `quantizing_prompt` in quantized.py is the other way."""
    del before, n_new
    return Pairs(keys, values, positions)


def is_frozen(tensor: Tensor) -> bool:
    """Whether the tensor was made in inference mode, which has been left since: it cannot be written to."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def take_columns(source: Tensor, index: Tensor) -> Tensor:
    """Gather columns of [batch, heads, n, head_dim] by int64 [batch, 1 or heads, m]: [batch, heads, m, head_dim].

    On a CPU row by row: a row's head vectors are copied whole, with no index tensor of the size of the result.
    """
    batch, heads, _, head_dim = source.shape
    if source.device.type != "cpu":
        return source.gather(2, index[..., None].expand(-1, heads, -1, head_dim))
    taken = source.new_empty(batch, heads, index.shape[2], head_dim)
    for row in range(batch):
        if index.shape[1] == 1:
            torch.index_select(source[row], 1, index[row, 0], out=taken[row])
            continue
        for head in range(heads):
            torch.index_select(source[row, head], 0, index[row, head], out=taken[row, head])
    return taken


def in_order(positions: Tensor) -> Tensor:
    """The slots of each row by rising position, int64 [batch, 1 or heads, n]; -1 behind them for empty slots."""
    order = positions.masked_fill(positions < 0, torch.iinfo(torch.int64).max).argsort(dim=-1)
    return order.masked_fill_(positions.gather(-1, order) < 0, -1)


def without(order: Tensor, places: list[range]) -> Tensor:
    """Columns of [batch, 1 or heads, n] with those at a range of places of each row set to -1."""
    if not any(places):
        return order
    place = torch.arange(order.shape[2], device=order.device)
    first, end = (
        torch.tensor(each, device=order.device)[:, None, None]
        for each in zip(*((of_row.start, of_row.stop) for of_row in places), strict=True)
    )
    return order.masked_fill((place >= first) & (place < end), -1)


def close_up(columns: Tensor) -> Tensor:
    """Move the -1 entries of each row behind the others, whose order stays."""
    order = (columns < 0).to(torch.int8).argsort(dim=-1, stable=True)
    return columns.gather(-1, order)
