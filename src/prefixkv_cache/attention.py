"""The door: the one place where the library meets the model's attention.

A `Cache` sees keys and values but never queries. transformers asks `AttentionInterface.get_interface` for the attention
function at every attention call; while one of our caches is alive, that method is wrapped here, and the function it
returns first asks whether the key tensor is one that our cache handed out a moment ago. The mark is an attribute on
that very tensor object, so recognition is by identity: no other model, cache, vision tower or thread can be taken for
ours (latent attention, which shows another tensor, is told by thread, layer and length: see `_recognise`). The model's
own backend then computes the attention, unmodified, and the cache may look at what went in.

This module decides nothing: which mask a layer gets and what is pruned is up to the cache.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.modeling_utils import AttentionInterface

from .compat import DOOR_METHOD
from .distributed import ALONE, HeadRanks, join_head_ranks
from .importance import attention_importance
from .importance_flash import CaughtLogSumExp
from .masks import layer_mask, readable
from .scoring import Ranking, rank_keys

_MARK = "_prefixkv_handed_out"
_this_thread = threading.local()
LOG_SUM_EXP = "prefixkv_log_sum_exp"
"""Among the options of a call that has returned: float32 [batch, heads, queries], where `counts_all_queries` asked."""


class AttendedCache(Protocol):
    """What the door asks of a cache whose key tensor it recognises."""

    def counts_all_queries(self, handed: HandedOut) -> bool:
        """Whether the importance of all queries will be asked for, which is cheaper with the kernel's log-sum-exp."""
        ...

    def before_attention(self, handed: HandedOut, module: Any, query: Any, mask: Any, backend: str) -> Any:
        """Return the mask that this layer needs."""
        ...

    def after_attention(
        self, handed: HandedOut, module: Any, query: Any, key: Any, mask: Any, options: dict[str, Any]
    ) -> None:
        """Take note of an attention call that has returned."""
        ...


@dataclass(slots=True)
class HandedOut:
    """What a key tensor carries from the cache to the door.

    Attributes:
        cache: weak, so that a tensor that somebody keeps does not keep the cache.
        layer_idx: the layer whose keys these are.
        n_keys: how many.
        own_mask: whether the mask must be remapped; if not, key i is token i.
        positions: int64 [batch, 1 or kv_heads, n_keys], the logical position of each key (-1: none), needed with
            `own_mask`; None: the cache still knows when the door asks.
        ragged: whether there is any -1 in `positions`.
    """

    cache: weakref.ref[AttendedCache]
    layer_idx: int
    n_keys: int
    own_mask: bool
    positions: torch.Tensor | None
    ragged: bool


def hand_out(
    key: torch.Tensor,
    cache: AttendedCache,
    layer_idx: int,
    *,
    own_mask: bool = False,
    positions: torch.Tensor | None = None,
    ragged: bool = False,
) -> torch.Tensor:
    """Mark `key` as the tensor that layer `layer_idx` of `cache` gives to the model; returns it."""
    handed = HandedOut(weakref.ref(cache), layer_idx, key.shape[2], own_mask, positions, ragged)
    setattr(key, _MARK, handed)
    _this_thread.newest = handed
    return key


def hand_out_compiled(key: torch.Tensor, positions: torch.Tensor, ragged: bool) -> torch.Tensor:
    """`hand_out` of a decode step while it is being compiled: the mark says all that the door needs."""
    setattr(key, _MARK, (positions, ragged))
    return key


def _recognise(module: Any, key: Any) -> HandedOut | None:
    """Whose key this is: by identity, or None.

    Models with latent attention (MLA) expand the keys after `update`, so the tensor that arrives is another one. For
    them, and for no others, it counts as ours if it comes to the layer that was last updated in this thread, at the
    same length.
    """
    handed = getattr(key, _MARK, None)
    if handed is None:
        newest: HandedOut | None = getattr(_this_thread, "newest", None)
        latent = getattr(getattr(module, "config", None), "kv_lora_rank", None) is not None
        if newest is None or not latent:
            return None
        if getattr(module, "layer_idx", None) != newest.layer_idx or key.shape[2] != newest.n_keys:
            return None
        handed = newest
    _this_thread.newest = None
    return handed


def importance_of_call(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    options: dict[str, Any],
    *,
    ranking: Ranking,
    real: torch.Tensor | None,
    max_bytes: int,
    every_query: bool = False,
) -> torch.Tensor:
    """Importance of the keys of one attention call, see importance.py.

    Args:
        module, query, key, mask, options: of the call.
        ranking: says whose attention counts, and whether single heads are looked at.
        real: bool [batch, n_queries], whose queries may count; with the queries `"text"`, those of the text.
        max_bytes: ceiling for the temporaries.
        every_query: whatever the ranking says, all queries count.

    Returns:
        float32 [batch, 1, n_keys], over all heads, those of other ranks too; where single heads are looked at, [batch,
        kv_heads, n_keys] of this rank's.
    """
    importance = attention_importance(
        query,
        key,
        readable(mask),
        queries="all" if every_query or ranking.queries == "text" else ranking.queries,
        real=real,
        scaling=options.get("scaling"),
        softcap=options.get("softcap"),
        sink_logits=options.get("s_aux"),
        log_sum_exp=options.get(LOG_SUM_EXP),
        average=ranking.average,
        per_head=ranking.by_head,
        max_bytes=max_bytes,
    )
    return importance if ranking.by_head else join_head_ranks(importance, module)[:, None]


def scores_of_call(
    importance: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ranking: Ranking,
    real: torch.Tensor | None,
    module: Any,
) -> torch.Tensor:
    """Scores of the keys of one attention call, see scoring.py.

    Args:
        importance: float32 [batch, 1 or kv_heads, n], of this rank's heads where single ones are looked at.
        keys, values: [batch, kv_heads, n, head_dim], as they are stored.
        ranking: how they are ranked.
        real: bool [batch, n], False at padding. None: no padding.
        module: the attention module.

    Returns:
        float32 [batch, 1, n], the same on every rank, or [batch, kv_heads, n] of this rank's where each head ranks
        keys for itself.

    Raises:
        ValueError: the ranking looks at single heads, and the model stores others than it attends with.
    """
    if ranking.by_head and importance.shape[1] != keys.shape[1]:
        raise ValueError(
            f"this model stores {keys.shape[1]} key heads and attends with {importance.shape[1]}, so single heads "
            f"cannot be told: leave heads={ranking.heads!r}, pooling and value_norm out"
        )
    # Where heads agree on keys, those of other ranks have their say.
    return rank_keys(importance, keys, values, ranking, real, HeadRanks.of(module) if ranking.by_rank else ALONE)


class _Door:
    """Wraps the look-up of attention functions while at least one cache holds the door open."""

    def __init__(self) -> None:
        # Re-entrant, since the garbage collector may run `_release` in the thread that holds it.
        self._lock = threading.RLock()
        self._holders: set[int] = set()  # ids of the caches
        self._wrapper: Callable | None = None
        self._inherited = False
        self._original: Callable | None = None

    def hold(self, cache: object) -> None:
        """Keep the door open until `cache` is gone."""
        with self._lock:
            # First of all, so that wherever Ctrl-C comes the cache's end closes what was opened for it.
            weakref.finalize(cache, self._release, id(cache)).atexit = False
            self._holders.add(id(cache))
            if self._wrapper is None:
                self._inherited = DOOR_METHOD not in AttentionInterface.__dict__
                original = getattr(AttentionInterface, DOOR_METHOD)
                self._original, self._wrapper = original, _wrap(original)
            # Somebody who wrapped our wrapper in turn keeps it inside theirs: there it lets everything pass while no
            # cache is alive, and serves again for the next one.
            if getattr(AttentionInterface, DOOR_METHOD) is self._original:
                setattr(AttentionInterface, DOOR_METHOD, self._wrapper)

    def _release(self, holder: int) -> None:
        with self._lock:
            self._holders.discard(holder)
            newest: HandedOut | None = getattr(_this_thread, "newest", None)
            if newest is not None and newest.cache() is None:  # its keys never came to an attention call
                _this_thread.newest = None
            installed = getattr(AttentionInterface, DOOR_METHOD)
            if self._holders or installed not in (self._wrapper, self._original):
                return
            if installed is self._wrapper and self._inherited:
                delattr(AttentionInterface, DOOR_METHOD)
            elif installed is self._wrapper:
                setattr(AttentionInterface, DOOR_METHOD, self._original)
            self._original = self._wrapper = None


_door = _Door()


def hold_door(cache: object) -> None:
    """Let the attention calls of this cache's layers be seen, for as long as the cache lives."""
    _door.hold(cache)


def _compiled(function: Callable, backend: str) -> Callable:
    """The attention function as the compiler shall trace it: a decode step of ours with its own mask, others as is."""

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        mark = getattr(key, _MARK, None)
        if mark is not None:
            attention_mask = layer_mask(attention_mask, mark[0], mark[1], query, backend)
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    return attend


def _wrap(original: Callable) -> Callable:
    def look_up(self: Any, attn_implementation: str, *default: Callable) -> Callable:
        function = original(self, attn_implementation, *default)
        if torch.compiler.is_compiling():
            return _compiled(function, attn_implementation or "eager")

        # `attention_mask` is named, since vision towers pass it by keyword.
        def attend(
            module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            handed = _recognise(module, key)
            cache = None if handed is None else handed.cache()
            if handed is None or cache is None:
                return function(module, query, key, value, attention_mask, *args, **kwargs)
            mask = cache.before_attention(handed, module, query, attention_mask, attn_implementation or "eager")
            if attn_implementation == "sdpa" and cache.counts_all_queries(handed):
                with CaughtLogSumExp() as caught:
                    output = function(module, query, key, value, mask, *args, **kwargs)
                kwargs = {**kwargs, LOG_SUM_EXP: caught.found}
            else:
                output = function(module, query, key, value, mask, *args, **kwargs)
            cache.after_attention(handed, module, query, key, mask, kwargs)
            return output

        return attend

    return look_up
