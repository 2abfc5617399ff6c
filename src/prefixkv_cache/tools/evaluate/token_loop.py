"""The loop that everything is measured in: a prompt at once, pruned once, then a token for each row and step.

The inputs of each step are those that `model.generate` would feed: it is asked for its own preparation of the prompt,
and the model's `prepare_inputs_for_generation` for every step, so that positions are true for every family. Which token
comes next in a row is decided in token_sources.py; this module knows no answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...cache.architecture import PRUNABLE, cache_layers
from ...cache.cache import PrefixKVCache
from ...cache.compat import generation_inputs
from ..answer import cache_bytes


class TokenLoop:
    """One left-padded batch and one cache on their way through a model.

    Args:
        model: in eval mode, with a language modelling head.
        inputs: as `loading.prepare` returns them.
        cache: empty; filled by the loop.

    Attributes:
        valid: bool [rows, seen], which of the tokens fed so far are not padding. Tokens after the prompt all are valid.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], cache: Cache):
        self.cache = cache
        mask = inputs.get("attention_mask")
        ids = inputs["input_ids"]
        self.valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self._layers = [index for index, (kind, _) in enumerate(cache_layers(model.config)) if kind == PRUNABLE]
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
        return self._forward(first=True)

    @torch.inference_mode()
    def repeat(self, times: int) -> None:
        """Every row becomes `times` rows, side by side, each with a cache of its own."""
        if times == 1:
            return
        rows = len(self.valid)
        index = torch.arange(rows, device=self.valid.device).repeat_interleave(times)
        self.cache.reorder_cache(index)  # type: ignore[arg-type]  # what every kind of cache layer can do
        self._ids, self.valid = self._ids[index], self.valid[index]
        self._kwargs = {name: _repeat(name, value, rows, index) for name, value in self._kwargs.items()}

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token a row, int64 [rows]; returns float32 [rows, vocabulary], the logits of what follows."""
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        self.valid = torch.cat([self.valid, self.valid.new_ones(len(tokens), 1)], dim=1)
        return self._forward(first=False)

    def _forward(self, *, first: bool) -> Tensor:
        inputs = generation_inputs(self._model, self._ids, self._kwargs, first=first)
        outputs = self._model(**inputs, return_dict=True)
        self._kwargs = self._model._update_model_kwargs_for_generation(outputs, self._kwargs, is_encoder_decoder=False)
        return outputs.logits[:, -1].float()

    def stored_pairs(self) -> Tensor:
        """KV pairs of valid tokens, mean over prunable layers and their key heads: float64 [rows]."""
        total = torch.zeros(len(self.valid), dtype=torch.float64, device=self.valid.device)
        for layer in self._layers:
            positions = _positions(self.cache, layer, self.valid).to(self.valid.device)
            heads = positions[:, None] if positions.dim() == 2 else positions  # each head may keep pairs of its own
            flat = heads.flatten(1)
            held = (flat >= 0) & self.valid.gather(1, flat.clamp_min(0))
            total += held.sum(1) / heads.shape[1]
        return total / len(self._layers)


@dataclass
class Held:
    """What a cache held.

    Attributes:
        nbytes: of keys and values after the prompt, all rows.
        pairs: float64 [rows], `TokenLoop.stored_pairs` after the prompt.
        pairs_end: the same when the row's answer ended.
        seen_end: int64 [rows], valid tokens fed by then.
        nbytes_end: int64 [rows], a row's share of the bytes by then.
    """

    nbytes: int
    pairs: Tensor
    pairs_end: Tensor
    seen_end: Tensor
    nbytes_end: Tensor


def write(loop: TokenLoop, sources: Sequence[Any], progress: Callable[[int], None] = lambda ended: None) -> Held:
    """Let every token source go on from the same prompt, all in one batch: row i of source j is row i * n + j.

    Args:
        loop: fresh.
        sources: see token_sources.py; the end of an answer is that of the first one.
        progress: called after each step with the number of rows in which all sources have ended.
    """
    logits = loop.read_prompt()
    n, nbytes = len(sources), cache_bytes(loop.cache)
    pairs, seen = loop.stored_pairs(), loop.valid.sum(1)
    held = Held(nbytes, pairs, pairs.clone(), seen, torch.full_like(seen, nbytes // len(seen)))
    loop.repeat(n)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    of_sources = [logits] * n
    while True:
        tokens = [source.next(own) for source, own in zip(sources, of_sources, strict=True)]
        new = sources[0].ended & ~ended
        if new.any():
            held.pairs_end[new] = loop.stored_pairs()[::n][new]
            held.seen_end[new] = loop.valid.sum(1)[::n][new]
            held.nbytes_end[new] = cache_bytes(loop.cache) // len(loop.valid)
        ended = ended | new
        ended_in_all = torch.stack([source.ended for source in sources]).all(0)
        progress(int(ended_in_all.sum()))
        if ended_in_all.all():
            return held
        logits = loop.step(torch.stack(tokens, dim=1).flatten())
        of_sources = logits.unflatten(0, (-1, n)).unbind(1)


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


def _positions(cache: Cache, layer: int, valid: Tensor) -> Tensor:
    """Column of each stored pair, int64 [rows, stored] or [rows, heads, stored]; -1 where a slot holds nothing."""
    if isinstance(cache, PrefixKVCache):
        return cache.kept_positions(layer)
    held = getattr(cache.layers[layer], "keys").shape[-2]  # noqa: B009  # not every kind of layer has keys
    return torch.arange(held, device=valid.device).expand(len(valid), -1)
