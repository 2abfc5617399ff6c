"""Laws of measuring: masks cost what the cache costs, a second pass is its plain loops, proposals spend the budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compat
import models
from oracle import feed, open_attention
from prefixkv_cache import PrefixKVCache, PrefixProfile, methods
from prefixkv_cache.cache.guards import image_mask_of
from prefixkv_cache.calibration import forwards
from prefixkv_cache.calibration.descent import ANCHORS, Descent, fade
from prefixkv_cache.calibration.forwards import positions_behind
from prefixkv_cache.calibration.measure import AnsweredPrompt
from prefixkv_cache.calibration.plan import Candidate, Plan, advantage, best
from prefixkv_cache.calibration.propose import blend, loss_ratios, reconstruction_counts

LENGTHS = (61, 44, 40)
STAYING = {"distance": None, "headroom": 0, "evict": "fixed-point"}  # what leaves while decoding is not measured
ATTENTION = methods.DEFAULT.replace(score="attention")
METHODS = {
    "default": methods.DEFAULT,
    "prefixkv": methods.PREFIXKV.replace(**STAYING),
    "snapkv": methods.SNAPKV.replace(recent=4, queries=8),
    "h2o": methods.H2O.replace(**STAYING),
    "keydiff": methods.KEYDIFF.replace(**STAYING),
    "floor": methods.DEFAULT.replace(floor=9),
}


def profile_of(model, method, by_head):
    """Random keep ratios of every layer, or key head, that rise with the budget."""
    heads = model.config.get_text_config().num_key_value_heads if by_head else 1
    noise = torch.rand(
        (len(models.prunable_layers(model)), heads), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    noise -= noise.mean()
    keep = torch.stack([0.2 + 0.1 * noise, 0.5 + 0.3 * noise])
    return PrefixProfile([0.2, 0.5], keep, {"method": method.spell(full=True)})


def answered(family, inputs, method=methods.DEFAULT, attn="sdpa", tokens=6):
    model = models.shared(family, attn)
    return AnsweredPrompt(model, inputs, [method], image=image_mask_of(inputs, model.config), answer_tokens=tokens)


# Cost.


def check_against_the_cache(prompt, inputs, by_head, method=methods.DEFAULT):
    model, image = prompt.model, image_mask_of(inputs, prompt.model.config)
    profile = profile_of(model, method, by_head)
    full = feed(model, inputs, prompt.answer, None)[0][:, 1:].log_softmax(-1)
    for budget in (0.2, 0.35):
        cache = PrefixKVCache(profile, budget, config=model.config, image_mask=image)
        pruned = feed(model, inputs, prompt.answer, cache)[0][:, 1:].log_softmax(-1)
        cost = prompt.costs([prompt.kept(method, profile, budget)])[0]
        assert torch.allclose(cost.divergence, (full.exp() * (full - pruned)).sum(-1).mean(1), atol=1e-9, rtol=1e-7)
        agree = full.argmax(-1) == pruned.argmax(-1)
        assert torch.equal(cost.agreement, agree.double().mean(1))
        assert torch.equal(cost.exact, agree.all(1).double())  # the answer is the full cache's own
        assert cost.divergence.min() > 1e-5  # else nothing was pruned


@pytest.mark.parametrize("by_head", [False, True], ids=["layer", "head"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
def test_masks_cost_what_the_cache_costs(family, method, by_head):
    inputs = models.batch(family, LENGTHS)
    check_against_the_cache(answered(family, inputs, METHODS[method]), inputs, by_head, METHODS[method])


@compat.needs_eager
def test_eager_attention_too():
    inputs = models.batch("llava_gqa", LENGTHS)
    check_against_the_cache(answered("llava_gqa", inputs, attn="eager"), inputs, True)


@pytest.mark.parametrize("tokens", [2, 3])
def test_a_single_query_sees_each_heads_own_pairs(tokens):
    inputs = models.batch("llava_gqa", (61,))
    check_against_the_cache(answered("llava_gqa", inputs, tokens=tokens), inputs, True)


def test_the_answer_is_the_models_own_and_ends_where_it_ends():
    inputs = models.batch("llava_gqa", LENGTHS)
    model = models.build("llava_gqa", "sdpa")
    long = AnsweredPrompt(model, inputs, [methods.DEFAULT], answer_tokens=12)
    assert torch.equal(long.answer, model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, LENGTHS[0] :])
    assert long.n_tokens == list(LENGTHS)
    end = long.answer[1, 4].item()
    ends = [[*(row == end).nonzero().flatten().tolist(), 99] for row in long.answer]
    model.generation_config.eos_token_id = end
    short = AnsweredPrompt(model, inputs, [methods.DEFAULT], answer_tokens=12)
    # The first token comes from the prompt's forward, so it is not counted; the one that ends the answer is.
    assert short.continuations()[0].counting.sum(1).tolist() == [
        min(next(at for at in row if at > 0), 11) for row in ends
    ]
    alone = AnsweredPrompt(model, models.alone("llava_gqa", LENGTHS, 1), [methods.DEFAULT], answer_tokens=12)
    kept = short.kept(methods.DEFAULT, profile_of(model, methods.DEFAULT, True), 0.2)
    own = alone.kept(methods.DEFAULT, profile_of(model, methods.DEFAULT, True), 0.2)
    for together, by_itself in zip(short.costs([kept])[0].table().T, alone.costs([own])[0].table().T, strict=True):
        assert together[1].item() == pytest.approx(by_itself[0].item(), rel=1e-9, abs=1e-12)


def test_an_answer_of_one_token_ends_behind_it():
    model, inputs = models.build("llava_gqa", "sdpa"), models.alone("llava_gqa", LENGTHS, 0)
    first, second = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, LENGTHS[0] :].tolist()
    assert first != second
    model.generation_config.eos_token_id = second
    prompt = AnsweredPrompt(model, inputs, [methods.DEFAULT], answer_tokens=12)
    assert prompt.answer.tolist() == [[first, second]]
    assert prompt.full_exact().tolist() == [1.0]
    model.generation_config.eos_token_id = first  # an answer of no token has nothing to be measured: it gets one
    prompt = AnsweredPrompt(model, inputs, [methods.DEFAULT], answer_tokens=12)
    assert prompt.answer[0, 0] != first
    assert prompt.answer.shape[1] >= 2


def test_nothing_pruned_costs_nothing_and_nothing_is_left_behind():
    prompt = answered("llava_gqa", models.batch("llava_gqa", LENGTHS))
    assert prompt.costs([{}])[0].table().tolist() == [[0.0, 1.0, 1.0, 0.0]] * 3
    everything = {
        layer: torch.ones_like(mask) for layer, mask in prompt.kept(methods.DEFAULT, uniform(0.5), 0.5).items()
    }
    assert prompt.costs([everything])[0].divergence.max() < 1e-12
    before = prompt.costs([prompt.kept(methods.DEFAULT, uniform(0.5), 0.5)])[0].divergence
    prompt.reconstruction()
    assert torch.equal(prompt.costs([prompt.kept(methods.DEFAULT, uniform(0.5), 0.5)])[0].divergence, before)


def test_an_answer_found_before_is_taken():
    inputs = models.batch("llava_gqa", LENGTHS)
    first = answered("llava_gqa", inputs)
    again = AnsweredPrompt(first.model, inputs, [methods.DEFAULT], answer_tokens=99, answer=first.answer)
    kept = first.kept(methods.DEFAULT, uniform(0.5), 0.5)
    assert torch.equal(again.answer, first.answer)
    assert torch.equal(again.costs([kept])[0].table(), first.costs([kept])[0].table())


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("rows", [1, 3])
def test_several_choices_together_cost_what_each_costs_alone(family, rows, monkeypatch):
    lengths = LENGTHS[:rows]
    inputs = models.batch(family, lengths)
    prompt = answered(family, inputs)
    choices = [prompt.kept(methods.DEFAULT, None, budget) for budget in (0.2, 0.5)]
    last = max(choices[1])
    choices += [{}, {last: choices[0][last]}]
    gates = [{layer: torch.where(mask, 0.0, -1.0).double() for layer, mask in each.items()} for each in choices[:2]]
    answer, found = prompt.continuations()[0], []
    for limit in (10**6, 1, 2 * answer.fed.numel()):
        monkeypatch.setattr(forwards, "_TOKENS_TOGETHER", limit)
        costs = torch.stack([cost.table() for cost in prompt.costs(choices)])
        found.append([costs, torch.cat(list(prompt.faded_divergences(gates, answer)))])
    assert costs[2].tolist() == [[0.0, 1.0, 1.0, 0.0]] * rows and 0 < costs[3, 0, 0] < costs[0, 0, 0]
    for together, others in zip(found[0], zip(*found[1:], strict=True), strict=True):
        assert all(torch.allclose(together, other, atol=1e-10) for other in others)


def test_what_a_later_question_may_ask_for_is_measured_where_asked():
    """The part of the prompt that is fed once more, behind the real cache."""
    inputs = {"input_ids": models.words(1, 200), "attention_mask": torch.ones(1, 200, dtype=torch.int64)}
    prompt = answered("llava_gqa", inputs)
    kept = prompt.kept(methods.DEFAULT, uniform(0.2), 0.2)
    (plain,), (cost,) = prompt.costs([kept]), prompt.costs([kept], later=True)
    assert torch.equal(plain.later, plain.divergence) and torch.equal(cost.divergence, plain.divergence)
    repeated = prompt.continuations()[1]
    at = next(
        at for at in range(200) if torch.equal(inputs["input_ids"][:, at : at + repeated.fed.shape[1]], repeated.fed)
    )
    assert at + repeated.fed.shape[1] < 200
    fed, found = torch.cat([repeated.fed, repeated.fed[:, :1]], dim=1), []
    for budget in (1.0, 0.2):
        cache = PrefixKVCache(uniform(budget), budget, method=methods.DEFAULT.replace(**STAYING))
        found.append(feed(prompt.model, inputs, fed, cache)[0][:, 1 + repeated.skipped :].log_softmax(-1))
    full, pruned = found
    divergence = (full.exp() * (full - pruned)).sum(-1).mean(1)
    assert cost.later.item() == pytest.approx(divergence.item(), rel=1e-6) and divergence.item() > 1e-6


def uniform(budget, n_layers=6):
    return PrefixProfile([budget], [[budget] * n_layers])


def test_losses_are_the_costs_of_single_layers_and_heads():
    prompt = answered("llava_gqa", models.batch("llava_gqa", LENGTHS))
    ratios, method = (0.1, 0.5), methods.DEFAULT.replace(floor=0)
    by_layer, by_head = (torch.stack(prompt.losses(method, ratios, unit)) for unit in ("layer", "head"))
    assert by_layer.shape == (3, 2, 6, 1) and by_head.shape == (3, 2, 6, 2)
    for at, ratio in enumerate(ratios):
        for layer in range(6):
            keep = torch.ones(6, 2, dtype=torch.float64)
            keep[layer] = ratio
            kept = prompt.kept(method, PrefixProfile([keep.mean().item()], keep[None]), keep.mean().item())
            assert torch.allclose(prompt.costs([kept])[0].divergence, by_layer[:, at, layer, 0])
            keep[layer, 0] = 1.0
            kept = prompt.kept(method, PrefixProfile([keep.mean().item()], keep[None]), keep.mean().item())
            assert torch.allclose(prompt.costs([kept])[0].divergence, by_head[:, at, layer, 1])


# Reconstruction.


def slow_reconstruction(model, inputs):
    """[layer][key head][key]: the largest attention from the prompt's second copy, from a plain softmax in one pass."""
    prompt, weights = {}, {}
    decoder = model.model.language_model

    def note(_, args, kwargs):
        prompt.update(kwargs)

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    model(**inputs, use_cache=False)
    handle.remove()
    n = prompt["inputs_embeds"].shape[1]
    positions = prompt.get("position_ids")
    positions = torch.arange(n)[None] if positions is None else positions
    second = positions + positions[-3:].max() + 1 if positions.ndim == 3 else positions + n
    model.set_attn_implementation("oracle")
    for layer, module in enumerate(models.attention_modules(model)):
        module.register_forward_hook(lambda _, args, output, layer=layer: weights.update({layer: output[1]}))
    decoder(
        inputs_embeds=torch.cat([prompt["inputs_embeds"]] * 2, 1),
        position_ids=torch.cat([positions, second], -1),
        use_cache=False,
    )
    found = []
    for layer in models.prunable_layers(model):
        heads = weights[layer][0].tolist()
        group = len(heads) // 2
        found.append(
            [
                [
                    max(head[query][key] for head in heads[at : at + group] for query in range(n, 2 * n))
                    for key in range(n)
                ]
                for at in range(0, len(heads), group)
            ]
        )
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl"])
def test_reconstruction_is_the_largest_attention_from_a_second_copy(family):
    assert open_attention  # "oracle" is registered with transformers
    inputs = models.alone(family, LENGTHS, 2)
    found = answered(family, inputs).reconstruction()
    slow = slow_reconstruction(models.build(family, "eager" if compat.SEES_EAGER else "sdpa"), inputs)
    assert len(found) == 1 and (found[0] - slow).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("max_bytes", [1, 2**26])
def test_reconstruction_of_a_batch_is_that_of_its_rows(family, max_bytes):
    inputs = models.batch(family, LENGTHS)
    prompt = answered(family, inputs)
    prompt.max_bytes = max_bytes
    for index, row in enumerate(prompt.reconstruction()):
        alone = answered(family, models.alone(family, LENGTHS, index)).reconstruction()[0]
        assert row.shape == alone.shape and (row - alone).abs().max() < 1e-5


def test_positions_of_the_second_copy():
    plain = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    assert positions_behind(plain).tolist() == [[4, 4, 3, 4, 5], [5, 6, 7, 8, 9]]
    axes = torch.tensor([[[0, 1, 1, 2]], [[0, 1, 2, 3]], [[0, 1, 5, 2]]])
    assert (positions_behind(axes) == axes + 6).all()
    with_text = torch.cat([torch.tensor([[[0, 1, 2, 3]]]), axes])
    moved = positions_behind(with_text)
    assert moved[0].tolist() == [[4, 5, 6, 7]] and torch.equal(moved[1:], axes + 6)


# Descent.


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
def test_pairs_that_are_faded_out_are_masked(family):
    inputs = models.batch(family, LENGTHS)
    prompt = answered(family, inputs)
    kept = prompt.kept(methods.DEFAULT, profile_of(prompt.model, methods.DEFAULT, True), 0.2)
    gates = {layer: torch.zeros(mask.shape).double().masked_fill(~mask, -1e9) for layer, mask in kept.items()}
    (faded,) = next(prompt.faded_divergences([gates], prompt.continuations()[0]))
    assert torch.allclose(faded, prompt.costs([kept])[0].divergence, atol=1e-9, rtol=1e-7)


def test_the_slope_is_that_of_differences():
    prompt = answered("llava_gqa", models.alone("llava_gqa", LENGTHS, 0))
    entries, answer = prompt.entry_ratios(methods.DEFAULT), prompt.continuations()[0]
    ratios = torch.full((6, 2), 0.3, dtype=torch.float64, requires_grad=True)

    def cost(ratios):
        gates = {layer: fade(entry, ratio, 0.1) for (layer, entry), ratio in zip(entries.items(), ratios, strict=True)}
        return next(prompt.faded_divergences([gates], answer)).sum()

    with prompt.frozen(), torch.enable_grad():
        cost(ratios).backward()
    for place in ((0, 0), (3, 1), (5, 0)):
        step = torch.zeros(6, 2, dtype=torch.float64)
        step[place] = 1e-3
        with torch.no_grad():
            slope = (cost(ratios + step) - cost(ratios - step)) / 2e-3
        assert ratios.grad[place].item() == pytest.approx(slope.item(), rel=0.05, abs=1e-6)


@pytest.mark.parametrize("method", ["default", "snapkv", "h2o"])
def test_a_pair_comes_in_at_its_entry_ratio(method):
    inputs = models.batch("llava_gqa", LENGTHS)
    prompt = answered("llava_gqa", inputs, METHODS[method])
    entries = prompt.entry_ratios(METHODS[method])
    for ratio in (0.1, 0.4, 0.8):
        kept = prompt.kept(METHODS[method], uniform(ratio), ratio)
        for layer, mask in kept.items():
            entry = entries[layer].expand_as(mask)
            assert mask[entry < ratio - 0.03].all() and not mask[entry > ratio + 0.03].any()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.02, 0.6), min_size=6, max_size=6), st.sampled_from([0.0, 0.02, 0.9]))
def test_lengths_on_their_way_keep_the_budgets_and_are_nested(ratios, least):
    first = torch.tensor(ratios, dtype=torch.float64).view(1, 3, 2)
    first = first * 0.2 / first.mean()
    start = torch.cat([first.clamp_max(1), torch.lerp(first.clamp_max(1), torch.ones(1, 3, 2).double(), 0.4)])
    anchors = start.mean((1, 2)).tolist()
    descent = Descent(start, anchors, 8, least)
    found = descent.ratios()
    assert torch.allclose(found.mean((1, 2)), torch.tensor(anchors).double(), atol=1e-9)
    if not least:
        assert (found - start).abs().max() < 0.02  # ratios near 0 and 1 are moved a little, so that they can move
    floors = torch.tensor([min(least, anchor / 2) for anchor in anchors], dtype=torch.float64)
    assert (found >= floors.view(-1, 1, 1) - 1e-9).all()
    assert found.diff(dim=0).min() >= 0
    with torch.enable_grad():
        found = descent.ratios()
        (found[0, 0, 0] + found[1, 1, 1]).backward()
    assert descent._free.grad.sum(dim=(1, 2)).abs().max() < 1e-6  # what one head gains the others lose
    with torch.no_grad():
        descent._free += torch.tensor([-9.0, 9.0]) * torch.ones(3, 1)
    assert (descent.ratios() >= floors.view(-1, 1, 1) - 1e-9).all()


def test_a_descent_holds_the_floor_of_the_ranking_it_descends_with():
    keep = torch.tensor([[[0.0, 0.4]], [[0.2, 0.8]]], dtype=torch.float64)
    plan = Plan(unit="head", budgets=(0.2, 0.5))
    for floor, least in (
        (0, 0.0),
        (0.1, 0.1),
        (25, 0.25),
        (40, 0.25),
    ):  # of 100 tokens, half of the budget at most
        method = methods.DEFAULT.replace(floor=floor)
        found = plan.descent(Candidate(keep, method), (1, 2), 100, 4).ratios()[ANCHORS.index(0.5)]
        assert float(found.min()) == pytest.approx(max(least, 0.2), abs=0.02)
        assert float(found.min()) >= least - 1e-9


def test_each_ranking_takes_the_lengths_above_its_own_floor():
    plan = Plan.asked(None, "measured", "head", [0.2, 0.5])
    keeps = {floor: torch.full((2, 1, 2), floor, dtype=torch.float64) for floor in plan.floors}
    found = plan.improved(keeps)
    assert [each.method for each in found.values()] == [plan.method, *plan.rankings]
    assert len(plan.floors) > 1 and all((each.keep == each.method.lengths.floor).all() for each in found.values())
    first = plan.floors[0]
    assert {each.method.lengths.floor for each in plan.improved({first: keeps[first]}).values()} == {first}


def test_a_descent_makes_lengths_cheaper():
    prompt = answered("llava_gqa", models.alone("llava_gqa", LENGTHS, 0))
    descent = Descent(torch.tensor([0.1, 0.2, 0.5]).double().view(3, 1, 1).expand(3, 6, 2).clone(), (0.1, 0.2, 0.5), 12)
    entries = prompt.entry_ratios(methods.DEFAULT)
    costs = [descent.step(prompt, entries) for _ in range(12)]
    assert costs[-1] < costs[0] - 0.1
    keep = descent.at_budgets([0.1, 0.15, 0.5])
    assert torch.allclose(keep.mean((1, 2)), torch.tensor([0.1, 0.15, 0.5]).double())
    assert all(parameter.requires_grad for parameter in prompt.model.parameters())


# Proposals.

RATIOS = (0.1, 0.3, 0.6)
TABLES = st.lists(st.lists(st.floats(0, 4), min_size=3, max_size=3), min_size=1, max_size=5)


def slow_greedy(table, budget, ratios=RATIOS, grain=1000):
    """The cost that is left when thousandths of a unit are handed out, each where it saves most. [unit][ratio]"""
    points = [[*zip(ratios, costs, strict=True), (1.0, 0.0)] for costs in table]

    def hull(unit, x):
        """The lowest chord at x."""
        chords = [
            y0 + (y1 - y0) * (x - x0) / (x1 - x0)
            for x0, y0 in points[unit]
            for x1, y1 in points[unit]
            if x0 <= x + 1e-12 and x <= x1 + 1e-12 and x0 < x1
        ]
        return min(chords)

    kept = [round(ratios[0] * grain)] * len(table)
    for _ in range(round(budget * grain * len(table)) - sum(kept)):
        saved = [
            hull(unit, at / grain) - hull(unit, (at + 1) / grain) if at < grain else -1.0
            for unit, at in enumerate(kept)
        ]
        kept[saved.index(max(saved))] += 1
    return sum(hull(unit, at / grain) for unit, at in enumerate(kept)), hull


@settings(max_examples=15, deadline=None)
@given(TABLES, st.sampled_from([0.15, 0.4, 0.7]))
def test_loss_is_the_greedy_on_hulls(costs, budget):
    keep = loss_ratios(torch.tensor(costs, dtype=torch.float64).T[:, :, None], [budget], RATIOS)[0, :, 0].tolist()
    least, hull = slow_greedy(costs, budget)
    assert sum(hull(unit, ratio) for unit, ratio in enumerate(keep)) <= least + 1e-6


@settings(max_examples=50, deadline=None)
@given(TABLES, st.floats(0, 1))
def test_proposals_by_loss_spend_the_budget_and_are_nested(costs, strength):
    budgets = [0.05, 0.1, 0.2, 0.5, 0.9, 1.0]
    keep = loss_ratios(torch.tensor(costs, dtype=torch.float64).T[:, :, None], budgets, RATIOS)
    for proposal in (keep, blend(keep, budgets, strength)):
        assert torch.allclose(proposal.mean((1, 2)), torch.tensor(budgets, dtype=torch.float64))
        assert proposal.min() >= 0 and proposal.max() <= 1 and proposal.diff(dim=0).min() > -1e-9
    assert torch.allclose(blend(keep, budgets, 1.0), torch.tensor(budgets, dtype=torch.float64).view(-1, 1, 1))


def test_units_that_cost_the_same_get_the_same():
    keep = loss_ratios(torch.tensor([[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]])[:, :, None], [0.2, 0.45, 0.8], RATIOS)
    assert torch.allclose(keep[:, 0], keep[:, 1])


def test_reconstruction_counts_are_one_pool():
    scores = torch.rand(3, 2, 20, generator=torch.Generator().manual_seed(0))
    counts = reconstruction_counts(scores, [0.2, 0.5], 1, "head")
    for row, budget in zip(counts, [0.2, 0.5], strict=True):
        best_two = [head[sorted(range(20), key=lambda key: -head[key])[:2]].min() for of in scores for head in of]
        pool = sorted((value for of in scores for head in of for value in head.tolist()), reverse=True)
        assert row.sum() == budget * scores.numel()
        assert row.min() >= 2
        if min(best_two) >= pool[round(budget * 120) - 1]:  # nobody needed a floor
            assert torch.equal(row, (scores >= pool[round(budget * 120) - 1]).sum(-1).double())
    by_layer = reconstruction_counts(scores, [0.2, 0.5], 1, "layer")
    assert torch.equal(by_layer, counts.mean(2, keepdim=True))


# The choice.


def test_the_best_is_the_one_that_diverges_least_against_uniform_lengths():
    costs = {
        "uniform": [(0.5, 0.9, 0, 0.5), (0.1, 0.95, 0, 0.1)],
        "loss/layer": [(0.3, 0.9, 0, 0.3), (0.09, 0.95, 0, 0.09)],
        "reconstruction/head": [(0.4, 0.9, 0, 0.4), (0.01, 0.99, 0, 0.01)],
        "mass/layer": [(0.9, 0.5, 0, 0.9), (0.3, 0.8, 0, 0.3)],
        "paper": [(0.0, 1.0, 1, 0.0), (0.0, 1.0, 1, 0.0)],
    }
    assert best(costs) == "reconstruction/head"
    assert advantage(costs, "uniform") == 0 < advantage(costs, "mass/layer")
    costs["good answers, bad later"] = [(0.01, 1.0, 1, 4.0), (0.01, 1.0, 1, 4.0)]
    costs["good later"] = [(0.05, 1.0, 1, 0.05), (0.01, 1.0, 1, 0.005)]
    assert best(costs) == "good later"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"by": "measured", "method": ATTENTION}, "mass/layer reconstruction/layer loss/layer paper"),
        (
            {"by": "measured", "unit": "head", "method": ATTENTION},
            "mass/layer mass/head reconstruction/layer reconstruction/head loss/layer loss/head paper",
        ),
        (
            {"by": "measured", "unit": "head", "method": methods.PREFIXKV},
            "mass/layer reconstruction/layer reconstruction/head loss/layer loss/head paper",
        ),
        ({"by": "measured", "method": methods.KEYDIFF}, "reconstruction/layer loss/layer paper"),
        ({"by": "measured"}, "reconstruction/layer loss/layer paper"),
        ({"by": "loss", "unit": "head"}, "loss/head"),
    ],
)
def test_what_is_proposed(options, names):
    assert Plan(**options).proposals == tuple(names.split())
