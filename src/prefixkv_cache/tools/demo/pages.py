"""Pages of rendered words with known contents: pictures, readings, questions and their marking.

A page is a picture of 192 x 192 pixels with three to six lines of two or three words each, in Pillow's own font. The
words come from a list of 100 and are all different on one page. They stand in three columns, moved about a little, so
a line may have a gap at its end. Everything follows from an integer seed.

The module has the surface of `scenes`, so that whoever trains or judges a model can treat the two alike:

- `TRAIN_SEEDS`, `VALIDATION_SEEDS`, `TEST_SEEDS`: the splits, as ranges of seeds;
- `draw_page(seed)` (there `draw_scene`): a picture with its truth: `seed`, `image`, and `objects` in reading order;
- `DESCRIBE_PROMPTS`, `describe(page)`: the long task and its right answer;
- `object_accuracy(text, page)`, `wrong_objects(text, page)`: the marking of a free answer to it;
- `QUESTION_KINDS`, `questions(page, seed)`, `answer_matches(text, question)`: the short tasks and their marking.

This module knows Pillow and the standard library only: no tokenizer, no model, no torch.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .scenes import (
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
    "DESCRIBE_PROMPTS",
    "ORDINALS",
    "QUESTION_KINDS",
    "TEST_SEEDS",
    "TRAIN_SEEDS",
    "VALIDATION_SEEDS",
    "WORDS",
    "Page",
    "PageWord",
    "PageWords",
    "Question",
    "answer_matches",
    "describe",
    "draw_page",
    "object_accuracy",
    "parse_description",
    "questions",
    "wrong_objects",
]

IMAGE_SIZE = 192
COLUMNS = 3
LINES = 6  # the most that a page holds
FEWEST_LINES = 3
COLUMN = IMAGE_SIZE // COLUMNS  # pixels
LINE = IMAGE_SIZE // LINES  # pixels
FONT_SIZE = 18
INK_TOP, INK_BOTTOM = 4, 20  # pixels below the place where the font starts: from the ascenders to the base line

_WORDS = (
    "apple arm baby bag ball bank bath bear bed bell bird boat body bone book box boy bread brush bus camp car cat "
    "chain chair child city clock cloud coin corn cup dog door ear egg engine eye face farm field fire fish flag "
    "floor flower foot forest girl gold grass hair hand hat heart hill horse house ice iron key king lake leaf letter "
    "map mask meat milk moon mouse music nail nest night nose paper park pen pig river road rose salt sea ship snow "
    "song star stone sugar sun table town train tree wave wind wolf wood"
)
WORDS = tuple(_WORDS.split())
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

DESCRIBE_PROMPTS = ("read the page.", "what does the page say?", "read all the lines.")
QUESTION_KINDS = ("line", "word", "follows", "before", "place", "column", "exists", "lines")


class PageWords(NamedTuple):
    """One word as a reading gives it: what it is, its line and its place in the line, both from 0."""

    word: str
    line: int
    place: int


@dataclass(frozen=True)
class PageWord:
    """One drawn word: what it is, its line and place in the line (from 0), and its box in pixels, edges included."""

    word: str
    line: int
    place: int
    box: tuple[int, int, int, int]

    @property
    def words(self) -> PageWords:
        return PageWords(self.word, self.line, self.place)


@dataclass(frozen=True)
class Page:
    """A picture and the truth about it; the words, `objects`, are in reading order."""

    seed: int
    image: Image.Image
    lines: tuple[tuple[PageWord, ...], ...]

    @property
    def objects(self) -> tuple[PageWord, ...]:
        return tuple(word for line in self.lines for word in line)


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_page(seed: int, fewest: int = FEWEST_LINES, most: int = LINES) -> Page:
    """Draw the page of a seed, with a number of lines from fewest to most (1 to 6)."""
    if not 1 <= fewest <= most <= LINES:
        raise ValueError(f"a page has 1 to {LINES} lines, got {fewest} to {most}")
    rng = random.Random(seed)
    shade, ink = _between(rng, 205, 243), _between(rng, 5, 60)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), _jittered(rng, (shade, shade, shade), 12))
    canvas = ImageDraw.Draw(image)
    words = _shuffled(rng, WORDS)
    fill = _jittered(rng, (ink, ink, ink), 12)
    lengths = [_between(rng, COLUMNS - 1, COLUMNS) for _ in range(_between(rng, fewest, most))]
    lines = (
        tuple(_draw_word(rng, canvas, words.pop(), line, place, fill) for place in range(length))
        for line, length in enumerate(lengths)
    )
    return Page(seed, image, tuple(lines))


def _draw_word(
    rng: random.Random, canvas: ImageDraw.ImageDraw, word: str, line: int, place: int, fill: tuple[int, int, int]
) -> PageWord:
    """A word in its column, moved to the right and downwards by a few pixels of chance."""
    width = _width(word)
    x = place * COLUMN + _between(rng, 2, max(2, min(6, COLUMN - 2 - width)))
    y = line * LINE + _between(rng, 4, 6)
    canvas.text((x, y), word, fill, font=_font())
    return PageWord(word, line, place, (x, y + INK_TOP, x + width - 1, y + INK_BOTTOM - 1))


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


@cache
def letter_ends(word: str) -> tuple[float, ...]:
    """Pixels from the start of a word to the end of each of its letters."""
    return tuple(_font().getlength(word[: index + 1]) for index in range(len(word)))


def _width(word: str) -> int:
    """Pixels."""
    return round(letter_ends(word)[-1])


# --- readings ---------------------------------------------------------------------------------------------------------


def describe(page: Page) -> str:
    """Read every line of a page: 4 marks and words a line, and its own words."""
    return " ".join(f"line {NUMBERS[number]}: {_text(line)}." for number, line in enumerate(page.lines, 1))


def _text(line: tuple[PageWord, ...]) -> str:
    return " ".join(each.word for each in line)


_WORD = rf"(?:{'|'.join(WORDS)})\b"
_LINE = re.compile(rf"line (?P<line>{'|'.join(NUMBERS[1 : LINES + 1])}) ?: (?P<words>{_WORD}(?: {_WORD})*)")


def parse_description(text: str) -> set[PageWords]:
    """The words a text states in the form of `describe`; whatever else it says is passed over."""
    plain = " ".join(text.lower().split())
    return {
        PageWords(word, NUMBERS.index(match["line"]) - 1, place)
        for match in _LINE.finditer(plain)
        for place, word in enumerate(match["words"].split())
    }


def object_accuracy(text: str, page: Page) -> float:
    """Share of the page's words that the text gives at the right place of the right line."""
    truth = {each.words for each in page.objects}
    return len(truth & parse_description(text)) / len(truth)


def wrong_objects(text: str, page: Page) -> set[PageWords]:
    """What the text states and the page does not show: `object_accuracy` does not count these."""
    return parse_description(text) - {each.words for each in page.objects}


# --- questions --------------------------------------------------------------------------------------------------------


def questions(page: Page, seed: int = 0) -> list[Question]:
    """One question of every kind, in an order of chance; the same page and seed give the same list."""
    rng = random.Random(page.seed * 1_000_003 + seed)
    return _shuffled(rng, [ask(page, rng) for ask in _ASKERS])


def _ask_line(page: Page, rng: random.Random) -> Question:
    line = _pick(rng, page.lines)
    return Question(f"what does the {ORDINALS[line[0].line]} line say?", _text(line), "line")


def _ask_word(page: Page, rng: random.Random) -> Question:
    asked = _pick(rng, page.objects)
    text = f"which word is {ORDINALS[asked.place]} in the {ORDINALS[asked.line]} line?"
    return Question(text, asked.word, "word")


def _ask_follows(page: Page, rng: random.Random) -> Question:
    first, second = _neighbours(page, rng)
    return Question(f"which word follows {first.word}?", second.word, "follows")


def _ask_before(page: Page, rng: random.Random) -> Question:
    first, second = _neighbours(page, rng)
    return Question(f"which word stands before {second.word}?", first.word, "before")


def _neighbours(page: Page, rng: random.Random) -> tuple[PageWord, PageWord]:
    """Two words that follow each other in a line."""
    line = _pick(rng, page.lines)
    place = _between(rng, 0, len(line) - 2)
    return line[place], line[place + 1]


def _ask_place(page: Page, rng: random.Random) -> Question:
    asked = _pick(rng, page.objects)
    return Question(f"which line holds the word {asked.word}?", f"the {ORDINALS[asked.line]}", "place")


def _ask_column(page: Page, rng: random.Random) -> Question:
    place = _between(rng, 0, COLUMNS - 2)
    words = " ".join(line[place].word for line in page.lines)
    return Question(f"read the {ORDINALS[place]} word of every line.", words, "column")


def _ask_exists(page: Page, rng: random.Random) -> Question:
    """Half yes, half no."""
    there = rng.random() < 0.5
    present = {each.word for each in page.objects}
    word = _pick(rng, page.objects).word if there else _pick(rng, [word for word in WORDS if word not in present])
    return Question(f"is the word {word} on the page?", "yes" if there else "no", "exists")


def _ask_lines(page: Page, rng: random.Random) -> Question:
    return Question("how many lines are there?", NUMBERS[len(page.lines)], "lines")


_ASKERS = (
    _ask_line,
    _ask_word,
    _ask_follows,
    _ask_before,
    _ask_place,
    _ask_column,
    _ask_exists,
    _ask_lines,
)
