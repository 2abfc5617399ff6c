"""Layers that are left whole: transformers' own, for sliding, chunked, linear and cross attention.

What a cache says of them, and the calls that only linear and convolution layers get.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .guards import ModelFacts


class WholeLayers(Cache):
    """Refuses linear layers that no config has told of: these are their first calls."""

    _facts: ModelFacts

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers."""
        self._facts.need_layer(layer_idx, len(self.layers))
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers."""
        self._facts.need_layer(layer_idx, len(self.layers))
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        self._facts.need_layer(layer_idx, len(self.layers))
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        self._facts.need_layer(layer_idx, len(self.layers))
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """As in transformers."""
        self._facts.need_layer(layer_idx or 0, len(self.layers))
        return super().has_previous_state(layer_idx, *args, **kwargs)


def stored_by_head(layer: Any) -> list[int]:
    """Pairs that each key head holds; [] where a layer holds none."""
    keys = getattr(layer, "keys", None)
    return [] if keys is None or keys.numel() == 0 else [keys.shape[-2]] * keys.shape[1]


def nbytes_of(layer: Any) -> int:
    """Bytes of the layer's key and value tensors."""
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def positions_of(layer: Any, layer_idx: int) -> Tensor:
    """The logical position of each stored pair: int64 [batch, stored].

    Raises:
        ValueError: the layer keeps no keys of its own positions (a linear or dummy layer).
    """
    keys = getattr(layer, "keys", None)
    if not hasattr(layer, "get_seq_length"):
        raise ValueError(f"layer {layer_idx} is a {type(layer).__name__}, which holds no key for each position")
    if keys is None or keys.numel() == 0:
        return torch.empty(0, 0, dtype=torch.int64)
    seen = layer.get_seq_length()
    return torch.arange(seen - keys.shape[-2], seen, device=keys.device).repeat(keys.shape[0], 1)
