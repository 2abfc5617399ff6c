"""One prompt through the model, observed and not pruned: how every layer's keys rank.

The calibrator's counterpart of the cache, on the same attention hook and scoring (cache/pipeline.py). Goes in: a model
and a sample. Comes out: the scores of each row. What the scores are good for is decided elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..cache.architecture import PRUNABLE, cache_layers
from ..cache.call import AttentionCall
from ..cache.compat import MaxLengthNames, explain_unseen, n_queries
from ..cache.hook import HandedOut, hand_out, hold_hook
from ..cache.pipeline import score_calls
from ..cache.segments import Shown
from ..cache.tensor_parallel import ALONE, HeadRanks
from ..methods import Method
from ..methods.method import Ranking
from ..rules.importance import DEFAULT_MAX_BYTES
from ..rules.masks import valid_tokens
from ..rules.scoring import join_heads

# Arguments that would make the model compute more than the attention, or that are ours to give.
_NOT_PASSED_ON = ("labels", "past_key_values", "use_cache", "logits_to_keep")


class UnobservedAttentionError(RuntimeError):
    """A layer's attention never came to the attention hook: the model as it is cannot be calibrated."""


class PassingLayer(MaxLengthNames, CacheLayerMixin):
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
        """Hand back what came: [batch, heads, n_new, head_dim]."""
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


class ObservedCache(Cache):
    """A full cache whose attention calls in prunable layers are looked at, and whose pairs may be hidden from them.

    Args:
        config: the model's config.
        stored: whether prunable layers keep their pairs; if not, one forward costs what it does without a cache.

    Attributes:
        prunable: indices of the layers that can be pruned.
        observer: what looks at the calls; None: nothing does.
        kept: bool [batch, kv_heads, n] by layer index, which of the first n pairs attention sees; a layer that is not
            there shows all.
        gates: float [batch, kv_heads, n] by layer index, added to the attention logits of the first n pairs.

    Raises:
        TypeError, ValueError: the model cannot be pruned; see architecture.py.
    """

    def __init__(self, config: Any, *, stored: bool):
        found = cache_layers(config)
        self.prunable = [index for index, (kind, _) in enumerate(found) if kind == PRUNABLE]
        self.observer: Observer | None = None
        self.kept: Mapping[int, Tensor] = {}
        self.gates: Mapping[int, Tensor] = {}
        own = DynamicLayer if stored else PassingLayer
        layers: list[Any] = [own() if kind == PRUNABLE else whole for kind, whole in found]
        super().__init__(layers=layers)
        hold_hook(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Update the layer; keys of prunable layers are handed out to the attention hook."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self.prunable:
            return keys, values
        return hand_out(keys, self, layer_idx, [self._shown(keys, self.kept.get(layer_idx))]), values

    def _shown(self, keys: Tensor, kept: Tensor | None) -> Shown:
        if kept is None:
            return Shown(None)
        n = keys.shape[2]
        visible = torch.nn.functional.pad(kept.to(keys.device), (0, n - kept.shape[2]), value=True)
        positions = torch.arange(n, device=keys.device).expand_as(visible).masked_fill(~visible, -1)
        return Shown(None, own_mask=True, ragged=True, positions=positions)

    def before_attention(self, handed: HandedOut, call: AttentionCall) -> None:
        """Put the gates into the mask."""
        gates = self.gates.get(handed.layer_idx)
        if gates is not None:
            call.mask = gated_mask(call.mask, gates, call.query, call.key.shape[2])

    def watches(self, handed: HandedOut) -> bool:
        """Whether anything looks at the calls, or changes them."""
        return self.observer is not None or handed.layer_idx in self.gates

    def wants_log_sum_exp(self, handed: HandedOut) -> bool:
        """Whether the observer will ask for the importance of all queries."""
        return self.observer is not None and self.observer.wants_log_sum_exp(handed.layer_idx)

    def after_attention(self, handed: HandedOut, calls: Sequence[AttentionCall]) -> None:
        """Show the call to the observer. Where layers share keys, the index is that of the layer that made them."""
        if self.observer is not None:
            self.observer.look(handed.layer_idx, calls[0])


def gated_mask(mask: Any, gates: Tensor, query: Tensor, n_keys: int) -> Tensor:
    """The mask with something added for each head: float [batch, query_heads, n_queries, n_keys].

    Args:
        mask: as sdpa and eager attention take it: bool, or float that is added; None: all is seen.
        gates: [batch, kv_heads, n], of the first n keys.
        query: [batch, query_heads, n_queries, head_dim].
        n_keys: how many keys the call has.
    """
    n_heads = query.shape[1]
    added = torch.nn.functional.pad(gates, (0, n_keys - gates.shape[2])).to(query.dtype)
    added = added.repeat_interleave(n_heads // gates.shape[1], dim=1)[:, :, None].expand(-1, -1, query.shape[2], -1)
    if mask is None:
        return added
    mask = mask[..., :n_keys]
    lowest = torch.finfo(query.dtype).min
    return added.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (added + mask).clamp_min(lowest)


class Observer(Protocol):
    """What looks at attention calls."""

    def wants_log_sum_exp(self, layer_idx: int) -> bool:
        """Whether all queries of the coming call count."""
        ...

    def look(self, layer_idx: int, call: AttentionCall) -> None:
        """Take note of a call that has returned."""
        ...


ScoreKey: TypeAlias = tuple[Ranking, int]


def score_key(method: Method) -> ScoreKey:
    """What of a method its scores depend on: ranking and sink."""
    return method.ranking, method.protect.sink


class Scores:
    """Observer of the prompt's forward: scores its keys, by one method or several.

    Args:
        methods: how keys are ranked.
        max_bytes: ceiling for the temporaries of the importance computation, per layer.
        image: bool [batch, n], True at image tokens; None: nothing is known of images.

    Attributes:
        of: by ranking and sink: float32 [batch, all kv_heads, n] by layer index; [batch, 1, n] where heads agree.
        seen: layers that were scored.
        valid: bool [batch, n], False at padding; None: no padding.
        ranks: the tensor-parallel ranks that share the heads.
    """

    def __init__(self, methods: Sequence[Method], max_bytes: int, image: Tensor | None = None):
        self.max_bytes, self._image = max_bytes, image
        self._methods = {score_key(method): method for method in methods}
        self.of: dict[ScoreKey, dict[int, Tensor]] = {key: {} for key in self._methods}
        self.seen: dict[int, bool] = {}
        self.valid: Tensor | None = None
        self.ranks = ALONE

    def wants_log_sum_exp(self, layer_idx: int) -> bool:
        """Whether all queries of the coming call count."""
        return layer_idx not in self.seen and any(
            ranking.score == "attention" and "all" in (ranking.queries, ranking.context) for ranking, _ in self.of
        )

    def look(self, layer_idx: int, call: AttentionCall) -> None:
        """Score the keys of one layer, at the first call that shows them."""
        if layer_idx in self.seen:
            return
        n = call.query.shape[2]
        if not self.seen:
            valid = valid_tokens(call.mask, n)
            self.valid = None if valid is None or bool(valid.all()) else valid.expand(call.key.shape[0], -1)
            self.ranks = HeadRanks.of(call.module)
        valid, image = (None if each is None else each.to(call.key.device) for each in (self.valid, self._image))
        for key, method in self._methods.items():
            scores = score_calls([call], [None], method, n, valid, image, method.protect.sink, self.max_bytes)
            self.of[key][layer_idx] = join_heads(HeadRanks.of(call.module).gather(scores), method.ranking.heads)
        self.seen[layer_idx] = True


def valid_rows(of_batch: Tensor, valid: Tensor | None) -> list[Tensor]:
    """[n_layers, batch, heads, n] -> for each row [n_layers, heads, n_valid]; an error where a row has no token."""
    rows = list(of_batch.unbind(1))
    if valid is not None:
        rows = [row[..., own] for row, own in zip(rows, valid.cpu(), strict=True)]
    for index, row in enumerate(rows):
        if row.shape[-1] == 0:
            raise ValueError(f"row {index} of the sample is padding only")
    return rows


@torch.no_grad()
def observe(
    model: Any,
    sample: Mapping[str, Any],
    method: Method,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> list[Tensor]:
    """Score of every key in every prunable layer, for each row of a sample by itself: what the cache searches on.

    The model runs as it does for a prompt, in eval mode and without gradients; sliding, chunked and linear layers take
    part in the forward, but not in the result.

    Args:
        model: a transformers model of a kind that `PrefixKVCache` can prune, in any dtype, on one device or several.
        sample: what `model(**sample)` takes, padded or not; moved to the model's device.
        method: how keys are ranked.
        max_bytes: ceiling for the temporaries of the importance computation, per layer.

    Returns:
        One float32 tensor [n_prunable_layers, n_valid] for each row of the batch, on the CPU: the mean over the heads.

    Raises:
        UnobservedAttentionError: the model computes the attention of a layer by code of its own.
        TypeError, ValueError: the sample is no mapping; the model cannot be pruned (see architecture.py) or ranked so.
    """
    inputs = model_inputs(model, sample)
    cache = ObservedCache(model.config, stored=False)
    cache.observer = scores = Scores([method], max_bytes)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1  # one row of logits is the fewest that there can be
    with evaluating(model):
        model(**inputs, past_key_values=cache, use_cache=True)
    check_observed(model, cache.prunable, scores.seen)
    found = scores.of[score_key(method)]
    of_layers = torch.stack([found[index].mean(1, keepdim=True).cpu() for index in cache.prunable])
    return [row[:, 0] for row in valid_rows(of_layers, scores.valid)]


def model_inputs(model: Any, sample: Any) -> dict[str, Any]:
    """What of a sample the model is given, on its device."""
    if not isinstance(sample, Mapping):
        raise TypeError(f"a sample is a dict of what model(**sample) takes; got {type(sample).__name__}")
    return {name: _to(model.device, value) for name, value in sample.items() if name not in _NOT_PASSED_ON}


def _to(device: torch.device, value: Any) -> Any:
    # A model that is offloaded to disk has no device to speak of; its own hooks move what it needs.
    return value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode for the time being: dropout would be in the attention, and checkpointing turns the cache off."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_observed(model: Any, layers: list[int], observed: Container[int]) -> None:
    """Raise an `UnobservedAttentionError` where a layer's attention was not seen."""
    unseen = [index for index in layers if index not in observed]
    if not unseen:
        return
    implementation = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
    modules = [
        f"{name}: {type(module).__module__}.{type(module).__qualname__}"
        for name, module in model.named_modules()
        if getattr(module, "layer_idx", None) == unseen[0]
    ]
    raise UnobservedAttentionError(
        f"the attention of layer {unseen[0]} ({'; '.join(modules) or 'unknown module'}) never came through "
        "transformers' attention interface, so what its keys receive is not known. Either the model computes "
        "attention by code of its own, and cannot be pruned by this library, or it is compiled: calibrate it uncompiled"
        f"{explain_unseen(implementation)}"
    )
