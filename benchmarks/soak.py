"""Does memory stay where it is? Prompt and decode cycles of random sizes for as long as you like.

    python benchmarks/soak.py [--minutes 20] [--bound 20]

Each cycle takes a new cache or resets an old one, with a profile or with the search, and feeds one to three turns of a
padded batch to a tiny random LLaVA, which answers; then the cache is copied, reordered, cropped and the like. Some
forwards are interrupted by an exception on their way, and the cache dropped there. Every few seconds, between two
cycles, three numbers are written down: the process's resident memory, the bytes of all live tensors beside the model's,
and the largest cache since the last line.

Minutes are of processor time, so that what else the machine does changes only how long it takes. Before each look the C
allocator is asked to give back what is free (glibc), or its fragments would be most of what is seen.

After a warm-up (the first quarter) a line is fitted to the numbers. The exit status is 1 if resident memory rises by
more than `--bound` MiB an hour; one small Python object left behind by each layer and step would be hundreds. Writes a
CSV, a PNG and a JSON, never over older ones.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import ctypes
import gc
import json
import random
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from calibrate import RESULTS, machine
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from prefixkv_cache import PrefixKVCache, PrefixProfile

LAYERS, IMAGE, IMAGE_TOKENS, WORDS = 4, 9, 16, range(10, 200)
COLUMNS = ("seconds", "cycles", "tokens", "rss_bytes", "tensor_bytes", "largest_cache_bytes")
MIB = 2**20


class Interrupted(Exception):
    """Raised in the middle of a forward, on purpose."""


def build_model() -> Any:
    text = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=WORDS.stop, max_position_embeddings=4096, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=IMAGE_TOKENS)
    return LlavaForConditionalGeneration(config).eval()


def make_profile() -> PrefixProfile:
    lean = torch.linspace(-0.5, 0.5, LAYERS, dtype=torch.float64)
    budgets = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    return PrefixProfile(budgets, budgets[:, None] * (1 + (1 - budgets[:, None]) * lean))


class Cycles:
    """One cycle after another, each of another size; the same seed gives the same sequence."""

    def __init__(self, model: Any, seed: int, longest: int):
        self.model, self.random, self.longest = model, random.Random(seed), longest
        self.profile = make_profile()
        self.old = [PrefixKVCache(self.profile, 0.4), PrefixKVCache(budget=0.3), PrefixKVCache(budget=1.0)]
        self.done = self.tokens = self.largest = 0

    def run(self) -> None:
        self._cycle()
        self.done += 1

    def _cycle(self) -> None:
        cache = self._cache()
        inputs = self._prompt()
        for turn in range(self.random.choice([1, 1, 2, 3])):
            if turn:
                inputs = self._next_turn(inputs, sequences)  # noqa: F821  (of the turn before)
            if self.random.random() < 0.1:
                self._interrupted(cache, inputs)
                return
            sequences = self.model.generate(
                **inputs, past_key_values=cache, do_sample=False, max_new_tokens=self.random.randint(1, 60)
            )
            self.tokens += sequences.numel()
            self.largest = max(self.largest, cache.nbytes)
        self._batch_operation(cache, len(inputs["input_ids"]))

    def _cache(self) -> PrefixKVCache:
        if self.random.random() < 0.3:
            cache = self.random.choice(self.old)
            cache.reset()
            return cache
        profile = self.random.choice([None, self.profile])
        return PrefixKVCache(
            profile, self.random.uniform(0.1, 1), queries=self.random.choice([8, 32, "all"]),
            distance=self.random.choice([None, 1, 5, 25]), slack=self.random.choice([0, 64]),
        )  # fmt: skip

    def _prompt(self) -> dict[str, torch.Tensor]:
        lengths = [self.random.randint(IMAGE_TOKENS + 1, self.longest) for _ in range(self.random.choice([1, 1, 2, 4]))]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, length in zip(ids, lengths, strict=True):
            row[-length:] = torch.tensor(self.random.choices(WORDS, k=length))
            row[-length : IMAGE_TOKENS - length or None] = IMAGE
        pixels = torch.rand(len(lengths), 3, 16, 16)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}

    def _next_turn(self, inputs: dict[str, torch.Tensor], sequences: torch.Tensor) -> dict[str, torch.Tensor]:
        words = torch.tensor([self.random.choices(WORDS, k=self.random.randint(1, 80))] * len(sequences))
        ids, mask = torch.cat([sequences, words], 1), inputs["attention_mask"]
        return {
            "input_ids": ids,
            "attention_mask": torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1),
        }

    def _interrupted(self, cache: PrefixKVCache, inputs: dict[str, torch.Tensor]) -> None:
        """An exception in one of the layers, in the prompt or in one of the steps after it."""
        left = self.random.randint(1, 20)

        def stop(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Interrupted

        layer = self.random.choice(self.model.model.language_model.layers)
        handle = layer.self_attn.o_proj.register_forward_pre_hook(stop)
        with contextlib.suppress(Interrupted):
            self.model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=25)
        handle.remove()

    def _batch_operation(self, cache: PrefixKVCache, rows: int) -> None:
        match self.random.choice(["none", "copy", "reorder", "repeat", "select", "crop"]):
            case "copy":
                cache = copy.deepcopy(cache)
            case "reorder":
                cache.reorder_cache(torch.tensor(self.random.choices(range(rows), k=rows)))
            case "repeat":
                cache.batch_repeat_interleave(2)
            case "select":
                cache.batch_select_indices(torch.tensor([self.random.randrange(rows)]))
            case "crop":
                cache.crop(-self.random.randint(0, 5))
        with torch.no_grad():
            size = cache.kept_positions(0).shape[0]
            self.model(input_ids=torch.full((size, 1), WORDS.start), past_key_values=cache)
        self.largest = max(self.largest, cache.nbytes)


def live_tensor_bytes() -> int:
    """Bytes of the storages of all tensors that Python holds."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def give_back() -> None:
    """What the allocator keeps for later goes back to the system, where it knows how to do that."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def soak(model: Any, minutes: float, every: float, seed: int, longest: int) -> list[dict[str, Any]]:
    weights = live_tensor_bytes()
    cycles, process, rows = Cycles(model, seed, longest), psutil.Process(), []
    start = time.process_time()
    while (now := time.process_time() - start) < 60 * minutes:
        cycles.run()
        if now >= every * len(rows):
            for cache in cycles.old:
                cache.reset()  # what is left is what leaks
            gc.collect()
            give_back()
            numbers = (now, cycles.done, cycles.tokens, process.memory_info().rss, live_tensor_bytes() - weights)
            rows.append(dict(zip(COLUMNS, (*numbers, cycles.largest), strict=True)))
            cycles.largest = 0
    return rows


def slope_per_hour(rows: list[dict[str, Any]], column: str) -> float:
    """Of a line fitted to the rows, in MiB an hour."""
    seconds, values = (np.array([row[name] for row in rows], dtype=float) for name in ("seconds", column))
    return float(np.polyfit(seconds / 3600, values / MIB, 1)[0])


def draw(rows: list[dict[str, Any]], settled: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(7, 4.5), sharex=True, layout="constrained")
    minutes = [row["seconds"] / 60 for row in rows]
    axes[0].plot(minutes, [row["rss_bytes"] / MIB for row in rows], lw=0.8)
    line = np.polyfit([row["seconds"] / 60 for row in settled], [row["rss_bytes"] / MIB for row in settled], 1)
    ends = np.array([settled[0]["seconds"], settled[-1]["seconds"]]) / 60
    axes[0].plot(ends, np.polyval(line, ends), "--", label=f"after warm-up: {60 * line[0]:+.1f} MiB an hour")
    axes[0].set(ylabel="resident memory, MiB", ylim=(0, 1.2 * max(row["rss_bytes"] for row in rows) / MIB))
    axes[0].legend(loc="lower right")
    axes[1].plot(minutes, [row["largest_cache_bytes"] / MIB for row in rows], lw=0.8, label="largest cache")
    axes[1].plot(minutes, [row["tensor_bytes"] / MIB for row in rows], lw=0.8, label="live tensors between cycles")
    axes[1].set(xlabel="minutes of processor time", ylabel="tensors, MiB")
    axes[1].legend(loc="upper right")
    figure.suptitle(f"{rows[-1]['cycles']:,} cycles, {rows[-1]['tokens']:,} tokens")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="of processor time (%(default)s)")
    parser.add_argument(
        "--bound", type=float, default=20, help="MiB an hour that resident memory may rise (%(default)s)"
    )
    parser.add_argument("--every", type=float, default=3, help="seconds of processor time between lines (%(default)s)")
    parser.add_argument("--longest", type=int, default=500, help="tokens of the longest prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder that the results are added to")
    arguments = parser.parse_args()
    arguments.device = "cpu"
    torch.set_num_threads(arguments.threads)
    rows = soak(build_model(), arguments.minutes, arguments.every, arguments.seed, arguments.longest)
    settled = [row for row in rows if row["seconds"] >= 15 * arguments.minutes]
    if len(settled) < 3:
        raise SystemExit(f"{len(rows)} lines are too few to fit; take more --minutes or fewer seconds --every")
    rise = slope_per_hour(settled, "rss_bytes")

    created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ")
    options = {name: getattr(arguments, name) for name in ("minutes", "bound", "every", "longest", "seed")}
    result = {
        "benchmark": "soak", "created": created, **options, "machine": machine(arguments),
        "cycles": rows[-1]["cycles"], "tokens": rows[-1]["tokens"],
        "rss_mib": [round(rows[0]["rss_bytes"] / MIB, 1), round(rows[-1]["rss_bytes"] / MIB, 1)],
        "rss_rise_mib_per_hour": round(rise, 2),
        "tensor_rise_mib_per_hour": round(slope_per_hour(settled, "tensor_bytes"), 4),
        "largest_cache_mib": round(max(row["largest_cache_bytes"] for row in rows) / MIB, 2),
        "passed": rise <= arguments.bound,
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = arguments.out / f"soak-{created}"
    with open(f"{base}.csv", "x", newline="", encoding="utf-8") as file:  # never over an older one
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "seconds": round(row["seconds"], 2)} for row in rows)
    with open(f"{base}.json", "x", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    draw(rows, settled, Path(f"{base}.png"))
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
