"""KV-cache pruning for vision-language models: a drop-in cache for transformers, with a length for each layer.

The names are loaded when first asked for: importing the package imports neither torch nor transformers.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as `typing` has it, which takes a while to import
if TYPE_CHECKING:
    from typing import Any

    from . import methods as methods
    from .cache.cache import PrefixKVCache as PrefixKVCache
    from .cache.tensor_file import SavedCacheError as SavedCacheError
    from .calibration.calibrate import calibrate as calibrate
    from .methods import Method as Method
    from .methods import MethodMismatchWarning as MethodMismatchWarning
    from .profiles.file import ProfileError as ProfileError
    from .profiles.profile import PrefixProfile as PrefixProfile
    from .rules.threshold import search_threshold as search_threshold

_HOMES = {
    "Method": "methods",
    "MethodMismatchWarning": "methods",
    "PrefixKVCache": "cache.cache",
    "PrefixProfile": "profiles.profile",
    "ProfileError": "profiles.file",
    "SavedCacheError": "cache.tensor_file",
    "calibrate": "calibration.calibrate",
    "search_threshold": "rules.threshold",
}
__all__ = [
    "Method",
    "MethodMismatchWarning",
    "PrefixKVCache",
    "PrefixProfile",
    "ProfileError",
    "SavedCacheError",
    "calibrate",
    "methods",
    "search_threshold",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f".{_HOMES.get(name, name)}", __name__)
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value  # the next time it is an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
