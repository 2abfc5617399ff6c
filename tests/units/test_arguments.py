"""The laws for every argument that changes what `PrefixKVCache` keeps, alone and together, against `rules.py`.

A `Choice` is a set of arguments; the same names mean the same in `Rules`. Each runs on a LLaVA and on a model with
M-RoPE positions: with all of the budget (law 1), beside the slow rules (law 2), row by row (law 3), at rising budgets
(law 4), and its counts (law 5).
"""

import functools
import itertools
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import compat
import models
from models import IMAGE, PADDED
from oracle import feed, prompt_count
from prefixkv_cache import PAPER, PrefixKVCache, PrefixProfile
from prefixkv_cache.baselines import UniformCache
from rules import PLAIN, Rules, staggered_count
from watch import CLOSE, beams_are_true, build, follow, greedy, prompt, rows_alone_are, run

FAMILIES = ("llava_gqa", "qwen2_5_vl")
STEPS, TURNS = 18, 2  # forward passes in a turn, the first of them its prompt
BUDGET = 0.4


def a_profile(n_layers):
    """Rises with the budget in every layer; the layers differ."""
    budgets = (0.1, 0.25, 0.4, 0.7, 1.0)
    lean = [0.5 * (-1) ** layer * (1 if layer != n_layers - 1 or n_layers % 2 == 0 else 0) for layer in range(n_layers)]
    keep = [[budget + min(budget, 1 - budget) * each for each in lean] for budget in budgets]
    return PrefixProfile(budgets, keep, {"source": "tests"})


@dataclass(frozen=True)
class Choice:
    """Some arguments, on top of `PLAIN`.

    with_profile: the lengths come from a profile; with_image: the cache is told where the image is.
    """

    options: dict = field(hash=False)
    with_profile: bool = False
    with_image: bool = False

    def __str__(self):
        words = [f"{name}={value}" for name, value in self.options.items()]
        return "-".join(words + ["profile"] * self.with_profile + ["image"] * self.with_image)

    def cache(self, family, budget=BUDGET, row=None, **more):
        profile = a_profile(len(layers(family))) if self.with_profile else None
        image = images(family, row) if self.with_image else None
        options = {**PLAIN, **self.options, "image_mask": image, **more}
        return PrefixKVCache(profile, budget, config=models.weights(family).config, **options)

    def by_rules(self, family, budget=BUDGET):
        profile = a_profile(len(layers(family)))
        keep = (lambda at: profile.keep_ratios(at).tolist()) if self.with_profile else None
        image = [row.nonzero().flatten().tolist() for row in images(family)] if self.with_image else None
        return Rules(budget=budget, keep=keep, image=image, **self.options)


def layers(family):
    return models.prunable_layers(models.weights(family))


def images(family, row=None):
    return prompt(family, PADDED, row)["input_ids"] == IMAGE


DEFAULT = dict(queries=32, distance=1, slack=64, novelty=8.0, diversity=0.5)
EVERYTHING = dict(
    queries="text", average="visible", heads="each", pooling=3, value_norm=True, diversity=0.2, novelty=0.5, floor=0.83,
    cap=1.17, temperature=0.25, recent=0.25, evict="least-important", slack=2, merge="kv", text_floor=0.5,
)  # fmt: skip
CHOICES = [
    Choice(dict(heads="each")),
    Choice(dict(heads="each"), with_profile=True),
    Choice(dict(heads="max")),
    Choice(dict(average="visible", queries="all")),
    Choice(dict(average="visible", queries=8, heads="max")),
    Choice(dict(pooling=5)),
    Choice(dict(value_norm=True)),
    Choice(dict(diversity=0.3)),
    Choice(dict(diversity=0.3, heads="each", queries="all")),
    Choice(dict(novelty=1.5)),
    Choice(dict(novelty=0.5, heads="each", lengths="uniform")),
    Choice(dict(lengths="uniform")),
    Choice(dict(lengths="pyramid", temperature=0.3)),
    Choice(dict(temperature=0.5)),
    Choice(dict(temperature=0.5), with_profile=True),
    Choice(dict(floor=0.97)),
    Choice(dict(floor=0.83), with_profile=True),
    Choice(dict(cap=1.01)),
    Choice(dict(cap=1.17), with_profile=True),
    Choice(dict(lengths="pyramid", floor=0.53, cap=1.17)),
    Choice(dict(recent=8)),
    Choice(dict(recent=0.5)),
    Choice(dict(evict="oldest", sink=2)),
    Choice(dict(evict="least-important")),
    Choice(dict(evict="least-important", heads="max", recent=0.3), with_profile=True),
    Choice(dict(slack=6, distance=1)),
    Choice(DEFAULT),
    Choice(DEFAULT, with_profile=True),
    Choice(dict(merge="kv")),
    Choice(dict(merge="value", heads="each"), with_profile=True),
    Choice(dict(queries="text"), with_image=True),
    Choice(dict(queries="text", text_floor=0.0), with_image=True),
    Choice(dict(queries="all", text_floor=0.5), with_image=True),
    Choice(EVERYTHING, with_image=True),
    Choice({**EVERYTHING, "evict": "oldest", "merge": "value", "heads": "max"}, with_profile=True, with_image=True),
]
each_choice = pytest.mark.parametrize("choice", CHOICES, ids=str)
each_family = pytest.mark.parametrize("family", FAMILIES)


def backend(choice, family):
    return compat.seen(("eager", "sdpa")[(CHOICES.index(choice) + FAMILIES.index(family)) % 2])


@each_choice
def test_law_1_with_the_whole_budget_nothing_changes(choice):
    family = FAMILIES[CHOICES.index(choice) % 2]
    model, inputs = build(family, "sdpa"), prompt(family, PADDED)
    ours, theirs = choice.cache(family, 1.0), DynamicCache(config=model.config)
    for _turn in range(2):
        wanted_ids, wanted = greedy(model, inputs, theirs, new=8)
        ids, logits = greedy(model, inputs, ours, new=8)
        assert torch.equal(ids, wanted_ids)
        assert (logits - wanted).abs().max() < 1e-5
        inputs = models.next_turn(inputs, ids, 9)
    assert ours.stored_lengths() == [ours.get_seq_length()] * len(ours.layers)


@functools.cache
def followed(choice, family):
    cache, by_rules = choice.cache(family), choice.by_rules(family)
    return follow(family, backend(choice, family), PADDED, cache, by_rules, STEPS, TURNS)


@each_family
@each_choice
def test_law_2_it_does_what_the_arguments_say(choice, family):
    """Positions, step by step and head by head, in two turns; merged pairs; logits of the masked full cache."""
    followed(choice, family)


def test_every_argument_changes_what_is_kept():
    """Otherwise a test of it would show nothing. (What only merging changes is in the pairs.)"""
    for family in FAMILIES:
        plain = run(family, "sdpa", PADDED, PrefixKVCache(budget=BUDGET, **PLAIN), STEPS, TURNS)[1].kept
        by_profile = run(family, "sdpa", PADDED, Choice({}, with_profile=True).cache(family), STEPS, TURNS)[1].kept
        for choice in CHOICES:
            if "merge" not in choice.options or choice.options.get("heads") == "each":
                kept = followed(choice, family)[1].kept
                assert kept != (by_profile if choice.with_profile else plain), f"{choice}, {family}"


@each_family
def test_the_default_is_what_is_spelled_out(family):
    """What `DEFAULT` does by the slow rules is what a cache does that was told nothing."""
    spelled_out = next(choice for choice in CHOICES if choice == Choice(DEFAULT))
    cache = PrefixKVCache(budget=BUDGET, config=models.weights(family).config)
    logits, watch = run(family, backend(spelled_out, family), PADDED, cache, STEPS, TURNS)
    wanted, by_rules = followed(spelled_out, family)
    assert watch.kept == by_rules.kept and torch.equal(logits, wanted)


@each_choice
def test_law_3_a_batch_is_its_members(choice):
    family = FAMILIES[CHOICES.index(choice) % 2]
    attn = backend(choice, family)
    logits, watch = run(family, attn, PADDED, choice.cache(family), 6, turns=2)
    rows_alone_are(family, attn, PADDED, lambda row: choice.cache(family, row=row), logits, watch, 6, turns=2)


@each_choice
def test_law_4_more_budget_never_keeps_less(choice):
    """With a temperature over searched lengths, rounding may take one key back: `temper_counts` rounds up the largest
    remainders, which change."""
    family, smaller = FAMILIES[CHOICES.index(choice) % 2], None
    rounds = choice.options.get("temperature", 0) and not choice.with_profile and "lengths" not in choice.options
    for budget in (0.1, 0.3, 0.4, 0.45, 0.7, 1.0):
        kept = run(family, "sdpa", PADDED, choice.cache(family, budget), 1)[1].kept[0]
        for layer, row in itertools.product(smaller or (), range(len(PADDED))):
            for less, more in zip(smaller[layer][row], kept[layer][row], strict=True):
                assert len(set(less) - set(more)) <= bool(rounds), f"budget {budget}, layer {layer}, row {row}"
        smaller = kept


@each_family
@each_choice
def test_law_5_counts_are_exact(choice, family):
    _, watch = followed(choice, family)
    counts, by_rules, n_layers = watch.counts(), choice.by_rules(family), len(watch.layers)
    slack = choice.options.get("slack", 0)
    for row, length in enumerate(PADDED):
        at_prompt = [counts[0][layer][row] for layer in watch.layers]
        if choice.with_profile:
            ratios = by_rules._ratios(n_layers)
            assert sum(ratios) / n_layers == pytest.approx(BUDGET)
            assert at_prompt == [prompt_count(length, ratio, by_rules.sink) for ratio in ratios]
        elif by_rules.lengths == "search":
            assert sum(at_prompt) == round(BUDGET * n_layers * length)
            ratios = [count / length for count in at_prompt]
        else:
            ratios = by_rules._ratios(n_layers)
            assert sum(ratios) / n_layers == pytest.approx(BUDGET)
            assert at_prompt == [staggered_count(length, ratio, at, n_layers) for at, ratio in enumerate(ratios)]
        for step, (layer, ratio) in itertools.product(range(1, STEPS), zip(watch.layers, ratios, strict=True)):
            assert counts[step][layer][row] - (length + step) * ratio < 1 + slack + 1e-9


def test_uniform_lengths_are_within_one():
    counts = followed(CHOICES[[str(choice) for choice in CHOICES].index("lengths=uniform")], "llava_gqa")[1].counts()[0]
    for row, length in enumerate(PADDED):
        of_row = [rows[row] for rows in counts.values()]
        assert max(of_row) - min(of_row) <= 1 and abs(sum(of_row) - BUDGET * length * len(of_row)) <= 0.5


@pytest.mark.parametrize("with_profile", [False, True])
@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        (dict(temperature=0.3), 0.3, None), (dict(temperature=1.0), 1.0, 1.0),
        (dict(floor=0.8), 0.8, None), (dict(floor=1.0), 1.0, 1.0),
        (dict(cap=1.2), 0.0, 1.2), (dict(cap=1.0), 1.0, 1.0),
        (dict(floor=0.9, cap=1.2), 0.9, 1.2), (dict(floor=0.6, cap=1.3, temperature=0.5), 0.8, 1.15),
    ],
    ids=str,
)  # fmt: skip
@each_family
def test_lengths_stay_within_floor_and_cap(family, options, low, high, with_profile):
    """Give or take the rounding, in each row of a batch by its own length."""
    choice = Choice(options, with_profile=with_profile)
    counts = run(family, "sdpa", PADDED, choice.cache(family), 1)[1].counts()[0]
    for row, length in enumerate(PADDED):
        of_row = [rows[row] for rows in counts.values()]
        assert min(of_row) > low * BUDGET * length - 1.01
        assert high is None or max(of_row) < high * BUDGET * length + 1.01
        if low == high:
            assert max(of_row) - min(of_row) <= 1


@pytest.mark.parametrize("text_floor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_a_text_floor_keeps_text(text_floor, heads):
    family = "llava_gqa"
    choice = Choice(dict(text_floor=text_floor, lengths="uniform", heads=heads), with_image=True)
    kept = run(family, "sdpa", PADDED, choice.cache(family, 0.8), 1)[1].kept[0]
    without = run(family, "sdpa", PADDED, Choice(choice.options).cache(family, 0.8), 1)[1].kept[0]
    assert kept == without if text_floor == 0 else kept != without or text_floor < 1
    for rows in kept.values():
        for row, (heads_of_row, image) in enumerate(zip(rows, images(family).tolist(), strict=True)):
            padding = max(PADDED) - PADDED[row]
            text = [position for position in range(padding, max(PADDED)) if not image[position]]
            for head in heads_of_row:
                assert len(set(head) & set(text)) >= text_floor * len(text)
    # Where not even that fits, as many as fit: then no image token is kept.
    kept = run(family, "sdpa", PADDED, choice.cache(family, 0.3), 1)[1].kept[0]
    if text_floor == 1.0:
        image = images(family)
        assert not any(image[row, head].any() for rows in kept.values() for row in range(3) for head in rows[row])


def test_text_queries_are_those_behind_the_first_image():
    """What the text before the image says does not count, and a row without an image goes by all its text."""
    family = "llava_gqa"
    model, inputs = build(family, "sdpa"), prompt(family, (61,))
    image = inputs["input_ids"] == IMAGE
    behind = 61 - int(image.nonzero()[-1, 1]) - 1
    as_text = run(family, "sdpa", (61,), PrefixKVCache(budget=0.4, queries="text", image_mask=image, text_floor=0.0), 1)
    as_window = run(family, "sdpa", (61,), PrefixKVCache(budget=0.4, queries=behind), 1)
    assert as_text[1].kept == as_window[1].kept
    nowhere = torch.zeros_like(image)
    of_all = PrefixKVCache(budget=0.4, queries="text", image_mask=nowhere, text_floor=0.0)
    feed(model, inputs, models.words(1, 1), of_all)
    all_queries = PrefixKVCache(budget=0.4, queries="all")
    feed(model, inputs, models.words(1, 1), all_queries)
    assert all(torch.equal(of_all.kept_positions(at), all_queries.kept_positions(at)) for at in range(6))


# The rest of the cache's life.


@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
@pytest.mark.parametrize("choice", [CHOICES[-2], CHOICES[-1]], ids=["everything", "everything-by-profile"])
def test_rows_that_move(choice, operation):
    rows, argument = {
        "reorder_cache": ([2, 0, 2], torch.tensor([2, 0, 2])),
        "batch_select_indices": ([0, 2], torch.tensor([0, 2])),
        "batch_repeat_interleave": ([0, 0, 1, 1, 2, 2], 2),
    }[operation]
    family = "llava_gqa"  # a Qwen model has state of its own for the rows
    model, inputs, tokens = build(family, "sdpa"), prompt(family, PADDED), models.words(3, 12)

    def go_on(change, rows):
        cache = choice.cache(family)
        _, sequences = feed(model, inputs, tokens, cache)
        change(cache)
        again = {key: value[rows] for key, value in models.next_turn(inputs, sequences, 9).items()}
        return feed(model, again, models.words(3, 12, seed=11)[rows], cache)[0]

    wanted = go_on(lambda cache: None, [0, 1, 2])
    actual = go_on(lambda cache: getattr(cache, operation)(argument), rows)
    assert (actual - wanted[rows]).abs().max() < CLOSE


@pytest.mark.parametrize("choice", [CHOICES[-2], CHOICES[-1]], ids=["everything", "everything-by-profile"])
def test_beams_are_true(choice):
    """The mask is the prompts', the batch is the beams'."""
    beams_are_true("llava_gqa", lambda: choice.cache("llava_gqa"), n_beams=2, new=10)


def test_reset_forgets_the_image():
    """It was that prompt's: with text queries a new one is asked for."""
    cache = Choice(dict(queries="text"), with_image=True).cache("llava_gqa")
    run("llava_gqa", "sdpa", PADDED, cache, 4)
    cache.reset()
    with pytest.raises(ValueError, match="image_mask"):
        run("llava_gqa", "sdpa", (44,), cache, 1)


# Bad values: one clear error that names the argument, the value and what it must be.

BAD = [
    ("heads", "some", "each"), ("heads", None, "each"), ("heads", 2, "each"),
    ("average", "mean", "visible"), ("average", True, "visible"),
    ("pooling", 0, "odd"), ("pooling", 4, "odd"), ("pooling", -1, "odd"), ("pooling", 2.5, "odd"),
    ("pooling", "wide", "odd"), ("pooling", True, "odd"), ("pooling", 10**400 + 1, "odd"),
    ("heads", np.array(["mean"]), "each"), ("average", np.zeros(2), "visible"), ("heads", ["mean"], "each"),
    ("diversity", 10**400, "0 to 1"), ("temperature", 10**400, "0 to 1"), ("floor", 10**400, "0 to 1"),
    ("diversity", -(10**400), "0 to 1"), ("recent", -(10**400), "1 or more"), ("cap", -(10**400), "at least 1"),
    ("novelty", -(10**400), "0 or more"), ("novelty", 10**400, "0 or more"),
    ("novelty", Fraction(10**400), "0 or more"), ("recent", 10**400, "1 or more"),
    ("value_norm", 1, "True or False"), ("value_norm", "yes", "True or False"),
    ("diversity", 1.5, "0 to 1"), ("diversity", -0.1, "0 to 1"), ("diversity", "some", "0 to 1"),
    ("diversity", float("nan"), "0 to 1"), ("diversity", True, "0 to 1"),
    ("novelty", -1, "0 or more"), ("novelty", float("inf"), "0 or more"), ("novelty", float("nan"), "0 or more"),
    ("novelty", "much", "0 or more"), ("novelty", True, "0 or more"),
    ("lengths", "flat", "uniform"), ("lengths", None, "uniform"), ("lengths", ["uniform"], "uniform"),
    ("floor", -0.5, "0 to 1"), ("floor", 2, "0 to 1"), ("floor", None, "0 to 1"),
    ("cap", 0.99, "at least 1"), ("cap", 0, "at least 1"), ("cap", float("nan"), "at least 1"),
    ("cap", float("inf"), "None for no cap"), ("cap", "half", "at least 1"), ("cap", True, "at least 1"),
    ("cap", 10**400, "at least 1"),
    ("temperature", -0.1, "0 to 1"), ("temperature", 1.5, "0 to 1"), ("temperature", None, "0 to 1"),
    ("temperature", "warm", "0 to 1"), ("temperature", float("nan"), "0 to 1"),
    ("recent", 0, "1 or more"), ("recent", -3, "1 or more"), ("recent", 1.5, "1 or more"), ("recent", "half", "share"),
    ("recent", True, "share"), ("recent", float("nan"), "1 or more"), ("recent", float("inf"), "1 or more"),
    ("evict", "newest", "oldest"), ("evict", None, "oldest"),
    ("slack", -1, "at least 0"), ("slack", 0.5, "integer"),
    ("merge", "keys", "value"), ("merge", True, "value"), ("merge", 0, "value"),
    ("image_mask", [[True]], "bool"), ("image_mask", torch.ones(1, 5), "bool"),
    ("image_mask", torch.ones(5) > 0, "bool"), ("image_mask", torch.ones(0, 5) > 0, "at least one row"),
    ("text_floor", 1.01, "0 to 1"), ("text_floor", "all", "0 to 1"),
    ("max_new_tokens", 0, "at least 1"), ("max_new_tokens", 2.5, "integer"),
    ("queries", "image", "text"), ("queries", True, "text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "cure"), BAD, ids=lambda value: str(value)[:20])
def test_a_bad_value_is_refused_by_name(name, value, cure):
    with pytest.raises((ValueError, TypeError)) as error:
        PrefixKVCache(budget=0.5, **{name: value})
    message = str(error.value)
    assert message.startswith(name) and cure in message and "got" in message
    if not isinstance(value, (torch.Tensor, list)):
        assert repr(value) in message
    assert "\n" not in message


def test_numbers_of_any_kind_are_taken():
    """And held as plain ones, so that tensors can be multiplied by them and equal rankings are equal."""
    given = PrefixKVCache(budget=0.5, diversity=Fraction(1, 2), novelty=np.int64(8), pooling=np.int32(1)).ranking
    assert given == PrefixKVCache(budget=0.5).ranking
    assert [type(each) for each in (given.diversity, given.novelty, given.pooling)] == [float, float, int]
    cache = PrefixKVCache(budget=BUDGET, diversity=Fraction(1, 2), novelty=Fraction(8))
    wanted = run("llava_gqa", "sdpa", (44,), PrefixKVCache(budget=BUDGET), 1)[1].kept
    assert run("llava_gqa", "sdpa", (44,), cache, 1)[1].kept == wanted


@pytest.mark.parametrize("lengths", ["uniform", "pyramid"])
def test_a_profile_and_lengths_contradict_each_other(lengths):
    with pytest.raises(ValueError, match=f"profile.*{lengths}.*not both"):
        PrefixKVCache(a_profile(4), budget=0.5, lengths=lengths)


@pytest.mark.parametrize("attn", compat.BACKENDS)
def test_text_queries_without_an_image_mask_are_refused(attn):
    model = build("llava_gqa", attn)
    with pytest.raises(ValueError, match=r"queries='text'.*image_mask"):
        run("llava_gqa", attn, (44,), PrefixKVCache(budget=0.5, queries="text", config=model.config), 1)


def test_an_image_mask_of_other_rows_is_refused():
    image = torch.zeros(2, 61, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"image_mask has 2 rows for a batch of 3.*\[batch, n_prompt\]"):
        run("llava_gqa", "sdpa", PADDED, PrefixKVCache(budget=0.5, image_mask=image), 1)


def test_for_model_finds_the_image():
    model, inputs = build("llava_gqa", "sdpa"), prompt("llava_gqa", PADDED)
    cache = PrefixKVCache.for_model(model, 0.4, inputs=inputs, queries="text")
    assert torch.equal(cache.image_mask, inputs["input_ids"] == IMAGE)
    told = PrefixKVCache(budget=0.4, image_mask=inputs["input_ids"] == IMAGE, queries="text")
    wanted, _ = feed(model, inputs, models.words(3, 6), told)
    assert torch.equal(feed(model, inputs, models.words(3, 6), cache)[0], wanted)


def test_the_papers_know_nothing_of_images():
    """Where the image is does not change what their rules keep; the default protects text."""
    family = "llava_gqa"
    model, inputs = build(family, "sdpa"), prompt(family, PADDED)
    image = inputs["input_ids"] == IMAGE

    def kept(cache):
        return run(family, "sdpa", PADDED, cache, 1)[1].kept

    by_paper = kept(PrefixKVCache.paper(budget=0.3))
    assert kept(PrefixKVCache.for_model(model, 0.3, inputs=inputs, **PAPER)) == by_paper
    assert kept(PrefixKVCache.paper(budget=0.3, image_mask=image)) == by_paper
    assert kept(PrefixKVCache.paper(budget=0.3, image_mask=image, text_floor=1.0)) != by_paper
    assert kept(UniformCache(0.3, config=model.config, image_mask=image)) == kept(
        UniformCache(0.3, config=model.config)
    )
    assert kept(PrefixKVCache(budget=0.3, image_mask=image)) != kept(PrefixKVCache(budget=0.3))
