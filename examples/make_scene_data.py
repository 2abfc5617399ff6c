"""Write drawn scenes as files: pictures and a JSON in the conversation layout of LLaVA, for `prefixkv calibrate`.

    python examples/make_scene_data.py --out out/scenes --count 200

Even records ask for a description, odd ones a short question. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from prefixkv_cache.demo import scenes

SPLITS = {"train": scenes.TRAIN_SEEDS, "validation": scenes.VALIDATION_SEEDS, "test": scenes.TEST_SEEDS}


def record(seed: int, number: int, name: str) -> tuple[scenes.Scene, dict]:
    """The scene of this seed and one conversation about it."""
    scene = scenes.draw_scene(seed)
    if number % 2 == 0:
        prompt, reference = scenes.DESCRIBE_PROMPTS[number // 2 % len(scenes.DESCRIBE_PROMPTS)], scenes.describe(scene)
    else:
        asked = scenes.questions(scene, seed)
        question = asked[number // 2 % len(asked)]
        prompt, reference = question.text, question.answer
    turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": reference}]
    return scene, {"id": str(seed), "image": name, "conversations": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures and scenes.json")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--split", choices=SPLITS, default="validation")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(arguments.count):
        seed = SPLITS[arguments.split][number]
        scene, entry = record(seed, number, f"{seed}.png")
        scene.image.save(arguments.out / entry["image"])
        records.append(entry)
    temporary = arguments.out / ".scenes.json.tmp"
    temporary.write_text(json.dumps(records, indent=1), encoding="utf-8")
    os.replace(temporary, arguments.out / "scenes.json")
    print(f"{arguments.count} scenes of the {arguments.split} split in {arguments.out}")


if __name__ == "__main__":
    main()
