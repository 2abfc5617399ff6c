"""One drawing for each task and figure: the figure by what was really kept, a line for each method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import NOISE
from .methods import FULL
from .report import FIGURES, Figure, Task

_MARKERS = "osD^v<>Pp*Xhd8"


def have_matplotlib() -> bool:
    """Whether drawings can be made."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def draw_all(tasks: Sequence[Task], folder: Path) -> list[Path]:
    """Draw every figure that was measured; returns the pictures."""
    from matplotlib.figure import Figure as Canvas

    paths = []
    for task in tasks:
        for figure in (figure for figure in FIGURES if task.has(figure)):
            canvas = Canvas(figsize=(8.5, 4.6), layout="constrained")
            _draw(canvas.subplots(), task, figure)
            paths.append(folder / f"{_plain(task.name)}-{figure.key}.png")
            canvas.savefig(paths[-1], dpi=120)
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
            linewidth=1.2, color=f"C{number}" if len(task.methods) <= 10 else _colour(number),
        )  # fmt: skip
    if figure.key in ("ppl", "accuracy"):
        full = figure.estimate(task.cells[FULL, 1.0], task.bootstrap)
        axes.axhline(full.value, color="0.3", linewidth=1, linestyle="--", label="full cache")
        axes.axhspan(full.low, full.high, color="0.3", alpha=0.1, linewidth=0)
    if figure.key == "rouge" and (NOISE, 1.0) in task.cells:
        noise = figure.estimate(task.cells[NOISE, 1.0], task.bootstrap)
        axes.axhline(noise.value, color="0.3", linewidth=1, linestyle=":", label="noise (two sampled full runs)")
    if figure.key == "ppl":
        axes.set_yscale("log")
    if figure.key == "kl":
        axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_title(f"{task.name} ({len(task.cells[FULL, 1.0])} samples)", fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel("fraction of the prompt's pairs kept, as measured")
    axes.set_ylabel(figure.title, fontsize=8)
    axes.grid(True, linewidth=0.4, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _colour(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](number % 20)


def _plain(name: str) -> str:
    """A name that is safe in a file's name."""
    return re.sub(r"[^\w.-]+", "-", name) or "task"
