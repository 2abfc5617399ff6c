"""Laws 1 to 6 of docs/design.md for every named method, on every family of models: one matrix.

Each named method runs on each family; backend, batch, budget and where the lengths come from take turns, so that every
pair of settings stands somewhere. `VARIATIONS` are values of the fields that no named method has, and places where two
fields meet. A method that is registered is in the matrix without a line here: `oracle.py` knows the fields, and takes
the choice of a scoring rule that it does not know from the cache.
"""

import itertools
import math

import pytest
import torch
from transformers import DynamicCache

import compat
import models
from models import EIGHT_HEADS, FAMILIES, PADDED
from oracle import Given, Oracle, feed
from prefixkv_cache import methods
from rules import prompt_count
from watch import CLOSE, Case, follow, greedy, kept_by_head, masked, prompt_kept, run

SHORT_WINDOWS = {
    "snapkv": "snapkv:queries=8;recent=8",
    "default": "default:headroom=6",
}  # so that these prompts show it
VARIATIONS = [
    Case("default", lengths=(61,), budget=0.2, turns=(105,)),  # until the headroom is used up
    Case("default:headroom=6", image=True),
    Case("default:headroom=2;context=all;queries=4;heads=mean", profile="head"),
    Case("default:headroom=6;text_floor=0.8;pooling=3", "qwen2_5_vl", profile="head", image=True, budget=0.7),
    Case("default:floor=12;headroom=0", profile="head", budget=0.25),
    Case("default:headroom=6", EIGHT_HEADS, profile="head"),
    Case("prefixkv:queries=8;distance=5", EIGHT_HEADS, "eager", profile="head"),
    Case("prefixkv:queries=8;distance=5"),
    Case("prefixkv:queries=50;sink=0", lengths=(61,), profile="layer"),
    Case("prefixkv:distance=3;headroom=5", "qwen2_5_vl", profile="layer"),
    Case("prefixkv:heads=max;pooling=5;sink=4", "qwen2_5_vl", profile="layer"),
    Case("prefixkv:text_floor=1.0", "gemma3", image=True),
    Case("elastic:heads=each", EIGHT_HEADS, profile="head"),
    Case("h2o:recent=8", EIGHT_HEADS, profile="head"),
    Case("h2o:heads=mean;sink=2;headroom=3", "llava_mha", "eager"),
    Case("streaming:headroom=3;recent=0.25", profile="head"),
    Case("snapkv:queries=8;recent=8;distance=5", "llava_mha", profile="head"),
    Case("pyramidkv:floor=14", "qwen2_5_vl"),
    Case("uniform:recent=0.5;evict=oldest;distance=none", "llava_mha", "eager"),
    Case("snapkv:queries=8;recent=8;lengths=pool;distance=25", "llava_mha"),
    Case("default:lengths=pool;headroom=3", EIGHT_HEADS, budget=0.3),
    Case("default:headroom=4", budget=20),
    Case("prefixkv:queries=8", "llava_mha", profile="head", budget=24),
]


def covering_cases():
    """Every named method with every family; pairs of the other settings somewhere, not their product."""
    cases = []
    for index, (method, family) in enumerate(itertools.product(methods.NAMED, FAMILIES)):
        turn = index // len(FAMILIES)
        profile = (None, "head", "layer")[(index + turn) % 3]
        attn, lengths = ("eager", "sdpa")[(index + turn // 2) % 2], (PADDED, (61,))[(index // 2 + turn) % 3 == 0]
        spelling = SHORT_WINDOWS.get(method, method)
        cases.append(Case(spelling, family, attn, lengths, profile, (0.4, 0.25, 0.6)[(index + index // 3) % 3]))
    return cases


CASES = covering_cases() + VARIATIONS
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_padded = pytest.mark.parametrize("case", [case for case in CASES if len(case.lengths) > 1], ids=str)
each_fraction = pytest.mark.parametrize("case", [case for case in CASES if isinstance(case.budget, float)], ids=str)
SMALL = [(3,), (9, 2, 1)]


def difference(actual, wanted):
    return (actual - wanted).abs().max().item()


@each_case
def test_law_1_nothing_pruned_nothing_changed(case):
    model, inputs = case.model, case.prompt()
    ours, theirs = case.cache(budget=1.0), DynamicCache(config=model.config)
    for _turn in range(2):
        wanted_ids, wanted = greedy(model, inputs, theirs, new=5)
        ids, logits = greedy(model, inputs, ours, new=5)
        assert torch.equal(ids, wanted_ids)
        assert difference(logits, wanted) < CLOSE
        assert ours.get_seq_length() == theirs.get_seq_length()
        inputs = models.next_turn(inputs, ids, 9)
    assert all(ours.stored_lengths()[layer] == ours.get_seq_length() for layer in case.layers)


@each_case
def test_law_2_it_does_what_its_method_says(case):
    """What is kept after every forward pass of two turns, head by head, and the logits of the masked full cache."""
    logits, watch, _ = follow(case)
    if not case.as_method.protect.merge:  # merged pairs are other pairs
        assert difference(logits, masked(case, watch)) < CLOSE
    in_a_row = [heads for layer in watch.kept[0].values() for heads in layer]
    if case.as_method.ranking.heads == "each" or case.profile == "head":
        assert any(head != heads[0] for heads in in_a_row for head in heads), "heads agree: the test shows nothing"


@each_padded
def test_law_3_a_batch_is_its_members(case):
    logits, watch = run(case)
    for row, length in enumerate(case.lengths):
        wanted, alone = run(case, row)
        padding = max(case.lengths) - length
        for step, (kept, single) in enumerate(zip(watch.kept, alone.kept, strict=True)):
            for layer in case.layers:
                shifted = [[position - padding for position in head] for head in kept[layer][row]]
                assert shifted == single[layer][0], f"row {row}, layer {layer}, after forward pass {step}"
        assert difference(logits[row], wanted[0]) < CLOSE


@each_fraction
def test_law_4_more_budget_never_keeps_less(case):
    smaller = {}
    for budget in (0.1, 0.25, 0.33, 0.4, 0.7, 1.0):
        kept = prompt_kept(case, budget=budget)
        for layer, rows in smaller.items():
            pairs = [
                (less, more) for row in zip(rows, kept[layer], strict=True) for less, more in zip(*row, strict=True)
            ]
            assert all(set(less) <= set(more) for less, more in pairs), f"budget {budget}, layer {layer}"
        smaller = kept


@each_case
def test_law_5_counts_are_exact(case):
    """Keep ratios have the budget as their mean; counts are the ratios' at the prompt, and while decoding stay within
    the share and the headroom; not one pair leaves before it has to."""
    _, watch, rule = follow(case)
    headroom, least = case.as_method.decode.headroom, max(case.as_method.protect.sink + 1, case.as_method.lengths.floor)
    for row, n in enumerate(case.lengths):
        heads = [(watch.kept, layer, head, rule.heads[layer][row][head]) for layer, head in places(case)]
        budget = min(1, case.budget / n) if isinstance(case.budget, int) else case.budget
        ratios = [state.ratio for *_, state in heads]
        kind = "profile" if case.profile else case.as_method.lengths.lengths
        # A search rounds its total; in a pool each group of heads rounds down.
        within = {"search": 0.5 / n / len(case.layers), "pool": 1 / n}.get(kind, 0.0) + 1e-9
        assert abs(sum(ratios) / len(ratios) - budget) < within
        for kept, layer, head, state in heads:
            counts = [len(step[layer][row][head]) for step in kept[: case.turns[0]]]
            assert abs(counts[0] - state.ratio * n) < 1 or counts[0] == least
            for step, (before, stored) in enumerate(itertools.pairwise(counts), start=1):
                share = (n + step) * state.ratio
                assert stored - share < 1 + headroom + 1e-9 or stored <= before or not rule.evicts(state)
                assert stored == before + 1 or before + 1 - share >= 1 + headroom - 1e-9


@each_case
def test_law_5_lengths_and_bytes_are_what_is_stored(case):
    """`stored_lengths` is the mean over the heads of the longest row; `nbytes` is what the tensors take; spare capacity
    is under 12 % of the stored pairs or 64 pairs, whichever is more."""
    _, watch = run(case)
    text = models.weights(case.family).config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pair = len(case.lengths) * 2 * head_dim * 8
    for step, kept in enumerate(watch.kept):
        for layer in case.layers:
            longest = [max(len(heads[head]) for heads in kept[layer]) for head in range(case.heads)]
            assert watch.lengths_by_head[step][layer] == longest
            assert watch.lengths[step][layer] == round(sum(longest) / case.heads)
        by_head = [length for lengths in watch.lengths_by_head[step] for length in lengths]
        assert watch.nbytes[step] == watch.taken[step]
        assert pair * sum(by_head) <= watch.nbytes[step] <= pair * sum(max(1.12 * each, each + 64) for each in by_head)


def places(case):
    return list(itertools.product(case.layers, range(case.heads)))


@pytest.mark.parametrize("family", ["llava_mha", "llava_gqa", "qwen2_5_vl"])
@pytest.mark.parametrize("unit", ["layer", "head"])
def test_law_5_a_layer_is_pruned_before_the_next_one_runs(family, unit):
    """So the peak is the pruned cache and one layer. (Without a profile a search needs all layers first.)"""
    case = Case("prefixkv", family, lengths=(61,), profile=unit, budget=0.25)
    model, cache, looked = models.build(family, case.attn), case.cache(), []
    wanted = [[prompt_count(61, ratio) for ratio in ratios] for ratios in case.read().keep_ratios(0.25).tolist()]

    def look(module, args, kwargs):
        if not looked or looked[-1] < module.layer_idx:  # at the prompt only
            stored = [sum(heads) for heads in cache.stored_lengths(heads=True)[: module.layer_idx]]
            assert stored == [sum(heads) * case.heads // len(heads) for heads in wanted[: module.layer_idx]]
            looked.append(module.layer_idx)

    for attention in models.attention_modules(model)[1:]:
        attention.register_forward_pre_hook(look, with_kwargs=True)
    feed(model, case.prompt(), models.words(1, 1), cache)
    assert looked == case.layers[1:]


@pytest.mark.parametrize("case", [
    Case("prefixkv", attn="eager", lengths=(61,), turns=(14, 14, 14)),
    Case("default:floor=0.1;headroom=6", "qwen2_5_vl", profile="head", turns=(14, 14, 14)),
    Case("prefixkv:distance=5", "gemma3", profile="head", turns=(14, 14, 14)),
], ids=str)  # fmt: skip
def test_law_6_positions_are_true_in_a_third_turn(case):
    """The matrix has two turns; what is stored in each goes on from what was seen."""
    follow(case)


@pytest.mark.parametrize("attn", compat.BACKENDS)
def test_law_6_an_unrelated_prompt_without_reset_goes_on(attn):
    """By hand, without `generate`: the second prompt continues the first, as with DynamicCache."""
    case = Case("prefixkv:distance=5", attn=attn, profile="head", lengths=(61,))
    first, second = models.batch("llava_gqa"), models.batch("llava_gqa", (44,), seed=5)
    steps = [{key: each[key] for key in ("input_ids", "pixel_values")} for each in (first, second)]
    steps += [{"input_ids": models.words(1, 1, seed=step)} for step in range(12)]
    whole, theirs, cache, log = case.cache(budget=1.0), DynamicCache(), case.cache(), []
    pruned = []
    for step in steps:
        wanted = case.model(**step, past_key_values=theirs).logits
        assert difference(case.model(**step, past_key_values=whole).logits, wanted) < CLOSE
        pruned.append(case.model(**step, past_key_values=cache).logits)
        log.append({layer: kept_by_head(cache, layer, case.heads) for layer in case.layers})
        assert cache.get_seq_length() == theirs.get_seq_length()
    oracle = Oracle(case.model, Given(log))
    for step, logits in zip(steps, pruned, strict=True):
        assert difference(logits, oracle.model(**step, past_key_values=oracle.cache).logits) < CLOSE


@pytest.mark.parametrize("lengths", SMALL, ids=str)
@pytest.mark.parametrize("method", methods.NAMED)
def test_very_short_prompts(method, lengths):
    """Down to one token; windows and sinks that are longer than the prompt or than what is kept of it."""
    for index, profile in enumerate((None, "head")):
        family = ("llava_gqa", "llava_mha")[index]
        follow(Case(method, family, lengths=lengths, profile=profile, budget=0.3, turns=(8, 3)))


@pytest.mark.parametrize("method", methods.NAMED)
def test_pruning_does_something(method):
    """Otherwise the laws would show nothing: logits differ from those of the full cache, by method."""
    case = Case(SHORT_WINDOWS.get(method, method), turns=(3,))
    logits, watch = run(case)
    full, _ = feed(case.model, case.prompt(), models.words(3, 3), DynamicCache(config=case.model.config))
    assert difference(logits, full) > 1e-3
    others = [run(Case(SHORT_WINDOWS.get(other, other), turns=(3,))) for other in methods.NAMED if other != method]
    assert all(difference(logits, of_other) > 1e-9 for of_other, _ in others)
    assert math.isclose(sum(watch.lengths[0]) / len(watch.lengths[0]) / 61, 0.4, abs_tol=0.03)
