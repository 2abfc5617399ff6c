"""Pruned and quantised: what is stored is what pruning leaves, and each pair of it has been through codes once.

Beside the cache stands `Slow`: every pair as the model made it, by position, and the numbers that loops over plain
floats make of it. Which positions stay is the pruned cache's own concern, and is tested elsewhere.
"""

import importlib.util

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import models
from oracle import feed
from prefixkv_cache import PrefixKVCache
from prefixkv_cache.cache import quantized
from prefixkv_cache.cache.quantized import GROUP, NEWEST
from prefixkv_cache.cache.storage import Pairs
from watch import CLOSE, Case, kept_by_head, talk

needs_quanto = pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None, reason="needs optimum-quanto: pip install -e '.[quantize]'"
)
CASES = [
    (Case("default:headroom=2", budget=0.7, turns=(24, 6)), "int4"),
    (Case("default:headroom=20", profile="head", budget=0.7, turns=(24, 4)), "int8"),
    (Case("h2o", budget=0.4, turns=(24, 4)), "int4"),
    (Case("prefixkv:distance=9", "qwen2_5_vl", budget=1.0, turns=(24, 4)), "int4"),
    (Case("snapkv:queries=8;recent=4;distance=5", "llava_mha", budget=0.4, turns=(20, 12)), "int8"),
]
LONG = Case("default:headroom=20", budget=0.7, turns=(24,))


@pytest.fixture
def small(monkeypatch):
    """Groups of a few pairs, so that short answers fill some."""
    monkeypatch.setattr(quantized, "GROUP", 8)
    monkeypatch.setattr(quantized, "NEWEST", 5)


def coded(numbers, bits):
    """One group of floats through codes."""
    low, high = min(numbers), max(numbers)
    if low == high:
        return numbers
    scale = (high - low) / (2**bits - 1)
    return [scale * max(0, min(2**bits - 1, round((each - low) / scale))) + low for each in numbers]


class Slow:
    """What each layer, row and head should hold: position -> key and value, as lists."""

    def __init__(self, cache, case):
        self.cache, self.case, self.bits = cache, case, int(cache.quantize[-1])
        self.fed, self.held, self.newest, self.flushes = {}, {}, {}, 0
        update = cache.update

        def noted(keys, values, layer, *args, **kwargs):
            self.fed.setdefault(layer, []).append((keys.clone(), values.clone()))
            return update(keys, values, layer, *args, **kwargs)

        cache.update = noted

    def __call__(self):
        """After each forward pass."""
        for layer in self.case.layers:
            pairs = self.fed[layer][-1]
            n_new = pairs[0].shape[2]
            for row, heads in enumerate(kept_by_head(self.cache, layer, self.case.heads)):
                for head, kept in enumerate(heads):
                    self._follow((layer, row, head), kept, n_new, [each[row, head].tolist() for each in pairs])

    def _follow(self, place, kept, n_new, pairs):
        held, newest = self.held.setdefault(place, {}), self.newest.setdefault(place, [])
        first = int(self.cache.get_seq_length()) - n_new
        for position in set(held) - set(kept):
            del held[position]
        new = [position for position in kept if position >= first]
        for position in new:
            held[position] = tuple(each[position - first] for each in pairs)
        newest += new
        if n_new > 1:
            there = sorted(position for position in newest if position in held)
            self._to_codes(held, there[: -quantized.NEWEST])
            newest[:] = [-1] * (quantized.NEWEST - len(there)) + there[-quantized.NEWEST :]
        elif len(newest) == quantized.NEWEST + quantized.GROUP:
            self.flushes += 1
            self._to_codes(held, [position for position in newest[: quantized.GROUP] if position in held])
            del newest[: quantized.GROUP]

    def _to_codes(self, held, positions):
        for group in (positions[at : at + quantized.GROUP] for at in range(0, len(positions), quantized.GROUP)):
            channels = zip(*(held[position][0] for position in group), strict=True)
            keys = zip(*(coded(channel, self.bits) for channel in channels), strict=True)
            for position, key in zip(group, keys, strict=True):
                held[position] = list(key), coded(held[position][1], self.bits)

    def check(self):
        """What is stored, slot by slot."""
        for layer in self.case.layers:
            positions = self.cache.kept_positions(layer)
            positions = positions if positions.ndim == 3 else positions[:, None].expand(-1, self.case.heads, -1)
            stored = self.cache.layers[layer].keys, self.cache.layers[layer].values
            for (of, row, head), held in self.held.items():
                if of != layer:
                    continue
                there = (positions[row, head] >= 0).nonzero().flatten()
                found = positions[row, head, there].tolist()
                assert sorted(found) == sorted(held)
                for own, which in zip(stored, (0, 1), strict=True):
                    wanted = torch.tensor([held[position][which] for position in found], dtype=own.dtype)
                    assert (own[row, head, there] - wanted).abs().max() < 1e-12
                    exact = [i for i, position in enumerate(found) if position in self.newest[of, row, head]]
                    assert own[row, head, there][exact].equal(wanted[exact])


@needs_quanto
@pytest.mark.parametrize(("case", "name"), CASES, ids=str)
def test_each_pair_goes_through_codes_once(small, case, name):
    """Over an answer and a second turn: which pairs are exact, and what the others have become."""
    cache = case.cache(quantize=name)
    slow = Slow(cache, case)
    talk(case.model, case, cache, slow)
    assert slow.flushes
    slow.check()


@needs_quanto
def test_attention_reads_what_is_stored():
    """Logits are those of the pruned cache with these numbers in its buffers."""
    case = Case("default:headroom=70", profile="head", budget=0.7)
    model, inputs, cache, plain = case.model, case.prompt(), case.cache(quantize="int4"), case.cache()
    for each in (cache, plain):
        feed(model, inputs, models.words(3, 1), each)
    for own, other in zip(cache.layers, plain.layers, strict=True):
        for mine, theirs in zip(own.segments, other.segments, strict=True):
            assert (mine.keys - theirs.keys).abs().max() > 1e-3
            theirs.keys.copy_(mine.keys)
            theirs.values.copy_(mine.values)
    ours, wanted = (go_on(case, each, 30) for each in (cache, plain))
    assert (ours - wanted).abs().max() < CLOSE


@torch.no_grad()
def go_on(case, cache, n):
    """Logits of `n` further steps."""
    ids, seen = models.words(3, n, seed=9), cache.get_seq_length()
    padding = case.prompt()["attention_mask"]
    mask = torch.cat([padding, padding.new_ones(3, seen + n - padding.shape[1])], dim=1)
    steps = [
        case.model(input_ids=ids[:, at : at + 1], attention_mask=mask[:, : seen + at + 1], past_key_values=cache)
        for at in range(n)
    ]
    return torch.cat([step.logits for step in steps], dim=1)


@needs_quanto
def test_a_batch_is_its_members(small):
    together = LONG.cache(quantize="int4")
    talk(LONG.model, LONG, together)
    for row, length in enumerate(LONG.lengths):
        alone, pad = LONG.cache(row, quantize="int4"), LONG.lengths[0] - length
        talk(LONG.model, LONG, alone, row=row)
        for layer in LONG.layers:
            (own, positions), (of_batch, there) = _sorted(alone, layer, 0), _sorted(together, layer, row)
            assert there.equal(positions + pad)
            assert (own - of_batch).abs().max() < CLOSE


def _sorted(cache, layer, row):
    """The pairs of a row by position: [heads, stored, 2 x head_dim], and the positions, [heads, stored]."""
    pairs = torch.cat([cache.layers[layer].keys, cache.layers[layer].values], dim=3)[row]
    positions, order = cache.kept_positions(layer)[row].sort(-1)
    held = int((positions >= 0).sum(-1).max())
    return pairs.take_along_dim(order[..., -held:, None], 1), positions[..., -held:]


@needs_quanto
def test_rows_copies_and_crops_change_no_number(small):
    cache = LONG.cache(quantize="int4")
    talk(LONG.model, LONG, cache)
    before = [[_sorted(cache, layer, row) for row in range(3)] for layer in LONG.layers]
    copy = cache.copy()
    copy.reorder_cache(torch.tensor([2, 0, 2]))
    copy.crop(-3)
    for layer, old in zip(LONG.layers, before, strict=True):
        for row, source in enumerate((2, 0, 2)):
            pairs, positions = _sorted(copy, layer, row)
            assert positions.equal(old[source][1][:, :-3]) and pairs.equal(old[source][0][:, :-3])
            assert _sorted(cache, layer, row)[0].equal(old[row][0])
    assert go_on(LONG, cache.copy(), 12).equal(go_on(LONG, cache, 12))


def llama(layers=2, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=layers,
        vocab_size=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


@needs_quanto
def test_the_codes_are_those_of_transformers():
    """At budget 1.0: the older pairs are what its own layer makes of them, keys by channel, values by pair."""
    from optimum.quanto.tensor.grouped import ungroup
    from transformers.cache_utils import QuantoQuantizedLayer

    model, n = llama(), 2 * GROUP
    ids = torch.randint(64, (1, n + NEWEST))
    cache, full = PrefixKVCache.for_model(model, 1.0, quantize="int4"), DynamicCache()
    for each in (cache, full):
        model(ids, past_key_values=each, use_cache=True)
    theirs = QuantoQuantizedLayer(nbits=4, axis_key=-1, axis_value=0, q_group_size=GROUP)
    for own, other in zip(cache.layers, full.layers, strict=True):
        for name, axis in (("keys", -1), ("values", 0)):
            whole = getattr(other, name).detach()
            quantized = theirs._quantize(whole[:, :, :n].contiguous(), axis=axis)
            packed = quantized._data._data
            codes = torch.cat([packed & 15, packed >> 4])[: len(quantized._data)]
            wanted = ungroup(quantized._scale * codes - quantized._shift, axis, (1, 2, n, 64))
            assert getattr(own, name)[:, :, :n].equal(wanted)
            assert getattr(own, name)[:, :, n:].equal(whole[:, :, n:])


@needs_quanto
@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_by_hand(bits):
    model = llama(dtype=torch.bfloat16)
    cache = PrefixKVCache.for_model(model, 0.5, method="default", quantize=f"int{bits}")
    model(torch.randint(64, (1, 300)), past_key_values=cache, use_cache=True)
    kept, blocks = 150, 3  # 134 in codes: 64, 64 and 6
    codes = 2 * kept * 64 * bits // 8
    scales = 2 * 2 * (kept + blocks * 64)  # of values by pair, of keys by channel; scale and shift, two bytes each
    assert cache.stored_lengths() == [kept, kept]
    assert cache.nbytes == 2 * 2 * (codes + scales + 2 * kept + 2 * 2 * NEWEST * 64)
    assert f"quantize='int{bits}'" in repr(cache) and f"of {2 * 2 * 300 * 64 * 2 * 2} in a full cache" in repr(cache)


@pytest.mark.parametrize("bits", [8, 4])
def test_by_the_other_library(bits):
    """hqq: no number is off by more than a step of its group's range; the newest are exact; as many bytes."""
    pytest.importorskip("hqq", reason="needs hqq: pip install hqq")
    model, ids = llama(), torch.randint(64, (1, 200))
    cache, plain = (PrefixKVCache.for_model(model, 0.5, quantize=name) for name in (f"hqq-int{bits}", None))
    for each in (cache, plain):
        model(ids, past_key_values=each, use_cache=True)
    own, whole = cache.layers[0].keys, plain.layers[0].keys
    step = (whole.amax(2, keepdim=True) - whole.amin(2, keepdim=True)) / (2**bits - 1)
    assert ((own - whole).abs() <= step).all() and own[:, :, -NEWEST:].equal(whole[:, :, -NEWEST:])
    assert cache.nbytes < (0.6 if bits == 8 else 0.5) * plain.nbytes


@needs_quanto
def test_compress():
    model, inputs = models.shared("llava_gqa", "sdpa"), models.batch("llava_gqa", (61,))
    cache, plain = (PrefixKVCache.compress(model, inputs, 0.8, quantize=name) for name in ("int8", None))
    off = (cache.layers[0].keys - plain.layers[0].keys).abs()
    assert 0 < off.max() < 0.02 * plain.layers[0].keys.abs().max() and cache.nbytes < plain.nbytes
    assert cache.kept_positions(0).equal(plain.kept_positions(0))


def test_nothing_is_quantised_unless_asked():
    case = Case("default", turns=(2,))
    cache = case.cache()
    talk(case.model, case, cache)
    assert cache.quantize is None and "quantize" not in repr(cache)
    assert {type(segment.pairs) for layer in cache.layers for segment in layer.segments} == {Pairs}


def test_what_cannot_be(monkeypatch, tmp_path):
    for name, error in (("int3", ValueError), (4, TypeError), (True, TypeError)):
        with pytest.raises(error, match="quantize must be one of int8, int4"):
            PrefixKVCache(quantize=name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, line in (("int4", r"pip install 'prefixkv-cache\[quantize\]'"), ("hqq-int8", "pip install hqq")):
        with pytest.raises(ImportError, match=f"(?s)^quantize='{name}' needs .* {line}$"):
            PrefixKVCache(quantize=name)


@needs_quanto
def test_what_does_not_go_with_it(tmp_path):
    for other in ({"max_new_tokens": 4}, {"offloading": True}):
        with pytest.raises(ValueError, match=f"quantize='int4' does not go with {next(iter(other))}.*leave one"):
            PrefixKVCache(quantize="int4", **other)
    model, inputs, cache = llama(1), {"input_ids": torch.arange(40)[None]}, PrefixKVCache(quantize="int4")
    with pytest.raises(ValueError, match="take tokens back, which a cache with quantize does not allow"):
        model.generate(**inputs, past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=2)
    assert cache.get_seq_length() == 0
    model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="quantize='int4' cannot be saved"):
        cache.save(tmp_path / "cache.safetensors")
