"""Keep ratios and counts: rounding, pyramids, floors, one pool. By their laws, and against slow versions."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefixkv_cache.rules.lengths import (
    dithered_count,
    pool_counts,
    prompt_count,
    pyramid_ratios,
    raise_to_floor,
)

some = settings(max_examples=150, deadline=None)
budgets = st.floats(0.01, 1.0)
shares = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0.0, 1.0))

# prompt_count


def half_to_even(exact):
    whole = math.floor(exact)
    rest = exact - whole
    return whole + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1))


@some
@given(st.sampled_from([each / 64 for each in range(65)]), st.integers(0, 3000), st.integers(0, 5))
def test_a_count_by_exact_fractions(ratio, n, sink):
    wanted = min(n, max(sink + 1, n - half_to_even(n * (1 - Fraction(ratio)))))
    assert prompt_count(ratio, n, sink) == wanted


def test_counts_by_hand():
    assert [prompt_count(keep, 10) for keep in (1.0, 0.75, 0.65, 0.55, 0.0)] == [10, 8, 6, 6, 2]
    assert [prompt_count(0.5, n) for n in (1, 5, 7, 9, 11)] == [1, 3, 3, 5, 5]
    assert prompt_count(0.0, 9, 3) == 4 and prompt_count(0.0, 2, 3) == 2


# pyramid_ratios


@some
@given(budgets, st.integers(1, 80), st.floats(1.0, 100.0))
@example(1.0, 7, 20.0)
@example(0.9, 2, 20.0)
def test_a_pyramid(budget, n_layers, steepness):
    ratios = pyramid_ratios(budget, n_layers, steepness)
    assert len(ratios) == n_layers
    assert sum(ratios) / n_layers == pytest.approx(budget)
    assert all(0 < each <= 1 for each in ratios)
    steps = [a - b for a, b in itertools.pairwise(ratios)]
    assert all(step >= 0 for step in steps) and max(steps, default=0) - min(steps, default=0) < 1e-12  # a line
    # As steep as asked for, unless the first layer would keep more than all: then the first keeps all.
    if n_layers > 1:
        assert ratios[-1] == pytest.approx(budget / steepness) or ratios[0] == pytest.approx(1.0)


def test_a_pyramid_by_hand():
    assert pyramid_ratios(0.4, 3) == pytest.approx([0.78, 0.4, 0.02])  # the last keeps a twentieth of the mean
    assert pyramid_ratios(0.8, 3) == pytest.approx([1.0, 0.8, 0.6])  # 1.56 would be more than all
    assert pyramid_ratios(0.3, 4, 1.0) == [0.3] * 4
    assert pyramid_ratios(1.0, 5) == [1.0] * 5
    assert pyramid_ratios(0.3, 1) == [0.3]


@some
@given(budgets, budgets, st.integers(1, 20))
def test_pyramids_are_nested(one, other, n_layers):
    less, more = sorted((one, other))
    pairs = zip(pyramid_ratios(less, n_layers), pyramid_ratios(more, n_layers), strict=True)
    assert all(a <= b + 1e-12 for a, b in pairs)


# dithered_count


@some
@given(st.floats(0.0, 1.0), st.integers(1, 3000), st.integers(1, 60))
def test_layers_of_one_ratio_keep_the_right_number_together(ratio, length, n_layers):
    counts = [dithered_count(ratio, length, place, n_layers, -1) for place in range(n_layers)]
    assert abs(sum(counts) - ratio * length * n_layers) <= 0.5 + 1e-6
    assert max(counts) - min(counts) <= 1
    assert all(a <= b for a, b in itertools.pairwise(counts))


@some
@given(shares, shares, st.integers(1, 3000), st.integers(1, 60), st.integers(0, 5), st.data())
def test_one_layer_s_count(one, other, length, n_layers, sink, data):
    place = data.draw(st.integers(0, n_layers - 1))
    less, more = sorted((one, other))
    count = dithered_count(less, length, place, n_layers, sink)
    assert count <= dithered_count(more, length, place, n_layers, sink)  # law 4
    exact = Fraction(less) * length + Fraction(2 * place + 1, 2 * n_layers)
    if abs(exact - round(exact)) > 1e-9:  # else rounding may say either
        assert count == min(length, max(sink + 1, math.floor(exact)))


def test_dithered_counts_by_hand():
    assert [dithered_count(0.25, 10, place, 4, 1) for place in range(4)] == [2, 2, 3, 3]
    assert [dithered_count(0.5, 10, place, 4, 1) for place in range(4)] == [5, 5, 5, 5]
    assert dithered_count(1.0, 7, 3, 4, 1) == 7  # all, and not more
    assert dithered_count(0.0, 7, 3, 4, 2) == 3  # sinks and one
    assert dithered_count(0.0, 2, 0, 4, 2) == 2  # no more than there are


# raise_to_floor


def slow_floor(ratios, floor):
    """Bisect the factor at which the raised ratios add up again."""
    mean = sum(ratios) / len(ratios)
    if mean <= floor:
        return [mean] * len(ratios)
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(floor, middle * each) for each in ratios) < sum(ratios) else (low, middle)
    return [max(floor, high * each) for each in ratios]


@some
@given(st.lists(shares, min_size=1, max_size=12), shares)
@example([0.0, 0.0], 0.0)
@example([1.0, 1.0], 1.0)
@example([0.3] * 7, 0.3)
def test_no_ratio_is_below_the_floor(ratios, floor):
    found = raise_to_floor(torch.tensor([ratios], dtype=torch.float64), floor)
    assert found.shape == (1, len(ratios)) and found.dtype == torch.float64
    assert found[0].tolist() == pytest.approx(slow_floor(ratios, floor), abs=1e-9)
    assert float(found.sum()) == pytest.approx(sum(ratios), abs=1e-12)
    assert float(found.min()) >= min(floor, float(found.mean())) - 1e-12 and float(found.max()) <= 1.0
    if min(ratios) >= floor:
        assert found[0].tolist() == ratios  # to the last bit


@some
@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=8), shares)
def test_raised_ratios_are_nested(pairs, floor):
    less, more = (torch.tensor([join(pair) for pair in pairs], dtype=torch.float64) for join in (min, max))
    assert bool((raise_to_floor(less, floor) <= raise_to_floor(more, floor) + 1e-12).all())


def test_a_floor_by_hand():
    assert raise_to_floor(torch.tensor([0.0, 0.5, 0.5]).double(), 0.2).tolist() == pytest.approx([0.2, 0.4, 0.4])
    assert raise_to_floor(torch.tensor([0.1, 0.3, 0.8]).double(), 0.4).tolist() == pytest.approx([0.4] * 3)
    # Scaled by what the first takes, the second falls below and is raised as well.
    assert raise_to_floor(torch.tensor([0.0, 0.21, 0.79]).double(), 0.2).tolist() == pytest.approx([0.2, 0.2, 0.6])


# pool_counts


def slow_pool(scores, total, least):
    """Pair by pair: each head's best first, then the best of all."""
    n_layers, n_heads, n_keys = len(scores), len(scores[0]), len(scores[0][0])
    turns = []
    for layer, head in itertools.product(range(n_layers), range(n_heads)):
        of_head = [-math.inf if math.isnan(each) else each for each in scores[layer][head]]
        order = sorted(range(n_keys), key=lambda column: (-of_head[column], column))
        turns += [(at >= least, 0 if at < least else -of_head[column], layer, head, at)
                  for at, column in enumerate(order)]  # fmt: skip
    counts = [[0] * n_heads for _ in range(n_layers)]
    for _, _, layer, head, _ in sorted(turns)[: max(total, n_layers * n_heads * min(least, n_keys))]:
        counts[layer][head] += 1
    return counts


@some
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 4),
       st.sampled_from(["ties", "any", "not numbers"]))  # fmt: skip
def test_one_pool_as_plain_loops_at_every_total(seed, n_layers, n_heads, n_keys, least, kind):
    source = random.Random(seed)
    choices = {"ties": [0.0, 1.0, 2.0], "any": None, "not numbers": [0.0, 1.0, math.nan, math.inf, -math.inf]}[kind]
    scores = [[[source.choice(choices) if choices else source.random() for _ in range(n_keys)]
               for _ in range(n_heads)] for _ in range(n_layers)]  # fmt: skip
    given_scores, size, before = torch.tensor(scores), n_layers * n_heads * n_keys, None
    for total in range(size + 2):
        counts = pool_counts(given_scores, total, least)
        assert counts.dtype == torch.int64
        assert counts.tolist() == slow_pool(scores, total, least)
        assert int(counts.sum()) == min(size, max(total, n_layers * n_heads * min(least, n_keys)))
        assert before is None or bool((counts >= before).all())  # nested
        before = counts


def test_one_pool_by_hand():
    scores = torch.tensor([[[5.0, 1, 4], [3.0, 3, 0]], [[9.0, 0, 0], [0.0, 0, 0]]])
    assert pool_counts(scores, 4, 0).tolist() == [[2, 1], [1, 0]]
    assert pool_counts(scores, 6, 1).tolist() == [[2, 2], [1, 1]]
    assert pool_counts(scores, 0, 2).tolist() == [[2, 2], [2, 2]]
