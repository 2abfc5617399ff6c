"""`PrefixKVCache`: the drop-in. A list of layers, and who keeps how much.

Ties the parts together for one model call after another: `update` stores and hands out keys (layer.py), the door
(attention.py) reports the attention call, importance.py says what each key received, scoring.py how that ranks the
keys, the profile or the search how many stay, selection.py which ones, and the layer gathers them. The work itself is
done in those modules.
"""

from __future__ import annotations

import numbers
import os
import re
import sys
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .architecture import PRUNABLE, cache_layers, whole_layer_kinds
from .attention import HandedOut, hand_out, hand_out_compiled, hold_door, importance_of_call, scores_of_call
from .calibrated_for import tell_mismatch
from .compat import SEES_EAGER, crops_to_nothing, empty_after_reset, explain_unseen
from .eviction import Eviction, FixedPointEviction, LeastImportantEviction
from .importance import DEFAULT_MAX_BYTES
from .layer import Prompt, PrunedLayer
from .lengths import check_clips, clip_ratios, dithered_count, pyramid_ratios, temper_counts, temper_ratios
from .masks import layer_mask, real_tokens
from .profile import PrefixProfile, ProfileError, check_budget, prompt_counts
from .scoring import Ranking, check_choice, check_fraction, text_queries, to_float
from .selection import places, select_keys
from .threshold import search_threshold

_LENGTHS = ("search", "uniform", "pyramid")
_EVICTIONS = ("fixed-point", "oldest", "least-important")
_MERGES = (None, "kv", "value")

PAPER: Mapping[str, Any] = MappingProxyType(
    {
        "queries": "all", "distance": 25, "slack": 0, "novelty": 0.0, "diversity": 0.0, "average": "sum",
        "heads": "mean", "pooling": 1, "value_norm": False, "lengths": "search", "floor": 0.0, "cap": None,
        "temperature": 0.0, "recent": 1, "evict": "fixed-point", "merge": None, "text_floor": 0.0,
    }
)  # fmt: skip
"""PrefixKV as published, as arguments of `PrefixKVCache`; see `PrefixKVCache.paper`."""


class PrefixKVCache(Cache):
    """A KV cache that prunes each decoder layer, right after the prompt, to a length of that layer's own.

    A drop-in for `DynamicCache`: `model.generate(**inputs, past_key_values=PrefixKVCache(profile, budget=0.5))`.
    The lengths come from a profile (PrefixKV, arXiv 2412.03409) or, without one, from the same search on the prompt
    itself. Positions stay true throughout: rotary angles go on from the number of tokens *seen*.

    The default is what did best in docs/study.md, on two small models; `PrefixKVCache.paper` is the paper's rule. In
    this order:

    1. Importance: the attention that a key receives from the prompt's last 32 tokens. Summed over all queries, as in
       the papers, early image tokens win whatever they show, since more queries see them.
    2. Diversity: half of a key's score is how far it points away from the layer's mean key.
    3. Novelty: a key loses score by how much its value repeats that of a better-ranked one. The background of a picture
       is many patches that say the same; one of them is enough.
    4. Each layer keeps the best by this score, as many as its profile says, or as the search over these scores.
    5. Slack: while decoding, a layer may hold 64 pairs beyond its share of the tokens seen, so that what was just
       written stays readable; beyond that generated pairs leave, oldest first, and the picture stays. Every turn of a
       chat has this to itself, up to half of it for the question.

    With a profile, a layer is pruned before the next one runs: the peak is the pruned cache and one whole layer.
    Without one, all layers are needed for the search: the peak is the whole prompt cache, once.

    A later prompt on the same cache (a second turn, or the next chunk of a long one) is pruned by the same keep ratios
    over its own tokens; pairs kept earlier stay, but for those that an answer held beyond its share: they leave as the
    next turn begins, and its prompt may keep half of the slack beyond its own (eviction.py). Where it brings images of
    its own and the cache shall know them, assign a mask of all tokens so far:
    `cache.image_mask = inputs["input_ids"] == model.config.image_token_id`.

    Args:
        profile: a `PrefixProfile`, a path to one, the name of a bundled one, or None: search on the prompt itself.
        budget: fraction of the prompt's KV pairs kept, averaged over the prunable layers, in (0, 1].
        config: the model's config. Needed for models with sliding, chunked or linear layers, which are left whole;
            checked against the profile whenever given.
        queries: whose attention counts: `"all"` prompt tokens (the papers' equation), `"text"`: the text behind the
            first image (needs `image_mask`; without an image all text, and where the prompt ends in an image its last
            32 tokens too), or an integer W: the last W real tokens of the prompt.
        sink: this many first tokens of the prompt are never pruned (its last token neither).
        distance: the fixed point of decoding lies this many pairs before the prompt's end, and what stands behind it
            leaves, oldest first. 1: the prompt's last pair goes first, then the oldest generated ones; the papers' 25
            takes the prompt's last 25 pairs first. None: nothing leaves while decoding.
        average: `"sum"` over these queries, or `"visible"`: divided by how many of them can see the key; see `Ranking`.
        heads: how the heads agree on keys: `"mean"`, `"max"`, or `"each"`: every key head keeps its own; see `Ranking`.
        pooling: window, in keys, over which importance spreads to neighbours, an odd number; 1: none; see `Ranking`.
        value_norm: whether importance is multiplied by the norm of the value; see `Ranking`.
        diversity: share of the score that is a key's difference from the others, in [0, 1]; 0 is the papers' rule; see
            `Ranking`.
        novelty: exponent of the factor by which a key loses what better-ranked keys say already; 0 is the papers' rule,
            and the larger, the less counts what is said twice; see `Ranking`.
        lengths: where there is no profile: `"search"` on the prompt, `"uniform"`: the budget for every layer, or
            `"pyramid"`: falling from layer to layer (PyramidKV, arXiv 2406.02069).
        floor: no layer keeps less than `floor * budget` of the prompt, in [0, 1]; what that takes comes from the layers
            above it. 0: none; 1: uniform lengths. See lengths.py and threshold.py for how clipped lengths add up.
        cap: no layer keeps more than `cap * budget` of the prompt, 1 or more; what that frees goes to the layers below
            it. None: none; 1: uniform lengths. (A layer of a short prompt keeps `sink + 1` pairs all the same.)
        temperature: share of all pairs that is handed out equally, in [0, 1], the rest by profile, search or pyramid,
            floor and cap. 0: none; 1: uniform lengths.
        recent: last tokens of the prompt that are never pruned: how many (at least 1), or below 1 a share of the pairs
            that the layer keeps.
        evict: which pair leaves while decoding: `"fixed-point"`, `"oldest"` behind the sink, or `"least-important"` by
            attention received so far (H2O, arXiv 2306.14048). How many leave is the same for all.
        slack: pairs that a layer may hold beyond its share of the tokens seen before one leaves while decoding: with
            `distance=1`, so many generated tokens stay readable beside the prompt's pairs. 0 is the papers' rule: the
            share is held to the end, at the price of what was just said, and a short question of a later turn is pruned
            like a picture.
        merge: `"kv"`: each pruned pair is merged into the nearest that stays (Elastic Cache), `"value"`: its value
            only, None: it is dropped.
        image_mask: bool [batch, n_prompt], True at the image (and video) tokens of the first prompt; what comes behind
            its last column is text. With fewer rows than the batch, each speaks for as many rows side by side (beams).
            None: nothing is known of images.
        text_floor: share of the prompt's text tokens that is never pruned, in [0, 1], the best by score; where not even
            that fits, as many as fit. Has a meaning only with an `image_mask`.
        max_new_tokens: at most so many tokens will be generated after each prompt. All memory is then allocated once,
            at the prompt's end, and decode steps have fixed shapes and addresses, as `torch.compile` and CUDA graphs
            need them (docs/performance.md). None: memory grows as it is needed.
        max_bytes: ceiling for the temporaries of the importance computation, per layer.
        offloading: keep the pairs of all layers but the current one and the next in CPU memory (CUDA only), as
            transformers' own caches do.

    Raises:
        TypeError, ValueError: an argument is not what is described above.
        ProfileError: the profile cannot be read, or is for another number of layers than `config` has.
    """

    _takes_profile = True  # a subclass that says by itself how long the layers are does not

    def __init__(
        self,
        profile: PrefixProfile | str | os.PathLike[str] | None = None,
        budget: float = 0.5,
        *,
        config: Any = None,
        queries: int | str = 32,
        sink: int = 1,
        distance: int | None = 1,
        average: str = "sum",
        heads: str = "mean",
        pooling: int = 1,
        value_norm: bool = False,
        diversity: float = 0.5,
        novelty: float = 8.0,
        lengths: str = "search",
        floor: float = 0.0,
        cap: float | None = None,
        temperature: float = 0.0,
        recent: float = 1,
        evict: str = "fixed-point",
        slack: int = 64,
        merge: str | None = None,
        image_mask: Tensor | None = None,
        text_floor: float = 0.5,
        max_new_tokens: int | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        offloading: bool = False,
    ):
        self.budget = check_budget(budget)
        self.ranking = Ranking(queries, average, heads, pooling, value_norm, diversity, novelty)
        self.sink = _check_integer("sink", sink, 0)
        self.distance = None if distance is None else _check_integer("distance", distance, 1)
        self.lengths = check_choice("lengths", lengths, _LENGTHS)
        self.floor, self.cap = check_clips(floor, cap)
        self.temperature = check_fraction("temperature", temperature)
        self.recent = _check_recent(recent)
        self.evict = check_choice("evict", evict, _EVICTIONS)
        self.slack = _check_integer("slack", slack, 0)
        self.merge = check_choice("merge", merge, _MERGES)
        self.image_mask = image_mask
        self.text_floor = check_fraction("text_floor", text_floor)
        self.max_new_tokens = None if max_new_tokens is None else _check_integer("max_new_tokens", max_new_tokens, 1)
        if self.max_new_tokens is not None and (offloading or self.evict == "least-important"):
            raise ValueError(
                "max_new_tokens plans the decode steps beforehand, which evict='least-important' and offloading=True "
                "do not allow; leave one of them out"
            )
        self.max_bytes = _check_integer("max_bytes", max_bytes, 1)
        self.profile = _load_profile(profile)
        self._keep: list[float] | None = None
        if self.profile is not None:
            if self.lengths != "search":
                raise ValueError(f"give a profile or lengths={lengths!r}, not both: each says how long the layers are")
            of_profile = self.profile.keep_ratios
            self._keep = self._shaped(lambda budget: of_profile(budget).tolist())
        # Decoder layers that can be pruned, by index; None until a config has told.
        self._prunable: list[int] | None = None
        layers: list[Any] = []
        if config is not None:
            found = cache_layers(config)
            self._set_prunable([index for index, (kind, _) in enumerate(found) if kind == PRUNABLE])
            layers = [self._new_layer() if kind == PRUNABLE else whole for kind, whole in found]
        self._from_config = config is not None
        self._depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) if config else None
        self._padding: tuple[weakref.ref, Tensor | None, list[int]] | None = None
        self._holds_door = False
        try:
            if offloading:
                torch.cuda.default_stream(None)  # the first forward asks for it, where it would be too late to say so
            super().__init__(layers=layers, offloading=offloading)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"offloading={offloading!r} needs streams, which a GPU has: {error}") from None
        if self.profile is not None and self.budget < 1.0:  # where nothing is pruned, no ranking fits better
            tell_mismatch(self.profile.metadata, self.ranking)

    @classmethod
    def paper(
        cls,
        profile: PrefixProfile | str | os.PathLike[str] | None = None,
        budget: float = 0.5,
        **kwargs: Any,
    ) -> PrefixKVCache:
        """PrefixKV as published (arXiv 2412.03409), with true positions: the rule `PAPER`.

        Section 3.2: the importance of key j in a layer is the mean over the heads of its attention, summed over *all* N
        queries of the prompt, `I_j = 1/H sum_h sum_i A_h[i, j]`. Each layer keeps the shortest prefix of its sorted,
        normalised importance that reaches a threshold p, the same for all layers, found by binary search so that the
        budget is met. While decoding, the pair at Elastic Cache's fixed point leaves (arXiv 2407.18121, section 3.3):
        25 pairs before the prompt's end, whenever a layer would hold one pair more than its share.

        Args:
            profile: as of the constructor.
            budget: fraction of the prompt's KV pairs kept, averaged over the prunable layers, in (0, 1].
            kwargs: further arguments of the constructor, which may replace parts of the rule: `queries=32`.

        Raises:
            TypeError, ValueError, ProfileError: as the constructor; or the class is another paper's rule.
        """
        if not cls._takes_profile:
            raise TypeError(f"{cls.__name__} is a rule of its own already; PrefixKV's is PrefixKVCache.paper(...)")
        return cls(profile, budget, **{**PAPER, **kwargs})

    @classmethod
    def for_model(cls, model: Any, budget: float = 0.5, *, inputs: Any = None, **kwargs: Any) -> PrefixKVCache:
        """A cache for this model: its config, and the bundled profile of this model if there is one.

        A bundled profile is taken when the model's name or path holds the profile's name and the depths agree.

        Args:
            model: a transformers model; only its `config` is looked at.
            budget: fraction of the prompt's KV pairs kept, in (0, 1].
            inputs: what the processor made of the prompt. With them, `image_mask` is filled from the model's image and
                video token ids, which turns two things on: text is pruned no further than `text_floor`, and
                `queries="text"` can be asked for. Without an id of either in the config it stays None.
            kwargs: further arguments of `PrefixKVCache`; `**PAPER` for the paper's rule, which knows nothing of images
                and protects no text.
        """
        kwargs.setdefault("config", model.config)
        if inputs is not None:
            kwargs.setdefault("image_mask", image_mask_of(inputs, model.config))
        if cls._takes_profile and "profile" not in kwargs and kwargs.get("lengths", "search") == "search":
            kwargs["profile"] = _bundled_profile(model.config)
        return cls(budget=budget, **kwargs)

    # What a user asks.

    @property
    def image_mask(self) -> Tensor | None:
        """Which tokens are image tokens, bool [batch, n]; may be assigned anew before a prompt that brings images."""
        return self._image_mask

    @image_mask.setter
    def image_mask(self, mask: Tensor | None) -> None:
        self._image_mask = _check_image_mask(mask)

    def stored_lengths(self) -> list[int]:
        """KV pairs that each layer holds, by its longest row; 0 for layers that hold none."""
        return [_stored(layer) for layer in self.layers]

    def kept_positions(self, layer_idx: int) -> Tensor:
        """The logical position of each stored pair of a layer.

        Returns:
            int64 [batch, stored], or [batch, kv_heads, stored] with `heads="each"`: columns of the tokens fed so far
            (padding counted), in the order in which the pairs lie in memory (rising after a prompt; decoding overwrites
            slots); -1 where a slot holds nothing.

        Raises:
            IndexError: there is no such layer (yet).
            ValueError: the layer keeps no keys of its own positions (a linear or dummy layer).
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, PrunedLayer):
            positions = layer.slot_positions()
            return (positions[:, 0] if positions.shape[1] == 1 else positions).clone()
        keys = getattr(layer, "keys", None)
        if not hasattr(layer, "get_seq_length"):
            raise ValueError(f"layer {layer_idx} is a {type(layer).__name__}, which holds no key for each position")
        if keys is None or keys.numel() == 0:
            return torch.empty(0, 0, dtype=torch.int64)
        seen = layer.get_seq_length()
        return torch.arange(seen - keys.shape[-2], seen, device=keys.device).repeat(keys.shape[0], 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value tensors allocated, spare room included."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, PrunedLayer):
                total += layer.nbytes
            else:
                tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
                total += sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
        return total

    # What transformers calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new pairs of a layer; return the keys and values that its attention shall see.

        Args:
            key_states: [batch, kv_heads, n_new, head_dim], rotary position applied.
            value_states: likewise.
            layer_idx: decoder layer, from 0.
            args: for layers that are left whole.
            kwargs: for layers that are left whole.

        Raises:
            RuntimeError: the attention call of this layer's last prompt never came through the door, or this
                transformers cannot show it (eager attention before 5.1).
            ProfileError: the model has more layers than the profile.
            ValueError: the batch differs from the stored one, or there are no tokens.
        """
        if not self._holds_door:
            if not SEES_EAGER:
                _refuse_eager(layer_idx)
            hold_door(self)
            self._holds_door = True
        if self._from_config and layer_idx >= len(self.layers):
            raise ValueError(
                f"the model has a layer {layer_idx}, but the config that the cache was given speaks of "
                f"{len(self.layers)} layers; pass the config of this model: config=model.config"
            )
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer())
        layer = self.layers[layer_idx]
        if not isinstance(layer, PrunedLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._keep is not None and self._prunable is None and layer_idx >= len(self._keep):
            raise _wrong_depth(self.profile, f"at least {layer_idx + 1}")
        if layer.prompt is not None:
            self._settle(layer_idx)
        if layer.by_schedule and torch.compiler.is_compiling():
            keys, values = layer.update(key_states, value_states)
            return hand_out_compiled(keys, layer.shown_positions(), layer.ragged), values
        if not layer.by_schedule or key_states.shape[2] > 1:
            self._check_in_step(layer, layer_idx, key_states.shape[2])
        if self.offloading:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        else:
            keys, values = layer.update(key_states, value_states)
        own_mask, positions = layer.needs_own_mask, None
        if own_mask and layer.prompt is not None:
            # Taken now: a model that shares keys between layers shows this tensor again after the layer was pruned.
            positions = layer.slot_positions()
        keys = hand_out(keys, self, layer_idx, own_mask=own_mask, positions=positions, ragged=layer.ragged)
        return keys, values

    def _check_in_step(self, layer: PrunedLayer, layer_idx: int, n_new: int) -> None:
        """All layers are fed the same tokens; if they were not, an earlier forward broke off on the way."""
        first = self.layers[self._prunable[0] if self._prunable else 0]
        if isinstance(first, PrunedLayer) and first is not layer and layer.seen + n_new != first.seen:
            raise RuntimeError(
                f"layer {layer_idx} has seen {layer.seen} tokens where the first has seen {first.seen - n_new}: an "
                "earlier forward was interrupted; call cache.reset()"
            )

    # Linear layers are transformers' own, and only a config tells of them; without one, these are the first calls.

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers."""
        self._need_layer(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers."""
        self._need_layer(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        self._need_layer(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        self._need_layer(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """As in transformers."""
        self._need_layer(layer_idx or 0)
        return super().has_previous_state(layer_idx, *args, **kwargs)

    def _need_layer(self, layer_idx: int) -> None:
        if layer_idx >= len(self.layers) and not self._from_config:
            raise ValueError(
                "this model has linear or convolution layers, which are left whole; "
                "say so to the cache: PrefixKVCache(..., config=model.config)"
            )

    def reset(self) -> None:
        """Forget all pairs, and the image mask, which was that prompt's; ready for another, unrelated prompt."""
        self._padding = None
        self._image_mask = None
        if not self._from_config:
            self.layers, self._prunable = [], None
        super().reset()
        for layer in self.layers:
            empty_after_reset(layer)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of what was row `beam_idx[i]`, positions and decode state with it."""
        self._settle()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self._settle()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`, in that order."""
        self._settle()
        super().batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens. Pairs that left for them do not come back."""
        self._settle()
        if crops_to_nothing(tokens_to_remove):
            return
        before = int(self.get_seq_length())
        super().crop(tokens_to_remove)
        left = int(self.get_seq_length())
        if self.image_mask is not None and left < before:  # other tokens may come where these were
            self.image_mask = self.image_mask[:, :left]

    def activate_past_recording(self) -> None:
        """Refused: what a decode step has overwritten cannot be put back, as assisted decoding would ask for.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "assisted decoding takes tokens back after each step, which a pruned cache cannot undo; "
            "generate without assistant_model and prompt_lookup_num_tokens, or with DynamicCache"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the door themselves, from their first update on."""
        return {**self.__dict__, "_holds_door": False, "_padding": None}

    # What the door calls.

    def counts_all_queries(self, handed: HandedOut) -> bool:
        """Whether all queries of this call will be asked for."""
        prompt = self._pruned(handed.layer_idx).prompt
        waiting = prompt is not None and not prompt.attended and not self._keeps_all(handed.layer_idx)
        return waiting and self.ranking.sums_all

    def before_attention(self, handed: HandedOut, module: Any, query: Tensor, mask: Any, backend: str) -> Any:
        """The mask of this layer: its own columns where it does not hold exactly the tokens seen."""
        layer = self._pruned(handed.layer_idx)
        prompt = layer.prompt
        if prompt is not None and not prompt.attended:
            self._check_model(getattr(module, "config", None))
            # Read before the columns are taken: padding is told by logical columns.
            prompt.real, prompt.lengths = self._padding_of(mask, query.shape[0], prompt.n_new)
            prompt.image = self._image_of(prompt, query.shape[0], self.layers[handed.layer_idx].get_seq_length())
        if not handed.own_mask or (mask is None and not handed.ragged and query.shape[2] == 1):
            return mask
        positions = layer.shown_positions() if handed.positions is None else handed.positions
        return layer_mask(mask, positions, handed.ragged, query, backend)

    def _check_model(self, config: Any) -> None:
        """Hold the config of the attention module against what the cache was told of the model."""
        if self._prunable is None:
            self._learn(config)
        elif self._from_config and (found := getattr(config, "num_hidden_layers", self._depth)) != self._depth:
            raise ValueError(
                f"the model has {found} layers, but the config that the cache was given speaks of "
                f"{self._depth}; pass the config of this model: config=model.config"
            )

    def after_attention(
        self, handed: HandedOut, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]
    ) -> None:
        """Look at a prompt's attention once it has been computed; prune what can be pruned by now."""
        layer_idx = handed.layer_idx
        layer = self._pruned(layer_idx)
        prompt = layer.prompt
        if prompt is None and layer.accumulates:
            layer.accumulate(self._importance(module, query, key, mask, options))
        if prompt is None or prompt.attended:
            return
        if not self._keeps_all(layer_idx):
            importance = self._importance(module, query, key, mask, options, prompt)
            n_old = importance.shape[2] - prompt.n_new
            if n_old and layer.accumulates:
                layer.accumulate(importance[..., :n_old])
            prompt.scores = self._scores(importance[..., n_old:], prompt, module)
        prompt.attended = True
        if self._keep is not None or self._keeps_all(layer_idx) or layer.keep_ratios:
            self._prune_by_ratio(layer, prompt, layer_idx)
        elif self.lengths != "search":
            raise ValueError(
                f"lengths={self.lengths!r} needs the number of layers, which this model's attention does not tell; "
                "give config=model.config"
            )
        elif self._prunable is not None and layer_idx == self._prunable[-1]:
            self._prune_by_search()

    # How keys are ranked.

    def _importance(
        self, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any], prompt: Prompt | None = None
    ) -> Tensor:
        """What each key of an attention call received: float32 [batch, 1 or kv_heads, n_keys]."""
        return importance_of_call(
            module,
            query,
            key,
            mask,
            options,
            ranking=self.ranking,
            real=None if prompt is None else self._counting(prompt),
            max_bytes=self.max_bytes,
            every_query=prompt is None,
        )

    def _counting(self, prompt: Prompt) -> Tensor | None:
        """Whose queries may count, bool [batch, n_new]; None: everybody's."""
        if self.ranking.queries != "text":
            return prompt.real
        if prompt.image is None:
            raise ValueError("queries='text' ranks keys by the text behind the first image; give image_mask, too")
        return text_queries(prompt.image, prompt.real)

    def _scores(self, importance: Tensor, prompt: Prompt, module: Any) -> Tensor:
        """By which the keys of a prompt are kept: float32 [batch, 1 or kv_heads, n_new]."""
        keys, values = prompt.keys[:, :, -prompt.n_new :], prompt.values[:, :, -prompt.n_new :]
        return scores_of_call(importance, keys, values, self.ranking, prompt.real, module)

    # How much each layer keeps.

    def _new_layer(self) -> PrunedLayer:
        share = 0.0 if self.recent >= 1 else self.recent
        return PrunedLayer(
            self._eviction(), recent=share, sink=self.sink, merge=self.merge, max_new_tokens=self.max_new_tokens
        )

    def _eviction(self) -> Callable[[int, int, float, int | None], Eviction]:
        """The decode rule of a row, made from its pairs stored, tokens seen and keep ratio."""
        if self.distance is None:
            return partial(FixedPointEviction, slack=self.slack)
        if self.evict == "oldest":
            return partial(FixedPointEviction, point=self.sink, slack=self.slack)
        if self.evict == "least-important":
            return partial(LeastImportantEviction, slack=self.slack)
        return partial(FixedPointEviction, distance=self.distance, slack=self.slack)

    def _set_prunable(self, prunable: list[int]) -> None:
        if self.profile is not None and self.profile.n_layers != len(prunable):
            raise _wrong_depth(self.profile, str(len(prunable)))
        self._prunable = prunable
        if self.lengths != "search":
            steepness = 1.0 if self.lengths == "uniform" else 20.0
            self._keep = self._shaped(lambda budget: pyramid_ratios(budget, len(prunable), steepness))

    def _shaped(self, source: Callable[[float], list[float]]) -> list[float]:
        """Keep ratios from what a source says at each budget: clipped, then mixed with uniform ones."""
        return temper_ratios(clip_ratios(source, self.budget, self.floor, self.cap), self.budget, self.temperature)

    def _learn(self, config: Any) -> None:
        """Check the model by its attention module's config, where none was given to the constructor."""
        if config is None or not hasattr(config, "get_text_config") or not hasattr(config, "num_hidden_layers"):
            return
        others = whole_layer_kinds(config)
        if others:
            raise ValueError(
                f"{config.model_type} has layers that are left whole ({', '.join(others)}); "
                "say so to the cache: PrefixKVCache(..., config=model.config)"
            )
        self._set_prunable(list(range(len(cache_layers(config)))))

    def _ratio(self, layer_idx: int) -> float:
        """Keep ratio of a layer for a first prompt; without a profile the budget, which is then 1."""
        if self._keep is None:
            return self.budget
        return self._keep[self._place(layer_idx)]

    def _place(self, layer_idx: int) -> int:
        """Which one of the prunable layers this is."""
        return layer_idx if self._prunable is None else self._prunable.index(layer_idx)

    def _keeps_all(self, layer_idx: int) -> bool:
        return self._ratio(layer_idx) == 1.0

    def _pruned(self, layer_idx: int) -> PrunedLayer:
        layer = self.layers[layer_idx]
        assert isinstance(layer, PrunedLayer), "only the keys of pruned layers are handed out"
        return layer

    def _padding_of(self, mask: Any, batch: int, n_new: int) -> tuple[Tensor | None, list[int]]:
        """Which new tokens are real, and how many in each row. The same mask serves all layers of a forward."""
        if self._padding is not None and mask is not None and self._padding[0]() is mask:
            return self._padding[1], self._padding[2]
        real = real_tokens(mask, n_new)
        lengths = [n_new] * batch
        if real is not None:
            real = real.expand(batch, -1)
            lengths = real.sum(1).tolist()
            if min(lengths) == n_new:
                real = None
        # Weakly: a mask of a long prompt is larger than the cache, and must not outlive its forward.
        self._padding = None if mask is None else (weakref.ref(mask), real, lengths)
        return real, lengths

    def _image_of(self, prompt: Prompt, batch: int, seen: int) -> Tensor | None:
        """Which new tokens are image tokens, bool [batch, n_new]; None where nothing is known of images."""
        if self.image_mask is None:
            return None
        mask = self.image_mask.to(prompt.keys.device)
        if seen - prompt.n_new >= mask.shape[1]:
            # Behind the first prompt is text, whatever became of its rows since.
            return mask.new_zeros(batch, prompt.n_new)
        if mask.shape[1] < seen:
            raise ValueError(
                f"image_mask has {mask.shape[1]} columns, but this prompt reaches to token {seen}; it must be bool "
                "[batch, n_prompt], a column for every token of the prompt (padding too)"
            )
        if batch % mask.shape[0]:
            raise ValueError(
                f"image_mask has {mask.shape[0]} rows for a batch of {batch}; it must be bool [batch, n_prompt]"
            )
        # Beams and several sequences of one prompt stand side by side.
        mask = mask.repeat_interleave(batch // mask.shape[0], 0)
        return mask[:, seen - prompt.n_new : seen]

    def _prune_by_ratio(self, layer: PrunedLayer, prompt: Prompt, layer_idx: int) -> None:
        # A later prompt goes by the ratios that its rows have already; and the sink is the first prompt's.
        ratios = layer.keep_ratios or [self._ratio(layer_idx)] * layer.batch_size
        sink = 0 if layer.keep_ratios else self.sink
        if self.lengths == "search":
            counts = [_prompt_count(ratio, length, sink) for ratio, length in zip(ratios, prompt.lengths, strict=True)]
        else:
            counts = [
                dithered_count(ratio, length, self._place(layer_idx), len(self._prunable or [0]), sink)
                for ratio, length in zip(ratios, prompt.lengths, strict=True)
            ]
        counts = [
            min(count + allowance, length)
            for count, allowance, length in zip(counts, layer.allowances, prompt.lengths, strict=True)
        ]
        self._prune(layer, prompt, counts, ratios, sink)

    def _prune_by_search(self) -> None:
        """Each row of the first prompt gets lengths of its own, by the search on its own importance."""
        waiting = self._waiting()
        prompts = [layer.prompt for layer in waiting if layer.prompt is not None]
        lengths, real = prompts[0].lengths, prompts[0].real
        scores = torch.stack([prompt.scores.mean(1).cpu() for prompt in prompts if prompt.scores is not None], 1)
        columns = torch.ones_like(scores[:, 0], dtype=torch.bool) if real is None else real.cpu()
        found = [
            temper_counts(_search_row(of_row[:, own], self.budget, self.sink, self.floor, self.cap), self.temperature)
            if length
            else [0] * len(waiting)
            for of_row, own, length in zip(scores, columns, lengths, strict=True)
        ]
        # Where the least lengths alone use up the budget (a prompt of a few tokens, a chunk of padding), they are no
        # measure of what comes later: such a row goes on by the budget itself.
        least = len(waiting) * (self.sink + 1)
        searched = [round(self.budget * len(waiting) * length) >= least for length in lengths]
        for layer, prompt, counts in zip(waiting, prompts, zip(*found, strict=True), strict=True):
            ratios = [
                count / length if decided else self.budget
                for count, length, decided in zip(counts, lengths, searched, strict=True)
            ]
            self._prune(layer, prompt, list(counts), ratios, self.sink)

    def _prune(self, layer: PrunedLayer, prompt: Prompt, counts: list[int], ratios: list[float], sink: int) -> None:
        kept = self._select(prompt, counts, sink)
        layer.prune(kept, counts, ratios)
        if self.offloading:
            layer.offload()

    def _select(self, prompt: Prompt, counts: list[int], sink: int) -> Tensor:
        """Kept columns of a prompt, int64 [batch, 1 or kv_heads, max(counts)]; see selection.py."""
        recent = int(self.recent) if self.recent >= 1 else [round(self.recent * count) for count in counts]
        return select_keys(
            None if counts == prompt.lengths else prompt.scores,
            counts,
            real=prompt.real,
            sink=sink,
            recent=recent,
            protected=self._protected(prompt),
            n_keys=prompt.n_new,
            device=prompt.keys.device,
        )

    def _protected(self, prompt: Prompt) -> Tensor | None:
        """The text tokens that go before all image tokens, bool [batch, n_new]; None: nobody does."""
        if prompt.image is None or prompt.scores is None or self.text_floor == 0.0:
            return None
        text = ~prompt.image if prompt.real is None else ~prompt.image & prompt.real
        scores = prompt.scores.mean(1).masked_fill(~text, -torch.inf)
        rank = places(scores.argsort(dim=1, descending=True, stable=True))
        return text & (rank < (text.sum(1, keepdim=True) * self.text_floor).ceil())

    def _waiting(self) -> list[PrunedLayer]:
        """Layers whose prompt is not pruned yet."""
        return [layer for layer in self.layers if isinstance(layer, PrunedLayer) and layer.prompt is not None]

    def _settle(self, layer_idx: int | None = None) -> None:
        """Prune what still waits for the end of the search; refuse to go on where the attention was never seen."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PrunedLayer) and layer.prompt is not None and not layer.prompt.attended:
                raise RuntimeError(_unseen_message(index if layer_idx is None else layer_idx))
        waiting = len(self._waiting())
        if waiting and self._prunable is not None and waiting < len(self._prunable):
            raise RuntimeError(
                f"an earlier prompt reached {waiting} of {len(self._prunable)} layers only, so the search for their "
                "lengths never came to an end (was that forward interrupted?); call cache.reset()"
            )
        if waiting:
            self._prune_by_search()


def image_mask_of(inputs: Any, config: Any) -> Tensor | None:
    """Which prompt tokens stand for images or videos: bool [batch, n_prompt]; None where the config names no token."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    tokens = [token for name in names if isinstance(token := getattr(config, name, None), int)]
    if not tokens:
        return None
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(
            "images are found by their token ids, and inputs hold no tensor input_ids [batch, n_prompt]; "
            "leave inputs out, or give image_mask yourself"
        )
    return torch.isin(ids, torch.tensor(tokens, device=ids.device))


def _stored(layer: Any) -> int:
    if isinstance(layer, PrunedLayer):
        return layer.stored
    keys = getattr(layer, "keys", None)
    return 0 if keys is None or keys.numel() == 0 else keys.shape[-2]


@lru_cache(maxsize=4096)
def _prompt_count(ratio: float, length: int, sink: int) -> int:
    return int(prompt_counts(torch.tensor([ratio], dtype=torch.float64), length, sink))


def _search_row(importance: Tensor, budget: float, sink: int, floor: float, cap: float | None) -> list[int]:
    # A model that overflows gives nan; its answer is lost anyway, but the cache must not be what stops it.
    importance = importance.nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max)
    return search_threshold(importance, budget, sink=sink, floor=floor, cap=cap)[1].tolist()


def _load_profile(profile: Any) -> PrefixProfile | None:
    if profile is None or isinstance(profile, PrefixProfile):
        return profile
    return PrefixProfile.load(profile)


def _wrong_depth(profile: PrefixProfile | None, found: str) -> ProfileError:
    assert profile is not None
    name = profile.metadata.get("model", "unknown")
    return ProfileError(
        f"the profile of {name!r} has {profile.n_layers} layers, but the model has {found} prunable layers; "
        "take the profile of this model, or none: PrefixKVCache(budget=...) searches on the prompt itself"
    )


def _bundled_profile(config: Any) -> PrefixProfile | None:
    path = str(getattr(config, "name_or_path", "") or getattr(config, "_name_or_path", ""))
    words = re.split(r"[/\\]", path.lower().rstrip("/\\"))
    depth = sum(kind == PRUNABLE for kind, _ in cache_layers(config))
    for name in PrefixProfile.available():
        # "llava-1.5-7b" is the profile of "llava-hf/llava-1.5-7b-hf", and not of ".../llava-1.5-7bit".
        if any(re.search(rf"(^|[^a-z0-9.]){re.escape(name)}($|[^a-z0-9.])", word) for word in words):
            profile = PrefixProfile.load(name)
            if profile.n_layers == depth:
                return profile
    return None


def _check_recent(recent: Any) -> float:
    if not isinstance(recent, numbers.Real) or isinstance(recent, bool):
        raise TypeError(f"recent must be a number of tokens, or a share of the pairs kept below 1; got {recent!r}")
    number = to_float(recent)
    if not number > 0 or (number > 1 and not number.is_integer()):
        raise ValueError(
            f"recent must be a number of tokens, 1 or more, or a share of the pairs kept in (0, 1); got {recent!r}"
        )
    return number


def _check_image_mask(mask: Any) -> Tensor | None:
    if mask is None:
        return None
    meaning = "image_mask must be a bool tensor [batch, n_prompt], True at image tokens"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        what = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{meaning}; got {what}")
    if not len(mask):
        raise ValueError(f"{meaning}, of at least one row; got {mask.dtype} {list(mask.shape)}")
    return mask


def _check_integer(name: str, value: Any, least: int) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer of at least {least}; got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}; got {value!r}")
    return int(value)


def _refuse_eager(layer_idx: int) -> None:
    """Stop at the first update where it is known already that the attention call will not be seen."""
    module = _calling_module()
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if reason := explain_unseen(implementation):
        raise RuntimeError(f"the attention of layer {layer_idx} ({_name(module)}) cannot be observed{reason}")


def _unseen_message(layer_idx: int) -> str:
    module = _calling_module()
    return (
        f"the attention of layer {layer_idx} ({_name(module)}) never came through transformers' attention interface, "
        "so its cache could not be pruned. Either the model computes attention by code of its own (use DynamicCache), "
        "or an earlier forward was interrupted (call cache.reset())"
    )


def _calling_module() -> torch.nn.Module | None:
    """The torch module on whose behalf the cache is being updated, by the call stack."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            return owner
        frame = frame.f_back
    return None


def _name(module: torch.nn.Module | None) -> str:
    return "unknown module" if module is None else f"{type(module).__module__}.{type(module).__qualname__}"
