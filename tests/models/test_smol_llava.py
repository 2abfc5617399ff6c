"""The LLaVA around SmolLM2: its parts fit together, training sees what the processor makes."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

import smollm
from prefixkv_cache import PrefixKVCache
from prefixkv_cache.tools.demo import pages, scenes
from prefixkv_cache.tools.loading import prepare

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "models" / "smol-llava"
MOST_BYTES = 20_000_000
sys.path.insert(0, str(ROOT / "examples"))


def test_the_folder_is_small_and_holds_no_language_model():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MOST_BYTES
    assert not (FOLDER / "model.safetensors").exists()


def test_an_image_token_lies_on_what_is_at_its_centre():
    from smol_llava.tasks import SIDE, ReadPages, ReadScenes

    scene = scenes.draw_scene(scenes.TRAIN_SEEDS[3])
    truths = ReadScenes().patch_truths(scene).view(SIDE, SIDE, -1)
    for thing in scene.objects:
        row, column = ((thing.box[i] + thing.box[i + 2]) // 2 * SIDE // scenes.IMAGE_SIZE for i in (1, 0))
        colour, shape = truths[row, column, 1:3].tolist()
        assert (list(scenes.COLOURS)[colour - 1], scenes.SHAPES[shape - 1]) == (thing.colour, thing.shape)

    page = pages.draw_page(pages.TRAIN_SEEDS[3])
    truths = ReadPages().patch_truths(page).view(SIDE, SIDE, -1)
    for line in page.lines:
        for place, each in enumerate(line):
            row, column = ((each.box[i] + each.box[i + 2]) // 2 * SIDE // pages.IMAGE_SIZE for i in (1, 0))
            word, number, at, *letters = truths[row, column].tolist()
            assert (pages.WORDS[word - 1], number, at) == (each.word, each.line, place)
            assert {ReadPages.letters[letter] for letter in letters} <= {*each.word, " "}
    assert set(truths[..., 0].unique().tolist()) == {0, *(1 + pages.WORDS.index(each.word) for each in page.objects)}


def test_image_tokens_say_the_cells_in_reading_order():
    from smol_llava.tasks import SIDE, ReadPages, ReadScenes

    scene, page = scenes.draw_scene(scenes.TRAIN_SEEDS[3]), pages.draw_page(pages.TRAIN_SEEDS[3])
    of_scene = [
        f"{row} {column} {thing.name if (thing := scene.at(i, j)) else ''}".split()
        for i, row in enumerate(scenes.ROWS)
        for j, column in enumerate(scenes.COLUMNS)
    ]
    of_page = [
        [scenes.NUMBERS[1 + each.line], pages.ORDINALS[each.line], pages.ORDINALS[each.place], each.word]
        for each in page.objects
    ]
    for task, picture, cells in ((ReadScenes(), scene, of_scene), (ReadPages(), page, of_page)):
        said = task.said(picture)
        assert said.shape == (SIDE * SIDE,)
        assert " ".join(task.sayings[code] for code in said if code).split() == [
            word for cell in cells for word in cell
        ]
        assert len(set(task.sayings)) == len(task.sayings)


def test_what_is_said_is_a_word_a_mean_of_words_or_a_line_break():
    from smol_llava.tasks import Meaning

    known = {"\n": [0], " red": [1], " top left": [2, 3]}

    def tokenizer(text, add_special_tokens):
        return {"input_ids": known[text]}

    embeddings = torch.randn(5, 8)
    mean = embeddings.mean(0)
    blank, red, corner = Meaning(("", "red", "top left"), tokenizer, embeddings)(torch.tensor([0, 1, 2]))
    assert torch.allclose(blank, embeddings[0], atol=1e-6)
    assert torch.allclose(red, embeddings[1], atol=1e-6)
    assert torch.allclose(corner, mean + (embeddings[2] + embeddings[3] - 2 * mean) / 2**0.5, atol=1e-6)


@pytest.fixture(scope="module")
def loaded():
    from smol_llava.model import load

    return load(FOLDER, smollm.load()[0])


@smollm.needs_smollm
def test_what_is_trained_on_is_what_the_processor_makes(loaded):
    from smol_llava.packing import Packer, pixels_of

    model, processor = loaded
    for picture in (scenes.draw_scene(7), pages.draw_page(7)):
        inputs = prepare(processor, [("what is this?", [picture.image])])
        assert torch.allclose(inputs["pixel_values"], pixels_of([picture]), atol=1e-6)
        row = Packer(processor.tokenizer).row([("what is this?", "a cat")])
        n = inputs["input_ids"].shape[1]
        assert row.ids[:n].tolist() == inputs["input_ids"][0].tolist()
        assert processor.decode(row.ids[row.labels > 0]) == "a cat<|im_end|>"
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 144


def test_a_merged_adapter_does_what_it_did_beside_the_weights():
    from smol_llava.model import adapters, attach, merge

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    plain = LlamaModel(config).eval()
    adapted = copy.deepcopy(plain)
    attach(adapted, 3, 2)
    inputs = torch.arange(9)[None]
    assert torch.equal(adapted(inputs).last_hidden_state, plain(inputs).last_hidden_state)
    for _, part in adapters(adapted):
        torch.nn.init.normal_(part.up)
    assert len(dict(adapters(adapted))) == 14
    changed = adapted(inputs).last_hidden_state
    assert not torch.allclose(changed, plain(inputs).last_hidden_state, atol=1e-2)
    merge(plain, {f"{name}.{side}": getattr(part, side) for name, part in adapters(adapted) for side in ("down", "up")})
    assert torch.allclose(changed, plain(inputs).last_hidden_state, atol=1e-4)


@smollm.needs_smollm
def test_the_language_model_is_smollm_and_its_adapter(loaded):
    language, decoder = smollm.load()[0].model, loaded[0].model.language_model
    assert torch.equal(language.embed_tokens.weight, decoder.embed_tokens.weight)
    assert torch.equal(language.norm.weight, decoder.norm.weight)
    ours, theirs = (each.layers[7].self_attn.q_proj.weight for each in (decoder, language))
    assert 0 < torch.linalg.matrix_rank(ours - theirs, rtol=1e-3) <= 16


@smollm.needs_smollm
def test_it_reads_pictures_that_it_was_not_trained_on(loaded):
    """One answer in twelve may be wrong: the model card says how often it is."""
    model, processor = loaded
    right = []
    for module, draw in ((pages, pages.draw_page), (scenes, scenes.draw_scene)):
        for seed in module.TEST_SEEDS[:2]:
            picture = draw(seed)
            for question in module.questions(picture)[:3]:
                inputs = prepare(processor, [(question.text, [picture.image])])
                out = model.generate(**inputs, past_key_values=PrefixKVCache(None, 1.0, config=model.config))
                said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right.append(module.answer_matches(said, question))
    assert len(right) == 12
    assert sum(right) >= 11
