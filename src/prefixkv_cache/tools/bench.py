"""`prefixkv bench`: prompt time, time of a token and KV memory, full cache and pruned, on the user's own model.

The caches take turns, so that what else the machine does meets all alike, and every time is given as a ratio, too. What
is timed is `model.generate`, greedy, as an application calls it: with one token for the prompt phase, and with all of
them; the difference is decoding. The scripts in `benchmarks/` time with the same `take_turns`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from .arguments import add_cache, add_model, add_prompt, budgets, cache_options, load, positive, read_prompt

# Of the table: figure, head, unit, digits, ratio.
_COLUMNS = (
    ("prompt_ms", "prompt, ms", 1, 1, "prompt_ratio"),
    ("token_ms", "token, ms", 1, 2, "token_ratio"),
    ("kv_prompt_bytes", "KV prompt, MiB", 2**20, 2, "kv_prompt_ratio"),
    ("kv_bytes", "KV answer, MiB", 2**20, 2, "kv_ratio"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_model(parser)
    add_prompt(parser, required=False)
    add = parser.add_argument
    add("--tokens", type=positive, metavar="N", help="random text of N tokens instead of picture and prompt")
    add(
        "--budgets", type=budgets, default=(0.5, 0.2), metavar="B,...", help="fractions kept, or pairs a head (0.5,0.2)"
    )
    add_cache(parser)
    add("--batch-size", type=positive, default=1, metavar="N", help="equal rows (%(default)s)")
    add("--new-tokens", type=positive, default=64, metavar="N", help="decode steps (%(default)s)")
    add("--turns", type=positive, default=3, metavar="N", help="the medians of N turns count (%(default)s)")
    add("--json", action="store_true", help="print all figures as a last line of JSON, too")


def run(arguments: argparse.Namespace) -> None:
    """The command: a table on standard output, and with `--json` all figures as one line. Bad input fails first."""
    if (arguments.tokens is None) == (arguments.prompt is None):
        raise ValueError("say what the model shall read: --prompt TEXT with --image FILE, or --tokens N of random text")
    if arguments.tokens is not None and arguments.image:
        raise ValueError("--tokens is random text; leave --image out")
    options = cache_options(arguments)
    request = None if arguments.tokens is not None else read_prompt(arguments)
    print(f"loading {arguments.model}", file=sys.stderr)
    model, processor = load(arguments)
    inputs = _inputs(arguments, model, processor, request)
    rows = measure(model, inputs, _caches(model, inputs, arguments.budgets, options), arguments)
    tokens = inputs["input_ids"].shape[1]
    print(f"{arguments.batch_size} x ({tokens} + {arguments.new_tokens}) tokens, {model.dtype}, {model.device}")
    print(f"{'budget':>8}" + "".join(f" {head:>15} {'':>6}" for _, head, *_ in _COLUMNS))
    for row in rows:
        cells = (f" {row[name] / unit:>15.{digits}f} {row[ratio]:>5.2f}x" for name, _, unit, digits, ratio in _COLUMNS)
        print(f"{row['budget']:>8}" + "".join(cells))
    if arguments.json:
        print(json.dumps({"batch": arguments.batch_size, "tokens": tokens, "rows": rows}))


def _caches(model: Any, inputs: Any, asked: Sequence[float], options: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import DynamicCache

    from ..cache.cache import PrefixKVCache

    made: dict[str, Any] = {"full": partial(DynamicCache, config=model.config)}
    for budget in asked:
        made[str(budget)] = partial(PrefixKVCache.for_model, model, budget, inputs=inputs, **options)
    return made


def _inputs(arguments: argparse.Namespace, model: Any, processor: Any, request: Any) -> dict[str, Any]:
    import torch

    from .loading import prepare

    if request is not None:
        return dict(prepare(processor, [request] * arguments.batch_size, model.device))
    # Plain words only: special and image tokens stand at the ends of a vocabulary.
    words = model.config.get_text_config().vocab_size // 2
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(words // 2, words, (arguments.batch_size, arguments.tokens), generator=random).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(
    model: Any, inputs: dict[str, Any], made: Mapping[str, Callable[[], Any]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Figures of each cache, the first of which is what the others are held against.

    Args:
        model: as `loading.load_model` returns it.
        inputs: what `model.generate(**inputs)` takes.
        made: makes a new cache, by name.
        arguments: `new_tokens` behind the first, and `turns`.

    Returns:
        A dict for each cache: `budget` (its name), `prompt_ms`, `token_ms`, `kv_prompt_bytes` and `kv_bytes` (at the
        prompt's end, and at the answer's), and the ratios of these to the first cache's.
    """
    from .answer import cache_bytes

    held: dict[tuple[str, int], int] = {}

    def generate(name: str, n_tokens: int) -> None:
        cache = made[name]()
        options = {"do_sample": False, "max_new_tokens": n_tokens, "min_new_tokens": n_tokens}
        model.generate(**inputs, past_key_values=cache, **options)
        held[name, n_tokens] = cache_bytes(cache)

    whole = 1 + arguments.new_tokens
    calls = {(name, n): partial(generate, name, n) for name in made for n in (1, whole)}
    with _progress(len(calls) * (WARM_UP + arguments.turns)) as say:
        times = take_turns(calls, arguments.turns, before=lambda call: say(f"{call[0]}, {call[1]} tokens"))
    rows: list[dict[str, Any]] = []
    for name in made:
        first, all_of_them = (statistics.median(wall for wall, _ in times[name, n]) for n in (1, whole))
        rest = max(all_of_them - first, 0.0) / arguments.new_tokens
        kv = {"kv_prompt_bytes": held[name, 1], "kv_bytes": held[name, whole]}
        rows.append({"budget": name, "prompt_ms": 1e3 * first, "token_ms": 1e3 * rest, **kv})
    for row in rows:
        for of, *_, ratio in _COLUMNS:
            row[ratio] = row[of] / rows[0][of] if rows[0][of] else float("nan")
    return rows


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that says what is being timed; yields what to call before each call."""
    from tqdm import tqdm

    with tqdm(total=total, unit="call", file=sys.stderr, leave=False) as bar:
        bar.n = -1  # counted when the next one begins

        def say(name: str) -> None:
            bar.set_description_str(f"timing {name}", refresh=False)
            bar.update(1)

        yield say


# Timing.

WARM_UP = 1


def take_turns(
    calls: Mapping[Any, Callable[[], object]],
    turns: int,
    warm_up: int = WARM_UP,
    before: Callable[[Any], object] = lambda name: None,
) -> dict[Any, Any]:
    """(wall, processor) seconds of every call in each of `turns` rounds; every second round goes backwards.

    Args:
        calls: by name.
        turns: rounds that are timed.
        warm_up: rounds before them that are not.
        before: called with the name of each call before it.

    Returns:
        list of (float, float) for each name.
    """
    times: dict[Any, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(warm_up + turns):
        for name in list(calls) if turn % 2 == 0 else reversed(list(calls)):
            before(name)
            synchronize()
            wall, processor = time.perf_counter(), time.process_time()
            calls[name]()
            synchronize()
            if turn >= warm_up:
                times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return times


def synchronize() -> None:
    """Wait for what the accelerator, if there is one, still has to do."""
    import torch

    accelerator = getattr(torch, "accelerator", torch.cuda)  # the former from 2.6 on
    if accelerator.is_available():
        accelerator.synchronize()
