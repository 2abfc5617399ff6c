"""Compress once, ask many times: the context is fed, read a second time, and pruned before anybody asks.

`PrefixKVCache.compress` (KVzip, arXiv 2505.23416). The context goes in whole, through the model's own `generate`. Then
it is fed once more behind itself, a chunk at a time, each behind a short request to repeat it if one is given; nothing
of that is stored. A key's score is the largest attention that any of these tokens gives it, in any query head of its
key head (reconstruct.py). Lengths come from one pool of the scores of all layers and heads, or from a profile.

Where we differ from the published code: it masks heads and stores everything, here what is pruned is gone; the heads
of a layer get at most four lengths (lengths.py); sink and newest token stay; the request does not name the words that a
later chunk begins with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..methods import DEFAULT, Method
from ..profiles.profile import PrefixProfile
from ..rules.checks import check_integer
from ..rules.eviction import QueueEviction
from ..rules.importance import DEFAULT_MAX_BYTES
from ..rules.scoring import join_heads
from .guards import image_mask_of
from .layer import PrunedLayer
from .lengths import LengthSource
from .loaded import name_of
from .pipeline import kept_of_prompt
from .prompt import Prompt
from .reconstruct import LargestAttention
from .saved import deltas_of
from .second_pass import Context, SecondPass, context_of, first_pass, padding_of

C = TypeVar("C", bound="CompressedCaches")
RECONSTRUCT = "reconstruct"
COMES_LATER = DEFAULT.replace(lengths="pool", floor=0, text_floor=0.0, recent=1)
"""By which later turns are ranked and pairs leave while decoding, where nothing else is said."""


class CompressedCaches(Cache):
    """Caches of contexts that were read twice. A part of `PrefixKVCache`."""

    method: Method
    _model_name: str
    _position_deltas: Tensor | None
    context_ids: Tensor | None

    def _lengths(self) -> LengthSource:
        raise NotImplementedError

    @classmethod
    @torch.no_grad()
    def compress(
        cls: type[C],
        model: Any,
        inputs: Mapping[str, Any],
        budget: float | int = 0.2,
        *,
        method: Method | str = RECONSTRUCT,
        profile: PrefixProfile | str | os.PathLike[str] | None = None,
        later: Method | str | None = None,
        request: Tensor | Sequence[int] | None = None,
        chunk: int = 2048,
        progress: Callable[[int, int], None] | None = None,
        max_new_tokens: int | None = None,
        quantize: str | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> C:
        r"""Feed a context, prune it by what repeating it takes, and return the cache, ready to be asked.

        `model.generate(**inputs_with_more, past_key_values=cache)` goes on from it, where `inputs_with_more` are the
        tokens of the context and of a question behind them; `cache.copy()` for several questions.

        Args:
            model: a transformers model that can generate.
            inputs: the context, as `model.generate(**inputs)` takes it: images too, padded on the left or not.
            budget: what is kept of it; as of the constructor.
            method: `"reconstruct"`, or a method that ranks in one pass: then the context is fed once only.
            profile: where the lengths come from. None: one pool of all scores, or what the one-pass method says.
            later: with `"reconstruct"`: the method of later turns and of decoding. None: the profile's own, else
                `COMES_LATER`, the default method.
            request: token ids that ask to repeat the context, fed before each chunk of the second pass: such as
                `tokenizer("\n\nRepeat the previous context:").input_ids`. None: none.
            chunk: tokens of the second pass that are fed at once; also of the first, where there are no images.
            progress: called with (tokens read again, tokens in all) after each chunk.
            max_new_tokens: as of the constructor.
            quantize: as of the constructor.
            max_bytes: ceiling for the temporaries of the scores, per layer.

        Raises:
            TypeError, ValueError: inputs that are no context, or a model without positions for a second pass.
            RuntimeError: the model computes the attention of a layer by code of its own.
        """
        made: Any = cls
        ids = context_of(model, inputs)
        one_pass = method != RECONSTRUCT
        then = method if one_pass else later if later is not None or profile is not None else COMES_LATER
        cache = made(
            profile, budget, method=then, config=model.config, max_new_tokens=max_new_tokens, max_bytes=max_bytes,
            quantize=quantize, image_mask=image_mask_of(inputs, model.config) if one_pass else None,
        )  # fmt: skip
        _refuse_windows(cache.layers)
        if one_pass:
            first_pass(model, inputs, cache, check_integer("chunk", chunk, 1))
        else:
            asked = torch.as_tensor([] if request is None else request, dtype=torch.int64, device=ids.device)
            _reconstruct(cache, model, inputs, asked.flatten(), check_integer("chunk", chunk, 1), progress)
        _end_turn(cache.layers)
        _note(cache, model, ids)
        return cache


def _refuse_windows(layers: Sequence[Any]) -> None:
    if any(getattr(layer, "window", None) for layer in layers):
        raise ValueError(
            "every layer of this model has a sliding window, which holds no whole context to compress; "
            "PrefixKVCache(..., config=model.config) prunes inside the window"
        )


def _note(cache: Any, model: Any, ids: Tensor) -> None:
    """Of which model and of which tokens the cache is, and where positions go on."""
    cache._model_name, cache._position_deltas = name_of(model.config), deltas_of(model)
    cache.context_ids = cache._first_ids = ids.cpu()


def _reconstruct(
    cache: Any,
    model: Any,
    inputs: Mapping[str, Any],
    request: Tensor,
    chunk: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fill an empty cache with the context, pruned by its reconstruction scores."""
    context, source = Context(cache.layers), cache._lengths()
    fed = first_pass(model, inputs, context, chunk)
    valid, lengths = padding_of(inputs, fed.tokens)
    if all(source.keeps_all(place, lengths) for place in range(len(context.prunable))):
        scores = None
    else:
        second = SecondPass(model, context, fed, valid, request, LargestAttention(None, cache.max_bytes))
        scores = second.run(second.room(chunk), progress)
    prompts = [_prompt(context, index, scores, valid, lengths) for index in context.prunable]
    pruned = [cache.layers[index] for index in context.prunable]
    method = cache.method.replace(recent=1)  # what is recent is no better than the rest where the question is to come
    shares = source.shares(prompts, [layer.place for layer in pruned])
    for layer, share in zip(pruned, shares, strict=True):
        prompt = prompts.pop(0)  # each layer of the context is freed as it is pruned
        layer.lazy_initialization(prompt.keys, prompt.values)
        layer.prompt, layer._seen = prompt, prompt.n_new
        layer.prune(kept_of_prompt(prompt, share, method))


def _prompt(
    context: Context, index: int, scores: Mapping[int, Tensor] | None, valid: Tensor | None, lengths: list[int]
) -> Prompt:
    """A layer's context as the pipeline takes it; the context itself lets go of it."""
    held: Any = context.layers[index]
    keys, values = held.keys, held.values
    held.keys = held.values = None
    found = None if scores is None else scores[index].to(keys.device)
    if found is not None and found.shape[1] != keys.shape[1]:  # latent attention stores other heads
        found = join_heads(found, "max")
    own = None if valid is None else valid.to(keys.device)
    return Prompt(keys, values, [], attended=True, scores=found, scores_of_all=found, valid=own, lengths=lengths)


def _end_turn(layers: Sequence[Any]) -> None:
    """What comes next is a turn of its own, which has the headroom to itself; the context stays."""
    for segment in (each for layer in layers if isinstance(layer, PrunedLayer) for each in layer.segments):
        rows = [
            replace(row, first_origin=None if row.point is None else row.stored, began=row.seen - 1)
            if isinstance(row, QueueEviction)
            else row
            for row in segment._step.rows
        ]
        segment._step = segment._growing(rows)
