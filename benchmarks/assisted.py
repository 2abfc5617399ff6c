"""Prompt look-up with the pruned cache beside `DynamicCache`: time of a token, and how many tokens a forward confirms.

    python benchmarks/assisted.py [--budgets 0.5,0.2] [--candidates 5] [--turns 3] [--threads 1]

SmolLM2-135M-Instruct is asked to repeat a passage, which is what look-up is good at. Every variant writes as many
tokens as the others, whatever they are, and `same_tokens` compares each with itself without look-up. Times are those
of `generate`, prompt included; the part of the prompt is `prompt_milliseconds`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, fractions, ratio, store
from study import load
from transformers import DynamicCache

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.tools.tasks.passages import passages


def prompt_of(tokenizer: Any, length: int) -> torch.Tensor:
    """The request to repeat a passage."""
    text = f"Repeat the following text, word for word.\n\n{passages('report')[0][:length]}"
    turns = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return torch.tensor([tokenizer(chat, add_special_tokens=False)["input_ids"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=fractions, default=[0.5, 0.2])
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--length", type=int, default=1700, help="characters of the passage")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.device = "cpu"
    model, tokenizer = load()
    ids = prompt_of(tokenizer, options.length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    n = options.new_tokens
    settings = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, "eos_token_id": None}
    caches: dict[str, Any] = {"DynamicCache": lambda: DynamicCache(config=model.config)}
    for budget in options.budgets:
        caches[f"budget {budget}"] = lambda budget=budget: PrefixKVCache.for_model(model, budget)
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))

    def write(name: str, look_up: bool) -> tuple[float, float, torch.Tensor, int]:
        """Wall and processor time of `generate`, the answer, and how many forwards it took."""
        cache, more = caches[name](), {"prompt_lookup_num_tokens": options.candidates} if look_up else {}
        forwards.clear()
        wall, processor = time.perf_counter(), time.process_time()
        found = model.generate(**inputs, past_key_values=cache, **settings, **more)
        return time.perf_counter() - wall, time.process_time() - processor, found[0, ids.shape[1] :], len(forwards)

    times: dict[str, list[tuple[float, float]]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in caches:
        (*_, plain, _), (*_, assisted, n_forwards) = write(name, False), write(name, True)
        facts[name] = {"same_tokens": bool(plain.equal(assisted)), "tokens_a_forward": round(n / n_forwards, 2)}
    for _ in range(options.turns):
        for name in caches:
            for look_up in (False, True):
                wall, processor, *_ = write(name, look_up)
                times.setdefault(name + ", look-up" * look_up, []).append((wall, processor))
    rows = [{**ratio(times, each, "DynamicCache"), **facts[each.removesuffix(", look-up")]} for each in times]
    start = time.perf_counter()
    with torch.no_grad():
        model(**inputs, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    store(
        "assisted", options, rows, tokens=ids.shape[1], prompt_milliseconds=round(1e3 * (time.perf_counter() - start))
    )


if __name__ == "__main__":
    main()
