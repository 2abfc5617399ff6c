"""One prompt through the model, watched and not pruned: what every layer's keys received.

The calibrator's counterpart of cache.py, on the same door (attention.py) and the same importance (importance.py). Its
cache stores nothing: each prunable layer hands the model's own keys and values straight back, so the forward costs the
memory of a forward without a cache, and of the importances, one number a key and layer. What the importances are good
for is not its business.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .architecture import PRUNABLE, cache_layers
from .attention import HandedOut, hand_out, hold_door, importance_of_call
from .compat import MaxLengthNames, explain_unseen, n_queries
from .importance import DEFAULT_MAX_BYTES
from .masks import real_tokens

# Arguments that would make the model compute more than the attention, or that are ours to give.
_NOT_PASSED_ON = ("labels", "past_key_values", "use_cache", "logits_to_keep")


class UnobservedAttentionError(RuntimeError):
    """A layer's attention never came through the door: the model as it is cannot be calibrated."""


@torch.no_grad()
def observe(
    model: Any, sample: Mapping[str, Any], *, queries: int | str = 32, max_bytes: int = DEFAULT_MAX_BYTES
) -> list[Tensor]:
    """Importance of every key in every prunable layer, for each row of a sample by itself.

    The model runs as it does for a prompt, in eval mode and without gradients; sliding, chunked and linear layers take
    part in the forward, but not in the result.

    Args:
        model: a transformers model of a kind that `PrefixKVCache` can prune, in any dtype, on one device or several.
        sample: what `model(**sample)` takes, padded or not; moved to the model's device.
        queries: `"all"` prompt tokens count, or an integer W: the last W real tokens of each row.
        max_bytes: ceiling for the temporaries of the importance computation, per layer.

    Returns:
        One float32 tensor [n_prunable_layers, n_real_tokens] for each row of the batch, on the CPU.

    Raises:
        UnobservedAttentionError: the model computes the attention of a layer by code of its own.
        TypeError, ValueError: the sample is no mapping; the model cannot be pruned (see architecture.py).
    """
    if not isinstance(sample, Mapping):
        raise TypeError(f"a sample is a dict of what model(**sample) takes; got {type(sample).__name__}")
    cache = ObservingCache(model.config, queries=queries, max_bytes=max_bytes)
    inputs = {name: _to(model.device, value) for name, value in sample.items() if name not in _NOT_PASSED_ON}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1  # one row of logits is the fewest that there can be
    with _evaluating(model):
        model(**inputs, past_key_values=cache, use_cache=True)
    unseen = [index for index in cache.prunable if index not in cache.importance]
    if unseen:
        raise UnobservedAttentionError(_unseen_message(model, unseen[0]))
    return cache.rows()


def _to(device: torch.device, value: Any) -> Any:
    # A model that is offloaded to disk has no device to speak of; its own hooks move what it needs.
    return value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode for the time being: dropout would be in the attention, and checkpointing turns the cache off."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class ObservingLayer(MaxLengthNames, CacheLayerMixin):
    """Counts what passes through, and keeps none of it."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take note of dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand back what came.

        Args:
            key_states, value_states: [batch, heads, n_new, head_dim].
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask."""
        return self.seen + n_queries(query_length), 0


class ObservingCache(Cache):
    """For one forward of one prompt: an `ObservingLayer` where a layer can be pruned, and transformers' own elsewhere.

    Args:
        config: the model's config.
        queries, max_bytes: see `observe`.

    Attributes:
        prunable: indices of the layers that are observed.
        importance: float32 [batch, n_tokens] by layer index, for the layers that have been seen so far.
        real: bool [batch, n_tokens], False at padding; None: no padding.

    Raises:
        TypeError, ValueError: the model cannot be pruned; see architecture.py.
    """

    def __init__(self, config: Any, *, queries: int | str, max_bytes: int):
        found = cache_layers(config)
        self.prunable = [index for index, (kind, _) in enumerate(found) if kind == PRUNABLE]
        self.importance: dict[int, Tensor] = {}
        self.real: Tensor | None = None
        self._queries, self._max_bytes = queries, max_bytes
        layers: list[Any] = [ObservingLayer() if kind == PRUNABLE else whole for kind, whole in found]
        super().__init__(layers=layers)
        hold_door(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand back the keys and values, the keys marked for the door where the layer is observed."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return (hand_out(keys, self, layer_idx) if layer_idx in self.prunable else keys), values

    def counts_all_queries(self, handed: HandedOut) -> bool:
        """Whether all queries of this call will be asked for."""
        return self._queries == "all" and handed.layer_idx not in self.importance

    def before_attention(self, handed: HandedOut, module: Any, query: Tensor, mask: Any, backend: str) -> Any:
        """The mask as it is; which tokens are padding is read off the first one."""
        if not self.importance:
            real = real_tokens(mask, query.shape[2])
            self.real = None if real is None or bool(real.all()) else real.expand(query.shape[0], -1)
        return mask

    def after_attention(
        self, handed: HandedOut, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]
    ) -> None:
        """Compute the importance of this layer's keys. Layers that share keys count once, where the keys were made."""
        if handed.layer_idx in self.importance:
            return
        self.importance[handed.layer_idx] = importance_of_call(
            module,
            query,
            key,
            mask,
            options,
            queries=self._queries,
            real=None if self.real is None else self.real.to(query.device),
            max_bytes=self._max_bytes,
        )

    def rows(self) -> list[Tensor]:
        """For each row, float32 [n_prunable_layers, n_real_tokens] on the CPU."""
        importance = torch.stack([self.importance[index].to("cpu") for index in self.prunable], dim=1)
        if self.real is None:
            return list(importance.unbind(0))
        return [of_row[:, real] for of_row, real in zip(importance, self.real.to("cpu"), strict=True)]


def _unseen_message(model: Any, layer_idx: int) -> str:
    implementation = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
    modules = [
        f"{name}: {type(module).__module__}.{type(module).__qualname__}"
        for name, module in model.named_modules()
        if getattr(module, "layer_idx", None) == layer_idx
    ]
    return (
        f"the attention of layer {layer_idx} ({'; '.join(modules) or 'unknown module'}) never came through "
        "transformers' attention interface, so nobody can say what its keys receive. Either the model computes "
        "attention by code of its own, and cannot be pruned by this library, or it is compiled: calibrate it uncompiled"
        f"{explain_unseen(implementation)}"
    )
