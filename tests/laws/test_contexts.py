"""The laws of the cache, for compressed contexts that were copied, saved and loaded, and asked side by side."""

import functools
import threading

import pytest
import torch
from transformers import DynamicCache

import models
from models import EIGHT_HEADS, PADDED
from oracle import Given, Oracle, feed
from prefixkv_cache import PrefixKVCache
from watch import CLOSE, Watch, bytes_of_pairs

FAMILIES = ("llava_gqa", "qwen2_5_vl", "gemma3", EIGHT_HEADS)
WAYS = ("compressed", "copied", "deep", "loaded", "copy of loaded")
each_way = pytest.mark.parametrize("way", WAYS)
each_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def compressed(family, lengths=PADDED, budget=0.3, later=None):
    model, inputs = models.shared(family, "sdpa"), models.batch(family, lengths)
    return model, inputs, PrefixKVCache.compress(model, inputs, budget, later=later)


def by(way, cache, model, tmp_path):
    """A cache that goes on as this one does, come by in some way; this one stays as it is."""
    if way in ("compressed", "copied"):
        return cache.copy()
    if way == "deep":
        return cache.copy().copy()
    path = tmp_path / "context.safetensors"
    cache.save(path)
    loaded = PrefixKVCache.load(path, model, cache.context_ids)
    return loaded.copy() if way == "copy of loaded" else loaded


def turn(inputs, length=9, seed=7, ids=None):
    ids = inputs["input_ids"] if ids is None else ids
    return models.next_turn({"attention_mask": inputs["attention_mask"]}, ids, length, seed)


def ask(model, inputs, cache, watch=lambda: None, n=12, turns=2):
    """Logits of some turns behind the context."""
    found, ids = [], inputs["input_ids"]
    for number in range(turns):
        asked = turn(inputs, 9 + 4 * number, number, ids)
        logits, ids = feed(model, asked, models.words(len(ids), n, number), cache, watch)
        found.append(logits)
    return torch.cat(found, dim=1)


def read(model, inputs, cache):
    """The context alone, into an empty cache."""
    feed(model, inputs, models.words(len(inputs["input_ids"]), 1), cache)
    return cache


@each_way
@each_family
def test_with_all_kept_nothing_changes(family, way, tmp_path):
    model, inputs, cache = compressed(family, budget=1.0)
    full = read(model, inputs, DynamicCache(config=model.config))
    cache.restore_positions(model)
    assert (ask(model, inputs, by(way, cache, model, tmp_path)) - ask(model, inputs, full)).abs().max() < CLOSE


@each_way
@each_family
def test_pruning_equals_masking(family, way, tmp_path):
    model, inputs, cache = compressed(family)
    cache.restore_positions(model)
    watch = Watch(by(way, cache, model, tmp_path), family)
    watch()
    logits = ask(model, inputs, watch.cache, watch)
    oracle = Oracle(model, Given(watch.kept))
    read(oracle.model, inputs, oracle.cache)
    assert (logits - ask(oracle.model, inputs, oracle.cache)).abs().max() < CLOSE


@pytest.mark.parametrize("way", ["copied", "loaded"])
@pytest.mark.parametrize("family", ["llava_gqa", EIGHT_HEADS])
def test_counts_and_bytes_while_answering(family, way, tmp_path):
    headroom = 6
    model, inputs, cache = compressed(
        family, (61,), later=f"default:lengths=pool;floor=0;text_floor=0;headroom={headroom}"
    )
    cache = by(way, cache, model, tmp_path)
    watch = Watch(cache, family)
    ask(model, inputs, cache, watch, n=30)
    assert watch.nbytes == watch.taken
    for layer, context in enumerate(compressed(family, (61,))[2].stored_lengths(heads=True)):
        for seen, lengths in zip(watch.seen, watch.lengths_by_head, strict=True):
            for stored, own in zip(lengths[layer], context, strict=True):
                assert stored - seen * own / 61 < 1 + headroom
    assert watch.seen[-1] == 61 + 9 + 13 + 2 * 30 - 1
    assert cache.nbytes == bytes_of_pairs(cache, models.prunable_layers(models.weights(family)))


@pytest.mark.parametrize("way", ["copied", "loaded"])
def test_an_error_in_the_middle_harms_no_other_copy(way, tmp_path):
    model, inputs, cache = compressed("llava_mha", (61,))
    wanted, twin = ask(model, inputs, cache.copy()), by(way, cache, model, tmp_path)

    def fails(*arguments):
        raise ArithmeticError("no more")

    layers = model.get_decoder().layers
    for layer in (layers[0], layers[2], layers[-1]):
        handle = layer.mlp.register_forward_pre_hook(fails)
        with pytest.raises(ArithmeticError):
            ask(model, inputs, twin.copy())
        with pytest.raises(ArithmeticError):
            PrefixKVCache.compress(model, inputs, 0.3)
        handle.remove()
        assert torch.equal(ask(model, inputs, twin.copy()), wanted)
    assert torch.equal(ask(model, inputs, cache.copy()), wanted)
    assert not [module for module in model.modules() if module._forward_pre_hooks]


# Side by side.


def in_threads(work, n):
    """What `work(0)` to `work(n - 1)` return, all at once."""
    found, start = [None] * n, threading.Barrier(n)

    def run(index):
        start.wait()
        with torch.no_grad():
            found[index] = work(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def answered(model, inputs, cache, seed, n=10):
    """The ids of a turn and what the model says to it by itself, and the scores."""
    out = model.generate(
        **turn(inputs, 9 + seed, seed), past_key_values=cache, do_sample=False, max_new_tokens=n, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


@each_way
def test_ten_copies_answer_at_once(way, tmp_path):
    model, inputs, cache = compressed("llava_mha", (61,))
    own = by(way, cache, model, tmp_path)
    alone = [answered(model, inputs, own.copy(), seed) for seed in range(10)]
    together = in_threads(lambda seed: answered(model, inputs, own.copy(), seed), 10)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    last = answered(model, inputs, own, 9)  # what was copied went on as it was
    assert torch.equal(last[1], alone[9][1])


def test_one_file_is_loaded_by_ten_at_once(tmp_path):
    model, inputs, cache = compressed("llava_mha", (61,))
    path = tmp_path / "context.safetensors"
    cache.save(path)
    wanted = [answered(model, inputs, cache.copy(), seed) for seed in range(10)]
    found = in_threads(lambda seed: answered(model, inputs, PrefixKVCache.load(path, model), seed), 10)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(found, wanted, strict=True))


def test_contexts_are_compressed_at_once():
    model = models.shared("llava_mha", "sdpa")
    texts = [{"input_ids": models.words(1, 40 + 3 * index, index)} for index in range(6)]
    alone = [PrefixKVCache.compress(model, each, 0.3, chunk=16) for each in texts]
    together = in_threads(lambda index: PrefixKVCache.compress(model, texts[index], 0.3, chunk=16), 6)
    for one, other in zip(together, alone, strict=True):
        for layer in range(len(one.layers)):
            assert torch.equal(one.kept_positions(layer), other.kept_positions(layer))
            assert torch.equal(one.layers[layer].keys, other.layers[layer].keys)


@pytest.mark.parametrize("family", ["llava_mha", EIGHT_HEADS])
def test_questions_of_different_lengths_in_one_batch(family):
    """Padding stands between the context and the shorter questions. (A sliding window counts it, with any cache.)"""
    model, inputs, cache = compressed(family, (61,))
    turns = [turn(inputs, 5 + 3 * seed, seed)["input_ids"] for seed in range(5)]
    longest = max(each.shape[1] for each in turns)
    ids, mask = torch.zeros(2, 5, longest, dtype=torch.int64)
    ids[:, :61], mask[:, :61] = inputs["input_ids"], 1
    for row, each in enumerate(turns):
        ids[row, 61 + longest - each.shape[1] :], mask[row, 61 + longest - each.shape[1] :] = each[0, 61:], 1
    batch, answers = cache.copy(), models.words(5, 12)
    batch.batch_repeat_interleave(5)
    together, _ = feed(model, {"input_ids": ids, "attention_mask": mask}, answers, batch)
    for row, each in enumerate(turns):
        asked = {"input_ids": each, "attention_mask": torch.ones_like(each)}
        alone, _ = feed(model, asked, answers[row : row + 1], cache.copy())
        assert (together[row] - alone[0]).abs().max() < CLOSE


def test_beams_on_a_copy():
    model, inputs, cache = compressed("llava_gqa", (61,), budget=1.0)
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8}
    full = read(model, inputs, DynamicCache(config=model.config))
    full.batch_repeat_interleave(3)
    copied = cache.copy()
    copied.batch_repeat_interleave(3)
    asked = turn(inputs)
    found, wanted = (model.generate(**asked, past_key_values=each, **options) for each in (copied, full))
    assert torch.equal(found, wanted)
    assert cache.context_ids.shape == (1, 61)
