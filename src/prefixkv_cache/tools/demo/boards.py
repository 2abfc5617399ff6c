"""Boards of numbered tiles with known contents: pictures, readings, questions and their marking.

A board is a grid of tiles, each of one of eight colours with one digit drawn from straight strokes. The grid has three
to five rows and columns (twenty tiles at most), and the picture is as large as its grid, so pictures differ in size and
shape. Beside each row and above each column run as many lines as its number says. Everything follows from an integer
seed.

The module has the surface of `scenes`, so that whoever trains or judges a model can treat the two alike:

- `TRAIN_SEEDS`, `VALIDATION_SEEDS`, `TEST_SEEDS`: the splits, as ranges of seeds;
- `draw_board(seed)` (there `draw_scene`): a picture with its truth: `seed`, `image`, and `objects` in reading order;
- `DESCRIBE_PROMPTS`, `describe(board)`: the long task and its right answer;
- `object_accuracy(text, board)`, `wrong_objects(text, board)`: the marking of a free answer to it;
- `QUESTION_KINDS`, `questions(board, seed)`, `answer_matches(text, question)`: the short tasks and their marking.

This module knows Pillow and the standard library only: no tokenizer, no model, no torch.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

from .scenes import (
    COLOURS,
    NUMBERS,
    TEST_SEEDS,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    Question,
    _between,
    _jittered,
    _pick,
    _shuffled,
    answer_matches,
)

__all__ = [
    "COLOURS",
    "DESCRIBE_PROMPTS",
    "DIGITS",
    "GRIDS",
    "QUESTION_KINDS",
    "TEST_SEEDS",
    "TRAIN_SEEDS",
    "VALIDATION_SEEDS",
    "Board",
    "Question",
    "Tile",
    "TileWords",
    "answer_matches",
    "describe",
    "draw_board",
    "object_accuracy",
    "parse_description",
    "questions",
    "wrong_objects",
]

CELL = 36  # pixels along the edge of a cell
MARGIN = 12  # pixels of the strips with the lines, to the left of the grid and above it
FEWEST, MOST = 2, 5  # rows or columns that can be drawn
GRIDS = tuple((rows, columns) for rows in (3, 4, 5) for columns in (3, 4, 5) if rows * columns <= 20)
DIGITS = NUMBERS  # "zero" to "nine"

DESCRIBE_PROMPTS = ("read the board.", "what is on the board?", "read all the tiles.")
QUESTION_KINDS = ("tile", "colour", "digit", "row", "column", "colour by digit", "digit by colour")

# The strokes of a digit between six points: left and right, at the top, in the middle and at the bottom.
_POINTS = {"a": (0, 0), "b": (1, 0), "c": (0, 1), "d": (1, 1), "e": (0, 2), "f": (1, 2)}
_STROKES = {
    "zero": "ab bf fe ea",
    "one": "bf",
    "two": "ab bd dc ce ef",
    "three": "ab bf fe cd",
    "four": "ac cd bf",
    "five": "ba ac cd df fe",
    "six": "ba ae ef fd dc",
    "seven": "ab be",
    "eight": "ab bf fe ea cd",
    "nine": "dc ca ab bf",
}


class TileWords(NamedTuple):
    """One tile as a reading gives it: its words, and its row and column from 0."""

    colour: str
    digit: str
    row: int
    column: int


@dataclass(frozen=True)
class Tile:
    """One tile: its words, its cell (row and column from 0), and its box in pixels, edges included."""

    colour: str
    digit: str
    row: int
    column: int
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.digit}"

    @property
    def place(self) -> str:
        return f"row {NUMBERS[self.row + 1]} column {NUMBERS[self.column + 1]}"

    @property
    def words(self) -> TileWords:
        return TileWords(self.colour, self.digit, self.row, self.column)


@dataclass(frozen=True)
class Board:
    """A picture and the truth about it; the tiles, `objects`, are in reading order."""

    seed: int
    image: Image.Image
    rows: int
    columns: int
    objects: tuple[Tile, ...]

    def row(self, row: int) -> tuple[Tile, ...]:
        return tuple(tile for tile in self.objects if tile.row == row)

    def column(self, column: int) -> tuple[Tile, ...]:
        return tuple(tile for tile in self.objects if tile.column == column)


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_board(seed: int, grid: tuple[int, int] | None = None) -> Board:
    """Draw the board of a seed, with a grid of chance among GRIDS or one of this many rows and columns (2 to 5)."""
    rng = random.Random(seed)
    chosen = _pick(rng, GRIDS)
    rows, columns = grid or chosen
    if not (FEWEST <= rows <= MOST and FEWEST <= columns <= MOST):
        raise ValueError(f"a board has {FEWEST} to {MOST} rows and columns, got {rows} and {columns}")
    shade = _between(rng, 5, 75)
    size = (MARGIN + columns * CELL, MARGIN + rows * CELL)
    image = Image.new("RGB", size, _jittered(rng, (shade, shade, shade), 12))
    canvas = ImageDraw.Draw(image)
    _draw_lines(canvas, rows, columns)
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    return Board(seed, image, rows, columns, tuple(_draw_tile(rng, canvas, row, column) for row, column in cells))


def _draw_lines(canvas: ImageDraw.ImageDraw, rows: int, columns: int) -> None:
    """One line for the first row and column, two for the second, and so on."""
    ink = (225, 225, 225)
    for row in range(rows):
        top = MARGIN + row * CELL
        for line in range(row + 1):
            canvas.line((1 + 2 * line, top + 1, 1 + 2 * line, top + CELL - 2), fill=ink)
    for column in range(columns):
        left = MARGIN + column * CELL
        for line in range(column + 1):
            canvas.line((left + 1, 1 + 2 * line, left + CELL - 2, 1 + 2 * line), fill=ink)


def _draw_tile(rng: random.Random, canvas: ImageDraw.ImageDraw, row: int, column: int) -> Tile:
    """A coloured square with a dark digit on it, moved about and of varying size and thickness."""
    colour, digit = _pick(rng, tuple(COLOURS)), _pick(rng, DIGITS)
    left, top = MARGIN + column * CELL + 1, MARGIN + row * CELL + 1
    box = (left, top, left + CELL - 3, top + CELL - 3)
    canvas.rectangle(box, fill=_jittered(rng, COLOURS[colour], 12))
    width, height, thick = _between(rng, 13, 16), _between(rng, 21, 25), _between(rng, 3, 4)
    x = left + (CELL - 2 - width) // 2 + _between(rng, -2, 2)
    y = top + (CELL - 2 - height) // 2 + _between(rng, -2, 2)
    shade = _between(rng, 5, 30)
    for start, end in _STROKES[digit].split():
        ends = [(x + right * width, y + down * height // 2) for right, down in (_POINTS[start], _POINTS[end])]
        canvas.line(ends, fill=(shade, shade, shade), width=thick)
    return Tile(colour, digit, row, column, box)


# --- readings ---------------------------------------------------------------------------------------------------------


def describe(board: Board) -> str:
    """Read every tile of a board, row by row: 3 words and marks a tile, 3 a row, and 9 at the start."""
    opening = f"the board has {NUMBERS[board.rows]} rows and {NUMBERS[board.columns]} columns."
    rows = (f"row {NUMBERS[row + 1]} reads {_names(board.row(row))}." for row in range(board.rows))
    return " ".join([opening, *rows])


def _names(tiles: tuple[Tile, ...]) -> str:
    return ", ".join(tile.name for tile in tiles)


_TILE = rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(DIGITS)})"
_ROW = re.compile(rf"row (?P<row>{'|'.join(NUMBERS[1 : MOST + 1])}) reads (?P<tiles>{_TILE}(?: ?, {_TILE})*)\b")


def parse_description(text: str) -> set[TileWords]:
    """The tiles a text states in the words of `describe`; whatever else it says is passed over."""
    plain = " ".join(text.lower().split())
    return {
        TileWords(*name.split(), row=NUMBERS.index(match["row"]) - 1, column=column)
        for match in _ROW.finditer(plain)
        for column, name in enumerate(re.split(" ?, ", match["tiles"]))
    }


def object_accuracy(text: str, board: Board) -> float:
    """Share of the board's tiles that the text gives with the right colour and digit, at the right place."""
    truth = {tile.words for tile in board.objects}
    return len(truth & parse_description(text)) / len(truth)


def wrong_objects(text: str, board: Board) -> set[TileWords]:
    """What the text states and the board does not show: `object_accuracy` does not count these."""
    return parse_description(text) - {tile.words for tile in board.objects}


# --- questions --------------------------------------------------------------------------------------------------------


def questions(board: Board, seed: int = 0) -> list[Question]:
    """Up to one question of every kind, in an order of chance; the same board and seed give the same list.

    A kind is left out where the board gives it no unambiguous question (no digit, say, that is there just once).
    """
    rng = random.Random(board.seed * 1_000_003 + seed)
    asked = (ask(board, rng) for ask in _ASKERS)
    return _shuffled(rng, [question for question in asked if question is not None])


def _ask_tile(board: Board, rng: random.Random) -> Question:
    tile = _pick(rng, board.objects)
    return Question(f"what is in {tile.place}?", tile.name, "tile")


def _ask_colour(board: Board, rng: random.Random) -> Question:
    tile = _pick(rng, board.objects)
    return Question(f"what colour is {tile.place}?", tile.colour, "colour")


def _ask_digit(board: Board, rng: random.Random) -> Question:
    tile = _pick(rng, board.objects)
    return Question(f"which digit is in {tile.place}?", tile.digit, "digit")


def _ask_row(board: Board, rng: random.Random) -> Question:
    row = _between(rng, 0, board.rows - 1)
    return Question(f"read row {NUMBERS[row + 1]}.", _names(board.row(row)), "row")


def _ask_column(board: Board, rng: random.Random) -> Question:
    column = _between(rng, 0, board.columns - 1)
    return Question(f"read column {NUMBERS[column + 1]}.", _names(board.column(column)), "column")


def _unique(board: Board, key: Callable[[Tile], str]) -> list[Tile]:
    """The tiles that no other tile equals in this."""
    counts = Counter(map(key, board.objects))
    return [tile for tile in board.objects if counts[key(tile)] == 1]


def _ask_colour_by_digit(board: Board, rng: random.Random) -> Question | None:
    choices = _unique(board, lambda tile: tile.digit)
    if not choices:
        return None
    tile = _pick(rng, choices)
    return Question(f"what colour is the tile of the {tile.digit}?", tile.colour, "colour by digit")


def _ask_digit_by_colour(board: Board, rng: random.Random) -> Question | None:
    choices = _unique(board, lambda tile: tile.colour)
    if not choices:
        return None
    tile = _pick(rng, choices)
    return Question(f"which digit is on the {tile.colour} tile?", tile.digit, "digit by colour")


_ASKERS = (
    _ask_tile,
    _ask_colour,
    _ask_digit,
    _ask_row,
    _ask_column,
    _ask_colour_by_digit,
    _ask_digit_by_colour,
)
