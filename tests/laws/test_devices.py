"""Layers that lie in several places: spread by accelerate, and caches that are offloaded.

This machine has one device, so the second one is the disk (accelerate loads a layer's weights when its turn comes and
takes them away again), and the streams of cache offloading, which exist on GPUs only, are stood in for. What is shown
is that nothing is lost or mixed up on the way; that bytes move between real devices is not.
"""

import contextlib

import pytest
import torch
from transformers import DynamicCache

import models
from oracle import Given, Oracle, feed
from prefixkv_cache import PrefixKVCache, calibrate


class Stream(contextlib.nullcontext):
    """Does nothing, in order: what a stream does on one device."""

    def wait_stream(self, other):
        pass


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())


def spread(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = models.build("llava_gqa", "sdpa")
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    places |= {"model.language_model.embed_tokens": "cpu", "model.language_model.norm": "cpu"}
    places["model.language_model.rotary_emb"] = "cpu"
    for layer in range(6):
        places[f"model.language_model.layers.{layer}"] = "disk" if layer % 2 else "cpu"
    return accelerate.dispatch_model(model, device_map=places, main_device="cpu", offload_dir=str(tmp_path))


def test_a_model_over_two_places(tmp_path):
    whole, parted = models.build("llava_gqa", "sdpa"), spread(tmp_path)
    inputs, tokens = models.batch("llava_gqa", models.PADDED), models.words(3, 8)
    results = []
    for model in (whole, parted):
        cache = PrefixKVCache(budget=0.4, distance=5, slack=0)
        logits, _ = feed(model, inputs, tokens, cache)
        results.append((logits, [cache.kept_positions(layer) for layer in range(6)]))
    (logits, kept), (parted_logits, parted_kept) = results
    torch.testing.assert_close(parted_logits, logits, atol=1e-5, rtol=0)
    assert all(torch.equal(one, other) for one, other in zip(kept, parted_kept, strict=True))


def test_calibrating_a_model_over_two_places(tmp_path):
    sample = dict(models.batch("llava_gqa", (61,)))
    whole = calibrate(models.build("llava_gqa", "sdpa"), [sample], budgets=(0.3, 1.0))
    assert torch.equal(calibrate(spread(tmp_path), [sample], budgets=(0.3, 1.0)).keep, whole.keep)


@pytest.mark.parametrize("budget", [1.0, 0.4])
def test_offloaded_layers(streams, budget):
    model, inputs, tokens = (
        models.build("llava_gqa", "sdpa"),
        models.batch("llava_gqa", models.PADDED),
        models.words(3, 8),
    )
    logits, _ = feed(model, inputs, tokens, PrefixKVCache(budget=budget, slack=0, offloading=True, config=model.config))
    wanted, _ = feed(model, inputs, tokens, PrefixKVCache(budget=budget, slack=0))
    assert torch.equal(logits, wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has streams")
def test_offloading_without_a_gpu_is_refused_at_once():
    with pytest.raises(ValueError, match="offloading=True needs streams, which a GPU has"):
        PrefixKVCache(budget=0.4, offloading=True)


def test_the_pairs_of_offloaded_layers_go_and_come_back(streams, monkeypatch):
    """Counts the moves: after each update of a layer it is sent away, and before its next turn it is fetched."""
    from prefixkv_cache.cache.layer import PrunedLayer

    moves = []
    monkeypatch.setattr(PrunedLayer, "_move", lambda layer, device: moves.append(device.type))
    monkeypatch.setattr(PrunedLayer, "offload", lambda layer: moves.append("away"))
    monkeypatch.setattr(PrunedLayer, "prefetch", lambda layer: moves.append("back"))
    model, inputs = models.build("llava_gqa", "sdpa"), models.batch("llava_gqa", (61,))
    cache = PrefixKVCache(budget=0.4, slack=0, offloading=True, config=model.config)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=3)
    assert moves.count("back") == 3 * 6
    assert moves.count("away") == 3 * 6 + 6  # and once more when the prompt has been pruned


def test_law_2_holds_over_two_places(tmp_path):
    parted = spread(tmp_path)
    inputs, tokens = models.batch("llava_gqa", (61,)), models.words(1, 8)
    cache, log = PrefixKVCache(budget=0.4, distance=5, slack=0), []

    def watch():
        log.append({layer: cache.kept_positions(layer).tolist() for layer in range(6)})

    logits, _ = feed(parted, inputs, tokens, cache, watch=watch)
    oracle = Oracle(models.build("llava_gqa", "sdpa"), Given(log))
    wanted, _ = feed(oracle.model, inputs, tokens, oracle.cache)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    full, _ = feed(parted, inputs, tokens, DynamicCache())
    assert not torch.allclose(logits, full, atol=1e-2)  # pruning did something
