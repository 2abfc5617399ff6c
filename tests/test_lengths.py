"""Keep ratios and counts without a profile: floors, pyramids, rounding. By their laws, and against exact fractions."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefixkv_cache import search_threshold
from prefixkv_cache.lengths import dithered_count, pyramid_ratios, raise_counts_to_floor, raise_to_floor
from rules import pyramid, share_out, staggered_count

some = settings(max_examples=150, deadline=None)
budgets = st.floats(0.01, 1.0)
shares = st.floats(0.0, 1.0)


def ratios_of(budget, n_layers, seed):
    """Keep ratios whose mean is the budget, nested for rising budgets."""
    source = random.Random(seed)
    lean = [source.uniform(-1, 1) for _ in range(n_layers)]
    lean = [(each - sum(lean) / n_layers) / 2 for each in lean]
    return [budget + min(budget, 1 - budget) * each for each in lean]


# raise_to_floor


@some
@given(budgets, st.integers(1, 40), shares, st.integers(0, 999))
def test_a_floor_keeps_the_mean(budget, n_layers, floor, seed):
    ratios = ratios_of(budget, n_layers, seed)
    raised = raise_to_floor(ratios, budget, floor)
    assert sum(raised) / n_layers == pytest.approx(budget)
    assert all(floor * budget - 1e-12 <= each <= 1 + 1e-12 for each in raised)
    for before, after in zip(ratios, raised, strict=True):
        assert abs(after - budget) <= abs(before - budget) + 1e-12  # never further from uniform
        assert (after - budget) * (before - budget) >= -1e-12


@some
@given(budgets, budgets, st.integers(1, 20), shares, st.integers(0, 999))
def test_a_floor_keeps_nesting(one, other, n_layers, floor, seed):
    less, more = sorted((one, other))
    below, above = ratios_of(less, n_layers, seed), ratios_of(more, n_layers, seed)
    if all(a <= b for a, b in zip(below, above, strict=True)):
        pairs = zip(raise_to_floor(below, less, floor), raise_to_floor(above, more, floor), strict=True)
        assert all(a <= b + 1e-12 for a, b in pairs)


def test_a_floor_of_nothing_and_of_all():
    assert raise_to_floor([0.1, 0.9], 0.5, 0.0) == [0.1, 0.9]
    assert raise_to_floor([0.1, 0.9], 0.5, 1.0) == [0.5, 0.5]
    assert raise_to_floor([0.1, 0.9], 0.5, 0.5) == pytest.approx([0.3, 0.7])


@given(shares)
def test_a_floor_leaves_the_whole_budget_whole(floor):
    """Exactly 1: a layer that keeps all is not looked at."""
    assert raise_to_floor([1.0, 1.0], 1.0, floor) == [1.0, 1.0]


# raise_counts_to_floor


@some
@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), shares)
@example([3, 3, 4], 0.0)
@example([0, 1, 0, 1], 1.0)
def test_counts_keep_their_total(counts, floor):
    raised = raise_counts_to_floor(counts, floor)
    total = sum(counts)
    assert sum(raised) == total
    exact = [Fraction(floor) * total / len(counts) + (1 - Fraction(floor)) * count for count in counts]
    assert all(abs(each - share) < 1 + 1e-9 for each, share in zip(raised, exact, strict=True))
    assert min(raised) >= min(counts) and max(raised) <= max(max(counts), math.ceil(total / len(counts)))
    if floor == 0:
        assert raised == counts
    if floor == 1:
        assert max(raised) - min(raised) <= 1
    # Nobody with a larger remainder is rounded down where one with a smaller one is rounded up.
    remainders = [float(share - math.floor(share)) for share in exact]
    up = [r for r, each, share in zip(remainders, raised, exact, strict=True) if each > share]
    down = [r for r, each, share in zip(remainders, raised, exact, strict=True) if each < share]
    assert not up or not down or min(up) >= max(down) - 1e-6


@some
@given(st.lists(st.integers(0, 100), min_size=4, max_size=4), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_counts_by_exact_fractions(counts, floor):
    """Quarters of quarters are exact in floats: here the ties, too, are those of the rule (the lower layer)."""
    assert raise_counts_to_floor(counts, floor) == share_out(counts, floor)


def test_no_layers():
    assert raise_counts_to_floor([], 0.5) == []


@pytest.mark.parametrize("floor", [0.25, 0.5])
def test_searched_counts_over_a_floor_are_nested_within_one(floor):
    """More pairs in all: largest remainders may take one from a layer, and never two."""
    source = random.Random(5)
    importance = torch.tensor([[source.random() ** (1 + 5 * layer / 6) for _ in range(40)] for layer in range(6)])
    before, taken = [0] * 6, 0
    for total in range(12, 241):
        counts = raise_counts_to_floor(search_threshold(importance, total / 240)[1].tolist(), floor)
        assert sum(counts) == total
        taken = max(taken, *(less - more for less, more in zip(before, counts, strict=True)))
        before = counts
    assert taken <= 1


# pyramid_ratios


@some
@given(budgets, st.integers(1, 80), st.floats(1.0, 100.0))
@example(1.0, 7, 20.0)
@example(0.5, 1, 20.0)
@example(0.9, 2, 20.0)
def test_a_pyramid(budget, n_layers, steepness):
    ratios = pyramid_ratios(budget, n_layers, steepness)
    assert len(ratios) == n_layers
    assert sum(ratios) / n_layers == pytest.approx(budget)
    assert all(0 < each <= 1 for each in ratios)
    assert all(a >= b for a, b in itertools.pairwise(ratios))
    steps = [a - b for a, b in itertools.pairwise(ratios)]
    assert max(steps, default=0) - min(steps, default=0) < 1e-9  # a line
    assert ratios == pytest.approx(pyramid(budget, n_layers, steepness))


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
@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(1, 3000), st.integers(1, 60), st.integers(0, 5), st.data())
def test_one_layer_s_count(one, other, length, n_layers, sink, data):
    place = data.draw(st.integers(0, n_layers - 1))
    less, more = sorted((one, other))
    count = dithered_count(less, length, place, n_layers, sink)
    assert min(length, sink + 1) <= count <= length
    assert count <= dithered_count(more, length, place, n_layers, sink)  # law 4
    exact = Fraction(less) * length + Fraction(2 * place + 1, 2 * n_layers)
    if abs(exact - round(exact)) > 1e-9:  # else rounding may say either
        assert count == staggered_count(length, less, place, n_layers, sink)


def test_counts_by_hand():
    assert [dithered_count(0.25, 10, place, 4, 1) for place in range(4)] == [2, 2, 3, 3]
    assert [dithered_count(0.5, 10, place, 4, 1) for place in range(4)] == [5, 5, 5, 5]
    assert dithered_count(1.0, 7, 3, 4, 1) == 7  # all, and not more
    assert dithered_count(0.0, 7, 3, 4, 2) == 3  # sinks and one
    assert dithered_count(0.0, 2, 0, 4, 2) == 2  # no more than there are
