"""The loop that everything is measured in: a prompt at once, pruned once, then a token for each row and step.

The inputs of each step are those that `model.generate` would feed: it is asked for its own preparation of the prompt,
and the model's `prepare_inputs_for_generation` for every step, so that positions are true for every family. What comes
next in a row is for others to say (writers.py); this module knows no answers and no metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..architecture import PRUNABLE, cache_layers
from ..cache import PrefixKVCache
from ..compat import generation_inputs


class TokenLoop:
    """One left-padded batch and one cache on their way through a model.

    Args:
        model: in eval mode, with a language modelling head.
        inputs: as `loading.prepare` returns them.
        cache: empty; filled by the loop.
        shift_positions: feed the tokens after the prompt at positions that are too low by the number of tokens that the
            first prunable layer lost of the row's prompt: the published implementations' mistake, for comparison.

    Attributes:
        real: bool [rows, seen], which of the tokens fed so far are real. Tokens after the prompt all count as real.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], cache: Cache, *, shift_positions: bool = False):
        self.cache = cache
        mask = inputs.get("attention_mask")
        ids = inputs["input_ids"]
        self.real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self._layers = prunable_layers(model.config)
        self._shift_positions = shift_positions
        self._shift: Tensor | None = None
        with torch.inference_mode():
            # The model may hand over to another one, its language model.
            self._model, self._ids, self._kwargs = model.generate(
                **inputs, past_key_values=cache, do_sample=False, max_new_tokens=1, custom_generate=_hand_back
            )

    @torch.inference_mode()
    def read_prompt(self) -> Tensor:
        """Feed the prompt; the cache is pruned when this returns.

        Returns:
            float32 [rows, vocabulary], the logits of the token that follows.
        """
        logits = self._forward(first=True)
        if self._shift_positions:
            self._shift = self.real.sum(1) - self.stored_pairs(self._layers[:1])
        return logits

    @torch.inference_mode()
    def repeat(self, times: int) -> None:
        """Every row becomes `times` rows, side by side, each with a cache of its own."""
        if times == 1:
            return
        rows = len(self.real)
        index = torch.arange(rows, device=self.real.device).repeat_interleave(times)
        self.cache.reorder_cache(index)  # type: ignore[arg-type]  # what every kind of cache layer can do
        self._ids, self.real = self._ids[index], self.real[index]
        self._shift = None if self._shift is None else self._shift[index]
        self._kwargs = {name: _repeat(name, value, rows, index) for name, value in self._kwargs.items()}

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token a row.

        Args:
            tokens: int64 [rows].

        Returns:
            float32 [rows, vocabulary], the logits of the token that follows.
        """
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        self.real = torch.cat([self.real, self.real.new_ones(len(tokens), 1)], dim=1)
        return self._forward(first=False)

    def _forward(self, *, first: bool) -> Tensor:
        inputs = generation_inputs(self._model, self._ids, self._kwargs, first=first)
        if self._shift is not None:
            inputs["position_ids"] = _shifted(inputs.get("position_ids"), self._shift)
        outputs = self._model(**inputs, return_dict=True)
        self._kwargs = self._model._update_model_kwargs_for_generation(outputs, self._kwargs, is_encoder_decoder=False)
        return outputs.logits[:, -1].float()

    def stored_pairs(self, layers: Sequence[int] | None = None) -> Tensor:
        """KV pairs of real tokens that the cache holds for each row, summed over layers.

        Args:
            layers: decoder layers, from 0; None: all that can be pruned.

        Returns:
            int64 [rows]
        """
        total = torch.zeros(len(self.real), dtype=torch.int64, device=self.real.device)
        for layer in self._layers if layers is None else layers:
            positions = _positions(self.cache, layer, self.real).to(self.real.device)
            heads = positions[:, None] if positions.dim() == 2 else positions  # each head may keep pairs of its own
            flat = heads.flatten(1)
            held = (flat >= 0) & self.real.gather(1, flat.clamp_min(0))
            total += held.sum(1) // heads.shape[1]  # as many in each head
        return total

    def kept(self) -> Tensor:
        """Pairs held as a share of those that a full cache would hold in the prunable layers: float64 [rows]."""
        return self.stored_pairs().double() / (len(self._layers) * self.real.sum(1))


def write(
    loop: TokenLoop,
    writers: Sequence[Any],
    *,
    after_prompt: Callable[[], None] | None = None,
    rows_ended: Callable[[Tensor], None] | None = None,
) -> None:
    """Let every writer go on from the same prompt, all in one batch: row i of writer j is row i * n + j of n writers.

    Args:
        loop: fresh.
        writers: see writers.py.
        after_prompt: called when the prompt has been read, before the rows are repeated.
        rows_ended: called with bool [rows], the rows in which the first writer has just said its last token, which is
            not fed any more.
    """
    logits = loop.read_prompt()
    if after_prompt is not None:
        after_prompt()
    loop.repeat(len(writers))
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    of_writers = [logits] * len(writers)
    while True:
        tokens = [writer.next(own) for writer, own in zip(writers, of_writers, strict=True)]
        new = writers[0].ended & ~ended
        if rows_ended is not None and new.any():
            rows_ended(new)
        ended = ended | new
        if all(writer.ended.all() for writer in writers):
            return
        logits = loop.step(torch.stack(tokens, dim=1).flatten())
        of_writers = logits.unflatten(0, (-1, len(writers))).unbind(1)


def prunable_layers(config: Any) -> list[int]:
    """Decoder layers that the caches of this library prune, from 0."""
    return [index for index, (kind, _) in enumerate(cache_layers(config)) if kind == PRUNABLE]


def _hand_back(model: Any, input_ids: Tensor, **kwargs: Any) -> tuple[Any, Tensor, dict[str, Any]]:
    """In the place of a decoding method: what `generate` has prepared."""
    for name in ("logits_processor", "stopping_criteria", "generation_config"):
        kwargs.pop(name, None)
    return model, input_ids, kwargs


def _repeat(name: str, value: Any, rows: int, index: Tensor) -> Any:
    """The same for repeated rows, if it has any: [rows, ...], or [axes, rows, n] for the positions of M-RoPE."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    dim = value.dim() - 2 if name == "position_ids" else 0
    return value.index_select(dim, index.to(value.device)) if value.shape[dim] == rows else value


def _shifted(position_ids: Tensor | None, shift: Tensor) -> Tensor:
    if position_ids is None:
        raise NotImplementedError(
            "this model finds its positions by itself, so they cannot be shifted as in the published code; "
            "leave --as-published out, or use a newer transformers"
        )
    return position_ids - shift[:, None]


def _positions(cache: Cache, layer: int, real: Tensor) -> Tensor:
    """Column of each stored pair, int64 [rows, stored] or [rows, heads, stored]; -1 where a slot holds nothing."""
    if isinstance(cache, PrefixKVCache):
        return cache.kept_positions(layer)
    held = getattr(cache.layers[layer], "keys").shape[-2]  # noqa: B009  # not every kind of layer has keys
    return torch.arange(held, device=real.device).expand(len(real), -1)
