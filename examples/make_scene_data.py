"""Write drawn pictures as files, with a JSON in LLaVA's conversation layout, for `prefixkv calibrate`.

    python examples/make_scene_data.py --out out/scenes --count 400
    python examples/make_scene_data.py --task boards --out out/boards --count 400

Even records ask for a description, odd ones a short question. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from prefixkv_cache.profiles.files import write_atomically
from prefixkv_cache.tools.arguments import positive
from prefixkv_cache.tools.demo import boards, pages, scenes

TASKS: dict[str, tuple[Any, Any]] = {
    "scenes": (scenes, scenes.draw_scene),
    "boards": (boards, boards.draw_board),
    "pages": (pages, pages.draw_page),
}


def splits(source: Any) -> dict[str, range]:
    return {"train": source.TRAIN_SEEDS, "validation": source.VALIDATION_SEEDS, "test": source.TEST_SEEDS}


def record(task: str, seed: int, number: int, name: str) -> tuple[Any, dict]:
    """The picture of this seed and one conversation about it."""
    source, draw = TASKS[task]
    drawn = draw(seed)
    if number % 2 == 0:
        prompt, reference = source.DESCRIBE_PROMPTS[number // 2 % len(source.DESCRIBE_PROMPTS)], source.describe(drawn)
    else:
        asked = source.questions(drawn, seed)
        question = asked[number // 2 % len(asked)]
        prompt, reference = question.text, question.answer
    turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": reference}]
    return drawn, {"id": str(seed), "image": name, "conversations": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures and the JSON")
    parser.add_argument("--task", choices=TASKS, default="scenes", help="what is drawn; the JSON is named so")
    parser.add_argument("--count", type=positive, default=200)
    parser.add_argument("--split", choices=splits(scenes), default="validation")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(arguments.count):
        seed = splits(TASKS[arguments.task][0])[arguments.split][number]
        drawn, entry = record(arguments.task, seed, number, f"{seed}.png")
        drawn.image.save(arguments.out / entry["image"])
        records.append(entry)
    write_atomically(arguments.out / f"{arguments.task}.json", json.dumps(records, indent=1))
    print(f"{arguments.count} {arguments.task} of the {arguments.split} split in {arguments.out}")


if __name__ == "__main__":
    main()
