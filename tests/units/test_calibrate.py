"""Laws of the calibrator: what it finds, what cannot change it, what it does with failures, and going on."""

import functools
import gc
import json
import warnings
import weakref

import pytest
import torch
from transformers import AttentionInterface

import compat
import models
import rules
from oracle import Oracle, Rule
from prefixkv_cache import PrefixKVCache, PrefixProfile, calibrate, methods
from prefixkv_cache.cache.compat import HOOKED_METHOD
from prefixkv_cache.cache.guards import image_mask_of
from prefixkv_cache.calibration.measure import AnsweredPrompt, Cost
from prefixkv_cache.calibration.observe import ObservedCache, Scores
from prefixkv_cache.calibration.plan import Plan

GRID = (0.1, 0.2, 0.5, 1.0)
LENGTHS = (61, 44, 40)
PAPER = methods.PREFIXKV.replace(distance=None)
METHODS = {
    "default": methods.DEFAULT.replace(score="attention"),
    "prefixkv": PAPER,
    "window": PAPER.replace(queries=8),
    "max": PAPER.replace(queries=8, heads="max", pooling=5, value_norm=True),
    "each": PAPER.replace(queries=16, context="all", heads="each", pooling=3, pooling_by="mean"),
    "sink": PAPER.replace(sink=3, recent=6),
}
each_method = pytest.mark.parametrize("method", METHODS)


mass = functools.partial(calibrate, by="mass", budgets=GRID)


pytestmark = pytest.mark.usefixtures("short_descent")


def samples(family="llava_gqa", lengths=LENGTHS, dtype=torch.float64):
    return [models.batch(family, (length,), seed=index, dtype=dtype) for index, length in enumerate(lengths)]


# What is found.


@pytest.mark.parametrize("queries", ["all", 8])
@pytest.mark.parametrize(("family", "attn"), [("llava_gqa", "sdpa"), ("qwen2_5_vl", compat.PLAIN), ("gemma3", "sdpa")])
def test_keep_ratios_are_those_of_plain_attention_weights(family, attn, queries):
    batches = samples(family, LENGTHS[:2])
    profile = calibrate(
        models.shared(family, attn), batches, by="mass", budgets=GRID, method=PAPER.replace(queries=queries)
    )
    eager = models.build(family, "eager")
    plain = []
    for inputs in batches:
        weights = eager(**inputs, output_attentions=True).attentions
        n = inputs["input_ids"].shape[1]
        received = [
            rules.importance(weights[layer][0].tolist(), rules.last_queries(n, queries))
            for layer in models.prunable_layers(eager)
        ]
        plain.append([[count / n for count in rules.search(received, budget, 1)] for budget in GRID])
    expected = torch.tensor(plain, dtype=torch.float64).mean(0)
    assert profile.keep.shape == (len(GRID), len(received), 1)
    assert (profile.keep[:, :, 0] - expected).abs().max() < 1e-12


@each_method
@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl"])
def test_of_one_prompt_it_is_the_search_on_the_prompt(family, method):
    method = METHODS[method].replace(lengths="search")
    inputs, model = samples(family)[0], models.shared(family, "sdpa")
    profile = calibrate(model, [inputs], by="mass", budgets=[0.3, 0.6], method=method)
    assert profile.method == method
    image = image_mask_of(inputs, model.config)
    for budget in (0.3, 0.6):
        for source in (profile, None):
            cache = PrefixKVCache(source, budget, image_mask=image, method=method)
            model(**inputs, past_key_values=cache, use_cache=True)
            lengths = (profile.keep_ratios(budget)[:, 0] * LENGTHS[0]).round().long().tolist()
            assert cache.stored_lengths() == lengths


@each_method
@pytest.mark.parametrize("family", ["llava_gqa", "gemma3"])
def test_of_a_padded_batch_it_is_the_mean_of_the_searches_on_its_rows(family, method):
    model, inputs = models.shared(family, "sdpa"), models.batch(family, LENGTHS)
    method = METHODS[method].replace(lengths="search")
    cache = PrefixKVCache(budget=0.4, config=model.config, method=method)
    model(**inputs, past_key_values=cache, use_cache=True)
    found = [cache.kept_positions(layer) for layer in models.prunable_layers(model)]
    found = [each[:, 0] if each.ndim == 3 else each for each in found]
    ratios = [[int((of_row >= 0).sum()) / n for of_row, n in zip(each, LENGTHS, strict=True)] for each in found]
    profile = calibrate(model, [inputs], by="mass", budgets=[0.4], method=method)
    assert profile.metadata["samples"] == "3"
    assert (profile.keep[0, :, 0] - torch.tensor(ratios, dtype=torch.float64).mean(1)).abs().max() < 1e-12


@each_method
@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl"])
def test_lengths_are_those_of_slow_rules(family, method):
    """The same ranking in plain loops over the weights of a full model, and the slow search on it."""
    method = METHODS[method].replace(lengths="search")
    inputs = samples(family)[0]
    for budget in (0.15, 0.5):
        rule = Rule(method, budget)
        oracle = Oracle(models.build(family), rule)
        oracle.model(**inputs, past_key_values=oracle.cache, use_cache=True)
        slow = [len(rule.log[0][layer][0][0]) / LENGTHS[0] for layer in oracle.prunable]
        found = calibrate(models.shared(family, "sdpa"), [inputs], by="mass", budgets=[budget], method=method).keep[0]
        assert found[:, 0].tolist() == pytest.approx(slow, abs=1e-12)


def test_every_method_has_a_profile_of_its_own():
    """Otherwise the tests of it would show nothing."""
    model = models.shared("llava_gqa", "sdpa")
    found = [mass(model, samples(), method=each) for name, each in METHODS.items() if name != "sink"]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert (one.keep - other.keep).abs().max() > 0.001


def test_the_method_is_the_caches_default_or_its_spelling():
    model = models.shared("llava_gqa")
    assert calibrate(model, samples()[:1], by="mass", budgets=GRID).method == methods.PREFIXKV
    own = calibrate(model, samples()[:1], by="reconstruction", budgets=GRID)
    assert own.method == methods.DEFAULT == PrefixKVCache().method
    with pytest.raises(ValueError, match="'default' scores places: take another method"):
        calibrate(model, samples()[:1], by="mass", method="default", budgets=GRID)
    spelled = calibrate(model, samples()[:1], by="mass", budgets=GRID, method="snapkv:queries=9")
    assert spelled.method == methods.SNAPKV.replace(queries=9)
    assert spelled.metadata["method"] == spelled.method.spell(full=True)


def test_by_head_it_is_the_search_on_each_heads_scores():
    method = METHODS["each"]
    model, inputs = models.shared("llava_gqa", "sdpa"), samples()[0]
    profile = calibrate(model, [inputs], by="mass", unit="head", budgets=GRID, method=method)
    oracle = Oracle(models.build("llava_gqa"))
    oracle.model(**inputs, past_key_values=oracle.cache, use_cache=True)
    scores = [
        rules.attention_scores(oracle.weights[layer][0].tolist()[2 * head : 2 * head + 2], method.ranking, 1)
        for layer in oracle.prunable
        for head in range(2)
    ]
    for row, budget in zip(profile.keep, GRID, strict=True):
        assert row.flatten().tolist() == pytest.approx([count / 61 for count in rules.search(scores, budget, 1)])
    with pytest.raises(ValueError, match="has one score for all heads"):
        calibrate(model, [], by="mass", unit="head", method=PAPER)


@pytest.mark.parametrize("by", ["reconstruction", "loss", "measured"])
@pytest.mark.parametrize("unit", ["layer", "head"])
def test_every_proposal_makes_a_profile_that_the_cache_takes(by, unit, tmp_path):
    model = models.shared("llava_gqa", "sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # whether these beat uniform lengths is chance
        profile = calibrate(model, samples(), by=by, unit=unit, budgets=GRID)
    assert (
        profile.n_heads == (2 if unit == "head" or profile.metadata["by"].endswith("head") else 1) or by == "measured"
    )
    assert torch.allclose(profile.keep.mean((1, 2)), torch.tensor(GRID, dtype=torch.float64), atol=0.005)
    assert profile.metadata["samples"] == "3" and profile.metadata["by"].startswith("" if by == "measured" else by)
    profile.save(tmp_path / "p.safetensors")
    cache = PrefixKVCache(tmp_path / "p.safetensors", 0.4, config=model.config)
    assert model.generate(**samples()[0], past_key_values=cache, max_new_tokens=3).shape[1] == LENGTHS[0] + 3
    if by == "measured":
        measured = profile.measured
        assert measured["samples"] == 1 and list(measured["budgets"]) == ["0.1", "0.2", "0.5", "1"]
        row, fields = measured["budgets"]["0.2"], ("kl", "agreement", "exact")
        assert list(row) == [f"{beside}{field}" for beside in ("", "uniform_", "paper_") for field in fields]
        assert 0 < row["kl"] != row["uniform_kl"]
    else:
        assert profile.measured is None


def test_what_was_measured_is_what_the_cache_costs():
    """On the sample that was set aside, by the method that the profile carries."""
    model = models.shared("llava_gqa", "sdpa")
    method = methods.SNAPKV.replace(queries=8, recent=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        profile = calibrate(model, samples(), by="measured", unit="head", budgets=[0.3], method=method)
    aside = AnsweredPrompt(model, samples()[1], [profile.method])
    cost = aside.costs([aside.kept(profile.method, profile, 0.3)])[0]
    assert profile.measured["budgets"]["0.3"]["kl"] == pytest.approx(cost.divergence.item(), rel=1e-3)


def test_candidates_are_compared_at_few_budgets_and_the_best_is_measured_at_all():
    assert Plan(by="measured").compared_at == (0.1, 0.2, 0.5)
    assert Plan(by="measured", budgets=(0.3, 1.0)).compared_at == (0.3,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        profile = calibrate(models.shared("llava_gqa", "sdpa"), samples(), budgets=[0.1, 0.2, 0.3, 0.5, 1.0])
    assert list(profile.measured["budgets"]) == ["0.1", "0.2", "0.3", "0.5", "1"]


def test_a_profile_that_does_not_beat_uniform_lengths_says_so(monkeypatch):
    model = models.shared("llava_gqa", "sdpa")
    monkeypatch.setattr(
        AnsweredPrompt, "costs", lambda self, kept, later=False: [Cost(*[torch.ones(1)] * 4)] * len(kept)
    )
    with pytest.warns(UserWarning, match="does not beat uniform lengths"):
        profile = calibrate(model, samples(), by="measured", budgets=[0.5])
    assert profile.measured["beats_uniform"] is False


def test_a_model_that_cannot_repeat_its_prompt_goes_without_reconstruction(monkeypatch):
    def refuse(self):
        raise RuntimeError("index out of range")

    monkeypatch.setattr(AnsweredPrompt, "reconstruction", refuse)
    model = models.shared("llava_gqa", "sdpa")
    with pytest.warns(UserWarning, match="reconstruction is left out: index out of range"):
        profile = calibrate(model, samples(), by="measured", budgets=[0.5])
    assert not profile.metadata["by"].startswith("reconstruction")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"all samples failed \(3\); the last one: index out of range"):
            calibrate(model, samples(), by="reconstruction", budgets=[0.5])


def test_measuring_needs_a_sample_to_set_aside():
    with pytest.raises(ValueError, match="sets every third sample aside, so it needs two"):
        calibrate(models.shared("llava_gqa", "sdpa"), samples()[:1], by="measured", budgets=[0.5])


def test_only_prunable_layers_are_in_the_profile():
    model = models.shared("gemma3")
    assert mass(model, samples("gemma3")[:1]).n_layers == len(models.prunable_layers(model)) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    low = mass(models.build("llava_mha", "sdpa", dtype), samples("llava_mha", dtype=dtype))
    full = mass(models.build("llava_mha", "sdpa"), samples("llava_mha"))
    assert low.metadata["dtype"] == str(dtype).removeprefix("torch.")
    assert (low.keep - full.keep).abs().max() < 0.06


def test_metadata_says_what_was_found():
    model = models.shared("llava_gqa", "sdpa")
    profile = mass(model, samples(), method=PAPER, metadata={"source": "words"})
    metadata = profile.metadata
    assert (metadata["by"], metadata["samples"], metadata["n_heads"]) == ("mass/layer", "3", "1")
    assert (metadata["tokens_min"], metadata["tokens_mean"], metadata["tokens_max"]) == ("40", "48.3", "61")
    assert (metadata["model"], metadata["source"], metadata["format_version"]) == ("llava", "words", "2")
    each = torch.stack([mass(model, [inputs], method=PAPER).keep for inputs in samples()])
    assert torch.allclose(profile.keep, each.mean(0), atol=1e-12)
    spread = torch.tensor(json.loads(metadata["spread"]), dtype=torch.float64)
    assert torch.allclose(spread, each.std(0)[:, :, 0], atol=1e-4)
    assert "spread" not in mass(model, samples()[:1]).metadata


def test_a_path_is_not_written_into_the_profile(tmp_path):
    model = models.build("llava_mha")
    model.config._name_or_path = str(tmp_path / "my-model")
    assert mass(model, samples("llava_mha")[:1]).metadata["model"] == "my-model"
    model.config._name_or_path = "somebody/some-model"
    assert mass(model, samples("llava_mha")[:1]).metadata["model"] == "somebody/some-model"


# What cannot change it.


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("queries", ["all", 42])  # 42: longer than the shortest row
def test_neither_order_nor_batching(family, queries):
    model, method = models.shared(family, "sdpa"), PAPER.replace(queries=queries)
    profile = mass(model, samples(family), method=method)
    backwards = calibrate(model, iter(samples(family)[::-1]), by="mass", budgets=GRID[::-1], method=method)
    together = mass(model, [models.batch(family, LENGTHS)], method=method)
    assert same_but_for_the_date(profile, backwards)
    assert (profile.keep - together.keep).abs().max() < 1e-9
    assert same_but_for_the_date(profile, together)


def same_but_for_the_date(one, other):
    fixed = [PrefixProfile(each.budgets, each.keep, {**each.metadata, "created": "then"}) for each in (one, other)]
    return fixed[0] == fixed[1]


def test_padding_on_the_right_is_padding():
    model, padded = models.shared("llava_gqa", "sdpa"), models.batch("llava_gqa", LENGTHS)
    right = dict(padded)
    for name in ("input_ids", "attention_mask"):
        rows = [row.roll(length - LENGTHS[0]) for row, length in zip(padded[name], LENGTHS, strict=True)]
        right[name] = torch.stack(rows)
    assert (mass(model, [padded]).keep - mass(model, [right]).keep).abs().max() < 1e-9


def test_neither_labels_nor_training_mode():
    model = models.build("llava_gqa", "sdpa")
    plain = mass(model, samples()[:1])
    model.config.text_config.attention_dropout = 0.5
    for module in models.attention_modules(model):
        module.attention_dropout = 0.5
    model.train()
    model.model.vision_tower.eval()
    inputs = samples()[0]
    trained = mass(model, [{**inputs, "labels": inputs["input_ids"], "use_cache": False}])
    assert torch.equal(plain.keep, trained.keep)
    assert model.training and not model.model.vision_tower.training


# What it costs.


def test_no_keys_are_kept_and_nothing_is_left_behind():
    gc.collect()
    before = vars(AttentionInterface).get(HOOKED_METHOD)
    model = models.shared("llava_gqa", "sdpa")
    cache = ObservedCache(model.config, stored=False)
    cache.observer = Scores([methods.DEFAULT], 2**20)
    seen = keys_of_updates(cache)
    model(**samples()[0], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == LENGTHS[0]
    assert len(seen) == len(cache.layers) and not any(each() is not None for each in seen)
    assert not [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert vars(AttentionInterface).get(HOOKED_METHOD) is before


def keys_of_updates(cache):
    """Weak references to the keys of every layer; those of earlier layers must be gone when a layer is updated."""
    seen, update = [], cache.update

    def watched(key_states, value_states, *args, **kwargs):
        assert all(each() is None for each in seen)
        seen.append(weakref.ref(key_states))
        return update(key_states, value_states, *args, **kwargs)

    cache.update = watched
    return seen


def test_one_sample_at_a_time():
    assert mass(models.shared("llava_gqa"), _fresh([])).metadata["samples"] == "3"


def _fresh(alive):
    for index, length in enumerate(LENGTHS):
        assert all(each() is None for each in alive)
        inputs = models.batch("llava_gqa", (length,), seed=index)
        alive.append(weakref.ref(inputs["pixel_values"]))
        yield inputs
        del inputs
