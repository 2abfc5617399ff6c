"""What pruning costs in right answers, on held-out scenes of the repo's own VLM: a first look, not a study.

    python benchmarks/quality.py --scenes 100

Descriptions are scored by the share of objects described right (size, colour, shape and place), questions (what is at
a place, colour, size: the kinds that the model answers right with the full cache) by exact match. Greedy, in batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from prefixkv_cache import PAPER, PrefixKVCache
from prefixkv_cache.bundled import bundled_dir
from prefixkv_cache.demo import scenes
from prefixkv_cache.loading import load_model, prepare

BUDGETS = (0.7, 0.5, 0.3, 0.2, 0.1)
KINDS = ("object", "colour", "size")
WINDOW = {**PAPER, "queries": 32}  # the paper's rule, but for whose attention counts
METHODS = {
    "default, profile": {"profile": "scene-llava"},
    "default, search": {},
    "window of 32, profile": {**WINDOW, "profile": "scene-llava"},
    "window of 32, profile, distance=None": {**WINDOW, "profile": "scene-llava", "distance": None},
    "window of 32, search": WINDOW,
    "window of 8, search": {**WINDOW, "queries": 8},
    "the paper's rule, search": PAPER,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = load_model(str(bundled_dir("models") / "scene-llava"), device="cpu")
    drawn = [scenes.draw_scene(seed) for seed in scenes.TEST_SEEDS[1000 : 1000 + arguments.scenes]]
    asked = [next(q for q in scenes.questions(scene, 1) if q.kind in KINDS) for scene in drawn]

    def answers(prompts: list[str], make: Callable[[], Cache], max_new_tokens: int) -> list[str]:
        texts = []
        for start in range(0, len(drawn), arguments.batch_size):
            rows = slice(start, start + arguments.batch_size)
            requests = [(prompt, [scene.image]) for prompt, scene in zip(prompts[rows], drawn[rows], strict=True)]
            inputs = prepare(processor, requests)
            out = model.generate(
                **inputs, past_key_values=make(), do_sample=False, max_new_tokens=max_new_tokens
            )  # fmt: skip
            new = out[:, inputs["input_ids"].shape[1] :]
            texts += processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def scores(make: Callable[[], Cache]) -> str:
        described = answers([scenes.DESCRIBE_PROMPTS[0]] * len(drawn), make, 110)
        answered = answers([question.text for question in asked], make, 12)
        objects = sum(scenes.object_accuracy(text, scene) for text, scene in zip(described, drawn, strict=True))
        right = sum(scenes.answer_matches(text, question) for text, question in zip(answered, asked, strict=True))
        return f"{objects / len(drawn):.2f} / {right / len(drawn):.2f}"

    print(f"{len(drawn)} held-out scenes; objects described right / questions answered right\n")
    full = scores(lambda: DynamicCache(config=model.config))
    print(f"| full cache: {full} | " + " | ".join(f"{budget:.0%}" for budget in BUDGETS) + " |")
    print("| --- |" + " --- |" * len(BUDGETS))
    for name, options in METHODS.items():
        cells = [
            scores(lambda b=budget, o=options: PrefixKVCache(budget=b, config=model.config, **o)) for budget in BUDGETS
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
