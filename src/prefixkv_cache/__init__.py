"""KV-cache pruning for vision-language models: a drop-in cache for transformers, with a length for each layer."""

from .cache import PAPER as PAPER
from .cache import PrefixKVCache as PrefixKVCache
from .calibrate import calibrate as calibrate
from .profile import PrefixProfile as PrefixProfile
from .profile import ProfileError as ProfileError
from .threshold import search_threshold as search_threshold

__all__ = ["PAPER", "PrefixKVCache", "PrefixProfile", "ProfileError", "calibrate", "search_threshold"]
