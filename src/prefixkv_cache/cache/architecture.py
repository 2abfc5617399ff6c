"""What a model's config says about its decoder layers: which can be pruned, which are left whole, and what is refused.

Reads configs only; it sees no weights and no tensors. The cache asks it at construction, when it is given a config, and
once more at the first attention call, where the attention module shows its own config. Which layer is of which kind is
transformers' own judgement: the layers that its `DynamicCache` makes for the config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import DynamicCache

from .compat import undescribed_layers

PRUNABLE = "full_attention"
SLIDING = "sliding or chunked attention"

# Models with attention code of their own, which never asks for transformers' attention function.
_OWN_ATTENTION = ("git", "blip", "blip_text_model", "blip_2_qformer", "bloom", "falcon", "mpt")
_KINDS = {
    "DynamicLayer": PRUNABLE,
    "DynamicSlidingWindowLayer": SLIDING,
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


@dataclass(frozen=True)
class Sliding:
    """What becomes of layers with a sliding window.

    Attributes:
        beside_full: whether they are pruned in models that have layers of full attention, too.
        alone: whether they are pruned in models that have no others. If not, nothing has to be prunable.
    """

    beside_full: bool
    alone: bool


def cache_layers(config: Any, sliding: Sliding | None = None) -> list[tuple[str, Any]]:
    """Kind of each decoder layer, and the cache layer that transformers itself would use for it.

    The kind is `PRUNABLE` for full self-attention; cross-attention, whose keys stand for no token, is not.

    Args:
        config: of the model.
        sliding: what becomes of layers with a sliding window, whose kind is then `PRUNABLE`, too. None: they are left
            whole, and there must be others.

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
    if sliding is not None and (sliding.beside_full if PRUNABLE in kinds else sliding.alone):
        kinds = [PRUNABLE if _slides(text, index, kind) else kind for index, kind in enumerate(kinds)]
    if PRUNABLE not in kinds and (sliding is None or sliding.alone):
        found = ", ".join(sorted(set(kinds))) or "none"
        raise ValueError(f"{text.model_type} has no full-attention layer whose cache could be pruned (layers: {found})")
    return list(zip(kinds, layers, strict=True))


def _slides(text: Any, index: int, kind: str) -> bool:
    """Whether this is a layer with a sliding window, not one of chunks, which has the same cache layer."""
    told = getattr(text, "layer_types", None)
    told = told[index] if told else "sliding_attention" if getattr(text, "sliding_window", None) else ""
    return kind == SLIDING and told == "sliding_attention"


def count_sliding(config: Any) -> int:
    """Layers with a sliding window."""
    text = decoder_config(config)
    kinds = [kind for kind, _ in cache_layers(config, Sliding(False, False))]
    return sum(_slides(text, index, kind) for index, kind in enumerate(kinds))


def whole_layer_kinds(config: Any) -> list[str]:
    """Kinds of the layers that would be left whole, sorted, each once."""
    return sorted({kind for kind, _ in cache_layers(config, Sliding(False, False))} - {PRUNABLE})


def kv_heads(text_config: Any) -> int | None:
    """Key heads that a layer's cache stores; None with latent attention, which stores none, or where none are told."""
    if getattr(text_config, "kv_lora_rank", None) is not None:
        return None
    heads = getattr(text_config, "num_key_value_heads", None) or getattr(text_config, "num_attention_heads", None)
    return heads if isinstance(heads, int) else None
