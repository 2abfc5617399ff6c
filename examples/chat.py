"""A conversation about one picture, on one pruned cache: each turn adds to it, nothing is computed twice.

    python examples/chat.py                                            # asks for your questions
    python examples/chat.py --say "what is at the bottom right?" --say "what colour is it?"

An empty line, or the end of the input, ends the conversation. What a turn has pruned is gone for the turns after it:
see --budget.
"""

import argparse
import sys
from pathlib import Path

import torch

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.tools.arguments import budget, positive
from prefixkv_cache.tools.demo import scenes
from prefixkv_cache.tools.loading import load_model, open_image

SCENE_LLAVA = Path(__file__).resolve().parent.parent / "models" / "scene-llava"


class Chat:
    """One conversation: the messages so far, their tokens, and the cache that holds what is left of them."""

    def __init__(self, model, processor, image, budget):
        self.model, self.processor, self.image, self.budget = model, processor, image, budget
        self.messages, self.ids, self.cache = [], None, None

    def ask(self, question, max_new_tokens=128):
        """The model's answer; the cache has then seen all of the conversation but the answer's last token."""
        first = self.ids is None
        content = [{"type": "image"}] * first + [{"type": "text", "text": question}]
        before = "" if first else self.processor.apply_chat_template(self.messages)
        self.messages.append({"role": "user", "content": content})
        text = self.processor.apply_chat_template(self.messages, add_generation_prompt=True)
        if first:
            inputs = self.processor(images=self.image, text=text, return_tensors="pt")
        else:
            if not text.startswith(before):
                raise ValueError("this model's chat template rewrites earlier turns, so they cannot be continued")
            # The picture is in the cache already; only the new turn's words are tokenized, and follow what was said.
            new = self.processor.tokenizer(text[len(before) :], add_special_tokens=False, return_tensors="pt")
            ids = torch.cat([self.ids, new["input_ids"].to(self.ids.device)], dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if first:
            self.cache = PrefixKVCache.for_model(self.model, self.budget, inputs=inputs)
        self.ids = self.model.generate(
            **inputs, past_key_values=self.cache, max_new_tokens=max_new_tokens, do_sample=False
        )
        answer = self.processor.decode(self.ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return answer


def questions():
    """What is typed, line by line."""
    while True:
        try:
            question = input("you: ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        yield question


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(SCENE_LLAVA), help="folder or hub id")
    parser.add_argument("--image", help="a picture; default: a drawn scene")
    parser.add_argument("--budget", type=budget, default=0.5, help="0.3 of each prompt's KV pairs, or 512 a head")
    parser.add_argument("--say", action="append", metavar="TEXT", help="a question, instead of asking for them")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    arguments = parser.parse_args(argv)

    image = open_image(arguments.image) if arguments.image else scenes.draw_scene(scenes.TEST_SEEDS[17]).image
    chat = Chat(*load_model(arguments.model), image, arguments.budget)
    for question in arguments.say or questions():
        if arguments.say:
            print(f"you: {question}")
        print(f"model: {chat.ask(question, arguments.max_new_tokens)}")
        stored = chat.cache.stored_lengths()
        mean = sum(stored) / len(stored)
        print(f"    {chat.cache.get_seq_length()} tokens seen, {mean:.0f} pairs a head", file=sys.stderr)


if __name__ == "__main__":
    main()
