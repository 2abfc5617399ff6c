"""Prompts for the tiny models of zoo.py: random words, left-padded, with an image in each where that is known.

`IMAGES` says for which model types, and in what form, an image goes in. The other types are measured on text alone,
which takes the same way through the decoder's attention and its cache. `decoder` and `ONE_TURN` name what is peculiar
to the types whose `generate` hands over to another model.
"""

from __future__ import annotations

import torch

from zoo import VOCABULARY, WORDS, names

IMAGES = {
    **dict.fromkeys(names("llava vipllava aya_vision cohere2_vision got_ocr2 internvl paligemma gemma3"), "square"),
    **dict.fromkeys(names("shieldgemma2 llama4 deepseek_vl ovis2 blip-2 instructblip kosmos-2 janus aria"), "square"),
    **dict.fromkeys(names("mistral3 lighton_ocr pixtral"), "sized"),
    **dict.fromkeys(names("qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe"), "patches"),
    **dict.fromkeys(names("glm4v glm4v_moe glm46v"), "patches"),
    **dict.fromkeys(names("idefics idefics2 idefics3 smolvlm"), "list"),
    **dict.fromkeys(names("llava_next llava_onevision"), "tiles"),
    "mllama": "mllama",
    "lfm2_vl": "shapes",
    "instructblipvideo": "frames",
}
"""How an image goes in, by model type."""

FIXED_TOKENS = {"mllama": 1, "kosmos-2": 4, "blip-2": 4, "instructblip": 4, "instructblipvideo": 16, "idefics": 0}
"""Tokens of an image, where the model's `get_image_features` does not tell."""

ONE_TURN = ("blip-2", "instructblip", "instructblipvideo", "kosmos-2", "idefics")
"""Models that want their image again in a second turn."""


def decoder(model, model_type):
    """The module whose forward each step calls: the model itself, or the language model that it hands over to."""
    if model_type in ("blip-2", "instructblip", "instructblipvideo"):
        return model.language_model
    return model.text_model if model_type == "kosmos-2" else model


def inputs(model_type, lengths, model, seed=0):
    """Left-padded prompts of these lengths (longer where an image leaves less than a dozen words)."""
    random = torch.Generator().manual_seed(seed)
    rows, images = [], []
    for length in lengths:
        row = torch.randint(WORDS.start, WORDS.stop, (length,), generator=random).tolist()
        if model_type in IMAGES:
            images.append(image(model_type, model.config, random))
            n = FIXED_TOKENS[model_type] if model_type in FIXED_TOKENS else count_tokens(model, images[-1])
            row[3 : 3 + n if n < length - 12 else 3] = [image_token(model.config)] * n
        rows.append(row)
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    made = {"input_ids": ids, "attention_mask": mask}
    if images:
        made |= {name: torch.cat([each[name] for each in images]) for name in images[0]}
        made |= beside(model_type, ids, mask, (ids == image_token(model.config)).long())
    return made


def image(model_type, config, random):
    """What the model takes for one image of 16 x 16 pixels, without the tokens that stand for it."""

    def pixels(*shape):
        return torch.randn(*shape, generator=random)

    kind = IMAGES[model_type]
    if kind == "patches":
        vision = config.vision_config
        size = vision.temporal_patch_size * 3 * vision.patch_size**2
        return {"pixel_values": pixels(32, size), "image_grid_thw": torch.tensor([[1, 4, 8]])}
    if kind == "tiles":
        return {"pixel_values": pixels(1, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32]])}
    if kind == "mllama":
        tiles = torch.tensor([[[1, 0, 0, 0]]])
        ratio = torch.tensor([[1]])
        return {"pixel_values": pixels(1, 1, 4, 3, 16, 16), "aspect_ratio_ids": ratio, "aspect_ratio_mask": tiles}
    if kind == "shapes":
        every = torch.ones(1, 16, dtype=torch.long)
        shapes = torch.tensor([[4, 4]])
        return {"pixel_values": pixels(1, 16, 48), "spatial_shapes": shapes, "pixel_attention_mask": every}
    if kind == "sized":
        return {"pixel_values": pixels(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    shape = {"square": (1, 3, 16, 16), "list": (1, 1, 3, 16, 16), "frames": (1, 4, 3, 16, 16)}[kind]
    return {"pixel_values": pixels(*shape)}


def image_token(config):
    """The token that stands for a piece of an image."""
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index", "video_token_index"))
    return next((token for token in found if isinstance(token, int)), VOCABULARY - 40)


def count_tokens(model, image):
    """How many tokens of the prompt an image stands for: as many as it has features."""
    owner = model if hasattr(model, "get_image_features") else model.model
    with torch.no_grad():
        features = owner.get_image_features(**image)
    if not isinstance(features, (torch.Tensor, list, tuple)):
        features = features.last_hidden_state if features.pooler_output is None else features.pooler_output
    pieces = [features] if isinstance(features, torch.Tensor) else features
    return sum(piece.numel() // piece.shape[-1] for piece in pieces)


def beside(model_type, ids, mask, is_image):
    """What some models want beside the ids and the pixels."""
    if model_type in ("gemma3", "shieldgemma2", "paligemma"):
        return {"token_type_ids": is_image}
    if IMAGES[model_type] == "patches":
        return {"mm_token_type_ids": is_image}
    if model_type.startswith("instructblip"):
        return {"qformer_input_ids": ids[:, :6]}
    if model_type == "kosmos-2":
        return {"image_embeds_position_mask": is_image}
    if model_type == "idefics":
        return {"image_attention_mask": mask[:, :, None]}
    if model_type == "mllama":
        return {"cross_attention_mask": mask[:, :, None, None] * torch.tensor([1, 0, 0, 0])}
    return {}
