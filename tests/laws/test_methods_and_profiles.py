"""Laws 7 and 9: save then load is the identity; a method is its spelling; a profile's cache does what it was made with.

In test_matrix.py no cache with a profile is told a method, so each of its cases is law 9, too.
"""

import warnings
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import models
from oracle import feed
from prefixkv_cache import PrefixKVCache, PrefixProfile, calibrate, methods
from prefixkv_cache.methods import Method
from watch import Case, follow, kept_by_head, make_profile, run

FIELDS = {
    "score": st.sampled_from(["attention", "random", "recency", "key-difference", "combined"]),
    "queries": st.one_of(st.just("all"), st.integers(1, 10**6)),
    "context": st.one_of(st.just("all"), st.integers(0, 1000)),
    "heads": st.sampled_from(["mean", "max", "each"]),
    "pooling": st.integers(0, 20).map(lambda half: 2 * half + 1),
    "pooling_by": st.sampled_from(["max", "mean"]),
    "value_norm": st.booleans(),
    "lengths": st.sampled_from(["search", "uniform", "pyramid", "pool"]),
    "floor": st.one_of(st.integers(0, 100), st.floats(0, 1, exclude_min=True, exclude_max=True)),
    "sink": st.integers(0, 8),
    "recent": st.one_of(st.integers(1, 64), st.floats(0, 1, exclude_min=True, exclude_max=True)),
    "text_floor": st.floats(0, 1),
    "merge": st.booleans(),
    "evict": st.sampled_from(["fixed-point", "oldest", "least-important"]),
    "distance": st.one_of(st.none(), st.integers(1, 100)),
    "headroom": st.integers(0, 1000),
}


@st.composite
def any_method(draw):
    """A named method with some fields replaced, where that can work."""
    method = draw(st.sampled_from(list(methods.NAMED.values())))
    for name in draw(st.lists(st.sampled_from(list(FIELDS)), unique=True)):
        try:
            method = method.replace(**{name: draw(FIELDS[name])})
        except ValueError:
            continue
    return method


@settings(max_examples=300, deadline=None, derandomize=True)
@given(any_method())
def test_law_9_a_method_is_its_spelling(method):
    assert Method.parse(method.spell()) == method
    assert Method.parse(method.spell(full=True)) == method
    assert hash(Method.parse(method.spell())) == hash(method)


def test_law_9_a_full_spelling_says_every_field():
    """A profile stores it, so that a later change of a named value does not change what a profile does."""
    for name, method in methods.NAMED.items():
        assert Method.parse(name) == method and method.name == method.spell() == name
        assert set(FIELDS) <= {field.split("=")[0] for field in method.spell(full=True).split(":")[1].split(";")}


@pytest.mark.parametrize("method", methods.NAMED)
def test_law_9_the_profile_says_the_method(method, tmp_path):
    """Also from a file; and a cache that was told the same method does the same, without a word."""
    case = Case(method, profile="head", turns=(6,))
    logits, watch = run(case)
    case.read().save(tmp_path / "profile.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for changes in ({"method": methods.NAMED[method]}, {"profile": str(tmp_path / "profile.safetensors")}):
            again, told = run(case, **{"method": None, **changes})
            assert torch.equal(again, logits) and told.kept == watch.kept


@pytest.mark.parametrize("method", ["prefixkv:queries=8", "default:score=attention;queries=8;context=5;pooling=3"])
@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
def test_law_9_what_was_measured_is_what_is_kept(method, family):
    """A profile of one sample holds the lengths that its method's own search finds on that prompt. So the cache keeps
    what the search would have kept; calibrating with any other ranking would give other lengths."""
    searched = Case(f"{method};lengths=search", family, lengths=(61,), turns=(1,))
    profile = calibrate(searched.model, [searched.prompt()], method=method, budgets=(0.4, 1.0), by="mass")
    assert profile.method == Method.parse(method)
    *_, rule = follow(searched)
    wanted = [[len(heads[0]) / 61 for heads in rows] for rows in rule.log[0].values()]
    assert torch.allclose(profile.keep_ratios(0.4), torch.tensor(wanted, dtype=torch.float64))
    cache = PrefixKVCache(profile, 0.4, config=searched.model.config)
    feed(searched.model, searched.prompt(), models.words(1, 1), cache)
    assert cache.method == Method.parse(method)
    for layer in searched.layers:
        assert kept_by_head(cache, layer, searched.heads) == rule.log[0][layer]


def test_law_9_a_method_beside_a_profile_is_used_and_warned_of():
    case = Case("prefixkv", profile="head", turns=(6,))
    with pytest.warns(UserWarning, match=r"prefixkv.*snapkv|snapkv.*prefixkv") as caught:
        cache = case.cache(method="snapkv")
    assert len(caught) == 1 and "\n" not in str(caught[0].message) and len(str(caught[0].message)) < 200
    assert cache.method == methods.SNAPKV and cache.profile.method == methods.PREFIXKV
    logits, _ = feed(case.model, case.prompt(), models.words(3, 6), cache)
    assert torch.equal(logits, run(replace(case, method="snapkv"))[0])


def test_without_a_word_it_is_the_default():
    case = Case("default", turns=(6,))
    assert case.cache(method=None).method == methods.DEFAULT
    assert torch.equal(run(case)[0], run(case, method=None)[0])


@pytest.mark.parametrize("n_heads", [1, 2])
def test_law_7_a_saved_profile_is_the_same_profile(tmp_path, n_heads):
    made = make_profile(6, n_heads, "h2o:recent=8")
    made.save(tmp_path / "one.safetensors")
    loaded = PrefixProfile.load(tmp_path / "one.safetensors")
    loaded.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert torch.equal(loaded.keep, made.keep) and torch.equal(loaded.budgets, made.budgets)
    assert loaded.metadata == made.metadata and loaded.method == made.method == Method.parse("h2o:recent=8")
