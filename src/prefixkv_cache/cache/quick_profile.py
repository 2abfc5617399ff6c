"""A profile in one line: a length for each key head, from one prompt that is read twice.

What `PrefixKVCache.for_model(model, calibrate_with=inputs)` does where the model has no profile. Which heads need much
belongs to the model, not to the prompt, so one prompt is nearly enough (docs/study.md). The profile is kept in the
user's cache folder and taken from there the next time. It is not measured on other samples, and says nothing of what it
costs: `prefixkv calibrate` makes one that does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import DEFAULT
from ..profiles.profile import PrefixProfile, ProfileError
from ..rules.importance import DEFAULT_MAX_BYTES
from ..rules.lengths import pool_counts
from .loaded import name_of
from .reconstruct import LargestAttention
from .second_pass import Context, SecondPass, context_of, first_pass, padding_of

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_LEAST, _CHUNK = 2, 2048


def quick_profile(model: Any, inputs: Mapping[str, Any], layers: Sequence[Any]) -> PrefixProfile:
    """The model's profile from the user's cache folder; made from this prompt, and kept there, if there is none.

    Args:
        model: a transformers model that can generate.
        inputs: the prompt, as `model.generate(**inputs)` takes it.
        layers: cache layers of the model, empty.

    Raises:
        TypeError, ValueError: inputs that are no prompt, one that is too short, or no room for a second pass.
    """
    path = profile_path(model)
    try:
        return PrefixProfile.load(path)
    except ProfileError:  # not there yet, or damaged: made anew
        profile = make_profile(model, inputs, layers)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.save(path)
        kept = f"kept in {path}"
    except OSError as error:
        kept = f"not kept ({error})"
    warnings.warn(f"made a profile of {profile.metadata['model']!r} from one prompt; {kept}", stacklevel=3)
    return profile


def profile_path(model: Any) -> Path:
    """Where the profile of this model is kept: by its name, and a hash of its config and weights' shapes.

    The folder is `$PREFIXKV_HOME`, else `$XDG_CACHE_HOME/prefixkv-cache`, else `~/.cache/prefixkv-cache`.
    """
    home = os.environ.get("PREFIXKV_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) if home else Path(cache) / "prefixkv-cache"
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    shapes = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    known = hashlib.sha256(json.dumps([config, shapes], sort_keys=True, default=str).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name_of(model.config)).strip("-.") or "model"
    return folder / f"{name}-{known}.safetensors"


def make_profile(model: Any, inputs: Mapping[str, Any], layers: Sequence[Any]) -> PrefixProfile:
    """A length for each key head by one pool of reconstruction scores (KVzip, arXiv 2505.23416), mean over the rows."""
    ids = context_of(model, inputs)
    context = Context(layers)
    fed = first_pass(model, inputs, context, _CHUNK)
    valid, lengths = padding_of(inputs, fed.tokens)
    request = torch.empty(0, dtype=torch.int64, device=ids.device)
    second = SecondPass(model, context, fed, valid, request, LargestAttention(None, DEFAULT_MAX_BYTES))
    found = second.run(second.room(_CHUNK), None)
    scores = torch.stack([found[index] for index in context.prunable], dim=1)
    rows = [of_row if valid is None else of_row[..., valid[row].cpu()] for row, of_row in enumerate(scores)]
    budgets = [budget for budget in BUDGETS if budget * min(lengths) >= _LEAST]
    if len(budgets) < 2:
        raise ValueError(
            f"calibrate_with has a row of {min(lengths)} tokens, too short for a profile; give a longer one"
        )
    keep = torch.stack([torch.stack([_ratios(row, budget) for row in rows]).mean(0) for budget in budgets])
    described = {
        "model": name_of(model.config) or model.config.model_type,
        "method": DEFAULT.spell(full=True),
        "source": "one prompt, read twice",
        "samples": str(len(rows)),
        "by": "reconstruction/head",
    }
    return PrefixProfile(torch.tensor(budgets, dtype=torch.float64), keep, described)


def _ratios(scores: Tensor, budget: float) -> Tensor:
    """float64 [n_layers, n_heads]: what each head keeps of one row's prompt, scores [n_layers, n_heads, n]."""
    return pool_counts(scores, round(budget * scores.numel()), _LEAST).double() / scores.shape[2]
