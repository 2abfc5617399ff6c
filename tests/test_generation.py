"""Every way to generate, and every kind of mask: law 1 at budget 1, law 2 below it.

Law 2 is held against `oracle.Given`: whatever the cache says that it kept after each forward pass, its logits must be
those of a full cache with everything else masked out. Backends that this machine cannot run (flash attention) are
represented by a function of the same name and signature that receives exactly what transformers passes to the real one.
"""

import io
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
from prefixkv_cache.attention import HandedOut, _recognise

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


class Log(list):
    """What a cache says that it kept, after each forward pass: [step][layer][row]."""

    def __init__(self, cache, layers):
        super().__init__()
        self.cache, self.layers = cache, layers

    def __call__(self):
        kept = {
            at: [[p for p in row if p >= 0] for row in self.cache.kept_positions(at).tolist()] for at in self.layers
        }
        self.append(kept)


def assert_pruning_equals_masking(model, turns, cache, tolerance=1e-4):
    """`turns`: (inputs given what was generated so far, tokens to go on with). Both caches take all of them."""
    log = Log(cache, models.prunable_layers(model))
    oracle = Oracle(model, Given(log))
    sequences, wanted_sequences = None, None
    for make_inputs, tokens in turns:
        logits, sequences = feed(model, make_inputs(sequences), tokens, cache, watch=log)
        wanted, wanted_sequences = feed(oracle.model, make_inputs(wanted_sequences), tokens, oracle.cache)
        torch.testing.assert_close(logits, wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("attn", ["flash_stand_in", "flex_attention", "somebodys_own"])
@pytest.mark.parametrize("lengths", [(61,), PADDED], ids=["one", "padded"])
def test_backends(attn, lengths):
    model = build(attn)
    inputs = models.batch(FAMILY, lengths)
    tokens, more = models.words(len(lengths), 12), models.words(len(lengths), 4, seed=5)
    cache = PrefixKVCache(budget=0.4, distance=5, slack=0)
    turns = [(lambda _: inputs, tokens), (lambda so_far: models.next_turn(inputs, so_far, 9), more)]
    assert_pruning_equals_masking(model, turns, cache)
    assert max(cache.stored_lengths()) < cache.get_seq_length()


@pytest.mark.parametrize("attn", ["flash_stand_in", "flex_attention"])
@pytest.mark.parametrize("queries", ["all", 8])
def test_backends_agree_on_what_to_keep(attn, queries):
    kept = []
    for name in (compat.PLAIN, attn):
        model, cache = build(name), PrefixKVCache(budget=0.4, queries=queries)
        model.generate(**models.batch(FAMILY, PADDED), past_key_values=cache, max_new_tokens=1)
        kept.append([cache.kept_positions(layer) for layer in range(len(cache))])
    for plain, other in zip(*kept, strict=True):
        assert torch.equal(plain, other)


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
    model, inputs = models.build(FAMILY, "sdpa"), models.batch(FAMILY, lengths)
    outputs = []
    for cache in (DynamicCache(config=model.config), PrefixKVCache(budget=1.0)):
        torch.manual_seed(0)
        options = {"do_sample": False, **MODES[mode]}
        outputs.append(
            model.generate(
                **inputs, past_key_values=cache, max_new_tokens=8, return_dict_in_generate=True, output_logits=True,
                **options,
            )
        )  # fmt: skip
    full, ours = outputs
    assert torch.equal(full.sequences, ours.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(full.logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_modes_below_budget_one_run_and_prune(mode):
    model, inputs = models.build(FAMILY, "sdpa"), models.batch(FAMILY, PADDED)
    cache = PrefixKVCache(budget=0.4, slack=0)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=8, **{"do_sample": False, **MODES[mode]})
    assert 0 < max(cache.stored_lengths()) < 0.75 * cache.get_seq_length()


def test_streamers_see_every_token():
    model, inputs, streamer = models.build(FAMILY, "sdpa"), models.batch(FAMILY, (61,)), Collect()
    ids = model.generate(**inputs, past_key_values=PrefixKVCache(budget=0.5), max_new_tokens=6, streamer=streamer)
    assert torch.equal(torch.cat([part.flatten() for part in streamer.got]), ids[0])


@pytest.mark.parametrize("lengths", [(61,), PADDED], ids=["one", "padded"])
def test_chunks_are_pruned_as_they_come(lengths):
    """After each chunk a layer holds its share and no more, and what it holds is what it attends to."""
    model, inputs = models.build(FAMILY, "sdpa"), models.batch(FAMILY, lengths)
    cache = PrefixKVCache(budget=0.4, slack=0)
    log, peaks = Log(cache, range(6)), []

    def watch(*_):
        log()
        peaks.append(max(cache.stored_lengths()))

    handle = model.model.language_model.register_forward_hook(watch)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=6, prefill_chunk_size=CHUNK)
    handle.remove()
    seen = [min(61, CHUNK * (step + 1)) for step in range(math.ceil(61 / CHUNK))]
    assert len(peaks) >= 2
    assert all(peak <= 0.65 * tokens + 4 for peak, tokens in zip(peaks, seen, strict=False))

    oracle = Oracle(model, Given(log))
    wanted = oracle.model.generate(
        **inputs, past_key_values=oracle.cache, max_new_tokens=6, prefill_chunk_size=CHUNK, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    again = model.generate(
        **inputs, past_key_values=PrefixKVCache(budget=0.4, slack=0), max_new_tokens=6, prefill_chunk_size=CHUNK,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(wanted.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("budget", [1.0, 0.4])
def test_a_second_image_in_the_second_turn(family, budget):
    model = models.build(family, "sdpa")
    first, second = models.row(family, 50, 0), models.row(family, 40, 1)

    def later(sequences):
        both = models.collate(family, [{**first, "ids": sequences[0].tolist() + second["ids"]}])
        if family == "qwen2_5_vl":  # its positions are told from the grids of all pictures
            grids = torch.cat([each["image_grid_thw"] for each in (first, second)])
            return {**both, "pixel_values": second["pixel_values"], "image_grid_thw": grids}
        return {**both, "pixel_values": second["pixel_values"]}

    turns = [(lambda _: models.collate(family, [first]), models.words(1, 5)), (later, models.words(1, 5, seed=9))]
    try:
        full, sequences = DynamicCache(config=model.config), None
        for make_inputs, tokens in turns:
            _, sequences = feed(model, make_inputs(sequences), tokens, full)
    except (ValueError, RuntimeError, IndexError) as error:
        pytest.skip(f"not with DynamicCache either: {error}")
    cache = PrefixKVCache(budget=budget, slack=0, config=model.config)
    assert_pruning_equals_masking(model, turns, cache)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "itself"}], ids=str)
def test_assisted_decoding_is_refused_before_it_starts(options):
    model, inputs = models.build(FAMILY, "sdpa"), models.batch(FAMILY, (61,))
    options = {name: model if value == "itself" else value for name, value in options.items()}
    cache = PrefixKVCache(budget=0.5)
    with pytest.raises((NotImplementedError, ValueError), match=r"assisted|crop"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=8, **options)
    if compat.ANNOUNCES_ASSISTED_DECODING:
        assert cache.get_seq_length() == 0


def test_a_handwritten_loop():
    model, inputs = models.build(FAMILY, "sdpa"), models.batch(FAMILY, (61,))
    cache, same = PrefixKVCache(budget=0.4, slack=0), PrefixKVCache(budget=0.4, slack=0)
    wanted = model.generate(**inputs, past_key_values=same, max_new_tokens=10, do_sample=False)
    del inputs["attention_mask"]
    tokens = []
    with torch.no_grad():
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits
        for _ in range(10):
            tokens.append(logits[:, -1:].argmax(-1))
            logits = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True).logits
    assert torch.equal(torch.cat(tokens, 1), wanted[:, 61:])


def test_forward_without_no_grad():
    """Stored pairs carry no history, so a loop without `no_grad` neither fails nor grows a graph over the cache."""
    model, inputs = models.build(FAMILY, "sdpa"), models.batch(FAMILY, (61,))
    cache = PrefixKVCache(budget=0.4, slack=0)
    with torch.enable_grad():
        model(**inputs, past_key_values=cache, use_cache=True).logits.sum().backward()
        for token in (7, 8, 9):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    assert not any(layer.keys.requires_grad for layer in cache.layers)


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
    from prefixkv_cache.attention import hand_out

    class Cache:
        pass

    class Module:
        def __init__(self, layer_idx, **config):
            self.layer_idx, self.config = layer_idx, type("Config", (), config)()

    cache, key = Cache(), torch.zeros(1, 1, 5, 4)
    hand_out(key, cache, 3)
    expanded = torch.zeros(1, 8, 5, 16)
    assert _recognise(Module(3), expanded) is None
    assert _recognise(Module(2, kv_lora_rank=8), expanded) is None
    assert _recognise(Module(3, kv_lora_rank=8), expanded[:, :, 1:]) is None
    assert isinstance(_recognise(Module(3, kv_lora_rank=8), expanded), HandedOut)
    assert _recognise(Module(3, kv_lora_rank=8), expanded) is None  # once
    assert isinstance(_recognise(Module(9), key), HandedOut)
