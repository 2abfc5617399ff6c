"""Profiles for human eyes: tables (`prefixkv inspect`) and a drawing (`prefixkv plot`).

Looks at profiles and changes nothing. matplotlib is imported only to draw: it comes with the `plot` extra.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .arguments import budgets as read_budgets
from .arguments import out_path, write_out

if TYPE_CHECKING:
    from torch import Tensor

    from ..profiles.profile import PrefixProfile

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prefixkv inspect`."""
    parser.add_argument("profile", metavar="P", help="file or bundled name")
    _add_budgets(parser)


def add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prefixkv plot`."""
    parser.add_argument("profiles", nargs="+", metavar="P", help="file or bundled name; several are drawn side by side")
    parser.add_argument("--out", required=True, metavar="FILE", help=f"picture to write: {', '.join(PICTURE_SUFFIXES)}")
    _add_budgets(parser)


def _add_budgets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budgets", type=read_budgets, metavar="B,...", help="fractions kept (the profile's own)")


def run_inspect(arguments: argparse.Namespace) -> None:
    """The command `inspect`: prints the tables."""
    from ..profiles.profile import PrefixProfile

    print(describe_profile(PrefixProfile.load(arguments.profile), arguments.budgets))


def run_plot(arguments: argparse.Namespace) -> None:
    """The command `plot`: writes the drawing, and says where to."""
    from ..profiles.profile import PrefixProfile

    plot_profiles({name: PrefixProfile.load(name) for name in arguments.profiles}, arguments.out, arguments.budgets)
    print(f"wrote {arguments.out}")


def describe_profile(profile: PrefixProfile, budgets: Sequence[float] | None = None) -> str:
    """Metadata, keep ratios of all layers and key heads by budget, what they cost, and how well the rules are obeyed.

    Args:
        profile: any.
        budgets: columns of the table, fractions kept; None: the profile's own grid.

    Returns:
        Lines of text.

    Raises:
        TypeError, ValueError: one of the budgets is not a fraction in (0, 1].
    """
    ratios = _ratios(profile, budgets)
    parts = [_metadata_lines(profile), _table_lines(profile, ratios)]
    if profile.n_heads > 1:
        parts += [_map_lines(budget, keep) for budget, keep in ratios.items()]
    parts += [_measured_lines(profile), _check_lines(profile)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def read_spread(profile: PrefixProfile) -> list[list[float]] | None:
    """The standard deviation over the samples of each layer's keep ratio, [n_budgets][n_layers]; None if there is none.

    Profiles made elsewhere may say anything under this name: what is not such a table counts as none.
    """
    try:
        spread = json.loads(profile.metadata.get("spread", ""))
        rows = [[float(value) for value in row] for row in spread]
    except (ValueError, TypeError, RecursionError, OverflowError):
        return None
    fits = [len(row) for row in rows] == [profile.n_layers] * len(profile.budgets)
    return rows if fits and all(0 <= value <= 1 for row in rows for value in row) else None


def _ratios(profile: PrefixProfile, budgets: Sequence[float] | None) -> dict[float, Tensor]:
    """Keep ratios [n_layers, n_heads] by budget, rising."""
    asked = profile.budgets.tolist() if budgets is None else budgets
    ratios = {budget: profile.keep_ratios(budget) for budget in asked}
    return dict(sorted(ratios.items()))


def _metadata_lines(profile: PrefixProfile) -> list[str]:
    metadata = {key: value for key, value in profile.metadata.items() if key not in ("spread", "measured")}
    metadata["method"] = profile.method.spell()
    width = max(map(len, metadata))
    # Somebody else's text goes to a terminal: one line, and no control characters.
    return [f"{_plain(key):<{width}}  {_plain(value)}" for key, value in sorted(metadata.items())]


def _plain(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _table_lines(profile: PrefixProfile, ratios: Mapping[float, Tensor]) -> list[str]:
    heads = f", the mean of its {profile.n_heads} key heads," if profile.n_heads > 1 else ""
    head = "layer " + _columns(ratios, ">7.4g")
    rows = [
        f"{layer:>5} " + _columns((keep[layer].mean().item() for keep in ratios.values()), ">7.3f")
        for layer in range(profile.n_layers)
    ]
    means = " mean " + _columns((keep.mean().item() for keep in ratios.values()), ">7.3f")
    title = f"keep ratio (fraction of the prompt's pairs kept) by layer{heads} and budget"
    return [title, head, "-" * len(head), *rows, "-" * len(head), means]


def _map_lines(budget: float, keep: Tensor) -> list[str]:
    """Key heads by layers, in percent, and the mean of each layer below."""
    percent = (100 * keep).T
    head = "layer " + _columns(range(len(keep)), ">4")
    rows = [f"{number:>5} " + _columns(row.tolist(), ">4.0f") for number, row in enumerate(percent)]
    means = " mean " + _columns(percent.mean(0).tolist(), ">4.0f")
    return [f"percent kept at budget {budget:.4g}, by key head (line) and layer (column)", head, *rows, means]


def _columns(values: Iterable[Any], form: str) -> str:
    return "".join(format(value, form) for value in values)


def _measured_lines(profile: PrefixProfile) -> list[str]:
    measured = profile.measured
    if measured is None:
        return ["never measured against the full cache"]
    rows = {float(budget): row for budget, row in measured["budgets"].items()}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(10, *(len(name) + 2 for name in names))
    lines = [
        f"{budget:>6.4g}" + _columns((format(row[name], ".4g") if name in row else "-" for name in names), f">{width}")
        for budget, row in sorted(rows.items())
    ]
    title = f"measured against the full cache on {measured['samples']} samples that the profile was not made from"
    return [title, _plain("budget" + _columns(names, f">{width}")), *lines]


def _check_lines(profile: PrefixProfile) -> list[str]:
    from ..profiles.profile import MAX_FALL, MAX_MEAN_ERROR

    keep, budgets = profile.keep, profile.budgets
    fall = max(float((keep[:-1] - keep[1:]).max()), 0.0) if len(keep) > 1 else 0.0
    error = float((keep.mean((1, 2)) - budgets).abs().max())
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
    """Draw keep ratio by layer, a line for each budget.

    One column for each profile; the spread is a shade behind a line. Below the lines, which then are means over the key
    heads, a profile by key head has a map of heads by layers for each budget.

    Args:
        profiles: by the name that is written above the column where the profile does not name its model.
        out: the picture; its suffix says which kind. Written in one step.
        budgets: lines to draw, fractions kept; None: the grid of each profile (every budget below 1).

    Raises:
        ImportError: there is no matplotlib.
        ValueError: a suffix that cannot be drawn, or a budget that is no fraction in (0, 1].
        OSError: the picture cannot be written.
    """
    path = out_path(os.fspath(out), "a picture", *PICTURE_SUFFIXES)
    ratios = {name: _ratios(profile, budgets) for name, profile in profiles.items()}
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        cure = "pip install '.[plot]' in a checkout, 'prefixkv-cache[plot]' elsewhere"
        raise ImportError(f"drawing needs matplotlib: {cure}") from error
    # Everything is kept at 1: a line along the upper edge says nothing.
    lines = {name: {b: keep for b, keep in of.items() if b < 1} or of for name, of in ratios.items()}
    maps = {name: len(lines[name]) if profile.n_heads > 1 else 0 for name, profile in profiles.items()}
    figure = Figure(figsize=(6.4 * len(profiles), 4.6 + 1.1 * max(maps.values())), layout="constrained")
    columns = figure.subfigures(1, len(profiles), squeeze=False)[0]
    for column, (name, profile) in zip(columns, profiles.items(), strict=True):
        panels = column.subplots(1 + maps[name], 1, squeeze=False, height_ratios=[4.6] + [1.0] * maps[name])[:, 0]
        _draw_lines(panels[0], name, profile, lines[name])
        for panel, (budget, keep) in zip(panels[1:], lines[name].items(), strict=False):
            _draw_map(panel, budget, keep)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=160, format=path.suffix[1:].lower())
    write_out(path, picture.getvalue())


def _draw_lines(panel: Any, name: str, profile: PrefixProfile, ratios: Mapping[float, Tensor]) -> None:
    from matplotlib import colormaps

    layers = list(range(profile.n_layers))
    width = max(layers[-1], 1)
    spread = dict(zip(profile.budgets.tolist(), read_spread(profile) or [], strict=False))
    means = {budget: keep.mean(1).tolist() for budget, keep in ratios.items()}
    ends = _apart([keep[-1] for keep in means.values()])
    for (budget, keep), height in zip(means.items(), ends, strict=True):
        color = colormaps["viridis"](0.92 * (1 - budget))
        panel.plot(layers, keep, color=color, linewidth=1.6, marker="o", markersize=2.6)
        if budget in spread:
            low = [max(ratio - deviation, 0) for ratio, deviation in zip(keep, spread[budget], strict=True)]
            high = [min(ratio + deviation, 1) for ratio, deviation in zip(keep, spread[budget], strict=True)]
            panel.fill_between(layers, low, high, color=color, alpha=0.10, linewidth=0)
        panel.annotate(
            f"{budget:g}", (layers[-1], keep[-1]), xytext=(1.015 * width, height), color=color,
            fontsize=8, va="center",
        )  # fmt: skip
    metadata = profile.metadata
    title = name if metadata["model"] == "unknown" else metadata["model"]
    described = f"{profile.method.spell()}, samples: {metadata['samples']}"
    panel.set_title(f"{_plain(title)}\n{_plain(described)}", fontsize=10, loc="left", parse_math=False)
    panel.set_ylabel("keep ratio (fraction of the prompt's KV pairs)", fontsize=9)
    _layer_axis(panel, (-0.03 * width, 1.08 * width))
    panel.set_ylim(0, 1.02)
    panel.grid(True, linewidth=0.4, alpha=0.4)
    panel.spines[["top", "right"]].set_visible(False)
    panel.text(1.0, 1.005, "budget", transform=panel.transAxes, fontsize=8, ha="right", va="bottom", color="0.4")


def _draw_map(panel: Any, budget: float, keep: Tensor) -> None:
    """Key heads by layers, light where much is kept, with the scale beside it."""
    n_layers = len(keep)
    image = panel.imshow(keep.T.tolist(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    panel.set_ylabel("key head", fontsize=8)
    panel.set_title(f"budget {budget:g}", fontsize=8, loc="left")
    _layer_axis(panel, (-0.5, n_layers - 0.5))
    panel.figure.colorbar(image, ax=panel, pad=0.01, ticks=[0, 1])


def _layer_axis(panel: Any, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel("layer", fontsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlim(*limits)


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
