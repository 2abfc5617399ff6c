"""Tensor parallelism: each rank sees some of the heads, and all ranks must keep the same keys.

Where heads agree on keys, scores are gathered from the ranks that share a layer's heads before they are joined, so that
they are equal on every rank. Nothing here runs unless a layer's weights are sharded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadRanks:
    """The ranks that share the heads of an attention module, equally many each, in the order of the heads.

    Attributes:
        count: how many.
        place: which of them this one is, from 0.
        group: their process group; None: there are no others.
    """

    count: int = 1
    place: int = 0
    group: Any = None

    @classmethod
    def of(cls, module: Any) -> HeadRanks:
        """Those of this module."""
        group = _head_group(module)
        if group is None:
            return ALONE
        return cls(torch.distributed.get_world_size(group), torch.distributed.get_rank(group), group)

    def gather(self, of_heads: Tensor) -> Tensor:
        """[batch, heads of this rank, ...] -> [batch, all heads, ...], to the last bit the same on every rank."""
        if self.group is None:
            return of_heads
        parts = [torch.empty_like(of_heads, memory_format=torch.contiguous_format) for _ in range(self.count)]
        torch.distributed.all_gather(parts, of_heads.contiguous(), group=self.group)
        return torch.cat(parts, 1)


ALONE = HeadRanks()


def _head_group(module: Any) -> Any:
    """The process group over which this module's projections are sharded; None if they are whole."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    for parameter in getattr(module, "parameters", list)():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            continue
        names = mesh.mesh_dim_names or ()
        group = mesh.get_group("tp") if "tp" in names else mesh.get_group() if mesh.ndim == 1 else None
        if group is not None and torch.distributed.get_world_size(group) > 1:
            return group
    return None
