"""Keep ratios and counts: clips, temperatures, pyramids, rounding. By their laws, and against slow versions."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefixkv_cache import search_threshold
from prefixkv_cache.lengths import (
    check_clips,
    clip_ratios,
    dithered_count,
    pyramid_ratios,
    temper_counts,
    temper_ratios,
)
from rules import clipped, pyramid, share_out, staggered_count

some = settings(max_examples=150, deadline=None)
budgets = st.floats(0.01, 1.0)
shares = st.floats(0.0, 1.0)


def ratios_of(budget, n_layers, seed):
    """Keep ratios whose mean is the budget, nested for rising budgets."""
    source = random.Random(seed)
    lean = [source.uniform(-1, 1) for _ in range(n_layers)]
    lean = [(each - sum(lean) / n_layers) / 2 for each in lean]
    return [budget + min(budget, 1 - budget) * each for each in lean]


# temper_ratios


@some
@given(budgets, st.integers(1, 40), shares, st.integers(0, 999))
def test_a_temperature_keeps_the_mean(budget, n_layers, temperature, seed):
    ratios = ratios_of(budget, n_layers, seed)
    mixed = temper_ratios(ratios, budget, temperature)
    assert sum(mixed) / n_layers == pytest.approx(budget)
    assert all(temperature * budget - 1e-12 <= each <= 1 + 1e-12 for each in mixed)
    for before, after in zip(ratios, mixed, strict=True):
        assert abs(after - budget) <= abs(before - budget) + 1e-12  # never further from uniform
        assert (after - budget) * (before - budget) >= -1e-12


@some
@given(budgets, budgets, st.integers(1, 20), shares, st.integers(0, 999))
def test_a_temperature_keeps_nesting(one, other, n_layers, temperature, seed):
    less, more = sorted((one, other))
    below, above = ratios_of(less, n_layers, seed), ratios_of(more, n_layers, seed)
    if all(a <= b for a, b in zip(below, above, strict=True)):
        pairs = zip(temper_ratios(below, less, temperature), temper_ratios(above, more, temperature), strict=True)
        assert all(a <= b + 1e-12 for a, b in pairs)


def test_a_temperature_by_hand():
    assert temper_ratios([0.1, 0.9], 0.5, 0.0) == [0.1, 0.9]
    assert temper_ratios([0.1, 0.9], 0.5, 1.0) == [0.5, 0.5]
    assert temper_ratios([0.1, 0.9], 0.5, 0.5) == pytest.approx([0.3, 0.7])


@given(shares)
def test_a_temperature_leaves_the_whole_budget_whole(temperature):
    """Exactly 1: a layer that keeps all is not looked at."""
    assert temper_ratios([1.0, 1.0], 1.0, temperature) == [1.0, 1.0]


# temper_counts


@some
@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), shares)
@example([3, 3, 4], 0.0)
@example([0, 1, 0, 1], 1.0)
def test_counts_keep_their_total(counts, temperature):
    mixed = temper_counts(counts, temperature)
    total, share = sum(counts), Fraction(temperature)
    assert sum(mixed) == total
    exact = [share * total / len(counts) + (1 - share) * count for count in counts]
    assert all(abs(each - share) < 1 + 1e-9 for each, share in zip(mixed, exact, strict=True))
    assert min(mixed) >= min(counts) and max(mixed) <= max(max(counts), math.ceil(total / len(counts)))
    if temperature == 0:
        assert mixed == counts
    if temperature == 1:
        assert max(mixed) - min(mixed) <= 1
    # Nobody with a larger remainder is rounded down where one with a smaller one is rounded up.
    remainders = [float(share - math.floor(share)) for share in exact]
    up = [r for r, each, share in zip(remainders, mixed, exact, strict=True) if each > share]
    down = [r for r, each, share in zip(remainders, mixed, exact, strict=True) if each < share]
    assert not up or not down or min(up) >= max(down) - 1e-6


@some
@given(st.lists(st.integers(0, 100), min_size=4, max_size=4), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_counts_by_exact_fractions(counts, temperature):
    """Quarters of quarters are exact in floats: here the ties, too, are those of the rule (the lower layer)."""
    assert temper_counts(counts, temperature) == share_out(counts, temperature)


def test_no_layers():
    assert temper_counts([], 0.5) == []


@pytest.mark.parametrize("temperature", [0.25, 0.5])
def test_searched_counts_under_a_temperature_are_nested_within_one(temperature):
    """More pairs in all: largest remainders may take one from a layer, and never two."""
    source = random.Random(5)
    importance = torch.tensor([[source.random() ** (1 + 5 * layer / 6) for _ in range(40)] for layer in range(6)])
    before, taken = [0] * 6, 0
    for total in range(12, 241):
        counts = temper_counts(search_threshold(importance, total / 240)[1].tolist(), temperature)
        assert sum(counts) == total
        taken = max(taken, *(less - more for less, more in zip(before, counts, strict=True)))
        before = counts
    assert taken <= 1


# clip_ratios


@st.composite
def profiles(draw):
    """A function of the budget: keep ratios along straight lines between 0, some rising rows, and all."""
    n_layers, n_rows = draw(st.integers(1, 8)), draw(st.integers(0, 4))
    random_ = random.Random(draw(st.integers(0, 9999)))
    columns = [sorted(random_.random() ** 2 for _ in range(n_rows)) for _ in range(n_layers)]
    off = draw(st.sampled_from([0.0, 0.005]))  # a profile's mean may be so far from its budget
    rows = [[0.0] * n_layers, *map(list, zip(*columns, strict=True)), [1.0] * n_layers]
    places = [0.0, *(min(0.999, max(1e-3, sum(row) / n_layers + off)) for row in rows[1:-1]), 1.0]

    def ratios(budget):
        for (left, low), (right, high) in itertools.pairwise(zip(places, rows, strict=True)):
            if left < right and left <= budget <= right:
                along = (budget - left) / (right - left)
                return [a + (b - a) * along for a, b in zip(low, high, strict=True)]
        raise AssertionError(budget)

    return ratios


clips = st.tuples(
    st.one_of(st.sampled_from([0.0, 0.5, 1.0]), shares),
    st.one_of(st.sampled_from([None, 1.0, 1.5, 40.0]), st.floats(1.0, 4.0)),
)


def clip(ratios, budget, floor, cap):
    return [max(floor * budget, min(each, 1.0 if cap is None else min(1.0, cap * budget))) for each in ratios]


@some
@given(profiles(), budgets, clips)
def test_clipped_ratios_add_up_and_stay_within(source, budget, clips):
    floor, cap = clips
    ratios = clip_ratios(source, budget, floor, cap)
    if floor == 0.0 and cap is None:
        assert ratios == source(budget)
        return
    assert sum(ratios) / len(ratios) == pytest.approx(budget, abs=1e-9)
    assert min(ratios) >= floor * budget and max(ratios) <= (1.0 if cap is None else min(1.0, cap * budget))


@settings(max_examples=40, deadline=None)
@given(profiles(), budgets, clips)
def test_clipped_ratios_are_the_source_s_at_some_budget(source, budget, clips):
    """Held against every place on a fine grid: the first at which the clipped ratios add up."""
    floor, cap = clips
    if floor == 0.0 and cap is None:
        return
    ratios = clip_ratios(source, budget, floor, cap)
    grid = [clip(source(place / 4000), budget, floor, cap) for place in range(4001)]
    total = budget * len(ratios)
    at = next((place for place, each in enumerate(grid) if sum(each) >= total - 1e-9), 4000)
    for each, low, high in zip(ratios, grid[max(0, at - 1)], grid[at], strict=True):
        assert low - 1e-9 <= each <= high + 1e-9
    assert ratios == pytest.approx(clipped(source, budget, floor, cap), abs=1e-9)


@some
@given(profiles(), budgets, budgets, clips)
def test_clipped_ratios_are_nested(source, one, other, clips):
    less, more = sorted((one, other))
    if clips == (0.0, None):
        return
    for a, b in zip(clip_ratios(source, less, *clips), clip_ratios(source, more, *clips), strict=True):
        assert a <= b + 1e-11


@given(profiles(), clips)
def test_clips_leave_the_whole_budget_whole(source, clips):
    assert set(clip_ratios(source, 1.0, *clips)) == {1.0}


def test_clips_by_hand():
    def source(budget):  # one layer takes four times what each of two others takes, until it has all
        return [min(1.0, 2 * budget), *[budget / 2 if budget <= 0.5 else 0.25 + 1.5 * (budget - 0.5)] * 2]

    assert source(0.3) == pytest.approx([0.6, 0.15, 0.15])
    assert clip_ratios(source, 0.3) == source(0.3)
    assert clip_ratios(source, 0.3, 0.5) == source(0.3)  # both clips are exactly met
    assert clip_ratios(source, 0.3, 0.0, 2.0) == source(0.3)
    assert clip_ratios(source, 0.3, 0.8) == pytest.approx([0.42, 0.24, 0.24])
    assert clip_ratios(source, 0.3, 0.0, 1.5) == pytest.approx([0.45, 0.225, 0.225])
    assert clip_ratios(source, 0.3, 0.9, 1.1) == pytest.approx([0.33, 0.285, 0.285])
    assert clip_ratios(source, 0.3, 1.0) == pytest.approx([0.3] * 3)
    assert clip_ratios(source, 0.3, 0.0, 1.0) == pytest.approx([0.3] * 3)
    assert clip_ratios(source, 0.6, 0.0, 5.0) == source(0.6)  # never more than all
    assert clip_ratios(lambda budget: [budget] * 5, 0.3, 0.5, 1.2) == [0.3] * 5  # uniform lengths lie within


@pytest.mark.parametrize(
    ("floor", "cap", "message"),
    [
        (-0.1, None, "floor must be a number from 0 to 1; got -0.1"),
        (1.1, None, "floor must be a number from 0 to 1; got 1.1"),
        (0.0, 0.9, "cap must be .* at least 1.*None for no cap; got 0.9"),
        (0.0, math.nan, "cap must be .* at least 1.*None for no cap; got nan"),
        (0.0, math.inf, "cap must be .* at least 1.*None for no cap; got inf"),
        (0.0, "twice", "cap must be .* at least 1.*None for no cap; got 'twice'"),
    ],
)
def test_clips_that_no_lengths_can_keep_to(floor, cap, message):
    with pytest.raises((ValueError, TypeError), match=message):
        check_clips(floor, cap)
    with pytest.raises((ValueError, TypeError), match=message):
        search_threshold(torch.rand(2, 5), 0.5, floor=floor, cap=cap)


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
