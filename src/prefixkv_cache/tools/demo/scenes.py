"""Drawn scenes with known contents: pictures, descriptions, questions and their marking.

A scene is a 96 x 96 picture of a 3 x 3 grid in which some cells hold one object each: a shape of a colour and a size,
moved about inside its cell. Everything follows from an integer seed, so a split is a range of seeds and no file of
data is needed. The truth about a scene is known exactly, so answers of a model are marked without a judge.

This module knows Pillow and the standard library only: no tokenizer, no model, no torch.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from PIL import Image, ImageDraw

T = TypeVar("T")

IMAGE_SIZE = 96
GRID = 3
CELL = IMAGE_SIZE // GRID

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {
    "red": (215, 45, 45),
    "orange": (240, 140, 30),
    "yellow": (245, 228, 60),
    "green": (45, 165, 65),
    "cyan": (60, 205, 215),
    "blue": (50, 85, 225),
    "purple": (150, 65, 190),
    "white": (240, 240, 240),
}
RADII = {"small": (5, 6), "large": (10, 12)}  # pixels, lowest and highest
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NEIGHBOURS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # row step, column step

DESCRIBE_PROMPTS = ("describe the scene.", "describe the picture in detail.", "what does the picture show?")
QUESTION_KINDS = ("colour", "colour by shape", "object", "count", "place", "neighbour", "exists", "size")

# A split is a range of seeds. Training stays in the first, choices are made on the second, figures come from the third.
TRAIN_SEEDS = range(0, 1_000_000_000)
VALIDATION_SEEDS = range(1_000_000_000, 1_001_000_000)
TEST_SEEDS = range(2_000_000_000, 2_001_000_000)


class ObjectWords(NamedTuple):
    """One object as a description names it."""

    size: str
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: its words, its cell (row and column from 0), and its box in pixels, edges included."""

    size: str
    colour: str
    shape: str
    row: int
    column: int
    box: tuple[int, int, int, int]

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def name(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def words(self) -> ObjectWords:
        return ObjectWords(self.size, self.colour, self.shape, self.place)


@dataclass(frozen=True)
class Scene:
    """A picture and the truth about it; the objects are in reading order."""

    seed: int
    image: Image.Image
    objects: tuple[SceneObject, ...]

    def at(self, row: int, column: int) -> SceneObject | None:
        """The object in a cell, or None where the cell is empty or outside the grid."""
        return next((thing for thing in self.objects if (thing.row, thing.column) == (row, column)), None)


class Question(NamedTuple):
    """A question about a scene, its one right answer, and which of QUESTION_KINDS it is."""

    text: str
    answer: str
    kind: str


# --- chance -----------------------------------------------------------------------------------------------------------
# Only random() is promised to give the same sequence in every Python version, so nothing else of Random is used.


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def _between(rng: random.Random, low: int, high: int) -> int:
    """An integer from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(len(left))]


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_scene(seed: int, min_objects: int = 4, max_objects: int = 7) -> Scene:
    """Draw the scene of a seed, with a number of objects from min_objects to max_objects (1 to 9)."""
    if not 1 <= min_objects <= max_objects <= GRID * GRID:
        raise ValueError(f"a scene holds 1 to {GRID * GRID} objects, got {min_objects} to {max_objects}")
    rng = random.Random(seed)
    cells = _shuffled(rng, [(row, column) for row in range(GRID) for column in range(GRID)])
    shade = _between(rng, 5, 75)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), _jittered(rng, (shade, shade, shade), 12))
    canvas = ImageDraw.Draw(image)
    chosen = sorted(cells[: _between(rng, min_objects, max_objects)])
    return Scene(seed, image, tuple(_draw_object(rng, canvas, row, column) for row, column in chosen))


def _draw_object(rng: random.Random, canvas: ImageDraw.ImageDraw, row: int, column: int) -> SceneObject:
    size, colour, shape = _pick(rng, tuple(RADII)), _pick(rng, tuple(COLOURS)), _pick(rng, SHAPES)
    radius = _between(rng, *RADII[size])
    slack = min(CELL // 2 - 1 - radius, 5)  # what keeps the object inside its own cell
    x = column * CELL + CELL // 2 + _between(rng, -slack, slack)
    y = row * CELL + CELL // 2 + _between(rng, -slack, slack)
    _DRAWERS[shape](canvas, x, y, radius, _jittered(rng, COLOURS[colour], 12))
    return SceneObject(size, colour, shape, row, column, (x - radius, y - radius, x + radius, y + radius))


def _jittered(rng: random.Random, rgb: tuple[int, int, int], reach: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + _between(rng, -reach, reach))) for value in rgb)
    return red, green, blue


def _circle(canvas: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _ring(canvas: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    canvas.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, r // 3))


def _square(canvas: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    canvas.rectangle((x - r, y - r, x + r, y + r), fill=fill)


def _triangle(canvas: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    canvas.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)


def _diamond(canvas: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    canvas.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=fill)


def _cross(canvas: ImageDraw.ImageDraw, x: int, y: int, r: int, fill: tuple[int, int, int]) -> None:
    arm = max(1, r // 4)
    canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
    canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


_DRAWERS = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}


# --- descriptions -----------------------------------------------------------------------------------------------------


def describe(scene: Scene) -> str:
    """Name every object of a scene in reading order: 11 words and marks each, and 6 at the start."""
    count = len(scene.objects)
    opening = f"the scene shows {NUMBERS[count]} object{'s' if count > 1 else ''}."
    return " ".join([opening, *(f"at the {thing.place} there is a {thing.name}." for thing in scene.objects)])


_STATEMENT = re.compile(
    rf"at the (?P<place>(?:{'|'.join(ROWS)}) (?:{'|'.join(COLUMNS)})) there is a "
    rf"(?P<size>{'|'.join(RADII)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})\b"
)


def parse_description(text: str) -> set[ObjectWords]:
    """The objects a text states in the words of `describe`; whatever else it says is passed over."""
    plain = " ".join(text.lower().split())
    return {ObjectWords(m["size"], m["colour"], m["shape"], m["place"]) for m in _STATEMENT.finditer(plain)}


def object_accuracy(text: str, scene: Scene) -> float:
    """Share of the scene's objects that the text gives with the right size, colour, shape and place."""
    truth = {thing.words for thing in scene.objects}
    return len(truth & parse_description(text)) / len(truth)


def wrong_objects(text: str, scene: Scene) -> set[ObjectWords]:
    """What the text states and the scene does not hold: `object_accuracy` does not count these."""
    return parse_description(text) - {thing.words for thing in scene.objects}


# --- questions --------------------------------------------------------------------------------------------------------


def questions(scene: Scene, seed: int = 0) -> list[Question]:
    """Up to one question of every kind, in an order of chance; the same scene and seed give the same list.

    A kind is left out where the scene gives it no unambiguous question (no shape, say, that is there just once).
    """
    rng = random.Random(scene.seed * 1_000_003 + seed)
    asked = (ask(scene, rng) for ask in _ASKERS)
    return _shuffled(rng, [question for question in asked if question is not None])


def answer_matches(text: str, question: Question) -> bool:
    """Exact match, but for case, spaces and a full stop at the end."""
    return " ".join(text.lower().split()).rstrip(" .") == question.answer


def _named(thing: SceneObject | None) -> str:
    return f"a {thing.name}" if thing else "nothing"


def _unique(scene: Scene, *fields: str) -> list[SceneObject]:
    """The objects that no other object equals in these fields."""

    def key(thing: SceneObject) -> tuple[str, ...]:
        return tuple(getattr(thing, field) for field in fields)

    counts = Counter(key(thing) for thing in scene.objects)
    return [thing for thing in scene.objects if counts[key(thing)] == 1]


def _ask_colour(scene: Scene, rng: random.Random) -> Question:
    thing = _pick(rng, scene.objects)
    return Question(f"what colour is the {thing.shape} at the {thing.place}?", thing.colour, "colour")


def _ask_colour_by_shape(scene: Scene, rng: random.Random) -> Question | None:
    choices = _unique(scene, "shape")
    if not choices:
        return None
    thing = _pick(rng, choices)
    return Question(f"what colour is the {thing.shape}?", thing.colour, "colour by shape")


def _ask_object(scene: Scene, rng: random.Random) -> Question:
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    wanted = rng.random() < 0.75  # an object three times in four, an empty cell else
    fitting = [cell for cell in cells if (scene.at(*cell) is not None) == wanted] or cells
    row, column = _pick(rng, fitting)
    return Question(f"what is at the {ROWS[row]} {COLUMNS[column]}?", _named(scene.at(row, column)), "object")


def _ask_count(scene: Scene, rng: random.Random) -> Question:
    field = _pick(rng, ("shape", "shape", "colour", "colour", "any"))
    if field == "any":
        return Question("how many objects are there?", NUMBERS[len(scene.objects)], "count")
    present = [getattr(thing, field) for thing in scene.objects]
    every = SHAPES if field == "shape" else tuple(COLOURS)
    value = _pick(rng, present) if rng.random() < 0.75 else _pick(rng, every)
    noun = {"cross": "crosses"}.get(value, f"{value}s") if field == "shape" else f"{value} objects"
    return Question(f"how many {noun} are there?", NUMBERS[present.count(value)], "count")


def _ask_place(scene: Scene, rng: random.Random) -> Question | None:
    choices = _unique(scene, "size", "colour", "shape")
    if not choices:
        return None
    thing = _pick(rng, choices)
    return Question(f"where is the {thing.name}?", f"at the {thing.place}", "place")


def _ask_neighbour(scene: Scene, rng: random.Random) -> Question | None:
    pairs = [(thing, side) for thing in _unique(scene, "size", "colour", "shape") for side in NEIGHBOURS]
    if not pairs:
        return None
    wanted = rng.random() < 0.75
    beside = {
        pair: scene.at(pair[0].row + NEIGHBOURS[pair[1]][0], pair[0].column + NEIGHBOURS[pair[1]][1]) for pair in pairs
    }
    thing, side = _pick(rng, [pair for pair in pairs if (beside[pair] is not None) == wanted] or pairs)
    return Question(f"what is {side} the {thing.name}?", _named(beside[thing, side]), "neighbour")


def _ask_exists(scene: Scene, rng: random.Random) -> Question:
    """Half yes, half no; a no changes one word of an object that is there, so that both words must be looked up."""
    thing = _pick(rng, scene.objects)
    colour, shape = thing.colour, thing.shape
    if rng.random() < 0.5:
        present = {(other.colour, other.shape) for other in scene.objects}
        pairs = [(other, shape) for other in COLOURS] if rng.random() < 0.5 else [(colour, other) for other in SHAPES]
        colour, shape = _pick(rng, [pair for pair in pairs if pair not in present] or [(colour, shape)])
    there = any((other.colour, other.shape) == (colour, shape) for other in scene.objects)
    article = "an" if colour == "orange" else "a"
    return Question(f"is there {article} {colour} {shape}?", "yes" if there else "no", "exists")


def _ask_size(scene: Scene, rng: random.Random) -> Question | None:
    choices = _unique(scene, "colour", "shape")
    if not choices:
        return None
    thing = _pick(rng, choices)
    return Question(f"is the {thing.colour} {thing.shape} small or large?", thing.size, "size")


_ASKERS = (
    _ask_colour,
    _ask_colour_by_shape,
    _ask_object,
    _ask_count,
    _ask_place,
    _ask_neighbour,
    _ask_exists,
    _ask_size,
)
