"""Compress once, ask many: kept is what reconstruction asks for, pruning equals masking, and copies go on alike."""

import copy
import functools
import gc
import itertools
import threading

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, GPT2Config, GPT2LMHeadModel

import compat
import models
import rules
from models import PADDED
from oracle import Given, Oracle, feed
from prefixkv_cache import PrefixKVCache
from watch import CLOSE, Watch, make_profile

FAMILIES = ("llava_gqa", "qwen2_5_vl", "gemma3", models.EIGHT_HEADS)
REQUEST = [11, 12, 13]
ORIGINAL = getattr(AttentionInterface, compat.LOOK_UP)


def inputs_of(family, lengths):
    return models.batch(family, lengths)


def text(length, seed=0):
    return {"input_ids": models.words(1, length, seed)}


def question(inputs, length=9, seed=7):
    ids = inputs["input_ids"]
    return models.next_turn({"attention_mask": inputs.get("attention_mask", torch.ones_like(ids))}, ids, length, seed)


def ask(model, inputs, cache, watch=lambda: None, n=12, seed=7):
    """Logits of a question behind the context and of an answer, by `generate`."""
    asked = question(inputs, seed=seed)
    return feed(model, asked, models.words(len(asked["input_ids"]), n, seed), cache, watch)[0]


@functools.cache
def compressed(family, lengths=PADDED, budget=0.3, **options):
    model, inputs = models.shared(family, "sdpa"), inputs_of(family, lengths)
    return model, inputs, PrefixKVCache.compress(model, inputs, budget, **options)


def positions(cache, row=0):
    """layer -> key head -> rising positions of a row."""
    found = []
    for layer in range(len(cache.layers)):
        heads = cache.kept_positions(layer)[row].view(-1, cache.kept_positions(layer).shape[-1]).tolist()
        found.append([sorted(each for each in head if each >= 0) for head in heads])
    return found


@pytest.mark.parametrize("chunk", [2048, 17])
@pytest.mark.parametrize("lengths", [(61,), PADDED], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_masking(family, lengths, chunk):
    model, inputs, cache = compressed(family, lengths, chunk=chunk)
    oracle = Oracle(model, Given([]))
    watch = Watch(cache.copy(), family)
    watch()
    logits = ask(model, inputs, watch.cache, watch)
    if family == "qwen2_5_vl":  # its position deltas are the model's, of the last prompt
        model = oracle.model
    oracle.kept.log = watch.kept
    feed(oracle.model, inputs, models.words(len(lengths), 1), oracle.cache)
    wanted = ask(oracle.model, inputs, oracle.cache)
    assert (logits - wanted).abs().max() < CLOSE


# What is kept.


def scores_of(model, inputs, chunk, request):
    """layer -> key head -> largest attention on each key of a context of words, by plain attention weights."""
    ids, full = inputs["input_ids"], Oracle(model)
    full.model(**inputs, past_key_values=full.cache)
    found = {layer: None for layer in full.prunable}
    for start in range(0, ids.shape[1], chunk):
        again = torch.cat([torch.tensor([request], dtype=torch.int64), ids[:, start : start + chunk]], dim=1)
        full.model(input_ids=again, past_key_values=copy.deepcopy(full.cache))
        for layer, before in found.items():
            largest = full.weights[layer][0, :, :, : ids.shape[1]].amax(1)
            n_heads = full.cache.layers[layer].keys.shape[1]
            largest = largest.view(n_heads, -1, ids.shape[1]).amax(1)
            found[layer] = largest if before is None else torch.maximum(before, largest)
    return found


@pytest.mark.parametrize("request_ids", [(), tuple(REQUEST)], ids=["bare", "request"])
@pytest.mark.parametrize("chunk", [100, 13])
@pytest.mark.parametrize("family", ["llava_mha", "llava_gqa"])
def test_the_largest_scores_of_all_stay(family, chunk, request_ids):
    model, inputs = models.shared(family, "sdpa"), text(40)
    told = []
    cache = PrefixKVCache.compress(
        model, inputs, 0.3, chunk=chunk, request=list(request_ids), progress=lambda *at: told.append(at)
    )
    scores = scores_of(model, inputs, chunk, request_ids)
    total = round(0.3 * 40 * sum(map(len, scores.values())))
    counts = rules.pool_of_all([each.tolist() for each in scores.values()], total, 2)
    for of_layer, wanted, kept in zip(scores.values(), counts, positions(cache), strict=True):
        kept = kept * (len(wanted) // len(kept))
        for head, count in enumerate(wanted):
            best = sorted(range(1, 39), key=lambda at: (-of_layer[head, at], at))[: count - 2]
            assert kept[head] == sorted([0, *best, 39])
    assert told[-1] == (40, 40) and len(told) == (1 if chunk == 100 else 4)


@pytest.mark.parametrize("attn", compat.BACKENDS)
def test_backends_agree(attn):
    model, inputs = models.build("llava_gqa", attn), text(40)
    wanted = PrefixKVCache.compress(models.shared("llava_gqa", "sdpa"), inputs, 0.3)
    assert positions(PrefixKVCache.compress(model, inputs, 0.3)) == positions(wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_members(family):
    _, _, cache = compressed(family, chunk=17)
    model = models.shared(family, "sdpa")
    layers = models.prunable_layers(models.weights(family))
    for row, length in enumerate(PADDED):
        alone = PrefixKVCache.compress(model, models.alone(family, PADDED, row), 0.3, chunk=17)
        padding = max(PADDED) - length
        together, single = positions(cache, row), positions(alone)
        for layer in layers:
            assert together[layer] == [[at + padding for at in head] for head in single[layer]]


def test_rows_of_a_model_with_learned_positions():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=models.VOCABULARY, n_positions=64)
    model = GPT2LMHeadModel(config).eval().double()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.25)
    ids = models.words(2, 40)
    ids[1, :9] = 0
    cache = PrefixKVCache.compress(model, {"input_ids": ids, "attention_mask": (ids > 0).long()}, 0.4, chunk=10)
    alone = PrefixKVCache.compress(model, {"input_ids": ids[1:, 9:]}, 0.4, chunk=10)
    for together, single in zip(positions(cache, 1), positions(alone), strict=True):
        assert together == [[at + 9 for at in head] for head in single]


def test_more_budget_never_keeps_less():
    found = [positions(PrefixKVCache.compress(models.shared("llava_mha"), text(60), b)) for b in (0.1, 12, 0.5, 0.8)]
    for less, more in itertools.pairwise(found):
        for left, right in zip(itertools.chain(*less), itertools.chain(*more), strict=True):
            assert set(left) <= set(right)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_of_all_changes_nothing(family):
    model, inputs = models.shared(family, "sdpa"), inputs_of(family, PADDED)
    cache = PrefixKVCache.compress(model, inputs, 1.0)
    logits = ask(model, inputs, cache)
    full = DynamicCache(config=model.config)
    feed(model, inputs, models.words(3, 1), full)
    assert (logits - ask(model, inputs, full)).abs().max() < CLOSE


def test_lengths_of_a_profile():
    model, inputs = models.shared("llava_mha"), text(60)
    profile = make_profile(4, 4, "default")
    cache = PrefixKVCache.compress(model, inputs, 0.4, profile=profile)
    plain = PrefixKVCache(profile, 0.4)
    feed(model, inputs, models.words(1, 1), plain)
    assert cache.stored_lengths(heads=True) == plain.stored_lengths(heads=True)
    assert cache.method == profile.method and positions(cache) != positions(plain)


def test_with_one_pass_it_is_the_method():
    model, inputs = models.shared("llava_mha"), inputs_of("llava_mha", (61,))
    cache = PrefixKVCache.compress(model, inputs, 0.4, method="snapkv:queries=8;recent=8")
    plain = PrefixKVCache.for_model(model, 0.4, method="snapkv:queries=8;recent=8", inputs=inputs)
    feed(model, inputs, models.words(1, 1), plain)
    assert positions(cache) == positions(plain)


def test_the_bytes_are_the_budget():
    _, _, cache = compressed("llava_mha", (61,))
    n, layers, heads = 61, 4, 4
    pairs = sum(map(sum, cache.stored_lengths(heads=True)))
    assert round(0.3 * n * layers * heads) - layers * heads < pairs <= round(0.3 * n * layers * heads)
    assert cache.nbytes == pairs * 2 * 8 * cache.layers[0].keys.shape[-1]
    assert cache.get_seq_length() == n


# What comes later.


def test_a_short_question_stays_whole_and_the_context_stays():
    model, inputs, cache = compressed("llava_mha", (61,))
    before, cache = positions(cache), cache.copy()
    asked = question(inputs, 30)
    for turn in range(3):
        _, ids = feed(model, asked, models.words(1, 40, turn), cache)
        if turn == 0:
            assert all(set(range(61, 91)) <= set(head) for layer in positions(cache) for head in layer)
        asked = question({"input_ids": ids}, 30)
    for layer, layer_before in zip(positions(cache), before, strict=True):
        for now, context in zip(layer, layer_before, strict=True):
            assert set(context) <= set(now)


@pytest.mark.parametrize("family", FAMILIES)
def test_copied_saved_and_loaded(family, tmp_path):
    model, inputs, cache = compressed(family, (61,))
    PrefixKVCache.compress(model, inputs, 0.3)  # for models that hold the position deltas of the last prompt
    wanted = ask(model, inputs, copy.deepcopy(cache))
    cache.save(tmp_path / "a.safetensors")
    loaded = PrefixKVCache.load(tmp_path / "a.safetensors", model, inputs["input_ids"])
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for each in (loaded, loaded.copy(), cache.copy()):
        assert torch.equal(ask(model, inputs, each), wanted)


def test_positions_after_another_picture(tmp_path):
    """A model with M-RoPE holds the positions of the last prompt that it read."""
    model = models.build("qwen2_5_vl", "sdpa")
    first, second = ({**models.batch("qwen2_5_vl", (length,))} for length in (61, 44))
    second["input_ids"] = second["input_ids"].masked_fill(second["input_ids"] == models.IMAGE, 50)
    second = {name: second[name] for name in ("input_ids", "attention_mask")}  # words: other deltas
    cache = PrefixKVCache.compress(model, first, 0.3)
    wanted = ask(model, first, cache.copy())
    cache.save(tmp_path / "a.safetensors")
    PrefixKVCache.compress(model, second, 0.3)
    assert not torch.equal(ask(model, first, cache.copy()), wanted)
    cache.restore_positions(model)
    assert torch.equal(ask(model, first, cache.copy()), wanted)
    fresh = models.build("qwen2_5_vl", "sdpa")
    assert torch.equal(ask(fresh, first, PrefixKVCache.load(tmp_path / "a.safetensors", fresh)), wanted)


def test_with_planned_steps():
    model, inputs, cache = compressed("llava_mha", (61,), max_new_tokens=16)
    _, _, plain = compressed("llava_mha", (61,))
    assert (ask(model, inputs, cache.copy()) - ask(model, inputs, plain.copy())).abs().max() < CLOSE


def test_ten_questions_side_by_side():
    model, inputs, cache = compressed("llava_mha", (61,))
    turns = [question(inputs, seed=seed)["input_ids"][:, 61:] for seed in range(10)]
    alone = [model(input_ids=turn, past_key_values=cache.copy()).logits for turn in turns]
    found = [None] * 10

    def work(index):
        with torch.no_grad():
            found[index] = model(input_ids=turns[index], past_key_values=cache.copy()).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    batch = cache.copy()
    batch.batch_repeat_interleave(10)
    together = model(input_ids=torch.cat(turns), past_key_values=batch).logits
    assert (together - torch.cat(alone)).abs().max() < CLOSE


def test_after_reset_it_is_a_cache_like_any_other():
    model, inputs, cache = compressed("llava_mha", (61,))
    cache = cache.copy()
    cache.reset()
    plain = PrefixKVCache(None, 0.3, method=cache.method, config=model.config)
    logits = [feed(model, inputs, models.words(1, 9), each)[0] for each in (cache, plain)]
    assert torch.equal(*logits)


# What cannot be.


def test_what_is_refused():
    model, inputs = models.shared("llava_mha"), text(40)
    compress = PrefixKVCache.compress
    with pytest.raises(TypeError, match="input_ids"):
        compress(model, inputs["input_ids"])
    for empty in (torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64), torch.ones(1, 4)):
        with pytest.raises(ValueError, match=r"int tensor \[batch, n\] of a context; got"):
            compress(model, {"input_ids": empty})
    with pytest.raises(ValueError, match="have a cache already"):
        compress(model, {**inputs, "past_key_values": PrefixKVCache()})
    with pytest.raises(TypeError, match="cannot generate"):
        compress(model.model, inputs)
    with pytest.raises(ValueError, match="chunk"):
        compress(model, inputs, chunk=0)
    with pytest.raises(ValueError, match="needs 16 positions behind them, but this model has 512"):
        compress(model, text(500))
    assert compress(model, text(500), method="default").get_seq_length() == 500
    assert compress(model, text(490)).get_seq_length() == 490  # in chunks of what room there is
    with pytest.raises(ValueError, match="another model"):
        ask(models.shared("llava_gqa"), inputs, compress(model, inputs))


def test_nothing_is_left_behind():
    model = models.build("llava_mha", "sdpa")
    cache = PrefixKVCache.compress(model, text(40), 0.3)
    hooks = [module for module in model.modules() if module._forward_pre_hooks]
    assert not hooks
    gc.collect()
    tensors = (each for each in gc.get_objects() if type(each) is torch.Tensor)
    assert not [each for each in tensors if each.ndim == 4 and each.shape[2] == 40 and each.is_floating_point()]
    del cache
    compressed.cache_clear()
    gc.collect()
    assert getattr(AttentionInterface, compat.LOOK_UP) is ORIGINAL
