"""One batch of samples, measured with the full cache and then with each method: the rows of the table.

The full cache comes first: its distributions and its text are what the methods are compared with. Forced and free
continuation of a prompt run side by side as rows of one batch, so that each cache reads the prompt once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..loading import answer_ids, prepare
from .methods import FULL, Candidate
from .tasks import Sample
from .token_loop import Held, TokenLoop, write
from .token_sources import Forced, Greedy

MAX_REFERENCE_BYTES = 4 * 2**30
"""What the full cache's distributions over one batch of answers may take, in CPU memory."""

Row = dict[str, Any]


@dataclass
class _Run:
    """What one cache gave: its forced answers, the tokens it wrote, and what it held."""

    forced: Forced
    written: list[list[int]]
    held: Held


class Batch:
    """Some samples of one task, prepared for a model.

    The answers that the caches are measured on are the samples' own; a sample without one has that of the full cache.

    Args:
        model: in eval mode.
        processor: of the model.
        samples: at least one.

    Attributes:
        progress: called while a cache answers, with the number of answers that have ended.

    Raises:
        LoadError: a picture cannot be read.
    """

    def __init__(self, model: Any, processor: Any, samples: Sequence[Sample]):
        self.model, self.samples = model, samples
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self.inputs = prepare(processor, [(each.prompt, list(each.pictures())) for each in samples], model.device)
        mask = self.inputs.get("attention_mask", torch.ones_like(self.inputs["input_ids"]))
        self._lengths: list[int] = mask.sum(1).tolist()
        eos = model.generation_config.eos_token_id
        self._eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        pad = model.generation_config.pad_token_id
        self._pad: int = pad if pad is not None else self._eos[0] if self._eos else 0
        self._answers = [_answer_ids(processor, sample) for sample in samples]
        self._full: _Run | None = None
        self.progress: Callable[[int], None] = lambda ended: None

    def full(self) -> list[Row]:
        """Measure the full cache."""
        run = self._reference()
        return self._rows(FULL, 1.0, run, run)

    def candidate(self, candidate: Candidate, budget: float) -> list[Row]:
        """Measure a method at a budget."""
        reference = self._reference()
        run = self._run(candidate.make(self.model, budget, self.inputs), reference.forced.log_probs)
        return self._rows(candidate.name, budget, run, reference)

    def _reference(self) -> _Run:
        if self._full is None:
            full = Candidate(FULL)
            if not all(self._answers):
                greedy = self._greedy()
                write(TokenLoop(self.model, self.inputs, full.make(self.model, 1.0)), [greedy])
                self._answers = [given or own for given, own in zip(self._answers, greedy.texts, strict=True)]
            self._full = self._run(full.make(self.model, 1.0), None)
        return self._full

    def _run(self, cache: Cache, reference: Sequence[Tensor] | None) -> _Run:
        forced, greedy = Forced(self._answers, self._pad, reference, self.model.device), self._greedy()
        held = write(TokenLoop(self.model, self.inputs, cache), [forced, greedy], self.progress)
        return _Run(forced, greedy.texts, held)

    def _greedy(self) -> Greedy:
        limits = torch.tensor([sample.limit for sample in self.samples], device=self.model.device)
        return Greedy(limits, self._eos, self._pad)

    def _rows(self, method: str, budget: float, run: _Run, full: _Run) -> list[Row]:
        texts = [text.strip() for text in self._tokenizer.batch_decode(run.written, skip_special_tokens=True)]
        held, rows = run.held, []
        for index, sample in enumerate(self.samples):
            n_prompt, n_answer = self._lengths[index], len(self._answers[index])
            pairs, pairs_end = held.pairs[index].item(), held.pairs_end[index].item()
            differs = first_difference(run.written[index], full.written[index])
            rows.append({
                "sample": sample.id, "task": sample.task, "kind": sample.kind, "method": method, "budget": budget,
                "prompt_tokens": n_prompt, "answer_tokens": n_answer, "nll": run.forced.nll[index].item(),
                "kl": run.forced.kl[index].item() / n_answer,
                "agree": n_answer if run is full else run.forced.agree[index].item(),
                "same": int(differs is None), "first_diff": differs,
                **sample.mark(texts[index])._asdict(),
                "pairs": pairs, "pairs_end": pairs_end, "kept": pairs / n_prompt,
                "kept_end": pairs_end / held.seen_end[index].item(), "nbytes": round(held.nbytes / len(self.samples)),
                "nbytes_end": held.nbytes_end[index].item(), "text": texts[index],
            })  # fmt: skip
        return rows


def first_difference(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token in which two texts differ, the end of the shorter one included; None: they do not."""
    for index, (one, other) in enumerate(zip(tokens, reference, strict=False)):
        if one != other:
            return index
    return None if len(tokens) == len(reference) else min(len(tokens), len(reference))


def check_memory(model: Any, processor: Any, batches: Sequence[Sequence[Sample]]) -> None:
    """Refuse what would stop a run in its middle: answers without tokens, and distributions that would not fit.

    Raises:
        LoadError, ValueError: says which.
    """
    tokens = max(sum(len(_answer_ids(processor, each)) or each.limit for each in batch) for batch in batches)
    needed = tokens * model.config.get_text_config(decoder=True).vocab_size * 4
    if needed > MAX_REFERENCE_BYTES:
        raise ValueError(
            f"the full cache's distributions over the answers of one batch take {needed / 2**30:.1f} GiB of CPU "
            f"memory, more than {MAX_REFERENCE_BYTES / 2**30:.0f}; take a smaller --batch-size"
        )


def _answer_ids(processor: Any, sample: Sample) -> list[int]:
    """Tokens of the sample's own answer; empty without one."""
    return answer_ids(processor, sample.prompt, sample.answer, sample.n_pictures) if sample.answer else []
