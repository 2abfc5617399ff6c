"""What `generate` gives a model's decoder for a prompt, so that the prompt can be gone on from, and fed, again.

A context around one `generate`. It keeps the state of the full cache at the prompt's end, and knows the positions of
what follows. Tokens behind the prompt go through with some of its pairs hidden. Measures nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..cache.architecture import whole_layer_kinds
from .observe import ObservedCache, evaluating

# Forwards of a few tokens wait for the weights. So copies go through together, up to so many tokens, and pairs.
_TOKENS_TOGETHER, _BYTES_TOGETHER = 320, 2**30

# What a decoder is given in the prompt's forward and shall not be given again.
_OF_ONE_FORWARD = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
                   "cache_position", "return_dict")  # fmt: skip


class Forwards:
    """What `generate` gives the model's decoder, and the full cache as it is after the prompt.

    Used as a context around `generate`; a hook on the decoder sees the prompt's forward and each step.
    """

    def __init__(self, model: Any, cache: ObservedCache):
        self._model, self._decoder, self._cache = model, model.get_decoder(), cache
        # Linear layers go on from their state one token at a time only.
        self._at_once = not {kind for kind in whole_layer_kinds(model.config) if "sliding" not in kind}
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

    def restore(self, copies: int = 1) -> None:
        """Bring the cache back to the end of the prompt, with so many copies of it along the batch."""
        for layer, saved in zip(self._cache.layers, self._saved, strict=True):
            own = vars(layer)
            own.clear()
            own.update(copy.deepcopy(saved) if _is_in_place(layer) else saved)
            if copies > 1:
                own.update({name: _repeated(own[name], copies) for name in ("keys", "values")})

    def together(self, fed: Tensor) -> int:
        """How many copies of the prompt can go on with these tokens, [batch, n], as rows of one batch."""
        if not self._at_once or any(map(_is_in_place, self._cache.layers)):
            return 1
        stored = sum(each[name].nbytes for each in self._saved for name in ("keys", "values"))
        return max(1, min(_TOKENS_TOGETHER // fed.numel(), _BYTES_TOGETHER // stored))

    def log_probs(
        self,
        fed: Tensor,
        mask: Tensor | None,
        *,
        kept: Mapping[int, Tensor] | None = None,
        gates: Mapping[int, Tensor] | None = None,
        copies: int = 1,
    ) -> Tensor:
        """What follows tokens behind the prompt: log-probabilities [copies * batch, n_fed, vocabulary].

        Args:
            fed: int64 [batch, n_fed].
            mask: int64 [batch, n], 0 at the prompt's padding; None: no padding.
            kept, gates: as `ObservedCache` has them, [copies * batch, kv_heads, n] by layer index. Gates make the
                result differentiable.
            copies: of the prompt, along the batch.
        """
        self.restore(copies)
        self._cache.kept, self._cache.gates = kept or {}, gates or {}
        mask, fed = None if mask is None else mask.repeat(copies, 1), fed.repeat(copies, 1)
        width = fed.shape[1] if self._at_once else 1
        found = []
        with evaluating(self._model), torch.set_grad_enabled(gates is not None):
            for start in range(0, fed.shape[1], width):
                more: dict[str, Any] = {}
                if (positions := self.positions(start, width)) is not None:
                    more["position_ids"] = torch.cat([positions] * copies, dim=-2)
                if mask is not None:
                    more["attention_mask"] = torch.nn.functional.pad(mask, (0, start + width), value=1)
                some = fed[:, start : start + width]
                found.append(self._model(input_ids=some, past_key_values=self._cache, use_cache=True, **more).logits)
        self._cache.kept, self._cache.gates = {}, {}
        logits = torch.cat(found, dim=1)
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

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
