"""What is given in the wrong place is one line with the cure; what was overlooked is said once, by a warning."""

import re
import warnings

import pytest
import torch
from PIL import Image

import tiny_vlm
from prefixkv_cache import PrefixKVCache, ProfileError
from prefixkv_cache.tools.loading import load_model, prepare


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(model, inputs with a picture, inputs of another question, inputs of text alone)."""
    folder = tiny_vlm.save_model(tmp_path_factory.mktemp("hints") / "model")
    model, processor = load_model(str(folder), device="cpu")
    image = Image.effect_noise((40, 36), 80).convert("RGB")
    asked = [("what is there ?", [image]), ("what is red in the picture ?", [image]), ("what is red ?", [])]
    return model, *(prepare(processor, [each]) for each in asked)


def generate(model, cache, inputs, **options):
    return model.generate(
        **inputs, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options
    )


def hints_of(call):
    """The warnings of a call that may fail in transformers, as it does when pictures and image tokens differ."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except (ValueError, RuntimeError, IndexError) as error:
            assert "image" in str(error).lower() or "shape" in str(error)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda model: PrefixKVCache(0.5), TypeError, "PrefixKVCache(budget=0.5)"),
        (lambda model: PrefixKVCache(config=model), TypeError, "config=model.config"),
        (lambda model: PrefixKVCache(model, 0.5), TypeError, "PrefixKVCache.for_model(model, budget)"),
        (lambda model: PrefixKVCache(model.config), TypeError, "config=model.config"),
        (lambda model: PrefixKVCache.for_model(model.config), TypeError, "takes the model itself"),
        (lambda model: PrefixKVCache.for_model(model, inputs=model), TypeError, "what the processor made"),
        (lambda model: PrefixKVCache("me/my-model"), ProfileError, "PrefixKVCache.for_model(model, budget)"),
        (lambda model: PrefixKVCache("/tmp"), ProfileError, "a folder"),
    ],
    ids=["budget", "config=model", "model", "config", "for_model(config)", "inputs", "hub id", "folder"],
)
def test_what_is_in_the_wrong_place_is_one_line_with_the_cure(world, make, error, words):
    with pytest.raises(error, match=re.escape(words)) as caught:
        make(world[0])
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_a_repr_says_what_is_held_and_what_a_full_cache_would_hold(world):
    model, inputs, *_ = world
    cache = PrefixKVCache.for_model(model, 0.5, inputs=inputs)
    assert "bytes=0 of 0 in a full cache" in repr(cache)
    generate(model, cache, inputs)
    full = PrefixKVCache.for_model(model, 1.0, max_new_tokens=3)
    generate(model, full, inputs)
    seen = inputs["input_ids"].shape[1] + 3
    assert f"seen={seen}, stored=" in repr(cache)
    assert repr(cache).endswith(f"bytes={cache.nbytes} of {full.nbytes} in a full cache)")


@pytest.mark.parametrize("second", [1, 2, 3], ids=["the same", "another question", "text alone"])
def test_a_second_prompt_without_reset_is_hinted_at_once(world, second):
    model, inputs = world[:2]
    cache = PrefixKVCache.for_model(model, 0.5)
    assert hints_of(lambda: generate(model, cache, inputs)) == []
    (said,) = hints_of(lambda: generate(model, cache, world[second]))
    assert "cache.reset()" in said
    assert hints_of(lambda: generate(model, cache, world[second])) == []
    cache.reset()
    assert hints_of(lambda: generate(model, cache, world[second])) == []
    assert hints_of(lambda: generate(model, cache, inputs if second > 1 else world[3]))  # said anew


def test_a_longer_text_that_begins_otherwise_is_hinted_at(world):
    model, _, _, text = world
    cache = PrefixKVCache.for_model(model, 0.5)
    generate(model, cache, text)
    longer = torch.cat([text["input_ids"].roll(1, 1), text["input_ids"]], dim=1)
    (said,) = hints_of(lambda: generate(model, cache, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}))
    assert "is not given" in said and "cache.reset()" in said


def test_a_forward_of_the_whole_first_prompt_again_is_hinted_at(world):
    model, inputs, *_ = world
    cache = PrefixKVCache.for_model(model, 0.5)
    with torch.no_grad():
        assert hints_of(lambda: model(**inputs, past_key_values=cache)) == []
        (said,) = hints_of(lambda: model(**inputs, past_key_values=cache))
    assert "the first prompt again" in said and "cache.reset()" in said


def test_a_talk_that_goes_on_is_silent(world):
    model, inputs, _, text = world
    cache = PrefixKVCache.for_model(model, 0.5)
    out = generate(model, cache, inputs)
    whole = torch.cat([out, text["input_ids"]], dim=1)
    turn = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    assert hints_of(lambda: generate(model, cache, turn)) == []
    with torch.no_grad():
        assert hints_of(lambda: model(input_ids=text["input_ids"], past_key_values=cache)) == []


def test_use_cache_false_is_said_once(world):
    model, inputs, *_ = world
    cache = PrefixKVCache.for_model(model, 0.5)
    (said,) = hints_of(lambda: generate(model, cache, inputs, use_cache=False))
    assert "use_cache=False" in said


@pytest.mark.parametrize("kind", ["static", "quantized", "dynamic"])
def test_a_cache_implementation_beside_a_cache_is_refused_by_transformers(world, kind):
    model, inputs, *_ = world
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, PrefixKVCache.for_model(model, 0.5), inputs, cache_implementation=kind)
