"""The report: where image tokens lie (by what each token really sees), the page's numbers, and the page at work."""

import base64
import html.parser
import io
import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
import tiny_vlm
from browser import browser
from prefixkv_cache import PAPER, PrefixKVCache, search_threshold
from prefixkv_cache.bundled import bundled_dir
from prefixkv_cache.calibrated_for import DEFAULT, plain_ranking
from prefixkv_cache.cli import main
from prefixkv_cache.demo import scenes
from prefixkv_cache.loading import load_model, prepare
from prefixkv_cache.observe import observe
from prefixkv_cache.report import grid
from prefixkv_cache.report.collect import collect_report
from prefixkv_cache.report.page import render_page, write_page

PROMPT = "what is at the bottom right?"
BUDGETS = (0.5, 0.2)


@pytest.fixture(scope="module")
def window():
    """One browser for all; a test is skipped, with the reason, where there is none."""
    with browser() as opened:
        yield opened


def open_page(window, path):
    window.open(path.as_uri())
    window.wait("document.body.dataset.ready")


# Where tokens lie.


def placed(family, *shown):
    inputs = pictures.inputs_of(family, *shown)
    sizes = [(picture.height, picture.width) for picture in shown]
    ids, columns = inputs["input_ids"][0].tolist(), pictures.image_columns(family, inputs)
    return columns, grid.place_images(ids, columns, sizes, inputs, family.model.config, family.processor)


def spot_of(name, view, row, column, height, width):
    """The middle of a cell, in parts of the picture; LLaVA's processor cuts a square out of the picture's middle."""
    edges = [(row + low) / view.rows for low in (0.2, 0.8)], [(column + low) / view.columns for low in (0.2, 0.8)]
    short = min(height, width)
    cut = (short / height, short / width) if name == "llava" else (1, 1)
    spread = [[0.5 + (part - 0.5) * share for part in parts] for parts, share in zip(edges, cut, strict=True)]
    return spread[0][0], spread[1][0], spread[0][1], spread[1][1]


@pytest.mark.parametrize("size", [(48, 32), (20, 40)], ids=str)
@pytest.mark.parametrize("name", pictures.PROCESSORS)
def test_every_cell_of_a_map_is_the_token_that_sees_it(name, size):
    family = pictures.family(name)
    before = pictures.features(family.model, pictures.inputs_of(family, pictures.painted(*size)))
    columns, (image,) = placed(family, pictures.painted(*size))
    assert image.columns == columns and len(columns) == len(before)
    assert image.views
    for view in image.views:
        assert len(view.tokens) == len(set(view.tokens)) == view.rows * view.columns
        cells = [(row, column) for row in range(view.rows) for column in range(view.columns)]
        for row, column in cells[:: max(1, len(cells) // 9)] + cells[-1:]:
            spot = pictures.painted(*size, spot_of(name, view, row, column, *size))
            change = (pictures.features(family.model, pictures.inputs_of(family, spot)) - before).norm(dim=1)
            seen_by = max(view.tokens, key=lambda token: float(change[columns.index(token)]))
            assert seen_by == view.tokens[row * view.columns + column], (view.name, row, column)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "mistral3"])
def test_each_of_several_pictures_gets_its_own_tokens(name):
    family = pictures.family(name)
    sizes = [(32, 16), (32, 16)] if name == "mistral3" else [(16, 32), (32, 32)]
    columns, images = placed(family, *(pictures.painted(*size) for size in sizes))
    alone = [len(placed(family, pictures.painted(*size))[0]) for size in sizes]
    assert [len(image.columns) for image in images] == alone
    assert [*images[0].columns, *images[1].columns] == columns
    for image in images:
        assert sorted(image.views[0].tokens) == list(image.columns)


def test_a_grid_that_does_not_account_for_every_token_is_no_map():
    family = pictures.family("qwen2_vl")
    inputs = pictures.inputs_of(family, pictures.painted(32, 16))
    ids = inputs["input_ids"][0].tolist()
    columns = pictures.image_columns(family, inputs)[:-1]
    facts = inputs, family.model.config, family.processor
    assert grid.place_images(ids, columns, [(32, 16)], *facts) == [grid.ImageTokens(columns, [])]
    assert grid.place_images(ids, columns, [(32, 16), (32, 16)], *facts) is None
    assert grid.place_images(ids, [], [], *facts) is None


def test_pooled_grids_by_trying_all():
    for height, width in itertools.product(range(1, 9), repeat=2):
        possible = {(height // k, width // k) for k in range(1, 9) if height % k == width % k == 0}
        for (rows, columns), extra in itertools.product(possible, (0, 1)):
            n, (view,) = grid.pooled(height, width, rows * columns + extra)
            assert n == rows * columns + extra == view.tokens[-1] + 1
            assert (view.rows, view.columns) in possible and len(view.tokens) == view.rows * view.columns
        assert grid.pooled(height, width, height * width + 7) is None


@pytest.mark.parametrize("n_tiles", range(1, 13))
def test_tiles_are_arranged_as_internvl_arranges_them(n_tiles):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    for height, width in [(100, 100), (100, 250), (300, 100), (480, 640), (123, 1000), (700, 90)]:
        columns, rows = get_optimal_tiled_canvas((height, width), (16, 16), 1, n_tiles)
        assert grid.closest_grid(rows * columns, (height, width)) == (rows, columns)


# What is collected, and what the page holds.


@pytest.fixture(scope="module")
def scene_vlm():
    return load_model(str(bundled_dir("models") / "scene-llava"), device="cpu")


@pytest.fixture(scope="module")
def scene():
    return scenes.draw_scene(scenes.TEST_SEEDS[17]).image


@pytest.fixture(scope="module")
def report(scene_vlm, scene):
    return collect_report(*scene_vlm, PROMPT, [("scene.png", scene)], BUDGETS, max_new_tokens=24)


def page_data(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def kept_of_page(data, budget):
    bits = np.unpackbits(np.frombuffer(base64.b64decode(budget["kept"]), dtype=np.uint8))
    n = len(data["layers"]) * len(data["tokens"])
    return bits[:n].reshape(len(data["layers"]), len(data["tokens"])).astype(bool)


def test_the_page_holds_what_the_caches_kept(scene_vlm, scene, report):
    model, processor = scene_vlm
    inputs = prepare(processor, [(PROMPT, [scene])], model.device)
    data = page_data(render_page(report))
    assert data["layers"] == list(range(8)) and len(data["tokens"]) == inputs["input_ids"].shape[1]
    assert [each["budget"] for each in data["budgets"]] == sorted(BUDGETS)
    for each in data["budgets"]:
        cache = PrefixKVCache.for_model(model, each["budget"])
        model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
        kept = kept_of_page(data, each)
        for layer in data["layers"]:
            assert np.flatnonzero(kept[layer]).tolist() == sorted(cache.kept_positions(layer)[0].tolist())
        assert each["nbytes"] == cache.nbytes
        out = model.generate(
            **inputs, past_key_values=PrefixKVCache.for_model(model, each["budget"]), max_new_tokens=24, do_sample=False
        )
        new = out[0, inputs["input_ids"].shape[1] :]
        assert each["text"] == processor.decode(new, skip_special_tokens=True).strip()
        assert each["nTokens"] == len(new)
        full = data["full"]["text"]
        assert each["text"][: each["agrees"]] == full[: each["agrees"]]
        assert each["text"] == full or each["text"][: each["agrees"] + 1] != full[: each["agrees"] + 1]


@pytest.fixture(scope="module")
def searched(scene_vlm, scene):
    """Lengths searched on the prompt, by the default ranking and by the paper's."""
    pictures = [("scene.png", scene)]
    return {
        rule: collect_report(*scene_vlm, PROMPT, pictures, BUDGETS, max_new_tokens=1, profile=None, **options)
        for rule, options in (("default", {}), ("paper", PAPER))
    }


def shares(scene_vlm, scene, ranking):
    model, processor = scene_vlm
    found = observe(model, prepare(processor, [(PROMPT, [scene])], model.device), ranking=ranking)[0].double()
    return found / found.sum(1, keepdim=True)


@pytest.mark.parametrize(("rule", "ranking"), [("default", DEFAULT), ("paper", plain_ranking("all"))])
def test_the_threshold_is_that_of_the_search_on_what_ranks_the_keys(rule, ranking, searched, scene_vlm, scene):
    report = searched[rule]
    scores, attention = (shares(scene_vlm, scene, each) for each in (ranking, plain_ranking(ranking.queries)))
    assert report.source is None and report.ranking == ranking
    torch.testing.assert_close(report.scores.double(), scores, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(report.importance.double(), attention, rtol=1e-4, atol=1e-9)
    for pruned in report.pruned:
        threshold, counts = search_threshold(scores, pruned.budget)
        left = 1 - threshold
        assert 1 - pruned.threshold == pytest.approx(left, rel=1e-3, abs=1e-15)
        # The cache stopped where the page says that a search stops. (Equal scores may fall this way or that.)
        assert np.abs(counts.numpy() - [len(columns) for columns in pruned.kept]).max() <= 1
        for layer, columns in enumerate(pruned.kept):
            gone = [token for token in range(scores.shape[1]) if token not in columns]
            assert pruned.missed[layer] == pytest.approx(float(scores[layer, gone].sum()), rel=1e-3)
            assert pruned.mass[layer] == pytest.approx(float(attention[layer, columns].sum()), abs=1e-5)
    if rule == "default":  # the search by attention alone would stop elsewhere
        other = search_threshold(attention, 0.2)[0]
        assert abs(other - report.pruned[1].threshold) > 0.01


def lines_of(data, which):
    """(shares of the keys, heights [layer, point]) of a set of lines."""
    lines = data["curves"][which]
    heights = np.frombuffer(base64.b64decode(lines["heights"]), dtype="<u2") / 65535
    return lines["x"], heights.reshape(len(data["layers"]), len(lines["x"]))


@pytest.mark.parametrize("rule", ["default", "paper"])
def test_masses_and_lines_are_those_of_attention_and_scores(rule, searched):
    report = searched[rule]
    data = page_data(render_page(report))
    assert [lines["of"] for lines in data["curves"]] == {"default": ["score", "attention"], "paper": ["attention"]}[
        rule
    ]
    torch.testing.assert_close(report.importance.sum(1), torch.ones(8))
    torch.testing.assert_close(report.scores.sum(1), torch.ones(8))
    for each, pruned in zip(data["budgets"], sorted(report.pruned, key=lambda pruned: pruned.budget), strict=True):
        kept = torch.from_numpy(kept_of_page(data, each))
        mass = (report.importance * kept).sum(1)
        torch.testing.assert_close(torch.tensor(each["mass"]), mass, atol=2e-6, rtol=0, check_dtype=False)
        missed = (report.scores * ~kept).double().sum(1)
        torch.testing.assert_close(torch.tensor(each["missed"]).double(), missed, atol=0, rtol=1e-3)
        assert each["threshold"] == pruned.threshold
        # No other choice of as many keys holds more attention than the line says.
        best = report.importance.sort(1, descending=True).values.cumsum(1)
        top = torch.stack([row[len(columns) - 1] for row, columns in zip(best, pruned.kept, strict=True)])
        assert bool((torch.tensor(each["mass"]) <= top + 1e-5).all())
    n = len(data["tokens"])
    x, heights = lines_of(data, -1)
    assert data["curves"][-1]["decades"] == 0 and x[0] == 0 and x[-1] == 1 and heights[:, -1].min() > 0.9999
    for layer, row in enumerate(report.importance.tolist()):
        by_hand = [sum(sorted(row, reverse=True)[: round(share * n)]) for share in x]
        np.testing.assert_allclose(heights[layer], by_hand, atol=1e-4)
    if rule == "default":
        x, heights = lines_of(data, 0)
        decades = data["curves"][0]["decades"]
        assert decades in (4, 8, 12, 16) and heights[:, 0].min() == 1 and heights[:, -1].max() == 0
        for layer, row in enumerate(report.scores.double().tolist()):
            left = [sum(sorted(row)[: n - round(share * n)]) for share in x]
            by_hand = [max(1 + math.log10(max(part, 1e-99)) / decades, 0) for part in left]
            np.testing.assert_allclose(heights[layer], by_hand, atol=1e-4)


@pytest.mark.filterwarnings("ignore::prefixkv_cache.calibrated_for.ProfileMismatchWarning")
def test_the_page_says_what_ranks_the_keys_and_whose_lengths_they_are(scene_vlm, scene, searched):
    facts = {rule: page_data(render_page(report))["facts"] for rule, report in searched.items()}
    assert facts["default"].endswith(
        "keys ranked by the attention of the last 32 prompt tokens, diversity 0.5, novelty 8.0"
    )
    assert facts["paper"].endswith(
        "lengths searched on this prompt \u00b7 keys ranked by the attention of all prompt tokens"
    )
    report = collect_report(*scene_vlm, PROMPT, [("scene.png", scene)], [0.5], max_new_tokens=1, **PAPER)
    assert report.source == "scene-llava, made for another ranking"


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
        kept = kept_of_page(data, each)
        assert kept.mean() == pytest.approx(each["budget"], abs=0.5 / kept.shape[1])


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
    write_page(hostile, tmp_path / "hostile.html")
    open_page(window, tmp_path / "hostile.html")
    assert window.run("return document.getElementById('prompt').textContent") == HOSTILE
    assert window.run("return document.body.dataset.broken || ''") == ""
    assert window.console() == []


def test_the_page_is_written_in_one_step(report, tmp_path):
    target = tmp_path / "page.html"
    target.write_text("before")
    broken = type(report)(**{**vars(report), "tokens": None})
    with pytest.raises(TypeError):
        write_page(broken, target)
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]
    write_page(report, target)
    assert target.read_text(encoding="utf-8") == render_page(report) and list(tmp_path.iterdir()) == [target]


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


def run(arguments, capsys):
    status = main(["report", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_the_command_writes_the_page(tmp_path, scene, capsys):
    scene.save(tmp_path / "scene.png")
    page = tmp_path / "report.html"
    common = ["--model", bundled_dir("models") / "scene-llava", "--device", "cpu", "--prompt", PROMPT]
    status, out, err = run(
        [*common, "--image", tmp_path / "scene.png", "--budgets", "0.5,0.1", "--profile", "scene-llava",
         "--queries", "8", "--max-new-tokens", "6", "--out", page],
        capsys,
    )  # fmt: skip
    assert (status, page.name in out, "budget 0.1" in err) == (0, True, True)
    data = page_data(page.read_text(encoding="utf-8"))
    assert "last 8 prompt tokens, diversity" in data["facts"] and "profile scene-llava" in data["facts"]
    assert str(tmp_path) not in page.read_text(encoding="utf-8")  # where things lie on this machine is not told
    with Image.open(tmp_path / "scene.png") as saved:
        assert saved.size == (96, 96)


@pytest.mark.filterwarnings("ignore::prefixkv_cache.calibrated_for.ProfileMismatchWarning")
def test_the_command_reports_on_the_paper_s_rule(tmp_path, scene, scene_vlm, capsys):
    scene.save(tmp_path / "scene.png")
    page, model = tmp_path / "report.html", scene_vlm[0]
    status, *_ = run(
        ["--model", bundled_dir("models") / "scene-llava", "--device", "cpu", "--prompt", PROMPT, "--paper",
         "--image", tmp_path / "scene.png", "--budgets", "0.2", "--max-new-tokens", "2", "--out", page],
        capsys,
    )  # fmt: skip
    data = page_data(page.read_text(encoding="utf-8"))
    assert status == 0 and "attention of all prompt tokens" in data["facts"]
    cache = PrefixKVCache.for_model(model, 0.2, **PAPER)
    model.generate(**prepare(scene_vlm[1], [(PROMPT, [scene])]), past_key_values=cache, max_new_tokens=1)
    for layer, kept in enumerate(kept_of_page(data, data["budgets"][0])):
        assert np.flatnonzero(kept).tolist() == sorted(cache.kept_positions(layer)[0].tolist())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--out", "report.pdf"], "ends in .html"),
        (["--out", "nowhere/report.html"], "no folder"),
        (["--prompt", "  "], "--prompt is empty"),
        (["--budgets", "0.5,1.5"], "1.5"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--image", "none.png"], "none.png"),
        (["--profile", "no-such"], "no-such"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_before_the_model_is_loaded(change, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(["--model", "no-model", "--prompt", "what", *change], capsys)
    assert status == 2 and out == ""
    assert words in err and len(err.strip().splitlines()) == 1


# The page in a browser.


def test_the_page_at_work(report, tmp_path, window):
    write_page(report, tmp_path / "report.html")
    data = page_data(render_page(report))
    label = "return document.querySelector('figure canvas').getAttribute('aria-label')"
    faded = "return [...document.querySelectorAll('#tokens span')].map(e => e.classList.contains('gone'))"

    def pixels():
        return window.run("return [...document.querySelectorAll('figure canvas')].map(e => e.toDataURL())")

    def check(budget, layer):
        """What the page says is what the report holds."""
        kept, image = kept_of_page(data, data["budgets"][budget]), data["pictures"][0]["columns"]
        assert f"Layer {layer} keeps {kept[layer, image].sum()} of 144 image tokens" in window.run(label)
        assert window.text("#pruned-answer") == data["budgets"][budget]["text"]
        assert window.run(faded) == [*~kept[layer, :2], not kept[layer, image].any(), *~kept[layer, 146:]]
        assert f"layer {layer}: {kept[layer].sum()} of {kept.shape[1]} tokens" in window.text("#status")
        return pixels()

    open_page(window, tmp_path / "report.html")
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
    assert window.console() == []


def test_the_page_can_be_read_by_everybody(report, tmp_path, window):
    write_page(report, tmp_path / "report.html")
    open_page(window, tmp_path / "report.html")
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


def test_the_lines_are_of_what_the_page_says(searched, tmp_path, window):
    label = "return document.querySelector('#curves svg').getAttribute('aria-label')"
    title = "#curves-title"
    for rule, report in searched.items():
        write_page(report, tmp_path / "report.html")
        open_page(window, tmp_path / "report.html")
        pruned = min(report.pruned, key=lambda each: each.budget)
        dashed = "return document.querySelectorAll('#curves .limit').length"
        assert window.run(dashed) == 1
        if rule == "paper":
            assert window.text(title) == "Where the attention goes"
            assert window.run("return document.querySelectorAll('figcaption .views').length") == 0
            said = re.fullmatch(
                r"Layer 0 keeps ([\d.]+) % of the attention; a search .* keeps ([\d.]+) %", window.run(label)
            )
            assert float(said[1]) == pytest.approx(100 * pruned.mass[0], abs=0.051)
            assert float(said[2]) == pytest.approx(100 * pruned.threshold, abs=0.051)
            continue
        assert window.text(title) == "Where the score goes"
        said = re.fullmatch(r"Layer 0 leaves out (\S+) of the score; a search .* leaves out (\S+)", window.run(label))
        assert float(said[1]) == pytest.approx(pruned.missed[0], rel=0.06)
        assert float(said[2]) == pytest.approx(1 - pruned.threshold, rel=0.06)
        window.click("figcaption .views label:nth-child(2)")
        assert window.text(title) == "Where the attention goes" and window.run(dashed) == 0
        assert "search" not in window.run(label)
        window.click("figcaption .views label:nth-child(1)")
        assert window.text(title) == "Where the score goes"
        assert window.console() == []


def test_pictures_of_several_views_and_without_a_map(report, tmp_path, window):
    (picture,) = report.pictures
    view = picture.tokens.views[0]
    half = grid.View("left half", 12, 6, [token for i, token in enumerate(view.tokens) if i % 12 < 6])
    several = replace(picture, tokens=replace(picture.tokens, views=[replace(view, name="whole"), half]))
    unknown = replace(picture, name="b", tokens=grid.ImageTokens([], []))
    write_page(replace(report, pictures=[several, unknown]), tmp_path / "report.html")
    open_page(window, tmp_path / "report.html")
    label = "return document.querySelector('figure canvas').getAttribute('aria-label')"
    assert "of 144 image tokens" in window.run(label)
    window.click(".views label:nth-child(2)")
    assert "of 72 image tokens" in window.run(label)
    assert "There is no map" in window.text(".picture:nth-child(2)")
    assert window.console() == []
