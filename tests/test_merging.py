"""Merging of pruned pairs into the nearest kept ones, against plain loops and by hand."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixkv_cache.merging import merge_pruned
from rules import members

some = settings(max_examples=150, deadline=None)


def column(*numbers):
    """[1, 1, n, 1]"""
    return torch.tensor(numbers, dtype=torch.float32)[None, None, :, None]


def kept_columns(*columns):
    return torch.tensor([[columns]])


def test_by_hand():
    """Anchors 3 and 6 of nine: 4 is nearer to 3, 5 to 6, 1 and 2 to 3, 7 to 6; sink 0 and last 8 stay as they are."""
    merged = merge_pruned(column(1, 2, 4, 8, 16, 32, 64, 128, 256), kept_columns(0, 3, 6, 8)).flatten().tolist()
    assert merged[0] == 1 and merged[8] == 256
    assert merged[3] == pytest.approx((2 + 4 + 8 + 16) / 4)
    assert merged[6] == pytest.approx((32 + 64 + 128) / 3)


def test_ties_go_to_the_lower_anchor():
    merged = merge_pruned(column(0, 10, 100, 1000, 5), kept_columns(0, 1, 3, 4)).flatten().tolist()
    assert merged[1] == pytest.approx(110 / 2) and merged[3] == 1000


@pytest.mark.parametrize("sink", [0, 1, 2, 5])
def test_sinks_are_no_anchors(sink):
    pairs = column(1, 2, 4, 8, 16, 32)
    merged = merge_pruned(pairs, kept_columns(0, 1, 2, 5), sink=sink).flatten().tolist()
    wanted = {0: 28 / 3, 1: 28 / 3, 2: 28 / 3, 5: None}[sink]  # 3 and 4 join the anchor 2
    for at in (0, 1, 5):
        assert merged[at] == pairs.flatten()[at]
    assert merged[2] == (pytest.approx(wanted) if wanted else 4)


def test_without_an_anchor_nothing_is_merged():
    pairs = torch.randn(1, 2, 9, 3)
    assert torch.equal(merge_pruned(pairs, kept_columns(0, 8)), pairs)
    assert torch.equal(merge_pruned(pairs, torch.arange(9)[None, None]), pairs)


def test_what_is_given_is_not_changed():
    pairs = torch.randn(1, 2, 9, 3)
    copy = pairs.clone()
    assert not torch.equal(merge_pruned(pairs, kept_columns(0, 4, 8)), copy)
    assert torch.equal(pairs, copy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays_and_means_are_taken_in_float32(dtype):
    pairs = torch.full((1, 1, 600, 2), 300.0, dtype=dtype)  # their sum is more than float16 holds
    merged = merge_pruned(pairs, kept_columns(0, 5, 599))
    assert merged.dtype == dtype
    assert torch.equal(merged, pairs)


def test_published_code_merges_the_pairs_before():
    """Kept 0, 3, 5: 1, 2 and 4 are pruned, but 0, 1 and 3 are what is added, each to the anchor nearest to *it*."""
    merged = merge_pruned(column(1, 2, 4, 8, 16, 32), kept_columns(0, 3, 5), shift=1).flatten().tolist()
    assert merged[3] == pytest.approx((8 + 1 + 2 + 8) / 4)


@some
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 24), st.integers(0, 3),
       st.sampled_from(["none", "left", "right", "holes"]), st.booleans(), st.booleans())  # fmt: skip
def test_as_plain_loops(seed, batch, heads, n, sink, padding, by_head, published):
    source = random.Random(seed)
    rows = []
    for _ in range(batch):
        length = source.randint(1, n)
        rows.append({
            "none": list(range(n)), "left": list(range(n - length, n)), "right": list(range(length)),
            "holes": sorted(source.sample(range(n), length)),
        }[padding])  # fmt: skip
    real = torch.zeros(batch, n, dtype=torch.bool)
    for row, columns in enumerate(rows):
        real[row, columns] = True
    kept = []
    for columns in rows:
        count = source.randint(1, len(columns))
        of_row = []
        for _ in range(heads if by_head else 1):
            ends = [*columns[:sink], columns[-1]]
            inner = [each for each in columns if each not in ends]
            count = max(count, len(set(ends)))
            of_row.append(sorted({*ends, *source.sample(inner, min(len(inner), count - len(set(ends))))}))
        kept.append(of_row)
    width = max(len(of_head) for of_row in kept for of_head in of_row)
    index = torch.tensor([[of_head + [-1] * (width - len(of_head)) for of_head in of_row] for of_row in kept])
    pairs = torch.randn(batch, heads, n, 2, generator=torch.Generator().manual_seed(seed))
    shift = sink if published and padding != "holes" else 0
    found = merge_pruned(pairs, index, real=None if padding == "none" else real, sink=sink, shift=shift)
    wanted = pairs.clone()
    for row in range(batch):
        for head in range(heads):
            for anchor, others in members(rows[row], kept[row][head if by_head else 0], sink, shift).items():
                wanted[row, head, anchor] = torch.stack([pairs[row, head, each] for each in [anchor, *others]]).mean(0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
