"""Tensor parallelism: each rank sees some of the heads, and all ranks must keep the same keys.

The importance of a layer is averaged over the ranks that share its heads, so that it is the mean over all heads, equal
on every rank. Nothing here runs unless a layer's weights are sharded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def join_head_ranks(importance: Tensor, module: Any, how: str = "mean") -> Tensor:
    """The mean of `importance` over the ranks that hold the other heads of this attention module; itself if none do.

    Args:
        importance: float32 of any shape, the mean (or maximum) over the heads of this rank. Ranks hold equally many.
        module: the attention module.
        how: `"mean"` or `"max"`.
    """
    group = _head_group(module)
    if group is None:
        return importance
    total = importance.clone()
    if how == "max":
        torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.MAX, group=group)
        return total
    torch.distributed.all_reduce(total, group=group)
    return total / torch.distributed.get_world_size(group)


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
