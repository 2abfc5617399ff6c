"""What the model learns to read, and what its image tokens shall say: scenes, and pages of words.

Extends the tasks of `scene_vlm` by pages, and by `said`: each cell of a picture is written into its image tokens, a
word a token. The projector is taught to imitate the embeddings of these words (`Meaning`), so that a language model
that has read text only finds something like text.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefixkv_cache.tools.demo import pages, scenes
from scene_vlm.tasks import Scenes, Task

SIDE = 12  # image tokens along an edge


class ReadScenes(Scenes):
    """The scenes as they are."""

    sayings = (
        "",
        *(f"{row} {column}" for row in scenes.ROWS for column in scenes.COLUMNS),
        *scenes.RADII,
        *scenes.COLOURS,
        *scenes.SHAPES,
    )

    def said(self, picture: Any) -> Tensor:
        """[image tokens]: along the middle of each cell its place, then size, colour and shape of what lies there."""
        codes = torch.zeros(SIDE, SIDE, dtype=torch.long)
        cell = SIDE // scenes.GRID
        for row, place in enumerate(scenes.ROWS):
            for column, side in enumerate(scenes.COLUMNS):
                thing = picture.at(row, column)
                words = [f"{place} {side}", *([thing.size, thing.colour, thing.shape] if thing else [])]
                for index, word in enumerate(words):
                    codes[row * cell + cell // 2 - 1, column * cell + index] = self.sayings.index(word)
        return codes.flatten()


class ReadPages(Task):
    """Pages: each image token lies on a word, in a line, at a place in it, and on letters.

    The last two truths are the letters in its left and its right half: without them, words of two dozen strokes were
    not told apart for hundreds of steps.
    """

    module = pages
    token_pixels = pages.IMAGE_SIZE // SIDE
    letters = " " + string.ascii_lowercase
    patch_classes = (
        len(pages.WORDS) + 1,
        pages.LINES,
        pages.COLUMNS,
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
            for place, each in enumerate(line):
                left, top, right, bottom = each.box
                across = self.overlap(left, right + 1)
                down = self.overlap(top, bottom + 1)
                on = (down[:, None] * across >= 0.4).nonzero()
                truths[on[:, 0], on[:, 1], :3] = torch.tensor([1 + pages.WORDS.index(each.word), each.line, place])
                inked = (down >= 0.4).nonzero()[:, 0]
                for half, letters in enumerate(self.letters_of(each)):
                    seen = letters.nonzero()[:, 0]
                    truths[inked[:, None], seen, 3 + half] = letters[seen]
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

    sayings = (
        "",
        *(f"{number} {ordinal}" for number, ordinal in zip(scenes.NUMBERS[1:], pages.ORDINALS, strict=False)),
        *pages.ORDINALS[: pages.COLUMNS],
        *pages.WORDS,
    )

    def said(self, picture: Any) -> Tensor:
        """[image tokens]: along the upper half of each line, for each word its line, its place, and the word."""
        codes = torch.zeros(SIDE, SIDE, dtype=torch.long)
        for each in picture.objects:
            place = pages.ORDINALS[each.place]
            words = (f"{scenes.NUMBERS[1 + each.line]} {pages.ORDINALS[each.line]}", place, each.word)
            for index, word in enumerate(words):
                spot = each.line * SIDE // pages.LINES, each.place * SIDE // pages.COLUMNS + index
                codes[spot] = self.sayings.index(word)
        return codes.flatten()


class Meaning:
    """The embedding that an image token should have: that of what it says.

    A saying of several words is their mean, moved as far from the mean embedding as one word is; a token that says
    nothing is a line break. What was tried before: all image tokens on an object the same, its words and its place
    summed up. The untrained language model copies words from that, but did not learn to look anything up in 340 steps:
    what follows a word is the same word again.
    """

    def __init__(self, sayings: Sequence[str], tokenizer: Any, embeddings: Tensor) -> None:
        self.mean = embeddings.mean(0)

        def row(saying: str) -> Tensor:
            text = "".join(f" {word}" for word in saying.split()) or "\n"
            apart = embeddings[tokenizer(text, add_special_tokens=False)["input_ids"]] - self.mean
            return self.mean + apart.sum(0) / len(apart) ** 0.5

        self.table = torch.stack([row(saying) for saying in sayings])

    def __call__(self, codes: Tensor) -> Tensor:
        """[...] -> [..., hidden]."""
        return self.table[codes]


TASKS = {"scenes": ReadScenes, "pages": ReadPages}
