"""One drawing for each task: every figure by what was held after the prompt, a line for each method."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import write_out
from .report import Figure, Task

_MARKERS = "osD^v<>Pp*Xhd8"


def have_matplotlib() -> bool:
    """Whether drawings can be made."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def draw_all(tasks: Sequence[Task], folder: Path) -> list[Path]:
    """Draw every task; returns the pictures."""
    from matplotlib.figure import Figure as Canvas

    paths = []
    for task in tasks:
        figures = task.figures
        canvas = Canvas(figsize=(15, 4.2 * -(-len(figures) // 3)), layout="constrained")
        panels = canvas.subplots(-(-len(figures) // 3), 3, squeeze=False).flatten()
        for axes, figure in zip(panels, figures, strict=False):
            _draw(axes, task, figure)
        for axes in panels[len(figures) :]:
            axes.set_axis_off()
        canvas.suptitle(f"{task.name} ({len(task.full)} samples)", fontsize=10, parse_math=False)
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
        paths.append(folder / ((re.sub(r"[^\w.-]+", "-", task.name) or "task") + ".png"))
        picture = io.BytesIO()
        canvas.savefig(picture, dpi=120, format="png")
        write_out(paths[-1], picture.getvalue())
    return paths


def _draw(axes: Any, task: Task, figure: Figure) -> None:
    for number, method in enumerate(task.methods):
        points = []
        for budget in task.budgets:
            rows = task.cells[method, budget]
            kept = sum(row["kept"] for row in rows) / len(rows)
            points.append((kept, *figure.estimate(rows, task.bootstrap)))
        across, values, lows, highs = zip(*sorted(points), strict=True)
        errors = [
            [max(value - low, 0) for value, low in zip(values, lows, strict=True)],
            [max(high - value, 0) for value, high in zip(values, highs, strict=True)],
        ]
        axes.errorbar(
            across, values, errors, label=method, marker=_MARKERS[number % len(_MARKERS)], markersize=4, capsize=2,
            linewidth=1.2, color=f"C{number % 10}", linestyle="-" if number < 10 else "--",
        )  # fmt: skip
    full = figure.estimate(task.full, task.bootstrap)
    axes.axhline(full.value, color="0.3", linewidth=1, linestyle=":", label="full cache")
    if figure.key == "ppl":
        axes.set_yscale("log")
    if figure.key == "kl":
        axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_xlabel("share of the prompt's pairs held")
    axes.set_ylabel(figure.title, fontsize=8)
    axes.grid(True, linewidth=0.4, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
