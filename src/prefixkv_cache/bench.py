"""`prefixkv bench`: prompt time, time of a token and KV memory, full cache and pruned, on the user's own model.

The caches take turns, so that what else the machine does meets all alike, and every time is told as a ratio, too. What
is timed is `model.generate`, greedy, as an application calls it: with one token for the prompt phase, and with all of
them; the difference is decoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .cache import PrefixKVCache
from .generate import cache_bytes, cache_options
from .loading import open_image, prepare
from .profile import check_budget


def run_bench(arguments: argparse.Namespace, load: Callable[[], tuple[Any, Any]]) -> None:
    """The command: a table on standard output, and with `--json` all figures as one line. Bad input fails first."""
    budgets = [check_budget(budget) for budget in arguments.budgets]
    for name in ("tokens", "new_tokens", "batch_size", "turns"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {number}")
    if arguments.tokens is None and not arguments.prompt:
        raise ValueError("say what the model shall read: --image FILE --prompt TEXT, or --tokens N of random text")
    if arguments.tokens is not None and (arguments.image or arguments.prompt):
        raise ValueError("--tokens is random text; leave --image and --prompt out")
    options = cache_options(arguments)
    pictures = [open_image(path) for path in arguments.image]
    print(f"loading {arguments.model}", file=sys.stderr)
    model, processor = load()
    inputs = _inputs(arguments, model, processor, pictures)
    made: dict[str, Callable[[], Cache]] = {"full": lambda: DynamicCache(config=model.config)}
    for budget in budgets:
        made[f"{budget:g}"] = lambda budget=budget: PrefixKVCache.for_model(model, budget, **options)
    rows = measure(model, inputs, made, arguments.new_tokens, arguments.turns)
    tokens = inputs["input_ids"].shape[1]
    print(f"{arguments.batch_size} x ({tokens} + {arguments.new_tokens}) tokens, {model.dtype}, {model.device}")
    print(f"{'budget':>8} {'prompt, ms':>12} {'':>6} {'token, ms':>10} {'':>6} {'KV, MiB':>10} {'':>6}")
    for row in rows:
        print(
            f"{row['budget']:>8} {row['prompt_ms']:>12.1f} {row['prompt_ratio']:>5.2f}x {row['token_ms']:>10.2f} "
            f"{row['token_ratio']:>5.2f}x {row['kv_bytes'] / 2**20:>10.2f} {row['kv_ratio']:>5.2f}x"
        )
    if arguments.json:
        print(json.dumps({"batch": arguments.batch_size, "tokens": tokens, "rows": rows}))


def _inputs(arguments: argparse.Namespace, model: Any, processor: Any, pictures: list[Any]) -> dict[str, Any]:
    if arguments.tokens is None:
        return dict(prepare(processor, [(arguments.prompt, pictures)] * arguments.batch_size, model.device))
    # Plain words only: special and image tokens stand at the ends of a vocabulary.
    words = model.config.get_text_config().vocab_size // 2
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(words // 2, words, (arguments.batch_size, arguments.tokens), generator=random).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(
    model: Any, inputs: dict[str, Any], made: dict[str, Callable[[], Cache]], new_tokens: int, turns: int
) -> list[dict[str, Any]]:
    """Figures of each cache, the first of which is what the others are held against.

    Args:
        model: as `loading.load_model` returns it.
        inputs: what `model.generate(**inputs)` takes.
        made: makes a new cache, by name.
        new_tokens: tokens to generate behind the first.
        turns: how often; the medians count. One more turn comes first, to warm up.

    Returns:
        A dict for each cache: `budget` (its name), `prompt_ms`, `token_ms`, `kv_bytes` (at the end), and the ratios of
        these to the first cache's.
    """
    prompt: dict[str, list[float]] = {name: [] for name in made}
    whole: dict[str, list[float]] = {name: [] for name in made}
    held: dict[str, int] = {}
    for turn in range(turns + 1):
        for name, new in made.items():
            first, _ = _generate(model, inputs, new(), 1)
            all_of_them, cache = _generate(model, inputs, new(), 1 + new_tokens)
            held[name] = cache_bytes(cache)
            del cache
            if turn:
                prompt[name].append(first)
                whole[name].append(all_of_them)
    rows: list[dict[str, Any]] = []
    for name in made:
        first = statistics.median(prompt[name])
        rest = max(statistics.median(whole[name]) - first, 0.0) / new_tokens
        rows.append({"budget": name, "prompt_ms": 1e3 * first, "token_ms": 1e3 * rest, "kv_bytes": held[name]})
    for row in rows:
        for of, ratio in (("prompt_ms", "prompt_ratio"), ("token_ms", "token_ratio"), ("kv_bytes", "kv_ratio")):
            row[ratio] = row[of] / rows[0][of] if rows[0][of] else float("nan")
    return rows


def _generate(model: Any, inputs: dict[str, Any], cache: Cache, n_tokens: int) -> tuple[float, Cache]:
    """Seconds for so many tokens, and the cache they left."""
    _synchronize(model.device)
    started = time.perf_counter()
    with torch.no_grad():
        model.generate(
            **inputs, past_key_values=cache, do_sample=False, max_new_tokens=n_tokens, min_new_tokens=n_tokens
        )
    _synchronize(model.device)
    return time.perf_counter() - started, cache


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
