"""The reference is itself checked, without the library: an oracle that is wrong would prove anything."""

import math

import pytest
import torch
from transformers import DynamicCache

import models
import rules
from models import FAMILIES, PADDED
from oracle import Given, Head, Oracle, Rule, feed, merge, open_attention
from prefixkv_cache.methods import PREFIXKV, Method
from watch import CLOSE

each_family = pytest.mark.parametrize("family", [*FAMILIES, models.EIGHT_HEADS])


@pytest.mark.parametrize("lengths", [(61,), PADDED], ids=["one", "padded"])
@each_family
def test_with_nothing_hidden_it_is_the_model(family, lengths):
    """In two turns; and a padded row is the row alone, or law 3 could not hold for any cache."""
    model, full = models.shared(family), DynamicCache(config=models.weights(family).config)
    oracle = Oracle(model)
    inputs, tokens = models.batch(family, lengths), models.words(len(lengths), 6)
    expected, _ = feed(model, inputs, tokens, full)
    actual, sequences = feed(oracle.model, inputs, tokens, oracle.cache)
    assert (actual - expected).abs().max() < CLOSE
    for index in range(len(lengths)):
        single = Oracle(model)
        alone, _ = feed(single.model, models.alone(family, lengths, index), tokens[index : index + 1], single.cache)
        assert (actual[index] - alone[0]).abs().max() < CLOSE
    again = models.next_turn(inputs, sequences, 9)
    if family == "qwen2_5_vl" and len(lengths) > 1:
        return  # its position deltas are the model's, and are now those of a row alone
    expected, _ = feed(model, again, tokens, full)
    assert (feed(oracle.model, again, tokens, oracle.cache)[0] - expected).abs().max() < CLOSE


@each_family
def test_the_image_is_read_and_attention_is_worth_pruning(family):
    """Two images, two answers; attention is not uniform, and not so peaked that the tail is rounding error."""
    inputs, logits = models.batch(family), []
    for picture in (inputs["pixel_values"], -inputs["pixel_values"]):
        oracle = Oracle(models.shared(family))
        logits.append(feed(oracle.model, {**inputs, "pixel_values": picture}, models.words(1, 1), oracle.cache)[0])
        for layer in oracle.prunable:
            falling = sorted(rules.importance(oracle.weights[layer][0].tolist(), range(61)), reverse=True)
            assert 0.6 < sum(falling[:30]) / sum(falling) < 0.99
    assert (logits[0] - logits[1]).abs().max() > 1e-3 and logits[0].std() > 0.1


@each_family
def test_it_computes_in_float64(family):
    """A part in float32 anywhere would be seen here: rounding error of 1e-8 in place of 1e-15."""
    model, inputs = models.build(family, "sdpa"), models.batch(family)
    exact, _ = feed(model, inputs, models.words(1, 2), DynamicCache(config=model.config))
    for parameter in model.model.language_model.embed_tokens.parameters():
        parameter.data += 1e-12  # that float32 would not notice
    moved, _ = feed(model, inputs, models.words(1, 2), DynamicCache(config=model.config))
    assert 1e-14 < (exact - moved).abs().max() < 1e-9


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


@pytest.mark.parametrize("family", FAMILIES)
def test_hiding_is_attending_to_the_rest(family):
    """A step with hidden pairs has, head by head, weights that are zero there and sum to one elsewhere."""
    kept = [[0, 2, 3, 5, 8, 13, 21, 34, 55, 60], [0, 1, 4, 60]]
    layers, n_heads = models.prunable_layers(models.weights(family)), 4 if family == "llava_mha" else 2
    log = [
        {layer: [[kept[head % 2] + list(range(61, 61 + step)) for head in range(n_heads)]] for layer in layers}
        for step in range(4)
    ]
    oracle = Oracle(models.shared(family), Given(log))
    feed(oracle.model, models.batch(family), models.words(1, 4), oracle.cache)
    for layer in layers:
        for head, weights in enumerate(oracle.weights[layer][0, :, 0]):
            visible = [*kept[head * n_heads // 4 % 2], 61, 62, 63]
            hidden = [position for position in range(64) if position not in visible]
            assert (weights[hidden] == 0).all() and (weights[visible] > 0).all()
            assert torch.allclose(weights.sum(), torch.ones_like(weights.sum()))


# The rules, by hand.

WEIGHTS = [  # two query heads, three queries and keys
    [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]],
    [[1.0, 0.0, 0.0], [0.1, 0.9, 0.0], [0.4, 0.3, 0.3]],
]


def test_scores_by_hand():
    assert rules.last_queries(5, 2) == [3, 4] and rules.last_queries(2, 5) == rules.last_queries(2, "all") == [0, 1]
    assert rules.even_queries(10, 4) == [1, 4, 6, 9] and rules.even_queries(3, 4) == rules.even_queries(3, "all")
    assert rules.importance(WEIGHTS, [0, 1, 2]) == pytest.approx([1.6, 1.0, 0.4])
    assert rules.importance(WEIGHTS, [2]) == pytest.approx([0.3, 0.3, 0.4])
    assert rules.pool([1, 5, 2, 0], 3) == [5, 5, 5, 2] and rules.pool([1, 5, 3, 1], 3, "mean") == [3, 3, 3, 2]
    assert rules.without_sink([9, 1, 3], 1) == [0, 0.25, 0.75] and rules.without_sink([9, 0], 1) == [0, 0]
    ranking = PREFIXKV.replace(queries=1, context=2).ranking  # queries 0 and 2 of three, beside the last
    assert rules.even_queries(3, 2) == [0, 2]
    assert rules.attention_scores(WEIGHTS, ranking, 1) == pytest.approx([0, 3 / 7, 4 / 7])  # here both are the same
    assert rules.differences_from_mean([[1, 0], [0, 2]]) == pytest.approx([1 - 0.5**0.5] * 2)
    assert rules.join([[1, 2], [3, 0]], "mean") == [[2, 1]] * 2 and rules.join([[1, 2], [3, 0]], "max") == [[3, 2]] * 2


def test_lengths_by_hand():
    assert [rules.prompt_count(10, keep) for keep in (1.0, 0.75, 0.65, 0.55, 0.0)] == [10, 8, 6, 6, 2]
    assert rules.prompt_count(1, 0.5) == 1
    assert [rules.staggered_count(10, 0.25, place, 4) for place in range(4)] == [2, 2, 3, 3]
    assert rules.pyramid(0.4, 3) == pytest.approx([0.78, 0.4, 0.02]) and rules.pyramid(0.8, 2) == [
        1.0,
        0.6000000000000001,
    ]
    assert rules.raised([0.1, 0.5, 0.6], 0.3) == pytest.approx([0.3, 0.9 / 11 * 5, 0.9 / 11 * 6])
    assert rules.raised([0.1, 0.3], 0.4) == [0.2, 0.2]
    assert rules.grouped([0.1, 0.9, 0.2, 0.8], most=2) == pytest.approx([0.15, 0.85, 0.15, 0.85])
    assert rules.grouped([0.1, 0.1, 0.5], most=2) == pytest.approx([0.1, 0.1, 0.5])
    assert rules.pool_of_all([[[9, 8, 7], [1, 2, 3]], [[4, 6, 5], [0, 0, 0]]], 8, 1) == [[3, 1], [3, 1]]


def test_selection_by_hand():
    assert rules.select([0.0, 5.0, 1.0, 5.0, 0.0], 3, 1) == [0, 1, 4]  # of the two fives, the earlier
    assert rules.select([0.0, 5.0, 1.0, 5.0, 0.0], 2, 1) == [0, 4]
    assert rules.select([0.0, 5.0, 1.0, 5.0, 0.0], 3, 0, 2) == [1, 3, 4]
    assert rules.select([0.0, 5.0, 1.0, 5.0, 0.0], 3, 1, 1, {2}) == [0, 2, 4]
    assert rules.members([3, 4, 5, 6, 7], [3, 5, 7]) == {5: [4, 6]}


def test_search_by_hand():
    peaked, flat = [0.91, 0.03, 0.02, 0.02, 0.01, 0.01], [1 / 6] * 6
    assert rules.search([peaked, flat], 0.5) == [2, 4]  # the peaked one is served by its least, the flat gets the rest
    assert rules.search([flat], 0.5) == [3]
    assert rules.search([[0.0] * 6, [0.0] * 6], 0.5) == [3, 3]
    assert rules.search([peaked, flat], 1.0) == [6, 6]
    assert rules.search([peaked, flat], 0.01) == [2, 2]


def decoded(method, head, steps=4, seen=20):
    """What one head holds after some steps."""
    rule = Rule(Method.parse(method), 0.5)
    rule.heads = {0: [[head]]}
    for now in range(seen + 1, seen + steps + 1):
        rule.before([list(range(now))], 1)
    return head.kept


def test_decode_rules_by_hand():
    """Ten pairs of twenty tokens kept. Distance 3: the queue begins at index 7."""

    def ten(**state):
        return Head(list(range(0, 20, 2)), ratio=0.5, held=10, **state)

    assert decoded("prefixkv:distance=3", ten()) == [0, 2, 4, 6, 8, 10, 12, 18, 20, 21, 22, 23]
    assert decoded("prefixkv:distance=none", ten()) == [*range(0, 20, 2), 20, 21, 22, 23]
    assert decoded("prefixkv:distance=3;headroom=1", ten()) == [*range(0, 14, 2), 16, 18, 20, 21, 22, 23]
    assert decoded("streaming", ten()) == [0, 2, 4, 6, 12, 14, 16, 18, 20, 21, 22, 23]
    received = {position: abs(position - 9.5) for position in range(24)}  # the middle is least important
    assert decoded("h2o:recent=1", ten(received=received)) == [0, 2, 4, 6, 12, 14, 16, 18, 20, 21, 22, 23]


def test_merging_by_hand():
    pairs = DynamicCache()
    pairs.update(torch.arange(5.0)[None, None, :, None], torch.arange(5.0)[None, None, :, None] * 10, 0)
    merge(pairs.layers[0], 0, 0, {2: [1, 3, 0]})
    assert pairs.layers[0].keys.flatten().tolist() == [0, 1, 1.5, 3, 4]
    assert pairs.layers[0].values.flatten().tolist() == [0, 10, 15, 30, 40]
