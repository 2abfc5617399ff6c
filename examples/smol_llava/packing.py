"""What the language model is trained on: pictures as pixels, and rows of one picture with many questions behind it.

Quicker than the processor and the chat template, and the same numbers. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .model import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS

IGNORE = -100
ASKED = "<|im_end|>\n<|im_start|>assistant\n"  # between a question and its answer


def pixels_of(pictures: Iterable[Any]) -> Tensor:
    """[batch, 3, 192, 192], from -1 to 1: what the image processor makes of pictures."""
    side = (IMAGE_SIZE, IMAGE_SIZE)
    images = [each.image.resize(side, Image.Resampling.BICUBIC) for each in pictures]
    raw = torch.frombuffer(bytearray(b"".join(image.tobytes() for image in images)), dtype=torch.uint8)
    return (raw.view(-1, *side, 3).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


@dataclass
class Row:
    """One picture with questions side by side behind it.

    Attributes:
        ids, positions: int64 [tokens].
        turns: int64 [tokens], 0 for the picture, else which question a token belongs to.
        labels: int64 [tokens], the answers' tokens where they stand, `IGNORE` elsewhere.
        weights: float32 [tokens], what each token of an answer counts.
    """

    ids: Tensor
    positions: Tensor
    turns: Tensor
    labels: Tensor
    weights: Tensor


class Packer:
    """Writes rows as the processor and the chat template would."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}
        image = [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * IMAGE_TOKENS
        self.before = self.encode("<|im_start|>user\n")
        self.opening = self.before + image + self.encode("\n")

    def encode(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(self.known[text])

    def row(self, turns: list[tuple[str, str]]) -> Row:
        """Of (question, answer) pairs that do not see each other; long answers count by length to the power 0.7."""
        ids, numbers = list(self.opening), [0] * len(self.opening)
        positions = list(range(len(ids)))
        labels, weights = [IGNORE] * len(ids), [0.0] * len(ids)
        for number, (question, answer) in enumerate(turns, 1):
            asked, said = self.encode(question) + self.encode(ASKED), self.encode(answer) + self.encode("<|im_end|>")
            ids += asked + said
            numbers += [number] * len(asked + said)
            positions += range(len(self.opening), len(self.opening) + len(asked + said))
            labels += [IGNORE] * len(asked) + said
            weights += [0.0] * len(asked) + [len(said) ** -0.3] * len(said)
        return Row(*map(torch.tensor, (ids, positions, numbers, labels, weights)))
