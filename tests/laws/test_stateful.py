"""Random sequences of everything a cache can be asked for, held against lists of positions.

No model: `Machine` calls `cache.update` and then the attention function, as transformers does, through the same
look-up. Keys, values and queries are random, so that the attention is, too. Beside the cache stands `Naive`, written
from the design's words: for each layer and row a list of the positions that are kept, in the order in which they came,
and every pair that was ever fed, by position. Deciding is left to the cache only where the rules leave it open: which
of two keys is more important, if rounding could say either.

What the design says and what is checked here: how many pairs a prompt leaves, and which; what leaves while decoding;
what each query sees and with which keys and values (law 2); that a later prompt is pruned by the ratios that its rows
have, and earlier pairs stay; that `seen` and `stored` are what they are (law 5); and that rows that are moved,
repeated, selected, copied, pickled, cropped or begun anew go on by their own numbers.

`PREFIXKV_OPERATIONS=100000 pytest tests/test_stateful.py` runs that many operations (`make nightly`); the default is
2,000. An operation is one forward of all layers or one call of the cache.
"""

import copy
import math
import os
import pickle
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import AttentionInterface, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import compat
from oracle import prompt_count
from prefixkv_cache import PrefixKVCache, PrefixProfile

OPERATIONS = int(os.environ.get("PREFIXKV_OPERATIONS", 2000))
STEPS = 30  # in one sequence
MOST_ROWS, LONGEST = 6, 24


@dataclass(frozen=True)
class Setup:
    """One kind of model and of cache."""

    keep: tuple | None  # keep ratio of each layer, or None: search on the prompt itself
    budget: float
    queries: object
    sink: int
    distance: object
    slack: int
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

    def cache(self):
        profile = None if self.keep is None else PrefixProfile([self.budget], [list(self.keep)])
        return PrefixKVCache(
            profile, self.budget, queries=self.queries, sink=self.sink, distance=self.distance, slack=self.slack,
            novelty=0.0, diversity=0.0,  # here the most important keys stay; other scores are for test_scoring.py
            config=self.config() if self.told == "caller" else None,
        )  # fmt: skip

    @property
    def backend(self):
        return "listed_flash" if self.mask == "flash" else "listed"


@st.composite
def setups(draw):
    n_layers = draw(st.integers(1, 4))
    budget = draw(st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 1.0]))
    keep = None
    if draw(st.booleans()):
        lean = draw(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.3, 1.0]), min_size=n_layers, max_size=n_layers))
        lean = [(each - sum(lean) / n_layers) / 2 for each in lean]
        keep = tuple(budget + min(budget, 1 - budget) * each for each in lean)
    return Setup(
        keep=keep,
        budget=budget,
        queries=draw(st.sampled_from(["all", 1, 3, 8, 32])),
        sink=draw(st.sampled_from([0, 1, 1, 3])),
        distance=draw(st.sampled_from([None, 1, 2, 3, 5, 8, 25])),
        slack=draw(st.sampled_from([0, 0, 0, 1, 4])),
        n_layers=n_layers,
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([2, 4, 8])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])),
        mask=draw(st.sampled_from(["bool", "additive", "flash"])),
        told=draw(st.sampled_from(["caller", "module", "nobody"])),
    )


class Naive:
    """What is kept, as lists: `kept[layer][row]` holds positions in the order in which they came."""

    def __init__(self, setup):
        self.setup = setup
        self.clear()

    def clear(self):
        self.seen = 0
        self.tokens = []  # row -> real tokens fed
        self.fed = None  # [2 (keys, values), layers, rows, heads, seen, head_dim]: every pair, by position
        self.kept, self.ratios, self.points = ([[] for _ in range(self.setup.n_layers)] for _ in range(3))
        self.origins = []  # layer -> row -> how many pairs stand before the first answer, once a second turn has come
        self.began = []  # row -> real tokens fed when decoding began

    @property
    def rows(self):
        return len(self.tokens)

    def feed(self, pairs):
        """New tokens come in; their pairs are written down."""
        self.fed = pairs if self.fed is None else torch.cat([self.fed, pairs], dim=4)
        self.seen += pairs.shape[4]

    # A prompt.

    def begin(self, rows):
        self.tokens = [0] * rows
        self.kept = [[[] for _ in range(rows)] for _ in range(self.setup.n_layers)]

    def prune(self, real, chosen, importance):
        """Check what the cache kept of a prompt, and go on with that.

        real: row -> positions of the prompt's real tokens; chosen: layer -> row -> positions kept of everything;
        importance: layer -> row -> what each of those real tokens received.
        """
        first = not self.ratios[0]
        sink = self.setup.sink if first else 0
        if first:
            self.ratios = self._first_ratios(real, chosen, importance)
        if first:
            self.origins = [[None] * self.rows for _ in range(self.setup.n_layers)]
        else:
            self._begin_turn()
        for layer, row in self._places():
            old, new, ratio = self.kept[layer][row], real[row], self.ratios[layer][row]
            assert chosen[layer][row][: len(old)] == old, "earlier pairs stay"
            kept = [new.index(position) for position in chosen[layer][row][len(old) :]]
            if not (first and self.setup.keep is None and self.setup.budget < 1):
                allowance = 0 if first or self.tokens[row] <= self.began[row] else self.setup.slack // 2
                assert len(kept) == min(prompt_count(len(new), ratio, sink) + allowance, len(new))
            check_selection(importance[layer][row], kept, sink)
            self.kept[layer][row] = old + [new[index] for index in kept]
        self.tokens = [old + len(new) for old, new in zip(self.tokens, real, strict=True)]
        self.began = list(self.tokens)
        self.points = [[self._point(len(kept)) for kept in rows] for rows in self.kept]

    def _begin_turn(self):
        """What a row holds beyond its share after decoding leaves: what would have left next, within the slack."""
        for layer, row in self._places():
            kept, point, ratio = self.kept[layer][row], self.points[layer][row], self.ratios[layer][row]
            if point is not None and ratio < 1 and self.tokens[row] > self.began[row]:
                beyond = math.floor(max(0, len(kept) - self.tokens[row] * ratio))
                if self.origins[layer][row] is None:
                    self.origins[layer][row] = point
                origin = self.origins[layer][row]
                del kept[origin : origin + min(self.setup.slack, beyond)]

    def _first_ratios(self, real, chosen, importance):
        """Of the profile; or what a search on the row's own prompt found, if there was enough to search in."""
        setup = self.setup
        if setup.keep is not None or setup.budget == 1:
            keep = [1.0] * setup.n_layers if setup.budget == 1 else setup.keep
            return [[ratio] * self.rows for ratio in keep]
        ratios = [[setup.budget] * self.rows for _ in range(setup.n_layers)]
        for row, new in enumerate(real):
            counts = [len(chosen[layer][row]) for layer in range(setup.n_layers)]
            check_lengths([of_layer[row] for of_layer in importance], counts, setup.budget, setup.sink)
            if round(setup.budget * setup.n_layers * len(new)) >= setup.n_layers * (setup.sink + 1):
                for layer, count in enumerate(counts):
                    ratios[layer][row] = count / len(new)
        return ratios

    def _point(self, count):
        distance = self.setup.distance
        if distance is None:
            return None
        return count - distance if count - distance >= 1 else count // 2

    # A step.

    def step(self):
        """One more token, the newest of those fed, and for it one leaves where there are too many."""
        self.tokens = [tokens + 1 for tokens in self.tokens]
        for layer, row in self._places():
            kept, point = self.kept[layer][row], self.points[layer][row]
            ratio, before = self.ratios[layer][row], len(kept)
            kept.append(self.seen - 1)
            most = 1 + self.setup.slack
            if point is None or ratio == 1 or len(kept) - self.tokens[row] * ratio < most:
                continue
            if point < before:  # the newcomer itself never leaves
                del kept[point]
            assert len(kept) - self.tokens[row] * ratio < most or len(kept) <= max(before, 1), "law 5"

    def _places(self):
        return [(layer, row) for layer in range(self.setup.n_layers) for row in range(self.rows)]

    # Rows.

    def take(self, rows):
        self.tokens = [self.tokens[row] for row in rows]
        self.fed = self.fed[:, :, rows]
        for numbers in (self.ratios, self.points, self.origins):
            numbers[:] = [[of_layer[row] for row in rows] for of_layer in numbers]
        self.began = [self.began[row] for row in rows]
        self.kept = [[list(of_layer[row]) for row in rows] for of_layer in self.kept]

    def crop(self, removed, tokens):
        """The newest tokens were never fed; what had left for them is gone. tokens: row -> real ones that are left."""
        self.seen -= removed
        if self.seen == 0:
            self.clear()
            return
        self.fed = self.fed[..., : self.seen, :]
        for layer, row in self._places():
            kept = [position for position in self.kept[layer][row] if position < self.seen]
            self.kept[layer][row] = kept
            if self.points[layer][row] is not None:  # a crop into the prompt takes the fixed point with it
                self.points[layer][row] = min(self.points[layer][row], max(len(kept) - 1, 0))
            if self.origins[layer][row] is not None:
                self.origins[layer][row] = min(self.origins[layer][row], len(kept))
        self.tokens = tokens


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


# The attention function, and what stands around it in a model.


class Module:
    """What an attention function is given of its layer."""

    def __init__(self, layer_idx, config, seen_by_backend):
        self.layer_idx, self.seen_by_backend = layer_idx, seen_by_backend
        if config is not None:
            self.config = config


def backend(module, query, key, value, attention_mask, scaling=None, **_):
    """Shows the test what a backend would compute with. What it returns, nobody reads."""
    module.seen_by_backend(module.layer_idx, query, key, value, attention_mask)
    return query.transpose(1, 2), None


def visible(mask, n_queries, n_keys, rows):
    """bool [rows, queries, keys], whichever form the mask has."""
    causal = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    if mask is None:
        return causal.expand(rows, -1, -1)
    if mask.ndim == 2:
        assert mask.shape == (rows, n_keys)
        return causal & mask.bool()[:, None]
    assert mask.shape[2:] == (n_queries, n_keys) and mask.shape[1] == 1
    return (mask if mask.dtype == torch.bool else mask > -1)[:, 0].expand(rows, -1, -1)


def positions_of(value):
    """int [rows, keys]: values carry their position in front."""
    return value[:, 0, :, 0].long() + 64 * value[:, 0, :, 1].long()


class Machine(RuleBasedStateMachine):
    operations = 0

    @initialize(setup=setups())
    def begin(self, setup):
        self.setup, self.cache, self.naive = setup, setup.cache(), Naive(setup)
        self.config = setup.config()
        self.twin = None  # a copy that was put aside, with its lists
        self.waiting = None  # what `Naive.prune` is to be told, where the lengths are not settled yet
        self.real = []  # row -> position -> whether it is a token and no padding
        self.since_reset = 0

    # One forward.

    def forward(self, real, seed, stop_before=math.inf, unattended=False, checked=True):
        """Feed tokens to all layers, as a model would. real: bool [rows, n]."""
        setup, naive = self.setup, self.naive
        rows, n_new = real.shape
        random = torch.Generator().manual_seed(seed)
        shape = (setup.n_layers, rows, setup.kv_heads, n_new, setup.head_dim)
        pairs = torch.randn(2, *shape, generator=random)
        at = torch.arange(naive.seen, naive.seen + n_new)
        pairs[1, ..., 0], pairs[1, ..., 1] = at % 64, at // 64
        pairs = pairs.to(setup.dtype)
        query = torch.randn(setup.n_layers, rows, setup.kv_heads * setup.group, n_new, setup.head_dim, generator=random)
        query = (2 * query).to(setup.dtype)

        self._settle()
        is_step = naive.rows > 0 and n_new == 1
        earlier = naive.seen
        if not naive.rows:
            naive.begin(rows)
            self.real = [[] for _ in range(rows)]
        naive.feed(pairs)
        for all_of, new in zip(self.real, real.tolist(), strict=True):
            all_of.extend(new)
        if is_step:
            naive.step()
        importance = [None] * setup.n_layers

        def seen_by_backend(layer, query, key, value, mask):
            if not checked:
                return
            shown = visible(mask, n_new, key.shape[2], rows)
            at = positions_of(value).clamp_max(naive.seen - 1)  # slots that hold nothing may show anything finite
            fed = naive.fed[:, layer].gather(
                3, at[None, :, None, :, None].expand(2, -1, setup.kv_heads, -1, setup.head_dim)
            )
            importance[layer] = [[] for _ in range(rows)]
            for row in range(rows):
                old = naive.kept[layer][row] if is_step else naive.kept[layer][row] + self._new(row, earlier)
                wanted = torch.tensor(old)
                for index in self._new(row, earlier, relative=True):
                    seen = shown[row, index].nonzero().flatten()
                    assert at[row, seen].sort().values.equal(wanted[wanted <= earlier + index]), "what a query sees"
                used = shown[row][self._new(row, earlier, relative=True)].any(0)
                assert key[row][:, used].equal(fed[0, row][:, used]), "its keys"
                assert value[row][:, used].equal(fed[1, row][:, used]), "its values"
                if not is_step:
                    importance[layer][row] = self._importance(query[row], key[row], shown[row], at[row], row, earlier)

        for layer in range(setup.n_layers):
            if layer == stop_before:
                return
            mask = self._mask(real, n_new)
            keys, values = self.cache.update(pairs[0, layer], pairs[1, layer], layer)
            if unattended:
                return
            module = Module(layer, None if setup.told == "nobody" else self.config, seen_by_backend)
            attend = _look_up(setup.backend)
            attend(module, query[layer], keys, values, mask, scaling=setup.head_dim**-0.5)
        if not is_step:
            self.waiting = [self._new(row, earlier) for row in range(rows)], importance
            if setup.told != "nobody":
                self._settle()

    def _new(self, row, earlier, relative=False):
        """The real tokens of this forward."""
        new = [at for at in range(earlier, len(self.real[row])) if self.real[row][at]]
        return [at - earlier for at in new] if relative else new

    def _mask(self, real, n_new):
        """As transformers makes it, for all layers alike: in columns of everything seen."""
        of_all = torch.tensor(self.real, dtype=torch.bool)
        seen = of_all.shape[1]
        if self.naive.rows and self.cache.layers:
            n_seen = int(self.cache.get_seq_length())
            assert n_seen in (seen, seen - n_new)
        if bool(of_all.all()):
            return None
        if self.setup.mask == "flash":
            return of_all.long()
        mask = of_all[:, None, None] & torch.ones(n_new, seen, dtype=torch.bool).tril(seen - n_new)
        if self.setup.mask == "bool":
            return mask
        return torch.zeros(mask.shape, dtype=self.setup.dtype).masked_fill(~mask, torch.finfo(self.setup.dtype).min)

    def _importance(self, query, key, shown, at, row, earlier):
        """What each real token of this prompt received from the queries that count, in float64."""
        new = self._new(row, earlier)
        counting = [
            position - earlier for position in (new if self.setup.queries == "all" else new[-self.setup.queries :])
        ]
        if not new:
            return []
        key = key.repeat_interleave(self.setup.group, 0).double()
        scores = query[:, counting].double() @ key.mT * self.setup.head_dim**-0.5
        weights = scores.masked_fill(~shown[counting], -math.inf).softmax(-1).sum(1).mean(0)
        return [float(weights[(at == position) & shown[counting[-1]]]) for position in new]

    def _settle(self):
        """Take over what the cache has decided, or would decide if it were asked to do anything now."""
        if self.waiting is None:
            return
        cache = self.cache
        if self.setup.told == "nobody":
            cache = copy.deepcopy(cache)
            cache.crop(0)
        chosen = [kept_rows(cache, layer) for layer in range(self.setup.n_layers)]
        real, importance = self.waiting
        self.naive.prune(real, chosen, importance)
        self.waiting = None

    def count(self):
        Machine.operations += 1
        self.since_reset += 1  # most sequences are long

    # What can be done.

    @precondition(lambda self: self.naive.rows == 0)
    @rule(
        lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=4),
        alike=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def prompt(self, lengths, alike, seed):
        self.forward(left_padded(lengths[:1] * len(lengths) if alike else lengths), seed)
        self.count()

    @precondition(lambda self: self.naive.rows > 0)
    @rule(data=st.data(), n_new=st.integers(2, LONGEST), seed=st.integers(0, 2**31))
    def later_prompt(self, data, n_new, seed):
        lengths = [n_new] * self.naive.rows
        if data.draw(st.booleans()):
            lengths = data.draw(st.lists(st.integers(0, n_new), min_size=len(lengths), max_size=len(lengths)))
        self.forward(left_padded(lengths, n_new), seed)
        self.count()

    @precondition(lambda self: self.naive.rows > 0)
    @rule(steps=st.integers(1, 8), seed=st.integers(0, 2**31))
    def decode(self, steps, seed):
        for step in range(steps):
            self.forward(torch.ones(self.naive.rows, 1, dtype=torch.bool), seed + step)
            self.count()

    def _take(self, rows):
        self._settle()
        self.naive.take(rows)
        self.real = [list(self.real[row]) for row in rows]
        self.count()

    @precondition(lambda self: self.naive.rows > 0)
    @rule(data=st.data())
    def reorder(self, data):
        rows = data.draw(
            st.lists(st.integers(0, self.naive.rows - 1), min_size=self.naive.rows, max_size=self.naive.rows)
        )
        self._take(rows)
        self.cache.reorder_cache(torch.tensor(rows))

    @precondition(lambda self: self.naive.rows > 0)
    @rule(data=st.data(), as_mask=st.booleans())
    def select(self, data, as_mask):
        rows = data.draw(st.lists(st.integers(0, self.naive.rows - 1), min_size=1, max_size=self.naive.rows))
        if as_mask:
            rows = sorted(set(rows))
        indices = torch.tensor([row in rows for row in range(self.naive.rows)]) if as_mask else torch.tensor(rows)
        self._take(rows)
        self.cache.batch_select_indices(indices)

    @precondition(lambda self: 0 < self.naive.rows <= MOST_ROWS // 2)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats):
        repeats = min(repeats, MOST_ROWS // self.naive.rows)
        self._take([row for row in range(self.naive.rows) for _ in range(repeats)])
        self.cache.batch_repeat_interleave(repeats)

    @precondition(lambda self: self.naive.rows > 0)
    @rule(data=st.data())
    def crop(self, data):
        removed = data.draw(st.one_of(st.integers(0, min(8, self.naive.seen)), st.integers(0, self.naive.seen)))
        # Not over padding in the middle of a row: the cache counts what is taken back, and does not know what it was.
        removed = min([removed, *(tokens_behind_padding(row) for row in self.real)])
        self._settle()
        self.cache.crop(-removed)
        self.real = [row[: len(row) - removed] for row in self.real]
        self.naive.crop(removed, [sum(row) for row in self.real])
        self.count()

    @precondition(lambda self: self.since_reset >= 6)
    @rule()
    def reset(self):
        self.cache.reset()
        self.naive.clear()
        self.waiting, self.real = None, []
        self.count()
        self.since_reset = 0

    @rule(by=st.sampled_from([copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))
    def copy(self, by):
        """Go on with the copy; what it was made of is put aside."""
        self.twin = (self.cache, copy.deepcopy((self.naive, self.waiting, self.real)))
        self.cache = by(self.cache)
        self.count()

    @precondition(lambda self: self.twin is not None)
    @rule()
    def change_over(self):
        """Go on with the one that was put aside: nothing has happened to it."""
        mine = (self.cache, (self.naive, self.waiting, self.real))
        self.cache, (self.naive, self.waiting, self.real) = self.twin
        self.twin = mine
        self.count()

    @precondition(lambda self: self.naive.rows > 0)
    @rule(what=st.sampled_from(["crop forward", "crop too much", "another batch", "nothing"]))
    def refused(self, what):
        """Bad input is an error and changes nothing."""
        rows, n_new = self.naive.rows + (what == "another batch"), 0 if what == "nothing" else 2
        pairs = torch.zeros(2, rows, self.setup.kv_heads, n_new, self.setup.head_dim, dtype=self.setup.dtype)
        self._settle()
        with pytest.raises(ValueError):
            if what == "crop forward":
                self.cache.crop(1)
            elif what == "crop too much":
                self.cache.crop(-self.naive.seen - 1)
            else:
                self.cache.update(*pairs, 0)
        self.count()

    @precondition(lambda self: self.since_reset >= 6)
    @rule(data=st.data(), n_new=st.integers(2, 9), unattended=st.booleans(), seed=st.integers(0, 2**31))
    def broken_off(self, data, n_new, unattended, seed):
        """A forward that ends on its way: the next one is refused, and after `reset` nothing is left of it."""
        if not unattended and self.setup.n_layers == 1:
            return
        real = torch.ones(self.naive.rows or 2, n_new, dtype=torch.bool)
        if unattended:
            self.forward(real, seed, unattended=True)
        else:
            self.forward(real, seed, stop_before=data.draw(st.integers(1, self.setup.n_layers - 1)))
        self.waiting = None
        with pytest.raises(RuntimeError, match="reset"):
            self.forward(torch.ones(len(real), 2, dtype=torch.bool), seed, checked=False)
        self.reset()

    # What always holds.

    @invariant()
    def agrees(self):
        if not hasattr(self, "cache"):
            return
        cache, naive = self.cache, self.naive
        assert cache.get_seq_length() == naive.seen
        if naive.rows == 0:
            assert not any(cache.stored_lengths()) and cache.nbytes == 0
            return
        if self.waiting is not None:
            return
        longest = [max(len(kept) for kept in rows) for rows in naive.kept]
        assert cache.stored_lengths() == longest
        n_bytes = 0
        for layer, width in enumerate(longest):
            at = cache.kept_positions(layer)
            assert at.shape == (naive.rows, width) and at.dtype == torch.int64
            assert kept_rows(cache, layer) == naive.kept[layer]
            shown = (cache.layers[layer].keys, cache.layers[layer].values)
            for tensor, fed in zip(shown, naive.fed[:, layer], strict=True):
                index = at.clamp_min(0)[:, None, :, None].expand(tensor.shape)
                same = (tensor == fed.gather(2, index)) | (at < 0)[:, None, :, None]
                assert tensor.dtype == self.setup.dtype and bool(same.all()) and bool(tensor.isfinite().all())
            pair = 2 * naive.rows * self.setup.kv_heads * self.setup.head_dim * self.setup.dtype.itemsize
            assert pair * width <= cache.layers[layer].nbytes <= pair * max(1.12 * width, width + 64)
            n_bytes += cache.layers[layer].nbytes
        assert cache.nbytes == n_bytes


def kept_rows(cache, layer):
    """Row -> positions, rising: the order in which they came."""
    return [sorted(position for position in row if position >= 0) for row in cache.kept_positions(layer).tolist()]


def tokens_behind_padding(row):
    """How many there are after the last padding that stands between two tokens; all of them where there is none."""
    inner = [at for at, is_real in enumerate(row) if not is_real and any(row[:at])]
    return len(row) - 1 - inner[-1] if inner else len(row)


def left_padded(lengths, n_new=None):
    """bool [rows, n_new]: which tokens are real."""
    n_new = n_new or max(lengths)
    return torch.arange(n_new) >= n_new - torch.tensor(lengths)[:, None]


def _look_up(name):
    look_up = getattr(ALL_ATTENTION_FUNCTIONS, compat.DOOR)
    return look_up(name, None) if compat.SEES_EAGER else look_up(name)


@pytest.fixture
def registered():
    for name in ("listed", "listed_flash"):
        AttentionInterface.register(name, backend)
    yield
    for name in ("listed", "listed_flash"):
        AttentionInterface._global_mapping.pop(name)


def test_any_sequence_of_operations(registered, capsys):
    Machine.operations = 0
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=math.ceil(OPERATIONS / 25),
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=OPERATIONS <= 2000,
            suppress_health_check=list(HealthCheck),
        ),
    )
    with capsys.disabled():
        print(f" {Machine.operations:,} operations", end="", flush=True)
    assert Machine.operations >= OPERATIONS
