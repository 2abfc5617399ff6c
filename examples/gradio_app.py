"""A chat in the browser with a slider for the budget. Needs gradio: `pip install gradio`.

    python examples/gradio_app.py
    python examples/gradio_app.py --model llava-hf/llava-1.5-7b-hf

`reply` is the application; the line with `PrefixKVCache` is all that this library adds to it.
"""

import argparse
from pathlib import Path

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.tools.demo import scenes
from prefixkv_cache.tools.loading import load_model, open_image

SCENE_LLAVA = Path(__file__).resolve().parent.parent / "models" / "scene-llava"
ONE_LINE = """
**The whole change in the application:**

```python
cache = PrefixKVCache.for_model(model, budget, inputs=inputs)
out = model.generate(**inputs, past_key_values=cache)
```
"""


def reply(model, processor, image, history, question, budget, max_new_tokens=128):
    """Answer the last question of a conversation about a picture; returns the answer and what the cache held."""
    said = [*history, {"role": "user", "content": question}]
    messages = [{"role": each["role"], "content": [{"type": "text", "text": each["content"]}]} for each in said]
    messages[0]["content"].insert(0, {"type": "image"})
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt").to(model.device)

    cache = PrefixKVCache.for_model(model, budget, inputs=inputs)  # the one line that is new
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)

    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    stored = cache.stored_lengths()
    seen = cache.get_seq_length()
    mean = sum(stored) / len(stored)
    facts = f"{seen} tokens seen, {mean:.0f} pairs a head kept ({mean / seen:.0%}): {min(stored)} to {max(stored)}"
    return answer, facts


def build_app(model, processor, image):
    """The page: picture and budget on the left, the conversation on the right."""
    import gradio as gr

    def ask(question, history, picture, budget):
        history = [{"role": each["role"], "content": _text(each["content"])} for each in history]
        if not question.strip():
            return history, "", ""
        answer, facts = reply(model, processor, picture, history, question, budget)
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return history + said, "", facts

    with gr.Blocks(title="prefixkv-cache") as app:
        gr.Markdown("# Ask about a picture, with a pruned KV cache")
        with gr.Row():
            with gr.Column(scale=1):
                picture = gr.Image(image, type="pil", label="Picture", height=280)
                budget = gr.Slider(0.05, 1.0, 0.5, step=0.05, label="Budget", info="fraction of the KV pairs kept")
            with gr.Column(scale=2):
                chat = gr.Chatbot(label="Conversation", height=420)
                question = gr.Textbox(label="Question", placeholder="what is at the bottom right?", submit_btn=True)
                facts = gr.Textbox(label="The cache at the end of the answer", interactive=False)
        gr.Markdown(ONE_LINE)
        question.submit(ask, [question, chat, picture, budget], [chat, question, facts], api_name="ask")
        picture.change(lambda: ([], ""), None, [chat, facts], api_name=False)
    return app


def _text(content):
    """What was said, as gradio gives it back: a text, or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


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
