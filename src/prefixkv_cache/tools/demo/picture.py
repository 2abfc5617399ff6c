"""The demo's picture: the scene, and beside it what each layer of each cache kept of it. Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)
MARGIN, GAP, LABEL = 16, 8, 150
CELL = 108  # pixels of one small map
SCENE = 288


@dataclass(frozen=True)
class KeptMap:
    """What one cache kept of the image right after the prompt.

    Attributes:
        title: lines that say which cache.
        layers: for each layer and patch, row by row of the grid, the share of the key heads that kept it.
        stored: for each layer, pairs a head, text included.
    """

    title: tuple[str, ...]
    layers: Sequence[Sequence[float]]
    stored: Sequence[int]


def draw_kept(scene: Image.Image, side: int, maps: Sequence[KeptMap], caption: Sequence[str]) -> Image.Image:
    """Scene and caption on the left, a row of maps for each cache on the right: the sum over layers, then each layer.

    Args:
        scene: the picture the model saw.
        side: patches along one edge; patch i lies in row i // side.
        maps: one for each cache.
        caption: lines below the scene.
    """
    n_layers = len(maps[0].layers)
    left = MARGIN + SCENE + 2 * MARGIN
    width = left + LABEL + (n_layers + 1) * (CELL + GAP) + MARGIN
    row_height = CELL + 20
    height = max(MARGIN + 24 + len(maps) * row_height, MARGIN + SCENE + 20 + 18 * len(caption)) + MARGIN
    page = Image.new("RGB", (width, height), PAPER)
    canvas = ImageDraw.Draw(page)
    page.paste(scene.convert("RGB").resize((SCENE, SCENE), Image.Resampling.NEAREST), (MARGIN, MARGIN + 24))
    canvas.text((MARGIN, MARGIN), "the scene", INK, font=_font(14))
    for number, line in enumerate(caption):
        canvas.text((MARGIN, MARGIN + 24 + SCENE + 12 + 18 * number), line, INK, font=_font(13))
    for column in range(n_layers + 1):
        title = "all layers" if column == 0 else f"layer {column - 1}"
        canvas.text((left + LABEL + column * (CELL + GAP), MARGIN), title, INK, font=_font(13))
    for number, kept in enumerate(maps):
        top = MARGIN + 24 + number * row_height
        for line, text in enumerate(kept.title):
            canvas.text((left, top + 17 * line), text, INK if line == 0 else FAINT, font=_font(13))
        shares = [sum(of_patch) / n_layers for of_patch in zip(*kept.layers, strict=True)]
        page.paste(_shaded(scene, side, shares), (left + LABEL, top))
        for column, patches in enumerate(kept.layers, start=1):
            x = left + LABEL + column * (CELL + GAP)
            page.paste(_shaded(scene, side, patches), (x, top))
            canvas.text((x, top + CELL + 2), f"{kept.stored[column - 1]} pairs", FAINT, font=_font(11))
    return page


def _shaded(scene: Image.Image, side: int, shares: Sequence[float]) -> Image.Image:
    """The scene in a small map: patches at full strength where the share is 1, nearly black where it is 0."""
    small = scene.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)
    strength = Image.new("L", (side, side))
    strength.putdata([round(255 * (0.12 + 0.88 * share)) for share in shares])
    dark = Image.new("RGB", (CELL, CELL), (10, 10, 14))
    return Image.composite(small, dark, strength.resize((CELL, CELL), Image.Resampling.NEAREST))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
