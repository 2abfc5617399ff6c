"""`prefixkv generate`: one prompt, one answer with a pruned cache, and what it took.

The prompt is a picture and text, or a question behind a context that `prefixkv compress` has written to a file.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .arguments import add_cache, add_model, add_prompt, budget, cache_options, load, positive, read_prompt, say_budget

if TYPE_CHECKING:
    from .answer import Answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` reads."""
    add_model(parser)
    add_prompt(parser)
    parser.add_argument(
        "--cache", metavar="FILE", help="a context that `prefixkv compress` has written; then no --image"
    )
    parser.add_argument(
        "--budget", type=budget, metavar="B", help="what is kept: 0.3 of the KV pairs, or 512 a head (default: 0.5)"
    )
    add_cache(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--compare", action="store_true", help="generate with the full cache, too")


def run(arguments: argparse.Namespace) -> None:
    """Answer on standard output, as it is made; the report on standard error. Bad input fails before the model is
    loaded.

    Raises:
        TypeError, ValueError, OSError: bad input, in one line.
    """
    if arguments.cache is not None:
        _check_alone(arguments)
    options = cache_options(arguments)
    prompt, pictures = read_prompt(arguments)
    print(f"loading {arguments.model}", file=sys.stderr)
    model, processor = load(arguments)
    if arguments.cache is not None:
        _answer_from_file(arguments, model, processor)
    else:
        _answer_prompt(arguments, model, processor, (prompt, pictures), options)


def _answer_prompt(arguments: argparse.Namespace, model: Any, processor: Any, request: Any, options: Any) -> None:
    from transformers import DynamicCache

    from ..cache.cache import PrefixKVCache
    from .answer import answer
    from .loading import prepare

    inputs = prepare(processor, [request], model.device)
    full = None
    if arguments.compare:
        full = answer(model, processor, inputs, DynamicCache(config=model.config), arguments.max_new_tokens)
        _report("full cache", full)
        print(f"full: {full.text}", file=sys.stderr)
    share = 0.5 if arguments.budget is None else arguments.budget
    cache = PrefixKVCache.for_model(model, share, inputs=inputs, **options)
    pruned = _say(model, processor, inputs, cache, arguments.max_new_tokens)
    source = "profile" if cache.profile else f"lengths: {cache.method.lengths.lengths}"
    _report(f"budget {say_budget(share)} ({cache.method.spell()}, {source})", pruned, full)


# A question behind a context in a file.


def _check_alone(arguments: argparse.Namespace) -> None:
    """Refuse what says how a prompt is pruned, or what comes before the question: the file has both."""
    names = ("image", "budget", "method", "profile", "compare")
    given = [f"--{name}" for name in names if getattr(arguments, name) not in (None, [], False)]
    if given:
        raise ValueError(
            f"--cache is a context that was pruned when it was written; leave out {', '.join(given)}, or --cache"
        )
    from ..cache.loaded import check_format
    from ..cache.tensor_file import open_tensors

    with open_tensors(arguments.cache) as file:
        check_format(file.metadata)


def _answer_from_file(arguments: argparse.Namespace, model: Any, processor: Any) -> None:
    from ..cache.cache import PrefixKVCache
    from .answer import full_bytes
    from .questions import Questions

    cache = PrefixKVCache.load(arguments.cache, model)
    questions, n = Questions.of_note(processor, cache), int(cache.get_seq_length())
    if cache.context_ids is None or cache.context_ids.shape[1] != n:
        raise ValueError(f"{arguments.cache}: has seen tokens behind its context; expected a context alone")
    inputs = questions.behind(cache.context_ids.to(model.device), arguments.prompt)
    result = _say(model, processor, inputs, cache, arguments.max_new_tokens, look=lambda: full_bytes(cache))
    full = replace(result, prompt_nbytes=result.looked, nbytes=full_bytes(cache))
    _report(f"{arguments.cache} (budget {say_budget(cache.budget)} of {n} tokens)", result, full)


def _say(model: Any, processor: Any, inputs: Any, cache: Any, max_new_tokens: int, **options: Any) -> Answer:
    """Answer on standard output, as it is made, and in one line more or less; the whole answer is returned."""
    from .answer import answer

    said = []

    def say(piece: str) -> None:
        said.append(piece)
        print(piece, end="", flush=True)

    try:
        result = answer(model, processor, inputs, cache, max_new_tokens, say=say, **options)
    except BaseException:
        if said:  # what is said of the error begins a line
            print(flush=True)
        raise
    print(flush=True)
    return result


def _report(title: str, result: Answer, full: Answer | None = None) -> None:
    from .answer import say_lengths, say_memory

    took = f"{result.n_tokens} tokens in {result.seconds:.2f} s"
    print(f"{title}: {took}, {say_memory(result, full)}, {say_lengths(result.stored)}", file=sys.stderr)
