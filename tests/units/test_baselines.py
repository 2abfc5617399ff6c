"""Other people's methods against their papers' rules, written down slowly in `rules.py`.

Each method runs beside the rules, on models with a key head for each query head, with shared key heads, and with M-RoPE
positions: what is kept after the prompt and after every decode step, what is merged into what, and the logits, which
are those of a full cache where each key head sees only what it holds. The laws of `test_laws.py` hold for all of them.
"""

import copy
import functools
import gc
import math
from dataclasses import dataclass, field

import pytest
import torch
from transformers import DynamicCache

import compat
import models
from models import PADDED
from oracle import Given, Oracle, feed
from prefixkv_cache import PrefixKVCache
from prefixkv_cache.baselines import (
    BASELINES,
    ElasticCache,
    H2OCache,
    PyramidKVCache,
    RandomCache,
    SnapKVCache,
    StreamingLLMCache,
    UniformCache,
)
from rules import Rules, pyramid, staggered_count
from watch import CLOSE, Watch, beams_are_true, build, follow, greedy, masked, prompt, rows_alone_are, run, talk

FAMILIES = ("llava_mha", "llava_gqa", "qwen2_5_vl")
STEPS = 41  # forward passes: the prompt and 40 tokens


@dataclass(frozen=True)
class Method:
    """A class with some of its arguments, and what its paper says as `Rules`."""

    name: str
    kind: type
    rules: dict = field(hash=False)
    options: dict = field(hash=False, default_factory=dict)

    def __str__(self):
        return self.name

    def cache(self, family, budget=0.4, **more):
        return self.kind(budget=budget, config=models.weights(family).config, **{**self.options, **more})

    def by_rules(self, budget=0.4, **more):
        return Rules(**{"budget": budget, "lengths": "uniform", **self.rules, **more})

    @property
    def evicts(self):
        return self.rules.get("distance", 25) is not None


H2O = dict(queries="all", heads="each", evict="least-important", recent=0.5, sink=0)
SNAPKV = dict(queries=32, recent=32, heads="each", pooling=7, distance=None)
METHODS = [
    Method("elastic-kv", ElasticCache, dict(queries="all", merge="kv")),
    Method("elastic-value", ElasticCache, dict(queries="all", merge="value"), dict(merge="value")),
    Method("elastic-none", ElasticCache, dict(queries="all"), dict(merge=None)),
    Method("elastic-published", ElasticCache, dict(queries="all", merge="kv", as_published=True),
           dict(as_published=True)),
    Method("h2o", H2OCache, H2O),
    Method("h2o-published", H2OCache, {**H2O, "as_published": True}, dict(as_published=True)),
    Method("streaming", StreamingLLMCache, dict(newest_first=True, evict="oldest", sink=4)),
    Method("snapkv", SnapKVCache, {**SNAPKV, "queries": 12, "recent": 12}, dict(window=12)),
    Method("snapkv-evicting", SnapKVCache, {**SNAPKV, "queries": 8, "recent": 8, "distance": 25},
           dict(window=8, distance=25)),
    Method("pyramid", PyramidKVCache, {**SNAPKV, "queries": 8, "recent": 8, "lengths": "pyramid"}),
    Method("uniform", UniformCache, dict(queries="all")),
    Method("random", RandomCache, dict(at_prompt="as the cache did")),
]  # fmt: skip
BY_NAME = {method.name: method for method in METHODS}
each_method = pytest.mark.parametrize("method", METHODS, ids=str)
each_family = pytest.mark.parametrize("family", FAMILIES)
HEADS_OF_THEIR_OWN = [BY_NAME[name] for name in ("h2o", "snapkv", "snapkv-evicting")]
each_with_heads = pytest.mark.parametrize("method", HEADS_OF_THEIR_OWN, ids=str)


def backend(method, family):
    """Eager for half of the pairs of method and model, sdpa for the other half."""
    return compat.seen(("eager", "sdpa")[(METHODS.index(method) + FAMILIES.index(family)) % 2])


def test_every_class_is_tested():
    assert {method.kind for method in METHODS} == set(BASELINES.values())


# What is kept, merged and computed: laws 2 and 5.


@functools.cache
def unpruned(family):
    model = build(family)
    return talk(model, family, PADDED, DynamicCache(config=model.config), STEPS)[0]


@functools.cache
def followed(method, family):
    return follow(family, backend(method, family), PADDED, method.cache(family), method.by_rules(), STEPS)


@each_family
@each_method
def test_law_2_it_does_what_its_paper_says(method, family):
    """Positions, step by step and head by head; merged pairs; logits of the full cache that is masked accordingly."""
    logits, watch = followed(method, family)
    assert (logits - unpruned(family)).abs().max() > 1e-2, "nothing was pruned: the test shows nothing"
    heads_differ = any(row[0] != row[1] for rows in watch.kept[0].values() for row in rows)
    assert heads_differ == (method.rules.get("heads") == "each")


@pytest.mark.parametrize("name", ["h2o", "elastic-kv", "snapkv-evicting", "streaming"])
@pytest.mark.parametrize("budget", [0.1, 0.75])
def test_law_2_at_other_budgets(name, budget):
    method = BY_NAME[name]
    follow("llava_gqa", "sdpa", (44,), method.cache("llava_gqa", budget), method.by_rules(budget), 30)


@pytest.mark.parametrize("name", ["h2o", "elastic-kv", "elastic-published", "snapkv-evicting", "streaming", "pyramid"])
def test_law_2_in_a_second_turn(name):
    """A later prompt is pruned by the same ratios over its own tokens, and its first token is no sink."""
    method = BY_NAME[name]
    family = "qwen2_5_vl" if name == "h2o" else "llava_gqa"
    follow(family, "sdpa", PADDED, method.cache(family), method.by_rules(), 14, turns=2)


@pytest.mark.parametrize("lengths", [(3,), (9, 2, 1)], ids=str)
@each_method
def test_very_short_prompts(method, lengths):
    """Windows and sinks that are longer than the prompt or than what is kept of it."""
    follow("llava_gqa", "sdpa", lengths, method.cache("llava_gqa", 0.3), method.by_rules(0.3), 12)


@pytest.mark.parametrize("options", [dict(recent=0.25), dict(recent=0.9), dict(sink=4, queries=1), dict(heads="mean"),
                                     dict(heads="max", lengths="search"), dict(slack=5), dict(average="visible")],
                         ids=str)  # fmt: skip
def test_h2o_with_other_arguments(options):
    follow("llava_gqa", "sdpa", (61,), H2OCache(0.3, **options), BY_NAME["h2o"].by_rules(0.3, **options), 30)


@pytest.mark.parametrize("budget", [0.3, 0.7])  # less than the default window, and more
@pytest.mark.parametrize("options", [{}, dict(window=4, pooling=3), dict(window=50, pooling=1), dict(window=8, sink=0)],
                         ids=str)  # fmt: skip
def test_snapkv_with_other_arguments(options, budget):
    window = options.get("window", 32)
    rules = {"queries": window, "recent": window, **{name: options[name] for name in options if name != "window"}}
    cache = SnapKVCache(budget, **options)
    follow("llava_gqa", compat.PLAIN, (61,), cache, BY_NAME["snapkv"].by_rules(budget, **rules), 4)


@each_family
@each_method
def test_law_5_counts_are_exact(method, family):
    _, watch = followed(method, family)
    n_layers, sink = len(watch.layers), method.rules.get("sink", 1)
    ratios = pyramid(0.4, n_layers) if method.name == "pyramid" else [0.4] * n_layers
    assert sum(ratios) / n_layers == pytest.approx(0.4)
    for row, length in enumerate(PADDED):
        together = sum(rows[row] for rows in watch.counts()[0].values())
        assert abs(together - 0.4 * n_layers * length) <= (0.5 if method.name != "pyramid" else n_layers / 2)
    for step, counts in enumerate(watch.counts()):
        for layer, ratio in zip(watch.layers, ratios, strict=True):
            for length, stored in zip(PADDED, counts[layer], strict=True):
                at_prompt = staggered_count(length, ratio, watch.layers.index(layer), n_layers, sink)
                if step == 0:
                    assert stored == at_prompt
                elif method.evicts:
                    assert stored - (length + step) * ratio < 1 + 1e-9
                    assert stored >= at_prompt
                else:
                    assert stored == at_prompt + step


# Laws 1, 3, 4, 6 and 8.


@each_method
def test_law_1_with_the_whole_budget_nothing_changes(method):
    family, lengths = FAMILIES[(METHODS.index(method) + 1) % 3], PADDED[:2]
    model = build(family, backend(method, family))
    ours, theirs = method.cache(family, 1.0), DynamicCache(config=model.config)
    inputs = prompt(family, lengths)
    for _turn in range(2):
        wanted_ids, wanted = greedy(model, inputs, theirs)
        ids, logits = greedy(model, inputs, ours)
        assert torch.equal(ids, wanted_ids)
        assert (logits - wanted).abs().max() < 1e-5
        inputs = models.next_turn(inputs, ids, 9)
    assert ours.stored_lengths() == [ours.get_seq_length()] * len(ours.layers)


@each_method
def test_law_3_a_batch_is_its_members(method):
    family = FAMILIES[METHODS.index(method) % 3]
    attn = backend(method, family)
    logits, watch = run(family, attn, PADDED, method.cache(family), 10, turns=2)
    rows_alone_are(family, attn, PADDED, lambda _: method.cache(family), logits, watch, 10, turns=2)


@pytest.mark.parametrize("method", [method for method in METHODS if "published" not in method.name], ids=str)
def test_law_4_more_budget_never_keeps_less(method):
    family, smaller = "llava_gqa", None
    for budget in (0.1, 0.33, 0.5, 0.6, 0.9, 1.0):
        kept = run(family, "sdpa", PADDED, method.cache(family, budget), 1)[1].kept[0]
        for layer in smaller or ():
            for row in range(len(PADDED)):
                for less, more in zip(smaller[layer][row], kept[layer][row], strict=True):
                    assert set(less) <= set(more), f"budget {budget}, layer {layer}, row {row}"
        smaller = kept


def after_twelve(method, family, **changes):
    model, cache = build(family, "sdpa"), method.cache(family, **changes)
    inputs = prompt(family, PADDED)
    _, sequences = feed(model, inputs, models.words(3, 12), cache)
    return model, inputs, sequences, cache


def go_on(model, inputs, sequences, cache, rows=(0, 1, 2)):
    """A next turn and 15 tokens; the words follow the row that they belong to."""
    rows = list(rows)
    again = {key: value[rows] for key, value in models.next_turn(inputs, sequences, 9).items()}
    return feed(model, again, models.words(len(sequences), 15, seed=11)[rows], cache)[0]


@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
@each_with_heads
def test_rows_that_move_take_their_heads_with_them(method, operation):
    rows, argument = {
        "reorder_cache": ([2, 0, 2], torch.tensor([2, 0, 2])),
        "batch_select_indices": ([0, 2], torch.tensor([0, 2])),
        "batch_repeat_interleave": ([0, 0, 1, 1, 2, 2], 2),
    }[operation]
    wanted = go_on(*after_twelve(method, "llava_gqa"))
    model, inputs, sequences, cache = after_twelve(method, "llava_gqa")
    getattr(cache, operation)(argument)
    assert (go_on(model, inputs, sequences, cache, rows) - wanted[rows]).abs().max() < CLOSE


@each_with_heads
def test_rows_that_move_in_the_middle_of_decoding(method):
    """Sums of attention and decode rules, too, are the row's own: 20 more tokens give what the rows give alone."""
    family, rows = "llava_mha", [1, 1, 0]
    model, inputs, sequences, cache = after_twelve(method, family)
    cache.reorder_cache(torch.tensor(rows))
    tokens = models.words(3, 30, seed=5)
    ids = torch.cat([sequences[rows], tokens], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :61] = inputs["attention_mask"][rows]
    moved = model_steps(model, ids, mask, cache)
    for row, was in enumerate(rows):
        single = method.cache(family)
        alone = {key: value[was : was + 1] for key, value in inputs.items()}
        feed(model, alone, models.words(3, 12)[was : was + 1], single)
        wanted = model_steps(model, ids[row : row + 1], mask[row : row + 1], single)
        assert (moved[row] - wanted[0]).abs().max() < CLOSE


def model_steps(model, ids, mask, cache):
    """Logits of single-token forwards, from where the cache is to the end."""
    logits = []
    for at in range(cache.get_seq_length(), ids.shape[1]):
        so_far = mask[:, : at + 1]
        place = {"attention_mask": so_far, "position_ids": so_far.sum(1, keepdim=True) - 1}
        logits.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache, **place).logits)
    return torch.cat(logits, dim=1)


@each_with_heads
def test_a_deep_copy_goes_on_by_itself(method):
    wanted = go_on(*after_twelve(method, "qwen2_5_vl"))
    model, inputs, sequences, cache = after_twelve(method, "qwen2_5_vl")
    twin = copy.deepcopy(cache)
    assert torch.equal(go_on(model, inputs, sequences, cache), wanted)
    del cache
    gc.collect()
    assert torch.equal(go_on(model, inputs, sequences, twin), wanted)


@pytest.mark.parametrize("method", [BY_NAME["elastic-kv"], BY_NAME["streaming"], *HEADS_OF_THEIR_OWN], ids=str)
def test_law_8_reset_is_like_new(method):
    family = "llava_gqa"
    logits, watch = run(family, "sdpa", (44,), method.cache(family), 20)
    cache = method.cache(family)
    run(family, "sdpa", PADDED, cache, 6)
    cache.reset()
    assert cache.get_seq_length() == 0 and not any(cache.stored_lengths())
    again, after_reset = run(family, "sdpa", (44,), cache, 20)
    assert torch.equal(again, logits)
    assert after_reset.kept == watch.kept


@each_with_heads
def test_beams_are_true(method):
    beams_are_true("llava_gqa", lambda: method.cache("llava_gqa"), n_beams=3, new=15)


def test_snapkv_crop_takes_the_last_tokens_back():
    """Where nothing has left while decoding, heads of their own have lost the same tokens."""
    method = BY_NAME["snapkv"]
    model, inputs, sequences, cache = after_twelve(method, "llava_gqa")
    cache.crop(-3)
    shorter = method.cache("llava_gqa")
    feed(model, inputs, models.words(3, 9), shorter)
    assert cache.get_seq_length() == shorter.get_seq_length()
    wanted = go_on(model, inputs, sequences[:, :-3], shorter)
    assert (go_on(model, inputs, sequences[:, :-3], cache) - wanted).abs().max() < 1e-5


def test_h2o_crop_leaves_true_positions():
    """Each head has lost the same three newest; what is left is what the cache says, and law 2 goes on to hold."""
    family, method = "llava_gqa", BY_NAME["h2o"]
    watch, model, inputs = Watch(method.cache(family), family), build(family, "sdpa"), prompt(family, PADDED)
    _, sequences = feed(model, inputs, models.words(3, 12), watch.cache, watch)
    watch.cache.crop(-3)
    del watch.kept[-1]
    watch()
    assert watch.cache.get_seq_length() == 61 + 11 - 3
    again = models.next_turn(inputs, sequences[:, :-3], 9)
    logits, _ = feed(model, again, models.words(3, 12, seed=8), watch.cache, watch)

    oracle = Oracle(build(family), Given(watch.kept))
    feed(oracle.model, inputs, models.words(3, 12), oracle.cache)
    oracle.cache.crop(-3)
    wanted, _ = feed(oracle.model, again, models.words(3, 12, seed=8), oracle.cache)
    assert (logits - wanted).abs().max() < CLOSE


def test_h2o_crop_of_what_heads_hold_differently_is_refused():
    """Nearly no window here, so that some head has let one of the newest go."""
    *_, cache = after_twelve(BY_NAME["h2o"], "llava_gqa", recent=0.01)
    with pytest.raises(ValueError, match=r"(?s)11.*heads.*reset\(\)"):
        cache.crop(-11)


@pytest.fixture
def uncompiled():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", ["h2o", "snapkv-evicting"])
def test_heads_of_their_own_under_flex_attention(uncompiled, name):
    method, family = BY_NAME[name], "llava_gqa"
    logits, watch = run(family, "flex_attention", PADDED, method.cache(family), 4, turns=2)
    assert (logits - masked(family, PADDED, watch, 4, turns=2)).abs().max() < CLOSE


@pytest.mark.parametrize("name", ["snapkv-evicting", "streaming", "elastic-kv"])
def test_steps_that_are_planned_are_the_same_steps(name):
    """With `max_new_tokens` all slots are decided at the prompt's end."""
    method, family = BY_NAME[name], "llava_gqa"
    logits, watch = run(family, "sdpa", PADDED, method.cache(family), 12, turns=2)
    by_plan, planned = run(family, "sdpa", PADDED, method.cache(family, max_new_tokens=12), 12, turns=2)
    assert planned.kept == watch.kept
    assert (by_plan - logits).abs().max() < CLOSE


# Single methods.


@each_method
def test_sink_and_last_token_stay(method):
    _, watch = followed(method, "llava_gqa")
    for rows in watch.kept[0].values():
        for row, length in enumerate(PADDED):
            first = max(PADDED) - length
            protected = {*range(first, first + method.rules.get("sink", 1)), max(PADDED) - 1}
            assert all(protected <= set(head) for head in rows[row])


def test_random_keys():
    """Of the seed, the layer and the prompt's length alone; every key as likely as any other."""
    family = "llava_mha"

    def draw(lengths=PADDED, budget=0.4, **options):
        return run(family, "sdpa", lengths, RandomCache(budget, **options), 1)[1].kept[0]

    first = draw()
    assert draw() == first
    assert draw(seed=0) == first != draw(seed=1)
    for row in range(3):
        layers = [tuple(first[layer][row][0]) for layer in first]
        assert len(set(layers)) == len(layers), "layers draw by themselves"
        assert all(head == rows[row][0] for rows in first.values() for head in rows[row])
    assert draw(models.PADDED[1:])[0][0] == [[each - 17 for each in head] for head in first[0][1]]

    drawn = [0] * 44
    for seed in range(40):
        for rows in draw((44,), budget=0.5, seed=seed).values():
            for position in rows[0][0]:
                drawn[position] += 1
    assert drawn[0] == drawn[43] == 160
    inner = drawn[1:43]  # 20 of 42 keys in 160 draws: 76 times each, give or take 6.3
    assert sum(inner) == 160 * 20
    assert min(inner) > 76 - 4 * 6.3 and max(inner) < 76 + 4 * 6.3
    chi_square = sum((each - 160 * 20 / 42) ** 2 / (160 * 20 / 42) for each in inner)
    assert chi_square < 80  # 42 keys, no replacement: 22 expected


def test_streaming_keeps_the_first_and_the_newest():
    """By hand: of 44 tokens at a quarter, 4 and 7; of 54, 4 and the newest 10, since 15 would be one too many."""
    watch = run("llava_mha", "sdpa", (44,), StreamingLLMCache(0.25), 11)[1]
    for rows in watch.kept[0].values():
        assert all(head == [0, 1, 2, 3, *range(37, 44)] for head in rows[0])
    for rows in watch.kept[10].values():
        assert all(head == [0, 1, 2, 3, *range(44, 54)] for head in rows[0])


def test_elastic_without_merging_is_uniform():
    _, elastic = followed(BY_NAME["elastic-none"], "qwen2_5_vl")
    _, uniform = followed(BY_NAME["uniform"], "qwen2_5_vl")
    assert elastic.kept == uniform.kept


def test_what_was_published_is_not_the_top():
    """Otherwise the switch would show nothing."""
    for paper, published in (("elastic-kv", "elastic-published"), ("h2o", "h2o-published")):
        ours, theirs = followed(BY_NAME[paper], "llava_gqa")[1], followed(BY_NAME[published], "llava_gqa")[1]
        assert ours.kept[0] != theirs.kept[0]
        assert ours.counts()[0] == theirs.counts()[0]


@pytest.mark.parametrize("kind", BASELINES.values(), ids=lambda kind: kind.__name__)
def test_for_model_is_the_cache_with_the_model_s_config(kind):
    model = build("llava_gqa", "sdpa")
    wanted, _ = talk(model, "llava_gqa", (44,), kind(0.4, config=model.config), 6)
    actual, _ = talk(model, "llava_gqa", (44,), kind.for_model(model, 0.4), 6)
    assert torch.equal(actual, wanted)


@pytest.mark.parametrize("kind", BASELINES.values(), ids=lambda kind: kind.__name__)
def test_without_a_config_the_first_prompt_tells(kind):
    wanted, _ = talk(build("llava_gqa", "sdpa"), "llava_gqa", (44,),
                     kind(0.4, config=models.weights("llava_gqa").config), 6)  # fmt: skip
    actual, _ = talk(build("llava_gqa", "sdpa"), "llava_gqa", (44,), kind(0.4), 6)
    assert torch.equal(actual, wanted)


@pytest.mark.parametrize("kind", BASELINES.values(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("budget", [0, -0.5, 1.01, math.nan, "half", None], ids=str)
def test_a_bad_budget_is_refused(kind, budget):
    with pytest.raises((ValueError, TypeError), match=f"(?s)budget.*{budget}"):
        kind(budget)


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (ElasticCache, dict(merge="keys"), "merge"),
        (H2OCache, dict(recent=0), "recent"),
        (H2OCache, dict(recent=1.5), "recent"),
        (StreamingLLMCache, dict(sink=-1), "sink"),
        (SnapKVCache, dict(window=0), "queries|window"),
        (SnapKVCache, dict(pooling=4), "pooling"),
        (PyramidKVCache, dict(window=0), "queries|window"),
        (PyramidKVCache, dict(lengths="cone"), "lengths"),
        (UniformCache, dict(queries="none"), "queries"),
        (RandomCache, dict(distance=0), "distance"),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_by_name(kind, options, name):
    with pytest.raises((ValueError, TypeError), match=f"(?s)({name}).*got {next(iter(options.values()))!r}"):
        kind(0.5, **options)


@pytest.mark.parametrize("kind", BASELINES.values(), ids=lambda kind: kind.__name__)
def test_none_is_another_paper_s_rule(kind):
    """`paper` is inherited, and would make something that is neither."""
    with pytest.raises(TypeError, match=f"{kind.__name__}.*PrefixKVCache.paper"):
        kind.paper(budget=0.4)


def test_each_is_a_prefix_kv_cache():
    assert all(issubclass(kind, PrefixKVCache) for kind in BASELINES.values())
