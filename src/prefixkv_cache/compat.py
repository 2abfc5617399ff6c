"""Where the supported releases of transformers (4.57 to 5.x) differ. All of it is here, so that it can go one day.

- The door. From 5.1 on every attention call asks `AttentionInterface.get_interface`, eager too. Before, backends other
  than eager are looked up by `AttentionInterface.__getitem__`, and eager attention cannot be seen.
- Mask sizes. From 5.4 on they are asked for by the number of queries, before by the tensor of their positions.
- `get_max_length` was called `get_max_cache_shape`, and `crop` took a length that remains.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface

SEES_EAGER = hasattr(AttentionInterface, "get_interface")
DOOR_METHOD = "get_interface" if SEES_EAGER else "__getitem__"


def n_queries(query_length: int | torch.Tensor) -> int:
    """The number of queries, from what `get_mask_sizes` is given."""
    return query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length


class MaxLengthNames:
    """Both names under which transformers asks a cache layer for its maximum length."""

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """What `get_max_length` was called before 5.17."""
        return -1


def explain_unseen(attn_implementation: Any) -> str:
    """Why an attention call may have been missed that other releases would show; empty if there is nothing to say."""
    if SEES_EAGER or attn_implementation not in (None, "eager"):
        return ""
    return " (with this transformers, eager attention cannot be seen: load the model with attn_implementation='sdpa')"
