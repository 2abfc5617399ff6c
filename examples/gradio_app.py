"""A chat in the browser about a picture that is compressed once. Needs gradio: the extra `examples`.

    python examples/gradio_app.py
    python examples/gradio_app.py --model llava-hf/llava-1.5-7b-hf

`Picture` is the application; the lines with `cache` are all that this library adds to it. Each question is asked of a
copy of the compressed cache: of the picture alone, not of what was said before. The picture is read again when it, or
the budget, has changed.
"""

import argparse
from pathlib import Path
from threading import Lock, Thread

from transformers import TextIteratorStreamer

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.tools.answer import full_bytes, say_bytes
from prefixkv_cache.tools.demo import scenes
from prefixkv_cache.tools.loading import load_model, open_image
from prefixkv_cache.tools.questions import context_inputs, tokenizer_of

SCENE_LLAVA = Path(__file__).resolve().parent.parent / "models" / "scene-llava"
TWO_LINES = """
**The whole change in the application:**

```python
cache = PrefixKVCache.compress(model, inputs, budget)                    # the picture, once
out = model.generate(**inputs_with_more, past_key_values=cache.copy())   # every question
```
"""


class Picture:
    """A picture that was read and pruned, ready to be asked.

    Args:
        model, processor: as `load_model` returns them.
        image: the picture.
        budget: what is kept of its KV pairs.
    """

    def __init__(self, model, processor, image, budget):
        self.model, self.tokenizer = model, tokenizer_of(processor)
        inputs, self.questions = context_inputs(processor, "", [image], model.device)
        self.cache = PrefixKVCache.compress(model, inputs, budget)
        self.ids = inputs["input_ids"]

    def answer(self, question, max_new_tokens=128):
        """The answer so far, again and again until it is whole."""
        turn, cache = self.questions.behind(self.ids, question), self.cache.copy()
        cache.restore_positions(self.model)  # another picture may have been read in between
        words = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def speak():
            try:
                self.model.generate(
                    **turn, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False, streamer=words
                )
            finally:  # after an error, too: nobody waits for ever
                words.end()

        thread = Thread(target=speak)
        thread.start()
        said = ""
        for piece in words:
            said += piece
            yield said.strip()
        thread.join()

    def facts(self):
        """What the cache holds."""
        stored, cache = self.cache.stored_lengths(), self.cache
        mean = sum(stored) / len(stored)
        return (
            f"{cache.get_seq_length()} tokens seen, {mean:.0f} pairs a head kept ({min(stored)} to {max(stored)} by "
            f"layer), KV {say_bytes(cache.nbytes, full_bytes(cache))}"
        )


def build_app(model, processor, image):
    """The page: picture and budget on the left, the conversation on the right."""
    import gradio as gr

    one_at_a_time = Lock()  # some models hold the positions of the picture that they read last

    def ask(question, history, picture, budget, read):
        if not question.strip() or picture is None:
            yield history, "", "Give a picture and a question.", read
            return
        with one_at_a_time:
            key = (picture.size, picture.tobytes(), budget)
            if read is None or read[0] != key:
                read = (key, Picture(model, processor, picture, budget))
            said = [*history, {"role": "user", "content": question}]
            for answer in read[1].answer(question):
                yield [*said, {"role": "assistant", "content": answer}], "", read[1].facts(), read

    with gr.Blocks(title="prefixkv-cache") as app:
        gr.Markdown("# Ask about a picture that was compressed once")
        read = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1):
                picture = gr.Image(image, type="pil", label="Picture", height=280)
                budget = gr.Slider(0.05, 1.0, 0.5, step=0.05, label="Budget", info="fraction of the KV pairs kept")
            with gr.Column(scale=2):
                chat = gr.Chatbot(label="Questions and answers", height=420)
                question = gr.Textbox(label="Question", placeholder="what is at the bottom right?", submit_btn=True)
                facts = gr.Textbox(label="The compressed cache", interactive=False)
        gr.Markdown(TWO_LINES)
        question.submit(ask, [question, chat, picture, budget, read], [chat, question, facts, read], api_name="ask")
        picture.change(lambda: ([], ""), None, [chat, facts], api_name=False)
    return app


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(SCENE_LLAVA), help="folder or hub id")
    parser.add_argument("--image", help="the first picture; default: a drawn scene")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args(argv)

    image = open_image(arguments.image) if arguments.image else scenes.draw_scene(scenes.TEST_SEEDS[17]).image
    build_app(*load_model(arguments.model), image).launch(server_port=arguments.port)


if __name__ == "__main__":
    main()
