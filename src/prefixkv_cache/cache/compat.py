"""Where the supported releases of transformers (4.57 to 5.23) differ. All of it is here, so that it can go one day.

- The attention hook. From 5.1 on every attention call asks `AttentionInterface.get_interface`, eager too. Before,
  backends other than eager are looked up by `AttentionInterface.__getitem__`, and eager attention cannot be seen.
- Mask sizes. From 5.4 on they are asked for by the number of queries, before by the tensor of their positions.
- `get_max_length` was called `get_max_cache_shape`, and `crop` took a length that remains.
- Steps of generation. From 5.0 on the model is told by name which forward is the first, before by `cache_position`.
- Layers. Older releases describe every layer that is not sliding as one of full attention, also where it is none, and
  their whole layers keep a zeroed prompt after `reset`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers import cache_utils
from transformers.modeling_utils import AttentionInterface

SEES_EAGER = hasattr(AttentionInterface, "get_interface")
HOOKED_METHOD = "get_interface" if SEES_EAGER else "__getitem__"

ANNOUNCES_CANDIDATES = hasattr(cache_utils.Cache, "activate_past_recording")
"""Whether assisted decoding says beforehand that tokens may be taken back."""
_CROP_TAKES_LENGTH = "max_length" in inspect.signature(cache_utils.DynamicLayer.crop).parameters
_DESCRIBED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
_LINEAR = (
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax",
    "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm",
    "zamba", "zamba2",
)  # fmt: skip
_INDEXED = ("glm_moe_dsa",)


def n_queries(query_length: int | torch.Tensor) -> int:
    """The number of queries, from what `get_mask_sizes` is given."""
    return query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length


class MaxLengthNames:
    """Both names under which transformers asks a cache layer for its maximum length."""

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """What `get_max_length` was called before 5.17."""
        return -1


def explain_unseen(attn_implementation: Any) -> str:
    """Why no attention call of this implementation is seen that newer releases would show; empty if it is."""
    if SEES_EAGER or attn_implementation not in (None, "eager"):
        return ""
    return (
        f": transformers {transformers.__version__} does not show eager attention, only 5.1 and later do; "
        "load the model with attn_implementation='sdpa'"
    )


def crops_to_nothing(tokens_to_remove: int) -> bool:
    """Whether transformers' own layers would take `crop(0)`, nothing to take back, for a length of 0 that remains."""
    return _CROP_TAKES_LENGTH and tokens_to_remove == 0


def tokens_of_crop(number: int, seen: int) -> int:
    """Minus the number of tokens to take back, from what `crop` is given: once also the length that remains.

    A length that is no shorter takes nothing back, as in those releases.
    """
    return min(0, number - seen) if _CROP_TAKES_LENGTH and number > 0 else number


def can_run_inside(records: dict[str, bool]) -> bool:
    """Whether a model can be called while it runs, with these things to return: old releases mix up the two calls'."""
    return ANNOUNCES_CANDIDATES or not any(records.values())


def generation_inputs(model: Any, input_ids: torch.Tensor, kwargs: dict[str, Any], *, first: bool) -> dict[str, Any]:
    """What `generate` passes to the model: the whole prompt in the first forward, the newest token in the others.

    Args:
        model: one that can generate.
        input_ids: int64 [rows, seen and new tokens].
        kwargs: as `generate` keeps them from step to step; changed in place.
        first: whether this is the prompt's forward.
    """
    if hasattr(model, "_get_initial_cache_position"):
        if first:
            kwargs.update(model._get_initial_cache_position(input_ids.shape[1], input_ids.device, kwargs))
        return model.prepare_inputs_for_generation(input_ids, **kwargs)
    return model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=None if first else 1, is_first_iteration=first, **kwargs
    )


def empty_after_reset(layer: Any) -> None:
    """Make a whole layer as new, which in older releases goes on from the zeroed keys of what it was reset from."""
    keys = getattr(layer, "keys", None)
    if isinstance(keys, torch.Tensor) and keys.numel() and isinstance(layer, cache_utils.DynamicLayer):
        layer.keys = layer.values = None
        layer.is_initialized = False


def undescribed_layers(text_config: Any) -> str:
    """Layers of this model that this transformers does not tell from full attention; empty if there are none."""
    kind = getattr(text_config, "model_type", "")
    others = set(getattr(text_config, "layer_types", None) or ()) - set(_DESCRIBED_LAYERS)
    if not hasattr(cache_utils, "LinearAttentionLayer") and (others or kind in _LINEAR):
        return ", ".join(sorted(others)) or "linear attention or convolution"
    if not hasattr(cache_utils, "DynamicIndexedLayer") and kind in _INDEXED:
        return "indexed attention"
    return ""
