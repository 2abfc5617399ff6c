"""Where the tests have to know which transformers they run on. The library's own differences are in its compat.py."""

import contextlib
import inspect

import pytest
from transformers import AttentionInterface, Cache, GenerationMixin, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

SEES_EAGER = hasattr(AttentionInterface, "get_interface")
LOOK_UP = "get_interface" if SEES_EAGER else "__getitem__"
needs_eager = pytest.mark.skipif(not SEES_EAGER, reason="transformers before 5.1 does not show eager attention")
PLAIN = "eager" if SEES_EAGER else "sdpa"
BACKENDS = [pytest.param("eager", marks=needs_eager), "sdpa"]

# Assisted decoding with a cache that is not empty: from 5.0 on its first forward brings the whole text once more.
FEEDS_SECOND_TURNS_AGAIN = not hasattr(GenerationMixin, "_get_initial_cache_position")
ANNOUNCES_ASSISTED_DECODING = hasattr(Cache, "activate_past_recording")
TAKES_TOKEN_TYPES = "mm_token_type_ids" in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters
# Before 5.0, an image must lie whole in the first chunk of a prompt.
CHUNK = 48 if hasattr(GenerationMixin, "_prefill_chunking") else 16

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ImportError:
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

__all__ = ["CLIPImageProcessorPil"]


@contextlib.contextmanager
def ends_nowhere(model):
    """An end token that never comes: the assisted decoding of older releases cannot do without one."""
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = 10**6
    try:
        yield
    finally:
        model.generation_config.eos_token_id = before


def seen(attn):
    """This attention implementation, or "sdpa" where it is eager and nobody can see it."""
    return PLAIN if attn == "eager" else attn


def mrope(theta, section):
    """The arguments of a Qwen2.5-VL text config that say how positions are rotated."""
    if "rope_theta" in inspect.signature(Qwen2_5_VLTextConfig.__init__).parameters:
        return {"rope_theta": theta, "rope_scaling": {"rope_type": "default", "mrope_section": section}}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": section}}
