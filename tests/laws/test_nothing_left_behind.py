"""Law 8: after the last cache transformers is as it was, a reset cache is like new, and failures harm nobody else.

Threads, re-entrance and interruptions at any line are in test_threads.py.
"""

import gc
import itertools
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import compat
import models
from models import PADDED
from oracle import feed
from prefixkv_cache import PrefixKVCache
from watch import Case, Watch, run, talk

CASES = [
    Case("prefixkv:distance=5"),
    Case("default:headroom=6", profile="head"),
    Case("h2o", "gemma3", profile="layer"),
    Case("snapkv:lengths=pool;queries=8", "llava_mha"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def transformers_state(*and_models):
    """Everything of transformers (and of these models) that a hook could have been fixed to."""
    places = [AttentionInterface, AttentionMaskInterface, transformers.Cache, DynamicCache, *AttentionInterface.__mro__]
    places += [transformers.modeling_utils, transformers.masking_utils, transformers.cache_utils]
    state = {(str(place), name): value for place in places for name, value in vars(place).items() if callable(value)}
    for interface in (AttentionInterface, AttentionMaskInterface):
        state.update({(str(interface), name): value for name, value in interface._global_mapping.items()})
    state["bound"] = getattr(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, compat.LOOK_UP)
    for model in and_models:
        for name, module in model.named_modules():
            state[name] = (module.__class__, module.__class__.forward, sorted(vars(module)))
            state[name, "hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
    return state


NO_CACHE_ALIVE = transformers_state()


@each_case
def test_after_the_last_cache_transformers_is_as_it_was(case):
    gc.collect()
    model = models.build(case.family, case.attn)
    feed(model, case.prompt(), models.words(3, 2), DynamicCache(config=model.config))  # it has hooks of its own to set
    before = transformers_state(model)
    caches = [case.cache(), case.cache()]
    for cache in caches:
        feed(model, case.prompt(), models.words(3, 5), cache)
    del caches, cache
    gc.collect()
    assert transformers_state(model) == before
    assert transformers_state() == NO_CACHE_ALIVE


def test_importing_changes_nothing():
    script = """
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers import masking_utils, modeling_utils
def state():
    places = [*AttentionInterface.__mro__, *DynamicCache.__mro__, modeling_utils, masking_utils]
    found = [(str(at), name, id(value)) for at in places for name, value in vars(at).items() if callable(value)]
    return found + sorted(AttentionInterface._global_mapping) + sorted(AttentionMaskInterface._global_mapping)
before = state()
import prefixkv_cache
prefixkv_cache.PrefixKVCache, prefixkv_cache.PrefixProfile
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_case
def test_reset_is_like_new(case):
    alone = Case(case.method, case.family, case.attn, (44,), case.profile, turns=(12, 4))
    logits, watch = run(alone)
    cache = case.cache()
    feed(case.model, case.prompt(), models.words(3, 20), cache)
    for _again in range(2):
        cache.reset()
        assert cache.get_seq_length() == 0 and not any(cache.stored_lengths()) and cache.nbytes == 0
        again, after_reset = run_again(alone, cache)
        assert torch.equal(again, logits)
        assert (after_reset.kept, after_reset.lengths, after_reset.seen) == (watch.kept, watch.lengths, watch.seen)


def run_again(case, cache):
    watch = Watch(cache, case.family)
    return talk(case.model, case, cache, watch)[0], watch


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at_forward", [0, 1, 4], ids=["prompt", "first_step", "later"])
@each_case
def test_an_exception_in_a_forward_harms_nobody_else(case, at_forward):
    inputs, tokens, forwards = case.prompt(), models.words(3, 8), itertools.count()
    failing, failed = models.build(case.family, case.attn), case.cache()

    def two_turns(model, cache, between=lambda: None):
        first, sequences = feed(model, inputs, tokens, cache)
        between()
        second, _ = feed(model, models.next_turn(inputs, sequences, 9), tokens, cache)
        return torch.cat([first, second], dim=1)

    def interrupt(*_):
        if next(forwards) == at_forward:
            raise Interrupted

    def fail():
        hook = models.attention_modules(failing)[2].register_forward_hook(interrupt)
        with pytest.raises(Interrupted):
            feed(failing, inputs, tokens, failed)
        hook.remove()

    wanted = two_turns(case.model, case.cache())
    assert torch.equal(two_turns(case.model, case.cache(), fail), wanted)
    assert torch.equal(two_turns(failing, case.cache()), wanted)
    failed.reset()
    assert torch.equal(two_turns(failing, failed), wanted)


def test_an_exception_keeps_nothing_alive():
    gc.collect()
    case = Case("prefixkv", profile="head")
    model, cache = models.build(case.family), case.cache()

    def interrupt(*_):
        raise Interrupted

    models.attention_modules(model)[2].register_forward_hook(interrupt)
    raised = False
    try:  # not pytest.raises, which keeps the traceback and with it the cache
        feed(model, case.prompt(), models.words(3, 3), cache)
    except Interrupted:
        raised = True
    assert raised
    del cache
    gc.collect()
    assert transformers_state() == NO_CACHE_ALIVE


@pytest.mark.parametrize("source", ["layer", "head", None])
def test_an_interrupted_prompt_is_not_gone_on_with(source):
    case = Case("prefixkv", profile=source, lengths=(40,), turns=(3,))
    model, cache = models.build(case.family, case.attn), case.cache()

    def stop(*_):
        raise KeyboardInterrupt

    handle = models.attention_modules(model)[3].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        feed(model, case.prompt(), models.words(1, 3), cache)
    handle.remove()
    with pytest.raises(RuntimeError, match="reset"):
        model(input_ids=models.words(1, 1), past_key_values=cache)
    cache.reset()
    assert torch.equal(feed(model, case.prompt(), models.words(1, 3), cache)[0], run(case)[0])


def test_an_interruption_while_the_hook_is_installed(monkeypatch):
    """Ctrl-C right then: the next cache installs it, and the last one removes it."""
    from prefixkv_cache.cache import hook

    before = getattr(AttentionInterface, compat.LOOK_UP)
    keys = torch.zeros(1, 1, 2, 2)

    def interrupted(*_):
        raise KeyboardInterrupt

    for name in ("setattr", "_wrap"):
        cache = PrefixKVCache()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(hook, name, interrupted, raising=False)
            cache.update(keys, keys, 0)
        assert getattr(AttentionInterface, compat.LOOK_UP) is before
        cache.update(keys, keys, 0)
        assert getattr(AttentionInterface, compat.LOOK_UP) is not before
        del cache
        assert getattr(AttentionInterface, compat.LOOK_UP) is before


@each_case
def test_other_caches_on_the_same_model_are_untouched(case):
    """Ours and DynamicCache by turns, step by step, on one model."""
    inputs = models.batch(case.family)
    steps = [{key: inputs[key] for key in ("input_ids", "pixel_values")}]
    steps += [{"input_ids": models.words(1, 1, seed=step)} for step in range(8)]
    if "token_type_ids" in inputs:
        steps[0]["token_type_ids"] = inputs["token_type_ids"]

    def decode(*caches):
        return [[case.model(**step, past_key_values=cache).logits for cache in caches] for step in steps]

    theirs, ours = decode(DynamicCache(config=case.model.config)), decode(case.cache())
    mixed = decode(DynamicCache(config=case.model.config), case.cache())
    for (among_theirs, among_ours), their_own, our_own in zip(mixed, theirs, ours, strict=True):
        assert torch.equal(among_theirs, their_own[0]) and torch.equal(among_ours, our_own[0])


def test_another_batch_shape_does_not_matter():
    """Padded and unpadded prompts one after another through one cache that is reset."""
    case = Case("default:headroom=6", profile="head", turns=(6,))
    cache = case.cache()
    for lengths in (PADDED, (61,), (44, 61)):
        other = Case(case.method, lengths=lengths, profile="head", turns=(6,))
        assert torch.equal(run_again(other, cache)[0], run(other)[0])
        cache.reset()
