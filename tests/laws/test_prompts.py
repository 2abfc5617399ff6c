"""Prompts that are not one plain sequence: tiny ones, masks of the user's own, inference mode, another model's keys."""

import math

import pytest
import torch
from transformers import DynamicCache

import compat
import models
from oracle import feed
from prefixkv_cache import PrefixKVCache
from watch import Case, run

FAMILY = "llava_gqa"


def text(length, seed=0):
    return torch.randint(5, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def forward(model, ids, cache, **kwargs):
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits


@pytest.mark.parametrize("method", ["prefixkv", "default", "default:lengths=pool"])
@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_tiny_first_prompt_does_not_settle_the_lengths_for_ever(first, method):
    """Its least lengths are all of it; what follows is still kept by the budget."""
    model, cache = models.shared(FAMILY, "sdpa"), PrefixKVCache(budget=0.2, method=method)
    forward(model, text(first), cache)
    forward(model, text(200, seed=1), cache)
    assert all(stored <= 0.2 * (200 + first) + 3 for stored in cache.stored_lengths())


@pytest.mark.parametrize(("method", "headroom"), [("prefixkv", 0), ("default", 64)])
def test_decoding_after_one_token_keeps_to_the_budget(method, headroom):
    model, cache = models.shared(FAMILY, "sdpa"), PrefixKVCache(budget=0.2, method=method)
    for step in range(100):
        forward(model, text(1, seed=step), cache)
    assert max(cache.stored_lengths()) <= 0.2 * 100 + 1 + headroom < 100


def test_an_empty_prompt_is_an_error_and_does_no_harm():
    case = Case("prefixkv", profile="head", turns=(6,))
    cache = case.cache()
    with pytest.raises(Exception):  # noqa: B017  (the model itself refuses it, before the cache is asked)
        case.model(input_ids=torch.zeros(1, 0, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert torch.equal(feed(case.model, case.prompt(), models.words(3, 6), cache)[0], run(case)[0])


@pytest.mark.parametrize("method", ["prefixkv", "default:text_floor=0"])
@pytest.mark.parametrize("attn", compat.BACKENDS)
@pytest.mark.parametrize("lowest", [-1e4, -1e9, "lowest", -math.inf])
def test_padding_in_a_mask_of_the_users_own(attn, lowest, method):
    """Additive 4-D masks hide by many numbers; padding is padding under all of them."""
    model, n, padding = models.shared(FAMILY, attn), 50, 20
    lowest = torch.finfo(model.dtype).min if lowest == "lowest" else lowest
    visible = torch.ones(n, n).tril().bool() & (torch.arange(n) >= padding)
    visible |= torch.eye(n).bool() & (lowest == -math.inf)  # softmax over nothing but -inf is nan
    visible[:, :padding] &= torch.arange(n)[:, None] < padding
    mask = torch.zeros(n, n, dtype=model.dtype).masked_fill(~visible, lowest)[None, None]
    cache = PrefixKVCache(budget=0.3, method=method)
    positions = (torch.arange(n) - padding).clamp_min(0)[None]
    forward(model, text(n), cache, attention_mask=mask, position_ids=positions)
    if lowest == -math.inf:
        return  # there, a padding token sees itself, and is a token
    assert all(bool((cache.kept_positions(layer)[0] >= padding).all()) for layer in range(6))
    assert sum(cache.stored_lengths()) == round(0.3 * 6 * (n - padding))


def test_a_packed_mask_loses_nothing_at_budget_one():
    """Two texts side by side that do not see each other: the last query sees only one of them."""
    model, n = models.shared(FAMILY, "sdpa"), 40
    visible = torch.ones(n, n).tril().bool()
    visible[20:, :20] = False
    cache = PrefixKVCache(budget=1.0)
    forward(model, text(n), cache, attention_mask=visible[None, None])
    assert cache.stored_lengths() == [n] * 6


def test_one_mask_row_for_all_queries():
    model, n, ids = models.shared(FAMILY, "sdpa"), 30, text(30)
    mask = torch.ones(1, 1, 1, n, dtype=torch.bool)
    mask[..., 3] = False
    wanted = forward(model, ids, DynamicCache(), attention_mask=mask)
    torch.testing.assert_close(forward(model, ids, PrefixKVCache(budget=0.3), attention_mask=mask), wanted)


@pytest.mark.parametrize("profile", [None, "head"])
def test_what_inference_mode_made_is_read_and_continued_outside_of_it(profile):
    """Torch forbids writing to such tensors; `DynamicCache` has no need to."""
    case = Case("prefixkv", profile=profile)
    caches = [case.cache(), case.cache()]
    for cache, mode in zip(caches, (torch.inference_mode, torch.no_grad), strict=True):
        with mode():
            forward(case.model, text(40), cache)
            forward(case.model, text(1, seed=1), cache)
    for seed in (2, 3):
        torch.testing.assert_close(*(forward(case.model, text(1, seed=seed), cache) for cache in caches))
    for layer in range(6):
        assert torch.equal(*(cache.kept_positions(layer) for cache in caches))


@pytest.mark.parametrize("profile", [None, "head"])
def test_selecting_short_rows_gives_room_back(profile):
    cache = Case("prefixkv", profile=profile).cache(budget=0.5)
    ids = torch.cat([text(400), torch.cat([torch.zeros(1, 380, dtype=torch.long), text(20)], 1)])
    mask = torch.tensor([[1] * 400, [0] * 380 + [1] * 20])
    forward(models.shared(FAMILY, "sdpa"), ids, cache, attention_mask=mask)
    cache.batch_select_indices(torch.tensor([1]))
    pairs = [pairs for layer in cache.stored_lengths(heads=True) for pairs in layer]
    pair = 2 * 8 * 8  # a key and a value of 8 float64
    assert max(pairs) <= 20 and pair * sum(pairs) <= cache.nbytes <= pair * sum(each + 64 for each in pairs)


@pytest.mark.parametrize("profile", [None, "head"])
def test_spare_room_of_long_prompts(profile):
    """At most 12 % beyond what is stored, from the first token on."""
    case = Case("prefixkv:distance=none", profile=profile)
    cache, pair = case.cache(budget=0.9), 2 * 8 * 8
    forward(case.model, text(1500), cache)
    for step in range(3):
        pairs = sum(pairs for layer in cache.stored_lengths(heads=True) for pairs in layer)
        assert pair * pairs <= cache.nbytes <= 1.12 * pair * pairs
        forward(case.model, text(1, seed=step), cache)


@pytest.mark.parametrize("profile", ["layer", "head"])
def test_all_that_is_held_during_a_later_prompt_is_counted(profile):
    model, cache = models.build(FAMILY, "sdpa"), Case("prefixkv", profile=profile).cache(budget=0.5)
    forward(model, text(60), cache)
    before, counted = cache.nbytes, []
    attention = models.attention_modules(model)[0]
    handle = attention.o_proj.register_forward_pre_hook(lambda *_: counted.append(cache.nbytes))
    update = type(cache).update

    def watched(cache, *args, **kwargs):
        result = update(cache, *args, **kwargs)
        counted.append(cache.nbytes)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cache), "update", watched)
        forward(model, text(30, seed=1), cache)
    handle.remove()
    assert max(counted) > before + 30 * 2 * 2 * 8 * 8  # the buffers, and the prompt beside them


def test_a_model_of_another_depth_is_refused():
    deep, shallow = (models.shared(name, "sdpa") for name in ("llava_gqa", "llava_mha"))
    for model, of_another in ((deep, "llava_mha"), (shallow, "llava_gqa")):
        for profile in (None, "layer"):
            with pytest.raises(ValueError, match=r"config=model.config"):
                forward(model, text(40), Case("prefixkv", of_another, profile=profile).cache())


@pytest.mark.parametrize("profile", [None, "head"])
def test_another_models_keys_are_refused(profile):
    case = Case("prefixkv", "llava_mha", lengths=(61,), profile=profile)
    cache = case.cache()
    feed(case.model, case.prompt(), models.words(1, 3), cache)
    with pytest.raises(ValueError, match="another model"):
        forward(models.shared("llava_gqa", "sdpa"), text(3), cache)


@pytest.mark.parametrize("budget", [1, 7, 40, 10**6])
def test_a_budget_in_pairs_is_the_same_memory_for_every_prompt(budget):
    """A longer prompt keeps no more; a prompt that is shorter than the budget is kept whole."""
    model = models.shared(FAMILY, "sdpa")
    for n in (30, 90):
        for method in ("default", "prefixkv", "snapkv"):
            cache = PrefixKVCache(budget=budget, method=method)
            forward(model, text(n), cache)
            assert abs(sum(cache.stored_lengths()) / 6 - max(2, min(n, budget))) <= 0.5
