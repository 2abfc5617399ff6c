"""The smallest budget that keeps the answers of a model, measured: `prefixkv recommend`.

What is asked, and how it is measured, is that of `prefixkv evaluate`; here are one cache, several budgets, the choice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...cache.cache import PrefixKVCache
from ...calibration.processes import Processes, Report
from ..arguments import cache_options, load, say_budget
from .measure import Batch, Row, check_memory
from .methods import Candidate
from .run import batches_of
from .tasks import Sample, read_samples


@dataclass(frozen=True)
class Cost:
    """What a budget costs.

    Attributes:
        budget: fraction kept, or pairs a head.
        lost: how many of the right answers went wrong, or of the answers' tokens changed.
        of: how many there were.
        same: share of the generated texts that are the full cache's, token by token.
        prompt_bytes, end_bytes: KV bytes at the prompt's end and at the answer's, as shares of the full cache's.
    """

    budget: float | int
    lost: int
    of: int
    same: float
    prompt_bytes: float
    end_bytes: float

    @property
    def loss(self) -> float:
        """The share that was lost."""
        return self.lost / self.of


def run_recommend(arguments: argparse.Namespace) -> None:
    """The command: a table and the recommended budget on standard output. Bad input fails before the model is loaded.

    Raises:
        TypeError, ValueError, OSError: bad input, in one line.
    """
    options = cache_options(arguments)
    samples = read_samples(arguments)
    batches = batches_of(samples, arguments.batch_size)
    print(f"loading {arguments.model}", file=sys.stderr)
    model, processor = load(arguments)
    check_memory(model, processor, batches)
    cache = PrefixKVCache.for_model(model, **options)
    candidate = Candidate(cache.method.spell(), cache.method, cache.profile)
    full, pruned = measure_budgets(model, processor, batches, candidate, arguments.budgets)
    counts = counted(full)
    found = [cost_of(budget, full, rows, counts) for budget, rows in pruned.items()]
    print(f"{len(samples)} samples; method {candidate.name}, {'a profile' if cache.profile else 'no profile'}")
    print("\n".join(table(found, counts)))
    print(say(found, arguments.max_loss, counts))


def measure_budgets(
    model: Any,
    processor: Any,
    batches: Sequence[Sequence[Sample]],
    candidate: Candidate,
    budgets: Sequence[float | int],
) -> tuple[list[Row], dict[float | int, list[Row]]]:
    """The rows of the full cache, and those of each budget, largest first, in the order of the samples."""
    full: list[Row] = []
    pruned: dict[float | int, list[Row]] = {budget: [] for budget in sorted(set(budgets), key=_falling)}
    total = sum(map(len, batches)) * (1 + len(pruned))
    with Report(Processes(), "measuring").bar(total, "answer") as progress:
        done = 0
        for samples in batches:
            batch = Batch(model, processor, samples)
            for budget in (None, *pruned):
                batch.progress = lambda ended, done=done: progress(done + ended)
                rows = batch.full() if budget is None else batch.candidate(candidate, budget)
                (full if budget is None else pruned[budget]).extend(rows)
                progress(done := done + len(samples))
    return full, pruned


def _falling(budget: float | int) -> tuple[bool, float]:
    """Fractions first, the largest first; then numbers of pairs."""
    return isinstance(budget, int), -budget


def counted(full: Sequence[Row]) -> str:
    """What a loss is counted in: `answers`, where the full cache gives right ones, else `tokens`."""
    return "answers" if any(row["right"] for row in full) else "tokens"


def cost_of(budget: float | int, full: Sequence[Row], rows: Sequence[Row], counts: str) -> Cost:
    """What a budget costs: of what the full cache got right, or says, the part that is lost."""
    if counts == "answers":
        pairs = [(row, own) for row, own in zip(full, rows, strict=True) if row["right"]]
        lost, of = sum(not own["right"] for _, own in pairs), len(pairs)
    else:
        of = sum(row["answer_tokens"] for row in rows)
        lost = of - sum(row["agree"] for row in rows)
    shares = [_sum(rows, name) / _sum(full, name) for name in ("nbytes", "nbytes_end")]
    return Cost(budget, lost, of, _sum(rows, "same") / len(rows), *shares)


def _sum(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows)


def table(costs: Sequence[Cost], counts: str) -> list[str]:
    """A line for each budget."""
    heads = ("budget", f"{counts} lost", "same text", "KV, prompt", "KV, answer")
    rows = [
        (say_budget(each.budget), f"{each.lost} of {each.of}", f"{each.same:.0%}", f"{each.prompt_bytes:.0%}",
         f"{each.end_bytes:.0%}")
        for each in costs
    ]  # fmt: skip
    return ["".join(f"{cell:>14}" for cell in row) for row in (heads, *rows)]


def chosen(costs: Sequence[Cost], max_loss: float) -> Cost | None:
    """The smallest budget that loses no more, as no larger one does; None: the largest loses more.

    Args:
        costs: by falling budget.
        max_loss: the share that may be lost.
    """
    kept = None
    for each in costs:
        if each.loss > max_loss:
            break
        kept = each
    return kept


def say(costs: Sequence[Cost], max_loss: float, counts: str) -> str:
    """The recommendation, and how sure it can be."""
    found, of = chosen(costs, max_loss), costs[0].of
    few = f" With {of} {counts}, a loss below {1 / of:.1%} cannot be seen: give more --samples."
    unsure = few if of * max_loss < 1 else ""
    if found is None:
        largest = costs[0]
        return (
            f"none of these budgets: even {say_budget(largest.budget)} loses {largest.loss:.1%} of the {counts}, and "
            f"{max_loss:.1%} is allowed. Use the full cache, or another --method or --profile.{unsure}"
        )
    return (
        f"recommended: budget={found.budget!r}. It loses {found.loss:.1%} of the {counts}, and {max_loss:.1%} is "
        f"allowed. KV bytes: {found.prompt_bytes:.0%} of the full cache's at the prompt's end, {found.end_bytes:.0%} "
        f"at the answer's.{unsure}"
    )
