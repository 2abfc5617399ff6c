"""From the rows of all units to what a person reads: a CSV with all of it, and a summary in Markdown.

Looks at rows only; knows no model. The drawings are in plots.py.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .measure import Row
from .methods import FULL
from .statistics import Bootstrap, Estimate, estimate

COLUMNS = (
    "sample", "task", "kind", "method", "budget", "prompt_tokens", "answer_tokens", "nll", "ppl", "kl", "agree", "same",
    "first_diff", "right", "there", "stated", "hits", "pairs", "pairs_end", "kept", "kept_end", "nbytes",
    "nbytes_end",
)  # fmt: skip
TOLERANCE = 0.005
"""Methods are compared at the same number of pairs: as far as this from the budget, as a share of it."""

_INTRODUCTION = """\
Each table is for one budget. *Held* is what a key head held on average, in pairs and as a share of the full cache at
that moment: when the prompt was pruned, and when the answer ended; `!` where the first is off the budget by more than
0.5 %. In brackets: 95 % bootstrap intervals over the samples. The lower table gives paired differences (log perplexity
for ppl), with `*` where the interval leaves out 0."""


@dataclass(frozen=True)
class Figure:
    """Something that is summed up over the samples of a task, as a ratio of two sums.

    Attributes:
        key: short name, the head of its column.
        title: what it is.
        sums: column above the line.
        weights: column below it; None: the number of samples.
        digits: after the decimal point.
    """

    key: str
    title: str
    sums: str
    weights: str | None = None
    digits: int = 3

    def values(self, rows: Sequence[Row], bootstrap: Bootstrap) -> np.ndarray:
        """See `Bootstrap.ratio`; perplexity as its logarithm."""
        weights = np.ones(len(rows)) if self.weights is None else _column(rows, self.weights)
        return bootstrap.ratio(_column(rows, self.sums), weights)

    def estimate(self, rows: Sequence[Row], bootstrap: Bootstrap) -> Estimate:
        """Over rows of one task, method and budget."""
        found = estimate(self.values(rows, bootstrap))
        return found if self.key != "ppl" else Estimate(*(math.exp(min(each, 709.0)) for each in found))


FIGURES = (
    Figure("kl", "KL divergence from the full cache, nats a token", "kl", digits=4),
    Figure("ppl", "perplexity of the answers", "nll", "answer_tokens"),
    Figure("tokens", "share of the tokens that both caches hold most likely", "agree", "answer_tokens"),
    Figure("agreement", "share of texts equal to the full cache's", "same"),
    Figure("right", "share of answers that are right as a whole", "right"),
    Figure("precision", "share of the stated objects that are there", "hits", "stated"),
    Figure("recall", "share of the objects there that are stated", "hits", "there"),
)


@dataclass(frozen=True)
class Task:
    """The rows of one task, by method and budget, each in the order of the samples."""

    name: str
    cells: dict[tuple[str, float], list[Row]]
    bootstrap: Bootstrap
    methods: tuple[str, ...]
    budgets: tuple[float, ...]

    @property
    def full(self) -> list[Row]:
        """The full cache's rows."""
        return self.cells[FULL, 1.0]

    @property
    def figures(self) -> list[Figure]:
        """Those that were measured of every sample."""
        return [each for each in FIGURES if all(row[each.sums] is not None for row in self.full)]


def tasks_of(rows: Iterable[Row], methods: Sequence[str], budgets: Sequence[float], seed: int) -> list[Task]:
    """Sort rows into tasks, in the order in which they come."""
    found: dict[str, dict[tuple[str, float], list[Row]]] = {}
    for row in rows:
        found.setdefault(row["task"], {}).setdefault((row["method"], row["budget"]), []).append(row)
    return [
        Task(name, cells, Bootstrap(len(cells[FULL, 1.0]), seed), tuple(methods), tuple(budgets))
        for name, cells in found.items()
    ]


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], np.float64)


# The table of all rows.


def csv_text(rows: Iterable[Row]) -> str:
    """All rows as CSV. Numbers with six digits after the point, nothing where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        mean = row["nll"] / row["answer_tokens"]
        with_ppl = {**row, "ppl": math.exp(mean) if mean <= 709.0 else math.inf}
        writer.writerow([_cell(column, with_ppl[column]) for column in COLUMNS])
    return text.getvalue()


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "budget":
        return say_budget(value)
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def say_budget(budget: float) -> str:
    """A fraction as such, a number of pairs as a whole number."""
    return str(budget) if isinstance(budget, int) else f"{budget:g}"


# The summary.


def summary_text(tasks: Sequence[Task], reference: str, title: str) -> str:
    """For each task and budget all figures with 95 % intervals, what was held, and paired differences; Markdown."""
    parts = [f"# {title}", _INTRODUCTION]
    parts.append("\n".join(f"- **{figure.key}**: {figure.title}" for figure in FIGURES))
    for task in tasks:
        tokens = _column(task.full, "prompt_tokens").mean()
        parts.append(f"## {task.name} ({len(task.full)} samples, {tokens:.0f} tokens a prompt)")
        for budget in task.budgets:
            parts += [f"### {say_budget(budget)}{' pairs' if isinstance(budget, int) else ''}"]
            parts += [_values_table(task, budget)]
            others = [method for method in task.methods if method != reference]
            if others:
                parts += [f"minus `{reference}`:", _paired_table(task, budget, reference, others)]
    return "\n\n".join(parts) + "\n"


def _values_table(task: Task, budget: float) -> str:
    def line(rows: Sequence[Row]) -> list[str]:
        figures = [_show(figure.estimate(rows, task.bootstrap), figure.digits) for figure in task.figures]
        return [_held(rows, ""), _held(rows, "_end"), *figures]

    lines = {"full cache": line(task.full)}
    lines |= {f"`{method}`": line(task.cells[method, budget]) for method in task.methods}
    return _table(["held", "held at the end", *(figure.key for figure in task.figures)], lines)


def _paired_table(task: Task, budget: float, reference: str, others: Sequence[str]) -> str:
    def cell(figure: Figure, method: str) -> str:
        own, other = (figure.values(task.cells[each, budget], task.bootstrap) for each in (method, reference))
        found = estimate(own - other)
        low, high = round(found.low, figure.digits), round(found.high, figure.digits)
        return _show(found, figure.digits) + (" *" if low > 0 or high < 0 else "")

    lines = {f"`{method}`": [cell(figure, method) for figure in task.figures] for method in others}
    return _table([figure.key for figure in task.figures], lines)


def _held(rows: Sequence[Row], when: str) -> str:
    """Pairs and share of the full cache, marked where it is not what the budget says."""
    share = _column(rows, f"kept{when}").mean()
    told = f"{_column(rows, f'pairs{when}').mean():.1f} ({share:.1%})"
    asked: Callable[[Row], float] = lambda row: min(  # noqa: E731
        1.0, row["budget"] / row["prompt_tokens"] if isinstance(row["budget"], int) else row["budget"]
    )
    off = share / np.mean([asked(row) for row in rows]) - 1
    return told + (" !" if not when and abs(off) > TOLERANCE else "")


def _table(heads: Sequence[str], lines: dict[str, list[str]]) -> str:
    rows = [["method", *heads], ["---"] * (len(heads) + 1), *([name, *cells] for name, cells in lines.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _show(found: Estimate, digits: int) -> str:
    if math.isnan(found.value):
        return "none"
    value, low, high = (_number(each, digits) for each in found)
    return f"{value} [{low}, {high}]"


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"
