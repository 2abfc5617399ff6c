r"""Several questions about one compressed picture: how many answers are those of the full cache.

    python benchmarks/pictures.py [--pictures 20] [--questions 4] [--budgets 0.5,0.2,0.1] [--threads 1]
    python benchmarks/pictures.py --models scenes=out/whole/smol-llava,pages=out/whole/smol-llava \
        --profile smollm2-135m-instruct

On pictures of the test split: of both models of this repository that are whole, or what `--models` says. The picture is
compressed before anybody asks, and each question is asked of a copy:

- `compress`: two passes, one pool of all scores;
- `compress, profile`: two passes, the lengths of the bundled profile;
- `one pass, default` and `one pass, profile`: the picture is read once, ranked by the default method;
- `question known`: for comparison, one pass over picture and question together, as `PrefixKVCache.for_model` does it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, fractions, store

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.methods import DEFAULT
from prefixkv_cache.tools.answer import answer
from prefixkv_cache.tools.demo import boards, pages, scenes
from prefixkv_cache.tools.loading import load_model, prepare
from prefixkv_cache.tools.questions import context_inputs

MODELS = Path(__file__).resolve().parents[1] / "models"
DRAWN = {
    "scenes": (scenes, scenes.draw_scene),
    "boards": (boards, boards.draw_board),
    "pages": (pages, pages.draw_page),
}
WAYS: dict[str, dict[str, Any]] = {
    "compress": {},
    "compress, profile": {"profile": True},
    "one pass, default": {"method": DEFAULT},
    "one pass, profile": {"method": DEFAULT, "profile": True},
}
NEW_TOKENS = 96


def asked(module: Any, drawn: Any, n: int) -> list[str]:
    """Questions of different kinds, and the request to describe."""
    kinds = {question.kind: question.text for question in module.questions(drawn)}
    return [module.DESCRIBE_PROMPTS[0], *kinds.values()][:n]


def measure(data: str, folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model on one kind of pictures."""
    module, draw = DRAWN[data]
    model, processor = load_model(folder, device="cpu", dtype="float32")
    name = Path(folder).name
    same: dict[tuple[str, float], list[bool]] = defaultdict(list)
    held: dict[tuple[str, float], list[float]] = defaultdict(list)
    for seed in module.TEST_SEEDS[: options.pictures]:
        drawn = draw(seed)
        prompts = asked(module, drawn, options.questions)
        prompted = {text: prepare(processor, [(text, [drawn.image])]) for text in prompts}

        def known(text: str, budget: float, inputs: Any = prompted) -> tuple[str, int]:
            given = {"profile": options.profile} if options.profile else {}
            cache = PrefixKVCache.for_model(model, budget, inputs=inputs[text], **given)
            result = answer(model, processor, inputs[text], cache, NEW_TOKENS)
            return result.text, result.prompt_nbytes

        wanted = {text: known(text, 1.0) for text in prompts}
        for budget in options.budgets:
            for text in prompts:
                said, nbytes = known(text, budget)
                same["question known", budget].append(said == wanted[text][0])
                held["question known", budget].append(nbytes / wanted[text][1])
        inputs, questions = context_inputs(processor, "", [drawn.image])
        whole = PrefixKVCache.compress(model, inputs, 1.0).nbytes
        for way, chosen in WAYS.items():
            for budget in options.budgets:
                given = {**chosen, **({"profile": options.profile or name} if "profile" in chosen else {})}
                cache = PrefixKVCache.compress(model, inputs, budget, **given)
                held[way, budget].append(cache.nbytes / whole)
                for text in prompts:
                    cache.restore_positions(model)
                    turn = questions.behind(inputs["input_ids"], text)
                    said = answer(model, processor, turn, cache.copy(), NEW_TOKENS).text
                    same[way, budget].append(said == wanted[text][0])
    rows = [
        {
            "model": name,
            "data": data,
            "way": way,
            "budget": budget,
            "same": round(sum(found) / len(found), 3),
            "answers": len(found),
        }
        for (way, budget), found in same.items()
    ]
    for row in rows:
        of_way = held[row["way"], row["budget"]]
        row["nbytes_of_full"] = round(sum(of_way) / len(of_way), 3)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = f"scenes={MODELS / 'scene-llava'},boards={MODELS / 'board-qwen2-vl'}"
    parser.add_argument("--models", default=own, help="pictures=folder, with commas between")
    parser.add_argument("--profile", help="file or bundled name (default: the bundled one named as the folder)")
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--questions", type=int, default=4, help="about each, the first is to describe it")
    parser.add_argument("--budgets", type=fractions, default=[0.5, 0.2, 0.1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder that the result is added to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for each in options.models.split(",") for row in measure(*each.split("=", 1), options)]
    store("pictures", options, rows)


if __name__ == "__main__":
    main()
