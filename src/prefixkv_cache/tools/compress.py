"""`prefixkv compress`: a context is read twice, pruned, and written to a file, before anybody asks.

`prefixkv generate --cache FILE --prompt ...` answers questions about it. What a question is put behind is in
questions.py, and the compression itself in cache/compress.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arguments import add_cache, add_model, budget, load, out_path, positive, say_budget

RECONSTRUCT = "reconstruct"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` reads."""
    add_model(parser)
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt-prefix", default="", metavar="TEXT", help="what stands before every question")
    text.add_argument("--prompt-prefix-file", metavar="FILE", help="the same from a text file: a document")
    add(
        "--budget", type=budget, default=0.2, metavar="B", help="what is kept: 0.2 of the KV pairs, or 512 a head (0.2)"
    )
    add_cache(parser)
    add("--chunk", type=positive, default=2048, metavar="N", help="tokens that are read at once (%(default)s)")
    add("--out", required=True, metavar="FILE", help="cache to write, a name in .safetensors")


def run(arguments: argparse.Namespace) -> None:
    """The report on standard error, the file's name on standard output. Bad input fails before the model is loaded.

    Raises:
        TypeError, ValueError, OSError: bad input, in one line.
    """
    from ..cache.cache import PrefixKVCache
    from .loading import open_image

    out = out_path(arguments.out, "a saved cache", ".safetensors")
    prefix = _read_prefix(arguments)
    pictures = [open_image(path) for path in arguments.image]
    method = RECONSTRUCT if arguments.method is None else arguments.method
    PrefixKVCache(arguments.profile, method=None if method == RECONSTRUCT else method)  # refused here, or not at all
    print(f"loading {arguments.model}", file=sys.stderr)
    model, processor = load(arguments)
    from .questions import context_inputs

    inputs, questions = context_inputs(processor, prefix, pictures, model.device)
    started = time.perf_counter()
    cache = PrefixKVCache.compress(
        model, inputs, arguments.budget, method=method, profile=arguments.profile, chunk=arguments.chunk,
        progress=_progress(arguments.chunk),
    )  # fmt: skip
    questions.note(cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    cache.save(out)
    _report(cache, say_budget(arguments.budget), time.perf_counter() - started)
    print(out)


def _read_prefix(arguments: argparse.Namespace) -> str:
    """The text before the question.

    Raises:
        ValueError, OSError: there is no context at all, or a file that is no text.
    """
    path = arguments.prompt_prefix_file
    if path is None:
        if not arguments.prompt_prefix.strip() and not arguments.image:
            raise ValueError("there is no context; give --image, --prompt-prefix or --prompt-prefix-file")
        return arguments.prompt_prefix
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-prefix-file is {path!r}, which is no text in UTF-8: {error.reason}") from None
    except OSError as error:
        raise OSError(f"--prompt-prefix-file is {path!r}, which cannot be read: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"--prompt-prefix-file is {path!r}, which is empty")
    return text


def _progress(chunk: int) -> Callable[[int, int], None]:
    """Says how far the second reading is, where a context takes more than one chunk."""
    started = time.perf_counter()

    def say(done: int, total: int) -> None:
        if total > chunk:
            seconds = time.perf_counter() - started
            print(f"read again: {done} of {total} tokens, {seconds:.0f} s", file=sys.stderr, flush=True)

    return say


def _report(cache: Any, share: str, seconds: float) -> None:
    from .answer import cache_bytes, full_bytes, say_bytes, say_lengths, stored_lengths

    memory = say_bytes(cache_bytes(cache), full_bytes(cache))
    print(
        f"budget {share} of {cache.get_seq_length()} tokens: {seconds:.2f} s, KV {memory}, "
        f"{say_lengths(stored_lengths(cache))}",
        file=sys.stderr,
    )
