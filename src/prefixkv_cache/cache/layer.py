"""One pruned layer: it takes a prompt in whole, is pruned once, and then decodes in place.

The cache is a list of these. A layer is a list of segments (segments.py) and what they have in common: the tokens
*seen*, which is what transformers asks for, and the prompt on its way through. The layer is told which columns of a
prompt to keep; it computes no importance and knows no profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .compat import MaxLengthNames, n_queries
from .heads import Kept
from .layer_between import LayerBetweenForwards
from .prompt import Prompt
from .segments import Segment, SegmentRule, Shown
from .stored import StoredPairs


class PrunedLayer(LayerBetweenForwards, MaxLengthNames, CacheLayerMixin):
    """Keys and values of one decoder layer, pruned to lengths of its own.

    Args:
        rule: what all segments of the cache have in common.
        place: among the prunable layers of the model, from 0.
        window: tokens that a token sees, itself included, in a layer with a sliding window. None: all.
    """

    def __init__(self, rule: SegmentRule, place: int, window: int | None = None):
        self.rule, self.place, self.window = rule, place, window
        self.reset()

    def reset(self) -> None:
        """Forget everything, and be as new."""
        self.stored = StoredPairs()
        self.prompt: Prompt | None = None
        self._seen = 0
        self._planned_steps = 0  # steps asked for by the model since the plan was made
        self._shown: list[Shown] = []
        self.forget_candidates()
        self.is_initialized = False

    # What transformers reads.

    @property
    def is_sliding(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the model's mask hides tokens that lie too far back."""
        return self.window is not None

    @property
    def is_compileable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether decode steps have fixed shapes and addresses."""
        return self.rule.max_new_tokens is not None

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: where the next token's position starts.

        While steps go by a plan, this is an int64 tensor [] on the device, as in transformers' static layers.
        """
        plan = self.stored.plan
        return self._seen if plan is None else plan.seen  # pyright: ignore[reportReturnType]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask, in logical columns; each segment takes its own columns at the hook."""
        if not torch.compiler.is_compiling():
            self._go_on_without_plan()
        plan = self.stored.plan
        if plan is not None and n_queries(query_length) == 1:
            return plan.last, 0
        return self.seen + n_queries(query_length), 0

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[batch, heads, stored, head_dim], or None before the first prompt; of several segments a padded copy."""
        return self._joined("keys")

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[batch, heads, stored, head_dim], or None before the first prompt; of several segments a padded copy."""
        return self._joined("values")

    def _joined(self, name: str) -> Tensor | None:
        _ = self.seen  # takes note of planned steps
        return self.stored.joined(name) if self.segments else getattr(self.prompt, name, None)

    # What the cache asks.

    @property
    def batch_size(self) -> int:
        """Rows of the batch, 0 before the first prompt."""
        return self.stored.batch_size if self.prompt is None else self.prompt.keys.shape[0]

    @property
    def n_heads(self) -> int:
        """Key heads, 0 before the first prompt."""
        return self.stored.n_heads if self.prompt is None else self.prompt.keys.shape[1]

    @property
    def stored_by_head(self) -> list[int]:
        """Pairs that each key head holds, by its longest row; a prompt that is not pruned yet counts whole."""
        _, waiting = self.seen, self.n_drafted if self.prompt is None else self.prompt.n_new
        return [stored + waiting for stored in self.stored.by_head() or [0] * self.n_heads]

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value tensors that are allocated, spare room included."""
        tensors = self.stored.tensors()
        if self.prompt is not None:
            shown = [each for s in self.prompt.shown for each in (s.keys, s.values) if each is not None]
            tensors += shown or [self.prompt.keys, self.prompt.values]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def pruned_before(self) -> bool:
        """Whether a first prompt has been pruned, so that a later one goes by the ratios of its rows."""
        return bool(self.segments)

    def slot_positions(self) -> Tensor:
        """The logical position of the pair in each slot, -1 where a slot holds nothing.

        Returns:
            int64 [batch, 1, stored]; [batch, heads, longest] where heads keep keys of their own.
        """
        _ = self.seen
        stored = self.stored.joined("positions", -1) if self.segments else None
        waiting = self.n_drafted if self.prompt is None else self.prompt.n_new
        if not waiting:
            return torch.empty(0, 1, 0, dtype=torch.int64) if stored is None else stored
        new = self._new_positions(waiting)
        return new if stored is None else torch.cat([stored, new.expand(-1, stored.shape[1], -1)], dim=2)

    def _new_positions(self, n_new: int) -> Tensor:
        new = torch.arange(self._seen - n_new, self._seen, device=self.device)
        return new.expand(self.batch_size, 1, -1)

    # The way of the data: a prompt comes in whole, is pruned, then tokens come one by one.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take note of dtype and device; buffers are made when the first prompt has been pruned."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new pairs; return keys and values as the model goes on with them.

        What the backend shall see is then to be had from `take_shown`. Over several segments the tensors returned hold
        no pairs: only their shape, dtype and device are true (nan, so that nobody who reads past the attention hook is
        silently wrong).

        Args:
            key_states, value_states: [batch, heads, n_new, head_dim]. Stored without their autograd history.
            args, kwargs: ignored, as transformers' own layers do.

        Raises:
            ValueError: the batch is not the one that is stored, or there are no tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if value_states.device.type == "cpu":
            # Values come as a view with the heads inside; attention on a CPU takes a third longer over that.
            value_states = value_states.contiguous()
        if self.drafts:
            self.confirm()
        if (n_new := key_states.shape[2]) == 0:
            raise ValueError("the prompt has no tokens; a cache layer needs at least one")
        if self.segments:
            self.stored.check_keys(key_states)
        if self.segments and n_new == self.n_candidates:
            self._shown = shown = self.draft(key_states.detach(), value_states.detach())
        elif self.segments and n_new == 1:
            self._shown = shown = self._decode(key_states.detach(), value_states.detach())
        elif self.n_candidates:
            self._shown = shown = self._begin_prompt(*self.hold_back(key_states, value_states))
        else:
            self._shown = shown = self._begin_prompt(key_states, value_states)
        if len(shown) > 1:
            return _stand_ins(
                key_states, value_states, max(each.keys.shape[2] for each in shown if each.keys is not None)
            )
        keys, values = shown[0].keys, shown[0].values
        if keys is None or values is None:
            return key_states, value_states
        # The tensor that carries `Shown` to the attention hook must not be held by it: it would outlive its use.
        first = shown[0]
        without = Shown(
            first.group, None, None, first.own_mask, first.ragged, first.positions, first.segment, first.draft
        )
        self._shown = [without]
        return self.with_held_back(keys, values)

    def take_shown(self) -> list[Shown]:
        """What the backend shall see of the last `update`, by segment; asked for once."""
        shown, self._shown = self._shown, []
        return shown

    def _begin_prompt(self, keys: Tensor, values: Tensor) -> list[Shown]:
        n_new = keys.shape[2]
        _ = self.seen
        self._seen += n_new
        prompt = self.prompt = Prompt(keys.detach(), values.detach(), [], window=self.window)
        if not self.segments:
            return [Shown(None)]
        prompt.shown = self.stored.shown_with(keys, values, self._new_positions(prompt.n_new))
        if len(self.segments) == 1:  # one copy of the new pairs is enough
            prompt.keys, prompt.values = (
                each.narrow(2, each.shape[2] - n_new, n_new)
                for each in (prompt.shown[0].keys, prompt.shown[0].values)
                if each is not None
            )
        return prompt.shown

    def _decode(self, keys: Tensor, values: Tensor) -> list[Shown]:
        planned = self.planned
        if planned and not torch.compiler.is_compiling():
            self._go_on_without_plan()
            self._planned_steps += 1
            planned = self.planned
        shown = self.stored.append(keys, values, self._seen)
        if not planned:
            self._seen += 1
        return shown

    def _go_on_without_plan(self) -> None:
        """Where the plan's steps are used up, go on with growing memory."""
        if self.planned and self._planned_steps >= (self.rule.max_new_tokens or 0):
            _ = self.seen
            self.stored.drop_plan()

    def prune(self, kept: Sequence[Kept]) -> None:
        """Keep these tokens of the prompt, and all pairs of earlier turns; make the buffers that decoding goes on in.

        Args:
            kept: by segment; those of the first prompt say which key heads are a segment.
        """
        prompt = self.prompt
        if prompt is None:
            raise RuntimeError("there is no prompt to prune: prune() follows the update() of a prompt")
        if not self.segments:
            self.stored = StoredPairs([Segment(each.heads, self.rule) for each in kept], prompt.keys.shape[1])
            new = self._new_positions(prompt.n_new)
            found: list[Any] = [(s.own(prompt.keys), s.own(prompt.values), new) for s in self.segments]
        else:
            found = [(each.keys, each.values, each.read_positions()) for each in prompt.shown]
        sources = [
            self.rule.prompt_pairs(keys, values, positions, segment.pairs, prompt.n_new)
            for segment, (keys, values, positions) in zip(self.segments, found, strict=True)
        ]
        for segment, each, source in zip(self.segments, kept, sources, strict=True):
            if self.rule.counts_received:
                source.received = segment.received_with(prompt.scores, prompt.keys)
            segment.prune(source, prompt.n_new, each, prompt.valid, prompt.lengths, self._seen)
        self.prompt, self._planned_steps = None, 0

    # Offloading of whole layers, as `Cache.offload` and `Cache.prefetch` ask for it.

    def offload(self) -> None:
        """Move the buffers to the CPU."""
        self.stored.move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move the buffers back to the layer's device, if there are any yet."""
        if self.is_initialized:
            self.stored.move(self.device)


def _stand_ins(keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes that the model expects, of one number: they take no memory."""
    batch, heads = keys.shape[:2]
    one = keys.new_full((1, 1, 1, 1), torch.nan)
    return one.expand(batch, heads, length, keys.shape[3]), one.expand(batch, heads, length, values.shape[3])
