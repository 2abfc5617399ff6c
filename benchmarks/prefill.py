"""What the prompt phase costs, importance and pruning included, over the same prompt with `DynamicCache`.

    python benchmarks/prefill.py [--geometry llava-1.5-7b --layers 1 --dtype bfloat16] [--lengths 1024,4096,8192]
        [--batch 1,4] [--variants window,default]

The model is one layer of LLaVA-1.5-7B's full width: each layer of the whole model repeats the same work, so the ratio
is that of the whole, apart from the vision tower and the head, which would make it smaller. `--geometry quarter` is a
quarter as wide and has at n tokens the share of attention that LLaVA-1.5-7B has at 4 n. The variants: the default, with
a profile by layer, and by head in four segments; the paper's with a window of 32 queries and with all, and that
window with the search on the prompt itself; or any spelling of a method. sdpa attention. A batch of more than one row
is padded at the left: the last row has half the tokens. Each variant is held against masking before anything is timed.

Goals: the default 1.05, by head 1.02 over by layer; the window 1.02; all queries 1.05 at 4096 and 1.20 at 32768.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from decode import checked_model, must_agree
from geometry import GEOMETRIES, keep_profile, prompt
from measure import numbers, parser, peak_bytes, ratio, show, store
from transformers import DynamicCache

from prefixkv_cache import Method, PrefixKVCache
from prefixkv_cache.tools.bench import take_turns

GOALS = {"default": 1.05, "window": 1.02, "all": 1.05}
ALL_GOAL_LONG, BY_HEAD_GOAL = 1.20, 1.02
LONG = 16384  # of LLaVA-1.5-7B's width: here attention's share lies half-way between those at 4k and 32k
VARIANTS = {  # (method, segments of the profile's heads; None: no profile)
    "default": ("default", 0),
    "by head": ("default", 4),
    "window": ("prefixkv:queries=32", 0),
    "search": ("prefixkv:queries=32", None),
    "all": ("prefixkv", 0),
}


def goal(variant: str, tokens: int, width: int) -> float | None:
    return ALL_GOAL_LONG if variant == "all" and tokens * 4096 // width >= LONG else GOALS.get(variant)


def variants(model: Any, names: list[str], budget: float) -> dict[str, Callable[[], Any]]:
    """A new cache of each kind, by name; the full cache first."""
    made: dict[str, Callable[[], Any]] = {"full": lambda: DynamicCache(config=model.config)}
    for name in names:
        spelling, segments = VARIANTS.get(name, (name, None))
        method = Method.parse(spelling)
        profile = None if segments is None else keep_profile(model, budget, method, segments)
        made[name] = lambda profile=profile, method=method: PrefixKVCache(
            profile, budget, method=method, config=model.config
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


def measure(model: Any, arguments: Any, tokens: int, batch: int = 1) -> list[dict[str, Any]]:
    ids, mask = prompt(model, tokens, batch), padded_left(tokens, batch)
    mask = None if mask is None else mask.to(ids.device)
    made = variants(model, arguments.variants, arguments.budget)
    calls = {name: lambda new=new: fed(model, ids, mask, new()) for name, new in made.items()}
    turns = max(3, arguments.turns * min(1, 4096 / tokens) // 1) if arguments.turns > 3 else arguments.turns
    times = take_turns(calls, int(turns))
    memory = {name: peak_bytes(call, model.device) for name, call in calls.items()} if arguments.memory else {}
    share = round(GEOMETRIES[arguments.geometry].attention_share(tokens), 3)
    pairs = [(name, "full", goal(name, tokens, model.config.hidden_size)) for name in list(made)[1:]]
    if {"default", "by head"} <= made.keys():
        pairs.append(("by head", "default", BY_HEAD_GOAL))
    rows = []
    for name, base, aim in pairs:
        row = {"tokens": tokens, "batch": batch, "budget": arguments.budget, "goal": aim, "attention_share": share}
        row |= ratio(times, name, base)
        if memory:
            row |= {"peak_mib": round(memory[name] / 2**20, 1), "base_peak_mib": round(memory[base] / 2**20, 1)}
        rows.append(row)
        show(f"{tokens:>6} tokens, {batch} rows, attention {share:.0%} of the arithmetic", row, aim)
    return rows


def main() -> None:
    made = parser(__doc__, geometry="llava-1.5-7b", dtype="bfloat16", layers=1)
    made.add_argument("--lengths", type=numbers, default=[1024, 4096])
    made.add_argument("--batch", type=numbers, default=[1], help="numbers of rows")
    made.add_argument("--variants", type=lambda text: text.split(","), default=list(VARIANTS), metavar="V,...")
    made.add_argument("--budget", type=float, default=0.5)
    made.add_argument("--turns", type=int, default=9, help="at 4096 tokens; fewer, at least 3, for longer prompts")
    made.add_argument("--memory", action="store_true", help="measure the peak of all tensors, too (a call more each)")
    arguments = made.parse_args()
    model = checked_model(arguments)
    for name, new in list(variants(model, arguments.variants, arguments.budget).items())[1:]:
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
