"""All measurements that need a GPU, in one command of under eight minutes.

    python benchmarks/gpu.py [--geometry llava-1.5-7b] [--dtype bfloat16] [--skip-capped]
    python benchmarks/gpu.py --small --device cpu              # a tiny model: does every part run?

1. The Triton kernel of the importance against float64, and its time over a flash attention call (goal 0.6).
2. The prompt phase over `DynamicCache`, as in prefill.py.
3. A decode step over the ideal and over `DynamicCache`, and several segments over one, as in decode.py, batch 1.
4. Tokens a second at a 20 % budget, batch 16, 1024 + 512 tokens, over the full cache (goal 3; the paper reports 1.83):
   by plain steps, and by replaying a CUDA graph of one step (`max_new_tokens`); one length a layer, and four segments.
5. Batch 48, 624 + 256 tokens, with the allocator capped at 24 GiB: the full cache runs out of memory, ours does not.

A part that fails says so and the others go on; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable
from typing import Any

import decode
import prefill
import torch
from geometry import prompt
from measure import parser, ratio, show, store
from torch import Tensor
from transformers import DynamicCache

from prefixkv_cache.rules.importance import attention_importance
from prefixkv_cache.rules.importance_flash import CaughtLogSumExp
from prefixkv_cache.tools.bench import synchronize, take_turns

BUDGET, FASTER, KERNEL_GOAL, CAP = 0.2, 3.0, 0.6, 24 * 2**30
Rows = list[dict[str, Any]]


def kernel(arguments: Any, heads: int, kv_heads: int, tokens: int, size: int = 128) -> Rows:
    """The importance of all queries from the kernel's log-sum-exp: right, and how long it takes."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    torch.manual_seed(0)
    query = torch.randn(1, heads, tokens, size, device=device, dtype=dtype) * 1.5
    key, value = (torch.randn(1, kv_heads, tokens, size, device=device, dtype=dtype) for _ in range(2))

    def attention() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=heads > kv_heads
        )

    with CaughtLogSumExp() as caught:
        attention()
    lse = caught.found
    if lse is None:
        raise RuntimeError("no attention kernel that returns its log-sum-exp has run")

    def importance() -> Tensor:
        return attention_importance(query, key, log_sum_exp=lse)

    found, worst, group = importance(), 0.0, heads // kv_heads
    for head in range(min(kv_heads, 4)):
        expected = torch.zeros(tokens, dtype=torch.float64, device=device)
        for one in query[0, head * group : (head + 1) * group]:
            scores = one.double() @ key[0, head].double().T * size**-0.5
            hidden = torch.ones_like(scores, dtype=torch.bool).triu_(1)
            expected += scores.masked_fill_(hidden, -torch.inf).softmax(-1).sum(0) / group
        worst = max(worst, float(((found[0, head] - expected) / expected).abs().max()))
    print(f"importance against float64: largest relative difference {worst:.1e}", flush=True)
    times = take_turns({"importance": importance, "attention": attention}, arguments.turns, warm_up=3)
    row = {"heads": heads, "kv_heads": kv_heads, "tokens": tokens, "error": worst, "goal": KERNEL_GOAL}
    row |= ratio(times, "importance", "attention")
    show(f"{tokens} tokens, {heads} heads, {kv_heads} key heads", row, KERNEL_GOAL)
    return [row]


@torch.no_grad()
def tokens_per_second(model: Any, ids: Tensor, cache: Any, n_steps: int, graph: bool = False) -> float:
    """Greedy decoding behind a prompt that is already in the cache; tokens a second of all rows."""
    token = ids[:, :1].clone()
    advance: Callable[[], object] = lambda: token.copy_(  # noqa: E731
        decode.step(model, cache, token).argmax(-1, keepdim=True)
    )
    advance()
    if graph:
        advance = captured(advance)
    synchronize()
    started = time.perf_counter()
    for _ in range(n_steps - 1):
        advance()
    synchronize()
    return ids.shape[0] * (n_steps - 1) / (time.perf_counter() - started)


def captured(advance: Callable[[], object]) -> Callable[[], object]:
    """One step, recorded as a CUDA graph: everything it reads and writes must stay where it is. Itself on a CPU."""
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


def throughput(model: Any, batch: int, tokens: int, n_steps: int) -> Rows:
    ids, planned = prompt(model, tokens, batch), n_steps + 8
    made: dict[str, Callable[[], Any]] = {
        "full": lambda: DynamicCache(config=model.config),
        "ours": lambda: decode.ours(model, BUDGET),
        "ours, 4 segments": lambda: decode.ours(model, BUDGET, 4),
        "ours, graph": lambda: decode.ours(model, BUDGET, max_new_tokens=planned),
        "ours, 4 segments, graph": lambda: decode.ours(model, BUDGET, 4, max_new_tokens=planned),
    }
    speeds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(2):
        for name, found in speeds.items():
            cache = decode.prefilled(model, ids, made[name]())
            found.append(tokens_per_second(model, ids, cache, n_steps, graph="graph" in name))
            del cache
            release()
    rows = []
    for name in list(made)[1:]:
        faster = max(speeds[name]) / max(speeds["full"])
        rows.append(
            {"variant": name, "batch": batch, "tokens": tokens, "new_tokens": n_steps, "speed_up": round(faster, 2)}
            | {"tokens_per_second": speeds[name], "full_tokens_per_second": speeds["full"], "goal": FASTER}
        )
        print(f"batch {batch}, {tokens} + {n_steps}, {name}: {faster:.2f} x the tokens a second of the full cache")
    return rows


def capped(model: Any, arguments: Any, batch: int, tokens: int, n_steps: int) -> Rows:
    """Which caches run under a memory ceiling."""
    row: dict[str, Any] = {"batch": batch, "tokens": tokens, "new_tokens": n_steps, "cap": CAP}
    release()
    if arguments.device != "cpu":
        torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(0).total_memory)
    ids = prompt(model, tokens, batch)
    made = {
        "full": lambda: DynamicCache(config=model.config),
        "ours": lambda: decode.ours(model, BUDGET, max_new_tokens=n_steps),
    }
    for name, new in made.items():
        try:
            row[name] = round(tokens_per_second(model, ids, decode.prefilled(model, ids, new()), n_steps), 1)
        except torch.cuda.OutOfMemoryError:
            row[name] = "out of memory"
        release()
        print(f"batch {batch}, {tokens} + {n_steps} in {CAP / 2**30:.0f} GiB: {name}: {row[name]}", flush=True)
    return [row]


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parts(arguments: Any) -> list[tuple[str, Callable[[], Rows]]]:
    """Name and measurement of each part, in order; the model is made when the second one begins."""
    made: list[Any] = []

    def model() -> Any:
        if not made:
            made.append(decode.checked_model(arguments))
        return made[0]

    small = arguments.small
    cut: Callable[[int], int] = lambda tokens: 256 if small else tokens  # noqa: E731
    one = argparse.Namespace(**{**vars(arguments), "batch": 1})
    found: list[tuple[str, Callable[[], Rows]]] = [
        ("kernel", lambda shape=shape: kernel(arguments, shape[0], shape[1], cut(shape[2])))
        for shape in ((32, 32, 4096), (28, 4, 4096), (32, 32, 16384))
    ]
    found += [("prefill", lambda n=n: prefill.measure(model(), one, cut(n))) for n in (4096, 32768)]
    found += [("decode", lambda n=n: decode.measure(model(), one, cut(n))) for n in (4096, 8192)]
    found += [("throughput", lambda: throughput(model(), *((2, 64, 16) if small else (16, 1024, 512))))]
    if not arguments.skip_capped:
        found += [("capped", lambda: capped(model(), arguments, *((2, 64, 16) if small else (48, 624, 256))))]
    return found


def main() -> int:
    made = parser(__doc__, geometry="llava-1.5-7b", dtype="bfloat16", layers=None)
    made.set_defaults(device="cuda")
    made.add_argument("--small", action="store_true", help="a tiny model, a few tokens in every part")
    made.add_argument("--skip-capped", action="store_true")
    made.add_argument("--turns", type=int, default=15)
    arguments = made.parse_args()
    if arguments.small:
        arguments.geometry, arguments.dtype, arguments.turns = "tiny", "float32", 2
    arguments.budget, arguments.budgets, arguments.segments, arguments.memory = 0.5, [1.0, BUDGET], [1, 2, 3, 4], False
    arguments.variants = list(prefill.VARIANTS)
    rows, failed = [], []
    for name, measure in parts(arguments):
        try:
            rows += [{"part": name, **row} for row in measure()]
        except (Exception, SystemExit):  # time on a GPU is scarce: what can be measured is
            traceback.print_exc()
            failed.append(name)
        release()
    store("gpu", arguments, rows, failed=failed)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
