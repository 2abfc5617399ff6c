"""Tiny random vision-language models and prompts for them: built from configurations, seeded, nothing downloaded.

All weights of the language model are drawn wider than transformers draws them: the attention of a freshly initialised
model is uniform, and pruning by importance would then be pruning by rounding error.

Models are float64 unless a test asks for another dtype, and `in_double` makes them compute in float64 throughout:
transformers casts norms and softmax to float32, whose rounding differs from machine to machine.

A *row* is one prompt: its token ids, with its image in the middle. `batch(family, lengths)` makes rows of those lengths
and pads them on the left; the same seed and length give the same row, alone or in a batch, so that a row can be run by
itself. `next_turn` appends text to a finished generation, as a chat does.
"""

import copy
import functools
import types
from functools import cache

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

import compat

FAMILIES = ("llava_mha", "llava_gqa", "qwen2_5_vl", "gemma3")
EIGHT_HEADS = "llava_eight"  # more key heads than a layer may have lengths
PADDED = (61, 44, 40)  # lengths of the rows of the left-padded batch
IMAGE, VIDEO, VISION_START, VISION_END = 99, 98, 97, 96
VOCABULARY = 100
WORDS = range(5, 90)  # ordinary text; 0 is padding
SLIDING_WINDOW = 24


def llava_config(kv_heads, layers, heads=4):
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=VOCABULARY, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16)


def qwen_config():
    text = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **compat.mrope(1e4, [1, 1, 2]),
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, window_size=16, out_hidden_size=32,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip


def gemma_config():
    text = Gemma3TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, query_pre_attn_scalar=8, vocab_size=VOCABULARY, max_position_embeddings=512, pad_token_id=0,
        sliding_window=SLIDING_WINDOW, layer_types=["sliding_attention", "full_attention", "full_attention"] * 2,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    return Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_index=IMAGE,
        boi_token_index=VISION_START, eoi_token_index=VISION_END,
    )  # fmt: skip


BUILDERS = {
    "llava_mha": (LlavaForConditionalGeneration, lambda: llava_config(kv_heads=4, layers=4)),
    "llava_gqa": (LlavaForConditionalGeneration, lambda: llava_config(kv_heads=2, layers=6)),
    EIGHT_HEADS: (LlavaForConditionalGeneration, lambda: llava_config(kv_heads=8, layers=3, heads=8)),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, qwen_config),
    "gemma3": (Gemma3ForConditionalGeneration, gemma_config),
}


@cache
def weights(family):
    """The float32, eager model of this family; made once, never handed out itself."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        kind, config = BUILDERS[family]
        model = kind(config()).eval()
        for name, parameter in model.named_parameters():
            if "vision" in name or "visual" in name:
                continue
            if "mm_input_projection" in name:  # zero when freshly initialised: the image would not be seen
                parameter.data.normal_(std=0.3)
            elif parameter.dim() > 1:
                parameter.data.normal_(std=0.25)
            if name.endswith(("q_norm.weight", "k_norm.weight")):  # Gemma 3 scales queries and keys here, by 1 + weight
                parameter.data.fill_(0.6)
            if name.endswith("language_model.norm.weight"):  # small logits, with a rounding error well under 1e-5
                parameter.data.fill_(-0.8 if family == "gemma3" else 0.2)
    model.generation_config.eos_token_id = None  # exactly as many new tokens as asked for
    model.generation_config.pad_token_id = 0
    return model


def build(family, attn=compat.PLAIN, dtype=torch.float64):
    """A fresh model of the family with the attention implementation and dtype asked for."""
    model = copy.deepcopy(weights(family)).to(dtype)
    model.set_attn_implementation(attn)
    return in_double(model) if dtype == torch.float64 else model


@cache
def shared(family, attn=compat.PLAIN):
    """One model for all tests that change nothing about it."""
    return build(family, attn)


class _StayDouble(TorchFunctionMode):
    """Float64 tensors stay float64 where code asks for float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            casts = function in (torch.Tensor.float, torch.Tensor.to) and (*args[1:], torch.float32)[0] == torch.float32
            if casts:
                return args[0]
        return function(*args, **(kwargs or {}))


def _norm_in_double(norm, x):
    """RMSNorm; Gemma's weight is the difference from 1."""
    scale = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale


def _vision_in_double(vision, *args, **kwargs):
    with _StayDouble():
        return type(vision).forward(vision, *args, **kwargs)


def in_double(model):
    """The float64 model without the places where transformers computes in float32 (positions excepted)."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm_in_double, module)
        elif name.endswith(("vision_tower", "visual")):
            module.forward = types.MethodType(_vision_in_double, module)
    return model


@functools.wraps(torch.nn.functional.softmax)
def softmax(input, dim=None, _stacklevel=3, dtype=None):
    """In place of torch's, so that eager attention in float64 is not computed in float32."""
    return input.softmax(dim, dtype=None if input.dtype == torch.float64 else dtype)


torch.nn.functional.softmax = softmax


def attention_modules(model):
    """The self-attention of each decoder layer, in order."""
    return [layer.self_attn for layer in model.model.language_model.layers]


def prunable_layers(model):
    """Indices of the decoder layers that attend to everything before them (in Gemma 3: not the sliding ones)."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [index for index, kind in enumerate(kinds) if kind == "full_attention"]


def row(family, length, seed=0):
    """One prompt: words, the image, words; `length` tokens in all, a dict of what `batch` puts together."""
    random = torch.Generator().manual_seed(1000 * seed + length)
    image_tokens = [VISION_START] + [IMAGE] * (12 if family == "qwen2_5_vl" else 16) + [VISION_END]
    words = torch.randint(WORDS.start, WORDS.stop, (length - len(image_tokens),), generator=random).tolist()
    before = 3 + seed % 3
    made = {"ids": words[:before] + image_tokens + words[before:]}
    if family == "qwen2_5_vl":  # 6 x 8 patches of 3 channels, 2 frames, 4 x 4 pixels; merged 2 x 2 into 3 x 4 tokens
        made["pixel_values"] = torch.randn(48, 3 * 2 * 4 * 4, generator=random)
        made["image_grid_thw"] = torch.tensor([[1, 6, 8]])
    else:
        made["pixel_values"] = torch.randn(1, 3, 16, 16, generator=random)
    return made


def collate(family, rows, dtype=torch.float64):
    """Rows padded on the left into what `model.generate(**inputs)` takes."""
    longest = max(len(each["ids"]) for each in rows)
    padding = [longest - len(each["ids"]) for each in rows]
    ids = torch.tensor([[0] * pad + each["ids"] for pad, each in zip(padding, rows, strict=True)])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding]),
        "pixel_values": torch.cat([each["pixel_values"] for each in rows]).to(dtype),
    }
    if family == "qwen2_5_vl":
        inputs["image_grid_thw"] = torch.cat([each["image_grid_thw"] for each in rows])
        if compat.TAKES_TOKEN_TYPES:
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


def batch(family, lengths=(61,), seed=0, dtype=torch.float64):
    return collate(family, [row(family, length, seed + index) for index, length in enumerate(lengths)], dtype)


def alone(family, lengths, index, seed=0):
    """Row `index` of `batch(family, lengths, seed)` by itself, without padding."""
    return collate(family, [row(family, lengths[index], seed + index)])


def next_turn(inputs, sequences, length, seed=7):
    """Inputs of the next turn: everything so far and `length` new words, no new image."""
    random = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS.start, WORDS.stop, (len(sequences), length), generator=random)
    ids = torch.cat([sequences, words], dim=1)
    mask = inputs["attention_mask"]
    grown = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, grown], dim=1)}


def words(rows, length, seed=3):
    """A random continuation, [rows, length], for forcing the same tokens on two decoders; a longer one begins alike."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(WORDS.start, WORDS.stop, (length, rows), generator=random).T.contiguous()
