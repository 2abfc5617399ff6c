"""Other people's methods, as drop-in caches on the parts of `PrefixKVCache`: for comparisons that can be trusted.

Each class is its paper's rule written as a choice of the same few parts: how keys are ranked (scoring.py), how long
layers are (lengths.py), what is merged (merging.py) and what leaves while decoding (eviction.py). All of them are used
like `PrefixKVCache`: `X(budget=0.2, config=model.config)`, on any backend, with padded batches, beams and several
turns, and every further argument of `PrefixKVCache` can be given on top.

What all of them share, and published code for these methods often does not: rotary positions are *true*, they go on
from the tokens seen, where the published decode loop continues from the pruned length; keys are ranked by importance,
where published code takes the permutation of an argsort for ranks; all methods count the sink and the last token in
their budget, so that equal budgets are equal memory; every layer keeps at least `sink + 1` pairs. Methods whose papers
say nothing of decoding (SnapKV, PyramidKV) let nothing leave then; `distance=25` gives them the fixed point, so that
all hold the same number at the end, too. Two of the mistakes can be switched on where they were found,
`as_published=True`; the third, shifted positions, is the caller's (`prefixkv evaluate --as-published`).
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cache import PAPER, PrefixKVCache
from .layer import Prompt, PrunedLayer
from .selection import places


class _PublishedCache(PrefixKVCache):
    """What the papers have in common, whatever the default of `PrefixKVCache` is: no profile, and `PAPER` beneath."""

    _takes_profile = False

    def __init__(self, budget: float = 0.5, **options: Any):
        super().__init__(None, budget, **{**PAPER, **options})


class UniformCache(_PublishedCache):
    """PrefixKV's importance (arXiv 2412.03409, section 3.2) with one length for all layers.

    The ablation that isolates the paper's idea: what differs from `PrefixKVCache.paper()` is only that no layer's
    length is searched.

    Args:
        budget: fraction of each layer's prompt pairs kept, in (0, 1].
        queries: whose attention counts; see `PrefixKVCache`.
        options: further arguments of `PrefixKVCache`.
    """

    def __init__(self, budget: float = 0.5, *, queries: int | str = "all", **options: Any):
        super().__init__(budget, queries=queries, **{"lengths": "uniform", **options})


class ElasticCache(_PublishedCache):
    """Elastic Cache (arXiv 2407.18121): importance-driven merging at the prompt, fixed-point eviction while decoding.

    Importance is the sum of a key's attention over all queries, averaged over the heads (equation 4); all layers keep
    the same fraction. Kept keys are anchors, and each pruned pair is merged, as a mean, into its nearest anchor
    (section 3.2). In decoding the pair at the fixed point leaves (section 3.3).

    Where we differ from the published code: true positions; the best keys by importance instead of a permutation taken
    for ranks; merged is what was pruned, where the published index of it lacks the sink's offset; sink and last token
    are kept but are no anchors; ties in distance go to the lower anchor.

    Args:
        budget: fraction of each layer's prompt pairs kept, in (0, 1].
        merge: `"kv"` (the paper), `"value"`: keys stay as they are, or None.
        as_published: take the published code's two slips over: the permutation for ranks, and the index of what is
            merged.
        options: further arguments of `PrefixKVCache`.
    """

    def __init__(self, budget: float = 0.5, *, merge: str | None = "kv", as_published: bool = False, **options: Any):
        self.as_published = as_published
        super().__init__(budget, merge=merge, **{"queries": "all", "lengths": "uniform", **options})

    def _new_layer(self) -> PrunedLayer:
        layer = super()._new_layer()
        if self.as_published:
            layer.merge_shift = self.sink
        return layer

    def _select(self, prompt: Prompt, counts: list[int], sink: int) -> Tensor:
        return super()._select(as_permutation(prompt, sink) if self.as_published else prompt, counts, sink)


class H2OCache(_PublishedCache):
    """H2O (arXiv 2306.14048, algorithm 1): heavy hitters by accumulated attention, beside a window of recent tokens.

    Half of what a head keeps are its most recent tokens, the other half those that have received most attention so far.
    While decoding, each new query's attention is added, and the pair outside the window with the lowest sum leaves.
    Each key head keeps keys of its own.

    Where we differ from the published code: true positions; the best keys instead of a permutation taken for ranks;
    query heads that share a key head vote together (the mean of their attention). The pair leaves before the attention
    of the token that pushes it out, so a layer never holds one pair more than its share.

    Args:
        budget: fraction of each layer's prompt pairs kept, in (0, 1].
        recent: share of the kept pairs that is the recent window (the paper: one half).
        as_published: take the published code's permutation for ranks over.
        options: further arguments of `PrefixKVCache`.
    """

    def __init__(self, budget: float = 0.5, *, recent: float = 0.5, as_published: bool = False, **options: Any):
        self.as_published = as_published
        rule = {"queries": "all", "heads": "each", "lengths": "uniform", "evict": "least-important", "sink": 0}
        super().__init__(budget, recent=recent, **{**rule, **options})

    def _select(self, prompt: Prompt, counts: list[int], sink: int) -> Tensor:
        return super()._select(as_permutation(prompt, sink) if self.as_published else prompt, counts, sink)


class StreamingLLMCache(_PublishedCache):
    """StreamingLLM (arXiv 2309.17453, section 3.2), the papers' "Local": the first tokens and the most recent ones.

    While decoding, the oldest pair behind the sink leaves.

    Where we differ from the paper: positions are those in the text, not those in the cache. The paper re-numbers the
    kept tokens, which needs keys stored without their rotation; within the model's context length, where a pruned
    prompt always is, true positions are what the model was trained on.

    Args:
        budget: fraction of each layer's prompt pairs kept, in (0, 1].
        sink: first tokens that are never pruned (the paper: 4).
        options: further arguments of `PrefixKVCache`.
    """

    def __init__(self, budget: float = 0.5, *, sink: int = 4, **options: Any):
        rule = {"queries": 1, "lengths": "uniform", "evict": "oldest"}
        super().__init__(budget, sink=sink, **{**rule, **options})

    def _importance(
        self, module: Any, query: Tensor, key: Tensor, mask: Any, options: Any, prompt: Prompt | None = None
    ) -> Tensor:
        return torch.arange(key.shape[2], dtype=torch.float32, device=key.device).expand(len(key), 1, -1)


class SnapKVCache(_PublishedCache):
    """SnapKV (arXiv 2404.14469, section 4): what the prompt's last queries look at, with its neighbours, for each head.

    Importance is the attention of the last `window` tokens, summed, per key head; a maximum over `pooling` neighbours
    keeps clusters together (section 4.2 and Listing 1); the window itself is always kept.

    Where we differ from the published code: query heads that share a key head vote together; where the budget is
    smaller than the window, the window is cut to its newest tokens; the first token (`sink`) is kept, as in all methods
    here. Nothing leaves while decoding, unless a `distance` is given.

    Args:
        budget: fraction of each layer's prompt pairs kept, in (0, 1].
        window: observing queries (the paper: 32).
        pooling: width of the maximum, odd (the paper: 7).
        options: further arguments of `PrefixKVCache`.
    """

    def __init__(self, budget: float = 0.5, *, window: int = 32, pooling: int = 7, **options: Any):
        rule = {"queries": window, "recent": window, "heads": "each", "lengths": "uniform", "distance": None}
        super().__init__(budget, pooling=pooling, **{**rule, **options})


class PyramidKVCache(SnapKVCache):
    """PyramidKV (arXiv 2406.02069, section 4): SnapKV's selection with budgets that fall from layer to layer.

    Lengths fall along a line, from the first layer to the last, which keeps a twentieth of the mean (section 4, beta =
    20; lengths.py). The window is 8 tokens, as in the published code.

    Where we differ from the published code: as `SnapKVCache`; and where the first layer would keep more than all, the
    line is made flatter, so that the mean stays the budget.

    Args:
        budget: fraction of the prompt's pairs kept, averaged over the layers, in (0, 1].
        window: observing queries (published code: 8).
        pooling: width of the maximum, odd (published code: 7).
        options: further arguments of `PrefixKVCache`.
    """

    def __init__(self, budget: float = 0.5, *, window: int = 8, pooling: int = 7, **options: Any):
        super().__init__(budget, window=window, pooling=pooling, **{"lengths": "pyramid", **options})


class RandomCache(_PublishedCache):
    """Random keys beside the sink and the last token: the floor that every method must beat.

    Lengths are uniform; each layer draws keys of its own; while decoding the fixed point leaves. The draw depends on
    seed, layer and prompt length alone, so that a row of a batch keeps what it keeps alone.

    Args:
        budget: fraction of each layer's prompt pairs kept, in (0, 1].
        seed: of the draw.
        options: further arguments of `PrefixKVCache`.
    """

    def __init__(self, budget: float = 0.5, *, seed: int = 0, **options: Any):
        self.seed = seed
        super().__init__(budget, **{"queries": 1, "lengths": "uniform", **options})

    def _importance(
        self, module: Any, query: Tensor, key: Tensor, mask: Any, options: Any, prompt: Prompt | None = None
    ) -> Tensor:
        batch, n_keys = key.shape[0], key.shape[2]
        drawn = torch.zeros(batch, n_keys)
        if prompt is not None:
            real = torch.ones(batch, prompt.n_new, dtype=torch.bool) if prompt.real is None else prompt.real.cpu()
            for row, own in enumerate(real):
                length = int(own.sum())
                source = torch.Generator().manual_seed(self._seed_of(module, length))
                drawn[row, n_keys - prompt.n_new :][own] = torch.rand(length, generator=source)
        return drawn[:, None].to(key.device)

    def _seed_of(self, module: Any, length: int) -> int:
        return zlib.crc32(f"{self.seed}/{getattr(module, 'layer_idx', 0)}/{length}".encode())


def as_permutation(prompt: Prompt, sink: int) -> Prompt:
    """The prompt with `permutation_scores`."""
    if prompt.scores is None:
        return prompt
    return replace(prompt, scores=permutation_scores(prompt.scores, prompt.real, sink))


def permutation_scores(scores: Tensor, real: Tensor | None, sink: int) -> Tensor:
    """Scores that make selection keep what published code keeps, which reads a permutation as if it were ranks.

    There, of the keys between sink and last token, key j is kept if entry j of the rising argsort is large enough: if
    the *index* of the j-th smallest score is, whatever the score of key j.

    Args:
        scores: [batch, heads, n].
        real: bool [batch, n], False at padding. None: no padding.
        sink: number of leading real keys left out of the sort.
    """
    if real is None:
        real = torch.ones_like(scores[:, 0], dtype=torch.bool)
    order = real.cumsum(1)
    inner = (real & (order > sink) & (order < order[:, -1:]))[:, None].expand_as(scores)
    # Inner keys first, by score; what they are then read as stands in their own columns, in order.
    by_score = scores.masked_fill(~inner, torch.inf).argsort(dim=-1, stable=True)
    place = places((~inner).to(torch.int8).argsort(dim=-1, stable=True))
    return by_score.gather(-1, place).float()


BASELINES: dict[str, type[PrefixKVCache]] = {
    "elastic": ElasticCache,
    "h2o": H2OCache,
    "streaming": StreamingLLMCache,
    "snapkv": SnapKVCache,
    "pyramid": PyramidKVCache,
    "uniform": UniformCache,
    "random": RandomCache,
}
"""By the short names that the command line uses."""
