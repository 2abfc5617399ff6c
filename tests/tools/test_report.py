"""The report: what is collected, the numbers of the page, and the page at work in a browser."""

import base64
import html.parser
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
import tiny_vlm
from browser import browser
from prefixkv_cache import PrefixKVCache, methods
from prefixkv_cache.cli import main
from prefixkv_cache.profiles.bundled import bundled_dir
from prefixkv_cache.tools.answer import Answer, kept_columns
from prefixkv_cache.tools.demo import scenes
from prefixkv_cache.tools.loading import load_model, prepare
from prefixkv_cache.tools.report import grid
from prefixkv_cache.tools.report.collect import Pruned, collect_report
from prefixkv_cache.tools.report.page import render_page, verdict

PROMPT = "what is at the bottom right?"
BUDGETS = (0.5, 0.2)


@pytest.fixture(scope="module")
def window():
    """One browser for all; a test is skipped, with the reason, where there is none."""
    with browser() as opened:
        yield opened


def open_page(window, report, path):
    path.write_text(render_page(report), encoding="utf-8")
    window.open(path.as_uri())
    window.wait("document.body.dataset.ready")


# What is collected, and what the page holds.


@pytest.fixture(scope="module")
def scene_vlm():
    return load_model(str(bundled_dir("models") / "scene-llava"), device="cpu")


@pytest.fixture(scope="module")
def scene():
    return scenes.draw_scene(scenes.TEST_SEEDS[17]).image


def collect(scene_vlm, scene, budgets=BUDGETS, n=1, **options):
    return collect_report(*scene_vlm, PROMPT, [("scene.png", scene)], budgets, max_new_tokens=n, **options)


@pytest.fixture(scope="module")
def report(scene_vlm, scene):
    """By the default method: every key head keeps its own keys."""
    return collect(scene_vlm, scene, n=24, profile=None)


@pytest.fixture(scope="module")
def by_layer(scene_vlm, scene):
    """The paper's method: a layer's heads keep the same, and layers differ."""
    return collect(scene_vlm, scene, n=2, profile=None, method="prefixkv")


@pytest.fixture(scope="module")
def by_head(report):
    """As by a profile whose heads differ in length."""

    def cut(pruned):
        kept = [[columns[: len(columns) - head] for head, columns in enumerate(heads)] for heads in pruned.kept]
        return replace(pruned, kept=kept)

    return replace(report, pruned=[cut(each) for each in report.pruned])


def page_data(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def counts_of_page(data, budget):
    """[layers, tokens]: how many key heads keep a token."""
    counts = np.frombuffer(base64.b64decode(budget["kept"]), dtype=np.uint8)
    return counts.reshape(len(data["layers"]), len(data["tokens"]))


def counts_of_cache(cache, n_tokens):
    kept = [kept_columns(cache, layer) for layer in range(len(cache))]
    return np.stack([sum(np.isin(np.arange(n_tokens), head).astype(int) for head in heads) for heads in kept])


@pytest.mark.parametrize("which", ["report", "by_layer"])
def test_the_page_holds_what_the_caches_kept(scene_vlm, scene, which, request):
    model, processor = scene_vlm
    report = request.getfixturevalue(which)
    inputs = prepare(processor, [(PROMPT, [scene])], model.device)
    n_prompt, n_new, heads = inputs["input_ids"].shape[1], *((24, 4) if which == "report" else (2, 1))
    data, full = page_data(render_page(report)), report.full
    assert data["layers"] == list(range(8)) and len(data["tokens"]) == n_prompt
    assert [each["ratio"] for each in data["budgets"]] == sorted(BUDGETS)
    for each in data["budgets"]:
        options = dict(inputs=inputs, profile=None, method=report.method)
        cache = PrefixKVCache.for_model(model, each["ratio"], **options)
        model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
        np.testing.assert_array_equal(counts_of_page(data, each), counts_of_cache(cache, n_prompt))
        assert [len(lengths) for lengths in each["lengths"]] == [heads] * 8
        assert each["lengths"] == [[len(own) for own in kept_columns(cache, layer)] for layer in range(8)]
        prompt_bytes = cache.nbytes
        cache = PrefixKVCache.for_model(model, each["ratio"], **options)
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=n_new, do_sample=False)
        assert each["text"] == processor.decode(out[0, n_prompt:], skip_special_tokens=True).strip()
        assert each["nTokens"] == len(out[0, n_prompt:])
        assert each["nbytes"] == [prompt_bytes, cache.nbytes]
    assert data["full"]["nbytes"] == [2 * 8 * 4 * 32 * 4 * (n_prompt + new) for new in (0, full.n_tokens - 1)]


@pytest.mark.parametrize("which", ["report", "by_layer"])
def test_masses_are_of_the_attention_itself(scene_vlm, scene, which, request):
    """By eager attention, as the model itself gives it; and no choice of as many keys holds more than the best ones."""
    report = request.getfixturevalue(which)
    model, processor = scene_vlm
    inputs = prepare(processor, [(PROMPT, [scene])], model.device)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        found = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    queries = report.method.ranking.queries
    attention = torch.stack([each[0] if queries == "all" else each[0, :, -queries:] for each in found]).sum(2)
    attention /= attention.sum(-1, keepdim=True)
    for pruned in report.pruned:
        for layer, heads in enumerate(pruned.kept):
            own = heads if len(heads) > 1 else heads * 4
            shares = [float(attention[layer, head, columns].sum()) for head, columns in enumerate(own)]
            assert pruned.mass[layer] == pytest.approx(sum(shares) / 4, abs=1e-4)


def test_the_page_says_which_method_and_whose_lengths(scene_vlm, scene, report, by_layer):
    assert page_data(render_page(report))["facts"].endswith("8 layers \u00b7 method: default \u00b7 lengths: uniform")
    assert page_data(render_page(by_layer))["facts"].endswith("method: prefixkv \u00b7 lengths: search")
    facts = page_data(render_page(replace(report, source="scene-llava", n_whole=2)))["facts"]
    assert facts.endswith("lengths: the profile scene-llava") and "8 layers pruned, 2 left whole" in facts


@pytest.mark.parametrize(
    ("text", "nbytes", "said"),
    [
        ("a red ring", 58, "the same answer, saves 42 %"),
        ("a red  ring", 100, "the same answer, saves nothing"),
        ("a red cross", 20, "differs from the third word on"),
        ("", 20, "differs from the first word on"),
        ("a red ring of fire", 20, "differs from the fourth word on"),
    ],
)
def test_the_verdict(text, nbytes, said):
    def answer(text, nbytes):
        return Answer(text, 3, [], nbytes, nbytes, 1.0)

    assert verdict(Pruned(0.5, 0.5, [], [], answer(text, nbytes)), answer("a red ring", 100)) == said
    long = " ".join("abcdefghijklmno")
    pruned = Pruned(0.5, 0.5, [], [], answer(long + " x", nbytes))
    assert verdict(pruned, answer(long + " y", 100)) == "differs from word 16 on"


def test_a_budget_may_be_a_number_of_pairs(scene_vlm, scene):
    report = collect(scene_vlm, scene, [0.5, 40, 10_000], profile=None)
    data = page_data(render_page(report))
    n_tokens = len(data["tokens"])
    assert [each["label"] for each in data["budgets"]] == ["40 pairs", "50 %", "10000 pairs"]
    assert [each["ratio"] for each in data["budgets"]] == [40 / n_tokens, 0.5, 1.0]
    assert {length for heads in data["budgets"][0]["lengths"] for length in heads} == {40}


def test_the_map_of_a_picture_is_the_model_s_own_grid(report, scene):
    (picture,) = page_data(render_page(report))["pictures"]
    (view,) = picture["views"]
    assert (view["rows"], view["columns"]) == (12, 12)
    assert view["tokens"] == picture["columns"] == list(range(2, 146))
    content = base64.b64decode(picture["source"].removeprefix("data:image/png;base64,"))
    shown = np.asarray(Image.open(io.BytesIO(content)))
    np.testing.assert_allclose(shown, np.asarray(scene), atol=1)  # as the model saw it: here, the whole of it


def test_a_cropped_picture_is_shown_as_it_was_seen(scene_vlm):
    wide = Image.new("RGB", (200, 96), "red")
    wide.paste("blue", (52, 0, 148, 96))
    shown = collect_report(*scene_vlm, PROMPT, [("wide", wide)], [0.5], max_new_tokens=1).pictures[0].image
    assert shown.size == (96, 96)
    assert (np.asarray(shown)[:, 2:-2] == (0, 0, 255)).all()


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "qwen2_vl", "gemma3", "internvl"])
def test_other_families_have_a_report(name):
    """Tiles, merged patches, layers that are left whole."""
    family = pictures.family(name)
    photo = pictures.painted(48, 32)
    report = collect_report(family.model, family.processor, "what", [("p", photo)], BUDGETS, max_new_tokens=2)
    columns = pictures.image_columns(family, pictures.inputs_of(family, photo))
    data = page_data(render_page(report))
    assert len(data["pictures"][0]["columns"]) == len(columns) == len(data["imageColumns"])
    assert data["pictures"][0]["views"]
    assert report.n_whole == (2 if name == "gemma3" else 0)
    assert ("left whole" in data["facts"]) == (name == "gemma3")
    for each in data["budgets"]:
        kept = np.mean([np.mean(heads) for heads in each["lengths"]])
        assert kept == pytest.approx(each["ratio"] * len(data["tokens"]), abs=0.5)


def test_a_text_without_pictures_has_a_page_too(scene_vlm):
    report = collect_report(*scene_vlm, "describe the scene.", [], [0.5], max_new_tokens=4)
    data = page_data(render_page(report))
    assert data["pictures"] == data["imageColumns"] == []
    assert "describe" in data["tokens"]


class Parser(html.parser.HTMLParser):
    """What a browser would make of a page: elements, and what refers to something outside."""

    def __init__(self):
        super().__init__()
        self.tags, self.references = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]


HOSTILE = (
    "</script><script>document.body.dataset.broken=1</script><!-- <img src=x onerror='1'> "
    '{{js}} {{data}} "\u2028 &lt; \\'
)


@pytest.fixture
def hostile(report):
    """A report in which all that can be said by a user or a model is an attempt to break the page."""
    answer = replace(report.full, text=HOSTILE)
    return replace(
        report, model=HOSTILE, prompt=HOSTILE, source=HOSTILE, tokens=[HOSTILE] * len(report.tokens), full=answer,
        pruned=[replace(each, answer=answer) for each in report.pruned],
        pictures=[replace(picture, name=HOSTILE) for picture in report.pictures],
    )  # fmt: skip


def test_nothing_that_is_said_can_become_markup(report, hostile):
    page, plain, parsed = render_page(hostile), Parser(), Parser()
    plain.feed(render_page(report))
    parsed.feed(page)
    assert parsed.tags == plain.tags and parsed.references == plain.references == ["data:,"]
    data = page_data(page)
    assert data["prompt"] == data["full"]["text"] == data["budgets"][0]["text"] == HOSTILE


def test_nothing_that_is_said_can_become_markup_in_a_browser(hostile, tmp_path, window):
    open_page(window, hostile, tmp_path / "hostile.html")
    assert window.run("return document.getElementById('prompt').textContent") == HOSTILE
    assert window.run("return document.body.dataset.broken || ''") == ""
    assert window.console() == []


def test_576_tokens_and_32_layers_are_a_page_of_a_sensible_size(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_vlm, "SIZE", 336)
    monkeypatch.setattr(tiny_vlm, "PATCH", 14)
    model, processor = load_model(tiny_vlm.save_model(tmp_path, layers=32), device="cpu")
    photo = Image.effect_noise((900, 600), 60).convert("RGB")
    report = collect_report(model, processor, "what is there ?", [("noise", photo)], BUDGETS * 2, max_new_tokens=2)
    assert len(report.layers) == 32 and len(report.pictures[0].tokens.columns) == 576
    assert len(report.pruned) == 2  # a budget given twice is one budget
    assert len(render_page(report)) < 1_000_000


# The command.


def test_the_command_writes_the_page(tmp_path, scene, capsys):
    scene.save(tmp_path / "scene.png")
    page = tmp_path / "report.html"
    words = [
        "report", "--model", bundled_dir("models") / "scene-llava", "--device", "cpu", "--prompt", PROMPT, "--image",
        tmp_path / "scene.png", "--budgets", "0.5,0.1", "--method", "snapkv:queries=8", "--max-new-tokens", "6",
    ]  # fmt: skip
    assert main([*map(str, words), "--out", str(page)]) == 0
    out, err = capsys.readouterr()
    assert page.name in out and "budget 0.1" in err
    data = page_data(page.read_text(encoding="utf-8"))
    assert f"method: {methods.SNAPKV.replace(queries=8).spell()}" in data["facts"]
    assert str(tmp_path) not in page.read_text(encoding="utf-8")  # where things lie on this machine is not told


# The page in a browser.


LABEL = "return document.querySelector('figure canvas').getAttribute('aria-label')"


def test_the_page_at_work(report, tmp_path, window):
    data = page_data(render_page(report))
    image = data["pictures"][0]["columns"]
    faded = "return [...document.querySelectorAll('#tokens span')].map(e => e.classList.contains('gone'))"

    def pixels():
        return window.run("return [...document.querySelectorAll('figure canvas')].map(e => e.toDataURL())")

    def check(budget, layer):
        """What the page says is what the report holds."""
        own = data["budgets"][budget]
        counts = counts_of_page(data, own)[layer]
        said = re.search(r"Layer (\d+) keeps ([\d.]+) of 144 image tokens a head", window.run(LABEL))
        assert int(said[1]) == layer and float(said[2]) == pytest.approx(counts[image].sum() / 4, abs=0.051)
        assert window.text("#pruned-answer") == own["text"]
        gone = counts == 0
        assert window.run(faded) == [*gone[:2], gone[image].all(), *gone[146:]]
        assert f"layer {layer}: {np.mean(own['lengths'][layer]):g} of {len(counts)} tokens" in window.text("#status")
        assert window.text(".verdicts [aria-pressed=true]") == f"{own['label']}: {own['verdict']}"
        return pixels()

    open_page(window, report, tmp_path / "report.html")
    one_layer, all_layers = check(0, 0)
    window.press("#layer", "right", 3)
    third = check(0, 3)
    assert third[0] != one_layer and third[1] == all_layers
    window.press("#layer", "end")
    check(0, 7)
    window.press("#layer", "home")
    assert check(0, 0) == [one_layer, all_layers]
    window.press("#budget", "right")
    more = check(1, 0)
    assert more[0] != one_layer and more[1] != all_layers
    window.click(".strip button:nth-child(6)")
    check(1, 5)
    assert window.run("return document.getElementById('layer').value") == "5"
    window.click(".verdicts li:nth-child(2) button")  # the largest budget comes first
    check(0, 5)
    assert window.console() == []


def test_heads_are_told_apart_where_they_differ(report, by_layer, by_head, tmp_path, window):
    hidden = "return document.getElementById('heads-figure').hidden"
    for each, is_hidden, a_head in ((report, True, True), (by_layer, True, False), (by_head, False, True)):
        open_page(window, each, tmp_path / "report.html")
        assert window.run(hidden) == is_hidden
        assert (" a head" in window.run(LABEL)) == a_head
        assert window.console() == []
    cells = window.run("return [...document.querySelectorAll('#heads rect title')].map(e => e.textContent)")
    lengths = page_data(render_page(by_head))["budgets"][0]["lengths"]
    assert len(cells) == 32 and cells[6].startswith(f"layer 1, head 2: {lengths[1][2]} of ")


def test_what_was_said_otherwise_is_marked(report, tmp_path, window):
    full = replace(report.full, text="a small red ring at the top left")
    said = {0.5: "a small red ring at the top left", 0.2: "a small green ring at the bottom left"}
    pruned = [replace(each, answer=replace(each.answer, text=said[each.budget])) for each in report.pruned]
    open_page(window, replace(report, full=full, pruned=pruned), tmp_path / "report.html")
    assert window.text("#pruned-answer mark") == "green" and window.text("#full-answer mark") == "red"
    assert window.run("return [...document.querySelectorAll('#pruned-answer .new')].map(e => e.textContent)") == [
        "bottom"
    ]
    assert window.run("return document.querySelectorAll('#answers-table mark').length") == 1
    assert window.text("#verdicts li:nth-child(2)") == "20 %: differs from the third word on"


def test_two_caches_stand_side_by_side(scene_vlm, scene, tmp_path, window):
    both = collect(scene_vlm, scene, n=12, profile=None, beside="streaming")
    data = page_data(render_page(both))
    assert [each["label"] for each in data["others"]] == ["20 %, streaming", "50 %, streaming"]
    assert both.beside == methods.STREAMING and both.method == methods.DEFAULT
    open_page(window, both, tmp_path / "report.html")

    def captions():
        return window.run("return [...document.querySelectorAll('figure canvas')].map(e => e.ariaLabel)")

    def choose(index):
        script = (
            "const e = document.getElementById('beside'); e.value = arguments[0]; e.dispatchEvent(new Event('input'))"
        )
        window.run(script, str(index))

    options = window.run("return [...document.getElementById('beside').options].map(e => e.textContent)")
    assert options == ["the full cache", "50 %", "20 %", "50 %, streaming", "20 %, streaming"]
    assert "map of all layers" in captions()[1] and window.text("#full-title") == "Full cache"
    for index, each in ((1, data["budgets"][1]), (2, data["others"][0])):  # a budget, and another method
        choose(index)
        counts = counts_of_page(data, each)[0][data["pictures"][0]["columns"]]
        said = f"{each['label']}: layer 0 keeps {counts.sum() / len(each['lengths'][0]):.4g} of 144"
        assert captions()[0].startswith("The picture as kept at budget 20 %") and said in captions()[1]
        assert window.text("#full-title") == f"Budget {each['label']}" and window.text("#full-answer") == each["text"]
        assert window.text("#full-facts").endswith(f"{each['verdict']}.")
        assert window.run("return document.querySelectorAll('.verdicts [aria-pressed=true]').length") == 2
    window.click(".verdicts li:nth-child(3) button")  # the other method's largest budget
    assert window.text("#full-title") == "Budget 50 %, streaming"
    choose(-1)
    assert "map of all layers" in captions()[1] and window.console() == []


def test_the_page_can_be_read_by_everybody(by_head, tmp_path, window):
    open_page(window, by_head, tmp_path / "report.html")
    assert window.run("return document.getElementById('layer').getAttribute('aria-valuetext')").startswith("layer 0, ")
    assert window.run("return [...document.querySelectorAll('[role=img]')].every(e => e.getAttribute('aria-label'))")
    assert window.run("return [...document.querySelectorAll('input')].every(e => e.labels.length == 1)")
    papers = {}
    for width, scheme in ((1200, "light"), (1200, "dark"), (390, "light")):
        window.size(width, 900)
        window.scheme(scheme)
        assert window.run("return document.documentElement.scrollWidth <= innerWidth")
        with Image.open(io.BytesIO(window.picture())) as picture:
            papers[scheme] = sum(picture.convert("RGB").getpixel((2, 2)))
    assert papers["light"] > 700 and papers["dark"] < 100


def test_pictures_of_several_views_and_without_a_map(report, tmp_path, window):
    (picture,) = report.pictures
    view = picture.tokens.views[0]
    half = grid.View("left half", 12, 6, [token for i, token in enumerate(view.tokens) if i % 12 < 6])
    several = replace(picture, tokens=replace(picture.tokens, views=[replace(view, name="whole"), half]))
    unknown = replace(picture, name="b", tokens=grid.ImageTokens([], []))
    open_page(window, replace(report, pictures=[several, unknown]), tmp_path / "report.html")
    assert "of 144 image tokens" in window.run(LABEL)
    window.click(".views label:nth-child(2)")
    assert "of 72 image tokens" in window.run(LABEL)
    assert "There is no map" in window.text(".picture:nth-child(2)")
    assert window.console() == []
