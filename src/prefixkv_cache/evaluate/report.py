"""From the rows of all units to what a person reads: a CSV with all of it, and a summary in Markdown.

Looks at rows only; knows no model. The drawing is in plots.py.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .measure import NOISE, Row
from .methods import FULL
from .statistics import Bootstrap, Estimate, exponential

COLUMNS = (
    "sample", "task", "kind", "method", "budget", "prompt_tokens", "answer_tokens", "nll", "ppl", "kl", "first_diff",
    "rouge_l", "accuracy", "kept", "kept_end", "nbytes",
)  # fmt: skip
TOLERANCE = 0.005
"""Methods are compared at the same number of pairs: as far as this from the budget, as a share of it."""


@dataclass(frozen=True)
class Figure:
    """Something that is summed up over the samples of a task.

    Attributes:
        key: short name, for files.
        title: what a table of it is called.
        column: of the rows.
        difference: what the paired difference of two methods is called.
        digits: after the decimal point.
    """

    key: str
    title: str
    column: str
    difference: str
    digits: int = 3

    def estimate(self, rows: Sequence[Row], bootstrap: Bootstrap) -> Estimate:
        """Over rows of one task, method and budget."""
        if self.key == "ppl":
            return exponential(bootstrap.ratio(_values(rows, "nll"), _values(rows, "answer_tokens")))
        return bootstrap.mean(_values(rows, self.column))

    def paired(self, rows: Sequence[Row], others: Sequence[Row], bootstrap: Bootstrap) -> Estimate:
        """Rows minus other rows of the same samples."""
        difference = _values(rows, self.column) - _values(others, self.column)
        if self.key == "ppl":
            return bootstrap.ratio(difference, _values(rows, "answer_tokens"))
        return bootstrap.mean(difference)


FIGURES = (
    Figure("ppl", "Perplexity of the reference answers", "nll", "log perplexity (nats a token)"),
    Figure("kl", "KL divergence from the full cache (nats a token)", "kl", "KL divergence (nats a token)", 4),
    Figure("rouge", "ROUGE-L against the full cache's text", "rouge_l", "ROUGE-L"),
    Figure("accuracy", "Accuracy", "accuracy", "accuracy"),
    Figure("same", "Share of texts equal to the full cache's, token by token", "same", "share of equal texts"),
)


@dataclass(frozen=True)
class Task:
    """The rows of one task, by method and budget, each in the order of the samples."""

    name: str
    cells: dict[tuple[str, float], list[Row]]
    bootstrap: Bootstrap
    methods: tuple[str, ...]
    budgets: tuple[float, ...]

    def has(self, figure: Figure) -> bool:
        """Whether this was measured."""
        return all(row[figure.column] is not None for row in self.cells[FULL, 1.0])


def tasks_of(rows: Iterable[Row], methods: Sequence[str], budgets: Sequence[float], seed: int) -> list[Task]:
    """Sort rows into tasks, in the order in which they come."""
    found: dict[str, dict[tuple[str, float], list[Row]]] = {}
    for row in rows:
        # What is no number of its own: whether the text is the full cache's, where there is a text.
        same = None if row["rouge_l"] is None and row["accuracy"] is None else float(row["first_diff"] is None)
        cell = found.setdefault(row["task"], {}).setdefault((row["method"], row["budget"]), [])
        cell.append({**row, "same": same})
    return [
        Task(name, cells, Bootstrap(len(cells[FULL, 1.0]), seed), tuple(methods), tuple(budgets))
        for name, cells in found.items()
    ]


def _values(rows: Sequence[Row], column: str) -> np.ndarray:
    return np.array([row[column] for row in rows], np.float64)


# The table of all rows.


def csv_text(rows: Iterable[Row]) -> str:
    """All rows as CSV. Numbers with six digits after the point, nothing where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_cell(column, {**row, "ppl": _perplexity(row)}[column]) for column in COLUMNS])
    return text.getvalue()


def _perplexity(row: Row) -> float | None:
    if row["nll"] is None:
        return None
    mean = row["nll"] / row["answer_tokens"]
    return math.exp(mean) if mean <= 709.0 else math.inf


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "budget":
        return f"{value:g}"
    return f"{value:.6f}" if isinstance(value, float) else str(value)


# The summary.


def summary_text(tasks: Sequence[Task], reference: str, *, title: str, as_published: bool) -> str:
    """Tables of all figures in Markdown: means with 95 % intervals, paired differences, and what was really kept."""
    parts = [
        f"# {title}",
        "Means over samples with 95 % bootstrap intervals in brackets. Columns are budgets: the fraction of the "
        "prompt's KV pairs kept. Every method sees the same prompts.",
    ]
    if as_published:
        parts.append("**As published**: with the positions, and the rules, of the papers' own code.")
    for task in tasks:
        parts.append(f"## {task.name} ({len(task.cells[FULL, 1.0])} samples)")
        for figure in FIGURES:
            if task.has(figure):
                parts += _figure_parts(task, figure, reference)
        parts += _kept_parts(task)
    return "\n\n".join(parts) + "\n"


def _figure_parts(task: Task, figure: Figure, reference: str) -> list[str]:
    parts = [f"### {figure.title}"]
    if figure.key != "same":
        full = figure.estimate(task.cells[FULL, 1.0], task.bootstrap)
        lines = [f"full cache: {_show(full, figure.digits)}"]
        if figure.key == "rouge" and (NOISE, 1.0) in task.cells:
            noise = figure.estimate(task.cells[NOISE, 1.0], task.bootstrap)
            lines.append(f"noise (two sampled runs of the full cache, one against the other): {_show(noise, 3)}")
        parts.append("; ".join(lines))
    cells = {cell: figure.estimate(rows, task.bootstrap) for cell, rows in _pruned(task)}
    parts.append(_table(task, {cell: _show(each, figure.digits) for cell, each in cells.items()}, task.methods))
    others = [method for method in task.methods if method != reference]
    if reference in task.methods and others:
        paired = {
            (method, budget): figure.paired(rows, task.cells[reference, budget], task.bootstrap)
            for (method, budget), rows in _pruned(task)
        }
        parts.append(f"Paired difference of {figure.difference} from `{reference}`; * where the interval leaves out 0:")
        shown = {cell: _show(each, figure.digits) + _star(each, figure.digits) for cell, each in paired.items()}
        parts.append(_table(task, shown, others))
    return parts


def _pruned(task: Task) -> list[tuple[tuple[str, float], list[Row]]]:
    return [((method, budget), task.cells[method, budget]) for method in task.methods for budget in task.budgets]


def _kept_parts(task: Task) -> list[str]:
    """What was really kept, and whether that is fair."""
    cells = {}
    unfair = []
    for (method, budget), rows in _pruned(task):
        kept = float(_values(rows, "kept").mean())
        off = kept / budget - 1
        fair = abs(off) <= TOLERANCE
        cells[method, budget] = f"{kept:.4f} ({off:+.1%})" + ("" if fair else " !")
        if not fair:
            unfair.append(f"`{method}` at {budget:g} ({off:+.1%})")
    tokens = float(_values(task.cells[FULL, 1.0], "prompt_tokens").mean())
    least = 1 / (tokens * min(task.budgets))
    verdict = (
        f"All methods hold what the budget says, within {TOLERANCE:.1%}."
        if not unfair
        else f"Off by more than {TOLERANCE:.1%}: {', '.join(unfair)}. A prompt has {tokens:.0f} tokens on average, so "
        f"one pair in each layer is {least:.1%} of the smallest budget."
    )
    return [
        "### Pairs kept",
        "Fraction of the prompt's pairs held right after the prompt, as measured, and how far that is from the budget.",
        _table(task, cells, task.methods),
        verdict,
        "Fraction held at the end of the answer, and bytes of keys and values for each row after the prompt (full "
        f"cache: {_values(task.cells[FULL, 1.0], 'nbytes').mean():.0f}):",
        _table(
            task,
            {
                cell: f"{_values(rows, 'kept_end').mean():.4f}, {_values(rows, 'nbytes').mean():.0f}"
                for cell, rows in _pruned(task)
            },
            task.methods,
        ),
    ]


def _table(task: Task, cells: dict[tuple[str, float], str], methods: Sequence[str]) -> str:
    lines = ["| method | " + " | ".join(f"{budget:g}" for budget in task.budgets) + " |"]
    lines.append("| --- |" + " --- |" * len(task.budgets))
    for method in methods:
        lines.append(f"| `{method}` | " + " | ".join(cells[method, budget] for budget in task.budgets) + " |")
    return "\n".join(lines)


def _show(estimate: Estimate, digits: int) -> str:
    value, low, high = (_number(each, digits) for each in estimate)
    return f"{value} [{low}, {high}]"


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"


def _star(estimate: Estimate, digits: int) -> str:
    """Marks a difference, if it is one in the digits that are shown."""
    return "" if round(estimate.low, digits) <= 0 <= round(estimate.high, digits) else " *"
