"""One batch of samples, measured with the full cache and then with each method: the rows of the table.

The full cache comes first: its distributions and its text are what the methods are compared with. Forced and free
continuation of a prompt run side by side as rows of one batch, so that each cache reads the prompt once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..generate import cache_bytes
from ..loading import answer_ids, prepare
from .methods import FULL, Method
from .metrics import first_difference, rouge_l
from .tasks import Sample
from .token_loop import TokenLoop, write
from .writers import Forced, Greedy, Sampled

METRICS = ("ppl", "rouge", "accuracy", "kl")
NOISE = "noise"
"""The name under which the two sampled runs of the full cache stand in the table."""

MAX_REFERENCE_BYTES = 4 * 2**30
"""What the full cache's distributions over one batch of answers may take, in CPU memory."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    Attributes:
        metrics: any of `METRICS`.
        shift_positions: see `TokenLoop`.
        seed: of the sampled runs.
    """

    metrics: tuple[str, ...] = METRICS
    shift_positions: bool = False
    seed: int = 0

    @property
    def forced(self) -> bool:
        """Whether reference answers are read."""
        return "ppl" in self.metrics or "kl" in self.metrics

    @property
    def free(self) -> bool:
        """Whether texts are generated."""
        return "rouge" in self.metrics or "accuracy" in self.metrics


@dataclass
class _Run:
    """What one cache gave."""

    kept: Tensor
    kept_end: Tensor
    nbytes: int
    nll: list[float] | None = None
    kl: list[float] | None = None
    log_probs: list[Tensor] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    sampled: list[list[str]] = field(default_factory=list)


class Batch:
    """Some samples of one task, prepared for a model.

    Args:
        model: in eval mode.
        processor: of the model.
        samples: at least one.
        plan: what is measured.

    Raises:
        LoadError: a picture cannot be read.
    """

    def __init__(self, model: Any, processor: Any, samples: Sequence[Sample], plan: Plan):
        self.model, self.samples, self.plan = model, samples, plan
        self._tokenizer = getattr(processor, "tokenizer", processor)
        requests = [(sample.prompt, list(sample.pictures())) for sample in samples]
        self.inputs = prepare(processor, requests, model.device)
        self.answers = [_answer_ids(processor, sample) for sample in samples]
        mask = self.inputs.get("attention_mask", torch.ones_like(self.inputs["input_ids"]))
        self._lengths: list[int] = mask.sum(1).tolist()
        eos = model.generation_config.eos_token_id
        self._eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        pad = model.generation_config.pad_token_id
        self._pad: int = pad if pad is not None else self._eos[0] if self._eos else 0
        self._full: _Run | None = None

    def full(self) -> list[Row]:
        """Measure the full cache, and the noise: two sampled runs of it, compared with each other."""
        run = self._full = self._run(Method(FULL, FULL, {}).make(self.model, 1.0), reference=None)
        rows = self._rows(FULL, 1.0, run, run)
        if not run.sampled:
            return rows
        blank = {name: None for name in rows[0]}
        shared = ("sample", "task", "kind", "prompt_tokens", "answer_tokens")
        return rows + [
            {**blank, **{name: row[name] for name in shared}, "method": NOISE, "budget": 1.0, "text": one,
             "rouge_l": rouge_l(other, one)}
            for row, one, other in zip(rows, *run.sampled, strict=True)
        ]  # fmt: skip

    def method(self, method: Method, budget: float) -> list[Row]:
        """Measure one method; `full()` comes before."""
        if self._full is None:
            self.full()
        assert self._full is not None
        run = self._run(method.make(self.model, budget, self.inputs), reference=self._full)
        return self._rows(method.name, budget, run, self._full)

    def _run(self, cache: Cache, reference: _Run | None) -> _Run:
        loop = TokenLoop(self.model, self.inputs, cache, shift_positions=self.plan.shift_positions)
        rows, device = len(self.samples), loop.real.device
        limit = max(sample.limit for sample in self.samples)
        forced = greedy = None
        if self.plan.forced:
            against = reference.log_probs if reference is not None and "kl" in self.plan.metrics else None
            keep = reference is None and "kl" in self.plan.metrics
            forced = Forced(self.answers, self._pad, keep=keep, reference=against, device=device)
        if self.plan.free:
            greedy = Greedy(rows, limit, self._eos, self._pad, device)
        sampled = []
        if reference is None and "rouge" in self.plan.metrics:
            seeds = [_seed(self.plan.seed, run, self.samples[0].id) for run in range(2)]
            sampled = [Sampled(seed, rows, limit, self._eos, self._pad, device) for seed in seeds]
        writers = [writer for writer in (forced, greedy, *sampled) if writer is not None]

        result = _Run(torch.zeros(0), torch.zeros(rows, dtype=torch.float64), 0)

        def after_prompt() -> None:
            result.kept = loop.kept().cpu()
            result.nbytes = round(cache_bytes(cache) / rows)

        def rows_ended(new: Tensor) -> None:
            result.kept_end[new.cpu()] = loop.kept()[:: len(writers) if len(loop.real) > rows else 1][new].cpu()

        write(loop, writers, after_prompt=after_prompt, rows_ended=rows_ended)
        if forced is not None:
            result.nll, result.log_probs = forced.nll.tolist(), forced.log_probs
            if "kl" in self.plan.metrics:
                result.kl = (forced.kl / forced.lengths).tolist()
        if greedy is not None:
            result.tokens, result.texts = greedy.texts, self._decode(greedy)
        result.sampled = [self._decode(each) for each in sampled]
        return result

    def _decode(self, writer: Greedy) -> list[str]:
        texts = self._tokenizer.batch_decode(writer.texts, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _rows(self, method: str, budget: float, run: _Run, full: _Run) -> list[Row]:
        rows = []
        for index, sample in enumerate(self.samples):
            row: Row = {
                "sample": sample.id, "task": sample.task, "kind": sample.kind, "method": method, "budget": budget,
                "prompt_tokens": self._lengths[index], "answer_tokens": len(self.answers[index]),
                "nll": None, "kl": None, "first_diff": None, "rouge_l": None, "accuracy": None,
                "kept": run.kept[index].item(), "kept_end": run.kept_end[index].item(), "nbytes": run.nbytes,
                "text": None,
            }  # fmt: skip
            if run.nll is not None and "ppl" in self.plan.metrics:
                row["nll"] = run.nll[index]
            if run.kl is not None:
                row["kl"] = run.kl[index]
            if self.plan.free:
                row["text"] = run.texts[index]
                row["first_diff"] = first_difference(run.tokens[index], full.tokens[index])
            if "rouge" in self.plan.metrics:
                row["rouge_l"] = rouge_l(run.texts[index], full.texts[index])
            if "accuracy" in self.plan.metrics and sample.answer is not None:
                row["accuracy"] = sample.accuracy(run.texts[index])
            rows.append(row)
        return rows


def check_samples(samples: Sequence[Sample], plan: Plan) -> None:
    """Refuse samples without the answers that the metrics need, before a model is loaded.

    Raises:
        ValueError: says which.
    """
    needed = [metric for metric in plan.metrics if metric in ("ppl", "kl", "accuracy")]
    missing = [sample.id for sample in samples if not sample.answer]
    if needed and missing:
        raise ValueError(
            f"{len(missing)} of {len(samples)} samples, such as {missing[0]!r}, have no reference answer, which "
            f"{', '.join(needed)} need; take --metrics rouge, or other data"
        )


def check_answers(model: Any, processor: Any, batches: Sequence[Sequence[Sample]], plan: Plan) -> None:
    """Refuse what would stop a run in its middle: answers without tokens, and distributions that would not fit.

    Raises:
        LoadError, ValueError: says which.
    """
    if not plan.forced:
        return
    tokens = max(sum(len(_answer_ids(processor, sample)) for sample in batch) for batch in batches)
    needed = tokens * model.config.get_text_config(decoder=True).vocab_size * 4
    if "kl" in plan.metrics and needed > MAX_REFERENCE_BYTES:
        raise ValueError(
            f"the full cache's distributions over the answers of one batch take {needed / 2**30:.1f} GiB of CPU "
            f"memory, more than {MAX_REFERENCE_BYTES / 2**30:.0f}; take a smaller --batch-size, or leave kl out of "
            "--metrics"
        )


def _answer_ids(processor: Any, sample: Sample) -> list[int]:
    if sample.answer is None:
        return []
    return answer_ids(processor, sample.prompt, sample.answer, sample.n_pictures)


def _seed(seed: int, run: int, sample: str) -> int:
    """A seed of its own for each batch and run, the same however the batches are spread."""
    return int.from_bytes(hashlib.sha256(f"{seed} {run} {sample}".encode()).digest()[:7], "big")
