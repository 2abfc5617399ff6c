"""Few lengths for many heads: against every possible partition, and by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefixkv_cache.rules.clustering import group_counts, group_ratios

some = settings(max_examples=100, deadline=None)
tied = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0.0, 1.0))


def spread(numbers):
    mean = math.fsum(numbers) / len(numbers)
    return math.fsum((each - mean) ** 2 for each in numbers)


def least_spread(numbers, most):
    """Over all ways to cut the sorted numbers into runs."""
    numbers = sorted(numbers)
    ways = (
        [0, *cuts, len(numbers)]
        for k in range(min(most, len(numbers)))
        for cuts in itertools.combinations(range(1, len(numbers)), k)
    )
    return min(sum(spread(numbers[a:b]) for a, b in itertools.pairwise(way)) for way in ways)


@some
@given(st.lists(tied, min_size=1, max_size=9), st.integers(1, 5))
def test_the_best_of_all_partitions(ratios, most):
    found = group_ratios(torch.tensor(ratios, dtype=torch.float64), most)
    assert found.dtype == torch.float64
    found = found.tolist()
    assert len(set(found)) <= most
    distance = sum((a - b) ** 2 for a, b in zip(ratios, found, strict=True))
    assert distance == pytest.approx(least_spread(ratios, most), abs=1e-12)
    assert math.fsum(found) == pytest.approx(math.fsum(ratios), abs=1e-12)
    assert min(ratios) - 1e-15 <= min(found) and max(found) <= max(ratios) + 1e-15
    for (a, b), (c, d) in itertools.combinations(zip(ratios, found, strict=True), 2):
        assert a != c or b == d  # equal ones share a group
        assert (a - c) * (b - d) >= 0


@some
@given(st.lists(st.sampled_from([0.1, 0.3, 0.7, 0.9]), min_size=1, max_size=32))
def test_few_lengths_stay_to_the_last_bit(ratios):
    assert group_ratios(torch.tensor(ratios, dtype=torch.float64)).tolist() == ratios


def test_ratios_by_hand():
    found = group_ratios(torch.tensor([0.9, 0.1, 0.5, 0.2, 0.8, 0.5], dtype=torch.float64), 3).tolist()
    assert found == pytest.approx([0.85, 0.15, 0.5, 0.15, 0.85, 0.5])
    # Weight counts: 0.4 is nearer to 0 than to 0.9, but three zeros would move by it, and four move too much.
    for zeros, wanted in ((3, [0.1, 0.1, 0.1, 0.1, 0.9]), (4, [0.0, 0.0, 0.0, 0.0, 0.65, 0.65])):
        found = group_ratios(torch.tensor([0.0] * zeros + [0.4, 0.9], dtype=torch.float64), 2).tolist()
        assert found == pytest.approx(wanted, abs=1e-12)


@some
@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(1, 5))
@example([40] * 5 + [2], 1)
@example([40, 40, 40, 39, 39], 4)
def test_whole_numbers_add_up(counts, most):
    found, left = group_counts(counts, most, least=2, limit=40)
    assert len(set(found)) <= most and min(found) >= 2 and max(found) <= 40
    assert left >= 0 and sum(found) + left == sum(counts)
    growing = [found.count(length) for length in set(found) if length < 40]
    assert not growing or left < min(growing)
    means = group_ratios(torch.tensor(counts, dtype=torch.float64), most).tolist()
    assert all(length >= math.floor(mean + 1e-9) for mean, length in zip(means, found, strict=True))
    assert len({*zip(means, found, strict=True)}) == len(set(means))  # a group has one length
    if len(set(counts)) <= most:
        assert (found, left) == (counts, 0)


def test_whole_numbers_by_hand():
    assert group_counts([5, 6, 20, 22, 23], 2) == ([5, 5, 22, 22, 22], 0)  # 5.5 and 21.67: the larger remainder
    assert group_counts([4, 5, 5], 1) == ([4, 4, 4], 2)
    assert group_counts([9, 4, 5, 5], 2) == ([11, 4, 4, 4], 0)  # what three cannot share goes to the one that can
    assert group_counts([9, 4, 5, 5], 2, limit=9) == ([9, 4, 4, 4], 2)
    assert group_counts([1, 9, 9, 9], 2, least=3) == ([4, 8, 8, 8], 0)  # a floor is paid by the longest
    assert group_counts([], 4) == ([], 0)
