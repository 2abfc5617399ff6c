"""Sources of lengths: how many pairs each layer and key head keeps of a prompt.

Two kinds, with the same methods. `RatioLengths` knows keep ratios beforehand (a profile, or a shape such as uniform),
so a layer can be pruned before the next one runs. `ScoredLengths` finds counts from the scores of all layers (the
search, or one pool), so all layers wait for the last. The functions that compute are in rules/; which keys stay is
decided in pipeline.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..methods import Method
from ..profiles.profile import PrefixProfile, ProfileError
from ..rules.clustering import cluster, group_means
from ..rules.lengths import dithered_count, fraction_of, pool_counts, prompt_count, pyramid_ratios, raise_to_floor
from ..rules.threshold import search_threshold
from .prompt import Prompt

T = TypeVar("T")
MOST_SEGMENTS = 4
"""Different lengths that the key heads of one layer may have."""
_GROUPING_BUDGET = 0.2


@dataclass(frozen=True)
class Share:
    """What one layer keeps of a prompt.

    Attributes:
        counts: [rows][heads], pairs; one head stands for all.
        ratios: [rows][heads], keep ratios, by which decoding and later turns go on.
    """

    counts: list[list[int]]
    ratios: list[list[float]]

    def by_segment(self) -> list[tuple[tuple[int, ...] | None, list[int], list[float]]]:
        """Heads that hold equally many pairs in every row, with the counts and ratios of the rows."""
        by_head = list(zip(zip(*self.counts, strict=True), zip(*self.ratios, strict=True), strict=True))
        if len(set(by_head)) == 1:
            return [(None, list(by_head[0][0]), list(by_head[0][1]))]
        return [
            (tuple(head for head, each in enumerate(by_head) if each == own), list(own[0]), list(own[1]))
            for own in dict.fromkeys(by_head)
        ]


class LengthSource(Protocol):
    """What the pipeline asks.

    Attributes:
        waits: whether lengths need the scores of all layers.
    """

    waits: bool

    def keeps_all(self, place: int, lengths: Sequence[int]) -> bool:
        """Whether the layer at this place keeps all of rows with so many valid tokens."""
        ...

    def shares(self, prompts: Sequence[Prompt], places: Sequence[int]) -> list[Share]:
        """What each of these layers keeps of its prompt."""
        ...

    def count(self, ratio: float, n_tokens: int, place: int) -> int:
        """Pairs that a row of a later prompt keeps, by the ratio that it got from the first."""
        ...


class RatioLengths:
    """Lengths from keep ratios that are known beforehand.

    Args:
        ratios: keep ratios [n_layers][1 or n_heads] at a budget in (0, 1].
        budget: a fraction, or pairs a head.
        n_layers: prunable layers; 0: not known.
        sink: each head keeps at least `sink + 1` pairs.
        floor: tokens that each head keeps at least, or that share of the prompt.
        dithered: whether layers of one ratio round so that their total is exact.
        source: whose ratios, for errors.
    """

    waits = False

    def __init__(
        self,
        ratios: Callable[[float], list[list[float]]],
        budget: float | int,
        n_layers: int,
        *,
        sink: int,
        floor: int | float,
        dithered: bool,
        source: str,
    ):
        self._ratios, self._budget, self._n_layers = ratios, budget, n_layers
        self._sink, self._floor, self._dithered, self._source = sink, floor, dithered, source
        self._tables: dict[tuple[float, float], list[list[float]]] = {}

    def table(self, n_tokens: int) -> list[list[float]]:
        """Keep ratios [n_layers][1 or n_heads] for a row of so many valid tokens."""
        fraction = fraction_of(self._budget, n_tokens)
        floor = fraction_of(self._floor, n_tokens)
        if (fraction, floor) not in self._tables:
            ratios = torch.tensor(self._ratios(fraction), dtype=torch.float64)
            self._tables[fraction, floor] = (raise_to_floor(ratios, floor) if floor else ratios).tolist()
        return self._tables[fraction, floor]

    def keeps_all(self, place: int, lengths: Sequence[int]) -> bool:
        """Whether all heads' ratios are 1."""
        return all(ratio == 1.0 for n in set(lengths) for ratio in self._at(self.table(n), place))

    def shares(self, prompts: Sequence[Prompt], places: Sequence[int]) -> list[Share]:
        """What each of these layers keeps of its prompt."""
        return [self._share(prompt, place) for prompt, place in zip(prompts, places, strict=True)]

    def _share(self, prompt: Prompt, place: int) -> Share:
        ratios = [own_heads(self._at(self.table(n), place), prompt, self._source) for n in prompt.lengths]
        counts = [
            [self.count(ratio, n, place, self._sink) for ratio in row]
            for row, n in zip(ratios, prompt.lengths, strict=True)
        ]
        return Share(counts, ratios)

    def _at(self, table: list[list[float]], place: int) -> list[float]:
        return table[place] if len(table) > 1 or place < len(table) else table[0]

    def count(self, ratio: float, n_tokens: int, place: int, sink: int = 0) -> int:
        """Pairs of a row of so many tokens."""
        if self._dithered:
            n_layers = max(1, self._n_layers)
            return dithered_count(ratio, n_tokens, place if self._n_layers else 0, n_layers, sink)
        return prompt_count(ratio, n_tokens, sink)


class ScoredLengths:
    """Lengths from the scores of all layers of the prompt itself.

    Args:
        method: `lengths` is `"search"` or `"pool"`.
        budget: a fraction, or pairs a head.
    """

    waits = True

    def __init__(self, method: Method, budget: float | int):
        self._budget, self._sink, self._floor = budget, method.protect.sink, method.lengths.floor
        self._row = self._search if method.lengths.lengths == "search" else self._pool

    def keeps_all(self, place: int, lengths: Sequence[int]) -> bool:
        """Whether the budget is all of every row."""
        del place
        return all(fraction_of(self._budget, n) == 1.0 for n in lengths)

    def count(self, ratio: float, n_tokens: int, place: int) -> int:
        """Pairs of a row of a later prompt."""
        del place
        return prompt_count(ratio, n_tokens, 0)

    def shares(self, prompts: Sequence[Prompt], places: Sequence[int]) -> list[Share]:
        """What each layer keeps: every row gets lengths of its own, from its own scores."""
        del places
        first = prompts[0]
        if self.keeps_all(0, first.lengths):
            return [Share([[n] for n in first.lengths], [[1.0] for _ in first.lengths]) for _ in prompts]
        scores = [prompt.scores_of_all.cpu() for prompt in prompts if prompt.scores_of_all is not None]
        valid = None if first.valid is None else first.valid.cpu()
        by_row = [
            self._of_row([of_layer[row] if valid is None else of_layer[row][:, valid[row]] for of_layer in scores], n)
            for row, n in enumerate(first.lengths)
        ]
        return [
            Share(*([own_heads(each[layer], prompt) for each in column] for column in zip(*by_row, strict=True)))
            for layer, prompt in enumerate(prompts)
        ]

    def _of_row(self, scores: list[Tensor], n_tokens: int) -> tuple[list[list[int]], list[list[float]]]:
        """Counts and ratios [n_layers][heads] of one row, from its scores [heads, n_tokens] by layer."""
        if not n_tokens:
            return [[0] for _ in scores], [[fraction_of(self._budget, 1)] for _ in scores]
        fraction, n_heads = fraction_of(self._budget, n_tokens), sum(len(each) for each in scores)
        counts = self._row(scores, fraction)
        # Where the least lengths alone use up the budget (a prompt of a few tokens, a chunk of padding), they are no
        # measure of what comes later: such a row goes on by the budget itself.
        decided = round(fraction * n_heads * n_tokens) >= n_heads * (self._sink + 1)
        return counts, [[count / n_tokens if decided else fraction for count in row] for row in counts]

    def _search(self, scores: list[Tensor], fraction: float) -> list[list[int]]:
        """One threshold on cumulative importance for all layers (arXiv 2412.03409, section 3.3)."""
        importance = torch.stack([each.mean(0) for each in scores]).float()
        # A model that overflows gives nan; its answer is lost anyway, but the cache must not be what stops it.
        importance = importance.nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max)
        return [[count] for count in search_threshold(importance, fraction, sink=self._sink)[1].tolist()]

    def _pool(self, scores: list[Tensor], fraction: float) -> list[list[int]]:
        """The largest scores of all layers and heads stay; heads of a layer get at most four lengths."""
        pool = torch.stack(scores)
        n_tokens, n_heads = pool.shape[2], pool.shape[0] * pool.shape[1]
        total = round(fraction * n_heads * n_tokens)
        least = max(self._sink + 1, min(round(fraction_of(self._floor, n_tokens) * n_tokens), total // n_heads))
        # Grouped by what heads would keep at one budget, whatever the budget asked for is: so more budget never keeps
        # less. A group's heads get its mean, rounded down; a layer leaves fewer pairs over than it has heads.
        reference = pool_counts(pool, round(_GROUPING_BUDGET * n_heads * n_tokens), least).tolist()
        counts = pool_counts(pool, total, least).tolist()
        groups = [_groups(of_layer) for of_layer in reference]
        return [
            [int(mean) for mean in group_means(of_layer, own)] for of_layer, own in zip(counts, groups, strict=True)
        ]


def own_heads(of_heads: list[T], prompt: Prompt, source: str = "the pool") -> list[T]:
    """What concerns the key heads that this rank holds: all of them, without tensor parallelism.

    Raises:
        ProfileError: it is for another number of key heads.
    """
    n_heads, ranks = prompt.keys.shape[1], prompt.ranks
    if len(of_heads) in (1, n_heads):
        return of_heads
    if len(of_heads) == n_heads * ranks.count:
        return of_heads[n_heads * ranks.place : n_heads * (ranks.place + 1)]
    raise ProfileError(
        f"{source} has lengths for {len(of_heads)} key heads, but this model has {n_heads}; "
        "take the profile of this model, or none: PrefixKVCache(budget=...)"
    )


def length_source(
    method: Method, profile: PrefixProfile | None, budget: float | int, n_layers: int
) -> RatioLengths | ScoredLengths:
    """Where lengths come from: the profile if there is one, else what the method says.

    Args:
        method: the cache's.
        profile: of the model, or None.
        budget: a fraction, or pairs a head.
        n_layers: prunable layers of the model; 0: not known.
    """
    common = {"sink": method.protect.sink, "floor": method.lengths.floor}
    if profile is not None:
        name = f"the profile of {profile.metadata.get('model', 'unknown')!r}"
        return RatioLengths(_ProfileRatios(profile), budget, n_layers, **common, dithered=False, source=name)
    if method.lengths.need_all_layers and budget != 1.0:
        return ScoredLengths(method, budget)
    steepness = 20.0 if method.lengths.lengths == "pyramid" else 1.0
    return RatioLengths(
        partial(_shape_ratios, max(1, n_layers), steepness),
        budget,
        n_layers,
        **common,
        dithered=True,
        source=f"lengths={method.lengths.lengths!r}",
    )


def _groups(of_heads: Sequence[float]) -> Sequence[Sequence[int]]:
    """Heads that get one length, by what they keep otherwise; each its own where there are few."""
    few = len(of_heads) <= MOST_SEGMENTS
    return [(head,) for head in range(len(of_heads))] if few else cluster(tuple(of_heads), MOST_SEGMENTS)


def _shape_ratios(n_layers: int, steepness: float, fraction: float) -> list[list[float]]:
    return [[ratio] for ratio in pyramid_ratios(fraction, n_layers, steepness)]


class _ProfileRatios:
    """A profile's keep ratios, the heads of a layer grouped so that at most four lengths occur in it.

    Groups are made once, by what a head keeps on average over the grid: so they are the same at every budget, and more
    budget never keeps less (law 4).
    """

    def __init__(self, profile: PrefixProfile):
        self._profile = profile
        self._groups = [_groups(of_layer) for of_layer in profile.keep.mean(0).tolist()]

    def __call__(self, fraction: float) -> list[list[float]]:
        ratios = self._profile.keep_ratios(fraction).tolist()
        return [group_means(of_layer, groups) for of_layer, groups in zip(ratios, self._groups, strict=True)]
