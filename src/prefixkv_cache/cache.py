"""`PrefixKVCache`: the drop-in. A list of layers, and who keeps how much.

Ties the parts together for one model call after another: `update` stores and hands out keys (layer.py), the door
(attention.py) reports the attention call, importance.py says what each key received, the profile or the search says
how many stay, selection.py which ones, and the layer gathers them. The work itself is done in those modules.
"""

from __future__ import annotations

import numbers
import os
import re
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .architecture import PRUNABLE, cache_layers, whole_layer_kinds
from .attention import HandedOut, hand_out, hold_door, importance_of_call
from .compat import SEES_EAGER, crops_to_nothing, empty_after_reset, explain_unseen
from .importance import DEFAULT_MAX_BYTES
from .layer import Prompt, PrunedLayer
from .masks import layer_mask, real_tokens
from .profile import PrefixProfile, ProfileError, check_budget, prompt_counts
from .selection import select_keys
from .threshold import search_threshold


class PrefixKVCache(Cache):
    """A KV cache that prunes each decoder layer, right after the prompt, to a length of that layer's own.

    A drop-in for `DynamicCache`: `model.generate(**inputs, past_key_values=PrefixKVCache(profile, budget=0.5))`.
    The lengths come from a profile (PrefixKV, arXiv 2412.03409) or, without one, from the same search on the prompt
    itself. While decoding, the fixed-point rule of Elastic Cache (arXiv 2407.18121) keeps each layer at its share.
    Positions stay true throughout: rotary angles go on from the number of tokens *seen*.

    With a profile, a layer is pruned before the next one runs: the peak is the pruned cache and one whole layer.
    Without one, all layers are needed for the search: the peak is the whole prompt cache, once.

    A later prompt on the same cache (a second turn, or the next chunk of a long one) is pruned by the same keep ratios
    over its own tokens; pairs kept earlier stay.

    Args:
        profile: a `PrefixProfile`, a path to one, the name of a bundled one, or None: search on the prompt itself.
        budget: fraction of the prompt's KV pairs kept, averaged over the prunable layers, in (0, 1].
        config: the model's config. Needed for models with sliding, chunked or linear layers, which are left whole;
            checked against the profile whenever given.
        queries: whose attention counts: `"all"` prompt tokens (the papers' equation), or an integer W: the last W real
            tokens of the prompt.
        sink: this many first tokens of the prompt are never pruned (its last token neither).
        distance: the fixed point of decoding lies this many pairs before the prompt's end. None: nothing leaves while
            decoding.
        max_bytes: ceiling for the temporaries of the importance computation, per layer.
        offloading: keep the pairs of all layers but the current one and the next in CPU memory (CUDA only), as
            transformers' own caches do.

    Raises:
        TypeError, ValueError: an argument is not what is described above.
        ProfileError: the profile cannot be read, or is for another number of layers than `config` has.
    """

    def __init__(
        self,
        profile: PrefixProfile | str | os.PathLike[str] | None = None,
        budget: float = 0.5,
        *,
        config: Any = None,
        queries: int | str = 32,
        sink: int = 1,
        distance: int | None = 25,
        max_bytes: int = DEFAULT_MAX_BYTES,
        offloading: bool = False,
    ):
        self.budget = check_budget(budget)
        self.queries = _check_queries(queries)
        self.sink = _check_integer("sink", sink, 0)
        self.distance = None if distance is None else _check_integer("distance", distance, 1)
        self.max_bytes = _check_integer("max_bytes", max_bytes, 1)
        self.profile = _load_profile(profile)
        self._keep = None if self.profile is None else self.profile.keep_ratios(self.budget).tolist()
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
            super().__init__(layers=layers, offloading=offloading)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"offloading={offloading!r} needs streams, which a GPU has: {error}") from None

    @classmethod
    def for_model(cls, model: Any, budget: float = 0.5, **kwargs: Any) -> PrefixKVCache:
        """A cache for this model: its config, and the bundled profile of this model if there is one.

        A bundled profile is taken when the model's name or path holds the profile's name and the depths agree.

        Args:
            model: a transformers model; only its `config` is looked at.
            budget: fraction of the prompt's KV pairs kept, in (0, 1].
            kwargs: further arguments of `PrefixKVCache`.
        """
        kwargs.setdefault("config", model.config)
        if "profile" not in kwargs:
            kwargs["profile"] = _bundled_profile(model.config)
        return cls(budget=budget, **kwargs)

    # What a user asks.

    def stored_lengths(self) -> list[int]:
        """KV pairs that each layer holds, by its longest row; 0 for layers that hold none."""
        return [_stored(layer) for layer in self.layers]

    def kept_positions(self, layer_idx: int) -> Tensor:
        """The logical position of each stored pair of a layer.

        Returns:
            int64 [batch, stored]: columns of the tokens fed so far (padding counted), in the order in which the pairs
            lie in memory (rising after a prompt; decoding overwrites slots); -1 where a slot holds nothing.

        Raises:
            IndexError: there is no such layer (yet).
            ValueError: the layer keeps no keys of its own positions (a linear or dummy layer).
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, PrunedLayer):
            return layer.slot_positions().clone()
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
        self._check_in_step(layer, layer_idx, key_states.shape[2])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        # Taken now: a model that shares keys between layers shows this tensor again after the layer was pruned.
        positions = layer.slot_positions() if layer.needs_own_mask else None
        return hand_out(keys, self, layer_idx, positions, layer.ragged), values

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
        """Forget all pairs; ready for another, unrelated prompt."""
        self._padding = None
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
        if not crops_to_nothing(tokens_to_remove):
            super().crop(tokens_to_remove)

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

    def before_attention(self, handed: HandedOut, module: Any, query: Tensor, mask: Any, backend: str) -> Any:
        """The mask of this layer: its own columns where it does not hold exactly the tokens seen."""
        config = getattr(module, "config", None)
        if self._prunable is None:
            self._learn(config)
        elif self._from_config and (found := getattr(config, "num_hidden_layers", self._depth)) != self._depth:
            raise ValueError(
                f"the model has {found} layers, but the config that the cache was given speaks of "
                f"{self._depth}; pass the config of this model: config=model.config"
            )
        prompt = self._pruned(handed.layer_idx).prompt
        if prompt is not None and not prompt.attended:
            # Read before the columns are taken: padding is told by logical columns.
            prompt.real, prompt.lengths = self._padding_of(mask, query.shape[0], prompt.n_new)
        if handed.positions is None:
            return mask
        return layer_mask(mask, handed.positions, handed.ragged, query.shape[2], backend)

    def after_attention(
        self, handed: HandedOut, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]
    ) -> None:
        """Look at a prompt's attention once it has been computed; prune what can be pruned by now."""
        layer_idx = handed.layer_idx
        layer = self._pruned(layer_idx)
        prompt = layer.prompt
        if prompt is None or prompt.attended:
            return
        if not self._keeps_all(layer_idx):
            importance = importance_of_call(
                module, query, key, mask, options, queries=self.queries, real=prompt.real, max_bytes=self.max_bytes
            )
            prompt.importance = importance[:, -prompt.n_new :]
        prompt.attended = True
        if self._keep is not None or self._keeps_all(layer_idx) or layer.keep_ratios:
            self._prune_by_ratio(layer, prompt, self._ratio(layer_idx))
        elif self._prunable is not None and layer_idx == self._prunable[-1]:
            self._prune_by_search()

    # How much each layer keeps.

    def _new_layer(self) -> PrunedLayer:
        return PrunedLayer(distance=self.distance)

    def _set_prunable(self, prunable: list[int]) -> None:
        if self._keep is not None and len(self._keep) != len(prunable):
            raise _wrong_depth(self.profile, str(len(prunable)))
        self._prunable = prunable

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
        return self._keep[layer_idx if self._prunable is None else self._prunable.index(layer_idx)]

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

    def _prune_by_ratio(self, layer: PrunedLayer, prompt: Prompt, first_ratio: float) -> None:
        # A later prompt goes by the ratios that its rows have already; and the sink is the first prompt's.
        ratios = layer.keep_ratios or [first_ratio] * layer.batch_size
        sink = 0 if layer.keep_ratios else self.sink
        counts = [_prompt_count(ratio, length, sink) for ratio, length in zip(ratios, prompt.lengths, strict=True)]
        self._prune(layer, prompt, counts, ratios, sink)

    def _prune_by_search(self) -> None:
        """Each row of the first prompt gets lengths of its own, by the search on its own importance."""
        waiting = self._waiting()
        prompts = [layer.prompt for layer in waiting if layer.prompt is not None]
        lengths, real = prompts[0].lengths, prompts[0].real
        importance = torch.stack([prompt.importance.cpu() for prompt in prompts if prompt.importance is not None], 1)
        columns = torch.ones_like(importance[:, 0], dtype=torch.bool) if real is None else real.cpu()
        found = [
            _search_row(of_row[:, own], self.budget, self.sink) if length else [0] * len(waiting)
            for of_row, own, length in zip(importance, columns, lengths, strict=True)
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
        importance = None if counts == prompt.lengths else prompt.importance
        device = prompt.keys.device
        kept = select_keys(importance, counts, real=prompt.real, sink=sink, n_keys=prompt.n_new, device=device)
        layer.prune(kept, counts, ratios)
        if self.offloading:
            layer.offload()

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


def _stored(layer: Any) -> int:
    if isinstance(layer, PrunedLayer):
        return layer.stored
    keys = getattr(layer, "keys", None)
    return 0 if keys is None or keys.numel() == 0 else keys.shape[-2]


def _prompt_count(ratio: float, length: int, sink: int) -> int:
    return int(prompt_counts(torch.tensor([ratio], dtype=torch.float64), length, sink))


def _search_row(importance: Tensor, budget: float, sink: int) -> list[int]:
    # A model that overflows gives nan; its answer is lost anyway, but the cache must not be what stops it.
    importance = importance.nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max)
    return search_threshold(importance, budget, sink=sink)[1].tolist()


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


def _check_queries(queries: Any) -> int | str:
    if isinstance(queries, str) and queries == "all":
        return queries
    if isinstance(queries, numbers.Integral) and not isinstance(queries, bool) and int(queries) >= 1:
        return int(queries)
    raise (ValueError if isinstance(queries, (str, numbers.Integral)) else TypeError)(
        f"queries must be 'all' or how many of the prompt's last tokens count, at least 1; got {queries!r}"
    )


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
