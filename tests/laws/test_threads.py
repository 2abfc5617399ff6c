"""Law 8 under threads, re-entrance and interruption: nothing is left behind, and nobody else notices.

Left behind would be: the attention hook where no cache is alive, an object that outlives its last user, or something
that stays with a thread. Interruptions come at lines of the library that stand between the model and its attention, as
Ctrl-C may: a trace function raises `KeyboardInterrupt` there.
"""

import gc
import itertools
import os
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import compat
import models
from prefixkv_cache import PrefixKVCache
from prefixkv_cache.cache import hook
from watch import make_profile

ORIGINAL = getattr(AttentionInterface, compat.LOOK_UP)
FAMILY = "llava_mha"
LAYERS, HEADS = 4, 4
FILES = {str(path) for path in Path(hook.__file__).parent.glob("*.py")}
STRIDE = 1 if "PREFIXKV_OPERATIONS" in os.environ else 12  # every so many lines are interrupted, all of them nightly


@pytest.fixture(autouse=True)
def nothing_left():
    """Before and after each test, the hook is not installed and this thread holds no key."""
    gc.collect()
    assert getattr(AttentionInterface, compat.LOOK_UP) is ORIGINAL
    yield
    gc.collect()
    assert getattr(AttentionInterface, compat.LOOK_UP) is ORIGINAL
    assert kept_by_thread() == []


def kept_by_thread():
    """Tensors that can be reached from what the library keeps for each thread."""
    reached, todo = {}, list(vars(hook._this_thread).values())
    while todo:
        thing = todo.pop()
        if id(thing) not in reached and not isinstance(thing, (type, type(sys))):
            reached[id(thing)] = thing
            todo.extend(gc.get_referents(thing))
    return [thing for thing in reached.values() if isinstance(thing, torch.Tensor)]


def text(length, seed=0, rows=1):
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


METHOD = "prefixkv:distance=5;queries=8"


def make_cache(source, **options):
    if source == "searched":
        return PrefixKVCache(None, 0.35, method=METHOD, **options)
    return PrefixKVCache(make_profile(LAYERS, HEADS, METHOD), 0.35, **options)


def generate(model, cache, seed=0, n=6, length=30):
    """Logits [n, vocabulary] of a prompt and n - 1 steps."""
    inputs, logits = text(length, seed), []
    for step in range(n):
        ids = inputs if step == 0 else text(1, seed + step)
        with torch.no_grad():
            logits.append(model(input_ids=ids, past_key_values=cache).logits[0, -1])
    return torch.stack(logits)


def together(*jobs):
    """What each job gives when all run at once, each in a thread of its own."""
    results, start = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(index):
        start.wait()
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error
        assert kept_by_thread() == []

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # many times in each forward
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# Threads.


@pytest.mark.parametrize("shared", [False, True], ids=["two_models", "one_model"])
@pytest.mark.parametrize("attn", compat.BACKENDS)
def test_two_threads_each_as_alone(attn, shared):
    first = models.shared(FAMILY, attn)
    second = first if shared else models.shared("llava_gqa", attn)
    depth = LAYERS if shared else 6
    jobs = [
        lambda: generate(first, make_cache("by_head"), seed=1, n=6),
        lambda: generate(second, PrefixKVCache(make_profile(depth), 0.5), seed=2, n=6),
        lambda: generate(second, PrefixKVCache(budget=0.3), seed=3, n=6),
        lambda: generate(first, DynamicCache(), seed=4, n=6),
    ]
    alone = [job() for job in jobs]
    for logits, wanted in zip(together(*jobs), alone, strict=True):
        assert torch.equal(logits, wanted)


def test_caches_that_come_and_go_in_threads():
    """The hook comes and goes all the time, in one thread while another calls it."""
    model = models.shared(FAMILY, "sdpa")
    wanted = {source: generate(model, make_cache(source), n=2, length=8) for source in ("by_head", "searched")}

    def work():
        for _ in range(5):
            for source, logits in wanted.items():
                assert torch.equal(generate(model, make_cache(source), n=2, length=8), logits)

    together(*[work] * 4)


def test_a_cache_may_go_on_in_another_thread_and_be_dropped_there():
    model = models.shared(FAMILY, "sdpa")
    wanted = generate(model, make_cache("by_head"), n=2)
    caches = [make_cache("by_head")]
    logits = []
    for step in range(2):
        logits += together(
            lambda step=step: model(input_ids=text(30 if step == 0 else 1, step), past_key_values=caches[0])
        )
    together(caches.clear)
    assert torch.equal(torch.stack([output.logits[0, -1] for output in logits]), wanted)


# Re-entrance.


@pytest.mark.parametrize("same", [False, True], ids=["another_model", "the_same_model"])
@pytest.mark.parametrize("source", ["by_head", "searched"])
def test_a_forward_within_a_forward(source, same):
    """In a layer of one model, after its cache was updated and before its attention, another cache does its work."""
    outer = models.build(FAMILY, "sdpa")
    inner = outer if same else models.build(FAMILY, "sdpa")
    wanted_outer, wanted_inner = generate(outer, make_cache(source), 1), generate(inner, make_cache(source), 2)
    seen, busy = [], []

    class Interposed(PrefixKVCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            result = super().update(keys, values, layer_idx, *args, **kwargs)
            if layer_idx == 2 and not busy:
                busy.append(True)
                seen.append(generate(inner, make_cache(source), 2))
                busy.pop()
            return result

    profile = make_profile(LAYERS, HEADS, METHOD) if source == "by_head" else None
    logits = generate(outer, Interposed(profile, 0.35, method=None if profile else METHOD), 1)
    assert torch.equal(logits, wanted_outer)
    assert len(seen) == 6 and all(torch.equal(each, wanted_inner) for each in seen)


def test_a_cache_dropped_between_its_update_and_the_attention():
    """The keys that it handed out are then plain keys."""
    keys = torch.randn(1, 2, 9, 4)

    class Module:
        layer_idx, config = 0, models.weights(FAMILY).config.text_config

    def backend(module, query, key, value, mask, **_):
        return key, mask

    bystander = make_cache("searched")  # holds the hook
    bystander.update(keys, keys, 0)
    cache = make_cache("searched")
    handed, _ = cache.update(keys, keys, 0)
    gone = weakref.ref(cache)
    look_up = getattr(AttentionInterface(), compat.LOOK_UP)
    attend = look_up("eager", backend) if compat.SEES_EAGER else look_up("sdpa")
    del cache
    gc.collect()
    assert gone() is None
    if compat.SEES_EAGER:
        shown, mask = attend(Module(), keys, handed, keys, None)
        assert shown is handed and mask is None


def test_a_cache_dropped_in_the_middle_of_generation():
    """Whoever consumes a generation may stop: all that was held for it goes with it."""
    model = models.build(FAMILY, "sdpa")

    def tokens():
        cache = make_cache("by_head")
        alive.append(weakref.ref(cache))
        for step in itertools.count():
            logits = model(input_ids=text(30 if step == 0 else 1, step), past_key_values=cache).logits
            alive.extend(weakref.ref(layer) for layer in cache.layers[-1:])
            yield int(logits[0, -1].argmax())

    alive = []
    going = tokens()
    for _ in range(5):
        next(going)
    assert getattr(AttentionInterface, compat.LOOK_UP) is not ORIGINAL
    del going
    gc.collect()
    assert all(each() is None for each in alive)


# Interruptions.


class Interrupt:
    """Within `with Interrupt(code, line):` a `KeyboardInterrupt` is raised the first time that this line is reached."""

    def __init__(self, at=None):
        self.at, self.passed = at, []

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _call(self, frame, event, _):
        if frame.f_code.co_filename in FILES:
            return self._line
        return None

    def _line(self, frame, event, _):
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line":
            if self.at is None:
                self.passed.append(place)
            elif place == self.at:
                raise KeyboardInterrupt
        return self._line


@pytest.mark.skipif(sys.gettrace() is not None, reason="somebody else is tracing")
@pytest.mark.parametrize("source", ["by_head", "searched"])
@pytest.mark.parametrize("when", ["prompt", "step"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside_another"])
def test_an_interruption_at_any_line(source, when, alone):
    """Alone: nothing is left once the cache is dropped. Beside another: both go on, this one after `reset`."""
    model, other = models.build(FAMILY, "sdpa"), models.build(FAMILY, "sdpa")
    wanted = generate(model, make_cache(source), n=3)
    ids = text(30) if when == "prompt" else text(1, 1)

    def forward(interrupt):
        """Whether it was interrupted. The second cache holds the hook, so that other lines are passed."""
        bystander = None if alone else make_cache(source)
        if bystander is not None:
            logits = [other(input_ids=text(30), past_key_values=bystander).logits[0, -1]]
        cache, interrupted = make_cache(source), False
        if when == "step":
            model(input_ids=text(30), past_key_values=cache)
        try:
            with interrupt:
                model(input_ids=ids, past_key_values=cache)
        except KeyboardInterrupt:
            interrupted = True
        if bystander is not None:
            logits += [other(input_ids=text(1, step), past_key_values=bystander).logits[0, -1] for step in (1, 2)]
            assert torch.equal(torch.stack(logits), wanted)
            cache.reset()
            assert torch.equal(generate(model, cache, n=3), wanted)
        return interrupted

    everything = Interrupt()
    assert not forward(everything)
    lines = sorted(set(everything.passed))
    assert len(lines) > 100
    for at in lines[(4 * (source == "searched") + 2 * alone + (when == "step")) % STRIDE :: STRIDE]:
        assert forward(Interrupt(at)), at
        if (
            getattr(AttentionInterface, compat.LOOK_UP) is not ORIGINAL
        ):  # a traceback may still hold the cache in a cycle
            gc.collect()
        assert getattr(AttentionInterface, compat.LOOK_UP) is ORIGINAL, at
        assert kept_by_thread() == [], at
