"""A prompt on its way through a layer, and what the masks say of it: padding, and images."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..rules.masks import valid_tokens
from .segments import Shown
from .tensor_parallel import ALONE, HeadRanks


@dataclass
class Prompt:
    """A prompt on its way through a layer: from `update` until the layer is pruned.

    Attributes:
        keys, values: [batch, heads, n_new, head_dim], of the new tokens.
        shown: what the backend sees, by segment: pairs of earlier turns, then the new ones.
        attended: whether the attention call of this prompt was seen by the hook.
        scores: float32 [batch, 1 or heads, n_new], by which keys are kept; None if not needed or not known yet.
        scores_of_all: the same over the heads of all ranks, where lengths are found from scores.
        valid: bool [batch, n_new], False at padding; None: no padding.
        image: bool [batch, n_new], True at image tokens; None: nothing is known of images.
        lengths: valid tokens of each row.
        ranks: who holds the other key heads, with tensor parallelism.
        window: of a layer with a sliding window: the tokens that a token sees, itself included. None: all.
    """

    keys: Tensor
    values: Tensor
    shown: list[Shown]
    attended: bool = False
    scores: Tensor | None = None
    scores_of_all: Tensor | None = None
    valid: Tensor | None = None
    image: Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    ranks: HeadRanks = ALONE
    window: int | None = None

    @property
    def n_new(self) -> int:
        """Tokens in this prompt, padding included."""
        return self.keys.shape[2]

    @property
    def cut(self) -> bool:
        """Whether its first tokens are out of sight for all that comes."""
        return self.window is not None and self.n_new > self.window - 1

    def leave_out_of_sight(self) -> None:
        """Count only tokens that a later one may see, as if the others were padding.

        None of the others' queries sees a token that stays in sight, so importance loses nothing.
        """
        if self.window is None or not self.cut:
            return
        batch = self.keys.shape[0]
        inside = torch.arange(self.n_new, device=self.keys.device) > self.n_new - self.window
        self.valid = inside.expand(batch, -1) if self.valid is None else self.valid & inside
        self.lengths = self.valid.sum(1).tolist()


class Padding:
    """Which new tokens are valid, read once for all layers of a forward, which get the same mask."""

    def __init__(self) -> None:
        self._known: tuple[weakref.ref, Tensor | None, list[int]] | None = None

    def of_prompt(self, mask: Any, batch: int, n_new: int) -> tuple[Tensor | None, list[int]]:
        """Which new tokens are valid, bool [batch, n_new] (None: all), and how many in each row.

        Args:
            mask: as the backend takes it, in logical columns.
            batch: rows.
            n_new: tokens in this prompt, padding included.
        """
        if self._known is not None and mask is not None and self._known[0]() is mask:
            return self._known[1], self._known[2]
        valid = valid_tokens(mask, n_new)
        lengths = [n_new] * batch
        if valid is not None:
            valid = valid.expand(batch, -1)
            lengths = valid.sum(1).tolist()
            if min(lengths) == n_new:
                valid = None
        # Weakly: a mask of a long prompt is larger than the cache, and must not outlive its forward.
        self._known = None if mask is None else (weakref.ref(mask), valid, lengths)
        return valid, lengths


def image_tokens(image_mask: Tensor, prompt: Prompt, seen: int) -> Tensor:
    """Which new tokens are image tokens, bool [batch, n_new].

    Args:
        image_mask: bool [rows, n_prompt], of the first prompt, or of all tokens so far.
        prompt: whose new tokens they are.
        seen: tokens seen by now, padding included.

    Raises:
        ValueError: the mask ends inside this prompt, or has another number of rows.
    """
    batch, mask = prompt.keys.shape[0], image_mask.to(prompt.keys.device)
    if seen - prompt.n_new >= mask.shape[1]:
        # Behind the first prompt is text, whatever became of its rows since.
        return mask.new_zeros(batch, prompt.n_new)
    if mask.shape[1] < seen or batch % mask.shape[0]:
        raise ValueError(
            f"image_mask is {list(mask.shape)} for a batch of {batch} whose prompt reaches to token {seen}; it must be "
            "bool [batch, n_prompt], a column for every token of the prompt (padding too)"
        )
    # Beams and several sequences of one prompt stand side by side.
    mask = mask.repeat_interleave(batch // mask.shape[0], 0)
    return mask[:, seen - prompt.n_new : seen]
