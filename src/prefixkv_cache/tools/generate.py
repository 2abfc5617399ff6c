"""`prefixkv generate`: one prompt, one answer with a pruned cache, and what it took."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .arguments import add_cache, add_model, add_prompt, budget, cache_options, load, positive, read_prompt, say_budget

if TYPE_CHECKING:
    from .answer import Answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` reads."""
    add_model(parser)
    add_prompt(parser)
    parser.add_argument(
        "--budget", type=budget, default=0.5, metavar="B", help="what is kept: 0.3 of the KV pairs, or 512 a head (0.5)"
    )
    add_cache(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--compare", action="store_true", help="generate with the full cache, too")


def run(arguments: argparse.Namespace) -> None:
    """Answer on standard output, the report on standard error. Bad input fails before the model is loaded."""
    options = cache_options(arguments)
    prompt, pictures = read_prompt(arguments)
    from transformers import DynamicCache

    from ..cache.cache import PrefixKVCache
    from .answer import answer
    from .loading import prepare

    print(f"loading {arguments.model}", file=sys.stderr)
    model, processor = load(arguments)
    inputs = prepare(processor, [(prompt, pictures)], model.device)
    full = None
    if arguments.compare:
        full = answer(model, processor, inputs, DynamicCache(config=model.config), arguments.max_new_tokens)
        _report("full cache", full)
        print(f"full: {full.text}", file=sys.stderr)
    cache = PrefixKVCache.for_model(model, arguments.budget, inputs=inputs, **options)
    pruned = answer(model, processor, inputs, cache, arguments.max_new_tokens)
    source = "profile" if cache.profile else f"lengths: {cache.method.lengths.lengths}"
    _report(f"budget {say_budget(arguments.budget)} ({cache.method.spell()}, {source})", pruned, full)
    print(pruned.text)


def _report(title: str, result: Answer, full: Answer | None = None) -> None:
    from .answer import say_memory

    mean = sum(result.stored) / max(len(result.stored), 1)
    print(
        f"{title}: {result.n_tokens} tokens in {result.seconds:.2f} s, {say_memory(result, full)}, {mean:.0f} pairs a "
        f"head ({min(result.stored)} to {max(result.stored)} by layer)",
        file=sys.stderr,
    )
