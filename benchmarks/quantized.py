"""Pruned and quantised beside pruned alone, at equal bytes: fewer pairs, or fewer bits?

    python benchmarks/quantized.py run [--cases 6] [--bytes 0.3,0.15,0.1] [--tasks summary,lookup,turn2,continuation]
    python benchmarks/quantized.py table benchmarks/results/quantized-....jsonl
    python benchmarks/quantized.py steps [--tokens 450,1800]      # time of a decode step

SmolLM2-135M-Instruct on the report split of the study's tasks. A real cache reads the prompt, and is then fed the
answer that the full cache gives (or the one that is asked for), in one forward. Bytes are a fraction of those of the
full cache in bfloat16; the model computes in float32, which is faster on a CPU, so a floating point number counts as
two bytes. For 8 and 4 bits the budget is what takes as many bytes as pruning alone does at that fraction. One line of
JSON a case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measure import RESULTS, fractions, machine, numbers, ratio, store
from study import load
from torch import Tensor
from transformers import DynamicCache

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.cache.quantized import GROUP, NEWEST
from prefixkv_cache.tools.tasks.passages import PASSAGE, digest
from prefixkv_cache.tools.tasks.tasks import cases

TASKS = ("summary", "lookup", "turn2", "continuation")
WAYS: dict[str, dict[str, Any]] = {"profile": {"profile": "smollm2-135m-instruct"}, "default": {"profile": None}}
BITS = {"int4": 4, "int8": 8, "16 bits": 16}
ANSWER_TOKENS = 32


class Asked:
    """A prompt, what follows it, and what the full cache makes of that."""

    def __init__(self, model: Any, tokenizer: Any, case: Any):
        self.model = model
        self.prompt, lead, answer = (torch.tensor([part], dtype=torch.long) for part in case.tokens(tokenizer))
        if case.answer is None:
            options = {"do_sample": False, "max_new_tokens": ANSWER_TOKENS}
            ids = model.generate(self.prompt, attention_mask=torch.ones_like(self.prompt), **options)
            answer = ids[:, self.prompt.shape[1] :]
        self.fed, self._skipped = torch.cat([lead, answer], dim=1), max(0, lead.shape[1] - 1)
        self._full = self._log_probs(DynamicCache())

    @torch.no_grad()
    def _log_probs(self, cache: Any) -> Tensor:
        self.model(self.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.bytes = sixteen_bit_bytes(cache) if isinstance(cache, PrefixKVCache) else 0
        return self.model(self.fed[:, :-1], past_key_values=cache).logits[:, self._skipped :].log_softmax(-1)

    def cost(self, cache: PrefixKVCache) -> dict[str, float]:
        """Divergence in nats a token, whether greedy decoding writes the answer, and bytes over the full cache's."""
        pruned, targets = self._log_probs(cache), self.fed[:, 1 + self._skipped :]
        divergence = (self._full.exp() * (self._full - pruned)).sum(-1).clamp_min(0).mean().item()
        full = sum(layer.stored.pair_bytes for layer in cache.layers) // 2 * self.prompt.shape[1]
        return {
            "kl": round(divergence, 5),
            "exact": float((pruned.argmax(-1) == targets).all()),
            "full_exact": float((self._full.argmax(-1) == targets).all()),
            "bytes": round(self.bytes / full, 4),
        }


def sixteen_bit_bytes(cache: PrefixKVCache) -> int:
    """What the cache takes if floating point numbers take two bytes."""
    tensors = [tensor for layer in cache.layers for tensor in layer.stored.tensors()]
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in tensors)


def budget_of(share: float, bits: int, n_tokens: int, head_dim: int) -> float:
    """The budget that takes this share of the full cache's bytes, at most 1.

    A pair in codes: key and value, two scales and shifts, and the place of the key's; the newest ones stand beside it.
    """
    if bits == 16:
        return share
    pair = 4 * head_dim
    coded = 2 * head_dim * bits / 8 + 4 + 4 * head_dim / GROUP + 2
    return min(1.0, max(0.01, (share * pair * n_tokens - NEWEST * pair) / coded / n_tokens))


def run(options: argparse.Namespace) -> None:
    """All cases, one line each."""
    torch.set_num_threads(options.threads)
    created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ")
    out = options.out or RESULTS / f"quantized-{created}.jsonl"
    model, tokenizer = load()
    head_dim = model.config.head_dim
    facts: dict[str, Any] = {"benchmark": "quantized", "created": created, "newest": NEWEST}
    facts |= {"passages": digest(), "machine": machine()}
    for number, task in ((number, task) for number in range(options.cases) for task in options.tasks.split(",")):
        asked = Asked(model, tokenizer, cases(task, "report", options.cases, options.length)[number])
        n_tokens, found = asked.prompt.shape[1], []
        for way, share, bits in ((way, share, bits) for way in WAYS for share in options.bytes for bits in BITS):
            budget = round(budget_of(share, BITS[bits], n_tokens, head_dim), 4)
            quantize = None if bits == "16 bits" else bits
            cache = PrefixKVCache.for_model(model, budget, quantize=quantize, **WAYS[way])
            found.append({"way": way, "share": share, "bits": bits, "budget": budget, **asked.cost(cache)})
        for quantize in ("int8", "int4"):
            cache = PrefixKVCache.for_model(model, 1.0, quantize=quantize)
            found.append({"way": "nothing pruned", "share": 1.0, "bits": quantize, "budget": 1.0, **asked.cost(cache)})
        with out.open("a") as file:
            file.write(json.dumps({**facts, "task": task, "case": number, "tokens": n_tokens, "found": found}) + "\n")
        print(task, number, n_tokens, "tokens", flush=True)
    print(out)


def table(options: argparse.Namespace) -> None:
    """Markdown, one number a cell."""
    rows = [json.loads(line) for file in options.files for line in Path(file).read_text().splitlines()]
    tokens = sorted(row["tokens"] for row in rows)
    print(f"{len(rows)} cases, prompts of {tokens[0]} to {tokens[-1]} tokens")
    for field in ("kl", "exact"):
        print(f"\n| lengths | bytes | stored in | pairs kept | {' | '.join(f'{field}, {task}' for task in TASKS)} |")
        print("|" + " --- |" * (4 + len(TASKS)))
        for cells in _lines(rows, field):
            print("| " + " | ".join(cells) + " |")


def _lines(rows: list[dict[str, Any]], field: str) -> Iterator[list[str]]:
    keys = [(each["way"], each["share"], each["bits"]) for each in rows[0]["found"]]
    for key in keys:
        own = [(row["task"], e) for row in rows for e in row["found"] if (e["way"], e["share"], e["bits"]) == key]
        of_task = [[each[field] for task, each in own if task == name] for name in TASKS]
        cells = [f"{sum(of):.0f}" if field == "exact" else f"{fmean(of):.3f}" for of in of_task if of]
        kept, size = (fmean(each[name] for _, each in own) for name in ("budget", "bytes"))
        yield [key[0], f"{size:.3f}", key[2], f"{kept:.2f}", *cells]


def steps(options: argparse.Namespace) -> None:
    """Time of a decode step over that with `DynamicCache`; the caches take turns, a few steps each."""
    torch.set_num_threads(options.threads)
    model, _ = load()
    rows = []
    for n_tokens in options.tokens:
        ids = torch.randint(1000, 40000, (1, n_tokens), generator=torch.Generator().manual_seed(0))
        caches: dict[str, Any] = {"DynamicCache": DynamicCache(config=model.config)}
        for budget, quantize in ((1.0, None), (1.0, "int4"), (0.4, None), (0.4, "int8"), (0.4, "int4")):
            caches[f"{budget} {quantize or '16 bits'}"] = PrefixKVCache.for_model(model, budget, quantize=quantize)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in caches}
        with torch.no_grad():
            for cache in caches.values():
                model(ids, past_key_values=cache, logits_to_keep=1)
            for turn in range(options.turns + 1):
                for name, cache in caches.items():
                    wall, processor = time.perf_counter(), time.process_time()
                    for _ in range(8):
                        model(ids[:, :1], past_key_values=cache)
                    if turn:  # the first is to warm up
                        times[name].append((time.perf_counter() - wall, time.process_time() - processor))
        rows += [{"tokens": n_tokens, **ratio(times, name, "DynamicCache")} for name in caches]
    options.device = "cpu"
    del options.work
    store("quantized-steps", options, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help=run.__doc__)
    command.add_argument("--cases", type=int, default=6, help="of each task")
    command.add_argument("--length", type=int, default=PASSAGE, help="characters of a passage")
    command.add_argument("--tasks", default=",".join(TASKS))
    command.add_argument("--bytes", type=fractions, default=[0.3, 0.15, 0.1], help="of the full cache")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--out", type=Path, help="a file to add to")
    command.set_defaults(work=run)
    command = commands.add_parser("table", help=table.__doc__)
    command.add_argument("files", nargs="+")
    command.set_defaults(work=table)
    command = commands.add_parser("steps", help=steps.__doc__)
    command.add_argument("--tokens", type=numbers, default=[450, 1800])
    command.add_argument("--turns", type=int, default=9)
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--out", type=Path, default=RESULTS)
    command.set_defaults(work=steps)
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
