"""`PrefixKVCache`: the drop-in. A list of layers, and who keeps how much.

transformers calls `update` with each layer's new pairs; layer.py stores them and says what the attention shall see, and
the tensor goes out marked. The attention hook (hook.py) reports the attention call of that tensor, and pipeline.py
prunes the layer. Here is only what ties them together, and what a user asks of a cache.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..methods import Method, resolve
from ..profiles.profile import PrefixProfile, find_bundled
from ..rules.checks import check_budget, check_integer
from ..rules.importance import DEFAULT_MAX_BYTES
from .architecture import PRUNABLE, Sliding, cache_layers
from .assisted import AssistedDecoding
from .attended import AttendedByHook
from .between import BetweenForwards
from .compat import SEES_EAGER, empty_after_reset
from .compress import CompressedCaches
from .decode import eviction_policy, window_policy
from .guards import (
    ModelFacts,
    check_image_mask,
    check_in_step,
    check_profile_argument,
    explain_unseen_layer,
    image_mask_of,
    refuse_eager,
)
from .hints import Hints
from .hook import hand_out, hand_out_compiled, hold_hook
from .layer import PrunedLayer
from .lengths import LengthSource, length_source
from .loaded import name_of
from .pipeline import prune_ready
from .prompt import Padding
from .quantized import quantizing_prompt
from .quantizers import Quantizer, find_quantizer
from .quick_profile import quick_profile
from .saved import SavedCaches
from .segments import SegmentRule
from .whole import WholeLayers, nbytes_of, positions_of, stored_by_head


class PrefixKVCache(
    Hints, BetweenForwards, AssistedDecoding, CompressedCaches, SavedCaches, WholeLayers, AttendedByHook, Cache
):
    """A KV cache that prunes each decoder layer, right after the prompt, to lengths of its own.

    A drop-in for `DynamicCache`: `model.generate(**inputs, past_key_values=PrefixKVCache.for_model(model, 0.5))`.
    Lengths come from a profile, for each layer (PrefixKV, arXiv 2412.03409) or for each key head, or without one from
    the method. Positions stay true throughout: rotary angles go on from the number of tokens *seen*.

    With a profile, and with uniform lengths, a layer is pruned before the next one runs: the peak is the pruned cache
    and one whole layer. Where lengths are found on the prompt itself (`lengths="search"` or `"pool"`), all layers are
    needed for them: the peak is the whole prompt cache, once.

    A later prompt on the same cache (a second turn, or the next chunk of a long one) is pruned by the same keep ratios
    over its own tokens. Where it brings images of its own, assign a mask of all tokens so far to `cache.image_mask`.

    Args:
        profile: a `PrefixProfile`, a path to one, the name of a bundled one, or None.
        budget: what is kept, averaged over the prunable layers and their key heads: a fraction of the prompt's KV pairs
            in (0, 1], or an integer of at least 1: so many pairs a head (a longer prompt keeps no more).
        method: a `Method`, its spelling (`"snapkv:queries=64"`), or None: the profile's own, else `methods.DEFAULT`.
        config: the model's config. Needed for models with sliding, chunked or linear layers, which are left whole;
            checked against the profile whenever given.
        image_mask: bool [batch, n_prompt], True at the image (and video) tokens of the first prompt. With fewer rows
            than the batch, each speaks for as many rows side by side (beams). None: nothing is known of images.
        max_new_tokens: so many tokens will be generated after each prompt. All memory is then allocated once, at the
            prompt's end, and decode steps have fixed shapes and addresses, as `torch.compile` and CUDA graphs need them
            (docs/performance.md). None: memory grows as it is needed.
        prune_sliding: whether layers with a sliding window are pruned, too, inside their window, in models that have
            layers of full attention beside them. Where every layer slides, they are in any case. Needs the config, and
            eager, sdpa or flex attention.
        quantize: `"int8"` or `"int4"`: what is kept is stored in so many bits, by optimum-quanto, but for the newest
            pairs (quantized.py); `"hqq-int8"` or `"hqq-int4"`: by hqq. None: as the model made it. Layers that are left
            whole are not quantised.
        offloading: keep the pairs of all layers but the current one and the next in CPU memory (CUDA only), as
            transformers' own caches do.
        max_bytes: ceiling for the temporaries of the importance computation, per layer.

    Raises:
        TypeError, ValueError: an argument is not what is described above.
        ImportError: the library that quantises is not installed.
        ProfileError: the profile cannot be read, or is for another number of layers or key heads than the model has.
    """

    def __init__(
        self,
        profile: PrefixProfile | str | os.PathLike[str] | None = None,
        budget: float | int = 0.5,
        *,
        method: Method | str | None = None,
        config: Any = None,
        image_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        prune_sliding: bool = False,
        quantize: str | None = None,
        offloading: bool = False,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ):
        self.profile, self.budget = _load_profile(profile), _check_budget(budget)
        self.method = resolve(method, None if self.budget == 1.0 and method is not None else self.profile)
        self.image_mask = image_mask
        self.max_new_tokens = None if max_new_tokens is None else check_integer("max_new_tokens", max_new_tokens, 1)
        self.max_bytes = check_integer("max_bytes", max_bytes, 1)
        self._model_name = name_of(config)
        self.quantize = quantize
        self._rule = _segment_rule(self.method, self.max_new_tokens, offloading, find_quantizer(quantize))
        self._sliding = _sliding(prune_sliding, self.budget, config)
        self._facts = ModelFacts.of_config(config, self._sliding)
        self._source: LengthSource | None = None
        self._use_facts()
        self._padding = Padding()
        self._holds_hook = False
        try:
            if offloading:
                torch.cuda.default_stream(None)  # the first forward asks for it, where it would be too late to say so
            super().__init__(layers=self._first_layers(config), offloading=offloading)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"offloading={offloading!r} needs streams, which a GPU has: {error}") from None

    @classmethod
    def for_model(
        cls, model: Any, budget: float | int = 0.5, *, inputs: Any = None, calibrate_with: Any = None, **kwargs: Any
    ) -> PrefixKVCache:
        """A cache for this model: its config, and its bundled profile if there is one that was measured.

        A bundled profile is taken when the model's name or path holds the profile's name, the depths agree, and the
        profile says what it was measured to cost.

        Args:
            model: a transformers model; only its `config` is looked at, unless there is `calibrate_with`.
            budget: as of the constructor.
            calibrate_with: where there is no such profile: a prompt, as `model.generate(**inputs)` takes it, from which
                one is made and kept in the user's cache folder (quick_profile.py).
            inputs: what the processor made of the prompt. With them, `image_mask` is filled from the model's image and
                video token ids. Without an id of either in the config it stays None.
            kwargs: further arguments of `PrefixKVCache`.
        """
        config = getattr(model, "config", None)
        if config is None:
            cure = "where there is only its config: PrefixKVCache(budget=..., config=config)"
            raise TypeError(f"for_model takes the model itself and got a {type(model).__name__}; {cure}")
        kwargs.setdefault("config", config)
        if inputs is not None:
            kwargs.setdefault("image_mask", image_mask_of(inputs, config))
        if "profile" not in kwargs:
            sliding = Sliding(bool(kwargs.get("prune_sliding")), True)
            prunable = sum(kind == PRUNABLE for kind, _ in cache_layers(config, sliding))
            kwargs["profile"] = find_bundled(config, prunable)
            if kwargs["profile"] is None and calibrate_with is not None:
                kwargs["profile"] = quick_profile(model, calibrate_with, cls(config=config).layers)
        return cls(budget=budget, **kwargs)

    # What a user asks.

    @property
    def image_mask(self) -> Tensor | None:
        """Which tokens are image tokens, bool [batch, n]; may be assigned anew before a prompt that brings images."""
        return self._image_mask

    @image_mask.setter
    def image_mask(self, mask: Tensor | None) -> None:
        self._image_mask = check_image_mask(mask)

    def stored_lengths(self, heads: bool = False) -> list[Any]:
        """KV pairs that each layer holds, by its longest row.

        Args:
            heads: whether to tell key heads apart.

        Returns:
            Pairs a head by layer: an int, the mean over the key heads, rounded; 0 for layers that hold none. With
            `heads`, a list with one int for each key head instead.
        """
        stored = [
            layer.stored_by_head if isinstance(layer, PrunedLayer) else stored_by_head(layer) for layer in self.layers
        ]
        return stored if heads else [round(sum(each) / len(each)) if each else 0 for each in stored]

    def kept_positions(self, layer_idx: int) -> Tensor:
        """The logical position of each stored pair of a layer.

        Returns:
            int64 [batch, stored], or [batch, kv_heads, longest] where heads keep keys of their own: columns of the
            tokens fed so far (padding counted), in the order in which the pairs lie in memory (rising after a prompt;
            decoding overwrites slots); -1 where a slot holds nothing.

        Raises:
            IndexError: there is no such layer (yet).
            ValueError: the layer keeps no keys of its own positions (a linear or dummy layer).
        """
        if not isinstance(layer := self.layers[layer_idx], PrunedLayer):
            return positions_of(layer, layer_idx)
        positions = layer.slot_positions()
        return (positions[:, 0] if positions.shape[1] == 1 else positions).clone()

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value tensors allocated, spare room included; quantised, codes and scales."""
        return sum(layer.nbytes if isinstance(layer, PrunedLayer) else nbytes_of(layer) for layer in self.layers)

    # What transformers calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new pairs of a layer; return the keys and values with which the model goes on.

        Args:
            key_states: [batch, kv_heads, n_new, head_dim], rotary position applied.
            value_states: likewise.
            layer_idx: decoder layer, from 0.
            args, kwargs: for layers that are left whole.

        Raises:
            RuntimeError: the attention call of this layer's last prompt never came through the attention hook, or this
                transformers cannot show it (eager attention before 5.1).
            ProfileError: the model has more layers than the profile.
            ValueError: the batch differs from the stored one, or there are no tokens.
        """
        if not self._holds_hook:
            if not SEES_EAGER:
                refuse_eager(layer_idx)
            hold_hook(self)
            self._holds_hook = True
        self._facts.check_layer(layer_idx, self.profile)
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        layer = self.layers[layer_idx]
        if layer_idx == self._facts.first:
            self._notice(key_states.shape[2], layer)
        if not isinstance(layer, PrunedLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer.prompt is not None:
            self._settle_prompts(layer_idx)
        if layer.planned and torch.compiler.is_compiling():
            keys, values = layer.update(key_states, value_states)
            return hand_out_compiled(keys, layer.take_shown()), values
        if not layer.planned or key_states.shape[2] > 1:
            check_in_step(self.layers[self._facts.first], layer, layer_idx, key_states.shape[2])
        first = layer is self.layers[self._facts.first]
        layer.n_candidates = n = self._count_candidates(layer, key_states.shape[2]) if first else self._n_candidates
        if self.offloading:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        else:
            keys, values = layer.update(key_states, value_states)
        return hand_out(keys, self, layer_idx, layer.take_shown(), n if layer.prompt is not None else 0), values

    def reset(self) -> None:
        """Forget all pairs, and the image mask, which was that prompt's; ready for another, unrelated prompt."""
        self._padding, self._image_mask = Padding(), None
        if not self._facts.from_config:
            self.layers, self._facts, self._source = [], ModelFacts.unknown(), None
            self._use_facts()
        super().reset()
        for layer in self.layers:
            empty_after_reset(layer)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the hook themselves, from their first update on."""
        return {**self.__dict__, "_holds_hook": False, "_padding": Padding()}

    # Layers.

    def _first_layers(self, config: Any) -> list[Any]:
        if config is None:
            return []
        kinds = cache_layers(config, self._sliding)
        windows = {getattr(whole, "sliding_window", None) for kind, whole in kinds if kind == PRUNABLE}
        if self.method.lengths.need_all_layers and self.profile is None and len(windows) > 1:
            raise ValueError(
                f"lengths={self.method.lengths.lengths!r} compares layers that see the whole prompt with those of a "
                "window; take lengths='uniform' or a profile beside prune_sliding=True"
            )
        return [
            self._new_layer(index, getattr(whole, "sliding_window", None)) if kind == PRUNABLE else whole
            for index, (kind, whole) in enumerate(kinds)
        ]

    def _new_layer(self, layer_idx: int, window: int | None = None) -> PrunedLayer:
        rule = self._rule
        if window is not None:
            rule = replace(rule, policy=window_policy(self.method, window), counts_received=False)
        return PrunedLayer(rule, self._facts.place(layer_idx), window)

    def _use_facts(self) -> None:
        """Check the profile against what is known of the model, and make the source of lengths for it."""
        self._facts.check_profile(self.profile)
        self._source = length_source(self.method, self.profile, self.budget, self._facts.n_layers)

    def _needs_all_layers(self) -> bool:
        return self._lengths().waits

    def _lengths(self) -> LengthSource:
        assert self._source is not None, "made by the constructor and by reset()"
        return self._source

    def _pruned(self, layer_idx: int) -> PrunedLayer:
        layer = self.layers[layer_idx]
        assert isinstance(layer, PrunedLayer), "only the keys of pruned layers are handed out"
        return layer

    def _waiting(self) -> list[PrunedLayer]:
        """Layers whose prompt is not pruned yet."""
        return [layer for layer in self.layers if isinstance(layer, PrunedLayer) and layer.prompt is not None]

    def _settle_prompts(self, layer_idx: int | None = None) -> None:
        """Prune what still waits for the last layer; refuse to go on where the attention was never seen."""
        waiting = self._waiting()
        for layer in waiting:
            if layer.prompt is not None and not layer.prompt.attended:
                raise RuntimeError(explain_unseen_layer(self.layers.index(layer) if layer_idx is None else layer_idx))
        if waiting and len(waiting) < self._facts.n_layers:
            raise RuntimeError(
                f"an earlier prompt reached {len(waiting)} of {self._facts.n_layers} layers only, so their lengths "
                "were never found (was that forward interrupted?); call cache.reset()"
            )
        if waiting:
            prune_ready(waiting, self.method, self._lengths())


def _check_budget(budget: Any) -> float | int:
    checked = check_budget(budget)
    if type(checked) is int and checked == 1:
        warnings.warn("budget=1 keeps one pair a head; write budget=1.0 to keep everything", stacklevel=3)
    return checked


def _sliding(prune_sliding: Any, budget: float | int, config: Any) -> Sliding:
    if not isinstance(prune_sliding, bool):
        raise TypeError(f"prune_sliding must be True or False; got {prune_sliding!r}")
    if prune_sliding and config is None:
        raise ValueError("prune_sliding=True needs the model's config: PrefixKVCache(..., config=model.config)")
    everything = budget == 1.0 and type(budget) is float
    return Sliding(prune_sliding and not everything, not everything)


def _segment_rule(
    method: Method, max_new_tokens: int | None, offloading: bool, quantizer: Quantizer | None
) -> SegmentRule:
    counts_received = method.decode.evict == "least-important"
    if max_new_tokens is not None and (offloading or counts_received):
        raise ValueError(
            "max_new_tokens plans the decode steps beforehand, which evict='least-important' and offloading=True "
            "do not allow; leave one of them out"
        )
    if quantizer is not None and (offloading or max_new_tokens is not None):
        other = "offloading=True" if offloading else "max_new_tokens, which plans decode steps at fixed addresses"
        raise ValueError(f"quantize={quantizer.name!r} does not go with {other}; leave one of them out")
    protect = method.protect
    rule = SegmentRule(
        eviction_policy(method), protect.recent, protect.sink, protect.merge, counts_received, max_new_tokens
    )
    return rule if quantizer is None else replace(rule, prompt_pairs=quantizing_prompt(quantizer))


def _load_profile(profile: Any) -> PrefixProfile | None:
    check_profile_argument(profile)
    return profile if profile is None or isinstance(profile, PrefixProfile) else PrefixProfile.load(profile)
