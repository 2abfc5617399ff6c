"""Decoding with `max_new_tokens`: memory allocated at the prompt's end, constant addresses, compiled as one graph."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils
from transformers import CompileConfig

import models
from models import EIGHT_HEADS, PADDED
from prefixkv_cache import PrefixKVCache
from watch import CLOSE, Case, Watch, follow, greedy, pairs_of, run, talk

CASES = [
    Case("prefixkv", "llava_mha", lengths=(61,), profile="layer", turns=(20,)),
    Case("prefixkv:distance=5", budget=0.35, profile="layer", turns=(20,)),
    Case("prefixkv:distance=5", EIGHT_HEADS, profile="head", turns=(20,)),
    Case("default:headroom=6", "qwen2_5_vl", profile="head", turns=(20,)),
    Case("snapkv:queries=8;recent=8;distance=5", "gemma3", turns=(20,)),
    Case("streaming", turns=(20,)),
    Case("elastic:heads=each", profile="head", turns=(20,)),
    Case("default", attn="eager", lengths=(61,), budget=1.0, turns=(20,)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
IN_FLOAT32 = 1e-4  # compiled, transformers' own casts are in


class Addresses(Watch):
    """Where keys and values of the pruned layers lie after each forward pass."""

    def __init__(self, *args):
        super().__init__(*args)
        self.addresses = []

    def __call__(self):
        super().__call__()
        pruned = [self.cache.layers[layer] for layer in self.layers]
        self.addresses.append(sorted(tensor.untyped_storage().data_ptr() for tensor in pairs_of(*pruned)))


@each_case
def test_law_2_with_planned_memory(case):
    """As without a plan, and as the masked full cache; at constant addresses, with room for no pair too many."""
    logits, watch = run(case)
    planned = Addresses(case.cache(max_new_tokens=case.turns[0] - 1), case.family)
    by_plan, _ = talk(case.model, case, planned.cache, planned)
    assert planned.kept == watch.kept and planned.lengths_by_head == watch.lengths_by_head
    assert (by_plan - logits).abs().max() < CLOSE
    follow(case)
    assert all(each == planned.addresses[0] for each in planned.addresses)
    assert planned.nbytes[-1] == planned.taken[-1]
    if len(case.lengths) == 1 and case.family != "gemma3":
        text = case.model.config.get_text_config()
        pair = 2 * text.hidden_size // text.num_attention_heads * 8
        assert planned.nbytes[-1] == pair * sum(sum(heads) for heads in planned.lengths_by_head[-1])


@each_case
def test_a_second_turn_and_beams_make_new_plans(case):
    inputs = case.prompt()
    for options in ({"num_beams": 2}, {}):
        caches = [case.cache(), case.cache(max_new_tokens=8)]
        (ids, wanted), (found_ids, found) = (greedy(case.model, inputs, cache, new=8, **options) for cache in caches)
        assert torch.equal(ids, found_ids) and (found - wanted).abs().max() < CLOSE
    turn = models.next_turn(inputs, ids, 9)
    (ids, wanted), (found_ids, found) = (greedy(case.model, turn, cache, new=8) for cache in caches)
    assert torch.equal(ids, found_ids) and (found - wanted).abs().max() < CLOSE


def generated(model, inputs, cache, **options):
    output = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=12, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits, 1)


def compiling(backend, **options):
    """transformers compiles decoding by itself where a cache allows it; on a CPU it has to be told to."""
    config = CompileConfig(backend=backend, fullgraph=True, mode=None, **options)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return config


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("case", "backend"), [(CASES[0], "aot_eager"), (CASES[3], "eager")], ids=str)
def test_compiled_generate_is_one_graph(case, backend):
    model, inputs = models.build(case.family, case.attn, torch.float32), case.prompt()
    wanted_ids, wanted = generated(model, inputs, case.cache())
    config, cache = compiling(backend, dynamic=False), case.cache(max_new_tokens=12)
    ids, logits = generated(model, inputs, cache, compile_config=config)
    assert graphs() == 1
    assert ids.tolist() == wanted_ids.tolist()
    torch.testing.assert_close(logits, wanted, atol=IN_FLOAT32, rtol=IN_FLOAT32)
    assert int(cache.get_seq_length()) == ids.shape[1] - 1
    torch._dynamo.reset()


def test_prompts_of_other_lengths_compile_once_more():
    """The second prompt's shapes differ from the first's and become symbols; that graph serves all later ones."""
    case, config = CASES[2], compiling("eager")
    model = models.build(case.family, case.attn, torch.float32)
    for lengths in (PADDED, (50, 33, 20), (55, 30, 20)):
        inputs = models.batch(case.family, lengths)
        _, wanted = generated(model, inputs, case.cache())
        _, found = generated(model, inputs, case.cache(max_new_tokens=12), compile_config=config)
        torch.testing.assert_close(found, wanted, atol=IN_FLOAT32, rtol=IN_FLOAT32)
    assert graphs() <= 2
    torch._dynamo.reset()


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="least-important"):
        PrefixKVCache(budget=0.5, method="h2o", max_new_tokens=8)
    for value in (0, 2.5, "many"):
        with pytest.raises((ValueError, TypeError), match="max_new_tokens"):
            PrefixKVCache(budget=0.5, max_new_tokens=value)
    assert not replace(CASES[0], budget=0.5).cache().is_compileable
