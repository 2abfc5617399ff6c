"""Importance from the attention kernel's own log-sum-exp: against float64 weights, on a CPU and in Triton."""

import os
import subprocess
import sys

import pytest
import torch

from prefixkv_cache.rules.importance_flash import CaughtLogSumExp, _column_sums, believable, column_sums

SHAPES = [  # batch, query heads, key heads, queries, keys, head size
    (1, 2, 2, 70, 70, 16),
    (2, 6, 2, 33, 33, 8),
    (1, 4, 1, 20, 90, 24),
]


def scene(batch, heads, kv_heads, n_queries, n_keys, size, dtype=torch.float32):
    query = torch.randn(batch, heads, n_queries, size).to(dtype)
    key = torch.randn(batch, kv_heads, n_keys, size).to(dtype)
    visible = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    return query, key, visible


def wanted(query, key, visible, scaling, counts=None):
    """(sums [batch, kv_heads, n_keys], log-sum-exp) by plain float64 weights."""
    group = query.shape[1] // key.shape[1]
    scores = query.double() @ key.double().repeat_interleave(group, 1).mT * scaling
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    if counts is not None:
        weights = weights * counts[:, None, :, None]
    return weights.sum(2).unflatten(1, (-1, group)).sum(2), scores.logsumexp(-1).float()


def close(found, expected, rtol=1e-4):
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol / 10 * float(expected.mean()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "bool", "additive", "padded"])
def test_column_sums(shape, kind, compute=None):
    query, key, visible = scene(*shape)
    mask, counts = None, None
    if kind == "padded":
        counts = torch.arange(shape[3]) >= torch.arange(1, shape[0] + 1)[:, None] * 3
        valid = torch.cat([torch.ones(shape[0], shape[4] - shape[3], dtype=torch.bool), counts], 1)
        mask = visible & valid[:, None, None, :]
    elif kind != "causal":
        mask = visible[None, None]
    if kind == "additive":
        mask = torch.zeros(1, 1, *visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    shown = visible if kind != "padded" else mask
    expected, lse = wanted(query, key, shown, 0.3, counts)
    found = (compute or column_sums)(query, key, lse, mask=mask, counts=counts, scaling=0.3)
    close(found, expected)
    assert believable(found, shape[3], shape[1], counts)
    assert not believable(found * 1.1, shape[3], shape[1], counts)
    assert not believable(found.index_fill(2, torch.tensor([1]), torch.nan), shape[3], shape[1], counts)


def test_pieces_smaller_than_everything(monkeypatch):
    from prefixkv_cache.rules import importance_flash

    monkeypatch.setattr(importance_flash, "_PIECE", 1)
    monkeypatch.setattr(importance_flash, "_QUERIES", 7)
    query, key, visible = scene(1, 2, 1, 300, 700, 8)
    expected, lse = wanted(query, key, visible, 0.3)
    found = _column_sums(query, key, lse, None, 0.3)
    close(found, expected)


@pytest.mark.parametrize("kind", ["causal", "masked", "shared heads"])
def test_the_kernel_s_log_sum_exp_is_caught(kind):
    kv_heads = 2 if kind == "shared heads" else 4
    query, key, visible = scene(2, 4, kv_heads, 40, 40, 16)
    value, options = torch.randn_like(key), {"is_causal": True}
    if kind == "masked":
        options = {"attn_mask": visible[None, None]}
    elif kind == "shared heads":
        options["enable_gqa"] = True
    attention = torch.nn.functional.scaled_dot_product_attention
    with CaughtLogSumExp() as caught:
        output = attention(query, key, value, **options)
    assert torch.equal(output, attention(query, key, value, **options))
    torch.testing.assert_close(caught.found, wanted(query, key, visible, 16**-0.5)[1])


def test_half_precision():
    query, key, visible = scene(1, 2, 2, 200, 200, 32, torch.bfloat16)
    expected, lse = wanted(query, key, visible, 0.2)
    found = column_sums(query, key, lse, mask=None, counts=None, scaling=0.2)
    close(found, expected)


TRITON = """
import sys; sys.path.insert(0, {tests!r})
import torch
import test_importance_flash as here
from prefixkv_cache.rules.importance_triton import column_sums

def compute(query, key, lse, *, mask, counts, scaling):
    lse = lse.masked_fill(~lse.isfinite(), torch.inf)
    if counts is not None:
        lse = lse.masked_fill(~counts[:, None], torch.inf)
    return column_sums(query, key, lse, mask, scaling)

torch.manual_seed(0)
for shape in [*here.SHAPES, (1, 2, 1, 150, 200, 64)]:
    for kind in ("causal", "bool", "additive", "padded"):
        here.test_column_sums(shape, kind, compute)
# The interpreter multiplies bfloat16 as integers; benchmarks/gpu.py checks that on a GPU.
query, key, visible = here.scene(1, 2, 2, 130, 130, 64, torch.float16)
expected, lse = here.wanted(query, key, visible, 0.125)
here.close(column_sums(query, key, lse, None, 0.125), expected, 1e-3)
"""


def test_the_triton_kernel_interpreted():
    """In a process of its own: whether triton interprets is settled when the kernel is defined."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    code = TRITON.format(tests=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
