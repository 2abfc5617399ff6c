"""What transformers asks of a pruned layer between two forwards: rows of the batch, candidates, taking tokens back.

Candidates of assisted decoding wait beside what is stored until `crop` says how many were right (draft.py). Candidates
that came behind a prompt are held back until the prompt has been pruned, which is what they are to see.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .draft import Draft, confirm_all
from .prompt import Prompt
from .segments import Segment, SegmentRule, Shown
from .stored import StoredPairs


class LayerBetweenForwards(CacheLayerMixin):
    """A part of `PrunedLayer`.

    Attributes:
        record_past: whether transformers has said that it may take back tokens after each forward; it sets this itself.
        n_candidates: so many of the last tokens of the coming `update` are candidates.
        drafts: candidates that are neither confirmed nor taken back, by segment.
    """

    rule: SegmentRule
    stored: StoredPairs
    prompt: Prompt | None
    _seen: int
    _planned_steps: int

    @property
    def segments(self) -> list[Segment]:
        """What is stored, by length; empty before the first prompt was pruned."""
        return self.stored.segments

    @property
    def planned(self) -> bool:
        """Whether decode steps go by a plan made beforehand; see decode.py."""
        return self.stored.plan is not None

    @property
    def seen(self) -> int:
        """Tokens seen, padding included."""
        if self.planned and not torch.compiler.is_compiling():
            self._seen += self.stored.catch_up()
        return self._seen

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether `crop` puts everything back as it was, where candidates were announced: not with planned steps."""
        return self.rule.max_new_tokens is None

    # Operations on the batch. An unpruned prompt cannot be reordered: it lives only inside a forward, or, where lengths
    # are found from all layers' scores, until the last layer has been seen.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of what was row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self.batch_select_indices(torch.arange(self.stored.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, int64 or a bool mask over the rows, in that order."""
        self.confirm()
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        seen = self.seen
        self.stored.select_rows(indices, seen)
        self._planned_steps = self._steps_planned_for(seen)

    def _steps_planned_for(self, seen: int) -> int:
        """Planned steps that count as taken: those of `max_new_tokens` that are not left."""
        plan = self.stored.plan
        return 0 if plan is None else (self.rule.max_new_tokens or 0) - (plan.last - seen)

    # Candidates.

    def activate_past_recording(self) -> None:
        """Take note that tokens may be taken back after each forward."""
        self.record_past = True

    def forget_candidates(self) -> None:
        """Be as new, as far as candidates are concerned."""
        self.record_past, self.n_candidates = False, 0
        self.drafts: list[Draft] = []
        self._shown_drafts: list[Shown] = []
        self._held_back: tuple[Tensor, Tensor] | None = None

    @property
    def n_drafted(self) -> int:
        """Candidates that are neither confirmed nor taken back."""
        return self.drafts[0].n if self.drafts else 0

    def draft(self, keys: Tensor, values: Tensor, own_mask: bool = False) -> list[Shown]:
        """Take in candidates, [batch, heads, n, head_dim]; return what the backend shall see, by segment."""
        self.drafts = [Draft(s, s.own(keys), s.own(values), self._seen) for s in self.segments]
        self._seen += keys.shape[2]
        self.n_candidates = 0
        self._shown_drafts = [draft.show(own_mask) for draft in self.drafts]
        return self._shown_drafts

    def hold_back(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt's part of what came in; the candidates behind it wait for `draft_held_back`."""
        n, self.n_candidates = self.n_candidates, 0
        self._held_back = keys[:, :, -n:].detach(), values[:, :, -n:].detach()
        return keys[:, :, :-n], values[:, :, :-n]

    def with_held_back(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is shown of a prompt and the candidates behind it."""
        if self._held_back is None:
            return keys, values
        behind_keys, behind_values = self._held_back
        return torch.cat([keys, behind_keys], dim=2), torch.cat([values, behind_values], dim=2)

    def draft_held_back(self) -> list[Shown]:
        """What the candidates behind a prompt see, now that it is pruned; asked for by each layer that shows them."""
        if self._held_back is not None:
            held, self._held_back = self._held_back, None
            self.draft(*held, own_mask=True)
        return self._shown_drafts

    def adopt(self, other: LayerBetweenForwards) -> None:
        """Go on with what another layer has kept of the same prompt."""
        self.stored, self.prompt = other.stored, None

    def confirm(self, n: int | None = None) -> None:
        """The first `n` candidates were right, or all; the others were never fed."""
        if not self.drafts:
            return
        drafts, drafted = self.drafts, self.n_drafted
        n = drafted if n is None else n
        self.drafts, self._shown_drafts, self._held_back = [], [], None
        confirm_all(drafts, n)
        self._seen -= drafted - n

    # Taking tokens back.

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what `crop` cannot do, before any layer is changed.

        Raises:
            ValueError: a positive number, more tokens than were seen, or heads would be left with different numbers.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self.seen:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, from {-self.seen} to 0; got {tokens_to_remove}"
            )
        if -tokens_to_remove > self.n_drafted:
            self.stored.check_crop(self.seen + tokens_to_remove, -tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens: candidates without a trace.

        Pairs that left for tokens behind those do not come back.

        Raises:
            ValueError: see `check_crop`.
        """
        self.check_crop(tokens_to_remove)
        rejected = min(-tokens_to_remove, self.n_drafted)
        self.confirm(self.n_drafted - rejected)
        removed = -tokens_to_remove - rejected
        if removed == 0 or not self.segments:
            return
        seen, end = self.seen, self.seen - removed
        if end == 0:
            self.reset()
            return
        self.stored.crop(end, removed, seen)
        self._seen = end
        self._planned_steps = self._steps_planned_for(end)
