"""What the model learns to read, and what its image tokens shall be like: scenes, and pages of words.

Extends the tasks of `scene_vlm` by pages, and by `Meaning`: words that say what an image token lies on, whose
embeddings the projector is taught to imitate before the language model sees any of it.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor

from prefixkv_cache.tools.demo import pages, scenes
from scene_vlm.tasks import Scenes, Task

SIDE = 12  # image tokens along an edge
NEIGHBOURS = ((0, -1), (0, 1), (-1, 0), (1, 0))  # left, right, above, below, as (row, column) steps


class ReadScenes(Scenes):
    """The scenes as they are; each image token also says what lies in the four cells around its own.

    Truths: size, colour, shape, cell; then for each neighbour 0, or 1 + its number among all colours and shapes.
    """

    kinds = len(scenes.COLOURS) * len(scenes.SHAPES) + 1
    patch_classes = (*Scenes.patch_classes, *[kinds] * 4)

    def patch_truths(self, picture: Any) -> Tensor:
        own = super().patch_truths(picture)
        beside = torch.zeros(SIDE, SIDE, 4, dtype=torch.long)
        cell = SIDE // scenes.GRID
        for row in range(scenes.GRID):
            for column in range(scenes.GRID):
                for way, (down, right) in enumerate(NEIGHBOURS):
                    thing = picture.at(row + down, column + right)
                    place = (slice(row * cell, (row + 1) * cell), slice(column * cell, (column + 1) * cell), way)
                    beside[place] = 0 if thing is None else 1 + self.number(thing)
        beside = beside.flatten(0, 1) * (own[:, :1] > 0)
        return torch.cat([own, beside], dim=1)

    def number(self, thing: Any) -> int:
        return list(scenes.COLOURS).index(thing.colour) * len(scenes.SHAPES) + scenes.SHAPES.index(thing.shape)

    def meanings(self) -> list[tuple[int, float, tuple[str, ...]]]:
        """(truth, weight, the word of each of its values); the empty word adds nothing."""
        rows = tuple(row for row in scenes.ROWS for _ in scenes.COLUMNS)
        return [
            (0, 0.4, ("", *scenes.RADII)),
            (1, 0.6, ("", *scenes.COLOURS)),
            (2, 0.6, ("", *scenes.SHAPES)),
            (3, 0.1, rows),
            (3, 0.1, scenes.COLUMNS * scenes.GRID),
        ]


class ReadPages(Task):
    """Pages: each image token says which word it lies on, its line and place, and the words to its left and right.

    Two more truths are the letters in its left and its right half: without them, words of two dozen strokes were not
    told apart for hundreds of steps.
    """

    module = pages
    token_pixels = pages.IMAGE_SIZE // SIDE
    letters = " " + string.ascii_lowercase
    patch_classes = (
        len(pages.WORDS) + 1,
        pages.LINES,
        pages.COLUMNS,
        *[len(pages.WORDS) + 1] * 2,
        *[len(letters)] * 2,
    )

    def draw(self, seed: int, level: Any = None) -> pages.Page:
        return pages.draw_page(seed, *level) if level else pages.draw_page(seed)

    def patch_truths(self, picture: Any) -> Tensor:
        """A token lies on a word if at least two fifths of its square do."""
        truths = torch.zeros(SIDE, SIDE, len(self.patch_classes), dtype=torch.long)
        truths[..., 1] = torch.arange(SIDE)[:, None] * pages.LINES // SIDE
        truths[..., 2] = torch.arange(SIDE) * pages.COLUMNS // SIDE
        for line in picture.lines:
            codes = [0, *(1 + pages.WORDS.index(each.word) for each in line), 0]
            for place, each in enumerate(line):
                left, top, right, bottom = each.box
                across = self.overlap(left, right + 1)
                down = self.overlap(top, bottom + 1)
                on = (down[:, None] * across >= 0.4).nonzero()
                values = torch.tensor([codes[place + 1], each.line, place, codes[place], codes[place + 2]])
                truths[on[:, 0], on[:, 1], :5] = values
                inked = (down >= 0.4).nonzero()[:, 0]
                for half, letters in enumerate(self.letters_of(each)):
                    seen = letters.nonzero()[:, 0]
                    truths[inked[:, None], seen, 5 + half] = letters[seen]
        return truths.flatten(0, 1)

    def letters_of(self, each: pages.PageWord) -> Tensor:
        """[2, SIDE]: the letters of a word at the first and third quarter of each token's edge, 0 beside the word."""
        ends = torch.tensor(pages.letter_ends(each.word))
        at = torch.arange(SIDE) * self.token_pixels + torch.tensor([[0.25], [0.75]]) * self.token_pixels - each.box[0]
        codes = torch.tensor([*map(self.letters.index, each.word), 0])
        return codes[torch.bucketize(at, ends)] * (at >= 0)

    def overlap(self, start: int, end: int) -> Tensor:
        """[SIDE]: which share of each token's edge lies between two pixels."""
        edges = torch.arange(SIDE) * self.token_pixels
        return ((edges + self.token_pixels).clamp(max=end) - edges.clamp(min=start)).clamp(min=0) / self.token_pixels

    def meanings(self) -> list[tuple[int, float, tuple[str, ...]]]:
        return [
            (0, 1.0, ("", *pages.WORDS)),
            (1, 0.1, pages.ORDINALS),
            (2, 0.1, pages.ORDINALS[: pages.COLUMNS]),
        ]


class Meaning:
    """The embedding that an image token should have: that of the words that say what it lies on.

    Each word counts by its difference from the mean embedding. A token on nothing is a line break, and places count
    little: the untrained language model then copies words from the picture. With the mean embedding in place of line
    breaks, or with places at half the strength of words, it reads nothing, and did not learn to in 180 steps.
    """

    def __init__(self, task: Any, tokenizer: Any, embeddings: Tensor) -> None:
        self.mean = embeddings.mean(0)
        self.blank = embeddings[tokenizer("\n", add_special_tokens=False)["input_ids"]].mean(0)
        self.tables = [
            (index, weight * torch.stack([self.word(tokenizer, embeddings, word) for word in words]))
            for index, weight, words in task.meanings()
        ]

    def word(self, tokenizer: Any, embeddings: Tensor, word: str) -> Tensor:
        """[hidden]: a word behind a space, as text has it; a word of several tokens is their mean."""
        if not word:
            return torch.zeros_like(self.mean)
        return embeddings[tokenizer(f" {word}", add_special_tokens=False)["input_ids"]].mean(0) - self.mean

    def __call__(self, truths: Tensor) -> Tensor:
        """[..., truths] -> [..., hidden]."""
        base = torch.where(truths[..., :1] > 0, self.mean, self.blank)
        return base + sum(table[truths[..., index]] for index, table in self.tables)


TASKS = {"scenes": ReadScenes, "pages": ReadPages}
