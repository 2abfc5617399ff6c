"""What the models learn to read: for each task its pictures, how hard they get when, and what an image token lies on.

The pictures, their truths and the marking come from `prefixkv_cache.tools.demo`; `Task.module` is the task's module
there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from prefixkv_cache.tools.demo import boards, scenes
from prefixkv_cache.tools.demo.boards import Board
from prefixkv_cache.tools.demo.scenes import Scene

Picture = Scene | Board
Level = Any  # what `Task.draw` takes beside the seed: how many objects, or which grid


class Task:
    """One kind of pictures with its training plan.

    `token_pixels` is the edge of the square of the picture that one image token stands for; `patch_classes`, how many
    answers each of the questions to an image token has: 0 where there is nothing to read. `eyes` is the share of the
    run that stage one takes; from the share `even` on, a short answer counts as much as a long one. `late_focus` is
    added to the price of a wide look late in the run.
    """

    module: ModuleType
    token_pixels: int
    patch_classes: tuple[int, ...]
    eyes = 0.12
    even = 1.0
    late_focus = 0.0

    def draw(self, seed: int, level: Level = None) -> Picture:
        """The picture of a seed, at a level of the plan or, without one, as the task is meant to be."""
        raise NotImplementedError

    def level(self, done: float, eyes: float, rng: random.Random) -> Level:
        """What to draw in one batch: `done` is the share of the run that is behind it, `eyes` that of stage one."""
        raise NotImplementedError

    def patch_truths(self, picture: Picture) -> torch.Tensor:
        """[image tokens, questions]: what each image token lies on, in reading order."""
        raise NotImplementedError

    def texts(self) -> Iterator[str]:
        """Text that holds every word of the task, from a few hundred training pictures."""
        yield from self.module.DESCRIBE_PROMPTS
        yield " ".join(scenes.NUMBERS)
        for seed in self.module.TRAIN_SEEDS[:400]:
            picture = self.draw_any(seed)
            yield self.module.describe(picture)
            yield from (f"{question.text} {question.answer}." for question in self.module.questions(picture))

    def draw_any(self, seed: int) -> Picture:
        """A picture of any kind that training shows."""
        return self.draw(seed)

    def token_grid(self, picture: Picture) -> tuple[int, int]:
        """Rows and columns of the image tokens."""
        width, height = picture.image.size
        return height // self.token_pixels, width // self.token_pixels


class Scenes(Task):
    """Up to nine objects in a 3 x 3 grid: few words to tell apart at first, the real task soon."""

    module = scenes
    token_pixels = 8
    patch_classes = (len(scenes.RADII) + 1, len(scenes.COLOURS) + 1, len(scenes.SHAPES) + 1, scenes.GRID**2)

    def draw(self, seed: int, level: Level = None) -> Scene:
        return scenes.draw_scene(seed, *level) if level else scenes.draw_scene(seed)

    def draw_any(self, seed: int) -> Scene:
        return scenes.draw_scene(seed, 1, 9)

    def level(self, done: float, eyes: float, rng: random.Random) -> tuple[int, int]:
        """Fewest and most objects in a scene."""
        return (1, 4) if eyes < done < eyes + 0.08 else (2, 7) if done < 0.5 else (4, 7)

    def patch_truths(self, picture: Scene) -> torch.Tensor:
        """Size, colour and shape (0: background) of the object at each token's centre, and the token's cell."""
        side = scenes.IMAGE_SIZE // self.token_pixels
        truths = torch.zeros(side, side, 4, dtype=torch.long)
        cell = torch.arange(side) // (side // scenes.GRID)
        truths[..., 3] = cell[:, None] * scenes.GRID + cell
        names = (list(scenes.RADII), list(scenes.COLOURS), list(scenes.SHAPES))
        for thing in picture.objects:
            left, top, right, bottom = (self.first_token(value) for value in thing.box)
            words = (thing.size, thing.colour, thing.shape)
            codes = [options.index(word) + 1 for options, word in zip(names, words, strict=True)]
            truths[top:bottom, left:right, :3] = torch.tensor(codes)
        return truths.flatten(0, 1)

    def first_token(self, pixel: int) -> int:
        """The first token whose centre lies at or behind this pixel."""
        return math.ceil((pixel - self.token_pixels / 2) / self.token_pixels)


class Boards(Task):
    """Boards of numbered rows and columns: small ones at first. All boards of a batch have one shape."""

    module = boards
    token_pixels = boards.MARGIN
    patch_classes = (len(boards.DIGITS) + 1, len(boards.COLOURS) + 1, boards.MOST + 1, boards.MOST + 1)
    eyes = 0.16  # digits are harder to tell than shapes
    late_focus = 0.04
    even = 0.45  # a reading is twenty times as long as the answers that are hardest to find
    small = ((2, 2), (2, 3), (3, 2), (3, 3))

    def draw(self, seed: int, level: Level = None) -> Board:
        return boards.draw_board(seed, level)

    def level(self, done: float, eyes: float, rng: random.Random) -> tuple[int, int]:
        """Rows and columns."""
        grids = self.small if eyes < done < eyes + 0.08 else boards.GRIDS
        return grids[int(rng.random() * len(grids))]

    def patch_truths(self, picture: Board) -> torch.Tensor:
        """Digit, colour, row and column of the tile, from 1; beside the grid 0, but for the row or column there."""
        tokens = boards.CELL // self.token_pixels
        truths = torch.zeros(picture.rows * tokens + 1, picture.columns * tokens + 1, 4, dtype=torch.long)
        truths[1:, :, 2] = 1 + torch.arange(picture.rows).repeat_interleave(tokens)[:, None]
        truths[:, 1:, 3] = 1 + torch.arange(picture.columns).repeat_interleave(tokens)
        colours = list(boards.COLOURS)
        for tile in picture.objects:
            top, left = 1 + tile.row * tokens, 1 + tile.column * tokens
            codes = torch.tensor([boards.DIGITS.index(tile.digit) + 1, colours.index(tile.colour) + 1])
            truths[top : top + tokens, left : left + tokens, :2] = codes
        return truths.flatten(0, 1)


TASKS = {"scenes": Scenes, "boards": Boards}
