"""What `--methods` names: methods by their spelling, each with a profile or without, and the caches they make.

`full` is transformers' `DynamicCache`; every other name is a spelling of `Method`, with one option more that is not
part of it: `default:profile=FILE`. The name `profile` is what `--profile` gives, with the method it was made for.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import Cache

from ... import methods
from ...cache.cache import PrefixKVCache, image_mask_of
from ...methods.method import Method
from ...profiles.profile import PrefixProfile

FULL, PROFILE = "full", "profile"


@dataclass(frozen=True)
class Candidate:
    """One entry of the tables.

    Attributes:
        name: as it was spelled.
        method: None: the profile's own.
        profile: None: the method says where lengths come from.
    """

    name: str
    method: Method | None = None
    profile: PrefixProfile | None = None

    @property
    def identity(self) -> str:
        """A digest of what the cache does, so that stored results of another method or profile are not reused."""
        if self.name == FULL:
            return ""
        held = [] if self.profile is None else [self.profile.budgets.tolist(), self.profile.keep.tolist()]
        method = methods.resolve(self.method, self.profile)
        return hashlib.sha256(json.dumps([method.spell(full=True), held]).encode()).hexdigest()[:16]

    def make(self, model: Any, budget: float, inputs: Any = None) -> Cache:
        """A fresh cache for this model; `inputs` say where a prompt's images are.

        Raises:
            ValueError: the profile or the method does not fit the model.
        """
        if self.name == FULL:
            return DynamicCache(config=model.config)
        mask = None if inputs is None else image_mask_of(inputs, model.config)
        try:
            return PrefixKVCache(
                self.profile, budget, method=methods.resolve(self.method, self.profile), config=model.config,
                image_mask=mask,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ValueError(f"method {self.name!r}: {error}") from error


def parse_candidates(text: str, profile: str | None = None) -> list[Candidate]:
    """Candidates from their spellings, with commas between: `full,profile,snapkv:queries=64;pooling=5`.

    Args:
        text: the spellings.
        profile: file or bundled name; what the name `profile` stands for.

    Raises:
        ValueError: there is no such method or option, it is named twice, or a profile cannot be read.
    """
    found = [_parse(part.strip(), profile) for part in text.split(",") if part.strip()]
    names = [each.name for each in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"method {twice!r} is named twice")
    if not any(name != FULL for name in names):
        raise ValueError("--methods names nothing to compare with the full cache, which is measured anyway")
    return found


def _parse(text: str, profile: str | None) -> Candidate:
    if text == FULL:
        return Candidate(FULL)
    if text == PROFILE:
        if profile is None:
            raise ValueError(f"method {PROFILE!r} is the one that --profile P names, which is not given")
        return Candidate(PROFILE, None, PrefixProfile.load(profile))
    base, _, rest = text.partition(":")
    options = [option for option in rest.split(";") if option]
    own = [option.partition("=")[2] for option in options if option.startswith("profile=")]
    others = ";".join(option for option in options if not option.startswith("profile="))
    method = Method.parse(f"{base}:{others}" if others else base)
    return Candidate(text, method, PrefixProfile.load(own[-1]) if own else None)
