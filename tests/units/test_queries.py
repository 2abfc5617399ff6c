"""Which queries count, against lists of each row's valid columns."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixkv_cache.rules.queries import even_queries, last_queries

some = settings(max_examples=150, deadline=None)


@st.composite
def rows_of_columns(draw):
    """(n_queries, valid columns of each row): padding left, right or anywhere, rows of padding alone too."""
    source = random.Random(draw(st.integers(0, 10**6)))
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["whole", "left", "right", "holes"]))
    rows = []
    for _ in range(batch):
        length = n if kind == "whole" else source.randint(0, n)
        rows.append({
            "whole": list(range(n)), "left": list(range(n - length, n)), "right": list(range(length)),
            "holes": sorted(source.sample(range(n), length)),
        }[kind])  # fmt: skip
    return n, rows


def picked(picks, n, batch):
    """The columns of each row, and whether they rise without a gap between them."""
    if isinstance(picks, slice):
        return [list(range(n))[picks]] * batch
    assert picks.dtype == torch.int64
    rows = [[column for column in row if column >= 0] for row in picks.expand(batch, -1).tolist()]
    assert picks.shape[1] == max(map(len, rows)) or picks.shape[1] <= n
    return rows


def mask_of(n, rows):
    return torch.tensor([[column in row for column in range(n)] for row in rows])


@some
@given(rows_of_columns(), st.integers(1, 50))
def test_the_last(scene, window):
    n, rows = scene
    assert picked(last_queries(n, window, mask_of(n, rows)), n, len(rows)) == [row[-window:] for row in rows]
    assert picked(last_queries(n, window), n, 1) == [list(range(n))[-window:]]


@some
@given(rows_of_columns(), st.integers(1, 50))
def test_evenly_spaced(scene, number):
    n, rows = scene

    def spaced(row):
        return row if len(row) <= number else [row[(i + 1) * len(row) // number - 1] for i in range(number)]

    found = picked(even_queries(n, number, mask_of(n, rows)), n, len(rows))
    assert found == [spaced(row) for row in rows]
    assert picked(even_queries(n, number), n, 1) == [spaced(list(range(n)))]
    for row, columns in zip(rows, found, strict=True):
        assert len(columns) == min(number, len(row)) and columns[-1:] == row[-1:]  # the last valid one is among them


def test_by_hand():
    valid = torch.tensor([[True] * 6, [False, False, True, True, True, False]])
    assert last_queries(6, 2, valid).tolist() == [[4, 5], [3, 4]]
    assert last_queries(6, 4, valid).tolist() == [[2, 3, 4, 5], [-1, 2, 3, 4]]
    assert even_queries(6, 2, valid).tolist() == [[2, 5], [2, 4]]
    assert even_queries(6, 4, valid).tolist() == [[0, 2, 3, 5], [2, 3, 4, -1]]
    assert last_queries(6, 2) == last_queries(6, 2, valid[:1]) == slice(4, 6)
    assert even_queries(6, 6) == last_queries(6, 9) == slice(0, 6)
