"""All measurements that need a GPU, in one command of under eight minutes.

    python benchmarks/gpu.py [--geometry llava-1.5-7b] [--dtype bfloat16] [--device cuda] [--skip-capped]
    python benchmarks/gpu.py --device cpu --geometry tiny --dtype float32 --small      # does every part run?

1. The Triton kernel of the importance against float64, and its time over a flash attention call (goal 0.6).
2. The prompt phase over `DynamicCache`, as in prefill.py.
3. A decode step over the ideal and over `DynamicCache`, as in decode.py, batch 1.
4. Tokens a second at a 20 % budget, batch 16, 1024 + 512 tokens, over the full cache (goal 3; the paper reports 1.83):
   by plain steps, and by replaying a CUDA graph of one step (`max_new_tokens`).
5. Batch 48, 624 + 256 tokens, with the allocator capped at 24 GiB: the full cache runs out of memory, ours does not.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import decode
import prefill
import torch
from geometry import prompt
from measure import parser, ratio, show, store, synchronize, take_turns
from torch import Tensor
from transformers import DynamicCache

from prefixkv_cache.importance_flash import CaughtLogSumExp, column_sums

BUDGET, FASTER, KERNEL_GOAL, CAP = 0.2, 3.0, 0.6, 24 * 2**30


def kernel(arguments: Any, batch: int, heads: int, kv_heads: int, tokens: int, size: int) -> dict[str, Any]:
    """The importance of all queries from the kernel's log-sum-exp: right, and how long it takes."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    torch.manual_seed(0)
    query = torch.randn(batch, heads, tokens, size, device=device, dtype=dtype) * 1.5
    key, value = (torch.randn(batch, kv_heads, tokens, size, device=device, dtype=dtype) for _ in range(2))

    def attention() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=heads > kv_heads
        )

    with CaughtLogSumExp() as caught:
        attention()
    lse = caught.found
    assert lse is not None, "no kernel that tells its log-sum-exp has run"

    def importance() -> Tensor:
        return column_sums(query, key, lse, mask=None, counts=None, scaling=size**-0.5)

    found, worst = importance(), 0.0
    for head in range(min(kv_heads, 4)):
        of_group = query[0, head * (heads // kv_heads) : (head + 1) * (heads // kv_heads)]
        expected = torch.zeros(tokens, dtype=torch.float64, device=device)
        for one in of_group:
            scores = one.double() @ key[0, head].double().T * size**-0.5
            hidden = torch.ones_like(scores, dtype=torch.bool).triu_(1)
            expected += scores.masked_fill_(hidden, -torch.inf).softmax(-1).sum(0)
        worst = max(worst, float(((found[0, head] - expected) / expected).abs().max()))
    print(f"importance against float64: largest relative difference {worst:.1e}", flush=True)
    times = take_turns({"importance": importance, "attention": attention}, arguments.turns, warm_up=3)
    row = {"part": "kernel", "batch": batch, "heads": heads, "kv_heads": kv_heads, "tokens": tokens, "error": worst}
    row |= {"goal": KERNEL_GOAL, **ratio(times, "importance", "attention")}
    show(f"{tokens} tokens, {heads} heads, {kv_heads} key heads", row, KERNEL_GOAL)
    return row


@torch.no_grad()
def tokens_per_second(model: Any, ids: Tensor, cache: Any, n_steps: int, graph: bool = False) -> tuple[float, Tensor]:
    """Greedy decoding behind a prompt that is already in the cache; (tokens a second of all rows, the ids)."""
    token = ids[:, :1].clone()
    advance = lambda: token.copy_(decode.step(model, cache, token).argmax(-1, keepdim=True))  # noqa: E731
    chosen = [advance().clone()]
    if graph:
        advance = captured(advance)
    synchronize()
    started = time.perf_counter()
    for _ in range(n_steps - 1):
        advance()
        chosen.append(token.clone())
    synchronize()
    return ids.shape[0] * (n_steps - 1) / (time.perf_counter() - started), torch.cat(chosen, 1)


def captured(advance: Callable[[], object]) -> Callable[[], object]:
    """One step, recorded as a CUDA graph: everything it reads and writes must stay where it is. Itself on a CPU.

    Recording does not run the step, and a schedule's counter stands still; what runs beforehand counts.
    """
    if not torch.cuda.is_available():
        return advance
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        advance()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()
    return graph.replay


def throughput(model: Any, arguments: Any, batch: int, tokens: int, n_steps: int) -> list[dict[str, Any]]:
    ids = prompt(model, tokens, batch)
    speeds: dict[str, list[float]] = {"full": [], "ours": [], "ours, graph": []}
    for _ in range(2):
        for name, found in speeds.items():
            planned = n_steps + 8 if name == "ours, graph" else None
            cache = (
                DynamicCache(config=model.config)
                if name == "full"
                else decode.ours(model, arguments.geometry, BUDGET, max_new_tokens=planned)
            )
            decode.prefilled(model, ids, cache)
            found.append(tokens_per_second(model, ids, cache, n_steps, graph=planned is not None)[0])
            del cache
            release()
    rows = []
    for name in ("ours", "ours, graph"):
        faster = max(speeds[name]) / max(speeds["full"])
        rows.append(
            {"part": "throughput", "variant": name, "batch": batch, "tokens": tokens, "new_tokens": n_steps}
            | {"tokens_per_second": speeds[name], "full_tokens_per_second": speeds["full"]}
            | {"speed_up": round(faster, 2), "goal": FASTER}
        )
        print(f"batch {batch}, {tokens} + {n_steps}, {name}: {faster:.2f} x the tokens a second of the full cache")
    return rows


def capped(model: Any, arguments: Any, batch: int, tokens: int, n_steps: int) -> dict[str, Any]:
    """Which caches run under a memory ceiling."""
    row: dict[str, Any] = {"part": "capped", "batch": batch, "tokens": tokens, "new_tokens": n_steps, "cap": CAP}
    if arguments.device != "cpu":
        release()
        torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(0).total_memory)
    ids = prompt(model, tokens, batch)
    for name in ("full", "ours"):
        cache = (
            DynamicCache(config=model.config)
            if name == "full"
            else decode.ours(model, arguments.geometry, BUDGET, max_new_tokens=n_steps)
        )
        try:
            decode.prefilled(model, ids, cache)
            row[name] = round(tokens_per_second(model, ids, cache, n_steps)[0], 1)
        except torch.cuda.OutOfMemoryError:
            row[name] = "out of memory"
        del cache
        release()
        print(f"batch {batch}, {tokens} + {n_steps} in {CAP / 2**30:.0f} GiB: {name}: {row[name]}", flush=True)
    return row


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    made = parser(__doc__, geometry="llava-1.5-7b", dtype="bfloat16", layers=None)
    made.set_defaults(device="cuda")
    made.add_argument("--small", action="store_true", help="a few tokens in every part")
    made.add_argument("--skip-capped", action="store_true")
    made.add_argument("--turns", type=int, default=10)
    arguments = made.parse_args()
    small = arguments.small
    arguments.budget, arguments.budgets, arguments.memory = 0.5, [1.0, BUDGET], False
    arguments.variants = ("default", "window", "all", "search")
    rows: list[dict[str, Any]] = []
    for heads, kv_heads, tokens in ((32, 32, 4096), (28, 4, 4096), (32, 32, 16384)):
        rows.append(kernel(arguments, 1, heads, kv_heads, 256 if small else tokens, 128))
    model = decode.checked_model(arguments)
    for tokens in (4096, 32768):
        settings = argparse.Namespace(**{**vars(arguments), "batch": 1})
        rows += [{"part": "prefill", **row} for row in prefill.measure(model, settings, 256 if small else tokens)]
    for tokens in (4096, 8192):
        settings = argparse.Namespace(**{**vars(arguments), "batch": 1, "turns": 2 * arguments.turns})
        rows += [{"part": "decode", **row} for row in decode.measure(model, settings, 256 if small else tokens)]
    release()
    rows += throughput(model, arguments, *((2, 64, 16) if small else (16, 1024, 512)))
    if not arguments.skip_capped:
        rows.append(capped(model, arguments, *((2, 64, 16) if small else (48, 624, 256))))
    store("gpu", arguments, rows)


if __name__ == "__main__":
    main()
