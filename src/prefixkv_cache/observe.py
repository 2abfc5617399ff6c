"""One prompt through the model, watched and not pruned: how every layer's keys rank.

The calibrator's counterpart of cache.py, on the same door (attention.py), importance (importance.py) and ranking
(scoring.py). Its cache stores nothing: each prunable layer hands the model's own keys and values straight back, and
looks at them once more when that layer's attention is over, so the forward costs the memory of a forward without a
cache, and of the scores, one number a key and layer. What the scores are good for is not its business.
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
from .attention import HandedOut, hand_out, hold_door, importance_of_call, scores_of_call
from .compat import MaxLengthNames, explain_unseen, n_queries
from .distributed import join_head_ranks
from .importance import DEFAULT_MAX_BYTES
from .masks import real_tokens
from .scoring import Ranking, text_queries

# Arguments that would make the model compute more than the attention, or that are ours to give.
_NOT_PASSED_ON = ("labels", "past_key_values", "use_cache", "logits_to_keep")


class UnobservedAttentionError(RuntimeError):
    """A layer's attention never came through the door: the model as it is cannot be calibrated."""


@torch.no_grad()
def observe(
    model: Any,
    sample: Mapping[str, Any],
    *,
    ranking: Ranking,
    image_mask: Tensor | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> list[Tensor]:
    """Score of every key in every prunable layer, for each row of a sample by itself: what the cache searches on.

    With a plain ranking (calibrated_for.py) that is the importance.

    The model runs as it does for a prompt, in eval mode and without gradients; sliding, chunked and linear layers take
    part in the forward, but not in the result.

    Args:
        model: a transformers model of a kind that `PrefixKVCache` can prune, in any dtype, on one device or several.
        sample: what `model(**sample)` takes, padded or not; moved to the model's device.
        ranking: whose attention counts, and what becomes of it.
        image_mask: bool [batch, n_tokens], True at image tokens; needed for the queries `"text"`.
        max_bytes: ceiling for the temporaries of the importance computation, per layer.

    Returns:
        One float32 tensor [n_prunable_layers, n_real_tokens] for each row of the batch, on the CPU; where each head
        ranks keys for itself, the mean over the heads.

    Raises:
        UnobservedAttentionError: the model computes the attention of a layer by code of its own.
        TypeError, ValueError: the sample is no mapping; the model cannot be pruned (see architecture.py) or ranked so;
            the image mask is not there, or not as long as the prompt.
    """
    if not isinstance(sample, Mapping):
        raise TypeError(f"a sample is a dict of what model(**sample) takes; got {type(sample).__name__}")
    cache = ObservingCache(model.config, ranking=ranking, image_mask=image_mask, max_bytes=max_bytes)
    inputs = {name: _to(model.device, value) for name, value in sample.items() if name not in _NOT_PASSED_ON}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1  # one row of logits is the fewest that there can be
    with _evaluating(model):
        model(**inputs, past_key_values=cache, use_cache=True)
    unseen = [index for index in cache.prunable if index not in cache.scores]
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
        ranking, image_mask, max_bytes: see `observe`.

    Attributes:
        prunable: indices of the layers that are observed.
        scores: float32 [batch, n_tokens] by layer index, for the layers that have been seen so far.
        real: bool [batch, n_tokens], False at padding; None: no padding.

    Raises:
        TypeError, ValueError: the model cannot be pruned; see architecture.py.
    """

    def __init__(self, config: Any, *, ranking: Ranking, image_mask: Tensor | None = None, max_bytes: int):
        found = cache_layers(config)
        self.prunable = [index for index, (kind, _) in enumerate(found) if kind == PRUNABLE]
        self.scores: dict[int, Tensor] = {}
        self.real: Tensor | None = None
        self._ranking, self._image_mask, self._max_bytes = ranking, image_mask, max_bytes
        self._pairs: tuple[Tensor, Tensor] | None = None  # of the layer whose attention is on
        layers: list[Any] = [ObservingLayer() if kind == PRUNABLE else whole for kind, whole in found]
        super().__init__(layers=layers)
        hold_door(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand back the keys and values, the keys marked for the door where the layer is observed."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self.prunable:
            return keys, values
        self._pairs = (key_states, value_states)
        return hand_out(keys, self, layer_idx), values

    def counts_all_queries(self, handed: HandedOut) -> bool:
        """Whether all queries of this call will be asked for."""
        waiting = handed.layer_idx not in self.scores
        return waiting and self._ranking.sums_all

    def before_attention(self, handed: HandedOut, module: Any, query: Tensor, mask: Any, backend: str) -> Any:
        """The mask as it is; which tokens are padding is read off the first one."""
        if not self.scores:
            real = real_tokens(mask, query.shape[2])
            self.real = None if real is None or bool(real.all()) else real.expand(query.shape[0], -1)
        return mask

    def after_attention(
        self, handed: HandedOut, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]
    ) -> None:
        """Score this layer's keys. Layers that share keys count once, where the keys were made."""
        if handed.layer_idx in self.scores or self._pairs is None:
            return
        (keys, values), self._pairs = self._pairs, None
        ranking, real = self._ranking, None if self.real is None else self.real.to(query.device)
        importance = importance_of_call(
            module,
            query,
            key,
            mask,
            options,
            ranking=ranking,
            real=self._counting(query, real),
            max_bytes=self._max_bytes,
        )
        scores = scores_of_call(importance, keys, values, ranking, real, module)
        of_keys = scores.mean(1)
        # Ranks that hold other heads find other means, and one profile has to serve all of them.
        self.scores[handed.layer_idx] = join_head_ranks(of_keys, module) if ranking.heads == "each" else of_keys

    def _counting(self, query: Tensor, real: Tensor | None) -> Tensor | None:
        """Whose queries may count, bool [batch, n_tokens]; None: everybody's."""
        if self._ranking.queries != "text":
            return real
        shape = (query.shape[0], query.shape[2])
        if self._image_mask is None or tuple(self._image_mask.shape) != shape:
            found = "there is none" if self._image_mask is None else f"it is {list(self._image_mask.shape)}"
            raise ValueError(
                f"queries='text' ranks keys by the text behind the first image, and needs an image mask {list(shape)}; "
                f"{found}"
            )
        return text_queries(self._image_mask.to(query.device), real)

    def rows(self) -> list[Tensor]:
        """For each row, float32 [n_prunable_layers, n_real_tokens] on the CPU."""
        scores = torch.stack([self.scores[index].to("cpu") for index in self.prunable], dim=1)
        if self.real is None:
            return list(scores.unbind(0))
        return [of_row[:, real] for of_row, real in zip(scores, self.real.to("cpu"), strict=True)]


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
