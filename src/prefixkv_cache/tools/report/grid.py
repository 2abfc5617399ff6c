"""Where on its picture each image token of a prompt lies, by the grid that the processor itself speaks of.

Every family of models cuts pictures in a way of its own. Each way is one small function here: from numbers that the
processor left in its output, the config or the prompt, to *views*, plain grids of tokens over the whole picture. A way
that does not account for every image token of the prompt is not believed, and where none fits, there is no map: a map
that is nearly right would be a lie. Knows nothing of caches, pages or drawing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

Size: TypeAlias = tuple[int, int]
"""Height and width of a picture in pixels."""


@dataclass(frozen=True)
class View:
    """Tokens that lie as a grid over the whole picture.

    Attributes:
        name: which of the picture's views it is; empty where there is one only.
        rows: of the grid.
        columns: of the grid.
        tokens: row by row, the number of each cell's token, counted from the image's first token; in `ImageTokens`,
            its column in the prompt.
    """

    name: str
    rows: int
    columns: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image in a prompt, and where they lie.

    Attributes:
        columns: of the prompt, rising.
        views: none where the model's grid is not known.
    """

    columns: Sequence[int]
    views: Sequence[View]


Layout: TypeAlias = tuple[int, list[View]]
"""How many tokens an image has, and its views, in tokens counted from its first."""


def place_images(
    ids: Sequence[int], columns: Sequence[int], sizes: Sequence[Size], inputs: Any, config: Any, processor: Any
) -> list[ImageTokens] | None:
    """Share the image tokens of a prompt among its pictures, and lay them over them.

    Args:
        ids: the prompt.
        columns: where in it image tokens stand.
        sizes: of the pictures as they were given to the processor.
        inputs: what the processor made of prompt and pictures.
        config: of the model.
        processor: of the model.

    Returns:
        One entry for each picture; or None where it cannot be told which tokens are whose.
    """
    if not columns or not sizes:
        return None
    facts = _Facts(ids, columns, sizes, inputs, config, processor)
    for way in _WAYS:
        layouts = way(facts)
        if layouts and len(layouts) == len(sizes) and sum(n for n, _ in layouts) == len(columns):
            return _shared_out(columns, layouts)
    return [ImageTokens(columns, [])] if len(sizes) == 1 else None


def _shared_out(columns: Sequence[int], layouts: Sequence[Layout]) -> list[ImageTokens]:
    images, start = [], 0
    for n_tokens, views in layouts:
        own = columns[start : start + n_tokens]
        start += n_tokens
        images.append(ImageTokens(own, [replace(view, tokens=[own[i] for i in view.tokens]) for view in views]))
    return images


# Pure layouts.


def plain(rows: int, columns: int, *, start: int = 0, name: str = "") -> View:
    """Tokens from `start` on, row by row."""
    return View(name, rows, columns, range(start, start + rows * columns))


def merged(frames: int, height: int, width: int, merge: int) -> Layout:
    """Qwen2-VL and its kin: patches of a grid, `merge` x `merge` of them in one token, and so for each frame."""
    rows, columns = height // merge, width // merge
    views = [
        plain(rows, columns, start=i * rows * columns, name=f"frame {i + 1}" if frames > 1 else "")
        for i in range(frames)
    ]
    return frames * rows * columns, views


def pooled(height: int, width: int, n_tokens: int) -> Layout | None:
    """A grid of `height` x `width` patches of which k x k became one token; a class token may lead."""
    for k in range(1, math.gcd(height, width) + 1):
        rows, columns = height // k, width // k
        extra = n_tokens - rows * columns
        if height % k == width % k == 0 and extra in (0, 1):
            return n_tokens, [plain(rows, columns, start=extra)]
    return None


def anyres(size: Size, canvas: Size, side: int, max_tiles: int | None = None) -> Layout:
    """LLaVA-NeXT and LLaVA-OneVision: an overview, then the picture in tiles without its padding, a newline each row.

    Args:
        size: of the picture.
        canvas: rows and columns of tiles that the picture was padded to.
        side: tokens along the edge of a tile, and of the overview.
        max_tiles: the detail is shrunk to about so many tiles' worth of tokens (OneVision); None: it is not.
    """
    rows, columns = canvas[0] * side, canvas[1] * side
    if size[1] / size[0] > columns / rows:
        rows -= (rows - int(round(size[0] * (columns / size[1]), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(size[1] * (rows / size[0]), 7))) // 2 * 2
    shrink = 0.0 if max_tiles is None else math.sqrt(rows * columns / (max_tiles * side**2))
    if shrink > 1.1:
        rows, columns = int(rows // shrink), int(columns // shrink)
    base, stride = side * side, columns + 1
    detail = [base + row * stride + column for row in range(rows) for column in range(columns)]
    return base + rows * stride, [View("detail", rows, columns, detail), plain(side, side, name="overview")]


def tiled(places: Sequence[tuple[int, int] | None], n_tokens: int) -> Layout | None:
    """A picture cut into tiles of `n_tokens` each, with an overview before or behind them.

    Args:
        places: row and column of each tile, in the order of the prompt; None for the overview.
        n_tokens: of a tile, a square number.
    """
    side = math.isqrt(n_tokens)
    first = {place: i * n_tokens for i, place in enumerate(places)}
    tiles = [place for place in places if place is not None]
    rows, columns = (max((place[axis] for place in tiles), default=-1) + 1 for axis in (0, 1))
    if side * side != n_tokens or len(first) != len(places) or len(tiles) != rows * columns:
        return None
    views = []
    if tiles:
        cells = ((row, column) for row in range(rows * side) for column in range(columns * side))
        tokens = [first[row // side, column // side] + row % side * side + column % side for row, column in cells]
        views.append(View("tiles" if None in first else "", rows * side, columns * side, tokens))
    if None in first:
        views.append(plain(side, side, start=first[None], name="overview" if tiles else ""))
    return len(places) * n_tokens, views


def closest_grid(n_tiles: int, size: Size) -> tuple[int, int]:
    """Rows and columns of so many square tiles, in the proportion closest to the picture's (InternVL's rule)."""
    pairs = [(rows, n_tiles // rows) for rows in range(1, n_tiles + 1) if n_tiles % rows == 0]
    return min(pairs, key=lambda pair: abs(size[1] / size[0] - pair[1] / pair[0]))


# Which of them a prompt shows.


@dataclass(frozen=True)
class _Facts:
    """What `place_images` was given."""

    ids: Sequence[int]
    columns: Sequence[int]
    sizes: Sequence[Size]
    inputs: Any
    config: Any
    processor: Any

    @property
    def vision(self) -> Any:
        return getattr(self.config, "vision_config", None)

    @property
    def image_processor(self) -> Any:
        return getattr(self.processor, "image_processor", None)

    @property
    def patch(self) -> int | None:
        """Pixels along the edge of a patch."""
        patch = getattr(self.vision, "patch_size", None) or getattr(self.processor, "patch_size", None)
        patch = patch[0] if isinstance(patch, (list, tuple)) and patch else patch
        return patch if isinstance(patch, int) else None


def _by_grid_thw(facts: _Facts) -> list[Layout] | None:
    grids = facts.inputs.get("image_grid_thw")
    merge = getattr(facts.image_processor, "merge_size", None) or getattr(facts.vision, "spatial_merge_size", None)
    if grids is None or not isinstance(merge, int):
        return None
    return [merged(frames, height, width, merge) for frames, height, width in grids.tolist()]


def _by_pinpoints(facts: _Facts) -> list[Layout] | None:
    pinpoints = getattr(facts.config, "image_grid_pinpoints", None)
    tile, patch = getattr(facts.vision, "image_size", None), facts.patch
    if not pinpoints or not isinstance(tile, int) or patch is None:
        return None
    from transformers.image_processing_utils import select_best_resolution

    side = tile // patch
    limit = re.fullmatch(r"anyres_max_(\d+)", str(getattr(facts.config, "vision_aspect_ratio", "")))
    if len(facts.columns) == len(facts.sizes) * (side * side + 1):  # overviews only, a newline after each
        return [(side * side + 1, [plain(side, side)])] * len(facts.sizes)
    layouts = []
    for size in facts.sizes:
        height, width = select_best_resolution(size, pinpoints)
        canvas = (height // tile, width // tile)
        layouts.append(anyres(size, canvas, side, int(limit[1]) if limit else None))
    return layouts


def _by_image_sizes(facts: _Facts) -> list[Layout] | None:
    """Pixtral and Mistral 3: the picture's own proportions, a row of the grid ending in a token of another kind."""
    sizes = facts.inputs.get("image_sizes")
    if sizes is None or facts.patch is None:
        return None
    edge = facts.patch * (getattr(facts.config, "spatial_merge_size", None) or 1)
    grids = [(int(height) // edge, int(width) // edge) for height, width in sizes]
    return [(rows * columns, [plain(rows, columns)]) for rows, columns in grids]


def _by_names_of_tiles(facts: _Facts) -> list[Layout] | None:
    """Idefics3, SmolVLM, LFM2-VL: a token such as <row_1_col_2> before each tile, and another before the overview."""
    tokenizer = getattr(facts.processor, "tokenizer", None)
    starts = [i for i, column in enumerate(facts.columns) if i == 0 or facts.columns[i - 1] != column - 1]
    lengths = {end - start for start, end in zip(starts, [*starts[1:], len(facts.columns)], strict=True)}
    if tokenizer is None or len(lengths) != 1:
        return None
    before = tokenizer.convert_ids_to_tokens([facts.ids[max(facts.columns[start] - 1, 0)] for start in starts])
    named = [re.search(r"row_(\d+)_col_(\d+)", token or "") for token in before]
    if not any(named):
        return None
    images: list[list[tuple[int, int] | None]] = []
    for name in named:
        place = (int(name[1]) - 1, int(name[2]) - 1) if name else None
        if place == (0, 0) or not images or images[-1][-1] is None:
            images.append([])
        images[-1].append(place)
    layouts = [tiled(places, next(iter(lengths))) for places in images]
    return None if None in layouts else [layout for layout in layouts if layout is not None]


def _by_pixels(facts: _Facts) -> list[Layout] | None:
    """LLaVA, Gemma 3, PaliGemma, ...: one square or rectangle of pixels a picture, cut into patches."""
    pixels = facts.inputs.get("pixel_values")
    if pixels is None or pixels.ndim != 4 or len(pixels) != len(facts.sizes) or facts.patch is None:
        return None
    height, width = (int(edge) // facts.patch for edge in pixels.shape[-2:])
    layout = pooled(height, width, len(facts.columns) // len(facts.sizes)) if height and width else None
    return None if layout is None else [layout] * len(facts.sizes)


def _by_counted_tiles(facts: _Facts) -> list[Layout] | None:
    """InternVL, GOT-OCR2, Aya Vision, ...: tiles row by row and then an overview, all squares of the same size."""
    pixels = facts.inputs.get("pixel_values")
    count = getattr(facts.image_processor, "get_number_of_image_patches", None)
    if pixels is None or pixels.ndim != 4 or count is None:
        return None
    layouts = []
    for size in facts.sizes:
        n_tiles = count(*size, {"crop_to_patches": True})
        rows, columns = closest_grid(max(n_tiles - 1, 1), size)
        tiles = [(row, column) for row in range(rows) for column in range(columns)] if n_tiles > 1 else []
        layouts.append(tiled([*tiles, None], len(facts.columns) // len(pixels)))
    return None if None in layouts else [layout for layout in layouts if layout is not None]


_WAYS: tuple[Callable[[_Facts], list[Layout] | None], ...] = (
    _by_grid_thw,
    _by_pinpoints,
    _by_image_sizes,
    _by_names_of_tiles,
    _by_pixels,
    _by_counted_tiles,
)
