"""Where the images are: `image_mask`, `queries="text"` and `text_floor`, in prompts of many layouts.

A layout is a list of rows, and a row a list of parts: a number of words, or a picture or video. Each runs through
`generate` on a real tiny model beside the slow rules of `rules.py` (law 2) and row by row (law 3).
"""

import copy
import math

import pytest
import torch
from transformers import DynamicCache

import compat
import models
from models import IMAGE, VIDEO, VISION_END, VISION_START, WORDS
from oracle import Oracle, feed
from prefixkv_cache import PrefixKVCache, PrefixProfile
from prefixkv_cache.cache.cache import image_mask_of
from prefixkv_cache.rules.scoring import text_queries
from rules import PLAIN, Rules
from watch import CLOSE, Watch, build

PICTURE, FILM = "picture", "film"
LAYOUTS = {
    "two pictures": [[4, PICTURE, 6, PICTURE, 9]],
    "behind the question": [[10, PICTURE, 2]],
    "ends in a picture": [[10, PICTURE]],
    "ends in a long way of words and a picture": [[40, PICTURE]],
    "ends in the second of two": [[5, PICTURE, 7, PICTURE]],
    "starts with a picture": [[PICTURE, 8]],
    "two, side by side": [[3, PICTURE, PICTURE, 12]],
    "one row has none": [[25], [4, PICTURE, 6, PICTURE, 9]],
    "two, none, one at the end": [[4, PICTURE, 3, PICTURE, 5], [30], [6, PICTURE]],
    "nobody has one": [[30], [21]],
}
WITH_FILMS = {
    "a film": [[4, FILM, 9]],
    "a film behind a picture": [[4, PICTURE, 3, FILM, 6]],
    "a film, a picture, neither": [[5, FILM, 8], [3, PICTURE, 5, PICTURE, 4], [30]],
    "ends in a film": [[12, FILM]],
}
CASES = [(family, name) for family in ("llava_gqa", "qwen2_5_vl") for name in LAYOUTS]
CASES += [("qwen2_5_vl", name) for name in WITH_FILMS]
each_case = pytest.mark.parametrize(("family", "layout"), CASES, ids=lambda value: value.replace(" ", "-"))

AS_DEFAULT = dict(distance=1, slack=64, novelty=8.0, diversity=0.5)
OPTIONS = {
    "text": dict(queries="text"),
    "text, default ranking": dict(queries="text", **AS_DEFAULT),
    "text, half of it kept": dict(queries="text", text_floor=0.5, average="visible", heads="each"),
    "text, none of it kept": dict(queries="text", text_floor=0.0, lengths="uniform"),
    "window": dict(text_floor=1.0),
}
BUDGET, STEPS = 0.4, 6


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
            looks["pixel_values"].append(torch.randn(1, 3, 16, 16, generator=random))
        elif part == PICTURE:
            ids += [VISION_START] + [IMAGE] * 6 + end
            looks["pixel_values"].append(torch.randn(24, 3 * 2 * 4 * 4, generator=random))
            looks["image_grid_thw"].append(torch.tensor([[1, 4, 6]]))
        else:
            ids += [VISION_START] + [VIDEO] * 8 + end
            looks["pixel_values_videos"].append(torch.randn(32, 3 * 2 * 4 * 4, generator=random))
            looks["video_grid_thw"].append(torch.tensor([[2, 4, 4]]))
    return ids, looks


def inputs_of(family, rows):
    """Rows padded on the left, as `model.generate(**inputs)` takes them."""
    longest = max(len(ids) for ids, _ in rows)
    padding = [longest - len(ids) for ids, _ in rows]
    ids = torch.tensor([[0] * pad + ids for pad, (ids, _) in zip(padding, rows, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    inputs = {"input_ids": ids, "attention_mask": mask}
    for name in rows[0][1]:
        if seen := [each for _, looks in rows for each in looks[name]]:
            inputs[name] = torch.cat(seen)
    if family == "qwen2_5_vl" and compat.TAKES_TOKEN_TYPES:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    return inputs


def prompt(family, layout, only=None):
    rows = [row(family, parts, seed) for seed, parts in enumerate({**LAYOUTS, **WITH_FILMS}[layout])]
    return inputs_of(family, rows if only is None else rows[only : only + 1])


def profile(n_layers):
    lean = [0.5 * (-1) ** layer if layer < n_layers - n_layers % 2 else 0.0 for layer in range(n_layers)]
    keep = [[budget + min(budget, 1 - budget) * each for each in lean] for budget in (0.1, 0.4, 0.8, 1.0)]
    return PrefixProfile((0.1, 0.4, 0.8, 1.0), keep, {"source": "tests"})


def cache_for(family, inputs, options, budget=BUDGET):
    """As the user makes it: with the inputs."""
    if "lengths" in options:  # then for once not searched, and from a profile
        options = {name: value for name, value in options.items() if name != "lengths"}
        options["profile"] = profile(len(models.prunable_layers(models.weights(family))))
    return PrefixKVCache.for_model(build(family), budget, inputs=inputs, **{**PLAIN, **options})


def positions(mask):
    return [each.nonzero().flatten().tolist() for each in mask]


def conversation(model, family, layout, cache, watch=lambda: None, only=None):
    """The prompt and a second one without pictures: logits."""
    inputs = prompt(family, layout, only)
    rows = {**LAYOUTS, **WITH_FILMS}[layout]
    of_rows = slice(None) if only is None else slice(only, only + 1)
    logits, ids = feed(model, inputs, models.words(len(rows), STEPS)[of_rows], cache, watch)
    ids = torch.cat([ids, models.words(len(rows), 9, seed=30)[of_rows]], 1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    later = {"input_ids": ids, "attention_mask": mask}
    return torch.cat([logits, feed(model, later, models.words(len(rows), STEPS, seed=4)[of_rows], cache, watch)[0]], 1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=[name.replace(" ", "-") for name in OPTIONS])
@each_case
def test_law_2_it_keeps_what_the_rules_say(family, layout, options):
    attn = compat.seen(("eager", "sdpa")[len(layout) % 2])
    inputs = prompt(family, layout)
    watch = Watch(cache_for(family, inputs, options), family)
    logits = conversation(build(family, attn), family, layout, watch.cache, watch)
    image = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    assert torch.equal(watch.cache.image_mask, image)

    keep = profile(len(watch.layers)).keep_ratios(BUDGET).tolist() if "lengths" in options else None
    rule = Rules(budget=BUDGET, keep=keep, image=positions(image), **{**options, "lengths": "search"})
    oracle = rule.oracle = Oracle(build(family), rule)
    wanted = conversation(oracle.model, family, layout, oracle.cache)
    for step, (kept, by_rule) in enumerate(zip(watch.kept, rule.log, strict=True)):
        for layer in watch.layers:
            assert kept[layer] == by_rule[layer], f"after forward pass {step}, layer {layer}"
    assert (logits - wanted).abs().max() < CLOSE


@pytest.mark.parametrize("options", OPTIONS.values(), ids=[name.replace(" ", "-") for name in OPTIONS])
@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family, layout in CASES if len({**LAYOUTS, **WITH_FILMS}[layout]) > 1],
    ids=lambda value: value.replace(" ", "-"),
)
def test_law_3_a_batch_is_its_members(family, layout, options):
    model, inputs = build(family, "sdpa"), prompt(family, layout)
    watch = Watch(cache_for(family, inputs, options), family)
    logits = conversation(model, family, layout, watch.cache, watch)
    for at in range(len(inputs["input_ids"])):
        own = prompt(family, layout, at)
        alone = Watch(cache_for(family, own, options), family)
        wanted = conversation(model, family, layout, alone.cache, alone, only=at)
        padding = inputs["input_ids"].shape[1] - own["input_ids"].shape[1]
        for kept, single in zip(watch.kept, alone.kept, strict=True):
            for layer in watch.layers:
                assert [[each - padding for each in head] for head in kept[layer][at]] == single[layer][0]
        assert (logits[at] - wanted[0]).abs().max() < CLOSE


@each_case
def test_law_1_with_the_whole_budget_nothing_changes(family, layout):
    inputs = prompt(family, layout)
    ours = cache_for(family, inputs, OPTIONS["text"], budget=1.0)
    logits = conversation(build(family, "sdpa"), family, layout, ours)
    wanted = conversation(build(family, "sdpa"), family, layout, DynamicCache(config=build(family).config))
    assert (logits - wanted).abs().max() < 1e-5


# Whose attention counts.

T, I, P = "text", "image", "padding"  # noqa: E741


@pytest.mark.parametrize(
    ("tokens", "counting"),
    [
        ([T, I, I, T, T], [3, 4]),
        ([T, I, T, I, T], [2, 4]),  # what stands between two pictures has seen the first
        ([P, P, T, I, T], [4]),
        ([P, T, T, T], [1, 2, 3]),  # no image: all text
        ([T, T, I, I], [0, 1, 2, 3]),  # nobody has seen the image but itself
        ([T, I, T, I], [0, 1, 2, 3]),  # nobody has seen the second image
        ([P, P, I, I], [2, 3]),
        ([I, T], [1]),
        ([P, P], []),
        ([*[T] * 40, I], range(9, 41)),  # the last 32, as with the queries of the default
        ([T, I, *[T] * 40, I], [*range(2, 43)]),
        ([P, *[T] * 20, *[I] * 30], range(19, 51)),
    ],
)
def test_whose_attention_counts(tokens, counting):
    image, real = (torch.tensor([[each == kind for each in tokens]]) for kind in (I, P))
    assert text_queries(image, ~real)[0].nonzero().flatten().tolist() == list(counting)
    if P not in tokens:
        assert text_queries(image)[0].nonzero().flatten().tolist() == list(counting)
    # In a batch each row goes by itself.
    other = torch.tensor([[True] * 2 + [False] * (len(tokens) - 2)])
    both = text_queries(torch.cat([other, image]), torch.cat([torch.ones_like(real), ~real]))
    assert both[1].nonzero().flatten().tolist() == list(counting)


def test_a_prompt_that_ends_in_an_image_goes_by_its_last_tokens():
    """Not by the words before it, which have not seen it: they would rank all its keys alike, at nothing."""
    family = "llava_gqa"
    inputs = prompt(family, "ends in a long way of words and a picture")
    model, kept = build(family), []
    for options in (dict(queries="text", text_floor=0.0), dict(queries=32, text_floor=0.0), dict(queries="all")):
        watch = Watch(cache_for(family, inputs, options), family)
        feed(model, inputs, models.words(1, 1), watch.cache, watch)
        kept.append(watch.kept[0])
    assert kept[0] == kept[1] != kept[2]
    image = inputs["input_ids"] == IMAGE
    assert any(image[0, rows[0][0]].sum() > 1 for rows in kept[0].values())  # more than the last token


# Text is never pruned below its floor.


@pytest.mark.parametrize("text_floor", [0.0, 0.5, 1.0])
@each_case
def test_text_keeps_its_floor(family, layout, text_floor):
    inputs = prompt(family, layout)
    watch = Watch(cache_for(family, inputs, dict(queries="text", text_floor=text_floor), 0.6), family)
    feed(build(family), inputs, models.words(len(inputs["input_ids"]), 1), watch.cache, watch)
    real = positions(inputs["attention_mask"])
    image = [set(each) for each in positions(watch.cache.image_mask)]
    for rows in watch.kept[0].values():
        for own, of_image, heads in zip(real, image, rows, strict=True):
            text = set(own) - of_image
            for head in heads:
                room = len(head) - len({own[0], own[-1]} & of_image)  # the sink and the last token come first
                assert len(text & set(head)) >= min(math.ceil(text_floor * len(text)), room)


@pytest.mark.parametrize("layout", ["two pictures", "one row has none", "two, none, one at the end"])
def test_a_prompt_in_chunks(layout):
    """The mask speaks of the whole prompt; a chunk may hold a part of a picture, or nothing but one."""
    family = "llava_gqa"
    model, inputs = build(family), prompt(family, layout)
    cache = cache_for(family, inputs, dict(queries="text"), 0.8)
    rows = len(inputs["input_ids"])
    model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False, prefill_chunk_size=compat.CHUNK)
    text = inputs["attention_mask"].bool() & ~cache.image_mask
    kept = torch.zeros(rows, text.shape[1] + 1, dtype=torch.bool)
    positions_kept = cache.kept_positions(0)
    kept.scatter_(1, positions_kept.clamp_min(0), positions_kept >= 0)
    missing = text & ~kept[:, :-1]
    image_kept = cache.image_mask & kept[:, :-1]
    # A chunk of text alone keeps its share of it, and never more than that is lost.
    assert image_kept.sum() < cache.image_mask.sum()
    assert missing.sum() <= 0.2 * text.sum() + rows * (text.shape[1] // compat.CHUNK + 1)


# Later turns.


@pytest.mark.parametrize("told", [True, False])
def test_a_second_turn_with_a_new_picture(told):
    """The mask of all tokens so far is assigned; without it, the new picture is text."""
    family, options = "llava_gqa", dict(queries="text", distance=None)
    model = build(family)
    first = prompt(family, "two pictures")
    more, looks = row(family, [5, PICTURE, 8], seed=7)
    watch = Watch(cache_for(family, first, options), family)
    images = None

    def talk(model, cache, watch):
        nonlocal images
        logits, ids = feed(model, first, models.words(1, 3), cache, watch)
        ids = torch.cat([ids, torch.tensor([more])], 1)
        images = ids == IMAGE
        later = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **{"pixel_values": looks["pixel_values"][0]}}
        if told and isinstance(cache, PrefixKVCache):
            cache.image_mask = images
        return torch.cat([logits, feed(model, later, models.words(1, 3, seed=4), cache, watch)[0]], 1)

    logits = talk(model, watch.cache, watch)
    known = images if told else images & (torch.arange(images.shape[1]) < first["input_ids"].shape[1])
    rule = Rules(budget=BUDGET, image=positions(known), **options)
    oracle = rule.oracle = Oracle(build(family), rule)
    wanted = talk(oracle.model, oracle.cache, lambda: None)
    for kept, by_rule in zip(watch.kept, rule.log, strict=True):
        assert kept == by_rule
    assert (logits - wanted).abs().max() < CLOSE


def test_a_mask_may_speak_of_what_comes_later():
    """Columns behind the prompt are not looked at before their tokens come."""
    family = "llava_gqa"
    inputs = prompt(family, "two pictures")
    image = inputs["input_ids"] == IMAGE
    longer = torch.cat([image, torch.ones(1, 40, dtype=torch.bool)], 1)
    kept = []
    for mask in (image, longer):
        watch = Watch(PrefixKVCache(budget=BUDGET, queries="text", image_mask=mask), family)
        feed(build(family), inputs, models.words(1, 3), watch.cache, watch)
        kept.append(watch.kept)
    assert kept[0] == kept[1]


def test_what_was_cropped_is_no_image_any_more():
    family = "llava_gqa"
    model, inputs = build(family), prompt(family, "ends in a picture")
    cache = cache_for(family, inputs, dict(queries="text", distance=None))
    _, ids = feed(model, inputs, models.words(1, 1), cache)
    cache.crop(-6)
    assert cache.image_mask.shape == (1, 20)
    ids = torch.cat([ids[:, :20], models.words(1, 12, seed=5)], 1)
    feed(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, models.words(1, 2), cache)
    kept = set(cache.kept_positions(0)[0].tolist())
    assert 31 in kept and cache.get_seq_length() == 33


@pytest.mark.parametrize("fed", [False, True])
def test_where_nothing_was_cropped_the_mask_is_whole(fed):
    """Also what it says of tokens to come: of all of them, before the first prompt."""
    family = "llava_gqa"
    inputs = prompt(family, "two pictures")
    image = torch.cat([inputs["input_ids"] == IMAGE, torch.ones(1, 9, dtype=torch.bool)], 1)
    cache = PrefixKVCache(budget=BUDGET, queries="text", image_mask=image)
    if fed:
        feed(build(family), inputs, models.words(1, 1), cache)
    cache.crop(0)
    assert torch.equal(cache.image_mask, image)


def test_reset_and_a_new_mask():
    family = "llava_gqa"
    inputs, other = prompt(family, "two pictures"), prompt(family, "behind the question")
    cache = cache_for(family, inputs, dict(queries="text"))
    feed(build(family), inputs, models.words(1, 3), cache)
    cache.reset()
    assert cache.image_mask is None
    cache.image_mask = image_mask_of(other, build(family).config)
    again = cache_for(family, other, dict(queries="text"))
    wanted, _ = feed(build(family), other, models.words(1, 3), again)
    assert torch.equal(feed(build(family), other, models.words(1, 3), cache)[0], wanted)


# Beams and copies.


@pytest.mark.parametrize(("family", "layout"), [("llava_gqa", "two, none, one at the end")])
def test_beams_are_true(family, layout):
    model, inputs = build(family, "sdpa"), prompt(family, layout)
    output = model.generate(
        **inputs, past_key_values=cache_for(family, inputs, OPTIONS["text"]), max_new_tokens=8, do_sample=False,
        num_beams=2, num_return_sequences=2, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    start = inputs["input_ids"].shape[1]
    for beam in range(2):
        tokens = output.sequences[beam::2, start:]
        logits, _ = feed(model, inputs, tokens, cache_for(family, inputs, OPTIONS["text"]))
        scores = logits.log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2))
        assert (scores - output.sequences_scores[beam::2]).abs().max() < 1e-3


def test_a_copy_has_the_mask():
    family = "llava_gqa"
    inputs = prompt(family, "two pictures")
    cache = cache_for(family, inputs, OPTIONS["text"])
    wanted, _ = feed(build(family), inputs, models.words(1, 3), copy.deepcopy(cache))
    assert torch.equal(feed(build(family), inputs, models.words(1, 3), cache)[0], wanted)


# What is refused.


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 5), "bool tensor.*got torch.float32"),
        (torch.zeros(1, 5, dtype=torch.int64), "bool tensor.*got torch.int64"),
        (torch.zeros(5, dtype=torch.bool), r"bool tensor.*got torch.bool \[5\]"),
        (torch.zeros(1, 5, dtype=torch.bool).numpy(), "bool tensor.*got ndarray"),
        (True, "bool tensor.*got bool"),
    ],
    ids=str,
)
def test_a_mask_of_another_kind(mask, message):
    with pytest.raises(TypeError, match=f"image_mask must be a {message}"):
        PrefixKVCache(budget=0.5, image_mask=mask)
    cache = PrefixKVCache(budget=0.5)
    with pytest.raises(TypeError, match=f"image_mask must be a {message}"):
        cache.image_mask = mask


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_a_mask_that_is_too_short(budget):
    family = "llava_gqa"
    inputs = prompt(family, "two pictures")
    cache = PrefixKVCache(budget=budget, image_mask=(inputs["input_ids"] == IMAGE)[:, :-1])
    with pytest.raises(ValueError, match=r"image_mask has 50 columns.*reaches to token 51.*\[batch, n_prompt\]"):
        feed(build(family), inputs, models.words(1, 1), cache)


def test_a_mask_of_other_rows():
    family = "llava_gqa"
    inputs = prompt(family, "two, none, one at the end")
    for rows in (2, 4):
        mask = torch.zeros(rows, inputs["input_ids"].shape[1], dtype=torch.bool)
        with pytest.raises(ValueError, match=rf"image_mask has {rows} rows for a batch of 3.*\[batch, n_prompt\]"):
            feed(build(family), inputs, models.words(3, 1), PrefixKVCache(budget=0.5, image_mask=mask))


@pytest.mark.parametrize("inputs", [{}, {"inputs_embeds": torch.zeros(1, 5, 32)}, {"input_ids": [[1, 2]]}], ids=str)
def test_inputs_without_ids(inputs):
    with pytest.raises(ValueError, match=r"input_ids.*leave inputs out, or give image_mask"):
        PrefixKVCache.for_model(build("llava_gqa"), 0.5, inputs=inputs)


def test_a_mask_of_one_s_own_goes_before_the_inputs():
    model, inputs = build("llava_gqa"), prompt("llava_gqa", "two pictures")
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    assert PrefixKVCache.for_model(model, 0.5, inputs=inputs, image_mask=mask).image_mask is mask


def test_a_model_without_images():
    config = copy.deepcopy(build("llava_gqa").config.get_text_config())
    assert image_mask_of({"input_ids": torch.ones(1, 3, dtype=torch.int64)}, config) is None
