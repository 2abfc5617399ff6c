"""The reference is itself checked, without the library: an oracle that is wrong would prove anything."""

import math

import pytest
import torch
from transformers import DynamicCache

import models
from oracle import Given, Oracle, Rule, feed, importance, open_attention, prompt_count, search, select


@pytest.mark.parametrize("lengths", [(61,), models.PADDED], ids=["one", "padded"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_with_nothing_hidden_it_is_the_model(family, lengths):
    model = models.build(family)
    inputs, tokens = models.batch(family, lengths), models.words(len(lengths), 12)
    oracle = Oracle(model)
    expected, _ = feed(model, inputs, tokens, DynamicCache(config=model.config))
    actual, sequences = feed(oracle.model, inputs, tokens, oracle.cache)
    assert (actual - expected).abs().max() < 1e-5

    again = models.next_turn(inputs, sequences, 9)
    full = DynamicCache(config=model.config)
    feed(model, inputs, tokens, full)
    expected, _ = feed(model, again, tokens, full)
    actual, _ = feed(oracle.model, again, tokens, oracle.cache)
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_padded_row_is_the_row_alone(family):
    """Otherwise law 3 could not hold for any cache."""
    tokens = models.words(3, 8)
    together = Oracle(models.build(family))
    logits, _ = feed(together.model, models.batch(family, models.PADDED), tokens, together.cache)
    for index in range(3):
        single, inputs = Oracle(models.build(family)), models.alone(family, models.PADDED, index)
        expected, _ = feed(single.model, inputs, tokens[index : index + 1], single.cache)
        assert (logits[index] - expected[0]).abs().max() < 1e-4


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_image_is_read(family):
    """Two images, two answers: the prompts of these tests really are image prompts."""
    inputs = models.batch(family)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    model, tokens = models.build(family), models.words(1, 1)
    first, _ = feed(model, inputs, tokens, DynamicCache(config=model.config))
    second, _ = feed(model, other, tokens, DynamicCache(config=model.config))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("family", models.FAMILIES)
def test_rounding_error_is_well_under_the_limits(family):
    """The laws allow 1e-5 and 1e-4: a model that magnifies float32's own rounding to that could not be tested."""
    single, double = models.build(family), models.build(family, dtype=torch.float64)
    inputs, tokens = models.batch(family), models.words(1, 46)
    logits, _ = feed(single, inputs, tokens, DynamicCache(config=single.config))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    exact, _ = feed(double, inputs, tokens, DynamicCache(config=double.config))
    assert (logits - exact).abs().max() < 8e-6
    assert logits.std() > 0.1


@pytest.mark.parametrize("family", models.FAMILIES)
def test_attention_is_worth_pruning(family):
    """Not uniform, and not so peaked that the tail is rounding error."""
    oracle = Oracle(models.build(family), rule := Rule(keep=[1.0] * len(models.prunable_layers(models.build(family)))))
    feed(oracle.model, models.batch(family), models.words(1, 1), oracle.cache)
    for rows in rule.importance.values():
        falling = sorted(rows[0], reverse=True)
        half = sum(falling[: len(falling) // 2]) / sum(falling)
        assert 0.6 < half < 0.99


def test_hidden_pairs_have_no_weight():
    """Three keys by hand: hiding the second leaves the softmax of the other two."""
    module = torch.nn.Module()
    module.layer_idx = 0
    module.oracle = Oracle.__new__(Oracle)
    module.oracle.hidden, module.oracle.weights = {0: torch.tensor([[[False, True, False]]])}, {}
    query = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # one row, two heads, one query
    key = torch.tensor([[[[1.0, 2.0], [9.0, 9.0], [3.0, 0.0]]]])  # one head of keys, used by both
    value = torch.tensor([[[[1.0, 0.0], [7.0, 7.0], [0.0, 1.0]]]])
    out, weights = open_attention(module, query, key, value, None, scaling=1.0)
    first = math.exp(1) / (math.exp(1) + math.exp(3))
    second = math.exp(2) / (math.exp(2) + math.exp(0))
    expected = torch.tensor([[first, 0.0, 1 - first], [second, 0.0, 1 - second]])
    assert torch.allclose(weights[0, :, 0], expected)
    assert torch.allclose(out[0, 0], expected[:, [0, 2]])


@pytest.mark.parametrize("family", models.FAMILIES)
def test_hiding_is_attending_to_the_rest(family):
    """A step with hidden pairs has, in every layer, weights that are zero there and sum to one elsewhere."""
    kept = [0, 2, 3, 5, 8, 13, 21, 34, 55, 60]
    model = models.build(family)
    layers = models.prunable_layers(model)
    log = [{layer: [kept + list(range(61, 61 + step))] for layer in layers} for step in range(4)]
    oracle = Oracle(model, Given(log))
    feed(oracle.model, models.batch(family), models.words(1, 4), oracle.cache)
    visible = [*kept, 61, 62, 63]
    hidden = [position for position in range(64) if position not in visible]
    for layer in layers:
        weights = oracle.weights[layer][0, :, 0]
        assert (weights[:, hidden] == 0).all()
        assert torch.allclose(weights[:, visible].sum(-1), torch.ones(weights.shape[0]))
        assert (weights[:, visible] > 0).all()


def test_importance_by_hand():
    weights = torch.tensor(  # two heads, four queries and keys; the first position is padding
        [
            [[9.0, 9.0, 9.0, 9.0], [9.0, 1.0, 0.0, 0.0], [9.0, 0.5, 0.5, 0.0], [9.0, 0.2, 0.3, 0.5]],
            [[9.0, 9.0, 9.0, 9.0], [9.0, 1.0, 0.0, 0.0], [9.0, 0.1, 0.9, 0.0], [9.0, 0.4, 0.3, 0.3]],
        ]
    )
    assert importance(weights, [1, 2, 3], "all") == pytest.approx([1.6, 1.0, 0.4])
    assert importance(weights, [1, 2, 3], 1) == pytest.approx([0.3, 0.3, 0.4])
    assert importance(weights, [1, 2, 3], 99) == pytest.approx([1.6, 1.0, 0.4])


def test_counts_by_hand():
    assert [prompt_count(10, keep) for keep in (1.0, 0.75, 0.65, 0.55, 0.0)] == [10, 8, 6, 6, 2]
    assert prompt_count(1, 0.5) == 1


def test_selection_by_hand():
    assert select([0.0, 5.0, 1.0, 5.0, 0.0], 3) == [0, 1, 4]  # of the two fives, the earlier
    assert select([0.0, 5.0, 1.0, 5.0, 0.0], 2) == [0, 4]
    assert select([0.0, 5.0, 1.0, 5.0, 0.0], 5) == [0, 1, 2, 3, 4]


def test_search_by_hand():
    peaked, flat = [0.91, 0.03, 0.02, 0.02, 0.01, 0.01], [1 / 6] * 6
    assert search([peaked, flat], 0.5) == [2, 4]  # the peaked layer is served by its least, the flat one gets the rest
    assert search([flat], 0.5) == [3]
    assert search([[0.0] * 6, [0.0] * 6], 0.5) == [3, 3]
    assert search([peaked, flat], 1.0) == [6, 6]
    assert search([peaked, flat], 0.01) == [2, 2]


def test_decode_rule_by_hand():
    """Ten pairs of twenty tokens kept, distance 3: the queue begins at index 7."""
    rule = Rule(keep=[0.5], distance=3)
    rule.kept = {0: [list(range(0, 20, 2))]}
    rule.lengths, rule.ratios = {0: [10]}, {0: [0.5]}
    for seen in range(21, 25):
        rule.before([list(range(seen))], 1)
    assert rule.kept[0][0] == [0, 2, 4, 6, 8, 10, 12, 18, 20, 21, 22, 23]
