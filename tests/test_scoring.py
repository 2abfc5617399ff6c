"""How keys are ranked, against plain loops: the visibility average of importance, and each step of `rank_keys`."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.profiler import ProfilerActivity, profile

import rules
from prefixkv_cache import scoring
from prefixkv_cache.importance import attention_importance
from prefixkv_cache.masks import readable
from prefixkv_cache.scoring import (
    Ranking,
    discount_repetition,
    join_heads,
    mix_in_diversity,
    pool_neighbours,
    rank_keys,
)

some = settings(max_examples=50, deadline=None)
BATCH, HEADS, KV_HEADS, DIM, NEW = 2, 4, 2, 8, 12

# Importance for each head, and by visibility.


def slow_importance(query, key, visible, counts, average, per_head):
    """One row, one query head, one query at a time. visible: [row][query][key], counts: [row][query], bools."""
    group, n_keys = query.shape[1] // key.shape[1], key.shape[2]
    result = []
    for row in range(query.shape[0]):
        of_heads = [[0.0] * n_keys for _ in range(query.shape[1])]
        viewers = [0] * n_keys
        for at in range(query.shape[2]):
            if not counts[row][at]:
                continue
            seen = [column for column in range(n_keys) if visible[row][at][column]]
            for column in seen:
                viewers[column] += 1
            for head in range(query.shape[1]):
                scores = [
                    math.exp(float(query[row, head, at].double() @ key[row, head // group, column].double()) / DIM**0.5)
                    for column in seen
                ]
                for column, score in zip(seen, scores, strict=True):
                    of_heads[head][column] += score / sum(scores)
        if average == "visible":
            of_heads = [[each / max(1, seen) for each, seen in zip(head, viewers, strict=True)] for head in of_heads]
        groups = [of_heads[at : at + group] for at in range(0, len(of_heads), group)] if per_head else [of_heads]
        joined = [[sum(each) / len(each) for each in zip(*heads, strict=True)] for heads in groups]
        result.append(joined if per_head else joined[0])
    return torch.tensor(result)


PADDING = {
    "none": [[1] * NEW, [1] * NEW],
    "left": [[1] * NEW, [0] * 7 + [1] * 5],
    "right": [[1] * NEW, [1] * 5 + [0] * 7],
    "inside": [[1, 0, 1] * 4, [0, 0] + [1, 1, 0, 1, 1] * 2],
}
CASES = [
    (kind, padding, queries, earlier)
    for kind in ("none", "bool", "additive", "lowest", "2-D", "block")
    for padding in PADDING
    for queries, earlier in (("all", 0), ("all", 5), (4, 0), (7, 5), (99, 5))
    if kind != "none" or padding == "none"
]


@pytest.mark.parametrize(("average", "per_head"), [("visible", False), ("visible", True), ("sum", True)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_importance_as_plain_loops(case, average, per_head):
    kind, padding, queries, earlier = case
    source = torch.Generator().manual_seed(len(str(case)))
    query = torch.randn(BATCH, HEADS, NEW, DIM, generator=source)
    key = torch.randn(BATCH, KV_HEADS, NEW + earlier, DIM, generator=source)
    real = torch.tensor(PADDING[padding], dtype=torch.bool)
    keys = torch.cat([torch.ones(BATCH, earlier, dtype=torch.bool), real], dim=1)
    visible = torch.ones(NEW, NEW + earlier, dtype=torch.bool).tril(earlier) & keys[:, None]
    additive = torch.zeros(visible.shape).masked_fill(~visible, -math.inf)[:, None]
    mask = {
        "none": None,
        "bool": visible[:, None],
        "additive": additive,
        "lowest": additive.clamp_min(torch.finfo(torch.float32).min),
        "2-D": keys.int(),
        "block": readable(
            create_block_mask(lambda b, h, q, k: visible[b, q, k], BATCH, None, *visible.shape[1:], device="cpu")
        ),
    }[kind]
    counts = [[False] * NEW for _ in range(BATCH)]
    for row in range(BATCH):
        columns = [at for at in range(NEW) if real[row, at]]
        for at in columns if queries == "all" else columns[-queries:]:
            counts[row][at] = True
    found = attention_importance(
        query, key, mask, queries=queries, real=None if padding == "none" else real, average=average, per_head=per_head
    )
    wanted = slow_importance(query, key, visible.tolist(), counts, average, per_head)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_a_mask_with_holes_has_fewer_viewers():
    """Key 3 is seen by two queries only, and by one of those that count."""
    query, key = torch.zeros(1, 2, 8, 4), torch.zeros(1, 1, 8, 4)
    visible = torch.ones(8, 8, dtype=torch.bool).tril()
    visible[:, 3] = False
    visible[[4, 7], 3] = True
    found = attention_importance(query, key, visible[None, None], queries=2, average="visible")
    assert found[0].tolist() == pytest.approx([(1 / 6 + 1 / 8) / 2] * 3 + [1 / 8] + [(1 / 6 + 1 / 8) / 2] * 3 + [1 / 8])


def test_by_visibility_uniform_attention_does_not_favour_the_first():
    """Summed, the first key of ten has 2.9 of the uniform attention and the last 0.1; averaged, 0.29 and 0.1."""
    query, key = torch.zeros(1, 1, 10, 4), torch.zeros(1, 1, 10, 4)
    harmonic = [sum(1 / (at + 1) for at in range(first, 10)) for first in range(10)]
    assert attention_importance(query, key)[0].tolist() == pytest.approx(harmonic)
    averaged = [total / (10 - first) for first, total in enumerate(harmonic)]
    assert attention_importance(query, key, average="visible")[0].tolist() == pytest.approx(averaged)


@pytest.mark.parametrize("max_bytes", [1, 2**10, 2**13])
@pytest.mark.parametrize("padded", [False, True])
def test_the_pieces_do_not_matter(max_bytes, padded):
    query, key = torch.randn(3, 4, 40, 8), torch.randn(3, 2, 40, 8)
    real = (torch.arange(40) >= torch.tensor([[0], [13], [30]])) if padded else None
    mask = None if real is None else (torch.ones(40, 40).tril().bool() & real[:, None])[:, None]
    options = dict(mask=mask, real=real, average="visible", per_head=True)
    whole = attention_importance(query, key, **options)
    torch.testing.assert_close(attention_importance(query, key, max_bytes=max_bytes, **options), whole)


# Steps of the ranking.


def ragged(kind, batch, n, source):
    """bool [batch, n] or None; every row has a real token."""
    if kind == "none":
        return None
    lengths = [source.randint(1, n) for _ in range(batch)]
    if kind == "left":
        rows = [[at >= n - length for at in range(n)] for length in lengths]
    elif kind == "right":
        rows = [[at < length for at in range(n)] for length in lengths]
    else:
        rows = [[source.random() < 0.6 for _ in range(n)] for _ in lengths]
        for row in rows:
            row[source.randrange(n)] = True
    return torch.tensor(rows)


paddings = st.sampled_from(["none", "left", "right", "holes"])


@some
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 30),
       st.sampled_from([1, 3, 5, 7, 31]), paddings)  # fmt: skip
def test_pooling(seed, batch, heads, n, width, padding):
    """The largest real score within the window; padding has none and lends none."""
    source = random.Random(seed)
    real = ragged(padding, batch, n, source)
    scores = torch.tensor([[[source.choice([0.0, source.random(), 9.0]) for _ in range(n)] for _ in range(heads)]
                           for _ in range(batch)])  # fmt: skip
    found = pool_neighbours(scores, width, real)
    for row in range(batch):
        own = [real is None or bool(real[row, at]) for at in range(n)]
        for head in range(heads):
            for at in range(n):
                near = [scores[row, head, j].item() for j in range(n) if own[j] and abs(at - j) <= width // 2]
                assert found[row, head, at].item() == (max(near) if own[at] else 0.0)


def test_heads_join():
    scores = torch.tensor([[[1.0, 5.0, 0.0], [3.0, 1.0, 0.0]]])
    assert join_heads(scores, "mean").tolist() == [[[2.0, 3.0, 0.0]]]
    assert join_heads(scores, "max").tolist() == [[[3.0, 5.0, 0.0]]]
    assert join_heads(scores, "each").tolist() == scores.tolist()


def test_diversity_by_hand():
    """Two keys alike and one across: the mean points at 0.447 of the one and 0.894 of the others."""
    keys = torch.tensor([[[[1.0, 0.0], [7.0, 0.0], [0.0, 2.0]]]])
    scores = torch.tensor([[[6.0, 3.0, 1.0]]])
    away = [1 - 2 / 5**0.5, 1 - 2 / 5**0.5, 1 - 1 / 5**0.5]
    for share in (0.25, 1.0):
        both = zip([0.6, 0.3, 0.1], away, strict=True)
        wanted = [(1 - share) * score + share * each / sum(away) for score, each in both]
        assert mix_in_diversity(scores, keys, share)[0, 0].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("degenerate", ["no scores", "keys all alike", "zero keys", "opposite keys", "one key"])
def test_diversity_of_what_has_no_direction(heads, degenerate):
    keys = {
        "no scores": torch.randn(1, 2, 4, 3),
        "keys all alike": torch.ones(1, 2, 4, 3),
        "zero keys": torch.zeros(1, 2, 4, 3),
        "opposite keys": torch.tensor([1.0, -1, 2, -2])[None, None, :, None].expand(1, 2, 4, 3),
        "one key": torch.randn(1, 2, 1, 3),
    }[degenerate]
    n = keys.shape[2]
    scores = torch.zeros(1, heads, n) if degenerate == "no scores" else torch.rand(1, heads, n)
    found = mix_in_diversity(scores, keys, 0.5)
    assert found.shape == (1, heads, n) and found.isfinite().all()
    assert found.min() >= 0 and found.max() <= 1


def test_novelty_by_hand():
    """Of like values the best keeps its score; what is halfway keeps half; what is across or opposite keeps all."""
    values = torch.tensor([[[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [1.0, 3**0.5]]]])
    scores = torch.tensor([[[4.0, 5.0, 3.0, 2.0, 3.5]]])
    wanted = [0.0, 5.0, 3 * (1 - 0.75**0.5), 2.0, 1.75]
    assert discount_repetition(scores, values, 1.0)[0, 0].tolist() == pytest.approx(wanted, abs=1e-5)
    assert discount_repetition(scores, values, 2.0)[0, 0, 4].item() == pytest.approx(3.5 / 4)
    tied = discount_repetition(torch.ones(1, 1, 2), torch.ones(1, 1, 2, 4), 1.0)
    assert tied[0, 0].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)  # of equals, the lower column goes first


@some
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 24), paddings,
    st.builds(Ranking, heads=st.sampled_from(["mean", "max", "each"]), pooling=st.sampled_from([1, 3, 5]),
              value_norm=st.booleans(), diversity=st.sampled_from([0.0, 0.3, 1.0]),
              novelty=st.sampled_from([0.0, 0.5, 2.0])),
)  # fmt: skip
def test_rank_keys(seed, batch, heads, n, padding, ranking):
    """All steps in their order, row by row over real keys only."""
    source = random.Random(seed)
    padding = "left" if padding == "holes" else padding  # in a row with holes, neighbours are told by columns
    real = ragged(padding, batch, n, source)
    torch_source = torch.Generator().manual_seed(seed)
    importance = torch.rand(batch, heads, n, generator=torch_source)
    keys, values = (torch.randn(batch, heads, n, 8, generator=torch_source) for _ in range(2))
    if not ranking.by_head:
        importance = importance[:, :1]
    if real is not None:
        importance = importance * real[:, None]
    found = rank_keys(importance, keys, values, ranking, real)
    assert found.shape == (batch, heads if ranking.heads == "each" else 1, n) and found.dtype == torch.float32
    assert found.min() >= 0
    for row in range(batch):
        own = list(range(n)) if real is None else real[row].nonzero().flatten().tolist()
        scores = importance[row, :, own].tolist()
        if ranking.value_norm:
            scores = [rules.times_norm(scores[head], values[row, head, own].tolist()) for head in range(heads)]
        scores = [rules.pool(of_head, ranking.pooling) for of_head in scores]
        if ranking.heads != "each":
            join = max if ranking.heads == "max" else lambda each: sum(each) / len(each)
            scores = [[join(each) for each in zip(*scores, strict=True)]]
        if ranking.diversity:
            away = [rules.distances_from_mean(keys[row, head, own].tolist()) for head in range(heads)]
            if ranking.heads != "each":
                away = [[sum(each) / len(each) for each in zip(*away, strict=True)]]
            if min(map(sum, away)) < 1e-4:  # all alike: nothing but rounding
                continue
            scores = [rules.mix(a, b, ranking.diversity) for a, b in zip(scores, away, strict=True)]
        if ranking.novelty:
            together = values[row][:, own].transpose(0, 1).flatten(1)[None]
            of_keys = (values[row][:, own] if ranking.heads == "each" else together).tolist()
            gaps = [more - less for of_head in scores for less, more in itertools.pairwise(sorted(of_head))]
            # Rounding says which is the better; keys that pooling made equal are equal to the last digit.
            if any(gap < 1e-6 and (gap > 0 or ranking.diversity) for gap in gaps):
                continue
            scores = [rules.without_repetition(*each, ranking.novelty) for each in zip(scores, of_keys, strict=True)]
        torch.testing.assert_close(found[row][:, own], torch.tensor(scores), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("width", [11, 2**31 + 1, 2**63 - 1])
@pytest.mark.parametrize("real", [None, torch.tensor([[False, True, True, True, True, True]])])
def test_a_window_wider_than_the_prompt_is_the_prompt(width, real):
    scores = torch.tensor([[[9.0, 1.0, 5.0, 2.0, 0.0, 3.0]]])
    wanted = [9.0] * 6 if real is None else [0.0] + [5.0] * 5
    assert pool_neighbours(scores, width, real).tolist() == [[wanted]]


@pytest.mark.parametrize("option", [dict(heads="max"), dict(heads="each"), dict(pooling=3), dict(value_norm=True)])
def test_what_looks_at_single_heads(option):
    assert not Ranking().by_head and not Ranking(diversity=0.5, novelty=1.0, average="visible").by_head
    assert Ranking(**option).by_head


# Novelty of long prompts: blocks and sketches.


def test_novelty_compares_within_blocks_of_a_row_s_own_tokens():
    """Of 2100 like values, one in each 1024 of the row's real tokens keeps its score, wherever its padding ends."""
    n, padding = 2100, 37
    real = torch.ones(2, n, dtype=torch.bool)
    real[1, :padding] = False
    scores = (1 - torch.arange(n) / (2 * n)).expand(2, 1, n) * real[:, None]
    found = discount_repetition(scores, torch.ones(2, 1, n, 4), 1.0, real)
    assert (found[0, 0] > 1e-3).nonzero().flatten().tolist() == [0, 1024, 2048]
    assert (found[1, 0] > 1e-3).nonzero().flatten().tolist() == [37, 37 + 1024, 37 + 2048]


def test_novelty_of_a_row_without_a_token():
    """The first chunk of a padded batch may hold nothing of its shortest row; the others go on as they are."""
    source = torch.Generator().manual_seed(4)
    scores, values = torch.rand(2, 1, 9, generator=source), torch.randn(2, 2, 9, 4, generator=source)
    real = torch.tensor([[True], [False]]).expand(2, 9)
    found = discount_repetition(scores * real[:, None], values, 8.0, real)
    assert torch.equal(found[:1], discount_repetition(scores[:1], values[:1], 8.0))
    assert (found[0] < scores[0]).any() and not found[1].any()


@pytest.mark.parametrize("one_row_of_scores", [True, False])
def test_novelty_of_a_long_batch_is_that_of_its_rows(one_row_of_scores):
    """Padding anywhere, rows of several blocks: each row loses what it loses alone."""
    source, n = random.Random(3), 2300
    torch_source = torch.Generator().manual_seed(3)
    for kind in ("left", "right", "holes"):
        real = ragged(kind, 3, n, source)
        scores = torch.rand(3, 1 if one_row_of_scores else 2, n, generator=torch_source) * real[:, None]
        values = torch.randn(3, 2, n, 40, generator=torch_source).masked_fill(~real[:, None, :, None], math.nan)
        found = discount_repetition(scores, values, 8.0, real)
        for row, own in enumerate(real):
            alone = discount_repetition(scores[row : row + 1, :, own], values[row : row + 1, :, own], 8.0)
            torch.testing.assert_close(found[row : row + 1, :, own], alone, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 8.0])
def test_what_is_there_twice_ties(exponent):
    """The same value again is worth exactly nothing, so that the lower column stays and not what rounds best."""
    source = torch.Generator().manual_seed(5)
    values = torch.randn(1, 1, 40, 64, generator=source).repeat(1, 1, 30, 1)
    scores = 1.0 - torch.arange(1200.0)[None, None] / 2400
    found = discount_repetition(scores, values, exponent)
    assert (found[..., 40:1024] == 0).all() and (found[..., :40] > 0).all()


# Numbers that are too large, or none.

EVERY_STEP = dict(diversity=0.5, novelty=8.0, pooling=3, value_norm=True)


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_numbers_are_ranked_as_small_ones(dtype, heads):
    """Directions do not change with the length, though in half precision sums of the numbers themselves overflow."""
    source = torch.Generator().manual_seed(6)
    keys, values = (torch.randn(2, 8, 200, 128, generator=source).to(dtype) for _ in range(2))
    importance = torch.rand(2, 8 if heads == "each" else 1, 200, generator=source)
    ranking = Ranking(diversity=0.5, novelty=8.0, heads=heads)
    wanted = rank_keys(importance, keys, values, ranking)
    large = 2.0**13 if dtype == torch.float16 else 2.0**40
    found = rank_keys(importance, keys * large, values * large, ranking)
    assert found.isfinite().all()
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-4)
    aligned = torch.full((1, 8, 20, 128), torch.finfo(torch.float16).max).to(dtype)
    found = rank_keys(torch.rand(1, importance.shape[1], 20), aligned, aligned, Ranking(heads=heads, **EVERY_STEP))
    assert found.isfinite().all()


def test_values_are_compared_up_to_the_largest_numbers():
    values = torch.randn(1, 2, 50, 64, generator=torch.Generator().manual_seed(7))
    scores = torch.rand(1, 1, 50, generator=torch.Generator().manual_seed(8))
    wanted = discount_repetition(scores, values, 2.0)
    for scale in (2.0**110, 2.0**-90):
        torch.testing.assert_close(discount_repetition(scores, values * scale, 2.0), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("room", [1, 2**24])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("key", dict(diversity=0.5)),
        ("key", dict(diversity=0.3, novelty=0.5)),
        ("value", dict(novelty=8.0)),
        ("value", dict(novelty=0.5, value_norm=True)),
    ],
    ids=str,
)
def test_a_broken_key_spoils_no_other(monkeypatch, where, options, size, dtype, padded, room):
    """All others have the scores that they have where it is not there, and it has none."""
    monkeypatch.setattr(scoring, "_PIECE_BYTES", room)
    source = torch.Generator().manual_seed(9)
    pairs = [torch.randn(2, 2, 30, size, generator=source).to(dtype) for _ in range(2)]
    importance = torch.rand(2, 2, 30, generator=source)
    importance[0, :, 17] = 0.0 if where == "key" else 9.0  # what it received is part of the whole that diversity mixes
    real = torch.arange(30) >= torch.tensor([[4], [0]])
    others = torch.arange(30) != 17
    for bad, heads in itertools.product((math.nan, math.inf, -math.inf), ("mean", "each")):
        broken = [each.clone() for each in pairs]
        broken[where == "value"][0, :, 17, 3] = bad
        ranking = Ranking(heads=heads, **options)
        received = importance if ranking.by_head or heads == "each" else importance.mean(1, keepdim=True)
        received = received * real[:, None] if padded else received
        found = rank_keys(received, *broken, ranking, real if padded else None)
        for row, own in enumerate(real if padded else torch.ones_like(real)):
            there = own & others if row == 0 else own
            alone = [each[row : row + 1, :, there] for each in (received, *pairs)]
            wanted = rank_keys(*alone, ranking)[0]
            torch.testing.assert_close(found[row][:, there], wanted, atol=1e-6, rtol=1e-3)
        assert not found[0, :, 17].any()


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_with_every_step_a_broken_key_has_a_score(where, bad):
    pairs = [torch.randn(2, 2, 30, 64, generator=torch.Generator().manual_seed(11)) for _ in range(2)]
    pairs[where == "value"][0, 1, 17, 3] = bad
    for heads in ("mean", "max", "each"):
        found = rank_keys(torch.rand(2, 2, 30), *pairs, Ranking(heads=heads, **EVERY_STEP))
        assert found.isfinite().all() and found.min() >= 0 and found.count_nonzero() > 90 / 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_importance_spoils_no_other(bad):
    source = torch.Generator().manual_seed(10)
    keys, values = (torch.randn(2, 2, 30, 64, generator=source) for _ in range(2))
    importance = torch.rand(2, 2, 30, generator=source)
    importance[0, 0, 17] = bad
    for heads in ("mean", "max", "each"):
        found = rank_keys(importance, keys, values, Ranking(heads=heads, diversity=0.5, novelty=8.0))
        assert found[1].isfinite().all() and not found[0, 0, 17].isfinite()
        assert found[0, :, torch.arange(30) != 17].isfinite().all()
    pooled = pool_neighbours(torch.tensor([[[1.0, math.nan, 2.0, 5.0]]]), 3)
    assert pooled[0, 0, [0, 2, 3]].tolist() == [1.0, 5.0, 5.0] and pooled[0, 0, 1].isnan()
    # Where nothing is known, nothing is made up: calibration has to see that its sample is lost.
    lost = rank_keys(torch.full((1, 2, 30), math.nan), keys[:1], values[:1], Ranking(heads="mean", **EVERY_STEP))
    assert lost.isnan().all()


# A long layer is looked at in pieces.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [1, 700, 3000, 20000, 2**24])
def test_the_pieces_of_a_layer_do_not_matter(monkeypatch, room, dtype):
    """Rows, heads or tokens at a time: norms and distances are those of the whole, as torch's own functions say."""
    source = torch.Generator().manual_seed(room)
    keys = (torch.randn(3, 4, 50, 8, generator=source) + 0.5).to(dtype)
    real = torch.arange(50) >= torch.tensor([[0], [13], [49]])
    scores = torch.rand(3, 4, 50, generator=source) * real[:, None]
    monkeypatch.setattr(scoring, "_PIECE_BYTES", room)
    torch.testing.assert_close(scoring.vector_norms(keys), keys.float().norm(dim=-1))
    direction = F.normalize(keys.float(), dim=-1) * real[:, None, :, None]
    mean = direction.sum(2, keepdim=True) / real.sum(1)[:, None, None, None]
    away = (1 - F.cosine_similarity(direction, mean, dim=-1)).clamp_min(0) * real[:, None]
    away = away / away.sum(-1, keepdim=True).clamp_min(1e-30)
    wanted = 0.5 * scores / scores.sum(-1, keepdim=True) + 0.5 * away
    found = mix_in_diversity(scores, keys, 0.5, real)
    torch.testing.assert_close(found[:2], wanted[:2], atol=1e-6, rtol=1e-4)  # one key is all of its mean: rounding


def test_a_layer_is_ranked_in_less_than_its_own_memory():
    """What the default's ranking holds at its peak, over the keys and values of the layer."""
    keys, values = (torch.randn(1, 8, 2048, 64).bfloat16() for _ in range(2))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        rank_keys(torch.rand(1, 1, 2048), keys, values, Ranking(diversity=0.5, novelty=8.0))
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    assert max(held) < 2 * keys.nbytes


def test_novelty_of_wide_values_is_about_the_same():
    """Values of more than 32 numbers are compared by a sketch, the same one every time."""
    source = torch.Generator().manual_seed(1)
    directions = torch.randn(6, 256, generator=source)
    values = directions[torch.arange(60) % 6][None, None] * (1 + torch.arange(60))[:, None]
    scores = torch.rand(1, 1, 60, generator=source)
    found = discount_repetition(scores, values, 1.0)
    assert torch.equal(found, discount_repetition(scores, values, 1.0))
    best = [max(range(kind, 60, 6), key=lambda index: scores[0, 0, index]) for kind in range(6)]
    others = [index for index in range(60) if index not in best]
    assert found[0, 0, others].max() < 1e-3  # a repetition in another length is one
    assert (found[0, 0, best] > 0.3 * scores[0, 0, best]).all()  # what is across is not
