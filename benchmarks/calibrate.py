"""What calibrating by mass on a sample costs, over a plain forward of the same sample: time and peak memory.

    python benchmarks/calibrate.py [--geometry quarter --layers 2] [--lengths 1024,4096] [--turns 5] [--threads 1]

The plain forward computes the last row of logits and builds no cache; both take turns, and the medians are compared.
The cost depends on the share that attention has in the forward, which grows with length / width and is stored beside.
Goal: 1.2. That the importances are right is for the tests.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from geometry import GEOMETRIES, build, prompt
from measure import numbers, parser, peak_bytes, ratio, show, store

from prefixkv_cache import calibrate
from prefixkv_cache.tools.bench import take_turns

METHODS = {"window of 32": "prefixkv:queries=32", "all queries": "prefixkv", "default": "default"}
GOAL = 1.2


@torch.no_grad()
def forward(model: Any, sample: dict[str, torch.Tensor]) -> None:
    model(**sample, use_cache=False, logits_to_keep=1)


def measure(model: Any, arguments: Any, tokens: int) -> list[dict[str, Any]]:
    ids = prompt(model, tokens)
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calls: dict[str, Any] = {"plain": partial(forward, model, sample)}
    for name, method in METHODS.items():
        calls[name] = partial(calibrate, model, [sample], method=method, by="mass")
    times = take_turns(calls, arguments.turns)
    memory = {name: peak_bytes(call, model.device) for name, call in calls.items()}
    share = round(GEOMETRIES[arguments.geometry].attention_share(tokens), 3)
    rows = []
    for name in METHODS:
        row = {"tokens": tokens, "goal": GOAL, "attention_share": share, **ratio(times, name, "plain")}
        rows.append(row | {f"{of}_peak_mib": round(memory[of] / 2**20, 1) for of in (name, "plain")})
        show(f"{tokens:>6} tokens, attention {share:.0%} of the arithmetic", row, GOAL)
    return rows


def main() -> None:
    made = parser(__doc__, geometry="quarter", dtype="float32", layers=2)
    made.add_argument("--lengths", type=numbers, default=[1024, 4096])
    made.add_argument("--turns", type=int, default=5)
    arguments = made.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = build(arguments.geometry, layers=arguments.layers, dtype=arguments.dtype, device=arguments.device)
    store("calibrate", arguments, [row for tokens in arguments.lengths for row in measure(model, arguments, tokens)])


if __name__ == "__main__":
    main()
