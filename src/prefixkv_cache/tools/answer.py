"""One answer with one cache, and what it took: what the commands that let a model speak have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.cache_utils import Cache

from ..cache.cache import PrefixKVCache


@dataclass(frozen=True)
class Answer:
    """What came out, and what it took.

    Attributes:
        text: the answer, without special tokens.
        n_tokens: generated tokens.
        stored: KV pairs a head that each layer held at the answer's end.
        prompt_nbytes: bytes of KV tensors at the prompt's end, before the first new token was fed.
        nbytes: bytes of KV tensors at the answer's end.
        seconds: wall time of prompt and decoding.
        looked: what `look` returned.
    """

    text: str
    n_tokens: int
    stored: list[int]
    prompt_nbytes: int
    nbytes: int
    seconds: float
    looked: Any = None


def answer(
    model: Any,
    processor: Any,
    inputs: Any,
    cache: Cache,
    max_new_tokens: int,
    *,
    look: Callable[[], Any] = lambda: None,
    **options: Any,
) -> Answer:
    """Generate greedily from prepared inputs of one row with this cache.

    Args:
        model: as `loading.load_model` returns it, with its `processor`.
        processor: of the model.
        inputs: as `loading.prepare` returns them.
        cache: an empty cache, filled by the call.
        max_new_tokens: at most so many.
        look: called once, at the prompt's end.
        options: further arguments of `model.generate`.
    """
    at_prompt_end: list[tuple[int, Any]] = []

    def stop_never(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if not at_prompt_end:
            at_prompt_end.append((cache_bytes(cache), look()))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    options |= {"do_sample": False, "max_new_tokens": max_new_tokens}
    started = time.perf_counter()
    with torch.no_grad():
        between: Any = StoppingCriteriaList([stop_never])  # asked after every token
        output = model.generate(**inputs, past_key_values=cache, stopping_criteria=between, **options)
    if output.is_cuda:
        torch.cuda.synchronize(output.device)
    seconds = time.perf_counter() - started
    new = output[0, inputs["input_ids"].shape[1] :]
    text = getattr(processor, "tokenizer", processor).decode(new, skip_special_tokens=True).strip()
    prompt_nbytes, looked = at_prompt_end[0]
    return Answer(text, len(new), stored_lengths(cache), prompt_nbytes, cache_bytes(cache), seconds, looked)


def stored_lengths(cache: Cache) -> list[int]:
    """KV pairs a head in each layer, for our caches and transformers' own."""
    if isinstance(cache, PrefixKVCache):
        return cache.stored_lengths()
    return [keys.shape[-2] for keys, _ in _pairs(cache)]


def cache_bytes(cache: Cache) -> int:
    """Bytes of KV tensors, for our caches and transformers' own."""
    if isinstance(cache, PrefixKVCache):
        return cache.nbytes
    return sum(tensor.numel() * tensor.element_size() for pair in _pairs(cache) for tensor in pair)


def kept_columns(cache: PrefixKVCache, layer: int) -> list[list[int]]:
    """Columns of the first row that each key head of a layer keeps, rising; a single list where all keep the same."""
    positions = cache.kept_positions(layer)[0]
    heads = positions if positions.ndim == 2 else positions[None]
    return [sorted(column for column in of_head if column >= 0) for of_head in heads.tolist()]


def say_memory(result: Answer, full: Answer | None = None) -> str:
    """The bytes of a cache at both ends of its answer, and as shares of the full cache's at the same ends."""
    ends = ((result.prompt_nbytes, full and full.prompt_nbytes), (result.nbytes, full and full.nbytes))
    said = [f"{own / 2**20:.2f} MiB" + (f" ({own / other:.0%} of full)" if other else "") for own, other in ends]
    return f"KV {said[0]} at the prompt's end, {said[1]} at the answer's end"


def _pairs(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return [(keys, values) for keys, values in found if keys is not None and values is not None]
