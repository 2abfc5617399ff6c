"""What a model's config says about its decoder layers: which can be pruned, which are left whole, and what is refused.

Reads configs only; it sees no weights and no tensors. The cache asks it at construction, when it is given a config, and
once more at the first attention call, where the attention module shows its own config.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, get_layer_types_and_kwargs

PRUNABLE = "full_attention"

# Models with attention code of their own, which never asks for transformers' attention function.
_OWN_ATTENTION = ("git", "blip", "blip_text_model", "blip_2_qformer", "bloom", "falcon", "mpt")
# Models that address keys by their absolute index, which pruning would shift.
_INDEXED = ("indexed_attention", "heavily_compressed_attention", "compressed_sparse_attention")


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


def layer_types(config: Any) -> list[tuple[str, dict]]:
    """Type and constructor arguments of each decoder layer's cache, in transformers' words.

    A cross-attention layer is told apart as `"cross_attention"`, since transformers' own list does not.

    Raises:
        TypeError, ValueError: see `decoder_config`; also a model without a layer that can be pruned.
    """
    text = decoder_config(config)
    types, arguments = get_layer_types_and_kwargs(text)
    cross = getattr(text, "cross_attention_layers", None) or []
    types = ["cross_attention" if index in cross else kind for index, kind in enumerate(types)]
    indexed = next((kind for kind in types if kind in _INDEXED), None)
    if indexed is not None:
        raise ValueError(f"{text.model_type} has {indexed} layers, which address keys by index. Use its own cache")
    if PRUNABLE not in types:
        found = ", ".join(sorted(set(types))) or "none"
        raise ValueError(f"{text.model_type} has no full-attention layer whose cache could be pruned (layers: {found})")
    return list(zip(types, arguments, strict=True))


def make_whole_layer(kind: str, arguments: dict) -> Any:
    """The cache layer that transformers itself would use, for a layer that is left whole."""
    return DYNAMIC_LAYER_TYPE_MAPPING.get(kind, DynamicLayer)(**arguments)
