"""Run a model over one prompt, with the full cache and with pruned ones, and write down what there is to see.

Knows models and caches, and nothing of pages: the result is a `Report`, plain data. One forward is observed for the
attention; then every cache answers once and is looked at between its prompt and its first new token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from ...cache.architecture import PRUNABLE, cache_layers
from ...cache.cache import PrefixKVCache
from ...calibration.calibrate import describe_model
from ...calibration.observe import ObservedCache, Scores, check_observed, score_key
from ...methods import Method, Ranking, resolve
from ...rules.checks import check_budget
from ...rules.importance import DEFAULT_MAX_BYTES
from ..answer import Answer, answer, kept_columns
from ..loading import image_positions, prepare
from .grid import ImageTokens, place_images


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
    """What one budget kept, at the prompt's end, and what the model then said.

    Attributes:
        budget: fraction of the prompt's pairs kept, or pairs a head.
        ratio: the same as a fraction of this prompt.
        kept: for each prunable layer and key head, the columns of the prompt that it kept, rising; one list in a layer
            whose heads keep the same.
        mass: for each prunable layer, the share of the attention that the kept ones received, mean over its heads.
        answer: what was generated.
    """

    budget: float | int
    ratio: float
    kept: list[list[list[int]]]
    mass: list[float]
    answer: Answer


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        model: name of the model, without the path to it.
        prompt: as the user gave it.
        method: of the caches.
        source: the name of the profile that the lengths came from; None without one.
        tokens: of the whole prompt as the model read it, as text, image tokens included.
        image_columns: where in it image tokens stand; none where the model's config names no such token.
        pictures: in the order of the prompt.
        layers: index of each prunable layer among the decoder's cache layers.
        n_whole: how many other layers there are, which are left whole.
        full: what the model says with the full cache.
        pruned: for each budget, falling.
        beside: a second method, shown beside the first; None: there is none.
        others: what it kept, for each budget, falling.
    """

    model: str
    prompt: str
    method: Method
    source: str | None
    tokens: list[str]
    image_columns: list[int]
    pictures: list[Picture]
    layers: list[int]
    n_whole: int
    full: Answer
    pruned: list[Pruned]
    beside: Method | None = None
    others: Sequence[Pruned] = ()


def collect_report(
    model: Any,
    processor: Any,
    prompt: str,
    pictures: Sequence[tuple[str, Image.Image]],
    budgets: Sequence[float | int],
    *,
    max_new_tokens: int = 128,
    beside: Method | str | None = None,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Report:
    """Ask once with the full cache and once with each budget.

    Args:
        model: as `loading.load_model` returns it, with its `processor`.
        processor: of the model.
        prompt: the question.
        pictures: (name, picture), in order.
        budgets: fractions kept, in (0, 1], or numbers of pairs a head.
        max_new_tokens: of each answer.
        beside: a second method that is shown at the same budgets, without a profile.
        say: called with each step's name.
        options: further arguments of `PrefixKVCache.for_model`, such as `profile` and `method`.

    Raises:
        TypeError, ValueError: no budgets, or one that is none; a model whose cache cannot be pruned.
        RuntimeError: the model's attention cannot be observed.
    """
    inputs = prepare(processor, [(prompt, [picture for _, picture in pictures])], model.device)
    ids = inputs["input_ids"][0].tolist()
    ratios = _ratios(budgets, len(ids))
    second = None if beside is None else resolve(beside)
    say("observing the prompt's attention")
    cache = PrefixKVCache.for_model(model, **options)
    attention = _attention(model, processor, inputs, cache.method)
    layers, n_whole = _prunable_layers(model.config)
    question = _Question(model, processor, inputs, layers, attention, max_new_tokens, say)
    say("answering with the full cache")
    full = answer(model, processor, inputs, DynamicCache(config=model.config), max_new_tokens)
    pruned = [question.ask(budget, ratios[budget], **options) for budget in ratios]
    others = [question.ask(budget, ratios[budget], method=second, profile=None) for budget in ratios if second]
    image_columns = image_positions(inputs, model.config)[0]
    return Report(
        model=describe_model(model)["model"],
        prompt=prompt,
        method=cache.method,
        source=cache.profile and cache.profile.metadata["model"],
        tokens=_texts(processor, ids),
        image_columns=image_columns,
        pictures=_pictures(pictures, ids, image_columns, inputs, model.config, processor),
        layers=layers,
        n_whole=n_whole,
        full=full,
        pruned=pruned,
        beside=second,
        others=others,
    )


@dataclass(frozen=True)
class _Question:
    """A prepared prompt, the share of the attention that its keys receive by layer, and whom to ask."""

    model: Any
    processor: Any
    inputs: Any
    layers: Sequence[int]
    attention: Sequence[Tensor]
    max_new_tokens: int
    say: Callable[[str], None]

    def ask(self, budget: float | int, ratio: float, **options: Any) -> Pruned:
        """Answer with one budget, and look at the cache at the prompt's end."""
        cache = PrefixKVCache.for_model(self.model, budget, inputs=self.inputs, **options)
        self.say(f"answering with budget {budget:g}, {cache.method.spell()}")
        look = partial(_kept, cache, self.layers)
        said = answer(self.model, self.processor, self.inputs, cache, self.max_new_tokens, look=look)
        mass = [_mass(of_layer, kept) for of_layer, kept in zip(self.attention, said.looked, strict=True)]
        return Pruned(budget, ratio, said.looked, mass, said)


def _prunable_layers(config: Any) -> tuple[list[int], int]:
    """Indices of the layers that are pruned, and how many are left whole."""
    kinds = [kind for kind, _ in cache_layers(config)]
    layers = [index for index, kind in enumerate(kinds) if kind == PRUNABLE]
    return layers, len(kinds) - len(layers)


def _ratios(budgets: Sequence[float | int], n_tokens: int) -> dict[float | int, float]:
    """Budgets, each once and falling, as fractions of a prompt of so many tokens."""
    if not budgets:
        raise ValueError("there are no budgets to report on; give at least one")
    checked = [check_budget(budget) for budget in budgets]
    ratios = {budget: min(budget / n_tokens, 1.0) if isinstance(budget, int) else budget for budget in checked}
    return dict(sorted(ratios.items(), key=lambda item: item[1], reverse=True))


def _attention(model: Any, processor: Any, inputs: Any, method: Method) -> list[Tensor]:
    """Share of each head's attention that each key receives from the method's observation window.

    Returns:
        float32 [kv_heads, n_tokens] for each prunable layer.
    """
    cache, n_tokens = ObservedCache(model.config, stored=False), inputs["input_ids"].shape[1]
    plain = Method(Ranking(queries=method.ranking.queries, heads="each"))
    cache.observer = found = Scores([plain], DEFAULT_MAX_BYTES)
    answer(model, processor, inputs, cache, 1)  # one new token: the prompt's forward alone
    check_observed(model, cache.prunable, found.seen)
    of_layers = [found.of[score_key(plain)][layer][0].cpu() for layer in cache.prunable]
    if of_layers[0].shape[-1] != n_tokens:
        raise ValueError(
            f"the model makes {of_layers[0].shape[-1]} keys of a prompt of {n_tokens} tokens, so none can be pointed at"
        )
    return [each / each.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) for each in of_layers]


def _kept(cache: PrefixKVCache, layers: Sequence[int]) -> list[list[list[int]]]:
    return [kept_columns(cache, layer) for layer in layers]


def _mass(attention: Tensor, kept: list[list[int]]) -> float:
    """Mean over the key heads of the attention, [1 or kv_heads, n_tokens], that went to what each keeps."""
    n_heads = max(len(attention), len(kept))
    heads = kept if len(kept) > 1 else kept * n_heads
    shares = (row[columns].sum() for row, columns in zip(attention.expand(n_heads, -1), heads, strict=True))
    return float(sum(shares)) / n_heads


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
