"""One picture or document, many questions: it is compressed once, and every question is asked of a copy.

    python examples/compress.py
    python examples/compress.py --model llava-hf/llava-1.5-7b-hf --image menu.png --question "What is the soup?"

The same on the command line, with a file between: `prefixkv compress` and `prefixkv generate --cache`.
"""

import argparse
from pathlib import Path

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.tools.arguments import budget, positive
from prefixkv_cache.tools.demo import scenes
from prefixkv_cache.tools.loading import load_model, open_image
from prefixkv_cache.tools.questions import context_inputs, tokenizer_of

SCENE_LLAVA = Path(__file__).resolve().parent.parent / "models" / "scene-llava"
QUESTIONS = ("what is at the bottom right?", "what colour is the circle?", "describe the scene.")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(SCENE_LLAVA), help="folder or hub id")
    parser.add_argument("--image", help="a picture; default: a drawn scene")
    parser.add_argument("--prefix", default="", help="text before every question: instructions, or a document")
    parser.add_argument("--question", action="append", help="may be repeated")
    parser.add_argument("--budget", type=budget, default=0.5, help="0.3 of the KV pairs, or 512 a head")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    arguments = parser.parse_args(argv)

    image = open_image(arguments.image) if arguments.image else scenes.draw_scene(scenes.TEST_SEEDS[17]).image
    model, processor = load_model(arguments.model)
    inputs, questions = context_inputs(processor, arguments.prefix, [image], model.device)

    cache = PrefixKVCache.compress(model, inputs, arguments.budget)  # once
    print(f"{cache.get_seq_length()} tokens seen, pairs a head by layer: {cache.stored_lengths()}")

    for question in arguments.question or QUESTIONS:
        turn = questions.behind(inputs["input_ids"], question)
        out = model.generate(  # a copy shares the context's memory until it is written to
            **turn, past_key_values=cache.copy(), max_new_tokens=arguments.max_new_tokens, do_sample=False
        )
        new = out[0, turn["input_ids"].shape[1] :]
        print(f"{question}\n    {tokenizer_of(processor).decode(new, skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    main()
