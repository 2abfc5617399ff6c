"""One prompt, one answer, with a pruned cache and a measured report: what `prefixkv generate` and the demo share."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .cache import PAPER, PrefixKVCache
from .loading import open_image, prepare
from .profile import check_budget


@dataclass(frozen=True)
class Answer:
    """What came out, and what it took.

    Attributes:
        text: the answer, without special tokens.
        n_tokens: generated tokens.
        stored: KV pairs that each layer held at the end.
        nbytes: bytes of KV tensors allocated at the end.
        seconds: wall time of prompt and decoding.
    """

    text: str
    n_tokens: int
    stored: list[int]
    nbytes: int
    seconds: float


def answer(model: Any, processor: Any, inputs: Any, cache: Cache, max_new_tokens: int, **options: Any) -> Answer:
    """Generate greedily from prepared inputs of one row with this cache.

    Args:
        model: as `loading.load_model` returns it, with its `processor`.
        processor: of the model.
        inputs: as `loading.prepare` returns them.
        cache: an empty cache, filled by the call.
        max_new_tokens: at most so many.
        options: further arguments of `model.generate`.
    """
    started = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            **inputs, past_key_values=cache, do_sample=False, max_new_tokens=max_new_tokens, **options
        )
    if output.is_cuda:
        torch.cuda.synchronize(output.device)
    seconds = time.perf_counter() - started
    new = output[0, inputs["input_ids"].shape[1] :]
    text = getattr(processor, "tokenizer", processor).decode(new, skip_special_tokens=True).strip()
    return Answer(text, len(new), stored_lengths(cache), cache_bytes(cache), seconds)


def stored_lengths(cache: Cache) -> list[int]:
    """KV pairs in each layer, for our caches and transformers' own."""
    if isinstance(cache, PrefixKVCache):
        return cache.stored_lengths()
    return [keys.shape[-2] for keys, _ in _pairs(cache)]


def cache_bytes(cache: Cache) -> int:
    """Bytes of KV tensors, for our caches and transformers' own."""
    if isinstance(cache, PrefixKVCache):
        return cache.nbytes
    return sum(tensor.numel() * tensor.element_size() for pair in _pairs(cache) for tensor in pair)


def _pairs(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return [(keys, values) for keys, values in found if keys is not None and values is not None]


def cache_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `PrefixKVCache.for_model` from `--profile`, `--queries` and `--paper`.

    Raises:
        TypeError, ValueError, OSError: no cache can be made of them; found without the model.
    """
    options = dict(PAPER) if arguments.paper else {}
    given = {"profile": arguments.profile, "queries": arguments.queries}
    options.update({name: value for name, value in given.items() if value is not None})
    PrefixKVCache(**options)
    return options


def run_generate(arguments: argparse.Namespace, load: Callable[[], tuple[Any, Any]]) -> None:
    """The command: answer on standard output, the report on standard error. Bad input fails before the model loads."""
    check_budget(arguments.budget)
    options = cache_options(arguments)
    if not arguments.prompt.strip():
        raise ValueError("--prompt is empty; say what the model shall answer")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1; got {arguments.max_new_tokens}")
    pictures = [open_image(path) for path in arguments.image]
    print(f"loading {arguments.model}", file=sys.stderr)
    model, processor = load()
    inputs = prepare(processor, [(arguments.prompt, pictures)], model.device)
    if arguments.compare:
        full = answer(model, processor, inputs, DynamicCache(config=model.config), arguments.max_new_tokens)
        _report("full cache", full)
        print(f"full: {full.text}", file=sys.stderr)
    cache = PrefixKVCache.for_model(model, arguments.budget, **options)
    pruned = answer(model, processor, inputs, cache, arguments.max_new_tokens)
    _report(f"budget {arguments.budget:g} ({'profile' if cache.profile else 'search on the prompt'})", pruned)
    print(pruned.text)


def _report(title: str, result: Answer) -> None:
    mean = sum(result.stored) / max(len(result.stored), 1)
    print(
        f"{title}: {result.n_tokens} tokens in {result.seconds:.2f} s, KV {result.nbytes / 2**20:.2f} MiB, "
        f"{mean:.0f} pairs a layer ({min(result.stored)} to {max(result.stored)})",
        file=sys.stderr,
    )
