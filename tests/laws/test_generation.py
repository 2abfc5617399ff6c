"""Every way to generate, and every kind of mask: law 1 at budget 1, law 2 below it.

Law 2 is held against `oracle.Given`: whatever the cache says that it kept after each forward pass, its logits must be
those of a full cache with everything else masked out. Backends that this machine cannot run (flash attention) are
represented by a function of the same name and signature that receives exactly what transformers passes to the real one.
"""

import copy
import io
import itertools
import math

import pytest
import torch
import transformers
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.generation.streamers import BaseStreamer

import compat
import models
import tiny_vlm
from compat import CHUNK
from models import PADDED
from oracle import Given, Oracle, feed
from prefixkv_cache import PrefixKVCache
from watch import CLOSE, Case, Watch, greedy, masked, pairs_of, run, talk

FAMILY = "llava_gqa"


def flash_stand_in(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """What flash attention computes: causal, aligned at the last key; a mask is [batch, keys], and hides keys."""
    assert attention_mask is None or attention_mask.shape == (key.shape[0], key.shape[2])
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    n_queries, n_keys = query.shape[2], key.shape[2]
    visible = torch.ones(n_queries, n_keys).tril(n_keys - n_queries).bool()[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None]
    scores = (query @ key.mT * scaling).masked_fill(~visible, -1e30)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def two_rows_of_mask(*args, **kwargs):
    """A registered attention function of somebody else's, under a name of theirs."""
    return AttentionInterface._global_mapping["sdpa"](*args, **kwargs)


AttentionInterface.register("flash_stand_in", flash_stand_in)
AttentionMaskInterface.register("flash_stand_in", AttentionMaskInterface._global_mapping["flash_attention_2"])
AttentionInterface.register("somebodys_own", two_rows_of_mask)
AttentionMaskInterface.register("somebodys_own", AttentionMaskInterface._global_mapping["sdpa"])


@pytest.fixture(autouse=True)
def uncompiled():
    """Flex attention compiles itself; its CPU kernels take minutes to build and prove nothing here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def build(attn):
    """The tiny model with this backend; the stand-in is slipped in, as transformers would look for flash's kernels."""
    if attn != "flash_stand_in":
        return models.build(FAMILY, attn)
    model = models.build(FAMILY, "sdpa")
    model.model.language_model.config._attn_implementation = attn
    return model


def assert_pruning_equals_masking(model, turns, watch):
    """`turns`: (inputs given what was generated so far, tokens to go on with). Both caches take all of them."""
    oracle = Oracle(model, Given(watch.kept))
    sequences = wanted_sequences = None
    for make_inputs, tokens in turns:
        logits, sequences = feed(model, make_inputs(sequences), tokens, watch.cache, watch)
        wanted, wanted_sequences = feed(oracle.model, make_inputs(wanted_sequences), tokens, oracle.cache)
        assert (logits - wanted).abs().max() < CLOSE
    assert watch.cache.budget == 1 or max(watch.lengths[-1]) < watch.seen[-1]


each_source = pytest.mark.parametrize("source", [None, "head"], ids=["searched", "by_head"])


SEVERAL = "snapkv:queries=8;recent=8;distance=5"
BACKENDS = [("flash_stand_in", *each) for each in itertools.product(
    ("prefixkv:distance=5", SEVERAL, "h2o"), ((61,), PADDED), (None, "head"))]  # fmt: skip
BACKENDS += [  # flex attention takes seconds
    ("flex_attention", "prefixkv:distance=5", (61,), None), ("flex_attention", SEVERAL, PADDED, "head"),
    ("flex_attention", "h2o", PADDED, None), ("somebodys_own", SEVERAL, PADDED, "head"),
    ("somebodys_own", "prefixkv:distance=5", (61,), None),
]  # fmt: skip


@pytest.mark.parametrize(("attn", "method", "lengths", "source"), BACKENDS, ids=str)
def test_backends(attn, method, lengths, source):
    """Also: all backends keep the same."""
    case, model = Case(method, lengths=lengths, profile=source, turns=(5, 4)), build(attn)
    watch = Watch(case.cache(), FAMILY)
    logits, _ = talk(model, case, watch.cache, watch)
    assert (logits - masked(case, watch)).abs().max() < CLOSE
    assert watch.kept == run(case)[1].kept


@pytest.mark.skipif(not compat.ANNOUNCES_ASSISTED_DECODING, reason="a loop of one's own cannot announce candidates")
@pytest.mark.parametrize(("attn", "method"), [
    ("flash_stand_in", "default:headroom=2"), ("flash_stand_in", "h2o"), ("flex_attention", "h2o")])  # fmt: skip
def test_candidates_on_backends(attn, method):
    """A padded batch: what was confirmed of two forwards of candidates gives the logits of single steps."""
    case, model = Case(method, profile="head"), build(attn)
    caches, words, logits = (case.cache(), case.cache()), models.words(3, 6), []
    caches[1].activate_past_recording()
    mask = case.prompt()["attention_mask"]
    mask = torch.cat([mask, torch.ones(3, 8, dtype=mask.dtype)], dim=1)
    for cache, sizes in zip(caches, ((1,) * 6, (4, 4)), strict=True):
        model(**case.prompt(), past_key_values=cache, use_cache=True)
        got, at = [], 0
        for size in sizes:
            fed = torch.cat([words, words.flip(1)], dim=1)[:, at : at + size]
            until = cache.get_seq_length() + size
            out = model(input_ids=fed, attention_mask=mask[:, :until], past_key_values=cache, use_cache=True)
            got.append(out.logits[:, : size - size // 4])
            at += size - size // 4
            if size > 1:
                cache.crop(-1)
        logits.append(torch.cat(got, dim=1))
    assert (logits[0] - logits[1]).abs().max() < CLOSE


class Collect(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value)

    def end(self):
        pass


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": CHUNK},
    "guidance": {"guidance_scale": 1.5},
    "repetition penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("lengths", [(61,), PADDED], ids=["one", "padded"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_at_budget_one(mode, lengths):
    model, inputs, outputs = models.shared(FAMILY, "sdpa"), models.batch(FAMILY, lengths), []
    for cache in (DynamicCache(config=model.config), PrefixKVCache(budget=1.0)):
        torch.manual_seed(0)
        outputs.append(greedy(model, inputs, cache, new=6, **MODES[mode]))
    (ids, logits), (our_ids, our_logits) = outputs
    assert torch.equal(ids, our_ids)
    assert (logits - our_logits).abs().max() < CLOSE


@pytest.mark.parametrize("mode", MODES)
@each_source
def test_modes_below_budget_one_run_and_prune(mode, source):
    case = Case("prefixkv", profile=source)
    cache = case.cache()
    greedy(case.model, case.prompt(), cache, new=8, **MODES[mode])
    assert 0 < max(cache.stored_lengths()) < 0.75 * cache.get_seq_length()


def test_streamers_see_every_token():
    model, inputs, streamer = models.shared(FAMILY, "sdpa"), models.batch(FAMILY, (61,)), Collect()
    ids = model.generate(**inputs, past_key_values=PrefixKVCache(budget=0.5), max_new_tokens=6, streamer=streamer)
    assert torch.equal(torch.cat([part.flatten() for part in streamer.got]), ids[0])


@pytest.mark.parametrize("lengths", [(61,), PADDED], ids=["one", "padded"])
@pytest.mark.parametrize("method", ["prefixkv", "default:headroom=2", "snapkv:queries=8;recent=4"])
@each_source
def test_chunks_are_pruned_as_they_come(lengths, method, source):
    """After each chunk a head holds its share and no more, and what it holds is what it attends to."""
    case = Case(method, lengths=lengths, profile=source)
    model, inputs = models.build(FAMILY, "sdpa"), case.prompt()
    watch = Watch(case.cache(), FAMILY)
    handle = model.model.language_model.register_forward_hook(lambda *_: watch())
    _, logits = greedy(model, inputs, watch.cache, new=6, prefill_chunk_size=CHUNK)
    handle.remove()
    seen = [min(61, CHUNK * (step + 1)) for step in range(math.ceil(61 / CHUNK))]
    assert len(seen) >= 2 and watch.seen[: len(seen)] == seen
    assert all(sum(stored) <= 6 * (0.4 * n + 4) for stored, n in zip(watch.lengths, seen, strict=False))
    oracle = Oracle(model, Given(watch.kept))
    _, wanted = greedy(oracle.model, inputs, oracle.cache, new=6, prefill_chunk_size=CHUNK)
    assert (logits - wanted)[:, -6:].abs().max() < CLOSE  # a chunk may be all padding


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("budget", [1.0, 0.4])
@each_source
def test_a_second_image_in_the_second_turn(family, budget, source):
    case = Case("prefixkv", family, lengths=(50,), profile=source)
    model, first, second = case.model, models.row(family, 50, 0), models.row(family, 40, 1)

    def later(sequences):
        both = models.collate(family, [{**first, "ids": sequences[0].tolist() + second["ids"]}])
        both["pixel_values"] = second["pixel_values"].to(model.dtype)
        if family == "qwen2_5_vl":  # its positions are told from the grids of all pictures
            both["image_grid_thw"] = torch.cat([each["image_grid_thw"] for each in (first, second)])
        return both

    turns = [(lambda _: models.collate(family, [first]), models.words(1, 5)), (later, models.words(1, 5, seed=9))]
    try:
        full, sequences = DynamicCache(config=model.config), None
        for make_inputs, tokens in turns:
            _, sequences = feed(model, make_inputs(sequences), tokens, full)
    except (ValueError, RuntimeError, IndexError) as error:
        pytest.skip(f"not with DynamicCache either: {error}")
    assert_pruning_equals_masking(model, turns, Watch(case.cache(budget=budget), family))


@each_source
def test_a_handwritten_loop(source):
    case = Case("prefixkv", profile=source, lengths=(61,))
    wanted, _ = greedy(case.model, case.prompt(), case.cache(), new=10)
    inputs, cache, tokens = case.prompt(), case.cache(), []
    del inputs["attention_mask"]
    logits = case.model(**inputs, past_key_values=cache, use_cache=True).logits
    for _ in range(10):
        tokens.append(logits[:, -1:].argmax(-1))
        logits = case.model(input_ids=tokens[-1], past_key_values=cache, use_cache=True).logits
    assert torch.equal(torch.cat(tokens, 1), wanted[:, 61:])


@each_source
def test_forward_without_no_grad(source):
    """Stored pairs carry no history, so a loop without `no_grad` neither fails nor grows a graph over the cache."""
    case = Case("prefixkv", profile=source, lengths=(61,))
    model, cache = models.build(FAMILY, "sdpa"), case.cache()
    with torch.enable_grad():
        model(**case.prompt(), past_key_values=cache, use_cache=True).logits.sum().backward()
        for token in (7, 8, 9):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    assert not any(tensor.requires_grad for tensor in pairs_of(cache.layers))


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
def test_generation_continues_from_its_cache(family):
    """Three tokens and then three more are the six of one call, with the same logits."""
    case = Case("default", family, lengths=(61,))
    whole, logits = greedy(case.model, case.prompt(), case.cache(budget=1.0), new=6)
    cache = case.cache(budget=1.0)
    first, some = greedy(case.model, case.prompt(), cache, new=3)
    second, others = greedy(case.model, {"input_ids": first, "attention_mask": torch.ones_like(first)}, cache, new=3)
    assert torch.equal(whole, second)
    assert (torch.cat([some, others], 1) - logits).abs().max() < CLOSE


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
def test_a_prefix_is_computed_once_and_reused(family):
    """Copies of the cache of a common prefix serve prompts that go on differently."""
    case, answers = Case("default", family, lengths=(61,)), []
    inputs = case.prompt()
    for cache in (DynamicCache(config=case.model.config), case.cache(budget=1.0)):
        case.model(**inputs, past_key_values=cache, use_cache=True)
        for seed in (3, 4):
            longer = models.next_turn(inputs, inputs["input_ids"], 7, seed=seed)
            answers.append(greedy(case.model, longer, copy.deepcopy(cache), new=5)[0])
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
    assert not torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
def test_it_is_a_list_of_layers(family):
    case = Case("default", family)
    full, ours = DynamicCache(config=case.model.config), case.cache(budget=1.0)
    for cache in (full, ours):
        greedy(case.model, case.prompt(), cache, new=3)
    assert len(ours.layers) == len(full.layers) and ours.get_seq_length() == full.get_seq_length()
    assert ours.is_sliding == full.is_sliding and ours.is_compileable is False
    assert ours.is_initialized == full.is_initialized
    for layer, other in zip(ours.layers, full.layers, strict=True):
        assert layer.keys.shape == other.keys.shape and layer.values.shape == other.values.shape


def test_the_pipeline(tmp_path):
    pipe = transformers.pipeline("image-text-to-text", model=tiny_vlm.save_model(tmp_path), dtype=torch.float32)
    picture = Image.open(io.BytesIO(_png()))
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "red ?"}]}]
    answers = []
    for cache in (DynamicCache(config=pipe.model.config), PrefixKVCache(budget=1.0), PrefixKVCache(budget=0.3)):
        options = {"past_key_values": cache, "max_new_tokens": 6, "do_sample": False}
        answers.append(pipe(text=messages, generate_kwargs=options)[0]["generated_text"])
    assert str(answers[0]) == str(answers[1])
    assert max(cache.stored_lengths()) < cache.get_seq_length()


def _png():
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), (200, 30, 30)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_latent_attention_is_told_by_layer_and_length_and_nothing_else_is():
    """Models with MLA show another key tensor than the one handed out; nobody else may be taken for ours that way."""
    from prefixkv_cache.cache.hook import HandedOut, _recognise, hand_out

    class Cache:
        pass

    class Module:
        def __init__(self, layer_idx, **config):
            self.layer_idx, self.config = layer_idx, type("Config", (), config)()

    cache, key = Cache(), torch.zeros(1, 1, 5, 4)
    hand_out(key, cache, 3, ())
    expanded = torch.zeros(1, 8, 5, 16)
    assert _recognise(Module(3), expanded) is None
    assert _recognise(Module(2, kv_lora_rank=8), expanded) is None
    assert _recognise(Module(3, kv_lora_rank=8), expanded[:, :, 1:]) is None
    assert isinstance(_recognise(Module(3, kv_lora_rank=8), expanded), HandedOut)
    assert _recognise(Module(3, kv_lora_rank=8), expanded) is None  # once
    assert isinstance(_recognise(Module(9), key), HandedOut)
