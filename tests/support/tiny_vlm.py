"""A tiny LLaVA in a folder, with a processor of its own: what the commands load as they load any model."""

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from compat import CLIPImageProcessorPil

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>"]
WORDS = ["what", "is", "there", "in", "the", "picture", "a", "red", "blue", "green", "circle", "square", "?", "."]
TEMPLATE = (
    "<bos>{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZE, PATCH = 32, 4  # 64 image tokens


def save_model(folder, seed=5, layers=3):
    """Write model and processor; returns the folder as a string."""
    tokens = Tokenizer(models.WordLevel({t: i for i, t in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, padding_side="left", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>", additional_special_tokens=SPECIAL[4:], model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(SPECIAL + WORDS), max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, image_seq_length=64)
        )
        for name, parameter in model.named_parameters():
            if "vision" not in name and parameter.dim() > 1:  # a fresh model's attention is uniform
                parameter.data.normal_(std=0.25)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def save_pictures(folder, n):
    """Write `n` little pictures, all different; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"picture-{index}.png" for index in range(n)]
    for index, name in enumerate(names):
        picture = Image.effect_noise((40, 36), 20 + 30 * index).convert("RGB")
        picture.putpixel((index, index), (255, 0, 0))
        picture.save(folder / name)
    return names
