"""Which tokens of a forward are candidates of assisted decoding, and what its first forward asks for.

`generate` feeds candidates behind the newest token, or in its first forward behind the prompt, and takes back with
`crop` what was wrong. A cache is not told how many they are; the decoding loop's own variables say so, which are read
on the call stack. They are read only: nothing of transformers is replaced for it.

In a loop of one's own that calls `activate_past_recording`, all tokens behind the first prompt are candidates until the
next `crop`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache

from .compat import ANNOUNCES_CANDIDATES, can_run_inside, generation_inputs
from .layer import PrunedLayer

_LOOP = "_assisted_decoding"


@dataclass(frozen=True)
class AssistedStep:
    """What the decoding loop says of the forward that is running.

    Attributes:
        candidates: tokens at its end that may be taken back.
        total: tokens that will have been fed after it, as the loop has it.
        model, input_ids, kwargs: with what the loop would have fed the prompt alone.
        first: whether this is its first forward.
        records: what it asks the model to return beside logits.
    """

    candidates: int
    total: int
    model: Any
    input_ids: Any
    kwargs: dict[str, Any]
    first: bool
    records: dict[str, bool]


def assisted_step(cache: Cache) -> AssistedStep | None:
    """The step of assisted decoding in which this cache is being fed; None: there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == _LOOP:
            found = frame.f_locals
            kwargs = found.get("model_kwargs") or {}
            if kwargs.get("past_key_values") is cache and "candidate_length" in found:
                return _step(found, kwargs)
        frame = frame.f_back
    return None


def _step(found: dict[str, Any], kwargs: dict[str, Any]) -> AssistedStep:
    candidates = int(found["candidate_length"])
    mask = kwargs.get("attention_mask")
    total = (found["input_ids"] if mask is None else mask).shape[-1] + candidates
    names = ("output_attentions", "output_hidden_states")
    return AssistedStep(
        candidates,
        total,
        found["self"],
        found["input_ids"],
        kwargs,
        bool(found["is_first_iteration"]),
        {name: bool(found.get(name)) for name in names},
    )


class AssistedDecoding(Cache):
    """Counts the candidates of each forward. A part of `PrefixKVCache`."""

    layers: list[Any]
    offloading: bool
    max_new_tokens: int | None
    quantize: str | None
    _by_generate = False  # whether `generate` has announced candidates, rather than a loop of one's own
    _n_candidates = 0  # of the forward that is running
    _twin: Any = None
    _first_ids: Any

    def _needs_all_layers(self) -> bool:
        raise NotImplementedError

    def activate_past_recording(self) -> None:
        """Be ready for candidates, which may be taken back after each forward.

        Raises:
            ValueError: decode steps were planned beforehand, or pairs are offloaded or quantised.
        """
        self._refuse_candidates()
        self._by_generate = _called_by_generate()
        super().activate_past_recording()

    def _refuse_candidates(self) -> None:
        given = {"max_new_tokens": self.max_new_tokens, "offloading": self.offloading, "quantize": self.quantize}
        name = next((name for name, value in given.items() if value), None)
        if name is not None:
            raise ValueError(
                f"assisted decoding and prompt look-up take tokens back, which a cache with {name} does not allow; "
                "make the cache without it"
            )

    def _count_candidates(self, layer: PrunedLayer, n_new: int) -> int:
        """How many of the last tokens of this forward are candidates; asked for at the first prunable layer.

        Raises:
            ValueError, NotImplementedError: they cannot be taken back, or what came before them is not what it seems.
        """
        self._n_candidates, self._twin = 0, None
        if not layer.record_past and ANNOUNCES_CANDIDATES:
            return 0
        step = assisted_step(self)
        if step is None:
            if layer.record_past and self._by_generate:  # that generation is over
                self._stop_recording()
            self._n_candidates = n_new if layer.record_past and layer.segments else 0
            return self._n_candidates
        self._refuse_candidates()
        _check_first(step, layer.seen + n_new)
        if not layer.seen:
            self._first_ids = step.input_ids  # without candidates; see hints.py
        if step.candidates:
            alone = n_new - step.candidates == 1 and layer.segments  # the newest token is a decode step like the others
            self._n_candidates = n_new if alone else step.candidates
            if not alone:
                self._prepare_prompt(step, layer)
        return self._n_candidates

    def _stop_recording(self) -> None:
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def _prepare_prompt(self, step: AssistedStep, layer: PrunedLayer) -> None:
        """Candidates see the prompt pruned; where lengths need all layers, it is fed once by itself for that."""
        if getattr(step.model.config.get_text_config(decoder=True), "kv_lora_rank", None) is not None:
            raise NotImplementedError(
                "latent attention shows other keys than it stores, so candidates cannot come in one forward with the "
                "prompt; generate(..., max_new_tokens=1) without assistance first, then go on with it"
            )
        if layer.segments or not self._needs_all_layers():
            return
        if not can_run_inside(step.records):
            raise NotImplementedError(
                "this transformers cannot return attentions or hidden states of assisted decoding where lengths are "
                "found on the whole prompt; ask for neither, or take lengths='uniform' or a profile"
            )
        twin = self.copy()  # pyright: ignore[reportAttributeAccessIssue]
        twin._stop_recording()
        kwargs = {**step.kwargs, "past_key_values": twin}
        inputs = generation_inputs(step.model, step.input_ids, kwargs, first=True)
        step.model(**inputs, **step.records)
        self._twin = twin

    def _adopt_twin(self, layer_idx: int) -> bool:
        """Take over what this layer has kept of the prompt that was fed by itself, if it was."""
        if self._twin is None:
            return False
        self.layers[layer_idx].adopt(self._twin.layers[layer_idx])
        return True


def _called_by_generate() -> bool:
    frame = sys._getframe(2)
    return frame is not None and frame.f_code.co_name == _LOOP


def _check_first(step: AssistedStep, seen_then: int) -> None:
    """Hold what the first forward feeds against what the loop knows of.

    Raises:
        ValueError: tokens that were fed already are fed again, as transformers 5 does in a second turn.
    """
    if step.first and seen_then > step.total:
        raise ValueError(
            f"assisted decoding feeds the whole conversation again in this transformers ({seen_then - step.candidates} "
            f"tokens instead of {step.total - step.candidates}); call cache.reset() before it, or go on without "
            "assistance"
        )
