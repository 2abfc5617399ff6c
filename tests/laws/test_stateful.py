"""Random sequences of everything a cache can be asked for, held against lists of positions.

No model: `Machine` calls `cache.update` and then the attention function, as transformers does, through the same
look-up. Keys, values and queries are random, so that the attention is, too. Beside the cache stands `Naive` (naive.py):
lists of the positions that are kept, and every pair that was ever fed, by position. Deciding is left to the cache only
where the rules leave it open: which of two keys is more important, if rounding could say either.

Checked are: how many pairs a prompt leaves, and which; what leaves while decoding; what each query head sees and with
which keys and values (law 2), segment by segment, and that the outputs are joined in head order; that a later prompt is
pruned by the ratios that its rows have, and earlier pairs stay; that `seen`, `stored` and bytes are what they are
(law 5); and that rows that are moved, repeated, selected, copied, pickled, cropped or begun anew go on by their own
numbers.

`PREFIXKV_OPERATIONS=100000 pytest tests/laws/test_stateful.py` runs that many operations (`make nightly`); the default
is 1,500. An operation is one forward of all layers or one call of the cache.
"""

import copy
import math
import os
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import compat
from naive import Naive, setups
from rules import last_queries
from watch import kept_by_head, memory_of

OPERATIONS = int(os.environ.get("PREFIXKV_OPERATIONS", 1500))
STEPS = 30  # in one sequence
MOST_ROWS, LONGEST = 6, 24


# The attention function, and what stands around it in a model.


class Module:
    """What an attention function is given of its layer."""

    def __init__(self, layer_idx, config, seen_by_backend):
        self.layer_idx, self.seen_by_backend = layer_idx, seen_by_backend
        if config is not None:
            self.config = config


def backend(module, query, key, value, attention_mask, scaling=None, **_):
    """Shows the test what a backend would compute with; gives back the queries, so that joining shows."""
    module.seen_by_backend(module.layer_idx, query, key, value, attention_mask)
    return query.transpose(1, 2), None


def visible(mask, n_queries, n_keys, rows):
    """bool [rows, query heads or 1, queries, keys], whichever form the mask has."""
    causal = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    if mask is None:
        return causal.expand(rows, 1, -1, -1)
    if mask.ndim == 2:
        assert mask.shape == (rows, n_keys)
        return causal & mask.bool()[:, None, None]
    assert mask.shape[2:] == (n_queries, n_keys)
    return (mask if mask.dtype == torch.bool else mask > -1).expand(rows, -1, -1, -1)


def positions_of(value):
    """int [rows, heads, keys]: values carry their position in front."""
    return value[..., 0].long() + 64 * value[..., 1].long()


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
        """Feed tokens to all layers, as a model would. real: bool [rows, n], False at padding."""
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
        is_step, earlier = naive.rows > 0 and n_new == 1, naive.seen
        if not naive.rows:
            naive.begin(rows)
            self.real = [[] for _ in range(rows)]
        naive.feed(pairs)
        for all_of, new in zip(self.real, real.tolist(), strict=True):
            all_of.extend(new)
        if is_step:
            naive.step()
        importance = [[[None] * setup.kv_heads for _ in range(rows)] for _ in range(setup.n_layers)]

        def seen_by_backend(layer, of_segment, key, value, mask):
            if checked:
                self._check_segment(query[layer], earlier, importance[layer], layer, of_segment, key, value, mask)

        for layer in range(setup.n_layers):
            if layer == stop_before:
                return
            mask = self._mask(real, n_new)
            keys, values = self.cache.update(pairs[0, layer], pairs[1, layer], layer)
            if unattended:
                return
            module = Module(layer, None if setup.told == "nobody" else self.config, seen_by_backend)
            attend = _look_up(setup.backend)
            output, _ = attend(module, query[layer], keys, values, mask, scaling=setup.head_dim**-0.5)
            assert output.equal(query[layer].transpose(1, 2)), "outputs of the segments, in head order"
        if not is_step:
            self.waiting = [self._new(row, earlier) for row in range(rows)], importance
            if setup.told != "nobody":
                self._settle()

    def _check_segment(self, query, earlier, importance, layer, of_segment, key, value, mask):
        """One call of the backend: some key heads, and the query heads that share them."""
        group, is_step = self.setup.group, query.shape[2] == 1 and earlier > 0
        shown = visible(mask, query.shape[2], key.shape[2], len(query))
        positions = positions_of(value).clamp(
            0, self.naive.seen - 1
        )  # slots that hold nothing may show anything finite
        for at in range(key.shape[1]):
            own = of_segment[:, at * group : (at + 1) * group]
            head = next(h for h in range(self.setup.kv_heads) if own.equal(query[:, h * group : (h + 1) * group]))
            for row in range(len(query)):
                kept, new = self.naive.kept[layer][row][head], self._new(row, earlier)
                wanted = torch.tensor(kept if is_step else kept + new)
                of_row, places = shown[row, at * group % shown.shape[1]], positions[row, at]
                for position in new:
                    seen = places[of_row[position - earlier]]
                    assert seen.sort().values.equal(wanted[wanted <= position]), "what a query sees"
                used = of_row[[position - earlier for position in new]].any(0)
                for tensor, fed in zip((key, value), self.naive.fed[:, layer, row, head], strict=True):
                    assert tensor[row, at, used].equal(fed[places[used]]), "its keys and values"
                if not is_step:
                    importance[row][head] = self._importance(own[row], key[row, at], of_row, places, new, earlier)

    def _new(self, row, earlier):
        """Positions of the valid tokens of this forward."""
        return [at for at in range(earlier, len(self.real[row])) if self.real[row][at]]

    def _mask(self, real, n_new):
        """As transformers makes it, for all layers alike: in columns of everything seen."""
        of_all = torch.tensor(self.real, dtype=torch.bool)
        seen = of_all.shape[1]
        if self.naive.rows and self.cache.layers:
            assert int(self.cache.get_seq_length()) in (seen, seen - n_new)
        if bool(of_all.all()):
            return None
        if self.setup.mask == "flash":
            return of_all.long()
        mask = of_all[:, None, None] & torch.ones(n_new, seen, dtype=torch.bool).tril(seen - n_new)
        if self.setup.mask == "bool":
            return mask
        return torch.zeros(mask.shape, dtype=self.setup.dtype).masked_fill(~mask, torch.finfo(self.setup.dtype).min)

    def _importance(self, query, key, shown, places, new, earlier):
        """What each valid token of this prompt received from the queries that count, in float64."""
        if not new:
            return []
        counting = [new[at] - earlier for at in last_queries(len(new), self.setup.method.ranking.queries)]
        scores = query[:, counting].double() @ key.double().mT * self.setup.head_dim**-0.5
        weights = scores.masked_fill(~shown[counting], -math.inf).softmax(-1).sum(1).mean(0)
        return [float(weights[(places == position) & shown[counting[-1]]]) for position in new]

    def _settle(self):
        """Take over what the cache has decided, or would decide if it were asked to do anything now."""
        if self.waiting is None:
            return
        cache = self.cache
        if self.setup.told == "nobody":
            cache = copy.deepcopy(cache)
            cache.crop(0)
        chosen = [kept_by_head(cache, layer, self.setup.kv_heads) for layer in range(self.setup.n_layers)]
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
        if self.naive.uneven(removed):
            pytest.raises(ValueError, self.cache.crop, -removed)  # noqa: RUF061
            return
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
        n_bytes, pair = 0, 2 * naive.rows * self.setup.head_dim * self.setup.dtype.itemsize
        for layer, rows in enumerate(naive.kept):
            longest = [max(len(heads[head]) for heads in rows) for head in range(self.setup.kv_heads)]
            for head in range(self.setup.kv_heads):  # where nothing ever leaves, padding keeps its places
                if all(heads[head].ratio == 1.0 for heads in naive.rule.heads[layer]):
                    longest[head] = naive.seen
            assert cache.stored_lengths(heads=True)[layer] == longest
            assert cache.stored_lengths()[layer] == round(sum(longest) / len(longest))
            assert cache.kept_positions(layer).dtype == torch.int64
            assert kept_by_head(cache, layer, self.setup.kv_heads) == rows
            taken = memory_of(cache.layers[layer])
            assert pair * sum(longest) <= taken <= pair * sum(max(1.12 * each, each + 64) for each in longest)
            n_bytes += taken
        assert cache.nbytes == n_bytes


def tokens_behind_padding(row):
    """How many there are after the last padding that stands between two tokens; all of them where there is none."""
    inner = [at for at, is_real in enumerate(row) if not is_real and any(row[:at])]
    return len(row) - 1 - inner[-1] if inner else len(row)


def left_padded(lengths, n_new=None):
    """bool [rows, n_new]: which tokens are real."""
    n_new = n_new or max(lengths)
    return torch.arange(n_new) >= n_new - torch.tensor(lengths)[:, None]


def _look_up(name):
    look_up = getattr(ALL_ATTENTION_FUNCTIONS, compat.LOOK_UP)
    return look_up(name, None) if compat.SEES_EAGER else look_up(name)


@pytest.fixture
def registered(monkeypatch):
    for name in ("listed", "listed_flash"):
        monkeypatch.setitem(AttentionInterface._global_mapping, name, backend)


def test_any_sequence_of_operations(registered, capsys):
    Machine.operations = 0
    run_machine(
        Machine,
        settings=settings(
            max_examples=math.ceil(OPERATIONS / 25), stateful_step_count=STEPS, deadline=None,
            derandomize=OPERATIONS <= 1500, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    with capsys.disabled():
        print(f" {Machine.operations:,} operations", end="", flush=True)
    assert Machine.operations >= OPERATIONS
