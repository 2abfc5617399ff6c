"""What a model's config says about its decoder layers: which can be pruned, which are left whole, and what is refused.

Reads configs only; it sees no weights and no tensors. The cache asks it at construction, when it is given a config, and
once more at the first attention call, where the attention module shows its own config. Which layer is of which kind is
transformers' own judgement: the layers that its `DynamicCache` makes for the config.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache

from .compat import undescribed_layers

PRUNABLE = "full_attention"

# Models with attention code of their own, which never asks for transformers' attention function.
_OWN_ATTENTION = ("git", "blip", "blip_text_model", "blip_2_qformer", "bloom", "falcon", "mpt")
_KINDS = {
    "DynamicLayer": PRUNABLE,
    "DynamicSlidingWindowLayer": "sliding or chunked attention",
    "LinearAttentionLayer": "linear attention or convolution",
    "LinearAttentionAndFullAttentionLayer": "hybrid",
    "LinearAttentionAndSlidingWindowAttentionLayer": "hybrid sliding",
    "DummyLayer": "keyless",
}


def decoder_config(config: Any) -> Any:
    """The config of the text decoder.

    Raises:
        TypeError: `config` is not a transformers config.
        ValueError: the model is of a kind whose cache cannot be pruned.
    """
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"config is {config!r}, of type {type(config).__name__}; pass the model's own: model.config")
    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder model; only decoder caches can be pruned. Use its own cache")
    text = config.get_text_config(decoder=True)
    for model_type in (kind, getattr(text, "model_type", kind)):
        if model_type in _OWN_ATTENTION:
            raise ValueError(
                f"{model_type} computes attention by code of its own, not through transformers' attention interface, "
                "so its attention cannot be observed. Use its own cache"
            )
    return text


def cache_layers(config: Any) -> list[tuple[str, Any]]:
    """Kind of each decoder layer, and the cache layer that transformers itself would use for it.

    The kind is `PRUNABLE` for full self-attention; cross-attention, whose keys stand for no token, is not.

    Raises:
        TypeError, ValueError: see `decoder_config`; also a model without a layer that can be pruned.
    """
    text = decoder_config(config)
    if undescribed := undescribed_layers(text):
        raise ValueError(
            f"{text.model_type} has layers whose cache this release of transformers does not describe ({undescribed}). "
            "Use a newer transformers, or the model's own cache"
        )
    try:
        layers = DynamicCache(config=config).layers
    except KeyError as error:
        # Some models bring cache layers of their own, known to transformers once their code is imported.
        raise ValueError(f"unknown layer type {error} in {text.model_type}; make the cache after the model") from None
    kinds = [_KINDS.get(type(layer).__name__, type(layer).__name__) for layer in layers]
    cross = getattr(text, "cross_attention_layers", None) or []
    kinds = ["cross attention" if index in cross else kind for index, kind in enumerate(kinds)]
    if "DynamicIndexedLayer" in kinds:
        raise ValueError(
            f"{text.model_type} looks keys up by their index, which pruning would shift. Use its own cache"
        )
    if PRUNABLE not in kinds:
        found = ", ".join(sorted(set(kinds))) or "none"
        raise ValueError(f"{text.model_type} has no full-attention layer whose cache could be pruned (layers: {found})")
    return list(zip(kinds, layers, strict=True))


def whole_layer_kinds(config: Any) -> list[str]:
    """Kinds of the layers that would be left whole, sorted, each once."""
    return sorted({kind for kind, _ in cache_layers(config)} - {PRUNABLE})


def kv_heads(text_config: Any) -> int | None:
    """Key heads that a layer's cache stores; None with latent attention, which stores none, or where none are told."""
    if getattr(text_config, "kv_lora_rank", None) is not None:
        return None
    heads = getattr(text_config, "num_key_value_heads", None) or getattr(text_config, "num_attention_heads", None)
    return heads if isinstance(heads, int) else None
