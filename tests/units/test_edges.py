"""What a review found that the laws did not: short prompts, masks of the user's own, interrupted and foreign models."""

import pytest
import torch
from transformers import DynamicCache

import compat
import models
from oracle import feed
from prefixkv_cache import PrefixKVCache

FAMILY = "llava_gqa"


def text(length, seed=0):
    return torch.randint(5, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def forward(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits


@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_tiny_first_prompt_does_not_settle_the_lengths_for_ever(first):
    """Its least lengths are all of it; what follows is still kept by the budget."""
    model, cache = models.build(FAMILY, "sdpa"), PrefixKVCache(budget=0.2)
    forward(model, text(first), cache)
    forward(model, text(200, seed=1), cache)
    assert all(stored <= 0.2 * (200 + first) + 3 for stored in cache.stored_lengths())


def test_decoding_after_one_token_keeps_to_the_budget():
    model = models.build(FAMILY, "sdpa")
    for slack in (0, 64):
        cache = PrefixKVCache(budget=0.2, slack=slack)
        for step in range(100):
            forward(model, text(1, seed=step), cache)
        assert max(cache.stored_lengths()) <= 0.2 * 100 + 1 + slack < 100


@pytest.mark.parametrize("attn", compat.BACKENDS)
@pytest.mark.parametrize("lowest", [-1e4, -1e9, "lowest", "-inf"])
def test_padding_in_a_mask_of_the_user_s_own(attn, lowest):
    """Additive 4-D masks hide by many numbers; padding is padding under all of them."""
    lowest = {"lowest": torch.finfo(torch.float32).min, "-inf": -float("inf")}.get(lowest, lowest)
    model, n, padding = models.build(FAMILY, attn), 50, 20
    visible = torch.ones(n, n).tril().bool() & (torch.arange(n) >= padding)
    visible |= torch.eye(n).bool() & (lowest == -float("inf"))  # softmax over nothing but -inf is nan
    visible[:, :padding] &= torch.arange(n)[:, None] < padding
    mask = torch.zeros(n, n).masked_fill(~visible, lowest)[None, None]
    cache = PrefixKVCache(budget=0.3)
    positions = (torch.arange(n) - padding).clamp_min(0)[None]
    forward(model, text(n), cache, attention_mask=mask, position_ids=positions)
    kept = [cache.kept_positions(layer)[0] for layer in range(6)]
    if lowest == -float("inf"):
        return  # there, a padding token sees itself, and is a token
    assert all(bool((positions >= padding).all()) for positions in kept)
    assert sum(cache.stored_lengths()) == round(0.3 * 6 * (n - padding))


def test_a_packed_mask_loses_nothing_at_budget_one():
    """Two texts side by side that do not see each other: the last query sees only one of them."""
    model, n = models.build(FAMILY, "sdpa"), 40
    visible = torch.ones(n, n).tril().bool()
    visible[20:, :20] = False
    cache = PrefixKVCache(budget=1.0)
    forward(model, text(n), cache, attention_mask=visible[None, None])
    assert cache.stored_lengths() == [n] * 6


def test_one_mask_row_for_all_queries():
    model, n, ids = models.build(FAMILY, "sdpa"), 30, text(30)
    mask = torch.ones(1, 1, 1, n, dtype=torch.bool)
    mask[..., 3] = False
    wanted = forward(model, ids, DynamicCache(), attention_mask=mask)
    torch.testing.assert_close(forward(model, ids, PrefixKVCache(budget=0.3), attention_mask=mask), wanted)


def test_selecting_short_rows_gives_room_back():
    model, cache = models.build(FAMILY, "sdpa"), PrefixKVCache(budget=0.5)
    lengths = (400, 20)
    ids = torch.cat([text(400), torch.cat([torch.zeros(1, 380, dtype=torch.long), text(20)], 1)])
    mask = torch.tensor([[1] * 400, [0] * 380 + [1] * 20])
    forward(model, ids, cache, attention_mask=mask)
    cache.batch_select_indices(torch.tensor([1]))
    pair = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, float32
    spare = [cache.layers[at].nbytes / pair - stored for at, stored in enumerate(cache.stored_lengths())]
    assert max(cache.stored_lengths()) <= lengths[1]
    assert all(0 <= each <= 64 for each in spare)


def test_spare_room_of_long_prompts():
    model, cache = models.build(FAMILY, "sdpa"), PrefixKVCache(budget=0.9, distance=None)
    forward(model, text(1500), cache)
    for step in range(3):
        pair = 2 * 2 * 8 * 4
        for at, stored in enumerate(cache.stored_lengths()):
            assert stored <= cache.layers[at].nbytes / pair <= 1.12 * stored
        forward(model, text(1, seed=step), cache)


def test_all_that_is_held_during_a_later_prompt_is_counted():
    model, cache, counted = models.build(FAMILY, "sdpa"), PrefixKVCache(budget=0.5), []
    forward(model, text(60), cache)
    before = cache.layers[0].nbytes
    attention = models.attention_modules(model)[0]
    handle = attention.o_proj.register_forward_pre_hook(lambda *_: counted.append(cache.layers[0].nbytes))
    update = type(cache.layers[0]).update
    held = []

    def watched(layer, *args, **kwargs):
        result = update(layer, *args, **kwargs)
        held.append(layer.nbytes)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cache.layers[0]), "update", watched)
        forward(model, text(30, seed=1), cache)
    handle.remove()
    assert held[0] > before + 30 * 2 * 2 * 8 * 4  # the buffers, and the prompt beside them


@pytest.mark.parametrize("source", ["profile", "search"])
def test_a_config_of_another_depth(source):
    from test_laws import profile

    deep, shallow = models.build("llava_gqa", "sdpa"), models.build("llava_mha", "sdpa")
    for model, config, layers in ((deep, shallow.config, 4), (shallow, deep.config, 6)):
        cache = PrefixKVCache(profile(layers) if source == "profile" else None, 0.5, config=config)
        with pytest.raises(ValueError, match=r"config=model.config"):
            forward(model, text(40), cache)


def test_an_interrupted_prompt_is_not_gone_on_with():
    from test_laws import profile

    model, cache = models.build(FAMILY, "sdpa"), PrefixKVCache(profile(6), 0.5)

    def stop(*_):
        raise KeyboardInterrupt

    handle = models.attention_modules(model)[3].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        forward(model, text(40), cache)
    handle.remove()
    with pytest.raises(RuntimeError, match="reset"):
        forward(model, text(1), cache)
    cache.reset()
    logits = forward(model, text(40), cache)
    torch.testing.assert_close(logits, forward(model, text(40), PrefixKVCache(profile(6), 0.5)))


def test_another_model_s_keys_are_refused():
    cache, inputs = PrefixKVCache(budget=0.5), models.batch("llava_mha", (61,))
    feed(models.build("llava_mha", "sdpa"), inputs, models.words(1, 3), cache)
    with pytest.raises(ValueError, match="another model"):
        forward(models.build("llava_gqa", "sdpa"), text(3), cache)


def test_what_inference_mode_made_is_read_and_continued_outside_of_it():
    """Torch forbids writing to such tensors; `DynamicCache` has no need to."""
    model = models.build(FAMILY, "sdpa")
    caches = [PrefixKVCache(budget=0.5), PrefixKVCache(budget=0.5)]
    for cache, mode in zip(caches, (torch.inference_mode, torch.no_grad), strict=True):
        with mode():
            forward(model, text(40), cache)
            forward(model, text(1, seed=1), cache)
    for layer in range(6):
        assert caches[0].kept_positions(layer).tolist() == caches[1].kept_positions(layer).tolist()
    for seed in (2, 3):
        torch.testing.assert_close(*(forward(model, text(1, seed=seed), cache) for cache in caches))
    for layer in range(6):
        assert caches[0].kept_positions(layer).tolist() == caches[1].kept_positions(layer).tolist()
