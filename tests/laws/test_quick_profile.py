"""`for_model(calibrate_with=inputs)`: a profile by key head from one prompt, kept for the next time."""

import os
import threading

import pytest
import torch

import models
from prefixkv_cache import PrefixKVCache, methods
from prefixkv_cache.cache.quick_profile import profile_path
from watch import greedy


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIXKV_HOME", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_it_is_made_once_said_once_and_used_from_then_on(family, home):
    model, inputs = models.build(family), models.batch(family, (61, 44))
    with pytest.warns(UserWarning, match="from one prompt; kept in") as said:
        cache = PrefixKVCache.for_model(model, 0.3, calibrate_with=inputs)
    assert len(said) == 1 and profile_path(model).parent == home and profile_path(model).is_file()
    profile = cache.profile
    text = model.config.get_text_config()
    assert (profile.n_layers, profile.n_heads) == (len(models.prunable_layers(model)), text.num_key_value_heads)
    assert profile.method == methods.DEFAULT == cache.method and profile.measured is None
    assert profile.keep_ratios(0.3).flatten().unique().numel() > 1, "lengths of its own for each head"
    content = profile_path(model).read_bytes()
    other = models.batch(family, (52,), seed=5)
    again = PrefixKVCache.for_model(model, 0.3, calibrate_with=other)  # a warning would be an error of the test
    assert again.profile == profile and profile_path(model).read_bytes() == content
    ids, _ = greedy(model, other, again)
    assert ids.shape[0] == 1 and len(set(again.stored_lengths(heads=True)[models.prunable_layers(model)[0]])) >= 1


def test_another_model_has_another_and_a_damaged_one_is_made_anew(home):
    model, inputs = models.build("llava_gqa"), models.batch("llava_gqa")
    profile_path(model).parent.mkdir(parents=True)
    profile_path(model).write_bytes(b"half a file")
    with pytest.warns(UserWarning, match="kept in"):
        PrefixKVCache.for_model(model, 0.3, calibrate_with=inputs)
    assert profile_path(models.build("llava_mha")) != profile_path(model)


@pytest.mark.skipif(os.name != "posix", reason="a file where the folder should be")
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PREFIXKV_HOME", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="not kept"):
        cache = PrefixKVCache.for_model(models.build("llava_gqa"), 0.3, calibrate_with=models.batch("llava_gqa"))
    assert cache.profile is not None


def test_two_threads_at_once(home):
    model, found = models.build("llava_gqa"), []

    def make():
        with torch.no_grad():
            found.append(PrefixKVCache.for_model(model, 0.3, calibrate_with=models.batch("llava_gqa")).profile)

    threads = [threading.Thread(target=make) for _ in range(2)]
    with pytest.warns(UserWarning):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 2 and found[0].keep.equal(found[1].keep)


@pytest.mark.parametrize("inputs", [{}, {"input_ids": torch.tensor([[7, 8, 9]])}, "text"])
def test_what_is_no_prompt_is_refused_in_a_line(home, inputs):
    with pytest.raises((TypeError, ValueError)) as caught:
        PrefixKVCache.for_model(models.build("llava_gqa"), 0.3, calibrate_with=inputs)
    assert "\n" not in str(caught.value) and not home.exists()


def test_a_profile_that_is_given_goes_first(home):
    model = models.build("llava_gqa")
    cache = PrefixKVCache.for_model(model, 0.3, profile=None, calibrate_with=models.batch("llava_gqa"))
    assert cache.profile is None and not home.exists()
