"""Few lengths for many heads: against every possible partition, and by hand."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixkv_cache.rules.clustering import cluster, group_means

some = settings(max_examples=100, deadline=None)
tied = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0.0, 1.0))


def grouped(numbers, most):
    return group_means(numbers, cluster(tuple(numbers), most))


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
    found = grouped(ratios, most)
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
    assert grouped(ratios, 4) == ratios


def test_ratios_by_hand():
    found = grouped([0.9, 0.1, 0.5, 0.2, 0.8, 0.5], 3)
    assert found == pytest.approx([0.85, 0.15, 0.5, 0.15, 0.85, 0.5])
    # Weight counts: 0.4 is nearer to 0 than to 0.9, but three zeros would move by it, and four move too much.
    for zeros, wanted in ((3, [0.1, 0.1, 0.1, 0.1, 0.9]), (4, [0.0, 0.0, 0.0, 0.0, 0.65, 0.65])):
        found = grouped([0.0] * zeros + [0.4, 0.9], 2)
        assert found == pytest.approx(wanted, abs=1e-12)
