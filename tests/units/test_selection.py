"""Which keys of a layer stay, against a queue in a Python list."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixkv_cache.rules.selection import places, select_keys

some = settings(max_examples=200, deadline=None)
NAN, INF = math.nan, math.inf


def one(scores, count, **options):
    """Kept columns of a single row and head."""
    kept = select_keys(torch.tensor([[scores]]), [count], **options)
    assert kept.shape == (1, 1, count) and kept.dtype == torch.int64
    return kept[0, 0].tolist()


def select(scores, count, sink, recent, first):
    """One row's indices to keep, rising: sink and last, the window (newest first), then `first`, then the others."""
    n = len(scores)

    def turn(index):
        if index < sink or index == n - 1:
            return 0, index
        if index >= n - recent:
            return 1, -index
        return 2 if index in first else 3, -scores[index], index

    return sorted(sorted(range(n), key=turn)[:count])


@st.composite
def problems(draw):
    """Scores with ties, padding anywhere, windows and protected keys that need not fit."""
    source = random.Random(draw(st.integers(0, 10**6)))
    batch, heads, n = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    levels = draw(st.sampled_from([1, 3, 1000]))
    scores = [[[float(source.randrange(levels)) for _ in range(n)] for _ in range(heads)] for _ in range(batch)]
    rows = [list(range(n))] * batch
    padded = draw(st.booleans())
    if padded:
        rows = [sorted(source.sample(range(n), source.randint(0 if batch > 1 else 1, n))) for _ in range(batch)]
        rows[0] = rows[0] or [0]
    counts = [source.randint(min(1, len(row)), len(row)) for row in rows]
    sink = draw(st.integers(0, 4))
    recent = [source.randrange(25) for _ in rows] if draw(st.booleans()) else draw(st.integers(0, 25))
    protected = None
    if draw(st.booleans()):
        protected = [[source.random() < 0.4 for _ in range(n)] for _ in range(batch)]
    return scores, rows, padded, counts, sink, recent, protected


def solve(problem, counts=None):
    scores, rows, padded, drawn, sink, recent, protected = problem
    counts = drawn if counts is None else counts
    n = len(scores[0][0])
    valid = torch.tensor([[at in row for at in range(n)] for row in rows]) if padded else None
    protected = None if protected is None else torch.tensor(protected)
    return select_keys(torch.tensor(scores), counts, valid=valid, sink=sink, recent=recent, protected=protected)


@some
@given(problems())
def test_as_a_queue(problem):
    scores, rows, _, counts, sink, recent, protected = problem
    found = solve(problem)
    assert found.shape == (len(rows), len(scores[0]), max(counts)) and found.dtype == torch.int64
    for row, columns in enumerate(rows):
        window = recent[row] if isinstance(recent, list) else recent
        first = {index for index, at in enumerate(columns) if protected and protected[row][at]}
        for head, of_head in enumerate(scores[row]):
            if not columns:
                assert set(found[row, head].tolist()) <= {-1}
                continue
            kept = select([of_head[at] for at in columns], counts[row], sink, window, first)
            wanted = [columns[index] for index in kept]
            assert found[row, head].tolist() == wanted + [-1] * (max(counts) - len(wanted))


@some
@given(problems())
def test_law_4_a_larger_count_keeps_a_superset(problem):
    _, rows, *_ = problem
    sizes = range(max(map(len, rows)) + 1)
    kept = [solve(problem, [min(size, len(row)) for row in rows]) for size in sizes]
    for less, more in itertools.pairwise(kept):
        for a, b in zip(less.flatten(0, 1).tolist(), more.flatten(0, 1).tolist(), strict=True):
            assert set(a) - {-1} <= set(b)


def test_by_hand():
    scores = [9.0, 1.0, 5.0, 5.0, 7.0, 0.0]
    assert one(scores, 3) == [0, 4, 5]  # the last one stays, whatever its score
    assert one(scores, 3, sink=1) == [0, 4, 5]
    assert one(scores, 3, sink=2) == [0, 1, 5]
    assert one(scores, 4) == [0, 2, 4, 5]  # of equals, the lower column
    assert one(scores, 4, recent=3) == [0, 3, 4, 5]
    assert one(scores, 2, recent=3) == [4, 5]  # newest first where the window does not fit
    assert one(scores, 3, sink=1, recent=4) == [0, 4, 5]
    assert one(scores, 3, protected=torch.tensor([[False, True, True, True, False, False]])) == [2, 3, 5]
    assert one(scores, 5, protected=torch.tensor([[False, True, True, True, False, False]])) == [0, 1, 2, 3, 5]
    assert one(scores, 1, sink=2) == [0]  # not even the sink fits


def test_heads_and_rows_choose_by_themselves():
    scores = torch.tensor([[[3.0, 2, 1, 0], [0, 1, 2, 0]], [[0, 9, 0, 0], [0, 0, 0, 5]]])
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    kept = select_keys(scores, [3, 2], valid=valid)
    assert kept.tolist() == [[[0, 1, 3], [1, 2, 3]], [[1, 3, -1], [1, 3, -1]]]


def test_padding_does_not_matter():
    """Wherever a row's tokens lie, the same ones stay."""
    source = random.Random(3)
    scores = [source.random() for _ in range(12)]
    alone = one(scores, 6, sink=2, recent=3)
    for left in (0, 1, 5):
        padded = [source.random() * 99 for _ in range(left)] + scores + [source.random() * 99 for _ in range(5 - left)]
        valid = torch.tensor([[left <= at < left + 12 for at in range(17)]])
        assert one(padded, 6, sink=2, recent=3, valid=valid) == [left + each for each in alone]


def test_what_is_no_number_counts_as_nothing():
    assert one([NAN, 1.0, NAN, 2.0, 0.0], 3) == [1, 3, 4]
    assert one([1.0, INF, 3.0, INF, 0.0, 0.0], 3) == [1, 3, 5]
    # Neither sink and last nor the window give way to infinity.
    assert one([0.0, INF, INF, INF, 0.0, 0.0], 3, sink=1, recent=2) == [0, 4, 5]
    assert one([-INF, 1.0, 2.0, 3.0], 2) == [2, 3]
    assert one([0.0, 3e38, 1e31, 0.0, 0.0], 3, sink=1, recent=2) == [0, 3, 4]  # nor to a number as large as they come


def test_all_stay_without_scores():
    assert select_keys(None, [3, 3], n_keys=3).tolist() == [[[0, 1, 2]], [[0, 1, 2]]]
    valid = torch.tensor([[True, True, True], [False, True, True]])
    assert select_keys(None, [3, 2], valid=valid, n_keys=3).tolist() == [[[0, 1, 2]], [[1, 2, -1]]]
    with pytest.raises(ValueError, match="n_keys"):
        select_keys(None, [3])


def test_many_keys_keep_their_order():
    """Windows and protected keys are ranked among many thousand, one by one."""
    n = 200_000
    assert one([0.5] * n, 3, recent=n) == [n - 3, n - 2, n - 1]
    scores = torch.rand(1, 1, n)
    best = scores[0, 0, : n - 1].topk(500).indices.sort().values.tolist()
    everything = torch.ones(1, n, dtype=torch.bool)
    assert select_keys(scores, [501], protected=everything)[0, 0].tolist() == [*best, n - 1]


def test_places_is_the_inverse():
    order = torch.stack([torch.randperm(9) for _ in range(4)])
    for row, ranks in zip(order.tolist(), places(order).tolist(), strict=True):
        assert [row[rank] for rank in ranks] == list(range(9))
        assert ranks[row[0]] == 0
