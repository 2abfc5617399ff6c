"""The methods by name: how the command line spells them, and how each makes a cache.

`online:queries=all;distance=none` is a method with options; the whole spelling is the method's name in every table, so
that a study can tell its variants apart. What is wrong with a spelling is found without a model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..baselines import BASELINES
from ..cache import PrefixKVCache, image_mask_of
from ..profile import PrefixProfile

FULL = "full"
PAPER_METHOD = "paper"
WITH_PROFILE = ("prefixkv", PAPER_METHOD)  # these may name one by an option
NAMES = (FULL, "prefixkv", "online", PAPER_METHOD, *BASELINES)
DEFAULT = ("prefixkv", "online", PAPER_METHOD, "elastic", "h2o", "streaming", "snapkv", "pyramid", "uniform")


@dataclass(frozen=True)
class Method:
    """A way to keep a cache, and its options.

    Attributes:
        name: as it was spelled, options included.
        base: one of `NAMES`.
        options: for the constructor of the cache.
        profile: of `prefixkv`, where None is the bundled one of the model, and of `paper`, where None is a search on
            the prompt.
    """

    name: str
    base: str
    options: dict[str, Any]
    profile: PrefixProfile | None = None

    def make(self, model: Any, budget: float, inputs: Any = None) -> Cache:
        """A fresh cache for this model.

        Args:
            model: looked at for its config.
            budget: fraction of the prompt's pairs kept, in (0, 1].
            inputs: the prompt, for methods with an option that asks where the images are.

        Raises:
            ValueError: an option has a value that the cache refuses, or there is no profile of this model.
        """
        if self.base == FULL:
            return DynamicCache(config=model.config)
        options = dict(self.options)
        if inputs is not None and (options.get("queries") == "text" or "text_floor" in options):
            options["image_mask"] = image_mask_of(inputs, model.config)
        try:
            if self.base != "prefixkv":
                if self.profile is not None:
                    options["profile"] = self.profile
                return _maker(self.base)(budget=budget, config=model.config, **options)
            if self.profile is not None:
                return PrefixKVCache(self.profile, budget, config=model.config, **options)
            cache = PrefixKVCache.for_model(model, budget, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"method {self.name!r}: {error}") from error
        if cache.profile is None:
            raise ValueError(
                f"method {self.name!r} needs a profile, and none is bundled for this model; make one by "
                "`prefixkv calibrate` and pass it by --profile, or leave the method out"
            )
        return cache


def parse_methods(text: str, *, profile: str | None = None, as_published: bool = False) -> list[Method]:
    """Methods from their spelling on the command line.

    Args:
        text: names with commas between, each with options after a colon and semicolons between: `a,b:x=1;y=none`.
        profile: file or bundled name, for `prefixkv` where it names none by an option of its own. `paper` takes one
            only by its option: a profile is not the paper's unless it was made with all queries.
        as_published: give the option `as_published=True` to every method that has it.

    Raises:
        ValueError: there is no such method or option, or a profile cannot be read.
    """
    methods = [_parse(part.strip(), profile, as_published) for part in text.split(",") if part.strip()]
    names = [method.name for method in methods]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"method {twice!r} is named twice")
    if not methods:
        raise ValueError(f"--methods names none; there are {', '.join(NAMES)}")
    return methods


def _parse(text: str, profile: str | None, as_published: bool) -> Method:
    base, _, rest = text.partition(":")
    if base not in NAMES:
        raise ValueError(f"there is no method {base!r}; there are {', '.join(NAMES)}")
    options = dict(_option(text, part) for part in rest.split(";") if part)
    if base != "prefixkv":
        profile = None  # what --profile names is not the papers'
    if base in WITH_PROFILE:
        profile = options.pop("profile", profile)
    known = [] if base == FULL else _option_names(_class(base))
    if unknown := [name for name in options if name not in known]:
        extra = ["profile"] if base in WITH_PROFILE else []
        there = f"there are {', '.join([*extra, *known])}" if known else "it takes none"
        raise ValueError(f"method {text!r} has no option {unknown[0]!r}; {there}")
    if as_published and "as_published" in known:
        options.setdefault("as_published", True)
    loaded = None
    if profile is not None:
        loaded = PrefixProfile.load(str(profile))
    if base != FULL:
        try:  # values that no model is needed for to refuse
            _maker(base)(budget=0.5, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"method {text!r}: {error}") from error
    if (base == "prefixkv" or loaded is not None) and (lengths := options.get("lengths", "search")) != "search":
        without = "online" if base == "prefixkv" else base
        raise ValueError(
            f"method {text!r} goes by a profile, and lengths={lengths!r} contradicts it: each says how long the layers "
            f"are; without a profile, write {f'{without}:lengths={lengths}'!r}"
        )
    return Method(text, base, options, loaded)


def _option(method: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"method {method!r}: {text!r} is no option; write name=value, with semicolons between")
    return name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    return text


def _class(base: str) -> type[PrefixKVCache]:
    return BASELINES.get(base, PrefixKVCache)


def _maker(base: str) -> Callable[..., PrefixKVCache]:
    return PrefixKVCache.paper if base == PAPER_METHOD else _class(base)


def _option_names(kind: type) -> list[str]:
    """Names that the constructor takes, those included that it passes on to the classes that it is made of."""
    names: list[str] = []
    for each in kind.__mro__:
        if "__init__" not in vars(each) or each is object:
            continue
        parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    fixed = ("self", "profile", "budget", "config", "image_mask")  # these are given by us
    return [name for name in dict.fromkeys(names) if name not in fixed]
