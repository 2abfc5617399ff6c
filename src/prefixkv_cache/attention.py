"""The door: the one place where the library meets the model's attention.

A `Cache` sees keys and values but never queries. transformers asks `AttentionInterface.get_interface` for the attention
function at every attention call; while one of our caches is alive, that method is wrapped here, and the function it
returns first asks whether the key tensor is one that our cache handed out a moment ago. The mark is an attribute on
that very tensor object, so recognition is by identity: no other model, cache, vision tower or thread can be taken for
ours. The model's own backend then computes the attention, unmodified, and the cache may look at what went in.

This module decides nothing: which mask a layer gets and what is pruned is up to the cache.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.modeling_utils import AttentionInterface

_MARK = "_prefixkv_cache"
_METHOD = "get_interface"


class AttendedCache(Protocol):
    """What the door asks of a cache whose key tensor it recognises."""

    def before_attention(self, layer_idx: int, module: Any, query: Any, mask: Any, backend: str) -> Any:
        """Return the mask that this layer needs."""
        ...

    def after_attention(
        self, layer_idx: int, module: Any, query: Any, key: Any, mask: Any, options: dict[str, Any]
    ) -> None:
        """Take note of an attention call that has returned."""
        ...


def hand_out(key: torch.Tensor, cache: AttendedCache, layer_idx: int) -> torch.Tensor:
    """Mark `key` as the tensor that layer `layer_idx` of `cache` gives to the model; returns it."""
    setattr(key, _MARK, (weakref.ref(cache), layer_idx))
    return key


class _Door:
    """Wraps `AttentionInterface.get_interface` while at least one cache holds the door open."""

    def __init__(self) -> None:
        # Re-entrant, since the garbage collector may run `close` in the thread that holds it.
        self._lock = threading.RLock()
        self._holders = 0
        self._original: Callable | None = None
        self._wrapper: Callable | None = None

    def hold(self, cache: object) -> None:
        """Keep the door open until `cache` is gone."""
        if not hasattr(AttentionInterface, _METHOD):
            raise ImportError("prefixkv-cache needs transformers 5.4 or newer (AttentionInterface.get_interface)")
        with self._lock:
            self._holders += 1
            if self._wrapper is None:
                original = AttentionInterface.__dict__[_METHOD]
                self._original, self._wrapper = original, _wrap(original)
                setattr(AttentionInterface, _METHOD, self._wrapper)
            finalizer = weakref.finalize(cache, self._release)
            finalizer.atexit = False

    def _release(self) -> None:
        with self._lock:
            self._holders -= 1
            # Somebody who wrapped our wrapper in turn keeps it inside theirs: there it lets everything pass, and serves
            # again for the next cache.
            if self._holders == 0 and AttentionInterface.__dict__[_METHOD] is self._wrapper:
                setattr(AttentionInterface, _METHOD, self._original)
                self._original = self._wrapper = None


_door = _Door()


def hold_door(cache: object) -> None:
    """Let the attention calls of this cache's layers be seen, for as long as the cache lives.

    Raises:
        ImportError: this transformers has no `AttentionInterface.get_interface`.
    """
    _door.hold(cache)


def _wrap(original: Callable) -> Callable:
    def get_interface(self: Any, attn_implementation: str, default: Callable) -> Callable:
        function = original(self, attn_implementation, default)
        # What others compile is traced as if we were not there.
        if torch.compiler.is_compiling():
            return function

        # `attention_mask` is named, since vision towers pass it by keyword.
        def attend(
            module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            reference, layer_idx = getattr(key, _MARK, (None, 0))
            cache = None if reference is None else reference()
            if cache is None:
                return function(module, query, key, value, attention_mask, *args, **kwargs)
            mask = cache.before_attention(layer_idx, module, query, attention_mask, attn_implementation or "eager")
            output = function(module, query, key, value, mask, *args, **kwargs)
            cache.after_attention(layer_idx, module, query, key, mask, kwargs)
            return output

        return attend

    return get_interface
