"""Steps between importance and ranking, against plain loops over each row's valid keys."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from prefixkv_cache.rules import scoring
from prefixkv_cache.rules.scoring import join_heads, normalised_without_sink, pool_neighbours, vector_norms

some = settings(max_examples=150, deadline=None)
NAN, INF = math.nan, math.inf


@st.composite
def scenes(draw):
    """(scores [batch, heads, n] float64, rows of valid columns or None), with zeros, ties and nan among them."""
    source = random.Random(draw(st.integers(0, 10**6)))
    batch, heads, n = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 30))
    odd = draw(st.sampled_from([[], [NAN]]))
    scores = [[[source.choice([0.0, source.random(), 9.0, *odd]) for _ in range(n)] for _ in range(heads)]
              for _ in range(batch)]  # fmt: skip
    kind = draw(st.sampled_from(["none", "left", "right", "holes"]))
    rows = [list(range(n))] * batch
    for row in range(batch) if kind != "none" else ():
        length = source.randint(0, n)  # a row may be padding alone
        rows[row] = {
            "left": list(range(n - length, n)), "right": list(range(length)),
            "holes": sorted(source.sample(range(n), length)),
        }[kind]  # fmt: skip
    valid = None if kind == "none" else torch.tensor([[at in row for at in range(n)] for row in rows])
    return torch.tensor(scores, dtype=torch.float64), rows, valid


def mean(numbers):
    return math.fsum(numbers) / len(numbers)


@some
@given(scenes(), st.sampled_from([1, 3, 5, 7, 31]), st.sampled_from(["max", "mean"]))
def test_pooling(scene, width, by):
    """Among the valid scores within the window; padding has none and lends none, and so does nan, which stays."""
    scores, rows, valid = scene
    found = pool_neighbours(scores, width, by, valid)
    assert found.shape == scores.shape
    for row, head in itertools.product(range(len(scores)), range(scores.shape[1])):
        given_scores = scores[row, head].tolist()
        wanted = [0.0] * len(given_scores)
        for at in rows[row]:
            near = [given_scores[j] for j in rows[row] if abs(at - j) <= width // 2 and not math.isnan(given_scores[j])]
            wanted[at] = NAN if math.isnan(given_scores[at]) else (max if by == "max" else mean)(near)
        assert found[row, head].tolist() == pytest.approx(wanted, rel=1e-14, abs=0, nan_ok=True)


@pytest.mark.parametrize("width", [11, 2**31 + 1, 2**63 - 1])
@pytest.mark.parametrize("valid", [None, torch.tensor([[False, True, True, True, True, True]])])
def test_a_window_wider_than_the_prompt_is_the_prompt(width, valid):
    scores = torch.tensor([[[9.0, 1.0, 5.0, 2.0, 0.0, 3.0]]])
    largest = [9.0] * 6 if valid is None else [0.0] + [5.0] * 5
    assert pool_neighbours(scores, width, "max", valid).tolist() == [[largest]]
    average = [20 / 6] * 6 if valid is None else [0.0] + [11 / 5] * 5
    assert pool_neighbours(scores, width, "mean", valid)[0, 0].tolist() == pytest.approx(average)


@pytest.mark.parametrize("by", ["max", "mean"])
def test_a_padded_row_is_pooled_as_alone_to_the_last_bit(by):
    """Else a tie in the one would be none in the other."""
    scores = torch.rand(1, 2, 50)
    valid = torch.tensor([[False] * 37 + [True] * 50 + [False] * 9])
    padded = torch.full((1, 2, 96), 99.0).masked_scatter(valid[:, None].expand(1, 2, -1), scores)
    assert torch.equal(pool_neighbours(padded, 7, by, valid)[:, :, 37:87], pool_neighbours(scores, 7, by))


def test_heads_join():
    scores = torch.tensor([[[1.0, 5.0, 0.0], [3.0, 1.0, 0.0]]])
    assert join_heads(scores, "mean").tolist() == [[[2.0, 3.0, 0.0]]]
    assert join_heads(scores, "max").tolist() == [[[3.0, 5.0, 0.0]]]
    assert join_heads(scores, "each") is scores
    assert join_heads(scores[:, :1], "max").tolist() == [[[1.0, 5.0, 0.0]]]


@some
@given(scenes(), st.integers(0, 4))
def test_normalised_without_the_sink(scene, sink):
    scores, rows, valid = scene
    found = normalised_without_sink(scores, sink, valid)
    assert found.dtype == torch.float32 and found.shape == scores.shape
    for row, head in itertools.product(range(len(scores)), range(scores.shape[1])):
        counting = {at: scores[row, head, at].item() for at in rows[row][sink:]}
        total = math.fsum(each for each in counting.values() if not math.isnan(each))
        wanted = [0.0] * scores.shape[2]
        for at, each in counting.items():
            wanted[at] = each / total if total else each
        assert found[row, head].tolist() == pytest.approx(wanted, rel=1e-5, abs=0, nan_ok=True)


def test_normalising_by_hand():
    scores = torch.tensor([[[90.0, 1, 3, 4], [5.0, 0, 0, 0]]], dtype=torch.float16)
    assert normalised_without_sink(scores, 1).tolist() == [[[0.0, 0.125, 0.375, 0.5], [0.0] * 4]]
    valid = torch.tensor([[False, True, True, True]])
    assert normalised_without_sink(scores, 2, valid).tolist() == [[[0.0, 0.0, 0.0, 1.0], [0.0] * 4]]
    # What is lost is seen to be, and no other number changes for it.
    lost = normalised_without_sink(torch.tensor([[[NAN, 1.0, NAN, 3.0, INF]]]), 1)[0, 0]
    assert lost[2].isnan() and lost[4] == INF and lost[[0, 1, 3]].tolist() == [0.0, 0.25, 0.75]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [1, 700, 3000, 20000, 2**24])
def test_norms_in_pieces_of_any_size(monkeypatch, piece, dtype):
    """Rows, heads or tokens at a time."""
    monkeypatch.setattr(scoring, "_PIECE_BYTES", piece)
    vectors = (torch.randn(3, 4, 50, 8) * 2**12).to(dtype)  # in float16 the squares alone would overflow
    found = vector_norms(vectors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), vectors.double().square().sum(-1).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_vector_that_is_not_finite_has_no_norm(bad):
    vectors = torch.randn(2, 2, 5, 8)
    wanted = vector_norms(vectors)
    vectors[0, 1, 3, 2] = bad
    wanted[0, 1, 3] = 0.0
    assert torch.equal(vector_norms(vectors), wanted)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (1, 2, 0, 8), (1, 2, 5, 0)])
def test_no_vectors_at_all(shape):
    assert vector_norms(torch.zeros(shape)).tolist() == torch.zeros(shape[:3]).tolist()


def test_norms_take_less_than_the_layer_s_own_memory():
    values = torch.randn(1, 8, 8192, 64).bfloat16()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        vector_norms(values)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    assert 0 < max(held) < values.nbytes * 0.6
