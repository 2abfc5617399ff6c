"""Where image tokens lie on their picture, by which token each part of it changes."""

import itertools

import pytest

import pictures
from prefixkv_cache.tools.report import grid


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
