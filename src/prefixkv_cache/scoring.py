"""From what the keys of a layer received to the scores that rank them.

A pure step between importance.py and selection.py: (importance per head, keys, values) -> scores. Each choice is one
function behind one field of `Ranking`; they combine freely, in the order in which they stand here. The default is the
papers': the mean over the heads, and nothing else.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK, _BLOCKS_AT_ONCE = 1024, 8  # keys compared with each other, and how many such tables (4 MiB each) at a time
_SKETCH = 32
AVERAGES = ("sum", "visible")
HEADS = ("mean", "max", "each")


@dataclass(frozen=True)
class Ranking:
    """How the keys of a layer are ranked. Checked when it is made.

    Attributes:
        queries: whose attention counts: `"all"` prompt tokens, `"text"`: those behind the first image, or an integer W:
            the last W real tokens.
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
        if not isinstance(self.pooling, numbers.Integral) or self.pooling < 1 or self.pooling % 2 == 0:
            raise ValueError(f"pooling must be an odd number of keys, 1 or more; got {self.pooling!r}")
        if not isinstance(self.value_norm, bool):
            raise TypeError(f"value_norm must be True or False; got {self.value_norm!r}")
        check_fraction("diversity", self.diversity)
        if not isinstance(self.novelty, numbers.Real) or isinstance(self.novelty, bool):
            raise TypeError(f"novelty must be a number, 0 or more; got {self.novelty!r}")
        if not 0.0 <= float(self.novelty) < float("inf"):
            raise ValueError(f"novelty must be a number, 0 or more; got {self.novelty!r}")

    @property
    def by_head(self) -> bool:
        """Whether the importance is needed for each head by itself."""
        return self.heads != "mean" or self.pooling > 1 or self.value_norm

    @property
    def by_rank(self) -> bool:
        """Whether ranks that hold other heads come to other scores, though heads agree on keys."""
        return self.heads != "each" and (self.by_head or self.diversity > 0 or self.novelty > 0)


def rank_keys(importance: Tensor, keys: Tensor, values: Tensor, ranking: Ranking, real: Tensor | None = None) -> Tensor:
    """The scores by which keys are kept, from their importance.

    Args:
        importance: float32 [batch, kv_heads, n], or [batch, 1, n] where no field of the ranking looks at single heads.
        keys, values: [batch, kv_heads, n, head_dim], looked at only where the ranking needs them.
        ranking: what to do.
        real: bool [batch, n], False at padding. None: no padding.

    Returns:
        float32 [batch, kv_heads, n] with `heads="each"`, else [batch, 1, n]; not negative.
    """
    scores = importance
    if ranking.value_norm:
        scores = scores * torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
    if ranking.pooling > 1:
        scores = pool_neighbours(scores, ranking.pooling, real)
    scores = join_heads(scores, ranking.heads)
    if ranking.diversity:
        scores = mix_in_diversity(scores, keys, ranking.diversity, real)
    if ranking.novelty:
        scores = discount_repetition(scores, values, ranking.novelty, real)
    return scores


def pool_neighbours(scores: Tensor, width: int, real: Tensor | None = None) -> Tensor:
    """The largest score among the `width` keys around each key, itself in the middle; padding is nobody's neighbour.

    Args:
        scores: [batch, heads, n], not negative.
        width: odd.
        real: bool [batch, n] or None.
    """
    if real is None:
        return F.max_pool1d(scores, width, stride=1, padding=width // 2)
    scores = scores.masked_fill(~real[:, None], 0.0)
    return F.max_pool1d(scores, width, stride=1, padding=width // 2).masked_fill(~real[:, None], 0.0)


def join_heads(scores: Tensor, how: str) -> Tensor:
    """[batch, heads, n] -> [batch, 1, n], or unchanged for `"each"`."""
    if how == "each" or scores.shape[1] == 1:
        return scores
    return scores.amax(1, keepdim=True) if how == "max" else scores.mean(1, keepdim=True)


def mix_in_diversity(scores: Tensor, keys: Tensor, share: float, real: Tensor | None = None) -> Tensor:
    """Replace a share of each score by how far the key points away from the mean direction of the layer's keys.

    Both parts are put on a scale from 0 to 1 first, as the sum of a row, so that `share` means what it says.

    Args:
        scores: [batch, 1 or heads, n], not negative.
        keys: [batch, heads, n, head_dim].
        share: in [0, 1].
        real: bool [batch, n] or None.
    """
    direction = F.normalize(keys.float(), dim=-1)
    weight = torch.ones_like(scores[:, :1]) if real is None else real[:, None].to(scores.dtype)
    mean = (direction * weight[..., None]).sum(2, keepdim=True) / weight.sum(-1)[..., None, None].clamp_min(1.0)
    # Rounding takes a cosine beyond 1 where all keys are alike.
    away = (1.0 - F.cosine_similarity(direction, mean, dim=-1)).clamp_min(0.0)
    away = join_heads(away, "mean" if scores.shape[1] == 1 else "each") * weight
    return (1.0 - share) * _to_one(scores) + share * _to_one(away)


def discount_repetition(scores: Tensor, values: Tensor, exponent: float, real: Tensor | None = None) -> Tensor:
    """Each score times `(1 - s) ** exponent`, s being how much the key's value repeats that of a better-ranked key.

    s is the largest cosine similarity with the value of a key of higher score (ties: the lower column), at least 0. A
    background of many like patches so keeps one of them, and what it would have taken goes to what is unlike.

    Only keys of the same 1024 tokens are compared, so that the work grows with the length and not with its square; and
    by a random sketch of the values, of 32 numbers each.

    Args:
        scores: [batch, 1 or heads, n], not negative. One row for all heads compares the values of all heads together.
        values: [batch, heads, n, head_dim].
        exponent: 0 or more.
        real: bool [batch, n], False at padding. None: no padding.
    """
    sketch = _sketch(values.transpose(1, 2).flatten(2)[:, None] if scores.shape[1] == 1 else values)
    if real is None:
        return scores * (1.0 - _repetition(scores, sketch)) ** exponent
    discounted = scores.clone()
    # Row by row, each over its own tokens: what a row keeps must not depend on how it was padded.
    for row, own in enumerate(real):
        of_row = scores[row, :, own]
        repetition = _repetition(of_row[None], sketch[row, :, own][None])[0]
        discounted[row, :, own] = of_row * (1.0 - repetition) ** exponent
    return discounted


def _sketch(values: Tensor) -> Tensor:
    """[..., size] -> unit vectors [..., at most 32] of about the same cosine similarities (Johnson-Lindenstrauss)."""
    if values.shape[-1] > _SKETCH:
        # The same on every device and rank.
        source = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (values.shape[-1], _SKETCH), generator=source) * 2 - 1
        values = values @ signs.to(values)
    return F.normalize(values.float(), dim=-1)


def _repetition(scores: Tensor, sketch: Tensor) -> Tensor:
    """Largest similarity with a better-ranked key of the same block, in [0, 1]: [batch, heads, n]."""
    batch, heads, n = scores.shape
    width = min(n, _BLOCK)
    padding = -n % width
    # Padding ranks last, so it is nobody's better.
    ranked = F.pad(scores.flatten(0, 1), (0, padding), value=-1.0).view(-1, width)
    blocks = F.pad(sketch.flatten(0, 1), (0, 0, 0, padding)).view(len(ranked), width, -1)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    blocks = blocks.gather(1, order[..., None].expand_as(blocks))
    repetition = torch.empty_like(ranked)
    for some in torch.arange(len(blocks)).split(_BLOCKS_AT_ONCE):
        piece = blocks[some[0] : some[-1] + 1]
        # Best first, so the better-ranked ones stand left of the diagonal.
        repetition[some[0] : some[-1] + 1] = (piece @ piece.transpose(1, 2)).tril_(-1).amax(-1)
    repetition = torch.empty_like(repetition).scatter_(1, order, repetition)
    return repetition.view(batch, heads, n + padding)[..., :n].clamp(0.0, 1.0)


def _to_one(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def _check_queries(queries: Any) -> int | str:
    if isinstance(queries, str) and queries in ("all", "text"):
        return queries
    if isinstance(queries, numbers.Integral) and not isinstance(queries, bool) and int(queries) >= 1:
        return int(queries)
    raise (ValueError if isinstance(queries, (str, numbers.Integral)) else TypeError)(
        "queries must be 'all', 'text' (needs image_mask), or how many of the prompt's last tokens count, at least 1; "
        f"got {queries!r}"
    )


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """The value; a ValueError that names it where it is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def check_fraction(name: str, value: Any) -> float:
    """The value as a float; a TypeError or ValueError that names it where it is no number in [0, 1]."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number from 0 to 1; got {value!r}")
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name} must be a number from 0 to 1; got {value!r}")
    return float(value)
