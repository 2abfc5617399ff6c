"""Layers with a sliding window, pruned inside it: pruning equals masking (law 2), and positions stay true as it moves.

The reference stores every token of every layer; transformers' own masks hide what the window has moved past, and the
reference hides what the cache says is gone. At budget 1 such layers are transformers' own.
"""

import pytest
import torch

import compat
import zoo
import zoo_inputs
from double import float64
from prefixkv_cache import PrefixKVCache, PrefixProfile
from prefixkv_cache.methods import Method
from zoo import WINDOW
from zoo_reference import STEPS, Case

LENGTHS, BUDGET = (37, 29), 0.4
EVERY = ["mistral (sliding)", "idefics2 (sliding)"]
HYBRIDS = ["gemma3", "cohere2"]
METHODS = ["default:headroom=2;queries=6;context=0", "default:headroom=0;sink=2", "h2o:queries=6", "streaming"]


def case_of(model_type, attn, lengths=LENGTHS):
    model = zoo.tiny(model_type, attn)
    return Case(model, model_type, zoo_inputs.inputs(model_type, lengths, model), wide=True)


def by_head(config, n_layers, method):
    """A profile with lengths of its own for each key head."""
    heads = config.get_text_config(decoder=True).num_key_value_heads
    lean = torch.linspace(-0.2, 0.2, n_layers * heads, dtype=torch.float64).view(n_layers, heads)
    return PrefixProfile([BUDGET], (BUDGET + lean)[None], {"method": Method.parse(method).spell(full=True)})


def assert_pruning_equals_masking(case, cache):
    log, stored = [], []

    def watch():
        kept = {at: cache.kept_positions(at) for at, layer in enumerate(cache.layers) if hasattr(layer, "window")}
        log.append({at: each if each.ndim == 3 else each[:, None] for at, each in kept.items()})
        stored.append([max(layer.stored_by_head) for layer in cache.layers if hasattr(layer, "window")])

    ours = case.turns(cache, watch)
    reference, _ = case.reference(log)
    assert (ours - reference).abs().max() < 1e-9
    assert (ours - case.unpruned).abs().max() > 1e-3
    return log, stored


@pytest.mark.parametrize("attn", compat.BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", [*EVERY, *HYBRIDS])
def test_pruning_equals_masking_under_the_window(model_type, method, attn):
    with float64():
        case = case_of(model_type, attn)
        config = case.model.config
        cache = PrefixKVCache(budget=BUDGET, method=method, config=config, prune_sliding=model_type in HYBRIDS)
        log, stored = assert_pruning_equals_masking(case, cache)
    slide = [at for at, layer in enumerate(cache.layers) if layer.window == WINDOW]
    assert slide and (model_type in HYBRIDS) == (len(slide) < len(cache.layers))
    n, reach, headroom = case.inputs["input_ids"].shape[1], WINDOW - 1, cache.method.decode.headroom
    for at in slide:
        assert ((log[0][at] >= n - reach) | (log[0][at] < 0)).all(), "only what a later token may see"
        places = [place for place, layer in enumerate(cache.layers) if hasattr(layer, "window")]
        most = max(BUDGET * reach + 1, cache.method.protect.sink + 1) + headroom + 1
        for of_step in stored:
            assert of_step[places.index(at)] <= most + (headroom // 2)


@pytest.mark.parametrize("model_type", [*EVERY, "gemma3"])
def test_lengths_of_their_own(model_type):
    """Several segments; and where every layer slides, lengths that are found on the prompt."""
    with float64():
        case = case_of(model_type, "sdpa")
        config = case.model.config
        hybrid = model_type not in EVERY
        n_layers = len(PrefixKVCache(config=config).layers)
        profile = by_head(config, n_layers, "default:headroom=2")
        cache = PrefixKVCache(profile, BUDGET, config=config, prune_sliding=hybrid)
        assert_pruning_equals_masking(case, cache)
        assert any(len(layer.segments) > 1 for layer in cache.layers)
        if hybrid:
            with pytest.raises(ValueError, match="compares layers"):
                PrefixKVCache(budget=BUDGET, method="prefixkv", config=config, prune_sliding=True)
        else:
            cache = PrefixKVCache(budget=BUDGET, method="prefixkv:distance=3", config=config)
            assert_pruning_equals_masking(case, cache)


@pytest.mark.parametrize("length", [5, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1])
def test_prompts_about_as_long_as_the_window(length):
    with float64():
        case = case_of("mistral (sliding)", "sdpa", (length, length - 2))
        cache = PrefixKVCache(budget=BUDGET, method="default:headroom=0", config=case.model.config)
        assert_pruning_equals_masking(case, cache)


@pytest.mark.parametrize("model_type", [*EVERY, *HYBRIDS])
@pytest.mark.parametrize("attn", compat.BACKENDS)
def test_at_budget_one_they_are_transformers_own(model_type, attn):
    with float64():
        case = Case(case_of(model_type, attn).model, model_type, case_of(model_type, attn).inputs)
        for given in ({"config": case.model.config, "prune_sliding": True}, {"config": case.model.config}, {}):
            if not given and model_type in HYBRIDS:
                continue
            cache = PrefixKVCache(budget=1.0, **given)
            ours = case.greedy(case.inputs, cache, STEPS)
            assert torch.equal(ours.sequences, case.full.sequences)
            assert (torch.stack(ours.logits) - torch.stack(case.full.logits)).abs().max() < 1e-9


def test_a_long_answer_moves_the_window_past_the_prompt():
    with float64():
        case = case_of("mistral (sliding)", "sdpa", (30,))
        cache = PrefixKVCache(budget=0.5, method="default:headroom=1", config=case.model.config)
        case.greedy(case.inputs, cache, 3 * WINDOW)
    assert min(cache.kept_positions(0).flatten().tolist()) >= 30
    assert max(cache.stored_lengths()) <= 0.5 * (WINDOW - 1) + 2


@pytest.mark.parametrize("model_type", ["mistral (sliding)", "gemma3"])
@pytest.mark.parametrize("headroom", [0, 2])
def test_planned_steps_under_the_window(model_type, headroom):
    """As many steps as the plan knows, then more without it, then a turn with a plan of its own."""
    with float64():
        case, method = case_of(model_type, "sdpa"), f"default:headroom={headroom}"
        given = {"config": case.model.config, "prune_sliding": model_type in HYBRIDS, "method": method}
        planned, growing = (PrefixKVCache(budget=BUDGET, max_new_tokens=n, **given) for n in (STEPS - 2, None))
        log, _ = assert_pruning_equals_masking(case, planned)
        wanted, _ = assert_pruning_equals_masking(case, growing)
        for own, other in zip(log, wanted, strict=True):
            assert all(own[at].sort(-1)[0].equal(other[at].sort(-1)[0]) for at in other)


def test_what_cannot_be(tmp_path):
    config = zoo.tiny_config("mistral (sliding)")
    with pytest.raises(TypeError, match="prune_sliding must be True or False; got 1"):
        PrefixKVCache(config=config, prune_sliding=1)
    with pytest.raises(ValueError, match="needs the model's config"):
        PrefixKVCache(prune_sliding=True)
    model = zoo.tiny("mistral (sliding)", "sdpa")
    inputs = zoo_inputs.inputs("mistral (sliding)", (20,), model)
    with pytest.raises(ValueError, match=r"left whole \(sliding.*config=model.config"):
        model.generate(**inputs, past_key_values=PrefixKVCache(budget=0.5), max_new_tokens=2)
    cache = PrefixKVCache(budget=0.5, config=config)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="sliding window and is pruned inside it"):
        cache.save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())
