"""What transformers' own tests of caches and of generation expect of a cache, held against ours at budget 1.

Written from what those tests assert: a generation can be continued from its cache, a prefix can be computed once and
reused for many prompts, and a cache behaves as a list of layers. What they assert of crops, reordering, repeats and
beams is among the laws (test_laws.py), and of the ways to generate in test_generation.py.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

import models
from prefixkv_cache import PrefixKVCache

FAMILIES = ["llava_gqa", "qwen2_5_vl", "gemma3"]


def caches(model):
    return DynamicCache(config=model.config), PrefixKVCache(budget=1.0, config=model.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_continues_from_its_cache(family):
    """Three tokens and then three more are the six of one call, with the same logits."""
    model, inputs = models.build(family, "sdpa"), models.batch(family, (61,))
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    whole = model.generate(**inputs, max_new_tokens=6, past_key_values=caches(model)[1], **options)
    first = model.generate(**inputs, max_new_tokens=3, past_key_values=caches(model)[1], **options)
    more = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    second = model.generate(**more, max_new_tokens=3, past_key_values=first.past_key_values, **options)
    assert torch.equal(whole.sequences, second.sequences)
    torch.testing.assert_close(
        torch.stack(whole.logits), torch.stack([*first.logits, *second.logits]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_computed_once_and_reused(family):
    """Copies of the cache of a common prefix serve prompts that go on differently."""
    model, inputs = models.build(family, "sdpa"), models.batch(family, (61,))
    answers = []
    for cache in caches(model):
        model(**inputs, past_key_values=cache, use_cache=True)
        for seed in (3, 4):
            longer = models.next_turn(inputs, inputs["input_ids"], 7, seed=seed)
            out = model.generate(**longer, past_key_values=copy.deepcopy(cache), max_new_tokens=5, do_sample=False)
            answers.append(out)
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
    assert not torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_a_list_of_layers(family):
    model, inputs = models.build(family, "sdpa"), models.batch(family, models.PADDED)
    full, ours = caches(model)
    for cache in (full, ours):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert len(ours.layers) == len(full.layers) and ours.get_seq_length() == full.get_seq_length()
    assert ours.is_sliding == full.is_sliding and ours.is_compileable is False
    assert ours.is_initialized == full.is_initialized
    for layer, other in zip(ours.layers, full.layers, strict=True):
        assert layer.keys.shape == other.keys.shape and layer.values.shape == other.values.shape
    ours.reset()
    assert ours.get_seq_length() == 0 and max(ours.stored_lengths()) == 0
