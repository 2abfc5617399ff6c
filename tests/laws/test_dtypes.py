"""Float32, bfloat16 and float16: what is about dtypes. All other laws are held in float64.

Tolerances are multiples of the dtype's own precision and of the size of the logits, never a bare number.
"""

import sys

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import compat
import models
from models import FAMILIES, PADDED
from oracle import Given, Oracle, feed
from watch import Case, Watch, greedy

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
CASES = [
    Case(method, family, attn, profile=profile, turns=(12,))
    for family in FAMILIES
    for method, attn, profile in [
        ("prefixkv:distance=5", "eager", "layer"), ("default:headroom=6", "sdpa", "head"), ("h2o", "sdpa", None),
        ("elastic", "sdpa", "layer"),
    ]
]  # fmt: skip


def typed(inputs, dtype):
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}


def close(actual, wanted, dtype, times=1.0):
    """Within so many roundings of the logits' size; on average, since single ones add up over layers and tokens."""
    return (actual - wanted).double().abs().mean() < times * 16 * torch.finfo(dtype).eps * wanted.double().std()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruning_equals_masking(case, dtype):
    """Law 2; keys, values and logits have the model's dtype."""
    model, inputs, tokens = (
        models.build(case.family, case.attn, dtype),
        typed(case.prompt(), dtype),
        models.words(3, 12),
    )
    watch = Watch(case.cache(), case.family)
    logits, _ = feed(model, inputs, tokens, watch.cache, watch)
    assert logits.dtype == dtype and logits.isfinite().all()
    assert all(watch.cache.layers[layer].keys.dtype == dtype for layer in case.layers)
    if case.method == "elastic":
        return  # merged pairs are other pairs
    oracle = Oracle(models.build(case.family, dtype=dtype), Given(watch.kept))
    assert close(logits, feed(oracle.model, inputs, tokens, oracle.cache)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attn", compat.BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_pruned_nothing_changed(family, attn, dtype):
    """Law 1. The same kernels see the same numbers: to the bit."""
    case, model = Case("default", family), models.build(family, attn, dtype)
    inputs = typed(case.prompt(), dtype)
    wanted_ids, wanted = greedy(model, inputs, DynamicCache(config=model.config), new=6)
    ids, logits = greedy(model, inputs, case.cache(budget=1.0), new=6)
    assert torch.equal(ids, wanted_ids)
    assert close(logits, wanted, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_keeps_what_float32_importance_says(family, dtype):
    """Attention weights in float32 from the keys and queries that the model really made."""
    case, weights = Case("prefixkv:queries=32", family, profile="layer", turns=(1,)), {}

    def recording(module, query, key, value, attention_mask, scaling=None, **options):
        if hasattr(module, "layer_idx") and attention_mask is not None and query.shape[2] > 1:
            groups = query.shape[1] // key.shape[1]
            scores = query.float() @ key.repeat_interleave(groups, dim=1).float().transpose(2, 3) * scaling
            weights[module.layer_idx] = torch.softmax(scores + attention_mask.float(), dim=-1)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, attention_mask, scaling=scaling, **options)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", transformers.masking_utils.eager_mask)
    inputs, cache = typed(case.prompt(), dtype), DynamicCache(config=models.weights(family).config)
    watch = Watch(case.cache(), family)
    try:
        model = models.build(family, "recording", dtype)
        feed(model, inputs, models.words(3, 1), watch.cache, watch)
        feed(model, inputs, models.words(3, 1), cache)
    finally:
        AttentionInterface._global_mapping.pop("recording")
        AttentionMaskInterface._global_mapping.pop("recording")
    rule = case.rule()
    rule.after(Oracle.valid(inputs, 3, max(PADDED)), max(PADDED), {at: weights[at] for at in case.layers}, cache)
    assert watch.kept == rule.log
