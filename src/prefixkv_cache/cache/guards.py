"""What a cache knows of the model that it serves, and the errors where the two do not fit.

A config tells it at construction; without one, the attention module's own config does, at the first attention call.
"""

from __future__ import annotations

import numbers
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..profiles.file import SUFFIX, ProfileError
from ..profiles.profile import PrefixProfile
from .architecture import PRUNABLE, SLIDING, Sliding, cache_layers, count_sliding, kv_heads, whole_layer_kinds
from .compat import explain_unseen


@dataclass(frozen=True)
class _Facts:
    prunable: tuple[int, ...]
    n_sliding: int  # further layers that a profile may speak of: with a window, where nothing is pruned
    n_heads: int | None
    depth: int | None


class ModelFacts:
    """Which layers of the model can be pruned, and how many key heads they store.

    Attributes:
        from_config: whether a config was given to the constructor of the cache.
    """

    def __init__(self, facts: _Facts | None, from_config: bool):
        self._facts, self.from_config = facts, from_config

    @classmethod
    def unknown(cls) -> ModelFacts:
        """Nothing is known yet."""
        return cls(None, False)

    @classmethod
    def of_config(cls, config: Any, sliding: Sliding) -> ModelFacts:
        """What a config says; None: nothing is known yet.

        Raises:
            TypeError, ValueError: no config, or that of a model that cannot be pruned; see architecture.py.
        """
        if config is None:
            return cls.unknown()
        if isinstance(config, torch.nn.Module):
            raise TypeError(f"config is a model ({type(config).__name__}); pass its config: config=model.config")
        return cls(_read(config, sliding), True)

    @property
    def n_layers(self) -> int:
        """Prunable layers; 0: not known."""
        return 0 if self._facts is None else len(self._facts.prunable)

    @property
    def first(self) -> int:
        """Index of the first prunable layer; -1: there is none."""
        return 0 if self._facts is None else next(iter(self._facts.prunable), -1)

    def place(self, layer_idx: int) -> int:
        """Which one of the prunable layers this is."""
        prunable = () if self._facts is None else self._facts.prunable
        return prunable.index(layer_idx) if layer_idx in prunable else layer_idx

    def is_last(self, place: int) -> bool:
        """Whether this is the last prunable layer, as far as is known."""
        return self._facts is not None and place == len(self._facts.prunable) - 1

    def check_module(self, config: Any, everything: bool = False) -> bool:
        """Hold the config of an attention module against what is known; learn from it where nothing is.

        Args:
            config: of the attention module.
            everything: whether nothing will be pruned, so that layers with a window need not be told from others.

        Returns:
            Whether anything was learned.

        Raises:
            ValueError: the model has layers that are left whole, and the cache was given no config; or another depth.
        """
        if self._facts is not None:
            found = getattr(config, "num_hidden_layers", self._facts.depth)
            if self.from_config and found != self._facts.depth:
                raise ValueError(
                    f"the model has {found} layers, but the config that the cache was given speaks of "
                    f"{self._facts.depth}; pass the config of this model: config=model.config"
                )
            return False
        if config is None or not hasattr(config, "get_text_config") or not hasattr(config, "num_hidden_layers"):
            return False
        others = whole_layer_kinds(config)
        if everything and others == [SLIDING]:
            return False
        if others:
            raise ValueError(
                f"{config.model_type} has layers that are left whole ({', '.join(others)}); "
                "say so to the cache: PrefixKVCache(..., config=model.config)"
            )
        self._facts = _read(config)
        return True

    def check_layer(self, layer_idx: int, profile: PrefixProfile | None) -> None:
        """Refuse a layer that the config, or the profile, knows nothing of.

        Raises:
            ValueError, ProfileError: the model has more layers.
        """
        if self._facts is None:
            if profile is not None and layer_idx >= profile.n_layers:
                raise _wrong_depth(profile, f"at least {layer_idx + 1}")
        elif self.from_config and self._facts.depth is not None and layer_idx >= self._facts.depth:
            raise ValueError(
                f"the model has a layer {layer_idx}, but the config that the cache was given speaks of "
                f"{self._facts.depth} layers; pass the config of this model: config=model.config"
            )

    def check_profile(self, profile: PrefixProfile | None) -> None:
        """Refuse a profile of another number of layers or key heads.

        Raises:
            ProfileError: it is not one of this model.
        """
        if profile is None or self._facts is None:
            return
        if profile.n_layers not in (self.n_layers, self.n_layers + self._facts.n_sliding):
            raise _wrong_depth(profile, str(self.n_layers))
        if profile.n_heads in (1, self._facts.n_heads):
            return
        name = profile.metadata.get("model", "unknown")
        if self._facts.n_heads is None:
            raise ProfileError(
                f"the profile of {name!r} has a length for each of {profile.n_heads} key heads, but this model has "
                "latent attention, which stores no key heads; take a profile with one length a layer (--unit layer)"
            )
        raise ProfileError(
            f"the profile of {name!r} has {profile.n_heads} key heads, but the model has {self._facts.n_heads}; "
            "take the profile of this model, or none: PrefixKVCache(budget=...)"
        )

    def need_layer(self, layer_idx: int, n_layers: int) -> None:
        """Refuse a linear or convolution layer that no config has told of.

        Raises:
            ValueError: the cache needs the model's config.
        """
        if layer_idx >= n_layers and not self.from_config:
            raise ValueError(
                "this model has linear or convolution layers, which are left whole; "
                "say so to the cache: PrefixKVCache(..., config=model.config)"
            )


def _read(config: Any, sliding: Sliding | None = None) -> _Facts:
    prunable = tuple(index for index, (kind, _) in enumerate(cache_layers(config, sliding)) if kind == PRUNABLE)
    n_sliding = 0 if sliding is None or sliding.alone else count_sliding(config)
    text = config.get_text_config(decoder=True)
    return _Facts(prunable, n_sliding, kv_heads(text), getattr(text, "num_hidden_layers", None))


def _wrong_depth(profile: PrefixProfile, found: str) -> ProfileError:
    name = profile.metadata.get("model", "unknown")
    return ProfileError(
        f"the profile of {name!r} has {profile.n_layers} layers, but the model has {found} prunable layers; "
        "take the profile of this model, or none: PrefixKVCache(budget=...)"
    )


def check_in_step(first: Any, layer: Any, layer_idx: int, n_new: int) -> None:
    """All layers are fed the same tokens; if they were not, an earlier forward broke off on the way.

    Args:
        first: the first prunable layer.
        layer: that is being fed, with its index.
        layer_idx: of the model.
        n_new: tokens fed.

    Raises:
        RuntimeError: the layers are out of step.
    """
    if layer is not first and layer.seen + n_new != first.seen:
        raise RuntimeError(
            f"layer {layer_idx} has seen {layer.seen} tokens where the first has seen {first.seen - n_new}: an "
            "earlier forward was interrupted; call cache.reset()"
        )


def check_profile_argument(profile: Any) -> None:
    """Refuse what is given in the place of a profile by mistake.

    Raises:
        TypeError: a budget, a model, or a config; says where that belongs.
        ProfileError: the name of a repository on the hub, or a folder.
    """
    kind = type(profile).__name__
    if isinstance(profile, numbers.Real):
        raise TypeError(f"profile is {profile!r}; the budget is the second argument: PrefixKVCache(budget={profile!r})")
    if isinstance(profile, torch.nn.Module):
        raise TypeError(f"profile is a model ({kind}); write PrefixKVCache.for_model(model, budget)")
    if hasattr(profile, "get_text_config"):
        raise TypeError(f"profile is a config ({kind}); write PrefixKVCache(budget=..., config=model.config)")
    if isinstance(profile, str) and not profile.endswith(SUFFIX):
        cure = f"PrefixProfile.from_pretrained({profile!r}) reads the one beside a model"
        if os.path.isdir(profile):
            raise ProfileError(f"profile is {profile!r}, a folder; {cure}")
        if re.fullmatch(r"[\w.-]+/[\w.-]+", profile) and not os.path.exists(profile):
            raise ProfileError(
                f"profile is {profile!r}, and there is no such file. If this is a model on the hub: "
                f"PrefixKVCache.for_model(model, budget) needs no profile, and {cure}, if there is one"
            )


def check_image_mask(mask: Any) -> Tensor | None:
    """The mask, or a TypeError or ValueError that says what it must be."""
    if mask is None:
        return None
    meaning = "image_mask must be a bool tensor [batch, n_prompt], True at image tokens"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        what = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{meaning}; got {what}")
    if not len(mask):
        raise ValueError(f"{meaning}, of at least one row; got {mask.dtype} {list(mask.shape)}")
    return mask


def image_mask_of(inputs: Any, config: Any) -> Tensor | None:
    """Which prompt tokens stand for images or videos: bool [batch, n_prompt]; None where the config names no token."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    tokens = [token for name in names if isinstance(token := getattr(config, name, None), int)]
    if not tokens:
        return None
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs is a {type(inputs).__name__}; give what the processor made of the prompt")
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(
            "images are found by their token ids, and inputs hold no tensor input_ids [batch, n_prompt]; "
            "leave inputs out, or give image_mask yourself"
        )
    return torch.isin(ids, torch.tensor(tokens, device=ids.device))


def refuse_eager(layer_idx: int) -> None:
    """Stop at the first update where it is known already that the attention call will not be seen.

    Raises:
        RuntimeError: this transformers does not show eager attention.
    """
    module = _calling_module()
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if reason := explain_unseen(implementation):
        raise RuntimeError(f"the attention of layer {layer_idx} ({_name(module)}) cannot be observed{reason}")


def explain_unseen_layer(layer_idx: int) -> str:
    """Why a prompt could not be pruned whose attention call was never seen."""
    return (
        f"the attention of layer {layer_idx} ({_name(_calling_module())}) never came through transformers' attention "
        "interface, so its cache could not be pruned. Either the model computes attention by code of its own (use "
        "DynamicCache), or an earlier forward was interrupted (call cache.reset())"
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
