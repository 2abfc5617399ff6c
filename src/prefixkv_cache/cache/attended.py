"""What the attention hook asks of `PrefixKVCache`: it reads off masks, and has prompts pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from ..methods import Method
from .architecture import Sliding
from .call import AttentionCall
from .guards import ModelFacts
from .hook import HandedOut
from .layer import PrunedLayer
from .lengths import LengthSource
from .pipeline import prune_after_attention
from .prompt import Padding, Prompt, image_tokens
from .segments import SegmentRule, Shown


class AttendedByHook(Cache):
    """A part of `PrefixKVCache`."""

    method: Method
    budget: float | int
    max_bytes: int
    layers: list[Any]
    _image_mask: Tensor | None
    _rule: SegmentRule
    _facts: ModelFacts
    _sliding: Sliding
    _padding: Padding

    def _use_facts(self) -> None:
        raise NotImplementedError

    def _lengths(self) -> LengthSource:
        raise NotImplementedError

    def _waiting(self) -> list[PrunedLayer]:
        raise NotImplementedError

    def _pruned(self, layer_idx: int) -> PrunedLayer:
        raise NotImplementedError

    def _adopt_twin(self, layer_idx: int) -> bool:
        raise NotImplementedError

    def watches(self, handed: HandedOut) -> bool:
        """Whether this call is a prompt's, or the eviction policy counts what it gives."""
        candidates = handed.shown[0].draft is not None or handed.candidates > 0
        return self._rule.counts_received or candidates or self._waiting_prompt(handed) is not None

    def before_attention(self, handed: HandedOut, call: AttentionCall) -> None:
        """Read off a prompt's mask, in logical columns, which tokens are padding; learn the model."""
        prompt = self._waiting_prompt(handed)
        if prompt is None:
            return
        if self._facts.check_module(getattr(call.module, "config", None), everything=not self._sliding.alone):
            self._use_facts()
        if prompt.window is not None and "flash" in call.backend:
            raise ValueError(
                "flash attention counts a sliding window in stored pairs, so layers with one cannot be pruned there; "
                "load the model with attn_implementation='sdpa', or leave prune_sliding out"
            )
        prompt.valid, prompt.lengths = self._padding.of_prompt(call.mask, call.query.shape[0], prompt.n_new)
        prompt.leave_out_of_sight()
        if self._image_mask is not None:
            seen = int(self.layers[handed.layer_idx].get_seq_length())
            prompt.image = image_tokens(self._image_mask, prompt, seen)

    def wants_log_sum_exp(self, handed: HandedOut) -> bool:
        """Whether all queries of this call will be asked for."""
        everything = "all" in (self.method.ranking.queries, self.method.ranking.context)
        return everything and self.budget != 1.0 and self._waiting_prompt(handed) is not None

    def after_attention(self, handed: HandedOut, calls: Sequence[AttentionCall]) -> None:
        """Prune what can be pruned by now; count what pairs have received in a decode step."""
        layer = self._pruned(handed.layer_idx)
        if self._waiting_prompt(handed) is not None:
            if self._adopt_twin(handed.layer_idx):
                return
            prune_after_attention(calls, layer, self._ready(layer), self.method, self._lengths(), self.max_bytes)
        elif layer.prompt is None and layer.rule.counts_received:
            for shown, call in zip(handed.shown, calls, strict=True):
                if shown.segment is not None:
                    shown.segment.add_received(call.importance(max_bytes=self.max_bytes), layer.seen)

    def show_candidates(self, handed: HandedOut) -> Sequence[Shown]:
        """What the candidates behind a prompt see."""
        return self._pruned(handed.layer_idx).draft_held_back()

    def _waiting_prompt(self, handed: HandedOut) -> Prompt | None:
        """The prompt of this layer, if its attention was not seen yet."""
        prompt = self._pruned(handed.layer_idx).prompt
        return None if prompt is None or prompt.attended else prompt

    def _ready(self, layer: PrunedLayer) -> list[PrunedLayer]:
        """The layers that are pruned when this one is scored: itself, or all where lengths wait for all."""
        prompt, source = layer.prompt, self._lengths()
        if not source.waits or (prompt is not None and source.keeps_all(layer.place, prompt.lengths)):
            return [layer]
        return self._waiting() if self._facts.is_last(layer.place) else []
