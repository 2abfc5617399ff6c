"""Importance against float64 weights: every kind of mask, padding and pick, heads in groups, sinks, softcap, memory."""

import itertools
import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from prefixkv_cache.rules.importance import attention_importance
from prefixkv_cache.rules.masks import readable

BATCH, HEADS, KV_HEADS, DIM, NEW = 2, 4, 2, 8, 12


def slow(query, key, visible, counts, scaling=DIM**-0.5, softcap=None, sink_logits=None):
    """[batch, kv_heads, n_keys] by whole matrices. visible: bool [batch, 1 or heads, queries, keys]; counts: bool
    [batch, queries], whose attention counts."""
    group = query.shape[1] // key.shape[1]
    scores = query.double() @ key.double().repeat_interleave(group, 1).mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sink_logits is not None:
        sinks = sink_logits.double()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]
    weights = weights * (counts[:, None] & visible.any(-1))[..., None]
    return weights.sum(2).unflatten(1, (-1, group)).mean(2)


def close(found, wanted, rtol=1e-5):
    """To so much of each value, and of what one query gives in all."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=rtol / 10 * wanted.shape[-1])


def tensors(n_queries, n_keys, spread=1.0, dtype=torch.float32):
    query = torch.randn(BATCH, HEADS, n_queries, DIM) * spread
    return query.to(dtype), (torch.randn(BATCH, KV_HEADS, n_keys, DIM) * spread).to(dtype)


def causal(n_queries, n_keys):
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries).expand(BATCH, 1, -1, -1)


EVERYBODY = torch.ones(BATCH, NEW, dtype=torch.bool)
PADDING = {
    "none": [[1] * NEW, [1] * NEW],
    "left": [[1] * NEW, [0] * 7 + [1] * 5],
    "right": [[1] * NEW, [1] * 5 + [0] * 7],
    "inside": [[1, 0, 1] * 4, [0, 0] + [1, 1, 0, 1, 1] * 2],
    "one row of padding alone": [[1] * NEW, [0] * NEW],
}
PICKS = {
    "all": None,
    "last": slice(NEW - 4, NEW),
    "from the end": slice(-3, None),
    "all, as a slice": slice(0, NEW),
    "by row": torch.tensor([[0, 3, 11], [-1, 8, 10]]),
    "for all rows": torch.tensor([[2, 5, 11]]),
    "nobody": torch.tensor([[-1], [-1]]),
}


def counting(picks):
    counts = torch.zeros(BATCH, NEW, dtype=torch.bool)
    if not isinstance(picks, torch.Tensor):
        counts[:, picks or slice(None)] = True
        return counts
    for of_row, columns in zip(counts, picks.expand(BATCH, -1), strict=True):
        of_row[columns[columns >= 0]] = True
    return counts


KINDS = ["none", "bool", "by head", "additive", "lowest", "2-D", "block"]


def mask_of(kind, visible, keys):
    additive = torch.zeros(visible.shape).masked_fill(~visible, -math.inf)
    if kind == "block":
        size = visible.shape[2:]
        block = create_block_mask(lambda b, h, q, k: visible[b, 0, q, k], BATCH, None, *size, device="cpu")
        return readable(block)
    return {
        "none": None,
        "bool": visible,
        "by head": visible,
        "additive": additive,
        "lowest": additive.clamp_min(torch.finfo(torch.float32).min),
        "2-D": keys.int(),
    }[kind]


@pytest.mark.parametrize(("kind", "padding"), [(k, p) for k in KINDS for p in PADDING if k != "none" or p == "none"])
@pytest.mark.parametrize("picks", PICKS)
def test_as_whole_matrices(kind, padding, picks):
    for earlier in (0, 5):
        query, key = tensors(NEW, NEW + earlier)
        valid = torch.tensor(PADDING[padding], dtype=torch.bool)
        keys = torch.cat([torch.ones(BATCH, earlier, dtype=torch.bool), valid], dim=1)
        visible = causal(NEW, NEW + earlier) & keys[:, None, None]
        if kind == "by head":
            visible = visible & (torch.rand(BATCH, HEADS, NEW, NEW + earlier) < 0.7)
        given = None if padding == "none" else valid
        found = attention_importance(query, key, mask_of(kind, visible, keys), picks=PICKS[picks], valid=given)
        close(found, slow(query, key, visible, counting(PICKS[picks]) & valid))


@pytest.mark.parametrize("picks", ["all", "by row"])
@pytest.mark.parametrize(
    "options", [{"scaling": 0.1}, {"softcap": 2.0}, {"sink_logits": torch.tensor([0.0, 3, -9, 1e4])}], ids=str
)
def test_what_models_do_to_their_scores(options, picks):
    query, key = tensors(NEW, NEW)
    wanted = slow(query, key, causal(NEW, NEW), counting(PICKS[picks]), **options)
    close(attention_importance(query, key, picks=PICKS[picks], **options), wanted)
    # With the kernel's own log-sum-exp, which knows nothing of them.
    plain = (query @ key.repeat_interleave(2, 1).mT * DIM**-0.5).masked_fill(~causal(NEW, NEW), -math.inf).logsumexp(-1)
    if "scaling" not in options:
        close(attention_importance(query, key, picks=PICKS[picks], log_sum_exp=plain, **options), wanted)


@pytest.mark.parametrize("factor", [1.0, 1.4427])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("picks", ["all", "all, as a slice", "last", "by row"])
def test_a_log_sum_exp_changes_nothing_right_or_wrong(factor, padded, picks):
    """One in another unit than expected is noticed."""
    query, key = tensors(NEW, NEW)
    valid = torch.tensor(PADDING["left"], dtype=torch.bool) if padded else EVERYBODY
    visible = causal(NEW, NEW) & valid[:, None, None]
    scores = (query @ key.repeat_interleave(2, 1).mT * DIM**-0.5).masked_fill(~visible, -math.inf)
    options = {"mask": visible, "valid": valid, "picks": PICKS[picks]} if padded else {"picks": PICKS[picks]}
    found = attention_importance(query, key, log_sum_exp=scores.logsumexp(-1) * factor, **options)
    torch.testing.assert_close(found, attention_importance(query, key, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_computed_in_float32(dtype):
    query, key = tensors(NEW, NEW, spread=3.0, dtype=dtype)
    close(attention_importance(query, key), slow(query, key, causal(NEW, NEW), EVERYBODY))


@pytest.mark.parametrize("max_bytes", [1, 2**10, 2**12, 2**14, 2**30])
@pytest.mark.parametrize("padded", [False, True])
def test_the_pieces_do_not_matter(max_bytes, padded):
    query, key = tensors(40, 40)
    valid = torch.arange(40) >= torch.tensor([[0], [13 if padded else 0]])
    visible = causal(40, 40) & valid[:, None, None]
    options = {"mask": visible, "valid": valid} if padded else {}
    close(attention_importance(query, key, max_bytes=max_bytes, **options), slow(query, key, visible, valid))


def test_very_peaked_attention():
    """Scores so far apart that most weights would be denormal numbers."""
    query, key = tensors(NEW, NEW, spread=12.0)
    close(attention_importance(query, key), slow(query, key, causal(NEW, NEW), EVERYBODY), rtol=1e-4)


def test_what_nobody_sees_is_exactly_nothing():
    query, key = tensors(NEW, NEW)
    visible = causal(NEW, NEW).clone()
    visible[..., 3] = False
    found = attention_importance(query, key, visible)
    assert (found[..., 3] == 0).all() and (found[..., 4:] > 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_overflow_in_one_row_spoils_no_other(bad):
    query, key = tensors(NEW, NEW)
    wanted = attention_importance(query[1:], key[1:])
    key[0, 1, 5, 2] = bad
    found = attention_importance(query, key)
    assert torch.equal(found[1:], wanted) and found[0, 0].isfinite().all() and not found[0, 1].isfinite().all()


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


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        *itertools.product([(1, 8, 2, 3000, 64), (6, 8, 8, 700, 64), (1, 4, 4, 6000, 128)], [None, 32]),
        ((1, 2, 1, 40000, 128), 32),
    ],
)
def test_temporaries_stay_under_the_ceiling(shape, window):
    batch, heads, kv_heads, n, dim = shape
    query, key = (torch.randn(batch, each, n, dim, dtype=torch.bfloat16) for each in (heads, kv_heads))
    ceiling = 4 * 2**20
    with Largest() as largest:
        attention_importance(query, key, picks=slice(n - window, n) if window else None, max_bytes=ceiling)
    assert 0 < largest.bytes <= ceiling


def test_rows_that_end_differently_cost_no_more():
    """The mask of each row is read at that row's own queries, piece by piece."""
    batch, n = 16, 512
    query, key = torch.randn(batch, 2, n, 8), torch.randn(batch, 2, n, 8)
    ends = torch.randint(n // 2, n, (batch, 1))
    mask = causal(n, n)[:1, 0] & (torch.arange(n) < ends)[:, None]
    with Largest() as largest:
        found = attention_importance(query, key, mask[:, None], picks=ends - 32 + torch.arange(32), max_bytes=2**20)
    assert largest.bytes <= 2**20
    for row, end in enumerate(ends.flatten().tolist()):
        alone = attention_importance(query[row, None, :, :end], key[row, None, :, :end], picks=slice(end - 32, end))
        torch.testing.assert_close(found[row, :, :end], alone[0], atol=1e-5, rtol=1e-5)
