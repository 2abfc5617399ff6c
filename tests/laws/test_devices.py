"""Layers that lie in several places: spread by accelerate, and caches that are offloaded.

This machine has one device, so the second one is the disk (accelerate loads a layer's weights when its turn comes and
takes them away again), and the streams of cache offloading, which exist on GPUs only, are stood in for. What is shown
is that nothing is lost or mixed up on the way; that bytes move between real devices is not.
"""

import contextlib

import pytest
import torch

import models
from prefixkv_cache import PrefixKVCache, calibrate
from watch import CLOSE, Case, Watch, masked, run, talk


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


CASES = [
    Case("prefixkv:distance=5", turns=(8, 4)),
    Case("default:headroom=2", profile="head", turns=(8, 4)),
    Case("h2o", profile="head", turns=(8, 4)),
    Case("default", budget=1.0, turns=(8,)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_case
def test_a_model_over_two_places(case, tmp_path):
    watch = Watch(case.cache(), case.family)
    logits, _ = talk(spread(tmp_path), case, watch.cache, watch)
    assert (logits - run(case)[0]).abs().max() < CLOSE and watch.kept == run(case)[1].kept
    assert (logits - masked(case, watch)).abs().max() < CLOSE


def test_calibrating_a_model_over_two_places(tmp_path):
    sample = dict(models.batch("llava_gqa", (61,)))
    whole = calibrate(models.build("llava_gqa", "sdpa"), [sample], budgets=(0.3, 1.0), by="mass")
    assert torch.equal(calibrate(spread(tmp_path), [sample], budgets=(0.3, 1.0), by="mass").keep, whole.keep)


@each_case
def test_offloaded_layers(streams, case):
    assert torch.equal(talk(case.model, case, case.cache(offloading=True))[0], run(case)[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has streams")
def test_offloading_without_a_gpu_is_refused_at_once():
    with pytest.raises(ValueError, match="offloading=True needs streams, which a GPU has"):
        PrefixKVCache(budget=0.4, offloading=True)


def test_the_pairs_of_offloaded_layers_go_and_come_back(streams, monkeypatch):
    """Counts the moves: after each update of a layer it is sent away, and before its next turn it is fetched."""
    from prefixkv_cache.cache.layer import PrunedLayer

    moves = []
    monkeypatch.setattr(PrunedLayer, "offload", lambda layer: moves.append("away"))
    monkeypatch.setattr(PrunedLayer, "prefetch", lambda layer: moves.append("back"))
    model, inputs = models.shared("llava_gqa", "sdpa"), models.batch("llava_gqa", (61,))
    cache = PrefixKVCache(budget=0.4, method="prefixkv", offloading=True, config=model.config)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=3)
    assert moves.count("back") == 3 * 6 and moves[-1] == "away"
    assert moves.count("away") in (3 * 6, 3 * 6 + 6)  # again when the prompt has been pruned, if that brought them back
