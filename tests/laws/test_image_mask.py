"""Where the images are: `image_mask` and `text_floor`, in prompts of many layouts.

A layout is a list of rows, and a row a list of parts: a number of words, or a picture or film. Each runs through
`generate` on a tiny model beside the reference (law 2) and row by row (law 3).
"""

import copy
import math

import pytest
import torch
import transformers

import compat
import models
from models import IMAGE, VIDEO, VISION_END, VISION_START, WORDS
from oracle import Oracle, Rule, feed
from prefixkv_cache import PrefixKVCache
from prefixkv_cache.methods import Method
from watch import CLOSE, Watch, kept_by_head, make_profile

PICTURE, FILM = "picture", "film"
LAYOUTS = {
    "two pictures": [[4, PICTURE, 6, PICTURE, 9]],
    "ends in a picture": [[10, PICTURE]],
    "starts with a picture": [[PICTURE, 8]],
    "two, side by side": [[3, PICTURE, PICTURE, 12]],
    "one row has none": [[25], [4, PICTURE, 6, PICTURE, 9]],
    "two, none, one at the end": [[4, PICTURE, 3, PICTURE, 5], [30], [6, PICTURE]],
    "nobody has one": [[30], [21]],
    "a film": [[4, FILM, 9]],
    "a film, a picture, neither": [[5, FILM, 8], [3, PICTURE, 5, PICTURE, 4], [30]],
}
CASES = [(family, name) for family in ("llava_gqa", "qwen2_5_vl") for name in LAYOUTS if "film" not in name]
CASES += [("qwen2_5_vl", name) for name in LAYOUTS if "film" in name]
each_case = pytest.mark.parametrize(("family", "layout"), CASES, ids=lambda value: value.replace(" ", "-"))
METHODS = ["default:headroom=2", "prefixkv:text_floor=1.0", "default:text_floor=0.3;context=0;lengths=search"]
BUDGET, STEPS = 0.4, 4


def row(family, parts, seed):
    """The ids of one row, and what its pictures and films look like."""
    random = torch.Generator().manual_seed(100 * seed + len(parts))
    ids, looks = [], {"pixel_values": [], "image_grid_thw": [], "pixel_values_videos": [], "video_grid_thw": []}
    for at, part in enumerate(parts):
        if isinstance(part, int):
            ids += torch.randint(WORDS.start, WORDS.stop, (part,), generator=random).tolist()
            continue
        # Nothing behind a picture at the end: there the prompt shall end with what is none of the words.
        end = [VISION_END] if at + 1 < len(parts) else []
        if family != "qwen2_5_vl":
            ids += [IMAGE] * 16
            looks["pixel_values"].append(torch.randn(1, 3, 16, 16, generator=random).double())
        elif part == PICTURE:
            ids += [VISION_START] + [IMAGE] * 6 + end
            looks["pixel_values"].append(torch.randn(24, 3 * 2 * 4 * 4, generator=random).double())
            looks["image_grid_thw"].append(torch.tensor([[1, 4, 6]]))
        else:
            ids += [VISION_START] + [VIDEO] * 8 + end
            looks["pixel_values_videos"].append(torch.randn(32, 3 * 2 * 4 * 4, generator=random).double())
            looks["video_grid_thw"].append(torch.tensor([[2, 4, 4]]))
    return ids, looks


def prompt(family, layout, only=None):
    """Rows padded on the left, as `model.generate(**inputs)` takes them."""
    rows = [row(family, parts, seed) for seed, parts in enumerate(LAYOUTS[layout])]
    rows = rows if only is None else rows[only : only + 1]
    longest = max(len(ids) for ids, _ in rows)
    padding = [longest - len(ids) for ids, _ in rows]
    ids = torch.tensor([[0] * pad + ids for pad, (ids, _) in zip(padding, rows, strict=True)])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])}
    for name in rows[0][1]:
        if seen := [each for _, looks in rows for each in looks[name]]:
            inputs[name] = torch.cat(seen)
    if family == "qwen2_5_vl" and compat.TAKES_TOKEN_TYPES:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    return inputs


def cache_for(family, inputs, method, budget=BUDGET, profile=None):
    """As the user makes it: with the inputs."""
    model = models.shared(family, "sdpa")
    return PrefixKVCache.for_model(
        model, budget, inputs=inputs, **({"profile": profile} if profile else {"method": method})
    )


def positions(mask):
    return [each.nonzero().flatten().tolist() for each in mask]


def image_of(inputs):
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def conversation(model, family, layout, cache, watch=lambda: None, only=None):
    """The prompt and a second one without pictures: logits."""
    inputs, n_rows = prompt(family, layout, only), len(LAYOUTS[layout])
    of_rows = slice(None) if only is None else slice(only, only + 1)
    logits, ids = feed(model, inputs, models.words(n_rows, STEPS)[of_rows], cache, watch)
    ids = torch.cat([ids, models.words(n_rows, 9, seed=30)[of_rows]], 1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    later = {"input_ids": ids, "attention_mask": mask}
    return torch.cat([logits, feed(model, later, models.words(n_rows, STEPS, seed=4)[of_rows], cache, watch)[0]], 1)


@each_case
def test_laws_2_and_3(family, layout):
    """What is kept, in two turns, and each row of a batch by itself."""
    at = CASES.index((family, layout))
    method, by_head, model = METHODS[at % 3], at % 2, models.shared(family, ("eager", "sdpa")[at // 2 % 2])
    inputs, heads = prompt(family, layout), 2
    profile = make_profile(model.config.get_text_config().num_hidden_layers, heads, method) if by_head else None
    watch = Watch(cache_for(family, inputs, method, profile=profile), family)
    logits = conversation(model, family, layout, watch.cache, watch)
    assert torch.equal(watch.cache.image_mask, image_of(inputs))

    rule = Rule(Method.parse(method), BUDGET, profile=profile, image=positions(image_of(inputs)))
    oracle = Oracle(model, rule)
    wanted = conversation(oracle.model, family, layout, oracle.cache)
    assert watch.kept == rule.log
    assert (logits - wanted).abs().max() < CLOSE

    for only in range(len(LAYOUTS[layout])):
        own = prompt(family, layout, only)
        alone = Watch(cache_for(family, own, method, profile=profile), family)
        wanted = conversation(model, family, layout, alone.cache, alone, only=only)
        padding = inputs["input_ids"].shape[1] - own["input_ids"].shape[1]
        for kept, single in zip(watch.kept, alone.kept, strict=True):
            for layer in watch.layers:
                assert [[each - padding for each in head] for head in kept[layer][only]] == single[layer][0]
        assert (logits[only] - wanted[0]).abs().max() < CLOSE


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("text_floor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("layout", ["two pictures", "two, none, one at the end", "ends in a picture"])
def test_text_keeps_its_floor(layout, text_floor, heads):
    """As many text tokens as the floor says; where not even that fits, as many as fit."""
    family = "llava_gqa"
    inputs, method = prompt(family, layout), f"uniform:text_floor={text_floor};heads={heads}"
    valid, image = positions(inputs["attention_mask"]), [set(each) for each in positions(image_of(inputs))]
    for budget in (0.3, 0.6, 0.8):
        cache = cache_for(family, inputs, method, budget)
        feed(models.shared(family, "sdpa"), inputs, models.words(len(valid), 1), cache)
        for own, of_image, kept in zip(valid, image, kept_by_head(cache, 0, 2), strict=True):
            text = set(own) - of_image
            for head in kept:
                room = len(head) - len({own[0], own[-1]} & of_image)  # the sink and the last token come first
                assert len(text & set(head)) >= min(math.ceil(text_floor * len(text)), room)


def test_the_papers_know_nothing_of_images():
    """Where the image is does not change what their rules keep; the default protects text."""
    inputs = prompt("llava_gqa", "two, none, one at the end")
    for method in ("prefixkv", "elastic", "h2o", "streaming", "snapkv", "pyramidkv", "uniform", "default"):
        kept = []
        for mask in (image_of(inputs), None):
            cache = PrefixKVCache(budget=0.3, method=method, image_mask=mask)
            feed(models.shared("llava_gqa", "sdpa"), inputs, models.words(3, 1), cache)
            kept.append([cache.kept_positions(layer).tolist() for layer in range(6)])
        assert (kept[0] == kept[1]) == (method != "default")


@pytest.mark.parametrize("layout", ["two pictures", "one row has none", "two, none, one at the end"])
def test_a_prompt_in_chunks(layout):
    """The mask speaks of the whole prompt; a chunk may hold a part of a picture, or nothing but one."""
    model, inputs = models.shared("llava_gqa", "sdpa"), prompt("llava_gqa", layout)
    cache, rows = cache_for("llava_gqa", inputs, "default", 0.8), len(inputs["input_ids"])
    model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False, prefill_chunk_size=compat.CHUNK)
    image = image_of(inputs)
    text = inputs["attention_mask"].bool() & ~image
    kept = torch.zeros(rows, text.shape[1], dtype=torch.bool)
    for at, heads in enumerate(kept_by_head(cache, 0, 2)):
        kept[at, heads[0]] = True
    assert (image & kept).sum() < image.sum()
    # A chunk of text alone keeps its share of it, and never more than that is lost.
    assert (text & ~kept).sum() <= 0.2 * text.sum() + rows * (text.shape[1] // compat.CHUNK + 1)


@pytest.mark.parametrize("told", [True, False])
def test_a_second_turn_with_a_new_picture(told):
    """The mask of all tokens so far is assigned; without it, the new picture is text."""
    family, method = "llava_gqa", "prefixkv:text_floor=0.5;distance=none"
    model, first = models.shared(family), prompt(family, "two pictures")
    more, looks = row(family, [5, PICTURE, 8], seed=7)
    watch = Watch(cache_for(family, first, method), family)
    images = None

    def talk(model, cache, watch):
        nonlocal images
        logits, ids = feed(model, first, models.words(1, 3), cache, watch)
        ids = torch.cat([ids, torch.tensor([more])], 1)
        images = ids == IMAGE
        later = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": looks["pixel_values"][0]}
        if told and isinstance(cache, PrefixKVCache):
            cache.image_mask = images
        return torch.cat([logits, feed(model, later, models.words(1, 3, seed=4), cache, watch)[0]], 1)

    logits = talk(model, watch.cache, watch)
    known = images if told else images & (torch.arange(images.shape[1]) < first["input_ids"].shape[1])
    oracle = Oracle(model, rule := Rule(Method.parse(method), BUDGET, image=positions(known)))
    wanted = talk(oracle.model, oracle.cache, lambda: None)
    assert watch.kept == rule.log
    assert (logits - wanted).abs().max() < CLOSE


def fed(inputs, steps=3, **options):
    """A cache after this prompt and some steps."""
    cache = PrefixKVCache(budget=BUDGET, **options)
    feed(models.shared("llava_gqa", "sdpa"), inputs, models.words(len(inputs["input_ids"]), steps), cache)
    return cache


def test_a_mask_may_speak_of_what_comes_later():
    """Columns behind the prompt are not looked at before their tokens come."""
    inputs = prompt("llava_gqa", "two pictures")
    longer = torch.cat([image_of(inputs), torch.ones(1, 40, dtype=torch.bool)], 1)
    caches = [fed(inputs, image_mask=mask) for mask in (image_of(inputs), longer)]
    assert all(torch.equal(*(cache.kept_positions(layer) for cache in caches)) for layer in range(6))


def test_what_was_cropped_is_no_image_any_more():
    inputs = prompt("llava_gqa", "ends in a picture")
    cache = fed(inputs, 1, image_mask=image_of(inputs), method="default:heads=mean")
    cache.crop(-6)
    assert cache.image_mask.shape == (1, 20)
    ids = torch.cat([inputs["input_ids"][:, :20], models.words(1, 12, seed=5)], 1)
    later = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    feed(models.shared("llava_gqa", "sdpa"), later, models.words(1, 2), cache)
    assert 31 in cache.kept_positions(0) and cache.get_seq_length() == 33


@pytest.mark.parametrize("steps", [0, 1])
def test_where_nothing_was_cropped_the_mask_is_whole(steps):
    """Also what it says of tokens to come: of all of them, before the first prompt."""
    inputs = prompt("llava_gqa", "two pictures")
    image = torch.cat([image_of(inputs), torch.ones(1, 9, dtype=torch.bool)], 1)
    cache = fed(inputs, 1, image_mask=image) if steps else PrefixKVCache(budget=BUDGET, image_mask=image)
    cache.crop(0)
    assert torch.equal(cache.image_mask, image)


def test_reset_and_a_new_mask():
    inputs, other = (prompt("llava_gqa", layout) for layout in ("two pictures", "starts with a picture"))
    cache = fed(inputs, image_mask=image_of(inputs))
    cache.reset()
    assert cache.image_mask is None
    cache.image_mask = image_of(other)
    feed(models.shared("llava_gqa", "sdpa"), other, models.words(1, 3), cache)
    again = fed(other, image_mask=image_of(other))
    assert all(torch.equal(cache.kept_positions(at), again.kept_positions(at)) for at in range(6))


# What is refused (masks that are no masks: test_refused.py).


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_a_mask_that_is_too_short(budget):
    inputs = prompt("llava_gqa", "two pictures")
    cache = PrefixKVCache(budget=budget, image_mask=image_of(inputs)[:, :-1])
    with pytest.raises(ValueError, match=r"image_mask is \[1, 50\].*reaches to token 51.*\[batch, n_prompt\]"):
        feed(models.shared("llava_gqa", "sdpa"), inputs, models.words(1, 1), cache)


def test_a_mask_of_other_rows():
    inputs = prompt("llava_gqa", "two, none, one at the end")
    for rows in (2, 4):
        mask = torch.zeros(rows, inputs["input_ids"].shape[1], dtype=torch.bool)
        with pytest.raises(ValueError, match=rf"image_mask is \[{rows}, 44\] for a batch of 3.*\[batch, n_prompt\]"):
            fed(inputs, 1, image_mask=mask)


@pytest.mark.parametrize("inputs", [{}, {"inputs_embeds": torch.zeros(1, 5, 32)}, {"input_ids": [[1, 2]]}], ids=str)
def test_inputs_without_ids(inputs):
    with pytest.raises(ValueError, match=r"input_ids.*leave inputs out, or give image_mask"):
        PrefixKVCache.for_model(models.shared("llava_gqa"), 0.5, inputs=inputs)


def test_a_mask_of_ones_own_goes_before_the_inputs():
    inputs = prompt("llava_gqa", "two pictures")
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    cache = PrefixKVCache.for_model(models.shared("llava_gqa"), 0.5, inputs=inputs, image_mask=mask)
    assert cache.image_mask is mask


def test_a_model_without_images():
    text = transformers.LlamaForCausalLM(copy.deepcopy(models.shared("llava_gqa").config.get_text_config()))
    cache = PrefixKVCache.for_model(text, 0.5, inputs={"input_ids": torch.ones(1, 3, dtype=torch.int64)})
    assert cache.image_mask is None
