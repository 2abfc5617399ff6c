"""The lists that test_stateful.py holds a cache against, and the kinds of model and cache that it draws.

`Naive` is written from the design's words: for each key head of each row of each layer the positions that are kept, in
the order in which they came. It grows and shrinks by the decode rule of `oracle.py`; which keys stay at a prompt is the
cache's choice, checked for what the rules leave no choice about.
"""

import copy
import math
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from transformers import LlamaConfig

from oracle import Head, Rule
from prefixkv_cache import PrefixKVCache, PrefixProfile
from prefixkv_cache.methods import Method
from rules import join, mean_over_heads


@dataclass(frozen=True)
class Setup:
    """One kind of model and of cache."""

    keep: tuple | None  # layer -> head -> keep ratio, or None: by the method
    budget: float
    method: Method
    n_layers: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    mask: str  # the form in which the backend takes its mask: "bool", "additive", "flash"
    told: str  # who shows the cache a config: the "caller", the attention "module", or "nobody"

    def config(self):
        heads = self.kv_heads * self.group
        return LlamaConfig(
            hidden_size=heads * self.head_dim, num_hidden_layers=self.n_layers, num_attention_heads=heads,
            num_key_value_heads=self.kv_heads, head_dim=self.head_dim, intermediate_size=8, vocab_size=8,
        )  # fmt: skip

    @property
    def profile(self):
        if self.keep is not None:
            return PrefixProfile([self.budget], [self.keep], {"method": self.method.spell(full=True)})
        return None

    def cache(self):
        config, method = self.config() if self.told == "caller" else None, None if self.keep else self.method
        return PrefixKVCache(self.profile, self.budget, method=method, config=config)

    @property
    def searched(self):
        return self.keep is None and self.budget < 1 and self.method.lengths.lengths == "search"

    @property
    def backend(self):
        return "listed_flash" if self.mask == "flash" else "listed"


@st.composite
def setups(draw):
    n_layers, kv_heads = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 2, 5]))
    budget = draw(st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 1.0]))
    told = draw(st.sampled_from(["caller", "module", "nobody"]))
    keep, by_head = None, draw(st.sampled_from([None, 1, kv_heads]))
    if by_head:
        n = n_layers * by_head
        lean = draw(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.3, 1.0]), min_size=n, max_size=n))
        ratios = [budget + min(budget, 1 - budget) * (each - sum(lean) / n) / 2 for each in lean]
        keep = tuple(tuple(ratios[at : at + by_head]) for at in range(0, n, by_head))
    distance = draw(st.sampled_from([None, 1, 2, 3, 5, 8, 25, "oldest"]))
    decode = {"evict": "oldest", "distance": None} if distance == "oldest" else {"distance": distance}
    return Setup(
        keep=keep,
        budget=budget,
        method=Method.parse("prefixkv").replace(
            queries=draw(st.sampled_from(["all", 1, 3, 8, 32])),
            heads=draw(st.sampled_from(["mean", "each", "max"])),
            # Uniform lengths are rounded by the layer's place, and nobody says how many layers there are.
            lengths=draw(st.sampled_from(["search", "uniform"] if told != "nobody" else ["search"])),
            sink=draw(st.sampled_from([0, 1, 1, 3])),
            headroom=draw(st.sampled_from([0, 0, 0, 1, 4])) if distance is not None else 0,
            **decode,
        ),
        n_layers=n_layers,
        kv_heads=kv_heads,
        group=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([2, 4, 8])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])),
        mask=draw(st.sampled_from(["bool", "additive", "flash"])),
        told=told,
    )


class Naive:
    """What is kept, as lists, in the heads of the reference's `Rule`, whose choice at the prompt is the cache's."""

    def __init__(self, setup):
        self.setup = setup
        self.rule = Rule(setup.method, setup.budget, profile=setup.profile)
        self.clear()

    def clear(self):
        self.seen, self.tokens = 0, []  # all positions | row -> valid tokens fed
        self.fed = None  # [2 (keys, values), layers, rows, heads, seen, head_dim]: every pair, by position
        self.rule.heads, self.rule.steps, self.fresh = {}, 0, True

    @property
    def rows(self):
        return len(self.tokens)

    @property
    def kept(self):
        """layer -> row -> head -> positions."""
        return [[[head.kept for head in heads] for heads in rows] for rows in self.rule.heads.values()]

    def feed(self, pairs):
        """New tokens come in; their pairs are written down."""
        self.fed = pairs if self.fed is None else torch.cat([self.fed, pairs], dim=4)
        self.seen += pairs.shape[4]

    def begin(self, rows):
        layers, heads = range(self.setup.n_layers), range(self.setup.kv_heads)
        self.tokens = [0] * rows
        self.rule.heads = {layer: [[Head() for _ in heads] for _ in range(rows)] for layer in layers}

    def prune(self, new, chosen, importance):
        """Check what the cache kept of a prompt, and go on with that.

        new: row -> positions of the prompt's valid tokens; chosen: as `kept`, of everything; importance: layer -> row
        -> head -> what each of those tokens received.
        """
        rule, layers = self.rule, range(self.setup.n_layers)
        sink = self.setup.method.protect.sink if self.fresh else 0
        if not self.fresh and rule.steps > 0:
            rule._begin_turn(self.tokens)
        for row, n in enumerate(map(len, new)):
            scores = {layer: join(importance[layer][row], self.setup.method.ranking.heads) for layer in layers}
            if not self.fresh:
                counts = rule._later_counts(n, row)
            elif self.setup.searched:
                counts = self._searched(scores, chosen, row, n)
            else:
                counts = rule._first_counts(scores, n, row, None)
            for layer in layers:
                for at, head in enumerate(rule.heads[layer][row]):
                    old, now = head.kept, chosen[layer][row][at]
                    assert now[: len(old)] == old, "earlier pairs stay"
                    kept = [new[row].index(position) for position in now[len(old) :]]
                    assert len(kept) == counts[layer][at]
                    check_selection(scores[layer][at], kept, sink)
                    head.kept, head.held, head.limit = list(now), len(now), math.inf
        self.tokens = [old + len(positions) for old, positions in zip(self.tokens, new, strict=True)]
        rule.steps, self.fresh = 0, False

    def _searched(self, scores, chosen, row, n):
        """What the search on the row's own prompt found; its ratios count if there was enough to search in."""
        setup, least = self.setup, self.setup.method.protect.sink + 1
        counts = {layer: [len(head) for head in chosen[layer][row]] for layer in scores}
        assert all(len(set(heads)) == 1 for heads in counts.values())
        found = [heads[0] for heads in counts.values()]
        check_lengths([mean_over_heads(heads) for heads in scores.values()], found, setup.budget, least - 1)
        n_heads = setup.n_layers * setup.kv_heads
        enough = round(setup.budget * n_heads * n) >= n_heads * least
        for layer, count in enumerate(found):
            for head in self.rule.heads[layer][row]:
                head.ratio = count / n if enough else setup.budget
        return counts

    def step(self):
        """One more token, the newest of those fed, and for it one leaves where there are too many."""
        self.tokens = [tokens + 1 for tokens in self.tokens]
        self.rule.steps += 1
        for _, row, head in self.rule._all():
            before, ratio = len(head.kept), head.ratio
            head.kept.append(self.seen - 1)
            self.rule._evict(head, self.tokens[row])
            within = len(head.kept) - self.tokens[row] * ratio < 1 + self.setup.method.decode.headroom
            assert within or len(head.kept) <= max(before, 1) or not self.rule.evicts(head), "law 5"

    def take(self, rows):
        self.tokens = [self.tokens[row] for row in rows]
        self.fed = self.fed[:, :, rows]
        heads = self.rule.heads
        self.rule.heads = {layer: [copy.deepcopy(heads[layer][row]) for row in rows] for layer in heads}

    def uneven(self, removed):
        """Whether heads that are stored together would be left with different numbers of pairs."""
        left = {}
        for layer, row, head in self.rule._all():
            count = sum(position < self.seen - removed for position in head.kept)
            left.setdefault((layer, row, head.ratio), set()).add(count)
        return removed < self.seen and any(len(counts) > 1 for counts in left.values())

    def crop(self, removed, tokens):
        """The newest tokens were never fed; what had left for them is gone. tokens: row -> valid ones that are left."""
        self.seen -= removed
        if self.seen == 0:
            self.clear()
            return
        self.fed, self.tokens = self.fed[..., : self.seen, :], tokens
        self.rule.steps -= removed
        for *_, head in self.rule._all():
            head.kept = [position for position in head.kept if position < self.seen]
            if self.rule.evicts(head):
                head.limit = min(self.rule._point(head), max(len(head.kept) - 1, 0))
            head.origin = None if head.origin is None else min(head.origin, len(head.kept))


def check_selection(received, kept, sink):
    """The sinks, the last one, and the most important of the rest."""
    n = len(received)
    protected = (set(range(min(sink, n))) | {n - 1}) if n else set()
    assert kept == sorted(set(kept)) and (protected <= set(kept) or len(kept) == n)
    inside = [received[index] for index in kept if index not in protected]
    outside = [received[index] for index in set(range(n)) - set(kept)]
    if inside and outside:
        assert min(inside) >= max(outside) * (1 - 1e-4) - 1e-6


def check_lengths(importances, counts, budget, sink):
    """Shortest prefixes that reach one common threshold, never under the least, and exactly the total."""
    n_layers, n_keys = len(counts), len(importances[0])
    least = min(sink + 1, n_keys)
    assert sum(counts) == max(round(budget * n_layers * n_keys), n_layers * least)
    above, reached = 0.0, 1.0  # the threshold lies above the one and does not pass the other
    for received, count in zip(importances, counts, strict=True):
        assert least <= count <= n_keys
        falling = sorted(received, reverse=True)
        if count > least:
            above = max(above, sum(falling[: count - 1]) / sum(falling))
        if count < n_keys:
            reached = min(reached, sum(falling[:count]) / sum(falling))
    assert above <= reached + 1e-5
