"""The drawn scenes and the model that reads them: what the demo, the evaluation and the study stand on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from answers import prompts, replies
from prefixkv_cache.tools.demo import scenes

CHECKPOINT = Path(__file__).parents[2] / "models" / "scene-llava"
LEARNT = {"colour": 1.0, "object": 1.0, "size": 0.92, "colour by shape": 0.91}  # shares right, from the model card
MOST_BYTES = 8_000_000
DESCRIBED = scenes.TEST_SEEDS[5000:5012]  # not among the scenes of the model card's figures
KNOWN_DESCRIPTION = (
    "the scene shows four objects. at the top centre there is a small blue diamond. "
    "at the middle centre there is a small orange circle. at the bottom left there is a small white ring. "
    "at the bottom right there is a small red ring."
)
KNOWN_QUESTIONS = [
    ("is there a green ring?", "no", "exists"),
    ("how many orange objects are there?", "one", "count"),
    ("what colour is the diamond?", "blue", "colour by shape"),
]


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_a_seed_gives_one_scene():
    for seed in range(20):
        first, second = scenes.draw_scene(seed), scenes.draw_scene(seed)
        assert first.image.tobytes() == second.image.tobytes()
        assert first.objects == second.objects
        assert scenes.questions(first, 3) == scenes.questions(second, 3)


def test_a_known_seed_gives_the_known_scene():
    """Fixed for good: the same words on every Python and platform, or held-out splits would drift."""
    scene = scenes.draw_scene(scenes.TEST_SEEDS[0])
    assert scenes.describe(scene) == KNOWN_DESCRIPTION
    assert [tuple(question) for question in scenes.questions(scene)[:3]] == KNOWN_QUESTIONS


def test_splits_are_disjoint():
    splits = sorted([scenes.TRAIN_SEEDS, scenes.VALIDATION_SEEDS, scenes.TEST_SEEDS], key=lambda split: split.start)
    assert all(before.stop <= after.start for before, after in pairwise(splits))


def test_the_numbers_of_objects_are_as_asked():
    counts = {len(scenes.draw_scene(seed, 2, 3).objects) for seed in range(40)}
    assert counts == {2, 3}
    assert {len(scenes.draw_scene(seed).objects) for seed in range(60)} == {4, 5, 6, 7}
    with pytest.raises(ValueError, match="1 to 9"):
        scenes.draw_scene(0, 0, 3)


def test_objects_lie_in_their_own_cells_in_reading_order():
    for seed in range(200):
        scene = scenes.draw_scene(seed, 1, 9)
        cells = [(thing.row, thing.column) for thing in scene.objects]
        assert cells == sorted(set(cells))
        for thing in scene.objects:
            left, top, right, bottom = (edge // scenes.CELL for edge in thing.box)
            assert (left, top, right, bottom) == (thing.column, thing.row, thing.column, thing.row)


@pytest.mark.parametrize("seed", range(0, 50, 7))
def test_a_description_parses_back_to_the_objects(seed):
    scene = scenes.draw_scene(seed, 1, 9)
    text = scenes.describe(scene)
    assert scenes.parse_description(text) == {thing.words for thing in scene.objects}
    assert scenes.object_accuracy(text, scene) == 1.0
    assert scenes.object_accuracy("", scene) == 0.0
    assert scenes.wrong_objects(text, scene) == set()


def test_marking_counts_shares_and_extras():
    scene = scenes.draw_scene(scenes.TEST_SEEDS[1])
    first, *others = scene.objects
    colour = next(colour for colour in scenes.COLOURS if colour != first.colour)
    words = f"{first.place} there is a {first.name}"
    changed = scenes.describe(scene).replace(words, words.replace(first.colour, colour))
    assert scenes.object_accuracy(changed, scene) == len(others) / len(scene.objects)
    assert scenes.wrong_objects(changed, scene) == {first.words._replace(colour=colour)}
    assert scenes.object_accuracy(changed.replace(".", " ."), scene) == len(others) / len(scene.objects)


def test_questions_have_the_right_answers():
    """Yes and no are balanced; what an answer says about a place is there."""
    asked = [(scene, question) for scene in map(scenes.draw_scene, range(400)) for question in scenes.questions(scene)]
    assert {question.kind for _, question in asked} == set(scenes.QUESTION_KINDS)
    exists = [question.answer for _, question in asked if question.kind == "exists"]
    assert 0.4 < exists.count("yes") / len(exists) < 0.6
    for scene, question in asked:
        if question.kind == "exists":
            colour, shape = question.text.rstrip("?").split()[-2:]
            there = any((thing.colour, thing.shape) == (colour, shape) for thing in scene.objects)
            assert question.answer == ("yes" if there else "no")
        if question.kind == "object":
            place = question.text.removeprefix("what is at the ").rstrip("?")
            named = [f"a {thing.name}" for thing in scene.objects if thing.place == place]
            assert question.answer == (named[0] if named else "nothing")


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def test_the_checkpoint_is_small_and_half_precision():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < MOST_BYTES
    assert AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="auto").dtype == torch.float16


def test_there_is_enough_to_prune(model, processor):
    assert model.config.text_config.num_hidden_layers >= 8
    inputs = prompts(processor, [(scenes.draw_scene(scenes.TEST_SEEDS[0]), scenes.DESCRIBE_PROMPTS[0])])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() >= 144
    assert inputs["input_ids"].shape[1] < 200


def test_every_word_of_the_scenes_is_known(processor):
    scene = scenes.draw_scene(scenes.TEST_SEEDS[2])
    texts = [scenes.describe(scene), *scenes.DESCRIBE_PROMPTS, *(question.text for question in scenes.questions(scene))]
    for text in texts:
        ids = processor.tokenizer(text)["input_ids"]
        assert processor.tokenizer.unk_token_id not in ids
        assert processor.decode(ids) == text


def test_held_out_scenes_are_described_right(model, processor):
    drawn = [scenes.draw_scene(seed) for seed in DESCRIBED]
    texts = replies(model, processor, [(scene, scenes.DESCRIBE_PROMPTS[0]) for scene in drawn])
    right = sum(scenes.object_accuracy(text, s) * len(s.objects) for text, s in zip(texts, drawn, strict=True))
    assert right / sum(len(scene.objects) for scene in drawn) >= 0.95


def test_questions_on_held_out_scenes_are_answered(model, processor):
    drawn = [scenes.draw_scene(seed) for seed in DESCRIBED[:6]]
    asked = [(scene, question) for scene in drawn for question in scenes.questions(scene) if question.kind in LEARNT]
    texts = replies(model, processor, [(scene, question.text) for scene, question in asked])
    hits = [scenes.answer_matches(text, question) for text, (_, question) in zip(texts, asked, strict=True)]
    by_place = [hit for hit, (_, question) in zip(hits, asked, strict=True) if LEARNT[question.kind] == 1.0]
    assert sum(by_place) / len(by_place) >= 0.95
    assert sum(hits) / len(hits) >= 0.8  # 24 questions are few


def test_a_conversation_goes_on(model, processor):
    scene = scenes.draw_scene(DESCRIBED[0])
    first, second = [question for question in scenes.questions(scene) if question.kind in ("object", "colour")]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first.text}]},
        {"role": "assistant", "content": [{"type": "text", "text": f"{first.answer}."}]},
        {"role": "user", "content": [{"type": "text", "text": second.text}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=scene.image, text=text, return_tensors="pt")
    out = model.generate(**inputs)
    assert scenes.answer_matches(
        processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), second
    )
