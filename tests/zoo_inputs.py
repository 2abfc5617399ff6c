"""Prompts for the tiny models of zoo.py: random words, left-padded, with an image in each where that is known.

`IMAGES` says for which model types, and in what form, an image goes in; the other types are measured on text alone,
which takes the same way through the decoder's attention and its cache.
"""

from __future__ import annotations

import torch

from zoo import VOCABULARY, WORDS, names

# How an image goes into the model, by model type; the rest is tested with text alone.
IMAGES = {
    **dict.fromkeys(
        names("llava vipllava aya_vision cohere2_vision got_ocr2 internvl paligemma gemma3 shieldgemma2 llama4 deepseek_vl ovis2 blip-2 instructblip kosmos-2 lighton_ocr mistral3 janus aria"), "square"),
    **dict.fromkeys(names("qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe glm4v glm4v_moe glm46v"), "patches"),
    **dict.fromkeys(names("idefics idefics2 idefics3 smolvlm"), "list"),
    **dict.fromkeys(names("llava_next llava_onevision"), "tiles"),
    "mllama": "mllama",
    "lfm2_vl": "siglip2",
    "instructblipvideo": "video",
}  # fmt: skip


FIXED_TOKENS = {"mllama": 1, "kosmos-2": 4, "blip-2": 4, "instructblip": 4, "instructblipvideo": 16, "idefics": 0}


def pixels(model_type, config, random):
    """What the model takes for one image, without the tokens that stand for it."""
    vision, kind = getattr(config, "vision_config", None), IMAGES[model_type]
    if kind == "patches":
        size = vision.temporal_patch_size * 3 * vision.patch_size**2
        return {"pixel_values": torch.randn(32, size, generator=random), "image_grid_thw": torch.tensor([[1, 4, 8]])}
    if kind == "list":
        return {"pixel_values": torch.randn(1, 1, 3, 16, 16, generator=random)}
    if kind == "tiles":
        return {"pixel_values": torch.randn(1, 3, 3, 16, 16, generator=random), "image_sizes": torch.tensor([[16, 32]])}
    if kind == "mllama":
        return {
            "pixel_values": torch.randn(1, 1, 4, 3, 16, 16, generator=random),
            "aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
        }  # fmt: skip
    if kind == "video":
        return {"pixel_values": torch.randn(1, 4, 3, 16, 16, generator=random)}
    if kind == "siglip2":
        return {
            "pixel_values": torch.randn(1, 16, 48, generator=random), "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        }  # fmt: skip
    made = {"pixel_values": torch.randn(1, 3, 16, 16, generator=random)}
    if model_type in ("mistral3", "lighton_ocr"):
        made["image_sizes"] = torch.tensor([[16, 16]])
    return made


ONE_TURN = ("blip-2", "instructblip", "instructblipvideo", "kosmos-2", "idefics")
"""Models that want their image again in a second turn, or whose `generate` returns the new tokens only."""


def decoder(model, model_type):
    """The module whose forward each step calls: the model itself, or the language model that it hands over to."""
    if model_type in ("blip-2", "instructblip", "instructblipvideo"):
        return model.language_model
    return model.text_model if model_type == "kosmos-2" else model


def inputs(model_type, lengths, model=None, seed=0):
    """Left-padded prompts of these lengths; with an image in each where `IMAGES` knows how."""
    random = torch.Generator().manual_seed(seed)
    rows, images = [], []
    for length in lengths:
        row = torch.randint(WORDS.start, WORDS.stop, (length,), generator=random).tolist()
        if model_type in IMAGES:
            images.append(pixels(model_type, model.config, random))
            token = image_token(model.config)
            n = image_tokens(model_type, model, images[-1])
            row[3 : 3 + n if n < length - 12 else 3] = [token] * n
        rows.append(row)
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    made = {"input_ids": ids, "attention_mask": mask}
    if images:
        made |= {name: torch.cat([each[name] for each in images]) for name in images[0]}
        is_image = (ids == image_token(model.config)).long()
        if model_type in ("gemma3", "shieldgemma2", "paligemma"):
            made["token_type_ids"] = is_image
        if IMAGES[model_type] == "patches":
            made["mm_token_type_ids"] = is_image
        if model_type.startswith("instructblip"):
            made["qformer_input_ids"] = ids[:, :6]
        if model_type == "kosmos-2":
            made["image_embeds_position_mask"] = is_image
        if model_type == "idefics":
            made["image_attention_mask"] = mask[:, :, None]
        if model_type == "mllama":
            made["cross_attention_mask"] = mask[:, :, None, None] * torch.tensor([1, 0, 0, 0])
    return made


def image_token(config):
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index", "video_token_index"))
    return next((token for token in found if isinstance(token, int)), VOCABULARY - 40)


def image_tokens(model_type, model, image):
    """How many tokens of the prompt an image stands for."""
    if model_type in FIXED_TOKENS:
        return FIXED_TOKENS[model_type]
    with torch.no_grad():
        features = (model if hasattr(model, "get_image_features") else model.model).get_image_features(**image)
    if not isinstance(features, (torch.Tensor, list, tuple)):
        features = features.last_hidden_state if features.pooler_output is None else features.pooler_output
    features = torch.cat([each.flatten(0, -2) for each in features]) if isinstance(features, (list, tuple)) else features
    return features.numel() // features.shape[-1]
