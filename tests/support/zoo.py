"""A tiny random model of every type that transformers 5.23 can turn an image and a text into words with.

`tiny(model_type)` takes a type's default configuration, shrinks every size that it knows by name, in all sub-configs,
and draws weights wide enough that attention is peaked. What a default leaves out, `OVERRIDES` puts in, type by type.
Nothing is downloaded.
"""

from __future__ import annotations

import copy
import math
import re

import torch
import transformers
from transformers import CONFIG_MAPPING, CLIPVisionConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 160
WORDS = range(5, 120)  # ordinary text; 0 is padding, special tokens stand above
WINDOW = 12


def names(text):
    """Words of a text, as a list."""
    return text.split()


# The common text decoders, beside the vision-language types.
TEXT_TYPES = names("""
    llama qwen2 qwen3 qwen3_moe qwen2_moe mistral ministral mixtral gemma gemma2 gemma3_text gemma3n_text gemma4_text
    phi phi3 phimoe deepseek_v2 deepseek_v3 cohere cohere2 olmo2 olmo3 smollm3 granite granitemoe glm glm4 gpt_oss gpt2
    gpt_neox opt falcon stablelm starcoder2 exaone4 ernie4_5 hunyuan_v1_dense lfm2 qwen3_next qwen3_5_text nemotron_h
    jamba bamba mamba llama4_text glm4_moe minimax minimax_m2 seed_oss internlm3 bloom mpt
""")

SIZES = {
    # widths
    "hidden_size": 64, "d_model": 64, "embed_dim": 64, "out_hidden_size": 64, "width": 64, "n_embd": 64,
    "text_hidden_size": 64, "projection_dim": 64, "projector_hidden_size": 64, "word_embed_proj_dim": 64,
    "intermediate_size": 48, "ffn_dim": 48, "mlp_dim": 48, "moe_intermediate_size": 32, "d_ff": 48, "n_inner": 48,
    "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "encoder_hidden_size": 64,
    # heads
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "head_dim": 16, "global_head_dim": 16, "d_kv": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 24, "q_lora_rank": 24,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rotary_dim": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    # depths other than the decoder's
    "encoder_layers": 2, "decoder_layers": 2,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "moe_topk": 2, "moe_k": 2,
    # linear and convolutional layers
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "mamba_n_heads": 8,
    "mamba_d_head": "auto", "mamba_d_state": 16, "mamba_n_groups": 1, "block_multiple_of": 8,
    # reach
    "sliding_window": WINDOW, "attention_chunk_size": WINDOW, "sliding_window_size": WINDOW,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "query_pre_attn_scalar": 40,
    # images: 16 pixels wide, patches of 4
    "image_size": 16, "patch_size": 4, "num_position_embeddings": 64, "image_seq_length": 16, "num_patches": 64,
    "mm_tokens_per_image": 16, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
    "num_global_layers": 1, "alignment_intermediate_size": 64, "image_text_hidden_size": 64, "window_size": 2,
    "output_channels": 16,
    # vocabularies and the like
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "num_query_tokens": 4, "resampler_n_latents": 4, "laurel_rank": 4, "num_channels": 3,
}  # fmt: skip
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "depth")
DECODER_LAYERS, VISION_LAYERS = 3, 2
DERIVED = ("qk_head_dim", "mtp_layers_block_type", "layers_block_type")

TIMM_VISION = ("gemma3n", "fast_vlm", "perception_lm")

_MROPE = {"rope_parameters.mrope_section": [4, 2, 2]}
_SLIDING_SHARED = {  # the last two layers use the keys of the two before them
    "num_hidden_layers": 6, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}  # fmt: skip
_CONV = {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None, "num_hidden_layers": 4}
# By the model type of the (sub-)configuration that they belong to; a dot leads into a dictionary.
OVERRIDES: dict[str, dict] = {
    **dict.fromkeys(names("qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text"), _MROPE),
    **dict.fromkeys(names("glm4v_text glm_ocr_text paddleocr_vl_text"), _MROPE),
    "glm4v_moe_text": {"rope_parameters.mrope_section": [2, 1, 1], "first_k_dense_replace": 1},
    "ernie4_5_vl_moe_text": {"rope_parameters.mrope_section": [3, 3, 2], "moe_intermediate_size": [32, 32]},
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4, "mamba_dt_rank": 4},
    "lfm2": _CONV, "lfm3": _CONV,
    "gemma2": {"attn_logit_softcapping": 5.0},
    "mistral": {"sliding_window": None}, "mixtral": {"sliding_window": None},
    "ministral": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters.mrope_section": [2, 2, 2, 2]},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "mistral4": {"rope_parameters": None},
    "gemma3n_text": {**_SLIDING_SHARED, "intermediate_size": 48, "activation_sparsity_pattern": None},
    "gemma4_text": {**_SLIDING_SHARED, "per_layer_config": {str(at): {"head_dim": 32} for at in (1, 3, 5)}},
    "gemma4_unified_text": {"per_layer_config": {str(at): {"head_dim": 32} for at in (2, 3)},
                            "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "num_hidden_layers": 4,
                           "mlp_layer_types": ["dense", "sparse"] * 2, "index_block_size": 4, "index_topk_blocks": 3},
    "mllama_text_model": {"num_hidden_layers": 5, "cross_attention_layers": [1, 4]},
    "dots3_note_text": {"per_layer_config": None, "num_key_value_heads": 4, "head_dim": 24, "qk_rope_head_dim": 8},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "ple_embed_dim": 16, "hc_lowrank": 8, "ngram_vocab_size_base": 100,
    },
    "step3p5": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW,
                "num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse"] * 2, "num_sliding_attention_heads": 4},
    "idefics": {"additional_vocab_size": 0},
    "blip-2": {"image_token_index": 130, "image_text_hidden_size": 64}, "instructblip": {"image_token_index": 130},
    "instructblipvideo": {"video_token_index": 130}, "kosmos-2": {"latent_query_num": 4},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 64},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "llava_next": {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192},
    "qwen2_5_vl_vision": {"window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0, 1]},
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": [0, 1]},
    "llama4_vision_model": {"intermediate_size": 256, "projector_input_dim": 64},
    "siglip2_vision_model": {"num_patches": 64},
    "aria": {"projector_patch_to_query_dict": {16: 8, 1225: 8, 4900: 8}},
    "got_ocr2_vision": {"global_attn_indexes": [1]},
    "evolla": {"use_cache": True},
    "chameleon": {"vocabulary_map": {"<image>": 130, "IMGIMGA": 131}},
    "emu3": {"vocabulary_map": {"<image>": 130}},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
        "rope_parameters": {"full_attention": None, "sliding_attention": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"], "topk_method": "greedy",
                           "num_experts_per_tok": 2},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0], [-2, 1]], "downsample_rate": "1/2"},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "molmo2_text": {"rope_scaling_layers": [0, 1, 2]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 140}, "qwen3_omni_moe_thinker": {"vision_start_token_id": 140},
}  # fmt: skip


VARIANTS = {
    "idefics2 (sliding)": ("idefics2", {"text_config.sliding_window": WINDOW}),
    "mistral (sliding)": ("mistral", {"sliding_window": WINDOW}),
    "pixtral": ("llava", {
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "vision_config": {"model_type": "pixtral", "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "head_dim": 16, "image_size": 16, "patch_size": 4}}),
}  # fmt: skip
"""Further common configurations: Mistral as first released, and in Idefics 2; Pixtral, a LLaVA with another tower."""

OF_OTHERS_TESTS = {
    "idefics3 (sliding)": ("idefics3", {"text_config.sliding_window": 32}),
    "smolvlm (sliding)": ("smolvlm", {"text_config.sliding_window": 32}),
}
"""Of transformers' own tests: a window that the cache knows of and the masks do not. No released model has one."""


def tiny_config(model_type):
    """The type's default configuration with every size made small."""
    model_type, overrides = {**VARIANTS, **OF_OTHERS_TESTS}.get(model_type, (model_type, {}))
    default = CONFIG_MAPPING[model_type]()
    small = _shrunk(default.to_dict(), default.get_text_config(decoder=True), {})
    _override(small, overrides)
    config = type(default)(**small)
    if model_type in TIMM_VISION:
        _without_timm(config)
    return config


def _without_timm(config):
    """A CLIP vision tower in the place of one that needs the timm package."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    vision.model_args = {"embed_dim": 64}
    for name in ("vocab_size", "vocab_offset", "rms_norm_eps"):
        if hasattr(config.vision_config, name):
            setattr(vision, name, getattr(config.vision_config, name))
    config.__dict__["vision_config"] = vision  # past the check of the field's type


def _override(values, overrides):
    for path, value in overrides.items():
        *parents, name = path.split(".")
        place = values
        for parent in parents:
            place[parent] = dict(place.get(parent) or {})
            place = place[parent]
        place[name] = value


def _shrunk(values, text, seen_ids):
    model_type = values.get("model_type")
    is_text = model_type is not None and model_type == text.model_type
    small = {}
    depth = next((values[name] for name in DEPTHS if isinstance(values.get(name), int)), None)
    layers = _layers_to_take(values, depth, DECODER_LAYERS if is_text else VISION_LAYERS) if depth else []
    for name, value in values.items():
        if name in (*DERIVED, "transformers_version", "architectures", "_name_or_path"):
            continue
        if name == "rope_parameters":
            small[name] = _small_rope(value)
        elif name == "per_layer_config" and isinstance(value, dict):
            small[name] = {str(layers.index(int(at))): each for at, each in value.items() if int(at) in layers}
        elif isinstance(value, dict):
            small[name] = _shrunk(value, text, seen_ids) if "model_type" in value else value
        elif value is None or isinstance(value, bool):
            small[name] = value
        elif name in DEPTHS:
            small[name] = len(layers)
        elif name in ("num_key_value_heads", "num_global_key_value_heads"):
            small[name] = 2 if value < values.get("num_attention_heads", value + 1) else 4
        elif name in SIZES and isinstance(value, int):
            small[name] = SIZES[name]
        elif name in ("image_size", "patch_size"):
            small[name] = [SIZES[name]] * len(value)
        elif isinstance(value, (list, tuple)) and len(value) == depth and depth > VISION_LAYERS:
            small[name] = [value[index] for index in layers]
        elif re.search(r"(_token_id|_token_index|_token|_id)s?$", name) and name != "model_type":
            small[name] = _small_id(name, value, seen_ids)
        else:
            small[name] = value
    if "qk_rope_head_dim" in small:
        small.pop("head_dim", None)
    _override(small, OVERRIDES.get(model_type, {}))
    return small


def _layers_to_take(values, depth, at_least):
    kinds = values.get("layer_types") or values.get("layers_block_type")
    if not kinds or len(set(kinds)) == 1:
        return list(range(min(depth, at_least)))
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    seconds = [at for at in range(depth) if kinds[at] in set(kinds) and at not in firsts]
    again = []
    for kind in dict.fromkeys(kinds):
        again += [at for at in seconds if kinds[at] == kind][:1]
    return sorted(firsts + again)


def _small_id(name, value, seen_ids):
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
        return value
    if isinstance(value, (list, tuple)):
        return [_small_id(f"{name}{at}", each, seen_ids) for at, each in enumerate(value)]
    if name == "pad_token_id":
        return 0
    if 0 <= value < WORDS.start or value < 0:
        return value
    return seen_ids.setdefault(name, VOCABULARY - 1 - len(seen_ids))


def _small_rope(value):
    if not isinstance(value, dict):
        return value
    value = dict(value)
    if value and all(isinstance(each, dict) or each is None for each in value.values()):
        return {name: _small_rope(each) for name, each in value.items()}
    if value.get("partial_rotary_factor") is not None:
        value["partial_rotary_factor"] = max(0.5, value["partial_rotary_factor"])
    if value.get("mrope_section"):
        half = int(16 * (value.get("partial_rotary_factor") or 1)) // 2
        parts = len(value["mrope_section"])
        value["mrope_section"] = [half - (parts - 1) * (half // (parts + 1))] + [half // (parts + 1)] * (parts - 1)
    return value


def model_class(model_type):
    """The class that `AutoModelForImageTextToText`, or else `AutoModelForCausalLM`, takes for this type."""
    model_type, _ = {**VARIANTS, **OF_OTHERS_TESTS}.get(model_type, (model_type, {}))
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return getattr(transformers, name)


def tiny(model_type, attn="eager"):
    """A seeded random model of this type, with peaked attention."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(each.numel() for each in model_class(model_type)._from_config(copy.deepcopy(config)).parameters())
    if size > 1.2e8:
        raise MemoryError(f"{size / 1e6:.0f} million parameters")
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        config._experts_implementation = "eager"  # one by one: the grouped product knows no float64
        model = model_class(model_type)._from_config(config, attn_implementation=attn)
        _peak(model)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


def _peak(model):
    """Draw matrices with unit gain, those of queries and keys wider, so that attention has something to choose."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            wide = re.search(r"(^|[._])(q|k|qk|qkv|query|key|query_key_value|wq|wk|Wqkv|c_attn|kv)(_|\.|$)", name)
            fan_in = parameter[0].numel() if parameter.ndim == 2 else parameter.shape[-1]
            with torch.no_grad():
                parameter.normal_(0, (2.5 if wide else 1.0) / math.sqrt(fan_in))
        elif "sink" in name:
            with torch.no_grad():
                parameter.normal_(1, 2)
        elif re.search(r"(q|k|query|key)_?(layer)?_?norm", name) and parameter.ndim == 1 and "weight" in name:
            with torch.no_grad():
                parameter.normal_(1.5, 0.5)


ALL_TYPES = sorted(
    {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *VARIANTS}.union(
        set(TEXT_TYPES) & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    )
)
