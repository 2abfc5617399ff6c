"""One answer with one cache, and what it took: what the commands that let a model speak have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from ..cache.cache import PrefixKVCache
from ..cache.hints import full_bytes_of


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
    say: Callable[[str], Any] | None = None,
    **options: Any,
) -> Answer:
    """Generate greedily from prepared inputs of one row with this cache.

    Args:
        model: as `loading.load_model` returns it, with its `processor`.
        processor: of the model.
        inputs: as `loading.prepare` returns them.
        cache: filled by the call; empty, or of a context with which the inputs begin.
        max_new_tokens: at most so many.
        look: called once, at the prompt's end.
        say: called with each piece of the text as soon as it is known; together they are the answer's text.
        options: further arguments of `model.generate`.
    """
    at_prompt_end: list[tuple[int, Any]] = []

    def stop_never(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if not at_prompt_end:
            at_prompt_end.append((cache_bytes(cache), look()))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    tokenizer = getattr(processor, "tokenizer", processor)
    options |= {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
    options |= {} if say is None else {"streamer": Pieces(tokenizer, say)}
    started = time.perf_counter()
    with torch.no_grad():
        between: Any = StoppingCriteriaList([stop_never])  # asked after every token
        output = model.generate(**inputs, past_key_values=cache, stopping_criteria=between, **options)
    if output.is_cuda:
        torch.cuda.synchronize(output.device)
    seconds = time.perf_counter() - started
    new = output[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    prompt_nbytes, looked = at_prompt_end[0]
    return Answer(text, len(new), stored_lengths(cache), prompt_nbytes, cache_bytes(cache), seconds, looked)


class Pieces(BaseStreamer):
    """Text as it is generated, piece by piece: what `generate` takes as `streamer`.

    A token's text depends on its neighbours, so the tokens since the last piece but one are decoded each time. Unlike
    transformers' `TextStreamer`, the pieces add up to what decoding all tokens at once gives, blanks at both ends left
    out.

    Args:
        tokenizer: of the model.
        say: called with each piece.
    """

    def __init__(self, tokenizer: Any, say: Callable[[str], Any]):
        self._tokenizer, self._say = tokenizer, say
        self._ids: list[int] | None = None  # None: the prompt comes first
        self._start = self._told = 0  # tokens before those that are decoded; tokens that are told
        self._blanks, self._begun = "", False

    def put(self, value: torch.Tensor) -> None:
        """The prompt's tokens, then each new one."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        known, text = self._decode(self._start, self._told), self._decode(self._start, None)
        if len(text) > len(known) and not text.endswith("\ufffd"):  # part of a character
            self._tell(text[len(known) :])
            self._start, self._told = self._told, len(self._ids)

    def end(self) -> None:
        """What was held back."""
        known = self._decode(self._start, self._told)
        self._tell(self._decode(self._start, None)[len(known) :])

    def _decode(self, start: int, stop: int | None) -> str:
        return self._tokenizer.decode((self._ids or [])[start:stop], skip_special_tokens=True)

    def _tell(self, piece: str) -> None:
        """Blanks wait for what follows them."""
        piece = self._blanks + (piece if self._begun else piece.lstrip())
        text = piece.rstrip()
        self._blanks = piece[len(text) :]
        if text:
            self._begun = True
            self._say(text)


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


def full_bytes(cache: PrefixKVCache) -> int:
    """Bytes that a cache would take if all that it has seen were there."""
    return sum(map(full_bytes_of, cache.layers))


def kept_columns(cache: PrefixKVCache, layer: int) -> list[list[int]]:
    """Columns of the first row that each key head of a layer keeps, rising; a single list where all keep the same."""
    positions = cache.kept_positions(layer)[0]
    heads = positions if positions.ndim == 2 else positions[None]
    return [sorted(column for column in of_head if column >= 0) for of_head in heads.tolist()]


def say_memory(result: Answer, full: Answer | None = None) -> str:
    """The bytes of a cache at both ends of its answer, and as shares of the full cache's at the same ends."""
    ends = ((result.prompt_nbytes, full and full.prompt_nbytes), (result.nbytes, full and full.nbytes))
    said = [say_bytes(*end) for end in ends]
    return f"KV {said[0]} at the prompt's end, {said[1]} at the answer's end"


def say_bytes(own: int, full: int | None = None) -> str:
    """`1.25 MiB (20% of full)`; without the share where the full cache's bytes are not known."""
    return f"{own / 2**20:.2f} MiB" + (f" ({own / full:.0%} of full)" if full else "")


def say_lengths(stored: list[int]) -> str:
    """The pairs a head that layers hold."""
    mean = sum(stored) / max(len(stored), 1)
    return f"{mean:.0f} pairs a head ({min(stored)} to {max(stored)} by layer)"


def _pairs(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return [(keys, values) for keys, values in found if keys is not None and values is not None]
