"""Decoding with `max_new_tokens`: memory allocated at the prompt's end, constant addresses, compiled as one graph."""

import pytest
import torch
import torch._dynamo.utils
from transformers import CompileConfig

import models
from models import PADDED
from oracle import Given, Oracle, feed
from prefixkv_cache import PrefixKVCache
from test_laws import Case

STEPS = 30
CASES = [
    Case("llava_mha"),
    Case("llava_gqa", lengths=PADDED, budget=0.35, distance=5),
    Case("qwen2_5_vl", source="online", lengths=PADDED),
    Case("llava_gqa", "eager", budget=1.0),
]


class Run:
    """Prompt and STEPS tokens along fixed words; what the cache said of itself after each forward pass."""

    def __init__(self, case, cache):
        self.cache, self.layers = cache, case.layers
        self.kept, self.stored, self.addresses = [], [], []
        tokens = models.words(len(case.lengths), STEPS + 1)
        model, inputs = models.build(case.family, case.attn), models.batch(case.family, case.lengths)
        self.logits, _ = feed(model, inputs, tokens, cache, self.look)

    def look(self):
        self.kept.append({layer: self.rows(layer) for layer in self.layers})
        self.stored.append(self.cache.stored_lengths())
        buffers = [self.cache.layers[layer]._buffers for layer in self.layers]
        self.addresses.append([(each.keys.data_ptr(), each.values.data_ptr()) for each in buffers])

    def rows(self, layer):
        return [sorted(at for at in row if at >= 0) for row in self.cache.kept_positions(layer).tolist()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_law_2_with_a_schedule(case):
    """As without one, and as the masked full cache; at constant addresses, with room for no pair too many."""
    planned, plain = Run(case, case.cache(max_new_tokens=STEPS)), Run(case, case.cache())
    assert planned.kept == plain.kept and planned.stored == plain.stored
    torch.testing.assert_close(planned.logits, plain.logits, atol=1e-5, rtol=1e-5)
    oracle, tokens = Oracle(models.build(case.family), Given(planned.kept)), models.words(len(case.lengths), STEPS + 1)
    wanted, _ = feed(oracle.model, models.batch(case.family, case.lengths), tokens, oracle.cache)
    torch.testing.assert_close(planned.logits, wanted, atol=1e-4, rtol=1e-4)
    assert all(each == planned.addresses[0] for each in planned.addresses)
    room = [planned.cache.layers[layer]._buffers.keys.shape[2] for layer in case.layers]
    assert room == [planned.stored[-1][layer] for layer in case.layers]


def generated(model, inputs, cache, **options):
    output = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=12, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits, 1)


@pytest.mark.parametrize(
    ("case", "backend"), [(CASES[0], "aot_eager"), (CASES[1], "eager"), (CASES[2], "eager")], ids=str
)
def test_compiled_generate_is_one_graph(case, backend):
    """transformers compiles decoding by itself where a cache allows it; on a CPU it has to be told to."""
    model, inputs = models.build(case.family, case.attn), models.batch(case.family, case.lengths)
    wanted_ids, wanted = generated(model, inputs, case.cache())
    config = CompileConfig(backend=backend, fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cache = case.cache(max_new_tokens=12)
    ids, logits = generated(model, inputs, cache, compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert ids.tolist() == wanted_ids.tolist()
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert int(cache.get_seq_length()) == ids.shape[1] - 1
    torch._dynamo.reset()


def test_prompts_of_other_lengths_compile_once_more():
    """The second prompt's shapes differ from the first's and become symbols; that graph serves all later ones."""
    case, config = CASES[1], CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    model = models.build(case.family, case.attn)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for lengths in (PADDED, (50, 33, 20), (55, 30, 20), (44, 41, 40)):
        inputs = models.batch(case.family, lengths)
        (_, wanted), (_, found) = (
            generated(model, inputs, case.cache()),
            generated(model, inputs, case.cache(max_new_tokens=12), compile_config=config),
        )
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_a_second_turn_and_beams_make_new_plans():
    case = CASES[1]
    model, inputs = models.build(case.family), models.batch(case.family, case.lengths)
    for options in ({"num_beams": 2}, {}):
        caches = [case.cache(), case.cache(max_new_tokens=12)]
        (ids, wanted), (found_ids, found) = (generated(model, inputs, cache, **options) for cache in caches)
        assert ids.tolist() == found_ids.tolist()
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    turn = models.next_turn(inputs, ids, 9)
    (ids, wanted), (found_ids, found) = (generated(model, turn, cache) for cache in caches)
    assert ids.tolist() == found_ids.tolist()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="least-important"):
        PrefixKVCache(budget=0.5, evict="least-important", max_new_tokens=8)
    with pytest.raises(ValueError, match="max_new_tokens"):
        PrefixKVCache(budget=0.5, max_new_tokens=0)
