"""Asking the repository's own models, with the full cache."""

from transformers import DynamicCache


def prompts(processor, items):
    """Left-padded inputs for (picture, prompt) pairs, made as a user of the chat template makes them."""
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for _, text in items]
    texts = [processor.apply_chat_template(message, add_generation_prompt=True) for message in messages]
    return processor(images=[picture.image for picture, _ in items], text=texts, padding=True, return_tensors="pt")


def replies(model, processor, items):
    inputs = prompts(processor, items)
    out = model.generate(**inputs, past_key_values=DynamicCache(config=model.config))
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
