"""Importance against plain loops: every kind of mask and window, heads in groups, sinks, softcap, and its memory."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from prefixkv_cache.importance import attention_importance
from prefixkv_cache.masks import readable

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 8


def slow(query, key, visible, counts, scaling=None, softcap=None, sink_logits=None):
    """One row, one head, one query at a time. visible: bool [batch, queries, keys]; counts: bool [batch, queries]."""
    n_keys, group = key.shape[2], query.shape[1] // key.shape[1]
    result = torch.zeros(query.shape[0], n_keys, dtype=torch.float64)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            for at in range(query.shape[2]):
                if not counts[row, at] or not visible[row, at].any():
                    continue
                scores = key[row, head // group].double() @ query[row, head, at].double()
                scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores[~visible[row, at]] = -math.inf
                if sink_logits is None:
                    result[row] += scores.softmax(0)
                else:
                    result[row] += torch.cat([scores, sink_logits[head : head + 1].double()]).softmax(0)[:-1]
    return (result / query.shape[1]).float()


def tensors(n_queries, n_keys, spread=1.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, HEADS, n_queries, DIM, generator=random) * spread
    return query, torch.randn(BATCH, KV_HEADS, n_keys, DIM, generator=random) * spread


def causal(n_queries, n_keys):
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries).expand(BATCH, -1, -1)


PADDING = {
    "none": [[1] * 12, [1] * 12],
    "left": [[1] * 12, [0] * 7 + [1] * 5],
    "right": [[1] * 12, [1] * 5 + [0] * 7],
    "one row of padding alone": [[1] * 12, [0] * 12],
}


@pytest.mark.parametrize("kind", ["none", "bool", "float", "lowest float", "2-D", "block"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("queries", ["all", 1, 4, 7, 99])
@pytest.mark.parametrize("earlier", [0, 5])
def test_as_plain_loops(kind, padding, queries, earlier):
    if kind == "none" and padding != "none":
        pytest.skip("no mask, no padding")
    n_queries = 12
    query, key = tensors(n_queries, n_queries + earlier)
    real = torch.tensor(PADDING[padding], dtype=torch.bool)
    keys = torch.cat([torch.ones(BATCH, earlier, dtype=torch.bool), real], dim=1)
    visible = causal(n_queries, n_queries + earlier) & keys[:, None]
    additive = torch.zeros(visible.shape).masked_fill(~visible, -math.inf)[:, None]
    mask = {
        "none": None,
        "bool": visible[:, None],
        "float": additive,
        "lowest float": additive.clamp_min(torch.finfo(torch.float32).min),
        "2-D": keys.int(),
        "block": readable(
            create_block_mask(lambda b, h, q, k: visible[b, q, k], BATCH, None, *visible.shape[1:], device="cpu")
        ),
    }[kind]
    counts = torch.zeros(BATCH, n_queries, dtype=torch.bool)
    for row in range(BATCH):
        columns = real[row].nonzero().flatten().tolist()
        counts[row, columns if queries == "all" else columns[-queries:]] = True
    given = None if padding == "none" else real
    found = attention_importance(query, key, mask, queries=queries, real=given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, slow(query, key, visible, counts), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"scaling": 0.1}, {"softcap": 2.0}, {"sink_logits": torch.tensor([0.0, 3, -9, 1])}]
)
def test_what_models_do_to_their_scores(options):
    query, key = tensors(12, 12)
    wanted = slow(query, key, causal(12, 12), torch.ones(BATCH, 12, dtype=torch.bool), **options)
    torch.testing.assert_close(attention_importance(query, key, **options), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("max_bytes", [1, 2**10, 2**12, 2**14, 2**30])
def test_the_pieces_do_not_matter(max_bytes):
    query, key = tensors(40, 40)
    whole = attention_importance(query, key)
    torch.testing.assert_close(attention_importance(query, key, max_bytes=max_bytes), whole, atol=1e-5, rtol=1e-5)


def test_very_peaked_attention():
    """Scores so far apart that most weights would be denormal numbers."""
    query, key = tensors(30, 30, spread=12.0)
    wanted = slow(query, key, causal(30, 30), torch.ones(BATCH, 30, dtype=torch.bool))
    found = attention_importance(query, key)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_what_nobody_sees_is_exactly_nothing():
    query, key = tensors(12, 12)
    visible = causal(12, 12).clone()
    visible[:, :, 3] = False
    visible[:, 3, 3] = False
    found = attention_importance(query, key, visible[:, None])
    assert (found[:, 3] == 0).all() and (found[:, 4:] > 0).all()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            # A view of what was there already is not made.
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("queries", ["all", 32])
@pytest.mark.parametrize(
    "shape", [(1, 8, 2, 3000, 64), (6, 8, 8, 700, 64), (1, 4, 4, 6000, 128), (1, 2, 1, 40000, 128)]
)
def test_temporaries_stay_under_the_ceiling(shape, queries):
    batch, heads, kv_heads, n, dim = shape
    query = torch.randn(batch, heads, n, dim, dtype=torch.bfloat16)
    key = torch.randn(batch, kv_heads, n, dim, dtype=torch.bfloat16)
    if n > 30000 and queries == "all":
        pytest.skip("takes minutes")
    ceiling = 4 * 2**20
    with Largest() as largest:
        attention_importance(query, key, queries=queries, max_bytes=ceiling)
    assert 0 < largest.bytes <= ceiling


def test_rows_that_end_differently_cost_no_more():
    """The mask of each row is read at that row's own queries, piece by piece."""
    batch, n = 16, 512
    query = torch.randn(batch, 2, n, 8)
    key = torch.randn(batch, 2, n, 8)
    real = torch.arange(n) < torch.randint(n // 2, n, (batch, 1))
    mask = causal(n, n)[:1] & real[:, None]
    with Largest() as largest:
        found = attention_importance(query, key, mask[:, None], queries=32, real=real, max_bytes=2**20)
    assert largest.bytes <= 2**20
    alone = [
        attention_importance(query[row : row + 1, :, :end], key[row : row + 1, :, :end], queries=32)[0]
        for row, end in enumerate(real.sum(1).tolist())
    ]
    for row, of_row in enumerate(alone):
        torch.testing.assert_close(found[row, : len(of_row)], of_row, atol=1e-5, rtol=1e-5)
