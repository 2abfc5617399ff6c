"""How far a profile from few samples lies from one of many, on the repo's own VLM.

    python benchmarks/sample_size.py

The reference takes one half of the records; profiles of n samples are drawn from the other half, several times. Prints
a table of differences of keep ratios, fractions kept.
"""

from __future__ import annotations

import argparse
import random

import torch

from prefixkv_cache import calibrate
from prefixkv_cache.bundled import bundled_dir
from prefixkv_cache.demo import scenes
from prefixkv_cache.loading import load_model, prepare

SIZES = (1, 2, 5, 10, 20)
BUDGETS = (0.1, 0.2, 0.5)


def sample(processor, number: int) -> dict:
    """Inputs of one scene: a description for even numbers, a question for odd ones."""
    seed = scenes.VALIDATION_SEEDS[number]
    scene = scenes.draw_scene(seed)
    asked = scenes.questions(scene, seed)
    prompt = scenes.DESCRIBE_PROMPTS[0] if number % 2 == 0 else asked[number // 2 % len(asked)].text
    return dict(prepare(processor, [(prompt, [scene.image])]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=int, default=200, help="samples of the reference")
    parser.add_argument("--draws", type=int, default=20, help="profiles for each size")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = load_model(str(bundled_dir("models") / "scene-llava"), device="cpu")
    half = arguments.reference
    samples = [sample(processor, number) for number in range(2 * half)]
    reference = calibrate(model, samples[:half], budgets=(*BUDGETS, 1.0))
    print(f"reference: {half} samples; {arguments.draws} profiles for each size; mean (worst) over the profiles")
    print(f"{'samples':>7}" + "".join(f"   budget {budget}: mean layer, worst layer" for budget in BUDGETS))
    chance = random.Random(0)
    for size in SIZES:
        means, worst = [], []
        for _ in range(arguments.draws):
            chosen = [samples[half + at] for at in chance.sample(range(half), size)]
            drawn = calibrate(model, chosen, budgets=(*BUDGETS, 1.0))
            apart = [(drawn.keep_ratios(budget) - reference.keep_ratios(budget)).abs() for budget in BUDGETS]
            means.append([float(each.mean()) for each in apart])
            worst.append([float(each.max()) for each in apart])
        cells = [
            f"{sum(m[at] for m in means) / len(means):.3f} ({max(m[at] for m in means):.3f}), "
            f"{sum(w[at] for w in worst) / len(worst):.3f} ({max(w[at] for w in worst):.3f})"
            for at in range(len(BUDGETS))
        ]
        print(f"{size:>7}   " + "   ".join(cells))


if __name__ == "__main__":
    main()
