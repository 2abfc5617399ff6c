"""A context through the model twice: once as `generate` feeds a prompt, and once more behind itself.

The first pass fills a full cache (`Context`) and notes what the decoder is given: embeddings, of images too, and
positions. The second feeds these a chunk at a time, at the positions that follow; nothing of it is stored, and what it
looks for is in reconstruct.py.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .architecture import decoder_config
from .call import AttentionCall
from .compat import MaxLengthNames, n_queries
from .guards import explain_unseen_layer
from .hook import HandedOut, hand_out, hold_hook
from .layer import PrunedLayer
from .reconstruct import LargestAttention
from .segments import Shown
from .tensor_parallel import HeadRanks

_LEAST_CHUNK = 16


def context_of(model: Any, inputs: Any) -> Tensor:
    """The token ids of the context, int64 [batch, n]; refuses what is none."""
    if not isinstance(inputs, Mapping) or not isinstance(ids := inputs.get("input_ids"), Tensor) or ids.ndim != 2:
        raise TypeError("inputs are what model.generate(**inputs) takes, with a tensor input_ids [batch, n]")
    if ids.numel() == 0 or ids.is_floating_point():
        raise ValueError(f"input_ids must be an int tensor [batch, n] of a context; got {ids.dtype} {list(ids.shape)}")
    if inputs.get("past_key_values") is not None:
        raise ValueError("inputs have a cache already (past_key_values); compress reads the whole context by itself")
    if not getattr(model, "can_generate", lambda: False)():
        raise TypeError(f"{type(model).__name__} cannot generate, so it cannot be asked about a context")
    return ids.to(model.device)


def padding_of(inputs: Mapping[str, Any], tokens: Tensor) -> tuple[Tensor | None, list[int]]:
    """Which tokens are valid, bool [batch, n] (None: all), and how many in each row."""
    mask = inputs.get("attention_mask")
    valid = None if mask is None or bool(mask.all()) else mask.to(tokens.device).bool()
    return valid, [tokens.shape[1]] * tokens.shape[0] if valid is None else valid.sum(1).tolist()


class Fed:
    """What the decoder is given in the first pass, noted by a hook on it: embeddings or token ids, and positions."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Any]] = []
        self._thread = threading.get_ident()

    def note(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook. What another thread asks of the same model at that time is none of ours."""
        if threading.get_ident() != self._thread:
            return
        given = {**({"input_ids": args[0]} if args else {}), **kwargs}
        self._parts.append({name: given.get(name) for name in ("inputs_embeds", "input_ids", "position_ids")})

    @property
    def tokens(self) -> Tensor:
        """Embeddings [batch, n, size] or token ids [batch, n]."""
        parts = [part["input_ids"] if part["inputs_embeds"] is None else part["inputs_embeds"] for part in self._parts]
        return torch.cat(parts, dim=1)

    @property
    def positions(self) -> Tensor | None:
        """[..., batch or 1, n]; None where the decoder finds them."""
        found = [part["position_ids"] for part in self._parts]
        return None if any(each is None for each in found) else torch.cat(found, dim=-1)


def first_pass(model: Any, inputs: Mapping[str, Any], cache: Cache, chunk: int) -> Fed:
    """Feed the context, as `generate` does."""
    fed, device = Fed(), model.device
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": 1, "use_cache": True}
    if set(given) <= {"input_ids", "attention_mask"} and given["input_ids"].shape[1] > chunk:
        options["prefill_chunk_size"] = chunk
    handle = model.get_decoder().register_forward_pre_hook(fed.note, with_kwargs=True)
    try:
        model.generate(**given, past_key_values=cache, **options)
    finally:
        handle.remove()
    return fed


class ContextLayer(MaxLengthNames, CacheLayerMixin):
    """Holds the whole context. Once `held`, it shows what comes behind it, and keeps none of that."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.held = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take note of dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[batch, heads, context and new, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        if not self.held:
            self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens of the context so far."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask."""
        return self.get_seq_length() + n_queries(query_length), 0


class Context(Cache):
    """A full cache of the context, whose attention calls are looked at in the second pass.

    Args:
        layers: of the cache that is being made; those that are left whole are fed here.
    """

    def __init__(self, layers: Sequence[Any]):
        self.prunable = [index for index, layer in enumerate(layers) if isinstance(layer, PrunedLayer)]
        self.observer: LargestAttention | None = None
        super().__init__(layers=[ContextLayer() if isinstance(layer, PrunedLayer) else layer for layer in layers])
        hold_hook(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Update the layer; the keys of prunable layers are handed out to the attention hook."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self.prunable:
            return keys, values
        return hand_out(keys, self, layer_idx, [Shown(None)]), values

    def watches(self, handed: HandedOut) -> bool:
        """Whether this is the second pass."""
        return self.observer is not None

    def before_attention(self, handed: HandedOut, call: AttentionCall) -> None:
        """Nothing is to be noted."""

    def wants_log_sum_exp(self, handed: HandedOut) -> bool:
        """It is not asked for."""
        return False

    def after_attention(self, handed: HandedOut, calls: Sequence[AttentionCall]) -> None:
        """Score the context's keys."""
        if HeadRanks.of(calls[0].module).count > 1:
            raise NotImplementedError("tensor-parallel ranks see some heads only; compress by a one-pass method")
        if self.observer is not None:
            self.observer.look(handed.layer_idx, calls[0])


# The second pass.


class SecondPass:
    """The context once more, behind itself."""

    def __init__(
        self,
        model: Any,
        context: Context,
        fed: Fed,
        valid: Tensor | None,
        request: Tensor,
        observer: LargestAttention,
    ):
        self._model, self._context, self._valid, self._request = model, context, valid, request
        self._tokens, self._positions = fed.tokens, fed.positions
        self._observer = context.observer = observer
        # Padding goes behind the second copy: between the two, it would use up sliding windows.
        self._order = None if valid is None else (~valid).long().argsort(dim=1, stable=True)

    @property
    def _base(self) -> Tensor | int:
        """The first position behind the context, of each row."""
        if self._positions is None:
            return self._tokens.shape[1]
        behind = self._positions.amax(-1, keepdim=True) + 1
        return behind if behind.ndim == 2 else behind.amax(0, keepdim=True)

    def room(self, chunk: int) -> int:
        """So much of a chunk as the model has positions for.

        Raises:
            ValueError: too few.
        """
        most = getattr(decoder_config(self._model.config), "max_position_embeddings", None)
        if not isinstance(most, int):
            return chunk
        free = most - int(torch.as_tensor(self._base).max()) - len(self._request)
        if free < min(_LEAST_CHUNK, self._tokens.shape[1]):
            raise ValueError(
                f"a second pass over {self._tokens.shape[1]} tokens needs {_LEAST_CHUNK} positions behind them, but "
                f"this model has {most} in all (max_position_embeddings); take a method that ranks in one pass, such "
                "as method='default'"
            )
        return min(chunk, free)

    def run(self, chunk: int, progress: Callable[[int, int], None] | None) -> dict[int, Tensor]:
        """float32 [batch, kv_heads, n] by layer index: the largest attention that each key of the context gets."""
        context, n = self._context, self._tokens.shape[1]
        whole = {index: layer for index, layer in enumerate(context.layers) if index not in context.prunable}
        for index in context.prunable:
            context.layers[index].held = True  # pyright: ignore[reportAttributeAccessIssue]
        for start in range(0, n, chunk):
            for index, layer in whole.items():
                context.layers[index] = copy.deepcopy(layer)
            self._feed(start, min(start + chunk, n))
            if progress is not None:
                progress(min(start + chunk, n), n)
        context.observer = None
        for index in context.prunable:
            if index not in self._observer.of_layer:
                raise RuntimeError(explain_unseen_layer(index))
        return self._observer.of_layer

    def _feed(self, start: int, stop: int) -> None:
        tokens, request = self._tokens, self._request.expand(len(self._tokens), -1)
        columns = torch.arange(start, stop, device=tokens.device).expand(len(tokens), -1)
        own, more = None, {}
        if self._order is not None and self._valid is not None:
            columns = self._order[:, start:stop]
            own = torch.cat([torch.ones_like(request, dtype=torch.bool), self._valid.gather(1, columns)], dim=1)
            if not bool(own[:, request.shape[1] :].any()):
                return
            more["attention_mask"] = torch.cat([self._valid, own], dim=1).long()
        self._observer.valid = own
        if self._positions is not None:
            more["position_ids"] = self._behind(columns, None if own is None else own[:, request.shape[1] :])
        name = "input_ids" if tokens.ndim == 2 else "inputs_embeds"
        if tokens.ndim == 3 and request.shape[1]:
            request = self._model.get_input_embeddings()(request).to(tokens.dtype)
        elif tokens.ndim == 3:
            request = tokens[:, :0]
        again = tokens.take_along_dim(columns if tokens.ndim == 2 else columns[..., None], 1)
        more[name] = torch.cat([request, again], dim=1)
        self._model.get_decoder()(past_key_values=self._context, use_cache=True, **more)

    def _behind(self, columns: Tensor, valid: Tensor | None) -> Tensor:
        """Positions of the request and of these columns, right behind the context; the axes of M-RoPE move together."""
        positions = self._positions
        assert positions is not None, "asked for only where the model was given positions"
        positions = positions.expand(*positions.shape[:-2], *self._tokens.shape[:2])
        own = positions.take_along_dim(columns.expand(*positions.shape[:-2], *columns.shape), -1)
        first = own if valid is None else own.masked_fill(~valid, int(own.max()))
        first = first.amin(-1, keepdim=True)
        first = first if first.ndim == 2 else first.amin(0, keepdim=True)
        again = own - first + self._base + len(self._request)
        again = again if valid is None else again.masked_fill(~valid, 0)
        asked = torch.arange(len(self._request), device=own.device).expand(*own.shape[:-1], -1)
        return torch.cat([self._base + asked, again], dim=-1)
