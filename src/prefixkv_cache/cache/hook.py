"""Attention hook: observes the attention calls of our caches through `AttentionInterface`.

A `Cache` sees keys and values but never queries. transformers asks `AttentionInterface.get_interface` for the attention
function at every attention call; while one of our caches is alive, that method is wrapped here, and the function that
it returns first asks whether the key tensor is one that our cache handed out a moment ago. The mark is an attribute of
that very tensor object, so recognition is by identity: no other model, cache, vision tower or thread can be taken for
ours (latent attention, which shows another tensor, is told by thread, layer and length: see `_recognise`). The model's
own backend then computes the attention, unmodified: once, or once for each segment.

This module decides nothing: which mask a segment gets and what is pruned is up to the cache.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from ..rules.importance_flash import CaughtLogSumExp
from .call import AttentionCall, join_outputs, join_queries, mask_of
from .compat import HOOKED_METHOD
from .segments import Shown

_MARK = "_prefixkv_handed_out"
_this_thread = threading.local()


class AttendedCache(Protocol):
    """What the hook asks of the cache whose key tensor it recognises."""

    def watches(self, handed: HandedOut) -> bool:
        """Whether to tell the cache of this call at all: not of most decode steps."""
        ...

    def before_attention(self, handed: HandedOut, call: AttentionCall) -> None:
        """Take note of an attention call that is about to run."""
        ...

    def wants_log_sum_exp(self, handed: HandedOut) -> bool:
        """Whether the importance of all queries will be asked for, which is cheaper with the kernel's log-sum-exp."""
        ...

    def after_attention(self, handed: HandedOut, calls: Sequence[AttentionCall]) -> None:
        """Take note of an attention call that has returned, by segment."""
        ...


class DraftingCache(AttendedCache, Protocol):
    """One that hands out candidates behind a prompt, too."""

    def show_candidates(self, handed: HandedOut) -> Sequence[Shown]:
        """What the candidates see, once the prompt is pruned."""
        ...


@dataclass(slots=True)
class HandedOut:
    """What a key tensor carries from the cache to the attention hook.

    Attributes:
        cache: weak, so that a tensor that somebody keeps does not keep the cache.
        layer_idx: the layer whose keys these are.
        n_keys: how many.
        shown: what the attention of each segment reads.
        candidates: so many of the last queries are candidates behind the prompt that `shown` shows; see draft.py.
    """

    cache: weakref.ref[AttendedCache]
    layer_idx: int
    n_keys: int
    shown: Sequence[Shown]
    candidates: int = 0


def hand_out(key: Tensor, cache: AttendedCache, layer_idx: int, shown: Sequence[Shown], candidates: int = 0) -> Tensor:
    """Mark `key` as the tensor that layer `layer_idx` of `cache` gives to the model; returns it."""
    handed = HandedOut(weakref.ref(cache), layer_idx, key.shape[2], shown, candidates)
    setattr(key, _MARK, handed)
    _this_thread.newest = handed
    return key


def hand_out_compiled(key: Tensor, shown: Sequence[Shown]) -> Tensor:
    """`hand_out` of a decode step while it is being compiled: the mark says all that the hook needs."""
    setattr(key, _MARK, shown)
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


def attend_over_segments(
    function: Callable, call: AttentionCall, shown: Sequence[Shown], catch: bool = False
) -> tuple[Any, list[AttentionCall]]:
    """Run the model's attention function for each segment, and join what comes out.

    Args:
        function: the model's own attention function.
        call: as the model made it.
        shown: what each segment reads.
        catch: whether to catch the kernel's log-sum-exp.

    Returns:
        The output as the model expects it, and the calls that were made.
    """
    calls = [call.of_segment(each, call.key.shape[1]) for each in shown]
    outputs = []
    for place, each in enumerate(calls):
        if (draft := shown[place].draft) is not None:
            outputs.append(draft.attend(function, call, shown[place]))
        elif catch:
            with CaughtLogSumExp() as caught:
                outputs.append(each.run(function))
            calls[place] = replace(each, log_sum_exp=caught.found)
        else:
            outputs.append(each.run(function))
    if len(calls) == 1:
        return outputs[0], calls
    groups = [each.group for each in shown if each.group is not None]
    return join_outputs(outputs, groups, call.query.shape[1] // call.key.shape[1]), calls


def attend_watched(function: Callable, call: AttentionCall, handed: HandedOut, cache: AttendedCache) -> Any:
    """Run a call that its cache is told of; candidates behind a prompt after the prompt, over what is kept of it."""
    whole, behind = (call, None) if not handed.candidates else call.split(handed.candidates)
    cache.before_attention(handed, whole)
    catch = call.backend == "sdpa" and cache.wants_log_sum_exp(handed)
    output, calls = attend_over_segments(function, whole, handed.shown, catch)
    cache.after_attention(handed, calls)
    if behind is None:
        return output
    shown = cast(DraftingCache, cache).show_candidates(handed)
    if shown[0].group is None:
        behind = replace(behind, key=shown[0].keys, value=shown[0].values)
    return join_queries([output, attend_over_segments(function, behind, shown)[0]])


class _AttentionHook:
    """Wraps the look-up of attention functions while at least one cache is alive."""

    def __init__(self) -> None:
        # Re-entrant, since the garbage collector may run `_release` in the thread that holds it.
        self._lock = threading.RLock()
        self._holders: set[int] = set()  # ids of the caches
        self._wrapper: Callable | None = None
        self._inherited = False
        self._original: Callable | None = None

    def hold(self, cache: object) -> None:
        """Keep the hook in place until `cache` is gone."""
        with self._lock:
            # First of all, so that wherever Ctrl-C comes the cache's end undoes what was done for it.
            weakref.finalize(cache, self._release, id(cache)).atexit = False
            self._holders.add(id(cache))
            if self._wrapper is None:
                self._inherited = HOOKED_METHOD not in AttentionInterface.__dict__
                original = getattr(AttentionInterface, HOOKED_METHOD)
                self._original, self._wrapper = original, _wrap(original)
            # Somebody who wrapped our wrapper in turn keeps it inside theirs: there it lets everything pass while no
            # cache is alive, and serves again for the next one.
            if getattr(AttentionInterface, HOOKED_METHOD) is self._original:
                setattr(AttentionInterface, HOOKED_METHOD, self._wrapper)

    def _release(self, holder: int) -> None:
        with self._lock:
            self._holders.discard(holder)
            newest: HandedOut | None = getattr(_this_thread, "newest", None)
            if newest is not None and newest.cache() is None:  # its keys never came to an attention call
                _this_thread.newest = None
            installed = getattr(AttentionInterface, HOOKED_METHOD)
            if self._holders or installed not in (self._wrapper, self._original):
                return
            if installed is self._wrapper and self._inherited:
                delattr(AttentionInterface, HOOKED_METHOD)
            elif installed is self._wrapper:
                setattr(AttentionInterface, HOOKED_METHOD, self._original)
            self._original = self._wrapper = None


_hook = _AttentionHook()


def hold_hook(cache: object) -> None:
    """Let the attention calls of this cache's layers be seen, for as long as the cache lives."""
    _hook.hold(cache)


def _compiled(function: Callable, backend: str) -> Callable:
    """The attention function as the compiler shall trace it: a decode step of ours by its segments, others as is."""

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        shown = getattr(key, _MARK, None)
        if shown is None:
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        call = AttentionCall(module, query, key, value, attention_mask, backend, args, kwargs)
        return attend_over_segments(function, call, shown)[0]

    return attend


def _wrap(original: Callable) -> Callable:
    def look_up(self: Any, attn_implementation: str, *default: Callable) -> Callable:
        function = original(self, attn_implementation, *default)
        backend = attn_implementation or "eager"
        if torch.compiler.is_compiling():
            return _compiled(function, backend)

        # `attention_mask` is named, since vision towers pass it by keyword.
        def attend(
            module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            handed = _recognise(module, key)
            cache = None if handed is None else handed.cache()
            if handed is None or cache is None:
                return function(module, query, key, value, attention_mask, *args, **kwargs)
            watched, shown = cache.watches(handed), handed.shown
            if not watched and shown[0].group is None:  # most decode steps: nothing to join, nothing to tell
                mask = mask_of(shown[0], attention_mask, query, backend)
                return function(module, query, key, value, mask, *args, **kwargs)
            call = AttentionCall(module, query, key, value, attention_mask, backend, args, kwargs)
            if not watched:
                return attend_over_segments(function, call, shown)[0]
            return attend_watched(function, call, handed, cache)

        return attend

    return look_up
