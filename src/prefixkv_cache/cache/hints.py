"""What a cache says of itself, and what a user may have overlooked, said once: a missing `reset()`, `use_cache=False`.

A cache sees keys and no tokens. What the model was fed is read off the call stack: when `generate` begins, and at the
first layer of a prompt, never in a decode step. Where nothing is found there, nothing is said.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..methods import Method
from ..profiles.profile import PrefixProfile
from .layer import PrunedLayer
from .whole import nbytes_of

_CURE = (
    "if this is another prompt, call cache.reset() first, or make a new cache; if the talk goes on, give generate the "
    "whole text so far and what is new, or the model what is new alone"
)
_NO_CACHE = (
    "use_cache=False was given beside this cache, which is filled all the same: generate then feeds the whole text "
    "again in every step, and all of it is stored again. Leave use_cache out"
)


class Hints(Cache):
    """The `repr` of a cache, and hints, each given once until `reset()`."""

    profile: PrefixProfile | None
    budget: float | int
    method: Method
    quantize: str | None
    _first_ids: Tensor | None = None
    _hinted: tuple[str, ...] = ()

    def __repr__(self) -> str:
        stored = [length for length in self.stored_lengths() if length] or [0]  # type: ignore[attr-defined]
        profile = "None" if self.profile is None else repr(self.profile.metadata.get("model", "unknown"))
        bits = "" if self.quantize is None else f"quantize={self.quantize!r}, "
        own, full = self.nbytes, sum(map(full_bytes_of, self.layers))  # type: ignore[attr-defined]
        return (
            f"PrefixKVCache(profile={profile}, budget={self.budget!r}, method={self.method.spell()!r}, {bits}"
            f"seen={int(self.get_seq_length())}, stored={round(sum(stored) / len(stored))} a head, "
            f"bytes={own} of {full} in a full cache)"
        )

    @property
    def _is_user_defined(self) -> bool:
        """What `generate` assigns when it begins with this cache; read by it at its end."""
        return self.__dict__.get("_in_generate", False)

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self.__dict__["_in_generate"] = value
        ids, seen = _argument("input_ids"), int(self.get_seq_length())
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] == 0 or seen == 0:
            return
        if ids.shape[1] <= seen:
            self._hint("reset", f"this cache has seen {seen} tokens, and generate is given {ids.shape[1]}: {_CURE}")
        elif _begins_with(ids, self._first_ids) is False:
            self._hint("reset", f"this cache has seen {seen} tokens of a text that generate is not given: {_CURE}")

    def _notice(self, n_new: int, layer: PrunedLayer) -> None:
        """Take note of a prompt of so many tokens that the first layer is about to store."""
        if n_new == 1 or torch.compiler.is_compiling():
            return
        seen = layer.seen
        ids = _argument("input_ids", lambda value: isinstance(value, Tensor) and value.shape[1:] == (n_new,))
        if _argument("use_cache", outermost=True) is False:  # what the user said; some models say False to their parts
            self._hint("use_cache", _NO_CACHE)
        elif seen and _begins_with(ids, self._first_ids):
            self._hint("reset", f"this cache has seen {seen} tokens, and is given the first prompt again: {_CURE}")
        if not seen:
            self._first_ids = ids

    def _hint(self, kind: str, message: str) -> None:
        if kind not in self._hinted:
            self._hinted += (kind,)
            warnings.warn(message, stacklevel=_outside())

    def reset(self) -> None:
        """Forget the first prompt's tokens, and what was said."""
        self._first_ids, self._hinted = None, ()
        super().reset()


def full_bytes_of(layer: Any) -> int:
    """Bytes that a layer would take if it held all that it has seen."""
    if not isinstance(layer, PrunedLayer):
        return nbytes_of(layer)
    if layer.prompt is not None:  # its first prompt, whole
        tensors = [layer.prompt.keys, layer.prompt.values]
        return sum(each.nbytes for each in tensors) * layer.seen // layer.prompt.n_new
    return layer.stored.pair_bytes * layer.seen


def _begins_with(ids: Tensor | None, first: Tensor | None) -> bool | None:
    """Whether each row begins with the first prompt's; None, where the two cannot be compared."""
    if ids is None or first is None or len(ids) != len(first):
        return None
    return torch.equal(ids[:, : first.shape[1]].to(first.device), first)


def _argument(name: str, fits: Any = lambda value: value is not None, outermost: bool = False) -> Any:
    """The innermost argument or variable of this name in the calls of models on the stack; None: there is none."""
    frame, found = sys._getframe(2), None
    while frame is not None:
        # Looking at a frame's variables keeps them alive for a while, so only where the name is one of them.
        if name in frame.f_code.co_varnames and isinstance(frame.f_locals.get("self"), torch.nn.Module):
            value = frame.f_locals.get(name)
            if fits(value):
                if not outermost:
                    return value
                found = value
        frame = frame.f_back
    return found


def _outside() -> int:
    """The `stacklevel` of the first call that is neither in this package, nor in transformers, nor in torch."""
    level, frame = 1, sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("prefixkv_cache", "transformers", "torch"):
            return level
        level, frame = level + 1, frame.f_back
    return 2
