"""What transformers asks of a cache between two forwards: rows of the batch, and taking tokens back."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .compat import crops_to_nothing, tokens_of_crop
from .layer import PrunedLayer


class BetweenForwards(Cache):
    """Operations that begin by pruning what still waits for its length."""

    _image_mask: Tensor | None

    def _settle_prompts(self, layer_idx: int | None = None) -> None:
        raise NotImplementedError

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of what was row `beam_idx[i]`, positions and decode state with it."""
        self._settle()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self._settle()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`, in that order."""
        self._settle()
        super().batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens: candidates that wait for it, without a trace; then others.

        Pairs that left for earlier tokens do not come back. In older releases of transformers a positive number is the
        length that remains.
        """
        self._settle_prompts()
        before = int(self.get_seq_length())
        tokens_to_remove = tokens_of_crop(tokens_to_remove, before)
        for layer in self.layers:
            if isinstance(layer, PrunedLayer):
                layer.check_crop(tokens_to_remove)
        if crops_to_nothing(tokens_to_remove):
            self._confirm()
            return
        super().crop(tokens_to_remove)
        left = int(self.get_seq_length())
        if self._image_mask is not None and left < before:  # other tokens may come where these were
            self._image_mask = self._image_mask[:, :left]

    def _settle(self, layer_idx: int | None = None) -> None:
        self._settle_prompts(layer_idx)
        self._confirm()

    def _confirm(self) -> None:
        """Candidates that nobody has taken back were right."""
        for layer in self.layers:
            if isinstance(layer, PrunedLayer):
                layer.confirm()
