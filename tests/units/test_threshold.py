"""Laws of the threshold search, held against a slow one that shares no line with it: plain loops over Python floats."""

import math
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefixkv_cache import search_threshold
from prefixkv_cache.rules.threshold import search_lengths

some = settings(max_examples=150, deadline=None)
BUDGETS = [0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 0.95, 1.0]


def falling_mass(layer):
    """One layer's importance, sorted, largest first, summing to 1; uniform where there is none."""
    total = math.fsum(layer)
    return sorted((each / total if total > 0 else 1 / len(layer) for each in layer), reverse=True)


def shortest_prefix(mass, threshold, least):
    """Length of the shortest prefix whose mass reaches the threshold (within rounding)."""
    reached, length = 0.0, 0
    while length < len(mass) and (length == 0 or reached < threshold - 1e-12):
        reached += mass[length]
        length += 1
    return max(length, min(least, len(mass)))


def slow_search(importance, budget, sink=1):
    """Bisect the threshold, as the paper does, until it stops moving. Returns the lengths that certainly fit, and how
    many pairs are then still free: none, unless the next step is a tie."""
    masses = [falling_mass(layer) for layer in importance]
    n_layers, n_keys = len(masses), len(masses[0])
    least = [min(sink + 1, n_keys)] * n_layers
    target = max(round(budget * n_layers * n_keys), sum(least))
    low, high, fitting = 0.0, 1.0, least
    for _ in range(60):
        middle = (low + high) / 2
        lengths = [shortest_prefix(mass, middle, sink + 1) for mass in masses]
        if sum(lengths) <= target:
            low, fitting = middle, lengths
        else:
            high = middle
    return fitting, target - sum(fitting)


def draw(kind, n_layers, n_keys, seed=0):
    random_ = random.Random(seed)
    peaked = [[math.exp(12 * random_.random() * random_.random()) for _ in range(n_keys)] for _ in range(n_layers)]
    flat = [[random_.random() for _ in range(n_keys)] for _ in range(n_layers)]
    spike = [[float(key == 3 % n_keys) for key in range(n_keys)] for _ in range(n_layers)]
    return {
        "random": flat,
        "peaked": peaked,
        "mixed": [peaked[layer] if layer % 2 else flat[layer] for layer in range(n_layers)],
        "one spike in one layer": [spike[0], *flat[1:]],
        "few masses": [[float(random_.randint(1, 3)) for _ in range(n_keys)] for _ in range(n_layers)],
    }[kind]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shape", [(6, 40), (1, 50), (32, 17)])
@pytest.mark.parametrize("kind", ["random", "peaked", "mixed", "one spike in one layer"])
def test_equals_the_slow_search(kind, shape, budget):
    importance = draw(kind, *shape)
    fitting, free = slow_search(importance, budget)
    threshold, counts = search_threshold(torch.tensor(importance, dtype=torch.float64), budget)
    counts = counts.tolist()
    assert sum(counts) == sum(fitting) + free
    if free == 0:
        assert counts == fitting
    else:  # the last pairs are a tie
        assert all(count >= slow for count, slow in zip(counts, fitting, strict=True))
    assert 0 <= threshold <= 1
    for layer, count in zip(importance, counts, strict=True):
        assert math.fsum(falling_mass(layer)[:count]) >= threshold - 1e-9  # every layer reaches the threshold


@pytest.mark.parametrize("budget", BUDGETS)
def test_ties_are_shared_out(budget):
    importance = draw("few masses", 5, 24)
    fitting, free = slow_search(importance, budget)
    counts = search_threshold(torch.tensor(importance), budget)[1].tolist()
    assert sum(counts) == sum(fitting) + free
    assert all(abs(count - slow) <= 1 for count, slow in zip(counts, fitting, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_any_mass_layers_are_uniform(dtype):
    counts = search_threshold(torch.zeros(4, 30, dtype=dtype), 0.5)[1]
    assert counts.tolist() == [15] * 4


def test_pairs_without_mass_go_to_the_shorter_layer():
    spikes = torch.zeros(3, 20)
    spikes[:, 7] = 1.0
    threshold, counts = search_threshold(spikes, 0.5)
    assert threshold == 1.0
    assert counts.tolist() == [10, 10, 10]
    assert search_threshold(spikes, 32 / 60)[1].tolist() == [11, 11, 10]


def test_free_pairs_go_to_the_heaviest_next_key_of_the_step():
    # The first two layers would both step at 1/4, and one pair is free.
    threshold, counts = search_threshold(
        torch.tensor([[4.0, 4, 4, 4], [4.0, 4, 4, 4], [4.0, 12, 0, 0]]), 4 / 12, sink=0
    )
    assert threshold == 0.25
    assert counts.tolist() == [2, 1, 1]
    counts = search_threshold(torch.tensor([[3.0, 3, 1, 1], [3.0, 3, 2, 0]]), 5 / 8, sink=0)[1]
    assert counts.tolist() == [2, 3]  # both have reached 3/4 with two; of their next keys the second's is the heavier


@pytest.mark.parametrize("sink", [0, 1, 4, 100])
@pytest.mark.parametrize("budget", [1e-6, 0.01, 0.2, 1.0])
def test_no_layer_is_shorter_than_the_sink_and_one(budget, sink):
    importance = torch.rand(5, 12) ** 8
    counts = search_threshold(importance, budget, sink=sink)[1]
    least = min(sink + 1, 12)
    assert int(counts.min()) >= least and int(counts.max()) <= 12
    assert int(counts.sum()) == max(round(budget * 60), 5 * least)


@pytest.mark.parametrize("budget", [1e-9, 0.5, 1.0])
def test_one_key(budget):
    assert search_threshold(torch.tensor([[0.3], [0.0]]), budget)[1].tolist() == [1, 1]


importances = st.integers(1, 5).flatmap(
    lambda n_keys: st.lists(
        st.lists(
            st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e300), st.sampled_from([0.0, 1e-320, 1e-30, 1.0])),
            min_size=n_keys,
            max_size=n_keys,
        ),
        min_size=1,
        max_size=4,
    )
)
budgets = st.floats(1e-9, 1.0)


@some
@given(importances, budgets, st.integers(0, 3))
@example([[0.0] * 5], 0.5, 1)
@example([[1e308] * 5, [1e-320] * 5], 0.5, 0)
def test_any_input_ends_with_the_right_total(importance, budget, sink):
    threshold, counts = search_threshold(torch.tensor(importance, dtype=torch.float64), budget, sink=sink)
    n_layers, n_keys = len(importance), len(importance[0])
    least = min(sink + 1, n_keys)
    assert 0.0 <= threshold <= 1.0
    assert counts.dtype == torch.int64 and len(counts) == n_layers
    assert int(counts.sum()) == max(round(budget * n_layers * n_keys), n_layers * least)
    assert all(least <= count <= n_keys for count in counts.tolist())


@some
@given(importances, st.lists(budgets, min_size=1, max_size=6), st.integers(0, 2))
def test_a_grid_of_budgets_is_one_search_each(importance, grid, sink):
    importance, grid = torch.tensor(importance, dtype=torch.float64), sorted(grid)
    counts = search_lengths(importance, grid, sink=sink)
    for row, budget in zip(counts, grid, strict=True):
        assert row.tolist() == search_threshold(importance, budget, sink=sink)[1].tolist()


@some
@given(
    st.lists(st.lists(st.integers(0, 2**20), min_size=4, max_size=12), min_size=1, max_size=4).map(
        lambda layers: [layer[: min(map(len, layers))] for layer in layers]
    ),
    budgets,
)
def test_equals_the_slow_search_on_whole_numbers(importance, budget):
    fitting, free = slow_search(importance, budget)
    counts = search_threshold(torch.tensor(importance, dtype=torch.float64), budget)[1].tolist()
    assert sum(counts) == sum(fitting) + free
    assert all(count >= slow for count, slow in zip(counts, fitting, strict=True))


@some
@given(importances, st.integers(0, 3))
def test_lengths_never_fall(importance, sink):
    """At every total there is."""
    importance = torch.tensor(importance, dtype=torch.float64)
    totals = [total / importance.numel() for total in range(1, importance.numel() + 1)]
    counts = search_lengths(importance, totals, sink=sink)
    assert bool((counts[1:] >= counts[:-1]).all())


@pytest.mark.parametrize("pairs", [1, 3, 17, 39, 40, 41, 10**30])
def test_a_budget_of_so_many_pairs(pairs):
    importance = torch.tensor(draw("mixed", 6, 40))
    counts = search_threshold(importance, pairs)[1]
    assert int(counts.sum()) == 6 * max(2, min(pairs, 40))
    assert torch.equal(counts, search_threshold(importance, max(2, min(pairs, 40)) / 40)[1])


def test_a_layer_counts_by_its_shape_and_not_by_its_size():
    importance = torch.rand(4, 30, dtype=torch.float64)
    scaled = importance * torch.tensor([[1e-9], [1.0], [256.0], [1e200]], dtype=torch.float64)
    assert search_threshold(scaled, 0.3)[1].tolist() == search_threshold(importance, 0.3)[1].tolist()


def test_importance_may_carry_gradients_and_is_left_as_it_was():
    importance = torch.rand(3, 9, requires_grad=True)
    before = importance.detach().clone()
    search_threshold(importance, 0.4)
    assert torch.equal(importance.detach(), before)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.rand(3), r"\[n_layers, n_keys\]"),
        (torch.rand(0, 3), r"\[n_layers, n_keys\]"),
        (torch.rand(3, 0), r"\[n_layers, n_keys\]"),
        (torch.tensor(1.0), r"\[n_layers, n_keys\]"),
        (torch.tensor([[1.0, math.nan]]), "finite"),
        (torch.tensor([[1.0, math.inf]]), "finite"),
        (torch.tensor([[1.0, -0.1]]), "not negative"),
    ],
)
def test_bad_importance_is_refused(importance, message):
    with pytest.raises(ValueError, match=message):
        search_threshold(importance, 0.5)
    with pytest.raises(ValueError, match=message):
        search_lengths(importance, [0.5])


def test_what_is_no_tensor_is_refused_by_name():
    with pytest.raises(TypeError, match=r"importance must be a tensor .*got list"):
        search_threshold([[1.0, 2.0]], 0.5)


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, math.nan, math.inf, "half", None, True])
def test_bad_budgets_are_refused(budget):
    with pytest.raises((ValueError, TypeError), match="fraction of the KV pairs"):
        search_threshold(torch.rand(2, 5), budget)
    with pytest.raises((ValueError, TypeError), match="fraction of the KV pairs"):
        search_lengths(torch.rand(2, 5), [0.5, budget])


@pytest.mark.parametrize("sink", [-1, 1.5, True, "one", None])
def test_a_bad_sink_is_refused_by_name(sink):
    with pytest.raises((ValueError, TypeError), match=f"^sink must be .*got {sink!r}"):
        search_threshold(torch.rand(2, 5), 0.5, sink=sink)
    with pytest.raises((ValueError, TypeError), match=f"^sink must be .*got {sink!r}"):
        search_lengths(torch.rand(2, 5), [0.5], sink=sink)
