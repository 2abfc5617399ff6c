"""Rows that move, are repeated, copied, pickled and taken back: everything of a row goes with it, head by head."""

import copy
import functools
import gc
import pickle
from dataclasses import replace

import pytest
import torch

import models
from models import EIGHT_HEADS
from oracle import Given, Oracle, feed
from watch import CLOSE, Case, Watch, kept_by_head, talk

CASES = [
    Case("prefixkv:distance=5"),
    Case("prefixkv:distance=5", "gemma3", "eager", profile="head"),
    Case("default:headroom=6", profile="layer", budget=0.25),
    Case("default:headroom=6", EIGHT_HEADS, profile="head"),
    Case("h2o", "llava_mha"),
    Case("h2o", EIGHT_HEADS, "eager", profile="head"),
    Case("snapkv:queries=8;recent=8;lengths=pool;distance=5", "llava_mha"),
    Case("elastic:heads=each", profile="head"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
MOVES = [
    ("reorder_cache", [2, 0, 2]), ("batch_select_indices", [0, 2]), ("batch_select_indices", [1]),
    ("batch_repeat_interleave", [0, 0, 1, 1, 2, 2]),
]  # fmt: skip


def after_twelve(case, **changes):
    """A padded batch after its prompt and 11 tokens: ids, cache."""
    cache = case.cache(**changes)
    _, sequences = feed(case.model, case.prompt(), models.words(len(case.lengths), 12), cache)
    return sequences, cache


def go_on(case, sequences, cache, rows=None):
    """Five more tokens, a next turn and 8 tokens, of these rows; the words follow the row that they belong to."""
    rows = list(range(len(sequences))) if rows is None else rows
    inputs = {"attention_mask": case.prompt()["attention_mask"]}
    more = torch.cat([sequences, models.words(len(sequences), 5, seed=5)], dim=1)
    turn = models.next_turn(inputs, more, 9)
    ids, mask, logits = turn["input_ids"][rows], turn["attention_mask"][rows], []
    for at in range(cache.get_seq_length(), more.shape[1]):
        so_far = mask[:, : at + 1]
        place = {"attention_mask": so_far, "position_ids": so_far.sum(1, keepdim=True) - 1}
        logits.append(case.model(input_ids=ids[:, at : at + 1], past_key_values=cache, **place).logits)
    turn = {"input_ids": ids, "attention_mask": mask}
    return torch.cat([*logits, feed(case.model, turn, models.words(len(sequences), 8, seed=11)[rows], cache)[0]], 1)


@functools.cache
def undisturbed(case):
    return go_on(case, *after_twelve(case))


@pytest.mark.parametrize(("operation", "rows"), MOVES, ids=str)
@each_case
def test_rows_that_move(case, operation, rows):
    wanted = undisturbed(case)
    sequences, cache = after_twelve(case)
    getattr(cache, operation)(2 if operation == "batch_repeat_interleave" else torch.tensor(rows))
    assert (go_on(case, sequences, cache, rows) - wanted[rows]).abs().max() < CLOSE


@pytest.mark.parametrize("by", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"])
@pytest.mark.parametrize("case", [*CASES, Case("default:headroom=6", "qwen2_5_vl", image=True)], ids=str)
def test_a_copy_goes_on_by_itself(case, by):
    if case.family == "qwen2_5_vl":  # its position deltas are the model's, so it cannot go back
        case = replace(case, lengths=(61,))
    wanted = undisturbed(case)
    sequences, cache = after_twelve(case)
    twin = by(cache)
    assert torch.equal(go_on(case, sequences, cache), wanted)
    del cache
    gc.collect()
    assert torch.equal(go_on(case, sequences, twin), wanted)


@pytest.mark.parametrize("profile", [None, "head"])
def test_a_copy_made_before_the_prompt_prunes_too(profile):
    case = Case("prefixkv", profile=profile)
    twin = copy.deepcopy(case.cache())
    _, cache = after_twelve(case)
    feed(case.model, case.prompt(), models.words(3, 12), twin)
    for layer in case.layers:
        assert torch.equal(twin.kept_positions(layer), cache.kept_positions(layer))


# Taking tokens back. (Gemma's sliding layers cannot, past their window.)

CASES_TO_CROP = [CASES[0], CASES[2], *CASES[4:6], Case("prefixkv:distance=5", EIGHT_HEADS, profile="head")]


@pytest.mark.parametrize("case", [
    Case("prefixkv:distance=none"), Case("prefixkv:distance=none", EIGHT_HEADS, profile="head"),
    Case("snapkv:queries=8;recent=8", "llava_mha"), Case("default", profile="head"),
], ids=str)  # fmt: skip
def test_crop_takes_the_last_tokens_back(case):
    """Where nothing has left it can always be done: as if the last three had never been fed."""
    sequences, cache = after_twelve(case)
    cache.crop(-3)
    shorter = case.cache()
    feed(case.model, case.prompt(), models.words(3, 9), shorter)
    assert cache.get_seq_length() == shorter.get_seq_length()
    for layer in case.layers:
        assert kept_by_head(cache, layer, case.heads) == kept_by_head(shorter, layer, case.heads)
    cropped = sequences[:, :-3]
    assert (go_on(case, cropped, cache) - go_on(case, cropped, shorter)).abs().max() < CLOSE


@pytest.mark.parametrize("case", CASES_TO_CROP, ids=str)
def test_crop_after_eviction_leaves_true_positions(case):
    """What was evicted cannot come back; what is left is what the cache says, and law 2 goes on to hold."""
    watch, tokens = Watch(case.cache(), case.family), models.words(3, 16)
    _, sequences = feed(case.model, case.prompt(), tokens, watch.cache, watch)
    watch.cache.crop(-3)
    del watch.kept[-1]
    watch()
    assert watch.seen[-1] == watch.seen[-2] - 3
    again = models.next_turn(case.prompt(), sequences[:, :-3], 9)
    logits, _ = feed(case.model, again, tokens, watch.cache, watch)

    oracle = Oracle(case.model, Given(watch.kept))
    feed(oracle.model, case.prompt(), tokens, oracle.cache)
    oracle.cache.crop(-3)
    wanted, _ = feed(oracle.model, again, tokens, oracle.cache)
    assert (logits - wanted).abs().max() < CLOSE


def test_crop_of_what_heads_hold_differently_is_refused():
    """Nearly no window here, so that some head has let one of the newest go."""
    _, cache = after_twelve(Case("h2o:recent=0.01"))
    with pytest.raises(ValueError, match=r"(?s)11.*heads.*reset\(\)"):
        cache.crop(-11)


@pytest.mark.parametrize("case", CASES_TO_CROP, ids=str)
def test_crop_of_nothing_is_nothing(case):
    wanted = undisturbed(case)
    sequences, cache = after_twelve(case)
    before = cache.stored_lengths()
    cache.crop(0)
    assert cache.stored_lengths() == before
    assert torch.equal(go_on(case, sequences, cache), wanted)


def test_crop_of_nothing_leaves_whole_layers_as_they_are():
    """Within Gemma's sliding window."""
    case = Case("prefixkv", "gemma3", lengths=(8,), turns=(4,))
    cache = case.cache()
    talk(case.model, case, cache)
    before = cache.stored_lengths()
    cache.crop(0)
    assert cache.stored_lengths() == before


# Beams.


@pytest.mark.parametrize("case", [*CASES, Case("default:headroom=3", image=True, profile="head")], ids=str)
def test_beams_are_true(case):
    """Each beam's score is what the cache gives for its tokens by themselves, evictions and all."""
    inputs = case.prompt()
    output = case.model.generate(
        **inputs, past_key_values=case.cache(), max_new_tokens=8, do_sample=False, num_beams=2, num_return_sequences=2,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    for beam in range(2):
        tokens = output.sequences[beam::2, inputs["input_ids"].shape[1] :]
        logits, _ = feed(case.model, inputs, tokens, case.cache())
        scores = logits.log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2))
        assert (scores - output.sequences_scores[beam::2]).abs().max() < 1e-4  # `generate` adds them up in float32
