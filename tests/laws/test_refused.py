"""Bad input to the cache: one clear error, before any token is generated, that says what was given and what to do.

Bad methods are in units/test_methods.py, bad profile files in units/test_profile.py and security/.
"""

import math

import numpy as np
import pytest
import torch
import transformers

import compat
import models
import zoo
from oracle import feed
from prefixkv_cache import PrefixKVCache, PrefixProfile
from watch import Case, make_profile, run


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, -3, math.nan, math.inf, "half", None, True], ids=str)
def test_a_bad_budget(budget):
    for profile in (None, make_profile(4)):
        with pytest.raises((ValueError, TypeError), match=f"(?s)budget.*{budget}"):
            PrefixKVCache(profile, budget)


BAD = [
    ("image_mask", [[True]], "bool"), ("image_mask", torch.ones(1, 5), "bool"),
    ("image_mask", torch.ones(5) > 0, "bool"), ("image_mask", torch.ones(0, 5) > 0, "at least one row"),
    ("image_mask", torch.zeros(1, 5, dtype=torch.int64), "bool"), ("image_mask", np.ones((1, 5), bool), "bool"),
    ("max_new_tokens", 0, "at least 1"), ("max_new_tokens", 2.5, "integer"), ("max_new_tokens", True, "integer"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "cure"), BAD, ids=lambda value: str(value)[:20])
def test_a_bad_value_is_refused_by_name(name, value, cure):
    with pytest.raises((ValueError, TypeError)) as error:
        PrefixKVCache(budget=0.5, **{name: value})
    message = str(error.value)
    assert message.startswith(name) and cure in message and "got" in message and "\n" not in message


def test_a_profile_of_another_depth():
    config = models.weights("llava_mha").config  # 4 layers
    for depth in (3, 5):
        with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{depth}\b)(?=.*\b4\b)"):
            PrefixKVCache(make_profile(depth), budget=0.5, config=config)


@pytest.mark.parametrize("n_heads", [2, 3, 8])
def test_a_profile_of_another_number_of_heads(n_heads):
    """With the config at once; without it at the first forward."""
    model = models.shared("llava_mha")  # 4 key heads
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{n_heads}\b)(?=.*\b4\b)(?=.*head)"):
        PrefixKVCache(make_profile(4, n_heads), budget=0.5, config=model.config)
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{n_heads}\b)(?=.*\b4\b)(?=.*head)"):
        feed(model, models.batch("llava_mha"), models.words(1, 2), PrefixKVCache(make_profile(4, n_heads), budget=0.5))


def test_a_profile_of_another_depth_without_config():
    """Too few layers show at the first forward pass; too many at the latest when a second one begins."""
    model, inputs = models.shared("llava_mha"), models.batch("llava_mha")
    with pytest.raises(ValueError, match=r"\b3\b"):
        model.generate(**inputs, past_key_values=PrefixKVCache(make_profile(3), budget=0.5), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"\b5\b"):
        model.generate(**inputs, past_key_values=PrefixKVCache(make_profile(5), budget=0.5), max_new_tokens=2)


def test_ratios_that_leave_a_head_nothing_leave_the_least():
    keep = [[[0.0, 1.0]] * 6]
    cache = PrefixKVCache(
        PrefixProfile([0.5], keep), 0.5, method="default:floor=0", config=models.weights("llava_gqa").config
    )
    feed(models.shared("llava_gqa"), models.batch("llava_gqa"), models.words(1, 1), cache)
    assert cache.stored_lengths(heads=True) == [[2, 61]] * 6


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_a_damaged_profile(tmp_path, damage):
    path = tmp_path / "damaged.safetensors"
    make_profile(4).save(path)
    whole = path.read_bytes()
    flipped = bytes(255 - byte for byte in whole[:16]) + whole[16:]
    path.write_bytes({"empty": b"", "text": b"a profile", "cut": whole[:-9], "flipped": flipped}[damage])
    with pytest.raises(ValueError, match="damaged"):
        PrefixKVCache(path, budget=0.5)


def test_an_unknown_name_lists_the_names_there_are():
    with pytest.raises(ValueError) as error:
        PrefixKVCache("no-such-model", budget=0.5)
    assert "no-such-model" in str(error.value)
    assert all(name in str(error.value) for name in PrefixProfile.available())


@pytest.mark.parametrize("name", ["T5Config", "MambaConfig", "BartConfig"])
def test_a_config_that_cannot_be_pruned(name):
    config = getattr(transformers, name)()
    with pytest.raises(ValueError, match=config.model_type):
        PrefixKVCache(budget=0.5, config=config)


def test_linear_layers_are_not_taken_for_attention():
    """Some releases of transformers do not tell them apart; then the model is refused."""
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    assert config.layer_types.count("full_attention") == 1
    with pytest.raises(ValueError, match=r"linear|\b4 layers.* 1 prunable"):
        PrefixKVCache(make_profile(4), budget=0.5, config=config)


@pytest.mark.parametrize("attn", compat.BACKENDS)
def test_a_model_with_sliding_layers_asks_for_its_config(attn):
    """Without it the cache could not know which layers to leave whole."""
    with pytest.raises(ValueError, match=r"config=model\.config"):
        feed(models.shared("gemma3", attn), models.batch("gemma3"), models.words(1, 1), PrefixKVCache(budget=0.5))


@pytest.mark.parametrize("method", ["default", "prefixkv"])
@pytest.mark.parametrize("profile", [None, make_profile(4), make_profile(4, 4)], ids=["none", "layer", "head"])
def test_a_model_whose_attention_does_not_pass_the_interface(profile, method):
    """GIT computes attention in its own code: nothing can be observed, and nothing is silently kept whole."""
    config = transformers.GitConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=100,
        pad_token_id=0, vision_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16),
    )  # fmt: skip
    model = transformers.GitForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    cache = PrefixKVCache(profile, budget=0.5, **({"method": method} if profile is None else {}))
    with pytest.raises(Exception, match="GitSelfAttention"):
        model.generate(input_ids=models.words(1, 20), past_key_values=cache, max_new_tokens=2)
    cache.reset()
    with pytest.raises(Exception, match="GitSelfAttention"):  # at the latest here, one token after the prompt
        for start, length in ((0, 20), (20, 1)):
            place = {"attention_mask": torch.ones(1, length), "position_ids": torch.arange(start, start + length)[None]}
            model(input_ids=models.words(1, length), past_key_values=cache, **place)


@pytest.mark.skipif(compat.SEES_EAGER, reason="this transformers shows eager attention")
@pytest.mark.parametrize("family", models.FAMILIES)
def test_eager_attention_that_cannot_be_seen(family):
    """At the first forward, with what to do about it; the cache and the model can be used afterwards."""
    case, model = Case("default", family, turns=(5,)), models.build(family, "eager")
    cache = case.cache()
    with pytest.raises(RuntimeError, match=r"does not show eager attention.*attn_implementation='sdpa'"):
        model.generate(**case.prompt(), past_key_values=cache, max_new_tokens=5)
    cache.reset()
    model.set_attn_implementation("sdpa")
    assert torch.equal(feed(model, case.prompt(), models.words(3, 5), cache)[0], run(case)[0])


def test_latent_attention_has_no_heads_to_speak_of():
    """No lengths by head, at construction; no candidates in the prompt's own forward, before anything is stored."""
    model = zoo.tiny("deepseek_v3", "sdpa")
    n_layers = len(PrefixKVCache(config=model.config).layers)
    with pytest.raises(ValueError, match="a length for each of 4 key heads, but this model has latent attention"):
        PrefixKVCache(make_profile(n_layers, 4), budget=0.5, config=model.config)
    inputs = {"input_ids": torch.tensor([[7, 8, 9, 10] * 5])}
    for method in ("default", "prefixkv"):  # those that prune at once, and those that wait for all layers
        cache = PrefixKVCache(budget=0.5, method=method, config=model.config)
        with pytest.raises(NotImplementedError, match=r"latent attention.*max_new_tokens=1.*then go on"):
            model.generate(**inputs, past_key_values=cache, max_new_tokens=4, prompt_lookup_num_tokens=3)
        assert cache.get_seq_length() == 0 and cache.nbytes == 0


def test_what_does_not_go_with_offloading():
    with pytest.raises(ValueError, match=r"max_new_tokens plans.*offloading=True.*leave one of them out"):
        PrefixKVCache(budget=0.5, offloading=True, max_new_tokens=8)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="offloading=True needs streams, which a GPU has"):
            PrefixKVCache(budget=0.5, offloading=True)


def test_assistance_and_offloading_exclude_each_other():
    """Said when decoding begins; the switch is thrown by hand, as a CPU has no streams to offload by."""
    case = Case("default", lengths=(61,))
    cache = case.cache()
    cache.offloading = True
    with pytest.raises(ValueError, match="take tokens back, which a cache with offloading does not allow"):
        case.model.generate(**case.prompt(), past_key_values=cache, max_new_tokens=4, prompt_lookup_num_tokens=3)
    assert cache.get_seq_length() == 0
