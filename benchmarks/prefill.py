"""What the prompt phase costs, importance and pruning included, over the same prompt with `DynamicCache`.

    python benchmarks/prefill.py [--geometry llava-1.5-7b --layers 1 --dtype bfloat16] [--lengths 1024,4096,8192]
        [--batch 1,4] [--variants window,default]

The model is one layer of LLaVA-1.5-7B's full width: each layer of the whole model repeats the same work, so the ratio
is that of the whole, apart from the vision tower and the head, which would make it smaller. `--geometry quarter` is a
quarter as wide and has at n tokens the share of attention that LLaVA-1.5-7B has at 4 n. The variants: importance alone,
of a window of 32 queries and of all (the paper's rule), with a profile; that window with the search on the prompt
itself; that window with one more candidate of the ranking each; and the default, which has two of them (diversity and
novelty). sdpa attention. A batch of more than one row is padded at the left: the last row has half the tokens. Each
variant is held against masking before anything is timed.

On a CPU each row also tells what the library's own code took of the very calls that were timed (importance, ranking,
pruning) over the rest of them, by processor time: two calls never meet the same disturbance, the parts of one do, so
this is the figure to go by on a busy machine.

Goals: the default 1.05, the window 1.02 at 4096 and 32768 tokens, all queries 1.05 at 4096 and 1.20 at 32768.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from decode import checked_model, must_agree
from geometry import GEOMETRIES, keep_profile, prompt
from measure import numbers, parser, peak_bytes, ratio, show, store, take_turns
from transformers import DynamicCache

from prefixkv_cache import PrefixKVCache

DEFAULT_GOAL, WINDOW_GOAL, ALL_GOAL, ALL_GOAL_LONG = 1.05, 1.02, 1.05, 1.20
LONG = 16384  # of LLaVA-1.5-7B's width: here attention's share lies half-way between those at 4k and 32k

CANDIDATES: dict[str, dict[str, Any]] = {
    "diversity": {"diversity": 0.5},
    "novelty": {"novelty": 8.0},
    "visible": {"average": "visible"},
    "max": {"heads": "max"},
    "each": {"heads": "each"},
    "pooling": {"pooling": 7},
    "value_norm": {"value_norm": True},
}
VARIANTS = ("default", "window", "search", "all", *CANDIDATES)


def goal(variant: str, tokens: int, width: int) -> float | None:
    if variant == "default":
        return DEFAULT_GOAL
    if variant == "window":
        return WINDOW_GOAL
    if variant == "all":
        return ALL_GOAL if tokens * 4096 // width < LONG else ALL_GOAL_LONG
    return None


def variants(model: Any, name: str, budget: float) -> dict[str, Callable[[], Any]]:
    """A new cache of each kind, by name."""
    profile = keep_profile(name, model.config.num_hidden_layers, budget)
    config = model.config
    made: dict[str, Callable[[], Any]] = {
        "full": lambda: DynamicCache(config=config),
        "default": lambda: PrefixKVCache(profile, budget, config=config),
        "window": lambda: PrefixKVCache.paper(profile, budget, config=config, queries=32),
        "search": lambda: PrefixKVCache.paper(None, budget, config=config, queries=32),
        "all": lambda: PrefixKVCache.paper(profile, budget, config=config),
    }
    for candidate, options in CANDIDATES.items():
        made[candidate] = lambda options=options: PrefixKVCache.paper(
            profile, budget, config=config, queries=32, **options
        )
    return made


def padded_left(tokens: int, batch: int) -> torch.Tensor | None:
    """attention_mask [batch, tokens] of rows from the full length down to half of it; None for one row."""
    if batch == 1:
        return None
    padding = torch.arange(batch) * (tokens // 2) // (batch - 1)
    return (torch.arange(tokens) >= padding[:, None]).long()


@torch.no_grad()
def fed(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> None:
    model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)


def clocked(cache: Any, spent: list[float]) -> Any:
    """The cache; the processor time that its own work in this prompt takes is added to what is spent."""
    if isinstance(cache, PrefixKVCache):
        own = cache.after_attention

        def after_attention(*args: Any) -> None:
            began = time.process_time()
            own(*args)
            spent[-1] += time.process_time() - began

        cache.after_attention = after_attention
    return cache


def inside(spent: list[float], times: list[tuple[float, float]]) -> float:
    """Median of a whole call over what is left of it without our own work."""
    return statistics.median(whole / (whole - own) for own, (_, whole) in zip(spent, times, strict=True))


def measure(model: Any, arguments: Any, tokens: int, batch: int = 1) -> list[dict[str, Any]]:
    ids, mask = prompt(model, tokens, batch), padded_left(tokens, batch)
    mask = None if mask is None else mask.to(ids.device)
    made = variants(model, arguments.geometry, arguments.budget)
    made = {name: new for name, new in made.items() if name in ("full", *arguments.variants)}
    spent: dict[str, list[float]] = {name: [] for name in made}

    def call(name: str) -> None:
        spent[name].append(0.0)
        cache = made[name]()
        fed(model, ids, mask, clocked(cache, spent[name]) if model.device.type == "cpu" else cache)
        cache.__dict__.pop("after_attention", None)  # it holds the cache, which would live on till the next collection

    calls = {name: lambda name=name: call(name) for name in made}
    turns = max(3, arguments.turns * min(1, 4096 / tokens) // 1) if arguments.turns > 3 else arguments.turns
    times = take_turns(calls, int(turns))
    own = {name: list(of_calls[-int(turns) :]) for name, of_calls in spent.items()}  # those that were timed
    memory = {name: peak_bytes(call, model.device) for name, call in calls.items()} if arguments.memory else {}
    rows = []
    for name in list(made)[1:]:
        row = {"tokens": tokens, "batch": batch, "budget": arguments.budget}
        row |= {"goal": goal(name, tokens, model.config.hidden_size)} | ratio(times, name, "full")
        if model.device.type == "cpu":
            row["inside_ratio"] = round(inside(own[name], times[name]), 4)
        row["attention_share"] = round(GEOMETRIES[arguments.geometry].attention_share(tokens), 3)
        if memory:
            row |= {"peak_mib": round(memory[name] / 2**20, 1), "base_peak_mib": round(memory["full"] / 2**20, 1)}
        rows.append(row)
        title = f"{tokens:>6} tokens{'' if batch == 1 else f', {batch} rows'}"
        title += f", {row['inside_ratio']:.3f} by our own part" if "inside_ratio" in row else ""
        show(f"{title}, attention {row['attention_share']:.0%} of the arithmetic", row, row["goal"])
    return rows


def main() -> None:
    made = parser(__doc__, geometry="llava-1.5-7b", dtype="bfloat16", layers=1)
    made.add_argument("--lengths", type=numbers, default=[1024, 4096])
    made.add_argument("--batch", type=numbers, default=[1], help="numbers of rows")
    made.add_argument("--variants", type=lambda text: text.split(","), default=VARIANTS, help="beside the full cache")
    made.add_argument("--budget", type=float, default=0.5)
    made.add_argument("--turns", type=int, default=9, help="at 4096 tokens; fewer, at least 3, for longer prompts")
    made.add_argument("--memory", action="store_true", help="measure the peak of all tensors, too (a call more each)")
    arguments = made.parse_args()
    with torch.inference_mode(False):
        model = checked_model(arguments)
        for name, new in variants(model, arguments.geometry, arguments.budget).items():
            if name in arguments.variants:
                must_agree(model, new(), arguments.dtype, name)
        rows = [
            row
            for batch in arguments.batch
            for tokens in arguments.lengths
            for row in measure(model, arguments, tokens, batch)
        ]
        store("prefill", arguments, rows)


if __name__ == "__main__":
    main()
