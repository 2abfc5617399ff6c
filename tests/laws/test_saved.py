"""Law 7 for caches: a copy, and a cache that was saved and loaded, go on bit for bit as the original does."""

import copy
import functools
import gc
import threading

import pytest
import torch
from safetensors import safe_open

import models
from models import EIGHT_HEADS
from oracle import feed
from prefixkv_cache import PrefixKVCache
from prefixkv_cache.cache.tensor_file import SavedCacheError
from watch import Case, memory_of

CASES = [
    Case("prefixkv:distance=5"),
    Case("prefixkv:distance=5", "gemma3", "eager", profile="head"),
    Case("default:headroom=6", profile="layer", budget=0.25),
    Case("default:headroom=6", EIGHT_HEADS, profile="head"),
    Case("default:headroom=6", image=True, budget=20),
    Case("h2o", "llava_mha"),
    Case("h2o", EIGHT_HEADS, "eager", profile="head"),
    Case("snapkv:queries=8;recent=8;lengths=pool;distance=5", "llava_mha"),
    Case("streaming", "llava_mha"),
    Case("prefixkv", budget=1.0),
    Case("default:headroom=6", "qwen2_5_vl", lengths=(61,)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
by_one_length = Case("prefixkv:distance=5", "llava_mha", lengths=(30,))


def after(case, n=12, **changes):
    """A cache after its prompt and n - 1 tokens, and the ids it was fed."""
    cache = case.cache(**changes)
    _, sequences = feed(case.model, case.prompt(), models.words(len(case.lengths), n), cache)
    return sequences, cache


def go_on(case, sequences, cache, seed=5):
    """Logits of some tokens, a next turn and some more, by `generate`."""
    mask, rows = case.prompt()["attention_mask"], len(sequences)
    logits, ids = [], sequences
    for turn, n in enumerate((7, 5)):
        inputs = models.next_turn({"attention_mask": mask}, ids, 1 + 8 * turn, seed + turn)
        of_turn, ids = feed(case.model, inputs, models.words(rows, n, seed=seed + turn), cache)
        logits.append(of_turn)
    return torch.cat(logits, dim=1)


@functools.cache
def undisturbed(case, n=12):
    return go_on(case, *after(case, n))


def forwards(case, sequences, cache, seed):
    """Logits of a turn and 6 tokens, without `generate`: the hooks that record its logits are the model's."""
    turn = models.next_turn({"attention_mask": case.prompt()["attention_mask"]}, sequences, 14, seed)
    ids, mask, logits = turn["input_ids"], turn["attention_mask"], []
    end, total = cache.get_seq_length(), ids.shape[1]
    for stop in range(total - 6, total + 1):
        place = (mask[:, :stop].cumsum(1) - 1)[:, end:]
        new = {"input_ids": ids[:, end:stop], "attention_mask": mask[:, :stop], "position_ids": place}
        logits.append(case.model(**new, past_key_values=cache).logits)
        end = stop
    return torch.cat(logits, dim=1)


def saved(cache, case, tmp_path, name="cache.safetensors"):
    cache.save(tmp_path / name)
    return PrefixKVCache.load(tmp_path / name, case.model)


def contents(cache):
    """What a cache says of itself."""
    positions = [cache.kept_positions(layer) for layer in range(len(cache.layers))]
    return cache.stored_lengths(heads=True), positions, cache.get_seq_length(), cache.method, cache.budget, cache.nbytes


@pytest.mark.parametrize("n", [1, 12], ids=["prompt", "decoding"])
@each_case
def test_a_copy_and_its_original_go_on_alike(case, n):
    wanted = undisturbed(case, n)
    sequences, cache = after(case, n)
    first, second = cache.copy(), cache.copy()
    assert torch.equal(go_on(case, sequences, first), wanted)
    assert torch.equal(go_on(case, sequences, cache), wanted)
    del cache, first
    gc.collect()
    assert torch.equal(go_on(case, sequences, second.copy()), wanted)


@pytest.mark.parametrize("n", [1, 12], ids=["prompt", "decoding"])
@each_case
def test_saved_and_loaded_it_goes_on_alike(case, n, tmp_path):
    wanted = undisturbed(case, n)
    sequences, cache = after(case, n)
    loaded = saved(cache, case, tmp_path)
    for left, right in zip(contents(loaded), contents(cache), strict=True):
        assert str(left) == str(right)
    again = saved(loaded, case, tmp_path, "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "cache.safetensors").read_bytes()
    assert torch.equal(go_on(case, sequences, loaded), wanted)
    assert torch.equal(go_on(case, sequences, again.copy()), wanted)
    assert torch.equal(go_on(case, sequences, cache), wanted)


def test_a_copy_takes_no_memory_until_it_is_written_to():
    case = by_one_length
    sequences, cache = after(case)
    before = memory_of(*cache.layers)
    copies = [cache.copy() for _ in range(10)]
    assert memory_of(*cache.layers, *(layer for each in copies for layer in each.layers)) == before
    go_on(case, sequences, copies[0])
    assert memory_of(*cache.layers, *(layer for each in copies[1:] for layer in each.layers)) == before


def test_a_copy_of_an_empty_cache_prunes_too():
    case = by_one_length
    twin = case.cache().copy()
    feed(case.model, case.prompt(), models.words(1, 12), twin)
    assert str(contents(twin)) == str(contents(after(case)[1]))


def test_changes_of_one_are_not_the_others():
    sequences, cache = after(CASES[0])
    before, twin = str(contents(cache)), cache.copy()
    twin.batch_select_indices(torch.tensor([1]))
    twin.reset()
    cache.copy().crop(-2)
    cache.copy().batch_repeat_interleave(2)
    assert str(contents(cache)) == before
    assert torch.equal(go_on(CASES[0], sequences, cache), undisturbed(CASES[0]))


@pytest.mark.parametrize("loaded", [False, True])
def test_with_planned_steps(loaded, tmp_path):
    case = Case("prefixkv:distance=5", lengths=(61,))
    sequences, cache = after(case, 6, max_new_tokens=16)
    twin = saved(cache, case, tmp_path) if loaded else cache.copy()
    assert twin.layers[0].planned and twin.nbytes == cache.nbytes
    first = go_on(case, sequences, twin)
    assert torch.equal(first, go_on(case, sequences, cache))


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_ten_copies_side_by_side(case):
    """Copied and fed in threads of their own, each as alone."""
    sequences, cache = after(case)
    alone = [forwards(case, sequences, copy.deepcopy(cache), seed) for seed in range(10)]
    results, start = [None] * 10, threading.Barrier(10)

    def work(index):
        start.wait()
        with torch.no_grad():
            results[index] = forwards(case, sequences, cache.copy(), index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(results, alone, strict=True))


def test_ten_questions_in_one_batch():
    case = Case("default:headroom=6", lengths=(61,))
    sequences, cache = after(case, 1)
    alone = [forwards(case, sequences, cache.copy(), seed) for seed in range(10)]
    turns = [models.next_turn(case.prompt(), sequences, 14, seed)["input_ids"] for seed in range(10)]
    cache.batch_repeat_interleave(10)
    ids, seen = torch.cat(turns), cache.get_seq_length()
    together = case.model(input_ids=ids[:, seen : seen + 9], past_key_values=cache).logits
    assert (together - torch.cat(alone)[:, :9]).abs().max() < 1e-9


# Files.


def test_what_a_file_says(tmp_path):
    case = CASES[2]
    sequences, cache = after(case)
    path, ids = tmp_path / "a.safetensors", sequences[:, :-1]
    model = copy.copy(case.model)
    model.config = copy.deepcopy(model.config)
    model.config._name_or_path = "somebody/a-model"
    cache.save(path, ids, model=model)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        keys = file.get_tensor("0.0.keys")
    assert torch.equal(keys, cache.layers[0].keys)
    assert metadata["model"] == "a-model" and metadata["seen"] == str(cache.get_seq_length())
    assert metadata["method"] == cache.method.spell(full=True) and metadata["dtype"] == "float64"
    loaded = PrefixKVCache.load(path, case.model, ids)
    assert loaded.profile == cache.profile
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(SavedCacheError, match=r"tokens: is .* expected"):
        PrefixKVCache.load(path, case.model, ids + 1)
    loaded.reset()
    assert torch.equal(go_on(case, *refed(case, loaded)), undisturbed(case))


def refed(case, cache):
    cache.image_mask = case.image_mask() if case.image else None
    _, sequences = feed(case.model, case.prompt(), models.words(len(case.lengths), 12), cache)
    return sequences, cache


def test_it_comes_in_the_models_dtype(tmp_path):
    case = by_one_length
    _, cache = after(case)
    cache.save(tmp_path / "a.safetensors")
    half = PrefixKVCache.load(tmp_path / "a.safetensors", models.build(case.family, dtype=torch.bfloat16))
    assert half.layers[0].keys.dtype == half.layers[0].dtype == torch.bfloat16
    assert torch.equal(half.layers[0].keys, cache.layers[0].keys.bfloat16())


@pytest.mark.parametrize(("family", "field"), [("llava_gqa", "n_layers"), ("gemma3", "n_layers")])
def test_of_another_depth_it_is_refused(family, field, tmp_path):
    _, cache = after(by_one_length)
    path = tmp_path / "a.safetensors"
    cache.save(path)
    with pytest.raises(SavedCacheError, match=rf"a\.safetensors: {field}: is '4'; expected '6'"):
        PrefixKVCache.load(path, models.shared(family))


def test_of_another_model_it_is_refused(tmp_path):
    _, cache = after(by_one_length)
    path, model = tmp_path / "a.safetensors", copy.copy(models.shared("llava_mha"))
    config = model.config = copy.deepcopy(model.config)
    config.text_config.num_key_value_heads = 2
    cache.save(path)
    with pytest.raises(SavedCacheError, match="n_heads: is '4'; expected '2'"):
        PrefixKVCache.load(path, model)
    config.text_config.num_key_value_heads, config._name_or_path = 4, "/home/me/mine"
    cache.save(path, model=model)
    assert len(PrefixKVCache.load(path, model).layers) == 4
    config._name_or_path = "somebody/yours"
    with pytest.raises(SavedCacheError, match="model: is 'mine'; expected 'yours'"):
        PrefixKVCache.load(path, model)
    with pytest.raises(TypeError, match="takes the model itself"):
        PrefixKVCache.load(path, None)


def test_after_tokens_of_the_prompt_were_taken_back(tmp_path):
    case = by_one_length
    for cache, n in ((after(case, 3)[1], 20), (PrefixKVCache.compress(case.model, case.prompt(), 1.0), 5)):
        cache.crop(-n)
        loaded = saved(cache, case, tmp_path)
        assert str(contents(loaded)) == str(contents(cache)) and loaded.context_ids is None
        more = models.words(1, 9)
        logits = [case.model(input_ids=more, past_key_values=each).logits for each in (cache, loaded)]
        assert torch.equal(*logits)


def test_a_cache_made_for_a_model_knows_its_name(tmp_path):
    path, (mine, yours) = tmp_path / "a.safetensors", (copy.copy(models.shared("llava_mha")) for _ in range(2))
    for model, name in ((mine, "somebody/mine"), (yours, "somebody/yours")):
        model.config = copy.deepcopy(model.config)
        model.config._name_or_path = name
    case = by_one_length
    for cache in (
        PrefixKVCache.for_model(mine, 0.5),
        PrefixKVCache(None, 0.5, config=mine.config),
        PrefixKVCache.compress(mine, case.prompt(), 0.5),
    ):
        if not cache.get_seq_length():
            feed(case.model, case.prompt(), models.words(1, 3), cache)
        cache.copy().save(path)
        assert PrefixKVCache.load(path, mine).get_seq_length() == cache.get_seq_length()
        with pytest.raises(SavedCacheError, match=r"a\.safetensors: model: is 'mine'; expected 'yours'"):
            PrefixKVCache.load(path, yours)


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="holds nothing yet"):
        by_one_length.cache().save(path)
    _, cache = after(by_one_length)
    with pytest.raises(ValueError, match="input_ids"):
        cache.save(path, [1, 2, 3])
    cache.layers[1] = object()
    with pytest.raises(ValueError, match="layer 1 is a object"):
        cache.save(path)
    assert not path.exists()
