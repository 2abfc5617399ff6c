"""Profiles for human eyes: a table (`prefixkv inspect`) and a drawing (`prefixkv plot`).

Looks at a profile and changes nothing. matplotlib is imported only to draw: it comes with the `plot` extra.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .calibrated_for import calibrated_ranking, spell_cache, spell_ranking
from .profile import MAX_FALL, MAX_MEAN_ERROR, PrefixProfile, check_budget

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def describe_profile(profile: PrefixProfile, budgets: Sequence[float] | None = None) -> str:
    """Metadata, keep ratios of all layers by budget, and how well the profile obeys the rules of the format.

    Args:
        profile: any.
        budgets: columns of the table, fractions kept; None: the profile's own grid.

    Returns:
        Lines of text.

    Raises:
        TypeError, ValueError: one of the budgets is not in (0, 1].
    """
    columns = _budgets(profile, budgets)
    parts = [_metadata_lines(profile), _table_lines(profile, columns), _check_lines(profile)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def read_spread(profile: PrefixProfile) -> list[list[float]] | None:
    """The standard deviation over the samples of each keep ratio, [n_budgets][n_layers]; None if there is none.

    Profiles made elsewhere may say anything under this name: what is not such a table counts as none.
    """
    try:
        spread = json.loads(profile.metadata.get("spread", ""))
        rows = [[float(value) for value in row] for row in spread]
    except (ValueError, TypeError, RecursionError, OverflowError):
        return None
    fits = [len(row) for row in rows] == [profile.n_layers] * len(profile.budgets)
    return rows if fits and all(0 <= value <= 1 for row in rows for value in row) else None


def _budgets(profile: PrefixProfile, budgets: Sequence[float] | None) -> list[float]:
    return profile.budgets.tolist() if budgets is None else sorted({check_budget(budget) for budget in budgets})


def _metadata_lines(profile: PrefixProfile) -> list[str]:
    metadata = {key: value for key, value in sorted(profile.metadata.items()) if key != "spread"}
    width = max(map(len, metadata))
    # Somebody else's text goes to a terminal: one line, and no control characters.
    lines = [f"{_plain(key):<{width}}  {_plain(value)}" for key, value in metadata.items()]
    ranking = calibrated_ranking(metadata)
    return lines if ranking is None else [*lines, "", f"for a cache that ranks alike: {spell_cache(ranking)}"]


def _plain(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _table_lines(profile: PrefixProfile, budgets: Sequence[float]) -> list[str]:
    rows = [profile.keep_ratios(budget).tolist() for budget in budgets]
    head = "layer " + "".join(f"{budget:>7.4g}" for budget in budgets)
    lines = [head, "-" * len(head)]
    lines += [f"{layer:>5} " + "".join(f"{row[layer]:>7.3f}" for row in rows) for layer in range(profile.n_layers)]
    means = " mean " + "".join(f"{math.fsum(row) / len(row):>7.3f}" for row in rows)
    return ["keep ratio (fraction of the prompt's pairs kept) by layer and budget", *lines, "-" * len(head), means]


def _check_lines(profile: PrefixProfile) -> list[str]:
    keep, budgets = profile.keep, profile.budgets
    fall = max(float((keep[:-1] - keep[1:]).max()), 0.0) if len(keep) > 1 else 0.0
    error = float((keep.mean(1) - budgets).abs().max())
    lines = [
        f"check  largest fall from one budget to the next: {fall:.6f} (at most {MAX_FALL})",
        f"check  largest distance of a row's mean from its budget: {error:.6f} (at most {MAX_MEAN_ERROR})",
    ]
    spread = read_spread(profile)
    samples = profile.metadata["samples"]
    if spread is not None and samples.isdecimal() and int(samples) > 1:
        value, row, layer = max((value, i, j) for i, of_row in enumerate(spread) for j, value in enumerate(of_row))
        lines.append(
            f"spread over {samples} samples: largest standard deviation {value:.3f} (layer {layer} at budget "
            f"{budgets[row].item():g}), so its keep ratio is known to about {value / math.sqrt(int(samples)):.3f}"
        )
    return lines


def plot_profiles(
    profiles: Mapping[str, PrefixProfile], out: str | os.PathLike[str], budgets: Sequence[float] | None = None
) -> None:
    """Draw keep ratio by layer, a line for each budget, one panel for each profile; the spread is a shade behind it.

    Args:
        profiles: by the name that is written above the panel where the profile does not name its model.
        out: the picture; its suffix says which kind. Written in one step.
        budgets: lines to draw, fractions kept; None: the grid of each profile (every budget below 1).

    Raises:
        ImportError: there is no matplotlib.
        ValueError: a suffix that cannot be drawn, or a budget outside (0, 1].
        OSError: the picture cannot be written.
    """
    path = Path(out)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"--out is {os.fspath(out)!r}; a picture's name ends in {', '.join(PICTURE_SUFFIXES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(path.parent)!r} to draw {path.name!r} in")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'prefixkv-cache[plot]'") from error
    lines = {name: _budgets(profile, budgets) for name, profile in profiles.items()}
    figure = Figure(figsize=(6.4 * len(profiles), 4.6), layout="constrained")
    panels = figure.subplots(1, len(profiles), sharey=True, squeeze=False)[0]
    for panel, (name, profile) in zip(panels, profiles.items(), strict=True):
        _draw(panel, name, profile, lines[name])
    panels[0].set_ylabel("keep ratio (fraction of the prompt's KV pairs)")
    temporary = path.with_name(f".prefixkv-{uuid.uuid4().hex}{path.suffix}")
    try:
        figure.savefig(temporary, dpi=160)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw(panel: Any, name: str, profile: PrefixProfile, budgets: Sequence[float]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colors = colormaps["viridis"]
    layers = list(range(profile.n_layers))
    width = max(layers[-1], 1)
    spread = dict(zip(profile.budgets.tolist(), read_spread(profile) or [], strict=False))
    ends = []
    # Everything is kept at 1: a line along the upper edge says nothing.
    for budget in [each for each in budgets if each < 1] or budgets:
        keep = profile.keep_ratios(budget).tolist()
        color = colors(0.92 * (1 - budget))
        panel.plot(layers, keep, color=color, linewidth=1.6, marker="o", markersize=2.6)
        if budget in spread:
            low = [max(ratio - deviation, 0) for ratio, deviation in zip(keep, spread[budget], strict=True)]
            high = [min(ratio + deviation, 1) for ratio, deviation in zip(keep, spread[budget], strict=True)]
            panel.fill_between(layers, low, high, color=color, alpha=0.10, linewidth=0)
        ends.append((keep[-1], f"{budget:g}", color))
    for height, (ratio, text, color) in zip(_apart([ratio for ratio, _, _ in ends]), ends, strict=True):
        panel.annotate(
            text, (layers[-1], ratio), xytext=(1.015 * width, height), color=color,
            fontsize=8, va="center",
        )  # fmt: skip
    metadata = profile.metadata
    title = name if metadata["model"] == "unknown" else metadata["model"]
    panel.set_title(
        f"{_plain(title)}\n{_made_for(metadata)}, samples: {_plain(metadata['samples'])}",
        fontsize=10,
        loc="left",
        parse_math=False,
    )
    panel.set_xlabel("layer")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlim(-0.03 * width, 1.08 * width)
    panel.set_ylim(0, 1.02)
    panel.grid(True, linewidth=0.4, alpha=0.4)
    panel.spines[["top", "right"]].set_visible(False)
    panel.text(1.0, 1.005, "budget", transform=panel.transAxes, fontsize=8, ha="right", va="bottom", color="0.4")


def _made_for(metadata: Mapping[str, str]) -> str:
    ranking = calibrated_ranking(metadata)
    return "queries: unknown" if ranking is None else spell_ranking(ranking)


def _apart(heights: Sequence[float], distance: float = 0.036) -> list[float]:
    """Rising heights, moved up just so far that labels at them do not overlap, and all down again below the edge."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + distance) if placed else height)
    limit = 1.0
    for place in reversed(range(len(placed))):
        placed[place] = min(placed[place], limit)
        limit = placed[place] - distance
    return placed
