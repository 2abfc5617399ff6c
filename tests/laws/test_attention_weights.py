"""`output_attentions=True` with lengths by key head: weights over each head's stored pairs, zeros behind them."""

import pytest
import torch

import compat
from oracle import Given, Oracle, feed
from watch import CLOSE, Case, Watch


@compat.needs_eager
@pytest.mark.parametrize("family", ["llava_mha", "llava_gqa", "qwen2_5_vl", "gemma3"])
def test_weights_are_those_of_the_masked_full_cache(family):
    case = Case("snapkv:queries=8;recent=8", family, attn="eager", profile="head", turns=(6,))
    cache = case.cache()
    output = case.model.generate(
        **case.prompt(), past_key_values=cache, max_new_tokens=6, do_sample=False, output_attentions=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    tokens = output.sequences[:, -6:]
    watch = Watch(case.cache(), family)
    feed(case.model, case.prompt(), tokens, watch.cache, watch)
    oracle = Oracle(case.model, Given(watch.kept))
    feed(oracle.model, case.prompt(), tokens, oracle.cache)
    by_head = cache.stored_lengths(heads=True)
    for layer in case.layers:
        found, wanted = output.attentions[-1][layer], oracle.weights[layer]
        stored, group = by_head[layer], found.shape[1] // len(by_head[layer])
        assert len(set(stored)) > 1 and found.shape[-1] == max(stored), "several lengths, or the test shows nothing"
        positions = cache.kept_positions(layer).repeat_interleave(group, dim=1)[:, :, None]
        assert (found[positions < 0] == 0).all()
        spread = torch.zeros_like(wanted).scatter_add_(3, positions.clamp_min(0), found.to(wanted.dtype))
        assert (spread - wanted).abs().max() < CLOSE
