"""Does memory stay where it is? Prompt and decode cycles of random sizes for as long as you like.

    python benchmarks/soak.py [--minutes 20] [--bound 20]

Each cycle takes a new cache or resets an old one, with lengths by layer, by head, searched or pooled, and feeds one to
three turns of a padded batch to a tiny random model, which answers; then the cache is copied, reordered, cropped and
the like. Some forwards are interrupted by an exception on their way, and the cache dropped there. Every few seconds,
between two cycles, three numbers are written down: the process's resident memory, the bytes of all live tensors beside
the model's, and the largest cache since the last line. Minutes are of processor time, so that what else the machine
does changes only how long it takes. Before each look the C allocator is asked to give back what is free (glibc).

After a warm-up (the first quarter) a line is fitted to the numbers. The exit status is 1 if resident memory rises by
more than `--bound` MiB an hour; one small Python object left behind by each layer and step would be hundreds.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import random
import statistics
import time
from typing import Any

import psutil
import torch
from measure import parser, store
from transformers import LlamaConfig, LlamaForCausalLM

from prefixkv_cache import PrefixKVCache, PrefixProfile

LAYERS, HEADS, WORDS, MIB = 4, 2, range(10, 200), 2**20
METHODS = ("default", "prefixkv", "snapkv", "h2o", "streaming", "default:lengths=pool", "prefixkv:queries=8;distance=5")


class Interrupted(Exception):
    """Raised in the middle of a forward, on purpose."""


def build_model() -> Any:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS, vocab_size=WORDS.stop, max_position_embeddings=4096, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def make_profile(heads: int) -> PrefixProfile:
    lean = torch.linspace(-0.5, 0.5, LAYERS * heads, dtype=torch.float64).view(LAYERS, heads)
    budgets = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    each = budgets[:, None, None]
    return PrefixProfile(budgets, each * (1 + (1 - each) * lean))


class Cycles:
    """One cycle after another, each of another size; the same seed gives the same sequence."""

    def __init__(self, model: Any, seed: int, longest: int):
        self.model, self.random, self.longest = model, random.Random(seed), longest
        self.profiles = [None, make_profile(1), make_profile(HEADS)]
        self.old = [self._new() for _ in range(3)]
        self.done = self.tokens = self.largest = 0

    def run(self) -> None:
        self._cycle()
        self.done += 1

    def _cycle(self) -> None:
        cache = self._new()
        if self.random.random() < 0.3:
            cache = self.random.choice(self.old)
            cache.reset()
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

    def _new(self) -> PrefixKVCache:
        # Without a method the profile's own; a method of its own only where no profile is.
        profile = self.random.choice(self.profiles)
        method = None if profile is not None else self.random.choice(METHODS)
        return PrefixKVCache(profile, self.random.uniform(0.1, 1), method=method)

    def _prompt(self) -> dict[str, torch.Tensor]:
        lengths = [self.random.randint(17, self.longest) for _ in range(self.random.choice([1, 1, 2, 4]))]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, length in zip(ids, lengths, strict=True):
            row[-length:] = torch.tensor(self.random.choices(WORDS, k=length))
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    def _next_turn(self, inputs: dict[str, torch.Tensor], sequences: torch.Tensor) -> dict[str, torch.Tensor]:
        words = torch.tensor([self.random.choices(WORDS, k=self.random.randint(1, 80))] * len(sequences))
        ids, mask = torch.cat([sequences, words], 1), inputs["attention_mask"]
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        return {"input_ids": ids, "attention_mask": mask}

    def _interrupted(self, cache: PrefixKVCache, inputs: dict[str, torch.Tensor]) -> None:
        """An exception in one of the layers, in the prompt or in one of the steps after it."""
        left = self.random.randint(1, 20)

        def stop(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Interrupted

        handle = self.random.choice(self.model.model.layers).self_attn.o_proj.register_forward_pre_hook(stop)
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
    found = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def give_back() -> None:
    """What the allocator keeps for later goes back to the system, where it knows how to do that."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def soak(model: Any, arguments: Any) -> list[dict[str, Any]]:
    weights = live_tensor_bytes()
    cycles, process, rows = Cycles(model, arguments.seed, arguments.longest), psutil.Process(), []
    start = time.process_time()
    while (now := time.process_time() - start) < 60 * arguments.minutes:
        cycles.run()
        if now >= arguments.every * len(rows):
            for cache in cycles.old:
                cache.reset()  # what is left is what leaks
            gc.collect()
            give_back()
            row = {"seconds": round(now, 2), "cycles": cycles.done, "tokens": cycles.tokens}
            row |= {"rss_bytes": process.memory_info().rss, "tensor_bytes": live_tensor_bytes() - weights}
            rows.append(row | {"largest_cache_bytes": cycles.largest})
            cycles.largest = 0
    return rows


def slope_per_hour(rows: list[dict[str, Any]], column: str) -> float:
    """Of a line fitted to the rows, in MiB an hour."""
    hours, values = [row["seconds"] / 3600 for row in rows], [row[column] / MIB for row in rows]
    return round(statistics.linear_regression(hours, values).slope, 2)


def main() -> int:
    made = parser(__doc__, geometry="tiny", dtype="float32", layers=None)  # the model is soak's own
    made.add_argument("--minutes", type=float, default=20, help="of processor time (%(default)s)")
    made.add_argument("--bound", type=float, default=20, help="MiB an hour that resident memory may rise (%(default)s)")
    made.add_argument("--every", type=float, default=3, help="seconds of processor time between lines (%(default)s)")
    made.add_argument("--longest", type=int, default=500, help="tokens of the longest prompt (%(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.set_defaults(threads=1)
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = soak(build_model(), arguments)
    settled = [row for row in rows if row["seconds"] >= 15 * arguments.minutes]
    if len(settled) < 3:
        raise SystemExit(f"{len(rows)} lines are too few to fit; take more --minutes or fewer seconds --every")
    rise = slope_per_hour(settled, "rss_bytes")
    facts = {"rss_rise_mib_per_hour": rise, "tensor_rise_mib_per_hour": slope_per_hour(settled, "tensor_bytes")}
    store("soak", arguments, rows, **facts, passed=rise <= arguments.bound)
    return 0 if rise <= arguments.bound else 1


if __name__ == "__main__":
    raise SystemExit(main())
