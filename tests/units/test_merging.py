"""Merging of pruned pairs into the nearest kept ones, against plain loops and by hand."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixkv_cache.rules.merging import merge_pruned

some = settings(max_examples=150, deadline=None)


def column(*numbers):
    """[1, 1, n, 1]"""
    return torch.tensor(numbers, dtype=torch.float64)[None, None, :, None]


def merged(pairs, *kept, **options):
    """One row's keys after merging; the values, twice as large here, have to come out twice as large."""
    keys, values = merge_pruned(pairs, 2 * pairs, torch.tensor([[kept]]), **options)
    assert torch.equal(values, 2 * keys)
    return keys.flatten().tolist()


def test_by_hand():
    """Anchors 3 and 6 of nine: 4 is nearer to 3, 5 to 6, 1 and 2 to 3, 7 to 6; sink 0 and last 8 stay as they are."""
    found = merged(column(1, 2, 4, 8, 16, 32, 64, 128, 256), 0, 3, 6, 8)
    assert found[0] == 1 and found[8] == 256
    assert found[3] == pytest.approx((2 + 4 + 8 + 16) / 4)
    assert found[6] == pytest.approx((32 + 64 + 128) / 3)


def test_ties_go_to_the_lower_anchor():
    found = merged(column(0, 10, 100, 1000, 5), 0, 1, 3, 4)
    assert found[1] == pytest.approx(110 / 2) and found[3] == 1000


@pytest.mark.parametrize("sink", [0, 1, 2, 5])
def test_sinks_are_no_anchors(sink):
    found = merged(column(1, 2, 4, 8, 16, 32), 0, 1, 2, 5, sink=sink)
    # 3 and 4 join the anchor 2, if it is one.
    assert found == pytest.approx([1, 2, 28 / 3 if sink < 5 else 4, 8, 16, 32])


def test_without_an_anchor_nothing_is_merged():
    pairs = torch.randn(1, 2, 9, 3)
    for kept in (torch.tensor([[[0, 8]]]), torch.arange(9)[None, None]):
        assert all(torch.equal(each, pairs) for each in merge_pruned(pairs, pairs, kept))


def test_what_is_given_is_not_changed():
    keys, values = torch.randn(1, 2, 9, 3), torch.randn(1, 2, 9, 5)
    copies = keys.clone(), values.clone()
    found = merge_pruned(keys, values, torch.tensor([[[0, 4, 8]]]))
    for given_, copy, each in zip((keys, values), copies, found, strict=True):
        assert torch.equal(given_, copy) and not torch.equal(each, copy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_overflow(dtype):
    pairs = torch.full((1, 1, 600, 2), 300.0, dtype=dtype)  # their sum is more than float16 holds
    for found in merge_pruned(pairs, pairs, torch.tensor([[[0, 5, 599]]])):
        assert found.dtype == dtype and torch.equal(found, pairs)


def members(columns, kept, sink):
    """Anchor -> pruned columns that are merged into it; by places among a row's valid columns."""
    places = {column: place for place, column in enumerate(columns)}
    anchors = [each for each in kept if each not in columns[:sink] and each != columns[-1]]
    found = {anchor: [] for anchor in anchors}
    for each in columns:
        if each not in kept and anchors:
            found[min(anchors, key=lambda anchor: (abs(places[anchor] - places[each]), anchor))].append(each)
    return found


@some
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 24), st.integers(0, 3),
       st.sampled_from(["none", "left", "right", "holes"]), st.booleans())  # fmt: skip
def test_as_plain_loops(seed, batch, heads, n, sink, padding, by_head):
    source = random.Random(seed)
    rows = []
    for row in range(batch):
        length = source.randint(0 if row else 1, n)
        rows.append({
            "none": list(range(n)), "left": list(range(n - length, n)), "right": list(range(length)),
            "holes": sorted(source.sample(range(n), length)),
        }[padding])  # fmt: skip
    valid = torch.tensor([[column in columns for column in range(n)] for columns in rows])
    kept = [
        [sorted(source.sample(columns, source.randint(min(1, len(columns)), len(columns))))
         for _ in range(heads if by_head else 1)]
        for columns in rows
    ]  # fmt: skip
    width = max(len(of_head) for of_row in kept for of_head in of_row)
    index = torch.tensor([[of_head + [-1] * (width - len(of_head)) for of_head in of_row] for of_row in kept])
    torch_source = torch.Generator().manual_seed(seed)
    pairs = [torch.randn(batch, heads, n, size, dtype=torch.float64, generator=torch_source) for size in (2, 3)]
    found = merge_pruned(*pairs, index, valid=None if padding == "none" else valid, sink=sink)
    for each, merged in zip(pairs, found, strict=True):
        wanted = each.clone()
        for row in range(batch):
            for head in range(heads):
                for anchor, others in members(rows[row], kept[row][head if by_head else 0], sink).items():
                    wanted[row, head, anchor] = each[row, head, [anchor, *others]].mean(0)
        torch.testing.assert_close(merged, wanted, atol=1e-12, rtol=0)
