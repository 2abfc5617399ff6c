"""What one sample gives a calibration: the tables that proposals are made of, and what candidates cost on it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache.guards import image_mask_of
from ..methods import PREFIXKV, Method
from ..profiles.profile import PrefixProfile
from .measure import ANSWER_TOKENS, AnsweredPrompt
from .observe import observe
from .plan import MEASURED, PAPER, Candidate, Plan, Row
from .propose import LOSS_RATIOS, mass_counts, reconstruction_counts

MOST_HEADS_ALONE = 64
"""Models with more key heads are not asked what each of them costs alone, unless that is all that was asked for.

It would take longer than everything else, and where many heads stand in for each other it says little.
"""


def find(model: Any, plan: Plan, sample: Mapping[str, Any]) -> list[Row]:
    """The tables of each row of a sample that proposals are made of."""
    names = plan.proposals
    if names == ("mass/layer",):
        rows = observe(model, sample, plan.method, max_bytes=plan.max_bytes)
        return [as_row(row.shape[1], {names[0]: mass_counts(row[:, None], plan.budgets, plan.sink)}) for row in rows]
    prompt = answered(model, plan, sample, [plan.method, *([PREFIXKV] if PAPER in names else [])])
    tables: dict[str, list[Tensor]] = {}
    for name in names:
        by, _, unit = name.partition("/")
        if by in ("mass", PAPER):
            scores = prompt.rows_of_scores(PREFIXKV if by == PAPER else plan.method)
            scores = scores if unit == "head" else [each.mean(1, keepdim=True) for each in scores]
            tables[name] = [mass_counts(each, plan.budgets, plan.sink) for each in scores]
        elif by == "loss":
            if plan.is_measured and unit == "head" and math.prod(prompt.n_layers_and_heads) > MOST_HEADS_ALONE:
                continue
            tables[name] = prompt.losses(plan.method, LOSS_RATIOS, unit)
        elif (scores := _reconstruction(prompt, plan)) is not None:
            tables[name] = [reconstruction_counts(each, plan.budgets, plan.sink, unit) for each in scores]
    return _rows(prompt, tables)


def answered(
    model: Any, plan: Plan, sample: Mapping[str, Any], methods: Sequence[Method], answer: Tensor | None = None
) -> AnsweredPrompt:
    """A sample with its full cache and the model's own answer, its keys scored by these methods.

    Args:
        answer: int64 [batch, n_answer], where an earlier look has found it.
    """
    image = image_mask_of(sample, model.config) if isinstance(sample, Mapping) else None
    tokens = ANSWER_TOKENS if plan.by in (MEASURED, "loss") else 2
    options: dict[str, Any] = {"max_bytes": plan.max_bytes, "answer_tokens": tokens, "answer": answer}
    return AnsweredPrompt(model, sample, methods, image=image, **options)


def _rows(prompt: AnsweredPrompt, tables: Mapping[str, Sequence[Tensor]]) -> list[Row]:
    """The tables [rows] of a sample, row by row."""
    return [
        as_row(n_tokens, {name: of_rows[row] for name, of_rows in tables.items()})
        for row, n_tokens in enumerate(prompt.n_tokens)
    ]


def as_row(n_tokens: int, tables: Mapping[str, Tensor]) -> Row:
    """What is kept of one row of a sample."""
    return {"n_tokens": n_tokens, "tables": {name: each.tolist() for name, each in tables.items()}}


def _reconstruction(prompt: AnsweredPrompt, plan: Plan) -> list[Tensor] | None:
    """The scores of a second pass; None, and a warning, where there are other proposals and the model cannot do it."""
    try:
        return prompt.reconstruction()
    except Exception as error:
        if not plan.is_measured or is_out_of_memory(error):
            raise
        warnings.warn(f"reconstruction is left out: {describe_error(error)}", stacklevel=2)
        return None


def weigh(
    model: Any, plan: Plan, candidates: Mapping[str, Candidate], budgets: Sequence[float], sample: Mapping[str, Any]
) -> list[Row]:
    """What all candidates cost in each row of a sample: [divergence, agreement, exact, later] at these budgets."""
    prompt = answered(model, plan, sample, [each.method for each in candidates.values()])
    kept = []
    for each in candidates.values():
        profile = PrefixProfile(list(plan.budgets), each.keep.expand(-1, len(prompt.layers), -1))
        kept += [prompt.kept(each.method, profile, budget) for budget in budgets]
    # [batch, n_candidates * n_budgets, 4]
    costs = torch.stack([cost.table() for cost in prompt.costs(kept, later=True)], dim=1)
    of_each = zip(candidates, costs.split(len(budgets), dim=1), strict=True)
    return _rows(prompt, {name: list(rows) for name, rows in of_each})


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out."""
    # On a CPU, torch has no class of its own for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def describe_error(error: BaseException) -> str:
    """One line: the message, with the kind of the error where the message alone would say little."""
    message = " ".join(str(error).split())
    known = isinstance(error, (ValueError, RuntimeError, OSError)) and message
    return message if known else f"{type(error).__name__}: {message}".rstrip(": ")
