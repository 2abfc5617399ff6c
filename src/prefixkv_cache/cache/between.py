"""What transformers asks of a cache between two forwards: rows of the batch, and taking tokens back."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .compat import crops_to_nothing
from .layer import PrunedLayer


class BetweenForwards(Cache):
    """Operations that begin by pruning what still waits for its length."""

    _image_mask: Tensor | None

    def _settle(self, layer_idx: int | None = None) -> None:
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
        """Take back the newest `-tokens_to_remove` tokens. Pairs that left for them do not come back."""
        self._settle()
        if crops_to_nothing(tokens_to_remove):
            return
        for layer in self.layers:
            if isinstance(layer, PrunedLayer):
                layer.check_crop(tokens_to_remove)
        before = int(self.get_seq_length())
        super().crop(tokens_to_remove)
        left = int(self.get_seq_length())
        if self._image_mask is not None and left < before:  # other tokens may come where these were
            self._image_mask = self._image_mask[:, :left]

    def activate_past_recording(self) -> None:
        """Refused: what a decode step has overwritten cannot be put back, as assisted decoding would ask for.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "assisted decoding takes tokens back after each step, which a pruned cache cannot undo; "
            "generate without assistant_model and prompt_lookup_num_tokens, or with DynamicCache"
        )
