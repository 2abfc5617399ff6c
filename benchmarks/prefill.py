"""What the prompt phase costs, importance and pruning included, over the same prompt with `DynamicCache`.

    python benchmarks/prefill.py [--geometry llava-1.5-7b --layers 1 --dtype bfloat16] [--lengths 4096,32768]

The model is one layer of LLaVA-1.5-7B's full width: each layer of the whole model repeats the same work, so the ratio
is that of the whole, apart from the vision tower and the head, which would make it smaller. `--geometry quarter` is a
quarter as wide and has at n tokens the share of attention that LLaVA-1.5-7B has at 4 n. The variants: the default
window of 32 queries and all queries with a profile, and the search on the prompt itself. sdpa attention. Goals: the
window 1.02 at 4096 and 32768 tokens, all queries 1.05 at 4096 and 1.20 at 32768.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from decode import checked_model, prefilled
from geometry import GEOMETRIES, keep_profile, prompt
from measure import numbers, parser, peak_bytes, ratio, show, store, take_turns
from transformers import DynamicCache

from prefixkv_cache import PrefixKVCache

WINDOW_GOAL, ALL_GOAL, ALL_GOAL_LONG = 1.02, 1.05, 1.20
LONG = 16384  # of LLaVA-1.5-7B's width: here attention's share lies half-way between those at 4k and 32k


def goal(variant: str, tokens: int, width: int) -> float | None:
    if variant == "window":
        return WINDOW_GOAL
    if variant == "all":
        return ALL_GOAL if tokens * 4096 // width < LONG else ALL_GOAL_LONG
    return None


def variants(model: Any, name: str, budget: float) -> dict[str, Callable[[], Any]]:
    """A new cache of each kind, by name."""
    profile = keep_profile(name, model.config.num_hidden_layers, budget)
    config = model.config
    return {
        "full": lambda: DynamicCache(config=config),
        "window": lambda: PrefixKVCache(profile, budget, config=config),
        "all": lambda: PrefixKVCache(profile, budget, config=config, queries="all"),
        "search": lambda: PrefixKVCache(None, budget, config=config),
    }


def measure(model: Any, arguments: Any, tokens: int) -> list[dict[str, Any]]:
    ids = prompt(model, tokens, arguments.batch)
    made = variants(model, arguments.geometry, arguments.budget)
    calls = {name: lambda new=new: prefilled(model, ids, new()) for name, new in made.items()}
    turns = max(3, arguments.turns * min(1, 4096 / tokens) // 1) if arguments.turns > 3 else arguments.turns
    times = take_turns(calls, int(turns))
    memory = {name: peak_bytes(call, model.device) for name, call in calls.items()} if arguments.memory else {}
    rows = []
    for name in list(made)[1:]:
        row = {"tokens": tokens, "batch": arguments.batch, "budget": arguments.budget}
        row |= {"goal": goal(name, tokens, model.config.hidden_size)} | ratio(times, name, "full")
        row["attention_share"] = round(GEOMETRIES[arguments.geometry].attention_share(tokens), 3)
        if memory:
            row |= {"peak_mib": round(memory[name] / 2**20, 1), "base_peak_mib": round(memory["full"] / 2**20, 1)}
        rows.append(row)
        show(f"{tokens:>6} tokens, attention {row['attention_share']:.0%} of the arithmetic", row, row["goal"])
    return rows


def main() -> None:
    made = parser(__doc__, geometry="llava-1.5-7b", dtype="bfloat16", layers=1)
    made.add_argument("--lengths", type=numbers, default=[4096, 32768])
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--budget", type=float, default=0.5)
    made.add_argument("--turns", type=int, default=9, help="at 4096 tokens; fewer, at least 3, for longer prompts")
    made.add_argument("--memory", action="store_true", help="measure the peak of all tensors, too (a call more each)")
    arguments = made.parse_args()
    with torch.inference_mode(False):
        model = checked_model(arguments)
        store("prefill", arguments, [row for tokens in arguments.lengths for row in measure(model, arguments, tokens)])


if __name__ == "__main__":
    main()
