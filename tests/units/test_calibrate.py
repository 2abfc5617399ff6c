"""Laws of the calibrator: what it measures, what cannot change it, what it does with failures, and going on."""

import gc
import importlib
import json
import math
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig

import compat
import models
from oracle import Oracle
from oracle import importance as slow_importance
from prefixkv_cache import PrefixKVCache, PrefixProfile, calibrate
from prefixkv_cache.cache.cache import image_mask_of
from prefixkv_cache.calibrated_for import DEFAULT, plain_ranking
from prefixkv_cache.calibration.observe import ObservingCache, UnobservedAttentionError, observe
from prefixkv_cache.rules.scoring import Ranking
from rules import Rules
from test_threshold import slow_search

calibrate_module = importlib.import_module("prefixkv_cache.calibration.calibrate")
state_module = importlib.import_module("prefixkv_cache.calibration.state")
GRID = (0.1, 0.2, 0.5, 1.0)
LENGTHS = (61, 44, 40)
PLAIN = {"novelty": 0.0, "diversity": 0.0}
RANKINGS = [
    {},
    {"queries": "all", **PLAIN},
    PLAIN,
    {"queries": "all", "average": "visible"},
    {"queries": "text"},
    {"heads": "each"},
    {"heads": "max", "pooling": 5, "value_norm": True, **PLAIN},
    {"queries": "text", "average": "visible", "heads": "each", "pooling": 3, "value_norm": True, "diversity": 0.2,
     "novelty": 0.5},
]  # fmt: skip
each_ranking = pytest.mark.parametrize("ranking", RANKINGS, ids=lambda each: "-".join(map(str, each.values())))


def samples(family="llava_gqa", lengths=LENGTHS):
    return [models.batch(family, (length,), seed=index) for index, length in enumerate(lengths)]


def eager_ratios(family, inputs, queries, budgets):
    """Keep ratios [n_budgets][n_layers] of one unpadded prompt, from the weights that transformers itself returns."""
    model = models.build(family, "eager")
    attentions = model(**inputs, output_attentions=True).attentions
    length = inputs["input_ids"].shape[1]
    received = [
        slow_importance(attentions[layer][0], list(range(length)), queries) for layer in models.prunable_layers(model)
    ]
    searched = [slow_search(received, budget) for budget in budgets]
    assert all(free == 0 for _, free in searched), "a tie: the weights cannot tell"
    return [[count / length for count in counts] for counts, _ in searched]


# What is measured.


@pytest.mark.parametrize("queries", ["all", 8])
@pytest.mark.parametrize(("family", "attn"), [("llava_gqa", "sdpa"), ("qwen2_5_vl", compat.PLAIN), ("gemma3", "sdpa")])
def test_keep_ratios_are_those_of_plain_attention_weights(family, attn, queries):
    batches = samples(family, LENGTHS[:2])
    profile = calibrate(models.build(family, attn), batches, budgets=GRID, queries=queries, **PLAIN)
    plain = [eager_ratios(family, inputs, queries, GRID) for inputs in batches]
    expected = torch.tensor(plain, dtype=torch.float64).mean(0)
    assert (profile.keep - expected).abs().max() < 0.01


@each_ranking
@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl"])
def test_of_one_prompt_it_is_the_search_on_the_prompt(family, ranking):
    inputs = samples(family)[0]
    model = models.build(family, "sdpa")
    profile = calibrate(model, [inputs], budgets=[0.3, 0.6], **ranking)
    image = image_mask_of(inputs, model.config)
    for budget in (0.3, 0.6):
        for source in (profile, None):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # the profile is for just this ranking
                cache = PrefixKVCache(source, budget=budget, image_mask=image, **ranking)
            model(**inputs, past_key_values=cache, use_cache=True)
            lengths = (profile.keep_ratios(budget) * LENGTHS[0]).round().long().tolist()
            assert cache.stored_lengths() == lengths


@each_ranking
@pytest.mark.parametrize("family", ["llava_gqa", "gemma3"])
def test_of_a_padded_batch_it_is_the_mean_of_the_searches_on_its_rows(family, ranking):
    model = models.build(family, "sdpa", torch.float64)
    inputs = cast(models.batch(family, LENGTHS), torch.float64)
    cache = PrefixKVCache(
        budget=0.4, config=model.config, image_mask=image_mask_of(inputs, model.config), lengths="search", **ranking
    )
    model(**inputs, past_key_values=cache, use_cache=True)
    found = [cache.kept_positions(layer) for layer in models.prunable_layers(model)]
    if ranking.get("heads") == "each":
        found = [of_layer[:, 0] for of_layer in found]
    ratios = [[int((of_row >= 0).sum()) / n for of_row, n in zip(each, LENGTHS, strict=True)] for each in found]
    profile = calibrate(model, [inputs], budgets=[0.4], **ranking)
    assert profile.metadata["samples"] == "3"
    assert (profile.keep[0] - torch.tensor(ratios, dtype=torch.float64).mean(1)).abs().max() < 1e-12


@each_ranking
@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl"])
def test_lengths_are_those_of_slow_rules(family, ranking):
    """The same ranking in plain loops over the weights of a full model, and the slow search on it."""
    inputs = samples(family)[0]
    for budget in (0.15, 0.5):
        image = [row.nonzero().flatten().tolist() for row in image_mask_of(inputs, models.weights(family).config)]
        rules = Rules(budget=budget, image=image, **{"novelty": 8.0, "diversity": 0.5, **ranking})
        oracle = Oracle(models.build(family), rules)
        rules.oracle = oracle
        oracle.model(**inputs, past_key_values=oracle.cache, use_cache=True)
        slow = [len(rules.kept[layer][0][0]) / LENGTHS[0] for layer in models.prunable_layers(oracle.model)]
        found = calibrate(models.build(family, "sdpa"), [inputs], budgets=[budget], **ranking).keep[0]
        assert found.tolist() == pytest.approx(slow, abs=1e-12)


def test_every_ranking_has_a_profile_of_its_own():
    """Otherwise the tests of it would show nothing."""
    found = [calibrate(models.build("llava_gqa", "sdpa"), samples(), budgets=GRID, **each) for each in RANKINGS]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert (one.keep - other.keep).abs().max() > 0.01
            assert one.metadata["ranking"] != other.metadata["ranking"] or (
                one.metadata["queries"] != other.metadata["queries"]
            )


def test_the_defaults_are_those_of_the_cache():
    cache = PrefixKVCache()
    assert cache.ranking == DEFAULT == calibrate_module.Settings().ranking
    metadata = calibrate(models.build("llava_gqa"), samples()[:1], budgets=GRID).metadata
    assert metadata["queries"] == "32"
    assert metadata["ranking"] == "average=sum heads=mean pooling=1 value_norm=false diversity=0.5 novelty=8.0"
    paper = calibrate(models.build("llava_gqa"), samples()[:1], budgets=GRID, queries="all", **PLAIN).metadata
    assert paper["queries"] == "all"
    assert paper["ranking"] == "average=sum heads=mean pooling=1 value_norm=false diversity=0.0 novelty=0.0"
    assert PrefixKVCache.paper().ranking == plain_ranking("all")


def test_text_queries_need_to_know_the_images():
    model = models.build("llava_gqa")
    embedded = {"inputs_embeds": torch.randn(1, 40, 32), "attention_mask": torch.ones(1, 40, dtype=torch.int64)}
    with pytest.warns(UserWarning, match="sample 0 was skipped: queries='text' needs input_ids"):
        profile = calibrate(model, [embedded, samples()[0]], budgets=GRID, queries="text")
    assert (profile.metadata["samples"], profile.metadata["queries"]) == ("1", "text")
    assert PrefixProfile(profile.budgets, profile.keep, profile.metadata) == profile
    with pytest.raises(ValueError, match="needs an image mask"):
        observe(model, samples()[0], ranking=Ranking("text"))
    with pytest.raises(ValueError, match=r"needs an image mask \[1, 61\]; it is \[1, 60\]"):
        observe(model, samples()[0], ranking=Ranking("text"), image_mask=torch.zeros(1, 60, dtype=torch.bool))
    text_only = SimpleNamespace(config=LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2))
    with pytest.raises(ValueError, match="names no image token"):
        calibrate(text_only, _explode(), queries="text")


def test_only_prunable_layers_are_in_the_profile():
    model = models.build("gemma3")
    assert calibrate(model, samples("gemma3")[:1], budgets=GRID).n_layers == len(models.prunable_layers(model)) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    low = calibrate(models.build("llava_mha", "sdpa", dtype), [cast(each, dtype) for each in samples("llava_mha")])
    full = calibrate(models.build("llava_mha", "sdpa"), samples("llava_mha"))
    assert low.metadata["dtype"] == str(dtype).removeprefix("torch.")
    assert (low.keep - full.keep).abs().max() < 0.06


def cast(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def test_metadata_says_what_was_measured():
    profile = calibrate(models.build("llava_gqa"), samples(), budgets=GRID, queries="all", metadata={"source": "words"})
    metadata = profile.metadata
    assert (metadata["method"], metadata["queries"], metadata["samples"]) == ("prefixkv", "all", "3")
    assert (metadata["tokens_min"], metadata["tokens_mean"], metadata["tokens_max"]) == ("40", "48.3", "61")
    assert (metadata["model"], metadata["source"], metadata["sink"]) == ("llava", "words", "1")
    each = [calibrate(models.build("llava_gqa"), [inputs], budgets=GRID, queries="all").keep for inputs in samples()]
    assert torch.allclose(profile.keep, torch.stack(each).mean(0), atol=1e-12)
    spread = torch.tensor(json.loads(metadata["spread"]), dtype=torch.float64)
    assert torch.allclose(spread, torch.stack(each).std(0), atol=1e-4)
    assert "spread" not in calibrate(models.build("llava_gqa"), samples()[:1], budgets=GRID).metadata


def test_a_path_is_not_written_into_the_profile(tmp_path):
    model = models.build("llava_mha")
    model.config._name_or_path = str(tmp_path / "my-model")
    assert calibrate(model, samples("llava_mha")[:1]).metadata["model"] == "my-model"
    model.config._name_or_path = "somebody/some-model"
    assert calibrate(model, samples("llava_mha")[:1]).metadata["model"] == "somebody/some-model"


def test_a_saved_profile_is_taken_by_the_cache(tmp_path):
    model = models.build("llava_gqa", "sdpa")
    calibrate(model, samples()).save(tmp_path / "p.safetensors")
    cache = PrefixKVCache(tmp_path / "p.safetensors", budget=0.4, config=model.config)
    output = model.generate(**samples()[0], past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert output.shape[1] == LENGTHS[0] + 3
    assert abs(sum(cache.stored_lengths()) / len(cache) / (LENGTHS[0] + 2) - 0.4) < 0.05


# What cannot change it.


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("queries", ["all", 42])  # 42: longer than the shortest row
def test_neither_order_nor_batching(family, queries):
    # float64, so that what a padded forward rounds otherwise than an unpadded one does not reach a float32.
    model = models.build(family, "sdpa", torch.float64)
    one_by_one = [cast(inputs, torch.float64) for inputs in samples(family)]
    profile = calibrate(model, one_by_one, budgets=GRID, queries=queries)
    backwards = calibrate(model, iter(one_by_one[::-1]), budgets=GRID[::-1], queries=queries)
    together = calibrate(model, [cast(models.batch(family, LENGTHS), torch.float64)], budgets=GRID, queries=queries)
    assert same_but_for_the_date(profile, backwards)
    assert (profile.keep - together.keep).abs().max() < 1e-9
    assert same_but_for_the_date(profile, together)


def same_but_for_the_date(one, other):
    fixed = [PrefixProfile(each.budgets, each.keep, {**each.metadata, "created": "then"}) for each in (one, other)]
    return fixed[0] == fixed[1]


def test_padding_on_the_right_is_padding():
    model = models.build("llava_gqa", "sdpa", torch.float64)
    padded = cast(models.batch("llava_gqa", LENGTHS), torch.float64)
    right = dict(padded)
    for name in ("input_ids", "attention_mask"):
        rows = [row.roll(length - LENGTHS[0]) for row, length in zip(padded[name], LENGTHS, strict=True)]
        right[name] = torch.stack(rows)
    left, right = calibrate(model, [padded], budgets=GRID), calibrate(model, [right], budgets=GRID)
    assert (left.keep - right.keep).abs().max() < 1e-9


def test_neither_labels_nor_training_mode():
    model = models.build("llava_gqa", "sdpa")
    plain = calibrate(model, samples()[:1], budgets=GRID)
    model.config.text_config.attention_dropout = 0.5
    for module in models.attention_modules(model):
        module.attention_dropout = 0.5
    model.train()
    model.model.vision_tower.eval()
    inputs = samples()[0]
    trained = calibrate(model, [{**inputs, "labels": inputs["input_ids"], "use_cache": False}], budgets=GRID)
    assert torch.equal(plain.keep, trained.keep)
    assert model.training and not model.model.vision_tower.training


# What it costs.


def test_no_keys_are_kept_and_nothing_is_left_behind():
    gc.collect()
    before = vars(AttentionInterface).get(compat.DOOR)
    model = models.build("llava_gqa", "sdpa")
    cache = ObservingCache(model.config, ranking=DEFAULT, max_bytes=2**20)
    seen = keys_of_updates(cache)
    model(**samples()[0], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == LENGTHS[0]
    assert len(seen) == len(cache.layers) and not any(each() is not None for each in seen)
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert not held
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert vars(AttentionInterface).get(compat.DOOR) is before


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
    assert calibrate(models.build("llava_gqa"), _fresh([])).metadata["samples"] == "3"


def _fresh(alive):
    for index, length in enumerate(LENGTHS):
        assert all(each() is None for each in alive)
        inputs = models.batch("llava_gqa", (length,), seed=index)
        alive.append(weakref.ref(inputs["pixel_values"]))
        yield inputs
        del inputs


# Failures.


def bad_sample():
    return {**samples()[0], "pixel_values": torch.zeros(1, 3, 8, 8)}


def test_a_bad_sample_is_reported_and_skipped():
    model = models.build("llava_gqa", "sdpa")
    reported = []
    mixed = [samples()[0], bad_sample(), "no sample", *samples()[1:]]
    profile = calibrate(model, mixed, budgets=GRID, on_error=lambda *seen: reported.append(seen))
    assert [index for index, _ in reported] == [1, 2]
    assert "got str" in str(reported[1][1])
    assert torch.equal(profile.keep, calibrate(model, samples(), budgets=GRID).keep)
    with pytest.warns(UserWarning, match="sample 0 was skipped"):
        calibrate(model, [bad_sample(), samples()[0]], budgets=GRID)


def test_a_sample_that_makes_no_numbers_is_skipped():
    model = models.build("llava_gqa", "sdpa")
    nan = {**samples()[0], "pixel_values": torch.full((1, 3, 16, 16), math.nan)}
    with pytest.warns(UserWarning, match="sample 0 was skipped: importance must be finite"):
        assert calibrate(model, [nan, samples()[1]], budgets=GRID).metadata["samples"] == "1"


def test_all_failed_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"all samples failed \(2\); the last one"):
            calibrate(models.build("llava_gqa"), [bad_sample(), bad_sample()])
    with pytest.raises(ValueError, match="there are no samples"):
        calibrate(models.build("llava_gqa"), [])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_what_ends_the_calibration(error, monkeypatch, tmp_path):
    state_file = tmp_path / "state.json"
    observed = []

    def observe_two(*args, **kwargs):
        if len(observed) == 2:
            raise error
        observed.append(1)
        return observe(*args, **kwargs)

    monkeypatch.setattr(calibrate_module, "observe", observe_two)
    with pytest.raises(type(error)):
        calibrate(models.build("llava_gqa"), samples(), state_file=state_file)
    assert len(json.loads(state_file.read_text())["samples"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_attention_that_never_comes_through_the_door(monkeypatch):
    model = models.build("llava_gqa")

    def own_attention(self, hidden_states, past_key_values=None, **_):
        if past_key_values is not None:
            shape = (*hidden_states.shape[:2], 2, -1)
            key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
            past_key_values.update(key, key, self.layer_idx)
        return hidden_states, None

    monkeypatch.setattr(type(models.attention_modules(model)[0]), "forward", own_attention)
    with pytest.raises(UnobservedAttentionError, match=r"layer 0 .*self_attn.*LlamaAttention.* never came through"):
        calibrate(model, samples())


def test_models_that_cannot_be_pruned_are_refused_before_any_sample():
    model = models.build("llava_gqa")
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="encoder-decoder"):
        calibrate(model, _explode())


def _explode():
    raise AssertionError("asked for a sample")
    yield


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": []}, "budgets is empty"),
        ({"budgets": [0.5, 0]}, "budget is 0"),
        ({"budgets": [1.5]}, "budget is 1.5"),
        ({"budgets": ["half"]}, "budget is 'half'"),
        ({"queries": 0}, "queries must be"),
        ({"queries": "some"}, "queries must be"),
        ({"queries": True}, "queries must be"),
        ({"average": "mean"}, "average must be"),
        ({"heads": "some"}, "heads must be"),
        ({"pooling": 2}, "pooling must be"),
        ({"value_norm": 1}, "value_norm must be"),
        ({"diversity": 1.5}, "diversity must be"),
        ({"novelty": -1}, "novelty must be"),
        ({"novelty": math.nan}, "novelty must be"),
        ({"sink": -1}, "sink must be"),
        ({"max_bytes": 0}, "max_bytes must be"),
        ({"state_file": "no/such/folder/state.json"}, "does not exist"),
        ({"metadata": {"samples": 3}}, "metadata: 'samples' is 3"),
        ({"metadata": "mine"}, "metadata: is of type str"),
        ({"metadata": {"queries": "7"}}, "metadata: 'queries' is written by the calibration"),
        ({"metadata": {"ranking": "mine"}}, "metadata: 'ranking' is written by the calibration"),
        ({"metadata": {"n_layers": "6"}}, "metadata: 'n_layers' is written by the calibration"),
    ],
)
def test_bad_arguments_are_refused_before_any_sample(options, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        calibrate(models.build("llava_gqa"), _explode(), **options)


def test_budgets_too_small_for_the_prompts_are_refused():
    with pytest.raises(ValueError, match=r"budget 0.01 cannot be calibrated on prompts of 40 to 61 tokens"):
        calibrate(models.build("llava_gqa"), samples(), budgets=[0.01, 0.5])
    with pytest.raises(ValueError, match="at least 21 tokens"):
        calibrate(models.build("llava_gqa"), samples(), budgets=[0.2, 0.5], sink=20)


# Going on.


def interrupted(monkeypatch, path, after=2, **options):
    """Calibrate, press Ctrl-C after some samples; the state file is what remains."""
    done = []

    def progress(count):
        done.append(count)
        if count == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(models.build("llava_gqa"), samples(), budgets=GRID, state_file=path, progress=progress, **options)
    return done


def test_resume_goes_on_where_it_stopped(monkeypatch, tmp_path):
    path = tmp_path / "state.json"
    interrupted(monkeypatch, path)
    seen = []
    monkeypatch.setattr(calibrate_module, "observe", lambda *args, **kw: seen.append(1) or observe(*args, **kw))
    done = []
    options = {"budgets": GRID, "state_file": path, "resume": True, "progress": done.append}
    profile = calibrate(models.build("llava_gqa"), samples(), **options)
    assert len(seen) == 1 and done == [1, 2, 3]
    assert not path.exists()
    assert same_but_for_the_date(profile, calibrate(models.build("llava_gqa"), samples(), budgets=GRID))


def test_without_resume_it_starts_over(monkeypatch, tmp_path):
    path = tmp_path / "state.json"
    path.write_text("left over")
    assert calibrate(models.build("llava_gqa"), samples(), state_file=path).metadata["samples"] == "3"
    assert not path.exists()


def test_resume_without_a_state_starts_from_the_first_sample(tmp_path):
    profile = calibrate(models.build("llava_gqa"), samples(), state_file=tmp_path / "none.json", resume=True)
    assert profile.metadata["samples"] == "3"


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ("budgets", "budgets"),
        ("queries", "queries"),
        ("novelty", "ranking"),
        ("heads", "ranking"),
        ("weights", "weights"),
        ("family", "config"),
    ],
)
def test_the_state_of_another_calibration_is_refused(monkeypatch, tmp_path, changed, field):
    path = tmp_path / "state.json"
    interrupted(monkeypatch, path)
    kept = path.read_bytes()
    options = {"budgets": GRID, "queries": 32}
    model = models.build("llava_mha" if changed == "family" else "llava_gqa")
    if changed == "weights":
        model.get_input_embeddings().weight.data[0, 0] += 1
    elif changed != "family":
        options[changed] = {"budgets": [0.5], "queries": "all", "novelty": 0, "heads": "max"}[changed]
    with pytest.raises(ValueError, match=rf"another calibration, whose {field} was"):
        calibrate(model, _explode(), state_file=path, resume=True, **options)
    assert path.read_bytes() == kept


EMPTY_STATE = {"format": "prefixkv-calibration-state", "format_version": 1, "fingerprint": {}, "samples": {}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": "prefixkv-calibration-state"}',
        json.dumps({**EMPTY_STATE, "format": "other"}),
        json.dumps({**EMPTY_STATE, "format_version": 2}),
        json.dumps({**EMPTY_STATE, "samples": {"a": []}}),
        json.dumps({**EMPTY_STATE, "samples": {"0": [5]}}),
        json.dumps({**EMPTY_STATE, "samples": {"0": [{"n_tokens": 4, "counts": [[5]]}]}}),
        json.dumps({**EMPTY_STATE, "samples": {"0": [{"n_tokens": "4", "counts": [[4]]}]}}),
    ],
)
def test_damaged_states_are_refused(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="no state of a calibration"):
        calibrate(models.build("llava_gqa"), _explode(), state_file=path, resume=True)


def test_the_state_is_written_every_few_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(state_module, "_SECONDS_BETWEEN_SAVES", 0.0)
    path = tmp_path / "state.json"
    lengths = []

    def progress(_):
        lengths.append(len(json.loads(path.read_text())["samples"]))

    calibrate(models.build("llava_gqa"), samples(), state_file=path, progress=progress)
    assert lengths == [1, 2, 3]
