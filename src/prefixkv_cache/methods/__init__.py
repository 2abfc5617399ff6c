"""Methods: how a cache prunes. `Method` is the value, and each named one has a short file of its own."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from .default import DEFAULT as DEFAULT
from .elastic import ELASTIC as ELASTIC
from .h2o import H2O as H2O
from .keydiff import KEYDIFF as KEYDIFF
from .method import NAMED as NAMED
from .method import Decode as Decode
from .method import Lengths as Lengths
from .method import Method as Method
from .method import Protect as Protect
from .method import Ranking as Ranking
from .prefixkv import PREFIXKV as PREFIXKV
from .pyramidkv import PYRAMIDKV as PYRAMIDKV
from .random import RANDOM as RANDOM
from .snapkv import SNAPKV as SNAPKV
from .streaming import STREAMING as STREAMING
from .uniform import UNIFORM as UNIFORM

NAMED.update(
    default=DEFAULT,
    prefixkv=PREFIXKV,
    elastic=ELASTIC,
    h2o=H2O,
    streaming=STREAMING,
    snapkv=SNAPKV,
    pyramidkv=PYRAMIDKV,
    uniform=UNIFORM,
    random=RANDOM,
    keydiff=KEYDIFF,
)


class MethodMismatchWarning(UserWarning):
    """A method was given beside a profile that was made with another one; the method given is used."""


def resolve(method: Method | str | None, profile: Any = None) -> Method:
    """The method that a cache goes by: the one given, else the profile's, else `DEFAULT`.

    Args:
        method: a `Method`, its spelling, or None.
        profile: a `PrefixProfile`, or None. A method given beside one that was made with another gets one warning.

    Raises:
        TypeError: neither a method, nor text, nor None.
        ValueError: a spelling that cannot be read.
    """
    if method is None:
        return DEFAULT if profile is None else profile.method
    if isinstance(method, str):
        method = Method.parse(method)
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method or its spelling, such as 'snapkv:queries=64'; got {method!r}")
    if profile is not None and profile.method != method:
        made_for = profile.method.spell()
        warnings.warn(
            f"the profile was made with method {made_for!r}; {method.spell()!r} is used, which its lengths may not fit",
            MethodMismatchWarning,
            stacklevel=_level_outside(),
        )
    return method


def _level_outside() -> int:
    """Stack level, for a warning by the caller, of the first frame that is not of this package."""
    package = os.path.dirname(os.path.dirname(__file__)) + os.sep
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    return level
