"""Key heads that are stored together, and what they keep of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class HeadGroup:
    """Some key heads of a layer, and how to take them, or the query heads that share them, out of a tensor.

    Args:
        heads: key heads, rising.
    """

    def __init__(self, heads: Sequence[int]):
        self.heads = tuple(heads)
        self._side_by_side = self.heads[-1] - self.heads[0] + 1 == len(self.heads)
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.heads)

    def take(self, tensor: Tensor, dim: int = 1, group: int = 1) -> Tensor:
        """Narrow a dimension to these heads; `group` query heads share a key head. A view where they stand together."""
        if self._side_by_side:
            return tensor.narrow(dim, self.heads[0] * group, len(self.heads) * group)
        return tensor.index_select(dim, self.index(group, tensor.device))

    def index(self, group: int, device: torch.device) -> Tensor:
        """int64 [len(heads) * group]: the (query) heads."""
        found = self._indices.get((group, device))
        if found is None:
            found = torch.tensor([head * group + each for head in self.heads for each in range(group)], device=device)
            if not torch.compiler.is_compiling():
                self._indices[group, device] = found
        return found


@dataclass(frozen=True)
class Kept:
    """What some key heads keep of a prompt.

    Attributes:
        heads: which key heads, rising; None: all of the layer.
        columns: int64 [batch, 1 or len(heads), max(counts)], columns of the prompt (0 is its first token), rising; -1
            fills shorter rows.
        counts: how many tokens each row keeps, a head.
        ratios: keep ratio of each row, fraction kept in [0, 1], for the eviction policy.
        whole: whether nothing leaves, now or later: every token then keeps its place in memory, padding's stays empty.
    """

    heads: tuple[int, ...] | None
    columns: Tensor
    counts: list[int]
    ratios: list[float]
    whole: bool = False
