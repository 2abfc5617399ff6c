"""Several pictures and questions in one padded batch; every row keeps what it would keep alone.

python examples/batch.py
python examples/batch.py --model M --image a.png --prompt "What is this?" --image b.png --prompt "Where is the cat?"
"""

import argparse
from pathlib import Path

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.tools.arguments import budget, positive
from prefixkv_cache.tools.demo import scenes
from prefixkv_cache.tools.loading import load_model, open_image, prepare

SCENE_LLAVA = Path(__file__).resolve().parent.parent / "models" / "scene-llava"
QUESTIONS = ("what is at the bottom right?", "describe the scene.", "how many objects are there?")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(SCENE_LLAVA), help="folder or hub id")
    parser.add_argument("--image", action="append", help="a picture for each row; default: drawn scenes")
    parser.add_argument("--prompt", action="append", help="a question for each row")
    parser.add_argument("--budget", type=budget, default=0.5, help="0.3 of the KV pairs, or 512 a head")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    arguments = parser.parse_args(argv)

    prompts = arguments.prompt or QUESTIONS
    if arguments.image:
        pictures = [open_image(path) for path in arguments.image]
    else:
        pictures = [scenes.draw_scene(seed).image for seed in scenes.TEST_SEEDS[17 : 17 + len(prompts)]]
    if len(pictures) != len(prompts):
        parser.error(f"{len(pictures)} pictures and {len(prompts)} prompts; give one of each for every row")

    model, processor = load_model(arguments.model)
    requests = [(prompt, [picture]) for prompt, picture in zip(prompts, pictures, strict=True)]
    inputs = prepare(processor, requests, model.device)  # padded on the left
    cache = PrefixKVCache.for_model(model, arguments.budget, inputs=inputs)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=arguments.max_new_tokens, do_sample=False)

    answers = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        kept = [(cache.kept_positions(layer)[row] >= 0).sum(-1) for layer in range(len(cache))]  # -1: nothing there
        stored = [round(pairs.float().mean().item()) for pairs in kept]  # where each head keeps its own: their mean
        print(f"{prompt}\n    {answer.strip()}\n    pairs a head by layer: {stored}")


if __name__ == "__main__":
    main()
