"""One picture, one question, three caches: what changes in a program is one line.

    python examples/quickstart.py
    python examples/quickstart.py --model llava-hf/llava-1.5-7b-hf --image cat.png --prompt "What is this?"

By default it asks the small model of this repository about a drawn scene, so that it runs anywhere, with no download.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.tools.demo import scenes

SCENE_LLAVA = Path(__file__).resolve().parent.parent / "models" / "scene-llava"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(SCENE_LLAVA), help="folder or hub id")
    parser.add_argument("--image", help="a picture; default: a drawn scene")
    parser.add_argument("--prompt", default="what is at the bottom right?")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args(argv)

    # Your application, as it is.
    device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
    processor = AutoProcessor.from_pretrained(arguments.model)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    image = Image.open(arguments.image) if arguments.image else scenes.draw_scene(scenes.TEST_SEEDS[17]).image
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": arguments.prompt}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt").to(device)

    for budget in (1.0, 0.5, 0.2):
        cache = PrefixKVCache.for_model(model, budget, inputs=inputs)  # the one line that is new
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=arguments.max_new_tokens, do_sample=False)

        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        print(f"budget {budget:g}: {answer}")
        print(f"    {cache.get_seq_length()} tokens seen, pairs a head by layer: {cache.stored_lengths()}")


if __name__ == "__main__":
    main()
