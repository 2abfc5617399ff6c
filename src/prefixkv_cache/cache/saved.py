"""Copies of a cache, and caches in files: `copy`, `save` and `load` of `PrefixKVCache`.

A file holds all that decoding and later turns go on from: pairs, positions, and each row's eviction state; format
version 1, described in docs/compress.md. What a file claims is held against itself and against the model before a
layer is made of it.
"""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from ..methods import Method
from ..profiles.files import write_atomically
from ..profiles.profile import PrefixProfile
from ..rules.eviction import Eviction
from .decode import STEPS_PER_GROWTH
from .layer import PrunedLayer
from .loaded import (
    COUNTERS,
    FORMAT,
    FORMAT_VERSION,
    KEYLESS,
    MAX_STEPS,
    Reader,
    check_metadata,
    check_tokens,
    hash_of,
    name_of,
)
from .segments import Segment
from .tensor_file import encode, open_tensors

C = TypeVar("C", bound="SavedCaches")
_copying = threading.Lock()


class SavedCaches(Cache):
    """Copies, and files. A part of `PrefixKVCache`."""

    profile: PrefixProfile | None
    method: Method
    budget: float | int
    max_new_tokens: int | None
    quantize: str | None
    _image_mask: Tensor | None
    _model_name = ""
    _tokens = ""
    _position_deltas: Tensor | None = None
    context_ids: Tensor | None = None
    """The token ids that `compress` read, int64 [batch, n] on the CPU, saved and loaded; None for other caches."""
    notes: Mapping[str, str] = MappingProxyType({})
    """Strings of the user's own, saved and loaded with the cache."""

    def _settle(self, layer_idx: int | None = None) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        """Forget of which tokens this cache was."""
        self._tokens, self._position_deltas, self.context_ids = "", None, None
        self.__dict__.pop("notes", None)
        super().reset()

    # Rows of other tokens, or in another order.

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of what was row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)
        self._choose_rows(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        super().batch_repeat_interleave(repeats)
        self._choose_rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`, in that order."""
        super().batch_select_indices(indices)
        self._choose_rows(lambda rows: rows[indices.to(rows.device)])

    def _choose_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Context ids and position deltas follow their rows; a hash alone cannot."""
        self._tokens = ""
        self.context_ids = None if self.context_ids is None else choose(self.context_ids)
        self._position_deltas = None if self._position_deltas is None else choose(self._position_deltas)

    def copy(self: C) -> C:
        """An independent cache that goes on as this one does. The buffers are shared until one of both writes.

        May be called from several threads at once, as long as none of them feeds this very cache.
        """
        with _copying:
            self._settle()
            kept = [self.profile, self._image_mask, getattr(self, "prefetch_stream", None)]
            for segment in self._segments():
                if segment.plan is None:  # a planned segment writes at constant addresses: it gets its own
                    kept += segment.stored.share()
            return copy.deepcopy(self, {id(each): each for each in kept if each is not None})

    def save(self, path: str | os.PathLike[str], input_ids: Tensor | None = None, *, model: Any = None) -> None:
        """Write the cache to a safetensors file, in one step: whoever reads the path finds the old file or this one.

        Layers with a sliding window are saved whole. Offloading is not remembered.

        Args:
            path: where to; the folder must exist.
            input_ids: int [batch, n], the tokens fed so far, or the first of them. Their hash is saved, not they. Of a
                cache that `compress` has made its `context_ids` are saved, and their hash.
            model: the model that fed it, this cache as the last one: its name is saved, and with M-RoPE where positions
                go on. Known already of a cache that `compress` or `load` has made; the name, where `for_model` has.

        Raises:
            TypeError: `notes` are not strings.
            ValueError: the cache holds nothing, or what cannot be saved (linear attention, quantised pairs, ...).
            OSError: the file cannot be written.
        """
        self._settle()
        self._refuse_unsavable()
        layers = [_describe(layer, index) for index, layer in enumerate(self.layers)]
        tensors = {name: tensor for index, layer in enumerate(self.layers) for name, tensor in _tensors(layer, index)}
        first = next(layer for layer in self.layers if isinstance(layer, PrunedLayer))
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": _library_version(),
            "model": self._model_name if model is None else name_of(model.config),
            "dtype": str(first.dtype).removeprefix("torch."),
            "n_layers": str(len(layers)),
            "n_heads": str(first.n_heads),
            "batch": str(first.batch_size),
            "seen": str(first.seen),
            "method": self.method.spell(full=True),
            "budget": repr(self.budget),
            "max_new_tokens": str(self.max_new_tokens),
            "layers": json.dumps(layers, separators=(",", ":")),
        }
        context = self.context_ids
        context = None if context is None or context.shape[1] > first.seen else context
        if input_ids is None:
            tokens = self._tokens if context is None else hash_of(context, first.seen)
        else:
            tokens = hash_of(input_ids, first.seen)
        if tokens and int(tokens.split(":")[0]) <= first.seen:
            metadata["tokens"] = tokens
        tensors |= {} if context is None else {"context_ids": context}
        metadata |= {"notes": _spell_notes(self.notes)} if self.notes else {}
        if self.profile is not None:
            metadata["profile"] = json.dumps(dict(self.profile.metadata), sort_keys=True)
            tensors |= {"profile.budgets": self.profile.budgets, "profile.keep": self.profile.keep}
        deltas = deltas_of(model) if self._position_deltas is None else self._position_deltas
        tensors |= {} if deltas is None else {"position_deltas": deltas}
        tensors |= {} if self._image_mask is None else {"image_mask": self._image_mask}
        write_atomically(path, encode(tensors, metadata))

    def _refuse_unsavable(self) -> None:
        if self.quantize is not None:
            raise ValueError(f"a cache with quantize={self.quantize!r} cannot be saved; make the cache without it")
        if (self.max_new_tokens or 0) > MAX_STEPS:
            raise ValueError(
                f"a cache with max_new_tokens above {MAX_STEPS} cannot be saved; got {self.max_new_tokens}"
            )

    @classmethod
    def load(cls: type[C], path: str | os.PathLike[str], model: Any, input_ids: Tensor | None = None) -> C:
        """The cache of a file, on the model's device and in its dtype; reading it runs no code.

        Args:
            path: of a file that `save` has written.
            model: the model that is to go on from it.
            input_ids: int [batch, n], of which the cache is said to be; checked where the file has their hash.

        Raises:
            SavedCacheError: the file is damaged, or of another model; a ValueError that names the file, the field and
                what was expected.
        """
        with open_tensors(path) as file:
            metadata = check_metadata(file.metadata, model)
            check_tokens(metadata.get("tokens"), input_ids)
            cache = Reader(file, metadata, model).cache(cls)
        cache.restore_positions(model)
        return cache

    def restore_positions(self, model: Any) -> None:
        """Make a model with M-RoPE go on where this cache's context ended, after it has read another one.

        Such models hold the position of the next token as a state of their own (`rope_deltas`), that of the last prompt
        they read. Other models are left as they are, and so is the model of a cache that `generate` has filled.
        """
        if self._position_deltas is not None and hasattr(getattr(model, "model", None), "rope_deltas"):
            model.model.rope_deltas = self._position_deltas.clone()

    def _segments(self) -> Iterator[Segment]:
        for layer in self.layers:
            if isinstance(layer, PrunedLayer):
                _ = layer.seen  # takes note of planned steps
                yield from layer.segments


# To a file.


def _spell_notes(notes: Any) -> str:
    if not isinstance(notes, Mapping) or not all(isinstance(each, str) for pair in notes.items() for each in pair):
        raise TypeError(f"cache.notes must be a dict of strings by strings, as they are saved; got {notes!r}")
    return json.dumps(dict(notes), sort_keys=True)


def _describe(layer: Any, index: int) -> dict[str, Any]:
    """What of a layer is no tensor."""
    if type(layer) is DynamicSlidingWindowLayer and layer.is_initialized and not getattr(layer, "record_past", False):
        return {"seen": layer.cumulative_length}
    if type(layer).__name__ == KEYLESS:
        return {}
    if not isinstance(layer, PrunedLayer):
        raise ValueError(f"layer {index} is a {type(layer).__name__}; caches with such layers cannot be saved")
    if layer.window is not None:
        raise ValueError(f"layer {index} has a sliding window and is pruned inside it; such caches cannot be saved")
    if not layer.segments:
        raise ValueError("the cache holds nothing yet; save it after a prompt")
    seen = layer.seen
    return {
        "segments": [
            {
                "heads": None if each.group is None else list(each.group.heads),
                "capacity": _capacity(each),
                "in_place": each.in_place,
                "received_at": each._received_at,
                "steps": None if each.plan is None else each.plan.last - seen,
            }
            for each in layer.segments
        ]
    }


def _capacity(segment: Segment) -> int:
    """Slots to allocate again: not those that only rejected candidates have used."""
    capacity = segment.stored.capacity
    return capacity if segment.plan is not None else min(capacity, segment.width + STEPS_PER_GROWTH)


def _tensors(layer: Any, index: int) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(layer, PrunedLayer):
        names = () if type(layer).__name__ == KEYLESS else ("keys", "values")
        yield from ((f"{index}.{name}", getattr(layer, name)) for name in names)
        return
    for place, segment in enumerate(layer.segments):
        prefix, rows = f"{index}.{place}.", segment._step.rows
        yield from ((prefix + name, getattr(segment, name)) for name in ("keys", "values", "positions"))
        if segment.stored.received is not None:
            yield prefix + "received", segment.stored.received[..., : segment.width]
        queues = [list(getattr(row, "queue", ())) for row in rows]
        longest = max(map(len, queues))
        yield prefix + "rows", torch.tensor([_counters(row, len(q)) for row, q in zip(rows, queues, strict=True)])
        yield prefix + "keep", torch.tensor([row.keep for row in rows], dtype=torch.float64)
        filled = [queue + [-1] * (longest - len(queue)) for queue in queues]
        yield prefix + "queue", torch.tensor(filled, dtype=torch.int64).view(len(rows), longest)


def _counters(row: Eviction, queued: int) -> list[int]:
    found = (getattr(row, name, None) for name in COUNTERS[:-1])
    return [*(-1 if each is None else each for each in found), queued]


def deltas_of(model: Any) -> Tensor | None:
    """Where positions go on behind what a model with M-RoPE has read last, int64 [batch, 1]; None: no such model."""
    holder = getattr(model, "model", None)
    deltas = getattr(holder, "rope_deltas", None)
    return deltas.clone() if isinstance(deltas, Tensor) and deltas.dtype == torch.int64 else None


def _library_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("prefixkv-cache")
    except PackageNotFoundError:
        return "unknown"
