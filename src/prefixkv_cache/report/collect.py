"""Run a model over one prompt, with the full cache and with pruned ones, and write down what there is to see.

Knows models and caches, and nothing of pages: the result is a `Report`, plain data. A forward is watched for the
attention, and one for the scores where the cache ranks keys by more than that (observe.py); then every cache answers
once and is looked at between its prompt and its first new token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from ..architecture import PRUNABLE, cache_layers
from ..cache import PrefixKVCache
from ..calibrate import describe_model
from ..calibrated_for import explain_mismatch, plain_ranking
from ..generate import Answer, answer, cache_bytes
from ..loading import image_positions, prepare
from ..observe import observe
from ..profile import check_budget
from ..scoring import Ranking
from ..threshold import search_threshold
from .grid import ImageTokens, place_images

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """One picture of the prompt.

    Attributes:
        name: shown above it.
        image: as the views lie over it: what the model saw of it.
        tokens: its tokens and their views; None where the prompt's image tokens cannot be told apart.
    """

    name: str
    image: Image.Image
    tokens: ImageTokens | None


@dataclass(frozen=True)
class Pruned:
    """What one budget kept, right after the prompt, and what the model then said.

    Attributes:
        budget: fraction of the prompt's pairs kept, over the prunable layers.
        threshold: of the search on this prompt, at this budget: the share of its scores that it lets every layer reach.
        kept: for each prunable layer, the columns of the prompt that it kept, rising.
        mass: for each prunable layer, the share of the attention that the kept ones received.
        missed: for each prunable layer, the share of the scores that the pruned ones had; may be far below float32's
            last bit of 1.
        nbytes: of the KV tensors, before the first new token.
        answer: what was generated.
        agrees: how many characters the answer has in common with the full cache's, from its beginning.
    """

    budget: float
    threshold: float
    kept: list[list[int]]
    mass: list[float]
    missed: list[float]
    nbytes: int
    answer: Answer
    agrees: int


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        model: name of the model, without the path to it.
        prompt: as the user gave it.
        ranking: what the caches ranked keys by.
        source: where the lengths came from: the name of a profile, or None for the search on the prompt.
        tokens: of the whole prompt as the model read it, as text, image tokens included.
        image_columns: where in it image tokens stand; none where the model's config names no such token.
        pictures: in the order of the prompt.
        layers: index of each prunable layer among the decoder's cache layers.
        n_whole: how many other layers there are, which are left whole.
        importance: the attention that each key received from the queries of the ranking, float32 [n_prunable_layers,
            n_tokens], each layer's sum 1.
        scores: what ranked the keys, likewise; the importance itself where the ranking is plain.
        full_bytes: of the full cache's KV tensors, before the first new token.
        full: what the model says with the full cache.
        pruned: for each budget, falling.
    """

    model: str
    prompt: str
    ranking: Ranking
    source: str | None
    tokens: list[str]
    image_columns: list[int]
    pictures: list[Picture]
    layers: list[int]
    n_whole: int
    importance: Tensor
    scores: Tensor
    full_bytes: int
    full: Answer
    pruned: list[Pruned]


def collect_report(
    model: Any,
    processor: Any,
    prompt: str,
    pictures: Sequence[tuple[str, Image.Image]],
    budgets: Sequence[float],
    *,
    max_new_tokens: int = 128,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Report:
    """Ask once with the full cache and once with each budget.

    Args:
        model: as `loading.load_model` returns it, with its `processor`.
        processor: of the model.
        prompt: the question.
        pictures: (name, picture), in order.
        budgets: fractions kept, each in (0, 1].
        max_new_tokens: of each answer.
        say: told what is being done.
        options: further arguments of `PrefixKVCache.for_model`, such as `profile` and `queries`; `**PAPER` for the
            paper's rule.

    Raises:
        TypeError, ValueError: no budgets, or some outside (0, 1]; a model whose cache cannot be pruned.
        RuntimeError: the model's attention cannot be observed.
    """
    budgets = sorted({check_budget(budget) for budget in budgets}, reverse=True)
    if not budgets:
        raise ValueError("there are no budgets to report on; give at least one in (0, 1]")
    inputs = prepare(processor, [(prompt, [picture for _, picture in pictures])], model.device)
    ids = inputs["input_ids"][0].tolist()

    say("watching the prompt's attention")
    ranking = PrefixKVCache.for_model(model, budgets[0], **options).ranking
    plain = plain_ranking(ranking.queries)
    importance = _watch(model, inputs, plain)
    scores = importance if ranking == plain else _watch(model, inputs, ranking)

    def run(cache: Cache, look: Callable[[], T]) -> tuple[Answer, T]:
        looked: list[T] = []
        between = StoppingCriteriaList([_AfterPrompt(lambda: looked.append(look()))])
        return answer(model, processor, inputs, cache, max_new_tokens, stopping_criteria=between), looked[0]

    say("answering with the full cache")
    cache: Cache = DynamicCache(config=model.config)
    full, full_bytes = run(cache, partial(cache_bytes, cache))

    kinds = [kind for kind, _ in cache_layers(model.config)]
    layers = [index for index, kind in enumerate(kinds) if kind == PRUNABLE]
    pruned, source = [], None
    for budget in budgets:
        say(f"answering with budget {budget:g}")
        cache = PrefixKVCache.for_model(model, budget, **options)
        source = _source(cache)
        said, (kept, nbytes) = run(cache, partial(_held, cache, layers))
        mass = [float(row[columns].sum()) for row, columns in zip(importance, kept, strict=True)]
        missed = [_sum_without(row, columns) for row, columns in zip(scores, kept, strict=True)]
        threshold = search_threshold(scores, budget, sink=cache.sink, floor=cache.floor, cap=cache.cap)[0]
        agrees = _common_start(said.text, full.text)
        pruned.append(Pruned(budget, threshold, kept, mass, missed, nbytes, said, agrees))

    image_columns = image_positions(inputs, model.config)[0]
    return Report(
        model=describe_model(model)["model"],
        prompt=prompt,
        ranking=ranking,
        source=source,
        tokens=_texts(processor, ids),
        image_columns=image_columns,
        pictures=_pictures(pictures, ids, image_columns, inputs, model.config, processor),
        layers=layers,
        n_whole=len(kinds) - len(layers),
        importance=importance,
        scores=scores,
        full_bytes=full_bytes,
        full=full,
        pruned=pruned,
    )


def _watch(model: Any, inputs: Any, ranking: Ranking) -> Tensor:
    """What a ranking gives each key of the prompt, as a share of its layer: float32 [n_prunable_layers, n_tokens]."""
    scores, n_tokens = observe(model, inputs, ranking=ranking)[0], inputs["input_ids"].shape[1]
    if scores.shape[1] != n_tokens:
        raise ValueError(
            f"the model makes {scores.shape[1]} keys of a prompt of {n_tokens} tokens, so none can be pointed at"
        )
    return scores / scores.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _source(cache: PrefixKVCache) -> str | None:
    """The name of the cache's profile, and whether it was made for another ranking."""
    if cache.profile is None:
        return None
    name = cache.profile.metadata["model"]
    differs = explain_mismatch(cache.profile.metadata, cache.ranking) is not None
    return f"{name}, made for another ranking" if differs else name


class _AfterPrompt(StoppingCriteria):
    """Stops nothing: calls a function once, when the prompt has been read and its first token chosen."""

    def __init__(self, look: Callable[[], None]):
        self._look: Callable[[], None] | None = look

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self._look is not None:
            self._look()
            self._look = None
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _held(cache: PrefixKVCache, layers: Sequence[int]) -> tuple[list[list[int]], int]:
    return [sorted(cache.kept_positions(layer)[0].tolist()) for layer in layers], cache.nbytes


def _sum_without(row: Tensor, columns: Sequence[int]) -> float:
    left = torch.ones_like(row, dtype=torch.bool)
    left[columns] = False
    return float(row[left].sum(dtype=torch.float64))


def _common_start(text: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))


def _texts(processor: Any, ids: Sequence[int]) -> list[str]:
    """Each token as text, with the space that it begins with where the tokenizer marks one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    marked = [str(token or "") for token in tokenizer.convert_ids_to_tokens(ids)]
    texts = tokenizer.batch_decode([[token] for token in ids])
    return [f" {text.lstrip()}" if mark[:1] in ("▁", "Ġ") else text for mark, text in zip(marked, texts, strict=True)]


def _pictures(
    pictures: Sequence[tuple[str, Image.Image]],
    ids: Sequence[int],
    columns: Sequence[int],
    inputs: Any,
    config: Any,
    processor: Any,
) -> list[Picture]:
    sizes = [(picture.height, picture.width) for _, picture in pictures]
    placed = place_images(ids, columns, sizes, inputs, config, processor) or [None] * len(pictures)
    return [
        Picture(name, _seen(picture, number, inputs, processor), tokens)
        for number, ((name, picture), tokens) in enumerate(zip(pictures, placed, strict=True))
    ]


def _seen(picture: Image.Image, number: int, inputs: Any, processor: Any) -> Image.Image:
    """The picture itself where the processor only resizes it; where it crops or pads, what is left in the pixels."""
    images: Any = getattr(processor, "image_processor", None)
    pixels = inputs.get("pixel_values")
    changed = getattr(images, "do_center_crop", False) or getattr(images, "do_pad", False)
    if not changed or pixels is None or pixels.ndim != 4 or pixels.shape[1] != 3 or number >= len(pixels):
        return picture
    values = pixels[number].float().cpu()
    if getattr(images, "do_normalize", False):
        mean, deviation = torch.tensor(images.image_mean), torch.tensor(images.image_std)
        values = values * deviation[:, None, None] + mean[:, None, None]
    values = (values * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())
