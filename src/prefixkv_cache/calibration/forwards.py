"""What `generate` gives a model's decoder for a prompt, so that the prompt can be gone on from, and fed, again.

A context around one `generate`. It keeps the state of the full cache at the prompt's end, and knows the positions of
what follows. Measures nothing.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .observe import ObservedCache

# What a decoder is given in the prompt's forward and shall not be given again.
_OF_ONE_FORWARD = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
                   "cache_position", "return_dict")  # fmt: skip


class Forwards:
    """What `generate` gives the model's decoder, and the full cache as it is after the prompt.

    Used as a context around `generate`; a hook on the decoder sees the prompt's forward and each step.
    """

    def __init__(self, model: Any, cache: ObservedCache):
        self._decoder, self._cache = model.get_decoder(), cache
        self._prompt: dict[str, Any] = {}
        self._first_step: Tensor | None = None
        self._saved: list[dict[str, Any]] = []

    def __enter__(self) -> Forwards:
        self._handle = self._decoder.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def _note(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        if not self._prompt:
            self._prompt = {**kwargs, **({"input_ids": args[0]} if args else {})}
            return
        if not self._saved:
            self._saved = [_state(layer) for layer in self._cache.layers]
            self._first_step = positions

    def positions(self, start: int, width: int) -> Tensor | None:
        """Of so many tokens behind the prompt, the first of them at `start`: int64 [..., batch, width].

        They follow that of the first step, by one each, on all axes of M-RoPE. None: the decoder finds them.
        """
        if self._first_step is None:
            return None
        return self._first_step + torch.arange(start, start + width, device=self._first_step.device)

    @property
    def can_copy(self) -> bool:
        """Whether all that the cache holds of the prompt are pairs, which can be copied along the batch."""
        return not any(map(_is_in_place, self._cache.layers))

    def restore(self, cache: ObservedCache, copies: int = 1) -> None:
        """Bring the cache back to the end of the prompt, with so many copies of it along the batch."""
        for layer, saved in zip(cache.layers, self._saved, strict=True):
            own = vars(layer)
            own.clear()
            own.update(copy.deepcopy(saved) if _is_in_place(layer) else saved)
            if copies > 1:
                layer.keys, layer.values = (_repeated(each, copies) for each in (layer.keys, layer.values))

    def repeat_prompt(self, mask: Tensor | None, order: Tensor | None) -> None:
        """Feed the decoder the prompt once more, behind itself.

        Args:
            mask: int64 [batch, n], 0 at padding; None: no padding.
            order: int64 [batch, n], in which order each row's tokens are fed; None: as they were.
        """
        again = dict(self._prompt)
        if again.get("position_ids") is not None:
            again["position_ids"] = positions_behind(again["position_ids"])
        if order is not None:
            again = {name: _in_order(value, order, name) for name, value in again.items()}
        more = {name: value for name, value in again.items() if name not in _OF_ONE_FORWARD}
        if mask is not None:
            more["attention_mask"] = torch.cat([mask, mask if order is None else mask.gather(1, order)], dim=1)
        for name in ("inputs_embeds", "input_ids", "position_ids"):
            if again.get(name) is not None and not (name == "input_ids" and "inputs_embeds" in more):
                more[name] = again[name]
        self._decoder(past_key_values=self._cache, use_cache=True, **more)


def _in_order(value: Any, order: Tensor, name: str) -> Any:
    """A tensor of tokens, [batch, n, ...] or positions [..., batch, n], with each row's tokens in this order."""
    if not isinstance(value, Tensor):
        return value
    if name == "position_ids":
        return value.expand(*value.shape[:-2], *order.shape).gather(-1, order.expand(*value.shape[:-2], -1, -1))
    if value.shape[:2] != order.shape:
        return value
    return value.take_along_dim(order.view(*order.shape, *[1] * (value.ndim - 2)), 1)


def _is_in_place(layer: Any) -> bool:
    """Whether the layer's tensors change in place, as the states of linear attention do."""
    return not hasattr(layer, "keys") or hasattr(layer, "conv_states")


def _repeated(pairs: Tensor, copies: int) -> Tensor:
    # A view where it can be: the update that follows copies anyway.
    return pairs.expand(copies, -1, -1, -1) if len(pairs) == 1 else pairs.repeat(copies, 1, 1, 1)


def _state(layer: Any) -> dict[str, Any]:
    return copy.deepcopy(vars(layer)) if _is_in_place(layer) else dict(vars(layer))


def positions_behind(positions: Tensor) -> Tensor:
    """The same positions, moved so that they follow the last one: [batch or 1, n], or [3 or 4, batch, n] of M-RoPE.

    The three axes of M-RoPE move together; a fourth, which stands first, is that of the text and moves by itself.
    """
    if positions.ndim == 2:
        return positions + positions.amax(1, keepdim=True) + 1
    text, axes = positions[:-3], positions[-3:]
    moved = axes + axes.amax((0, 2), keepdim=True) + 1
    return torch.cat([text + text.amax(2, keepdim=True) + 1, moved]) if len(text) else moved
