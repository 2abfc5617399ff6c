"""From what the keys of a layer received to the scores that rank them.

A pure step between importance.py and selection.py: (importance per head, keys, values) -> scores. Each choice is one
function behind one field of `Ranking`; they combine freely, in the order in which they stand here. `Ranking()` is the
plain one: the mean over the heads, and nothing else.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import ALONE, HeadRanks

_PIECE_BYTES = 16 * 2**20  # of keys or values that stand in float32 at a time
_BLOCK = 1024  # keys that are compared with each other
_STRIP, _STRIPS_AT_ONCE = 128, 8  # of which so many with all better ones: a table of at most 512 KiB, 8 at a time
_SKETCH = 32
_THE_SAME = 1.0 - 2e-6  # a cosine similarity of unit vectors of 32 numbers that float32 cannot tell from 1
_TINY = torch.finfo(torch.float32).tiny
_WINDOW = 32  # last tokens that count where no text has seen the image, as many as the queries of the default
AVERAGES = ("sum", "visible")
HEADS = ("mean", "max", "each")


@dataclass(frozen=True)
class Ranking:
    """How the keys of a layer are ranked. Checked when it is made.

    Attributes:
        queries: whose attention counts: `"all"` prompt tokens, `"text"`: those behind the first image (see
            `text_queries`), or an integer W: the last W real tokens.
        average: `"sum"` over these queries (the papers), or `"visible"`: divided by how many of them can see the key.
        heads: `"mean"` over the heads (the papers), `"max"`, or `"each"`: every key head keeps keys of its own, as many
            as the others (SnapKV, H2O).
        pooling: a key's importance becomes the largest in a window of so many keys around it, an odd number (SnapKV,
            arXiv 2404.14469, section 4.2); 1: its own.
        value_norm: whether importance is multiplied by the L2 norm of the value, as the attention's output is
            (arXiv 2502.03805 goes one step further and takes the norm behind the output projection).
        diversity: share, in [0, 1], of a key's score that is its difference from the layer's mean key instead of its
            importance (after MixKV, arXiv 2510.20707).
        novelty: exponent, 0 or more, of the factor by which a key loses what better-ranked keys say already: 1 minus
            the largest cosine similarity of its value with one of theirs. Ours; see docs/study.md.
    """

    queries: int | str = 32
    average: str = "sum"
    heads: str = "mean"
    pooling: int = 1
    value_norm: bool = False
    diversity: float = 0.0
    novelty: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", _check_queries(self.queries))
        check_choice("average", self.average, AVERAGES)
        check_choice("heads", self.heads, HEADS)
        object.__setattr__(self, "pooling", _check_pooling(self.pooling))
        if not isinstance(self.value_norm, bool):
            raise TypeError(f"value_norm must be True or False; got {self.value_norm!r}")
        object.__setattr__(self, "diversity", check_fraction("diversity", self.diversity))
        object.__setattr__(self, "novelty", _check_exponent(self.novelty))

    @property
    def sums_all(self) -> bool:
        """Whether it begins with the papers' importance: summed over all queries."""
        return self.queries == "all" and self.average == "sum"

    @property
    def by_head(self) -> bool:
        """Whether the importance is needed for each head by itself."""
        return self.heads != "mean" or self.pooling > 1 or self.value_norm

    @property
    def by_rank(self) -> bool:
        """Whether ranks that hold other heads come to other scores, though heads agree on keys."""
        return self.heads != "each" and (self.by_head or self.diversity > 0 or self.novelty > 0)


@torch.no_grad()
def rank_keys(
    importance: Tensor,
    keys: Tensor,
    values: Tensor,
    ranking: Ranking,
    real: Tensor | None = None,
    ranks: HeadRanks = ALONE,
) -> Tensor:
    """The scores by which keys are kept, from their importance.

    A key or value that holds nan or inf says nothing: its norm counts as 0, and it is neither novel nor unlike the
    others. (So does one too large for a norm in float32, beyond 1e18; novelty knows no such limit.) An importance of
    nan stays nan. Neither changes how the other keys compare.

    Args:
        importance: float32 [batch, kv_heads, n], or [batch, 1, n] where no field of the ranking looks at single heads.
        keys, values: [batch, kv_heads, n, head_dim], looked at only where the ranking needs them.
        ranking: what to do.
        real: bool [batch, n], False at padding. None: no padding.
        ranks: who holds the other heads, where heads agree on keys. `[batch, 1, n]` importance is of all heads already.

    Returns:
        float32 [batch, kv_heads, n] with `heads="each"`, else [batch, 1, n]; not negative.
    """
    scores = importance
    if ranking.value_norm:
        scores = scores * vector_norms(values).nan_to_num(nan=0.0, posinf=0.0)
    if ranking.pooling > 1:
        scores = pool_neighbours(scores, ranking.pooling, real)
    if ranking.by_head:
        scores = ranks.gather(scores)
    scores = join_heads(scores, ranking.heads)
    if ranking.diversity:
        scores = mix_in_diversity(scores, keys, ranking.diversity, real, ranks)
    if ranking.novelty:
        scores = discount_repetition(scores, values, ranking.novelty, real, ranks)
    return scores


def text_queries(image: Tensor, real: Tensor | None = None) -> Tensor:
    """Whose attention counts with `queries="text"`: the text behind the first image, bool [batch, n].

    A row without an image goes by all its text. In a row that ends in an image no text has seen that image, and nothing
    could be said of its keys: there the last 32 tokens count too, whatever they are. So the last token always counts,
    and every key is seen by somebody who counts.

    Args:
        image: bool [batch, n], True at image tokens.
        real: bool [batch, n], False at padding. None: no padding.
    """
    real = torch.ones_like(image) if real is None else real
    image, text = image & real, ~image & real
    counting = text & ((image.cumsum(1) > 0) | ~image.any(1, keepdim=True))
    order = real.cumsum(1)
    ends_in_image = (image & (order == order[:, -1:])).any(1, keepdim=True)
    return counting | (ends_in_image & real & (order > order[:, -1:] - _WINDOW))


def pool_neighbours(scores: Tensor, width: int, real: Tensor | None = None) -> Tensor:
    """The largest score among the `width` keys around each key, itself in the middle; padding is nobody's neighbour.

    Args:
        scores: [batch, heads, n], not negative. A score of nan stays nan, and is no neighbour either.
        width: odd.
        real: bool [batch, n] or None.
    """
    width = min(width, 2 * scores.shape[2] - 1)  # so wide, each key sees all the others
    unknown = scores.isnan()
    silent = unknown if real is None else unknown | ~real[:, None]
    largest = F.max_pool1d(scores.masked_fill(silent, 0.0), width, stride=1, padding=width // 2)
    return torch.where(silent, scores if real is None else scores.masked_fill(~real[:, None], 0.0), largest)


def join_heads(scores: Tensor, how: str) -> Tensor:
    """[batch, heads, n] -> [batch, 1, n], or unchanged for `"each"`."""
    if how == "each" or scores.shape[1] == 1:
        return scores
    return scores.amax(1, keepdim=True) if how == "max" else scores.mean(1, keepdim=True)


def vector_norms(vectors: Tensor) -> Tensor:
    """The L2 norm of each vector, nan or inf if it has none: [batch, heads, n, size] -> float32 [batch, heads, n]."""
    norms = torch.empty(vectors.shape[:3], dtype=torch.float32, device=vectors.device)
    for rows, heads, spans in _pieces(vectors):
        for span in spans:
            # In half precision the squares would overflow.
            norms[rows, heads, span] = torch.linalg.vector_norm(vectors[rows, heads, span].float(), dim=-1)
    return norms


def mix_in_diversity(
    scores: Tensor, keys: Tensor, share: float, real: Tensor | None = None, ranks: HeadRanks = ALONE
) -> Tensor:
    """Replace a share of each score by how far the key points away from the mean direction of the layer's keys.

    Both parts are put on a scale from 0 to 1 first, as the sum of a row, so that `share` means what it says.

    Args:
        scores: [batch, 1 or heads, n], not negative.
        keys: [batch, heads, n, head_dim]. One without a finite norm counts as no different from the others.
        share: in [0, 1].
        real: bool [batch, n] or None.
        ranks: who holds the other heads, where one row of scores is for all of them.
    """
    weight = torch.ones_like(scores[:, :1]) if real is None else real[:, None].to(scores.dtype)
    away = ranks.gather(_away_from_mean(keys, weight))
    away = join_heads(away, "mean" if scores.shape[1] == 1 else "each") * weight
    return (1.0 - share) * _to_one(scores) + share * _to_one(away)


def _away_from_mean(keys: Tensor, weight: Tensor) -> Tensor:
    """1 minus the cosine similarity of each key with the mean direction of its head: float32 [batch, heads, n].

    A key without a finite norm has no direction: it takes no part in the mean, and is at distance 0.

    Directions are never written out: with the norms beside, both the mean and the similarities are products of the keys
    as they are, a piece of them at a time.

    Args:
        keys: [batch, heads, n, head_dim].
        weight: float32 [batch, 1, n], 1 or, at padding, 0.
    """
    away = torch.empty(keys.shape[:3], dtype=torch.float32, device=keys.device)
    for rows, heads, spans in _pieces(keys):
        away[rows, heads] = 1.0 - _similarity_to_mean(keys[rows, heads], weight[rows], spans)
    return away.clamp_min_(0.0)  # rounding takes a cosine beyond 1 where all keys are alike


def _similarity_to_mean(keys: Tensor, weight: Tensor, spans: list[slice]) -> Tensor:
    """What `_away_from_mean` is 1 minus of, for one piece, by spans of n where even that is large."""
    if len(spans) == 1:
        keys = keys.float()  # once for both passes
    norms = torch.empty(keys.shape[:3], dtype=torch.float32, device=keys.device)
    mean: Any = 0.0
    for span in spans:
        part = keys[:, :, span].float()
        norms[..., span] = torch.linalg.vector_norm(part, dim=-1).clamp_min_(1e-12)
        inverse = norms[..., span].reciprocal().nan_to_num_(nan=0.0)  # of infinity it is 0 already
        # A factor of 0 alone would not take nan and infinity out of a sum.
        mean = mean + (inverse * weight[..., span])[:, :, None] @ part.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    mean = mean / weight.sum(-1)[..., None, None].clamp_min(1.0)
    mean = mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp_min(1e-8)  # opposite keys have none
    similarity = torch.empty_like(norms)
    for span in spans:
        similarity[..., span] = (keys[:, :, span].float() @ mean.transpose(-1, -2)).squeeze(-1)
    return similarity.mul_(norms.reciprocal()).masked_fill_(~norms.isfinite(), 1.0)


def discount_repetition(
    scores: Tensor, values: Tensor, exponent: float, real: Tensor | None = None, ranks: HeadRanks = ALONE
) -> Tensor:
    """Each score times `(1 - s) ** exponent`, s being how much the key's value repeats that of a better-ranked key.

    s is the largest cosine similarity with the value of a key of higher score (ties: the lower column), at least 0. A
    background of many like patches so keeps one of them, and what it would have taken goes to what is unlike.

    Only keys of the same 1024 tokens are compared, so that the work grows with the length and not with its square; and
    by a random sketch of the values, of 32 numbers each.

    Args:
        scores: [batch, 1 or heads, n], not negative. One row for all heads compares the values of all heads together.
        values: [batch, heads, n, head_dim]. One that is not finite repeats everything, and nothing repeats it.
        exponent: 0 or more.
        real: bool [batch, n], False at padding. None: no padding.
        ranks: who holds the other heads, where one row of scores is for all of them.
    """
    sketch = _sketch(values, scores.shape[1] == 1, ranks)
    # Directions are told by sketches on the scale of their largest number, whose squares no sum of them can overflow.
    top = sketch.abs().amax(-1, keepdim=True)
    unknown = ~top.isfinite()
    sketch = F.normalize((sketch / top.clamp_min(_TINY)).masked_fill_(unknown, 0.0), dim=-1)
    ranked = scores.masked_fill(scores.isnan(), -1.0)  # sorted, nan would be the best of all
    if real is None:
        repetition = _repetition(ranked, sketch)
    else:
        # The blocks are of a row's own tokens: what it keeps must not depend on how it was padded.
        own_first = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, None].expand_as(scores)
        ranked = ranked.masked_fill(~real[:, None], -1.0).gather(2, own_first)
        repetition = _repetition(ranked, sketch.gather(2, own_first[..., None].expand_as(sketch)))
        repetition = torch.empty_like(repetition).scatter_(2, own_first, repetition)
    repetition.masked_fill_(unknown[..., 0], 1.0)
    discounted = scores * (1.0 - repetition) ** exponent
    return discounted if real is None else torch.where(real[:, None], discounted, scores)


def _sketch(values: Tensor, together: bool, ranks: HeadRanks = ALONE) -> Tensor:
    """[batch, heads, n, size] -> float32 [batch, 1 or heads, n, at most 32] of about the same cosine similarities.

    (Johnson-Lindenstrauss.) A piece at a time, in float32 where the values are float16, whose sums would overflow. What
    is not finite in a value is not finite in its sketch.

    Args:
        values: as they are.
        together: whether the heads of a key, side by side, are one long vector.
        ranks: who holds the other heads of these vectors, where `together`: projections add up, so that no more than 32
            numbers of a key go from rank to rank.
    """
    batch, heads, n, size = values.shape
    long = size * heads * ranks.count if together else size
    if long <= _SKETCH:
        values = ranks.gather(values).float()
        return values.transpose(1, 2).flatten(2)[:, None] if together else values
    dtype = torch.float32 if values.dtype == torch.float16 else values.dtype
    signs = _signs(long, dtype, values.device).unflatten(0, (-1, size))  # of each head, where they are not all the same
    signs = signs[heads * ranks.place : heads * (ranks.place + 1)] if together else signs.expand(heads, -1, -1)
    sketch = torch.zeros(batch, 1 if together else heads, n, _SKETCH, device=values.device)
    for rows, some, spans in _pieces(values):
        for span in spans:
            projected = (values[rows, some, span].to(dtype) @ signs[some]).float()
            if together:
                sketch[rows, :, span] += projected.sum(1, keepdim=True)
            else:
                sketch[rows, some, span] = projected
    return ranks.gather(sketch).sum(1, keepdim=True) if together else sketch


@lru_cache(maxsize=8)
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 and -1 by chance, [size, 32], the same on every device and rank.

    Kept, since all layers ask for the same: drawing them takes longer than using them.
    """
    with torch.inference_mode(False):  # else who asked first would decide what others may do with it
        source = torch.Generator().manual_seed(0)
        return (torch.randint(0, 2, (size, _SKETCH), generator=source) * 2 - 1).to(device, dtype)


def _repetition(scores: Tensor, sketch: Tensor) -> Tensor:
    """Largest similarity with a better-ranked key of the same block, in [0, 1]: [batch, heads, n].

    Args:
        scores: [batch, heads, n]; -1, less than any score, where there is no key.
        sketch: unit vectors [batch, heads, n, size].
    """
    batch, heads, n = scores.shape
    width = max(1, min(n, _BLOCK))
    padding = -n % width
    if padding:
        scores, sketch = F.pad(scores, (0, padding), value=-1.0), F.pad(sketch, (0, 0, 0, padding))
    ranked, blocks = scores.reshape(-1, width), sketch.reshape(-1, width, sketch.shape[-1])
    order = ranked.argsort(dim=1, descending=True, stable=True)
    blocks = blocks.gather(1, order[..., None].expand_as(blocks))
    repetition = torch.empty_like(ranked)
    for block in range(0, len(blocks), _STRIPS_AT_ONCE):
        some = slice(block, block + _STRIPS_AT_ONCE)
        for start in range(0, width, _STRIP):
            # Best first, so the better-ranked ones stand left of the diagonal, and nothing behind it is looked at.
            strip = slice(start, start + _STRIP)
            better = blocks[some, : strip.stop].transpose(1, 2)
            repetition[some, strip] = (blocks[some, strip] @ better).tril_(start - 1).amax(-1)
    # Where a value is there twice, rounding must not say how much of it is new.
    repetition.masked_fill_(repetition > _THE_SAME, 1.0)
    repetition = torch.empty_like(repetition).scatter_(1, order, repetition)
    return repetition.view(batch, heads, n + padding)[..., :n]


def _pieces(vectors: Tensor) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Cut [batch, heads, n, size] into (rows, heads, spans of n), small enough for a copy in float32.

    All heads of several rows at once where they fit; then fewer rows; then fewer heads; then a span of one head.
    """
    batch, heads, n, size = vectors.shape
    own_bytes = vectors.numel() * vectors.element_size()
    room = min(_PIECE_BYTES, max(_PIECE_BYTES // 16, own_bytes // 2)) // 4
    fitting = max(1, room // max(1, n * size))
    some = min(heads, fitting)
    rows = max(1, fitting // heads)
    step = max(1, room // (rows * some * size))
    spans = [slice(start, start + step) for start in range(0, n, step)]
    for row in range(0, batch, rows):
        for head in range(0, heads, some):
            yield slice(row, row + rows), slice(head, head + some), spans


def _to_one(scores: Tensor) -> Tensor:
    total = scores.nan_to_num(nan=0.0).sum(-1, keepdim=True)
    return scores / total.clamp_min(_TINY)


def _check_queries(queries: Any) -> int | str:
    if isinstance(queries, str) and queries in ("all", "text"):
        return queries
    if isinstance(queries, numbers.Integral) and not isinstance(queries, bool) and int(queries) >= 1:
        return int(queries)
    raise (ValueError if isinstance(queries, (str, numbers.Integral)) else TypeError)(
        "queries must be 'all', 'text' (needs image_mask), or how many of the prompt's last tokens count, at least 1; "
        f"got {queries!r}"
    )


def _check_pooling(pooling: Any) -> int:
    width = int(pooling) if isinstance(pooling, numbers.Integral) and not isinstance(pooling, bool) else 0
    if not 1 <= width <= sys.maxsize or width % 2 == 0:
        raise ValueError(f"pooling must be an odd number of keys, 1 or more; got {pooling!r}")
    return width


def _check_exponent(novelty: Any) -> float:
    if not isinstance(novelty, numbers.Real) or isinstance(novelty, bool):
        raise TypeError(f"novelty must be a number, 0 or more; got {novelty!r}")
    exponent = to_float(novelty)
    if not 0.0 <= exponent < math.inf:
        raise ValueError(f"novelty must be a number, 0 or more, that a float can hold; got {novelty!r}")
    return exponent


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """The value; a ValueError that names it where it is none of the choices."""
    # An array, of which each element would be compared, is no choice either.
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def check_fraction(name: str, value: Any) -> float:
    """The value as a float; a TypeError or ValueError that names it where it is no number in [0, 1]."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number from 0 to 1; got {value!r}")
    fraction = to_float(value)
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"{name} must be a number from 0 to 1; got {value!r}")
    return fraction


def to_float(value: Any) -> float:
    """A real number as a float: infinity where it is too large for one, as only integers and fractions can be."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
